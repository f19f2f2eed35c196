"""Every lane passes the sound toy kernels and catches the fault that was planted for it."""

from __future__ import annotations

import pytest
import torch

from tests.lanes import planted
from tests.lanes.audits import audit_binaries, audit_launches, audit_memory, audit_variants
from tests.lanes.cases import KernelCase
from tests.lanes.null_driver import CUDA_80, CUDA_90, CUDA_100, HIP_942
from tests.lanes.sync_counter import count_host_reads, meta_copy

SIZES = (1, 2, 15, 16, 17, 255, 256, 257, 4096, 5000, 9001, 1 << 16, (1 << 16) + 1)


@pytest.mark.parametrize("target", [CUDA_80, CUDA_90, CUDA_100, HIP_942], ids=lambda target: str(target.arch))
def test_binaries_pass_a_sound_kernel(target):
    problems, _ = audit_binaries(planted.SOUND, torch.float32, target)
    assert problems == []


@pytest.mark.parametrize(
    ("case", "finding"),
    [
        (planted.MASKED, "loads of x are at most 4 bytes wide"),
        (planted.MASKED, "stores of y are at most 4 bytes wide"),
        (planted.DIVIDES, "contains div.full.f32"),
        (planted.CONTRACTS, "depends on contraction"),
        (planted.SPILLS, "spills: "),
        (planted.SPILLS_IN_A_LOOP, "spills in an innermost loop"),
    ],
    ids=str,
)
def test_binaries_catch(case: KernelCase, finding: str):
    problems, _ = audit_binaries(case, torch.float32, CUDA_90)
    assert any(finding in problem for problem in problems), problems


def test_binaries_pass_a_launch_that_forbids_contraction():
    problems, _ = audit_binaries(planted.FORBIDS_CONTRACTION, torch.float32, CUDA_90)
    assert problems == []


def test_binaries_catch_too_many_registers():
    case = planted.FORBIDS_CONTRACTION
    tight = KernelCase("tight", case.make, case.run, vector=1, max_registers=8)
    problems, _ = audit_binaries(tight, torch.float32, CUDA_90)
    assert any("registers, more than 8" in problem for problem in problems), problems


def test_binaries_catch_a_wide_access_to_an_unaligned_tensor():
    problems, _ = audit_binaries(planted.PROMISES_ALIGNMENT, torch.float32, CUDA_90, unaligned=True)
    assert any("16-byte access to unaligned x" in problem for problem in problems), problems
    problems, _ = audit_binaries(planted.SOUND, torch.float32, CUDA_90, unaligned=True)
    assert problems == []


def test_launches_pass_a_sound_kernel():
    assert audit_launches(planted.SOUND, torch.float32) == []
    problems, variants = audit_variants(planted.SOUND, torch.float32, SIZES)
    assert problems == []
    assert set(variants) == {"_scale_kernel"}


@pytest.mark.parametrize(
    ("case", "finding"),
    [
        (planted.LAUNCHES_TWICE, "2 launches"),
        (planted.READS_ITEM, "host read: _local_scalar_dense"),
        (planted.COPIES_TO_HOST, "host read: cpu()"),
        (planted.INDEXES_BY_MASK, "host read: index with a boolean mask"),
    ],
    ids=str,
)
def test_launches_catch(case: KernelCase, finding: str):
    problems = audit_launches(case, torch.float32)
    assert any(finding in problem for problem in problems), problems


def test_launches_catch_a_grid_that_is_compiled_in():
    problems, _ = audit_variants(planted.CONSTANT_GRID, torch.float32, SIZES)
    assert any("configurations, more than 1" in problem for problem in problems), problems


def test_host_reads_inside_an_operator_are_counted():
    """The implementation of an operator runs with dispatch modes off; the counter has to look inside all the same."""
    library = torch.library.Library("qkernels_planted_read", "DEF")
    library.define("reads(Tensor x) -> Tensor")
    library.impl("reads", lambda x: x * x.sum().item(), "CPU")
    with count_host_reads() as reads:
        torch.ops.qkernels_planted_read.reads(torch.ones(3))
    assert reads == {"item": 1}


def test_values_cannot_be_read_on_the_meta_device():
    """What `meta_copy` rests on: a read that hides in ATen's own C++ raises there."""
    x, start = meta_copy([torch.ones(3), torch.tensor(1)])
    with pytest.raises(RuntimeError, match="meta"):
        torch.narrow(x, 0, start, 1)  # reads `start`


@pytest.mark.interpreter_only
@pytest.mark.parametrize("case", [planted.SOUND, planted.SOUND_LAST_PROGRAM, planted.MASKED], ids=str)
def test_trace_passes_a_sound_kernel(case: KernelCase):
    assert audit_memory(case, torch.float32) == []


@pytest.mark.interpreter_only
@pytest.mark.parametrize(
    ("case", "finding"),
    [
        (planted.READS_TWICE, "elements of x are loaded 1 to 2 times"),
        (planted.READS_TWICE, "elements of y are stored 1 to 2 times"),
        (planted.READS_GAPS, "load out of bounds (512 times)"),
        (planted.OVERRUNS, "load out of bounds (507 times)"),
        (planted.RACY, "program order changes seen"),
        (planted.RACY, "race: load after another program's store"),
        (planted.RELAXED, "race: load after another program's store"),
        (planted.UNFENCED, "race: load after another program's store"),
    ],
    ids=str,
)
def test_trace_catches(case: KernelCase, finding: str):
    problems = audit_memory(case, torch.float32)
    assert any(finding in problem for problem in problems), problems


@pytest.mark.interpreter_only
def test_trace_catches_scratch_traffic():
    case = planted.SOUND
    tight = KernelCase("tight", case.make, case.run, reads=case.reads, writes=case.writes, scratch_bytes=8)
    assert any("bytes of scratch traffic" in problem for problem in audit_memory(tight, torch.float32))
