"""The command line: `python -m benchmarks --list | --op NAME | --suite NAME | --device cuda | --json FILE`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from benchmarks import (  # noqa: F401 (some register cases)
    arguments,
    calls,
    compare,
    histograms,
    learnable,
    module_cases,
    operators,
    overhead,
    qat,
    timer,
)
from benchmarks.cases import CASES, Case
from benchmarks.inputs import Input
from benchmarks.models import MODELS, SMALL_MODELS
from benchmarks.peers import absence
from benchmarks.report import HEADER, Row, environment, heading, summary, table_line, write_json
from benchmarks.running import Settings, measure

CPU = torch.device("cpu")

# Which parts a suite has. The "torch.compile" peers cost a compilation per input, so the short runs go without.
SUITES = {
    "default": ("kernels", "modules"),
    "quick": ("kernels", "modules"),
    "full": ("kernels", "modules", "overhead", "qat"),
    "kernels": ("kernels",),
    "modules": ("modules",),
    "qat": ("qat",),
    "overhead": ("overhead",),
}
COMPILING = ("full", "kernels", "modules")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Job:
    """Something to run, which gives rows."""

    name: str
    rows: Callable[[float | None], Iterator[Any]]  # of the copy bandwidth


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="qkernels against torch's own and others, each case behind a correctness gate.",
    )
    parser.add_argument("--list", action="store_true", help="cases, byte formulas, inputs and peers; then stop")
    parser.add_argument("--op", action="append", metavar="NAME", help="only cases with NAME in their name (repeatable)")
    parser.add_argument(
        "--suite",
        choices=[name for name in SUITES if name != "default"],
        help="quick: fewer inputs and rounds; full: everything, torch.compile's versions too; "
        "without: operators and modules",
    )
    parser.add_argument("--quick", action="store_true", help="the same as --suite quick")
    parser.add_argument("--device", type=arguments.device, default=CPU, help="cpu (default), cuda or cuda:N")
    parser.add_argument("--dtype", choices=DTYPES, help="all inputs in this dtype, not in those of the case")
    parser.add_argument(
        "--threads", type=arguments.positive, help="CPU threads (default: 1; all on a GPU, where the CPU only checks)"
    )
    parser.add_argument("--seed", type=arguments.seed, default=0)
    parser.add_argument(
        "--seconds", type=arguments.seconds, metavar="N", help="start no further case after N seconds, and say so"
    )
    parser.add_argument("--json", type=arguments.output, metavar="FILE", help="also write the results there")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"), help="two JSON files side by side; then stop"
    )
    parser.add_argument("--across-machines", action="store_true", help="with --compare: even of different machines")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.across_machines and not args.compare:
        parser.error("--across-machines goes with --compare")
    if args.compare:
        others = ("list", "op", "suite", "quick", "dtype", "threads", "seconds", "json")
        given = [f"--{name}" for name in others if getattr(args, name)]
        if given:
            parser.error(f"--compare reads two files and runs nothing; it does not go with {', '.join(given)}")
        return args
    if args.quick and args.suite not in (None, "quick"):
        parser.error(f"--quick is --suite quick, and --suite {args.suite} was given too")
    args.suite = "quick" if args.quick else args.suite or "default"
    parts = SUITES[args.suite]
    if args.dtype and not {"kernels", "modules"} & set(parts):
        parser.error(f"--dtype is for cases with inputs; the suite {args.suite} has none")
    of_parts = sorted(
        (case for case in CASES.values() if case.suite in parts), key=lambda case: parts.index(case.suite)
    )
    args.cases = [case for case in of_parts if wanted(args, case.name)]
    args.extra_names = [name for name in extra_names(args.suite) if wanted(args, name)]
    if not args.cases and not args.extra_names:
        parser.error(f"no case of the suite {args.suite} matches {args.op}; --list names them")
    args.jobs = jobs(args)
    if not args.jobs and not args.list:
        parser.error(f"the cases that match {args.op} have no input for {args.device} in the suite {args.suite}")
    return args


def wanted(args: argparse.Namespace, name: str) -> bool:
    """Whether --op asks for a case of such a name."""
    return not args.op or any(part in name for part in args.op)


def qat_models(suite: str) -> list[str]:
    """The models whose training step the suite has."""
    return [] if "qat" not in SUITES[suite] else list(MODELS if suite == "full" else SMALL_MODELS)


def extra_names(suite: str) -> list[str]:
    """What the suite has beside the registered cases."""
    of_overhead = overhead.names() if "overhead" in SUITES[suite] else []
    return of_overhead + [qat.case_name(model) for model in qat_models(suite)]


def inputs_of(case: Case, args: argparse.Namespace) -> list[Input]:
    """The case's inputs on this device, in the dtype asked for; each once."""
    if args.dtype and args.dtype not in case.dtypes:
        return []
    chosen = case.inputs(args.device, args.suite)
    return list(dict.fromkeys(replace(put, dtype=args.dtype or put.dtype) for put in chosen))


def ordered(args: argparse.Namespace) -> list[tuple[Case, Input]]:
    """The cases' jobs. Where time may run out, the last and largest input of every case comes first."""
    chosen = [(case, inputs_of(case, args)) for case in args.cases]
    if args.seconds is None:
        return [(case, put) for case, puts in chosen for put in puts]
    turns = zip_longest(*([(case, put) for put in reversed(puts)] for case, puts in chosen))
    return [job for turn in turns for job in turn if job is not None]


def jobs(args: argparse.Namespace) -> list[Job]:
    """What is to be run."""
    settings = Settings(args.device, args.seed, args.suite == "quick", args.suite in COMPILING)
    found = [
        Job(case.name, lambda copy, case=case, put=put: measure(case, put, settings, copy))  # type: ignore[misc]  # bound by its default
        for case, put in ordered(args)
    ]
    names = set(args.extra_names)
    if "overhead" in SUITES[args.suite] and names & set(overhead.names()):
        found.append(
            Job("overhead", lambda copy: overhead.rows(args.device, quick=False, wanted=lambda name: name in names))
        )
    for model in qat_models(args.suite):
        if qat.case_name(model) in names:
            found.append(Job(model, lambda copy, model=model: qat.rows([model], args.device)))  # type: ignore[misc]  # bound by its default
    return found


def listing(args: argparse.Namespace) -> str:
    """What the suite would run: case, bytes, inputs, peers with their absence."""
    lines = []
    for case in args.cases:
        puts = [f"{put} ({put.name})" if put.name else str(put) for put in inputs_of(case, args)]
        absences = {peer: absence(peer, args.device) for peer in case.peers}
        peers = [f"{peer} [{reason}]" if reason else peer for peer, reason in absences.items()]
        lines += [
            case.name,
            f"    suite: {case.suite}; bytes: {case.bytes_formula}; peers: {', '.join(peers)}",
            f"    inputs on {args.device}: {', '.join(puts) or 'none in this suite'}",
        ]
    of_qat = {qat.case_name(model): model for model in MODELS}
    for name in args.extra_names:
        if name in of_qat:
            lines += [name, f"    suite: qat; {MODELS[of_qat[name]].__doc__ or 'as the model of that name'}"]
        else:
            lines += [name, "    suite: overhead; one element, or once per process"]
    lines += [
        f"{name}\n    suite: overhead; not timed: {reason}"
        for name, reason in calls.NOT_TIMED.items()
        if "overhead" in SUITES[args.suite] and wanted(args, name)
    ]
    return "\n".join(lines)


def line_of(row: Any) -> str:
    """A row for people."""
    return table_line(row) if isinstance(row, Row) else f"\n{qat.text(row)}"


def run(args: argparse.Namespace) -> int:
    """Run the jobs, printing and storing each row as it comes; 1 if a gate found something wrong."""
    start = time.monotonic()
    copy_gb_per_second = None
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
        copy_gb_per_second = timer.copy_bandwidth(args.device)
    where = {**environment(args.device, args.seed, args.suite), "copy_gb_per_second": copy_gb_per_second}
    print(heading(where))
    print("speedup: the peer's time over ours, by rounds; above 1 ours is faster\n")
    print(HEADER)
    rows: list[Any] = []
    not_run = 0
    for job in args.jobs:
        if args.seconds is not None and time.monotonic() - start > args.seconds:
            not_run += 1
            continue
        for row in job.rows(copy_gb_per_second):
            rows.append(row)
            print(line_of(row), flush=True)
            if args.json:  # after every row, so that a run cut short leaves what it has
                write_json(args.json, rows, where)
    of_cases = [row for row in rows if isinstance(row, Row)]
    print("\n" + summary(of_cases))
    if not_run:
        print(f"{not_run} of {len(args.jobs)} inputs were not run: {args.seconds:g} seconds were over")
    return 1 if any(row.wrong for row in rows) else 0


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.compare:
        try:
            return compare.main(*args.compare, across_machines=args.across_machines)
        except compare.CannotCompare as error:
            print(f"python -m benchmarks: error: {error}", file=sys.stderr)
            return 2
    if args.list:
        print(listing(args))
        return 0
    arguments.quiet()
    if args.threads or args.device.type != "cuda":
        torch.set_num_threads(args.threads or 1)
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
