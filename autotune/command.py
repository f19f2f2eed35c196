"""The command `python -m qkernels.autotune`: tune, info, clear."""

from __future__ import annotations

import argparse
import datetime
import importlib
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from qkernels.autotune import cache, cuda, tables
from qkernels.autotune.environment import settings
from qkernels.autotune.files import BadFileError, read_document
from qkernels.autotune.machine import Machine, kernel_hash, machine_of
from qkernels.autotune.search import MOST
from qkernels.autotune.tuner import MARGIN, Bench, Outcome, Workload, group, tune_decision

# The operators lie above this folder, so the command finds them by name: a library that imports `qkernels.autotune`
# never loads them through it.
WORKLOADS = "qkernels.workloads"

PROG = "python -m qkernels.autotune"
EXAMPLES = """examples:
  python -m qkernels.autotune --op fake_quantize --shapes 64x256x64x64,4096x14336
  python -m qkernels.autotune tune --op aminmax,learnable_fake_quantize --shapes 256x128x3x3 --axis 0 --dtype bfloat16
  python -m qkernels.autotune info
  python -m qkernels.autotune clear

`tune` may be left out. The environment variables are in docs/tuning.md.
"""


def parse_args(argv: Sequence[str], provider: Any) -> argparse.Namespace:
    """Arguments of the command; `tune` is understood where no command is named."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog=PROG, description="Launch configurations measured on this GPU.", epilog=EXAMPLES, formatter_class=formatter
    )
    commands = parser.add_subparsers(dest="command", metavar="{tune,info,clear}", required=True)
    tune = commands.add_parser("tune", help="time configurations on a GPU and remember what beats the heuristic",
                               epilog=EXAMPLES, formatter_class=formatter)  # fmt: skip
    tune.add_argument("--op", type=_names(sorted(provider.OPS)), required=True, metavar="NAME[,NAME]",
                      help=f"of {', '.join(sorted(provider.OPS))}")  # fmt: skip
    tune.add_argument("--shapes", type=_shapes, required=True, metavar="AxB[,CxDxE]", help="shapes of a contiguous x")
    tune.add_argument("--dtype", type=_names(list(provider.DTYPES)), default=["float32", "bfloat16"],
                      metavar="NAME[,NAME]", help=f"of {', '.join(provider.DTYPES)} (float32,bfloat16)")  # fmt: skip
    tune.add_argument("--axis", type=_axes, default=[None], metavar="N[,N]",
                      help="channel axes; none is per tensor (default: none)")  # fmt: skip
    tune.add_argument("--device", type=_device, default=torch.device("cuda"), help="default: cuda")
    tune.add_argument("--margin", type=_fraction, default=MARGIN,
                      help=f"share of the heuristic's time that must be saved (default: {MARGIN})")  # fmt: skip
    tune.add_argument("--candidates", type=_positive, default=MOST, metavar="N",
                      help=f"configurations beside the heuristic's (default: {MOST})")  # fmt: skip
    tune.add_argument("--budget", type=_seconds, metavar="SECONDS", help="start no further decision after so long")
    tune.add_argument("--out", type=Path, metavar="FILE", help="cache file to write (default: the user cache)")
    tune.add_argument("--export", type=Path, metavar="FILE",
                      help="also write what that file holds for this machine as a table for shipping")  # fmt: skip
    tune.add_argument("--commit", help="the commit that --export notes (default: what git says)")
    info = commands.add_parser("info", help="what is tuned, where it lies, what is used")
    info.add_argument("--device", type=_device, default=torch.device("cuda"), help="default: cuda")
    commands.add_parser("clear", help="delete the user cache, for every GPU")
    named = argv and (argv[0] in commands.choices or argv[0] in ("-h", "--help"))
    return parser.parse_args(argv if named or not argv else ["tune", *argv])


def _names(known: list[str]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        for name in text.split(","):
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return list(dict.fromkeys(text.split(",")))

    return names


def _shapes(text: str) -> list[tuple[int, ...]]:
    found = []
    for part in text.split(","):
        sizes = part.lower().split("x")
        if not all(size.isascii() and size.isdigit() and int(size) > 0 for size in sizes):
            raise argparse.ArgumentTypeError(f"{part!r} is no shape; write positive sizes as 64x256x64x64")
        found.append(tuple(map(int, sizes)))
    return list(dict.fromkeys(found))


def _axes(text: str) -> list[int | None]:
    try:
        return list(dict.fromkeys(None if part == "none" else int(part) for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write integers, or none for per tensor") from None


def _device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no device; write cuda or cuda:1") from None


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1; got {text!r}")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds, at least 0; got {text!r}")
    return value


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a positive integer; got {text!r}")
    return int(text)


def main(argv: Sequence[str] | None = None, open_bench: Callable[[torch.device], Bench] = cuda.open_bench) -> int:
    """Run the command.

    Args:
        argv: arguments; None takes the process's.
        open_bench: gives the machine to tune on; a test gives one without a GPU.

    Returns:
        The exit status: 0, or 1 after an error that was printed. A wrong argument exits with 2.
    """
    argv = sys.argv[1:] if argv is None else argv
    provider = importlib.import_module(WORKLOADS)
    args = parse_args(argv, provider)
    try:
        if args.command == "info":
            return _info(args)
        if args.command == "clear":
            return _clear()
        return _tune(args, provider, open_bench, f"{PROG} {shlex.join(argv)}")
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 1


# --- tune --------------------------------------------------------------------------------------------------------


def _workloads(args: argparse.Namespace, provider: Any) -> list[Workload]:
    return [
        workload
        for op in args.op
        for shape in args.shapes
        for dtype in args.dtype
        for axis in args.axis
        for workload in provider.workloads_of(op, shape, dtype, axis)
    ]


def _tune(args: argparse.Namespace, provider: Any, open_bench: Callable[[torch.device], Bench], how: str) -> int:
    workloads = _workloads(args, provider)  # wrong arguments are found before a GPU is asked for
    commit = (args.commit or _commit()) if args.export else ""
    bench = open_bench(args.device)
    path = args.out or cache.cache_path(settings().cache_dir, bench.machine)
    print(f"{bench.machine}: {len(workloads)} workloads, results to {path}")
    jobs = group(workloads, bench)
    start, improved, failed = time.monotonic(), 0, 0
    for number, (decision, asking) in enumerate(jobs.items(), 1):
        if args.budget is not None and time.monotonic() - start > args.budget:
            print(f"stopped by --budget after {number - 1} of {len(jobs)} decisions")
            break
        print(f"[{number}/{len(jobs)}] {decision} ({', '.join(workload.name for workload in asking)})", flush=True)
        try:
            outcome = tune_decision(decision, asking, bench, margin=args.margin, most=args.candidates)
        except Exception as error:  # out of memory, say: the next one may fit
            failed += 1
            print(f"    failed: {type(error).__name__}: {error}", flush=True)
            continue
        print(_report(outcome), flush=True)
        improved += outcome.improved
        _remember(path, _tuned(outcome, bench.machine), outcome.improved)
    print(f"{improved} of {len(jobs)} decisions improved, {failed} failed")
    if args.export:
        _export(args.export, path, bench.machine, commit, how)
    return 1 if failed else 0


def _remember(path: Path, tuned: cache.Tuned, improved: bool) -> None:
    """Write a result at once, so that an interrupted run keeps what it has.

    A heuristic that was not beaten is written only where a shipped table would answer otherwise; what an earlier run
    had in its place goes.
    """
    if improved or tuned.decision in tables.load(tuned.machine.gpu):
        cache.save(path, [tuned])
    elif path.exists():
        cache.save(path, [], drop=[tuned.key])


def _export(target: Path, path: Path, machine: Machine, commit: str, how: str) -> None:
    results = cache.load(path, machine).values()
    if not results:
        print(f"nothing to export: {path} holds nothing that beats the heuristic")
        return
    count = tables.export(target, machine, results, commit=commit, date=_now(), how=how)
    print(f"{count} entries in {target}; to ship them, put it at {tables.table_path(machine.gpu)}")


def _report(outcome: Outcome) -> str:
    skipped = [reason for reason in outcome.left_out.values() if not reason.startswith("failed")]
    failed = [reason for reason in outcome.left_out.values() if reason.startswith("failed")]
    lines = [f"    {outcome.timed} timed, {len(skipped)} pruned, {len(failed)} failed"]
    lines += [f"    for example {reason}" for reason in failed[:1]]
    if outcome.improved:
        lines += [f"    {outcome.best}", f"    instead of {outcome.heuristic}: {outcome.ratio:.3f} of its time"]
    else:
        lines.append("    the heuristic stays")
    return "\n".join(lines)


def _tuned(outcome: Outcome, machine: Machine) -> cache.Tuned:
    hashed = kernel_hash(outcome.decision.function)
    return cache.Tuned(outcome.decision, outcome.best, machine, hashed, round(outcome.ratio, 4), _now())


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _commit() -> str:
    """The checkout's commit, with -dirty if files differ from it."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except OSError as error:
        raise ValueError(f"--export needs --commit where git does not run: {error}") from error
    if done.returncode != 0:
        raise ValueError("--export needs --commit where the package is not a git checkout")
    return done.stdout.strip()


# --- info, clear ---------------------------------------------------------------------------------------------------


def _info(args: argparse.Namespace) -> int:
    chosen = settings()
    machine = None
    if args.device.type == "cuda" and torch.cuda.is_available():
        cuda.check_index(args.device)
        machine = machine_of(args.device)
    state = "used (QKERNELS_AUTOTUNE)" if chosen.autotune else "not used: QKERNELS_AUTOTUNE=0"
    print(f"tuned configurations: {state}")
    print(f"machine: {machine or f'no CUDA device, torch {torch.__version__}; everything is heuristic'}")
    shipped = sorted(tables.FOLDER.glob("*.json"))
    print(f"shipped tables: {', '.join(path.stem for path in shipped) or 'none'}")
    files = sorted(chosen.cache_dir.glob(f"{cache.PREFIX}*.json"))
    print(f"user cache: {chosen.cache_dir}" + ("" if files else ", empty"))
    for path in files:
        try:
            entries = read_document(path)["entries"]
        except BadFileError as error:
            print(f"  not used: {error}")
            continue
        print(f"  {path.name}: {len(entries)} entries")
        for key, entry in sorted(entries.items()):
            print(f"    {key}: {_status(key, entry, machine)}")
    return 0


def _status(key: str, entry: Any, machine: Machine | None) -> str:
    try:
        tuned = cache.Tuned.from_dict(entry)
    except (TypeError, ValueError) as error:
        return f"invalid: {error}"
    text = f"{tuned.config}, {tuned.ratio} of the heuristic's time"
    if tuned.key != key:
        return f"invalid: the entry is for {tuned.key!r}"
    if tuned.kernels != kernel_hash(tuned.decision.function):
        return f"{text}; stale, of other kernels"
    return text if machine in (None, tuned.machine) else f"{text}; of another machine or version"


def _clear() -> int:
    folder = settings().cache_dir
    deleted = cache.clear(folder)
    for path in deleted:
        print(f"deleted {path}")
    if not deleted:
        print(f"nothing to delete in {folder}")
    return 0
