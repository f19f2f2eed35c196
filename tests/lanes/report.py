"""Print what the registered kernels compile to: `python -m tests.lanes.report` (a minute). Registers and access widths.

A row per case, dtype and CUDA target. Widths are bytes of the widest load or store of each streamed tensor.
"""

from __future__ import annotations

import argparse

from tests.lanes.audits import audit_binaries
from tests.lanes.cases import short
from tests.lanes.kernel_cases import CASES
from tests.lanes.null_driver import CUDA_80, CUDA_90, CUDA_100


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.lanes.report", description=__doc__)
    parser.add_argument("--case", metavar="NAME", help="only cases with NAME in their name")
    wanted = parser.parse_args().case or ""
    if not any(wanted in case.name for case in CASES):
        parser.error(f"no case has {wanted!r} in its name")
    print("| case | dtype | registers sm_80, sm_90, sm_100 | widest access, bytes (sm_90) |\n|---|---|---|---|")
    for case in (case for case in CASES if wanted in case.name):
        for dtype in case.dtypes:
            registers, problems = [], []
            for target in (CUDA_80, CUDA_90, CUDA_100) if case.thorough else (CUDA_90,):
                found, reports = audit_binaries(case, dtype, target)
                problems += found
                registers.append("+".join(str(report.registers) for report in reports))
                if target is CUDA_90:
                    widths = {name: width for report in reports for name, width in report.widths.items()}
            streamed = [name for name in widths if name.split()[0] in ("x", "dy", "y", "dx")]
            listed = ", ".join(f"{name} {widths[name]}" for name in streamed)
            print(f"| {case} | {short(dtype)} | {', '.join(registers)} | {listed} | {'; '.join(problems)}", flush=True)


if __name__ == "__main__":
    main()
