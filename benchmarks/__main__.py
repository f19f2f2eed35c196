"""The command line: `python -m benchmarks --list | --op NAME | --quick | --device cuda | --json FILE`."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import torch

from benchmarks.cases import CASES, OURS, Bench, Case
from benchmarks.report import HEADER, Row, environment, summary, table_line, write_json
from benchmarks.timer import time_interleaved


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="qkernels against torch's own.")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--op", action="append", metavar="NAME", help="only cases with NAME in their name (repeatable)")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rounds")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    args = parser.parse_args(argv)
    args.cases = [c for c in CASES.values() if not args.op or any(name in c.name for name in args.op)]
    if not args.cases:
        parser.error(f"no case matches {args.op}; --list names them")
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device")
    return args


def refusals(bench: Bench, x: torch.Tensor) -> dict[str, str]:
    """Who does not take such an input (torch's fused op wants float32, say), and what it answers."""
    refused = {}
    for name, impl in bench.impls.items():
        try:
            impl(x)
        except (RuntimeError, TypeError, ValueError) as error:
            refused[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return refused


def measure(case: Case, shape: tuple[int, ...], args: argparse.Namespace) -> Row:
    """Gate, then time. A case that does not compute what torch computes is not timed."""
    generator = torch.Generator().manual_seed(args.seed)
    x = torch.randn(shape, generator=generator).mul_(3).to(args.device, getattr(torch, args.dtype))
    bench = case.build(args.device)
    refused = refusals(bench, x)
    impls = {name: impl for name, impl in bench.impls.items() if name not in refused}
    wrong = [refused.pop(OURS)] if OURS in refused else []  # a peer may refuse, we may not
    if not wrong and len(impls) > 1:
        wrong = bench.check(x)
    rounds, slice_seconds = (15, 0.004) if args.quick else (40, 0.01)
    timings = {} if wrong else time_interleaved(impls, x, rounds=rounds, slice_seconds=slice_seconds)
    return Row(case.name, shape, args.dtype, case.bytes_moved(x), timings, wrong, refused)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.list:
        print("\n".join(case.name for case in args.cases))
        return 0
    warnings.filterwarnings("ignore", module=r"torch\.ao\..*")
    torch.set_num_threads(args.threads)
    where = environment(args.device, args.seed)
    print(", ".join(f"{key} {value}" for key, value in where.items() if value is not None))
    print("speedup: torch's time over ours, by rounds; above 1 ours is faster\n")
    print(HEADER)
    rows = []
    for case in args.cases:
        for shape in case.quick_shapes if args.quick else case.shapes:
            rows.append(measure(case, shape, args))
            print(table_line(rows[-1]), flush=True)
            if args.json:  # after every row, so that a run cut short leaves what it has
                write_json(args.json, rows, where)
    print("\n" + summary(rows))
    return 1 if any(row.wrong for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
