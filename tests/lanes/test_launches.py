"""Launches, compiled variants, devices: what the launchers do around the kernels."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from qkernels.launch import launch
from tests.lanes.audits import audit_launches, audit_variants
from tests.lanes.cases import KernelCase
from tests.lanes.kernel_cases import CASES

# Every residue that matters (1, odd, multiples of 16), both sides of each tile size, and large ragged sizes.
SIZES = (
    *(1, 2, 15, 16, 17, 100, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1000, 1024, 1025, 2047, 2048, 2049),
    *(4095, 4096, 4097, 5000, 8192, 9001, 20000, 1 << 16, 100003, 1 << 18, (1 << 20) - 1, 1 << 20, (1 << 20) + 1),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_launches_and_host_reads(case: KernelCase):
    assert audit_launches(case, case.dtypes[0]) == []


@pytest.mark.parametrize("case", [case for case in CASES if case.sweep], ids=str)
def test_compiled_variants(case: KernelCase):
    problems, variants = audit_variants(case, torch.float32, SIZES)
    assert problems == []
    assert variants


class _Guard:
    """Stands for torch.cuda.device: notes which device is current while it is open."""

    current = 0

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> None:
        self.previous, _Guard.current = _Guard.current, self.device.index

    def __exit__(self, *error: object) -> None:
        _Guard.current = self.previous


@pytest.mark.parametrize("index", [0, 1])
def test_a_launch_runs_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch, index: int):
    """Device 0 is current. A Triton launch goes to the current device whatever the pointers say."""
    ran_on: list[int] = []
    kernel = {(1,): lambda *arguments, **options: ran_on.append(_Guard.current)}
    monkeypatch.setattr(torch.cuda, "current_device", lambda: _Guard.current)
    monkeypatch.setattr(torch.cuda, "device", _Guard)
    launch(kernel, (1,), SimpleNamespace(device=torch.device("cuda", index)))
    assert ran_on == [index]
    assert _Guard.current == 0
