"""The command line: `python -m benchmarks --list | --op NAME | --quick | --device cuda | --json FILE`."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import torch

from benchmarks import learnable, timer  # noqa: F401 (learnable registers its cases)
from benchmarks.cases import CASES, OURS, Bench, Case
from benchmarks.gate import Verdict, against_contract, against_peers
from benchmarks.inputs import Input
from benchmarks.report import HEADER, Row, environment, summary, table_line, write_json

CPU = torch.device("cpu")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="qkernels against torch's own.")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--op", action="append", metavar="NAME", help="only cases with NAME in their name (repeatable)")
    parser.add_argument("--quick", action="store_true", help="fewer inputs and rounds")
    parser.add_argument("--device", type=torch.device, default=CPU)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="all inputs in this dtype, not in those of the case"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: 1; all on a GPU, where the CPU only checks)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, metavar="N", help="start no further case after N seconds, and say so")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    args = parser.parse_args(argv)
    args.cases = [c for c in CASES.values() if not args.op or any(name in c.name for name in args.op)]
    if not args.cases:
        parser.error(f"no case matches {args.op}; --list names them")
    if args.device.type == "cuda":
        if not torch.cuda.is_available():
            parser.error("torch finds no CUDA device")
        args.device = torch.device("cuda", args.device.index or 0)
    args.jobs = jobs(args)
    if not args.jobs and not args.list:
        parser.error(f"the cases that match {args.op} have inputs for CUDA alone")
    return args


def inputs_of(case: Case, args: argparse.Namespace) -> list[Input]:
    """The case's inputs on this device, in the dtype asked for; each once."""
    chosen = case.inputs(args.device, args.quick)
    return list(dict.fromkeys(replace(put, dtype=args.dtype or put.dtype) for put in chosen))


def jobs(args: argparse.Namespace) -> list[tuple[Case, Input]]:
    """What is to be run. Where time may run out, the last and largest input of every case comes first."""
    chosen = [(case, inputs_of(case, args)) for case in args.cases]
    if args.seconds is None:
        return [(case, put) for case, puts in chosen for put in puts]
    turns = zip_longest(*([(case, put) for put in reversed(puts)] for case, puts in chosen))
    return [job for turn in turns for job in turn if job is not None]


def refusals(bench: Bench, x: torch.Tensor) -> dict[str, str]:
    """Who does not take such an input (torch's fused op wants float32, say), and what it answers."""
    refused = {}
    for name, impl in bench.impls.items():
        try:
            impl(x, x)
        except (RuntimeError, TypeError, ValueError) as error:
            refused[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return refused


def measure(case: Case, put: Input, args: argparse.Namespace, copy_gb_per_second: float | None) -> Iterator[Row]:
    """Gate, then time: one row on a CPU, two (calls, and replays of a graph) on a GPU."""
    on_gpu = args.device.type == "cuda"
    x = put.make(args.device, args.seed)
    bench = case.build(args.device)
    refused = refusals(bench, x)
    impls = {name: impl for name, impl in bench.impls.items() if name not in refused}
    if OURS in refused:  # a peer may refuse, we may not
        verdict = Verdict([refused.pop(OURS)], {})
    elif on_gpu:
        verdict = against_contract(bench, case.build(CPU), x, list(impls))
    else:
        verdict = against_peers(bench, x, list(impls))
    how = "events" if on_gpu else "process time" if torch.get_num_threads() == 1 else "wall time"
    row = Row(case.name, str(put), put.shape, put.dtype, put.layout, how, case.bytes_moved(x), {}, verdict.wrong,
              refused, verdict.peers_differ, {})  # fmt: skip
    if verdict.wrong:
        yield row
        return
    inputs = timer.rotating_inputs(x)
    rounds, slice_seconds = (15, 0.004) if args.quick else (20, 0.005) if on_gpu else (40, 0.01)
    called = {name: timer.calls(impl, inputs) for name, impl in impls.items()}
    captured = [("graph", *timer.capture_all(impls, inputs))] if on_gpu else []
    for way, passes, not_captured in [(how, called, {}), *captured]:
        timings = timer.time_interleaved(passes, inputs, rounds=rounds, slice_seconds=slice_seconds)
        timed = replace(row, how=way, timings=timings, not_captured=not_captured)
        of_copy = timed.gb_per_second / copy_gb_per_second if copy_gb_per_second and timed.bytes_moved else None
        yield replace(timed, of_copy=of_copy)


def main(argv: list[str] | None = None) -> int:
    start = time.monotonic()
    args = parse_args(argv)
    if args.list:
        print("\n".join(case.name for case in args.cases))
        return 0
    warnings.filterwarnings("ignore", module=r"torch\.ao\..*")
    on_gpu = args.device.type == "cuda"
    if args.threads or not on_gpu:
        torch.set_num_threads(args.threads or 1)
    copy_gb_per_second = None
    if on_gpu:
        torch.cuda.set_device(args.device)
        copy_gb_per_second = timer.copy_bandwidth(args.device)
    where = {**environment(args.device, args.seed), "copy_gb_per_second": copy_gb_per_second}
    print(", ".join(f"{key} {value}" for key, value in where.items() if value is not None))
    print("speedup: torch's time over ours, by rounds; above 1 ours is faster\n")
    print(HEADER)
    rows: list[Row] = []
    not_run = 0
    for case, put in args.jobs:
        if args.seconds is not None and time.monotonic() - start > args.seconds:
            not_run += 1
            continue
        for row in measure(case, put, args, copy_gb_per_second):
            rows.append(row)
            print(table_line(row), flush=True)
            if args.json:  # after every row, so that a run cut short leaves what it has
                write_json(args.json, rows, where)
    print("\n" + summary(rows))
    if not_run:
        print(f"{not_run} of {len(args.jobs)} inputs were not run: {args.seconds:g} seconds were over")
    return 1 if any(row.wrong for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
