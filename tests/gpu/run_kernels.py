"""Run every registered kernel once on small inputs: the program that compute-sanitizer watches.

compute-sanitizer --tool memcheck --error-exitcode 9 python -m tests.gpu.run_kernels
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch

from qkernels.launch import INTERPRETED
from tests.lanes.kernel_cases import CASES


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.run_kernels", description="Every kernel, once.")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument(
        "--seconds", type=float, metavar="N", help="start no further kernel after N seconds, and say so"
    )
    args = parser.parse_args(argv)
    if args.device.type == "cpu" and not INTERPRETED:
        parser.error("kernels run on the CPU only in the interpreter: set TRITON_INTERPRET=1")
    return args


def at(device: torch.device, value: Any) -> Any:
    """A case's argument on the device; some make their state on the CPU."""
    return value.to(device) if isinstance(value, torch.Tensor) else value


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    start = time.monotonic()
    done = 0
    for case in CASES:
        if args.seconds is not None and time.monotonic() - start > args.seconds:
            break
        print(case.name, flush=True)  # before it runs, so that a report can be told whose it is
        arguments = case.make(args.device, case.dtypes[0], False)
        case.run(**{name: at(args.device, value) for name, value in arguments.items()})
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        done += 1
    print(f"{done} of {len(CASES)} kernel cases ran")
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
