"""Ahead of time: what the launchers' own specializations compile to. Vector width, spills, registers, rounding."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.lanes.audits import audit_binaries
from tests.lanes.cases import KernelCase, short
from tests.lanes.kernel_cases import CASES
from tests.lanes.null_driver import CUDA_80, CUDA_90, CUDA_100, HIP_942


def _combinations() -> Iterator[object]:
    """Every case for sm_90 in its dtypes; thorough ones for the other targets too, in dtypes that take turns."""
    for case in CASES:
        for dtype in case.dtypes:
            yield pytest.param(case, dtype, CUDA_90, id=f"{case}-{short(dtype)}-90")
    thorough = [case for case in CASES if case.thorough]
    for number, case in enumerate(thorough):
        for turn, target in enumerate((CUDA_80, CUDA_100, HIP_942)):
            dtype = case.dtypes[(number + turn) % len(case.dtypes)]
            yield pytest.param(case, dtype, target, id=f"{case}-{short(dtype)}-{target.arch}")


@pytest.mark.parametrize(("case", "dtype", "target"), list(_combinations()))
def test_binaries(case: KernelCase, dtype: torch.dtype, target):
    problems, _ = audit_binaries(case, dtype, target)
    assert problems == []


@pytest.mark.parametrize("case", [case for case in CASES if case.thorough and not case.fused_multiply_adds], ids=str)
def test_unaligned_tensors_are_accessed_element_by_element(case: KernelCase):
    problems, _ = audit_binaries(case, case.dtypes[0], CUDA_90, unaligned=True)
    assert problems == []
