"""Run tests in several pytest processes at once, with nothing but pytest installed.

    python -m tests.gpu.run_suite --processes 8 --seconds 150 --out results -- --device cuda tests/ops

One process would leave the GPU idle while it compiles. Each runs one shard (tests/gpu/plugin.py), with a log and a
JUnit file in --out. When time is up they are interrupted, so that they still report what they have. The last line
counts.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

COUNT = re.compile(r"(\d+) (passed|failed|errors?|skipped)\b")
LAST_LINE = re.compile(r"(\d (passed|failed|errors?|skipped|deselected)|no tests ran)\b.* in \d+\.\d+s")
NOTHING_SELECTED = 5  # pytest's exit status; a small shard may be empty
GRACE_SECONDS = 10


@dataclass
class Shard:
    """One pytest process, and where it writes."""

    number: int
    log: Path
    process: subprocess.Popen[bytes]

    def counts(self) -> Counter[str] | None:
        """What pytest counts in its last line; None if the process ended without one."""
        last = [line for line in self.lines() if LAST_LINE.search(line)][-1:]
        if not last:
            return None
        return Counter({word.removesuffix("s"): int(number) for number, word in COUNT.findall(last[0])})

    def bad_tests(self) -> list[str]:
        return [line for line in self.lines() if line.startswith(("FAILED ", "ERROR "))]

    def lines(self) -> list[str]:
        return self.log.read_text(encoding="utf-8", errors="replace").splitlines()


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu.run_suite",
        description="Tests in several pytest processes.",
        epilog="After -- : pytest's.",
    )
    parser.add_argument("--processes", type=int, default=4, metavar="N")
    parser.add_argument("--seconds", type=float, required=True, metavar="N", help="interrupt what runs after N seconds")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for tests-K.log and tests-K.xml")
    parser.add_argument("pytest", nargs="+", metavar="ARGUMENT", help="arguments of pytest")
    args = parser.parse_args(argv)
    if args.processes < 1:
        parser.error(f"--processes must be at least 1; got {args.processes}")
    return args


def start(number: int, args: argparse.Namespace) -> Shard:
    log = args.out / f"tests-{number}.log"
    command = [sys.executable, "-m", "pytest", "-p", "tests.gpu.plugin", "--shard", f"{number}/{args.processes}",
               "--junitxml", str(args.out / f"tests-{number}.xml"), *args.pytest]  # fmt: skip
    with log.open("wb") as stream:
        return Shard(number, log, subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT))


def wait(shards: list[Shard], until: float) -> bool:
    """Wait for all; whether they had to be interrupted."""
    for shard in shards:
        try:
            shard.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            break
    else:
        return False
    running = [shard for shard in shards if shard.process.poll() is None]
    for shard in running:
        shard.process.send_signal(signal.SIGINT)
    last = time.monotonic() + GRACE_SECONDS
    for shard in running:
        try:
            shard.process.wait(max(0.0, last - time.monotonic()))
        except subprocess.TimeoutExpired:
            shard.process.kill()
            shard.process.wait()
    return True


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    shards: list[Shard] = []
    try:
        for number in range(args.processes):
            shards.append(start(number, args))
        interrupted = wait(shards, begin + args.seconds)
    finally:
        for shard in shards:
            shard.process.kill()  # nothing, where it has ended
    total: Counter[str] = Counter()
    lost = []
    for shard in shards:
        status = shard.process.wait()
        counts = shard.counts()
        total += counts or Counter()
        if counts is None:
            lost.append(shard.number)
            print(f"process {shard.number} ended with {status} and no result: {shard.log}")
        for line in shard.bad_tests():
            print(line)
    words = [f"{total[word]} {word}" for word in ("passed", "failed", "error", "skipped")]
    if lost:
        words.append(f"{len(lost)} processes lost")
    if interrupted:
        words.append(f"interrupted after {args.seconds:g} s, the rest was not run")
    print(", ".join(words))
    good = all(shard.process.returncode in (0, NOTHING_SELECTED) for shard in shards)
    return 0 if good and total["passed"] and not interrupted else 1


if __name__ == "__main__":
    sys.exit(main())
