"""Histograms in the lanes: inline PTX, which is compiled ahead of time alone, and what observers launch and read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from qkernels import modules
from qkernels.autotune import histogram_heuristics
from tests.lanes.audits import audit_binaries, audit_launches
from tests.lanes.cases import FLOATS, KernelCase, short
from tests.lanes.histogram_cases import INLINE_PTX_CASES
from tests.lanes.inspect_binary import resources
from tests.lanes.interpreter_trace import trace
from tests.lanes.null_driver import CUDA_80, CUDA_90, CUDA_100, null_driver
from tests.lanes.sync_counter import count_host_reads

INCREMENT = "red.shared.add.u32"
STEADY = INLINE_PTX_CASES[0]


def increments_per_tile(case: KernelCase, dtype: torch.dtype) -> list[tuple[int, int]]:
    """(increments in the code of one tile, elements of it per thread) of each pass over x."""
    with null_driver(CUDA_90) as log:
        case.run(**case.make(torch.device("cpu"), dtype, True))
        passes = [launch for launch in log.binaries() if launch.kernel == "_histogram_pass_kernel"]
    found = []
    for launch in passes:
        count = launch.compiled.asm["ptx"].count(INCREMENT)
        assert count % 2 == 0  # a whole tile in the loop, and the ragged one
        found.append((count // 2, launch.constants["BLOCK"] // (32 * launch.num_warps)))
    return found


@pytest.mark.parametrize("target", [CUDA_80, CUDA_90, CUDA_100], ids=lambda target: str(target.arch))
@pytest.mark.parametrize("dtype", FLOATS, ids=short)
def test_binaries(dtype: torch.dtype, target):
    problems, reports = audit_binaries(STEADY, dtype, target)
    assert problems == []
    passes = [report for report in reports if report.kernel == "_histogram_pass_kernel"]
    assert passes and all(report.registers <= 64 for report in passes)  # 32 warps on one multiprocessor


@pytest.mark.parametrize("case", INLINE_PTX_CASES, ids=str)
def test_launches_and_host_reads(case: KernelCase):
    assert audit_launches(case, torch.float32) == []


@pytest.mark.parametrize("dtype", FLOATS, ids=short)
def test_one_increment_per_element(dtype: torch.dtype):
    """Inline PTX with a side effect runs for every copy that a layout keeps of an element."""
    found = increments_per_tile(STEADY, dtype)
    assert len(found) == 2
    assert all(increments == elements for increments, elements in found)


def test_a_tile_that_is_replicated_is_caught(monkeypatch: pytest.MonkeyPatch):
    """512 elements over 32 warps: two threads hold each."""
    chosen: Callable[..., histogram_heuristics.HistogramConfig] = histogram_heuristics.histogram_passes

    def small(*args: object) -> histogram_heuristics.HistogramConfig:
        return replace(chosen(*args), block=512)

    monkeypatch.setattr(histogram_heuristics, "histogram_passes", small)
    assert all(increments > elements for increments, elements in increments_per_tile(STEADY, torch.float16))


def test_the_array_is_static_shared_memory():
    """8 KB of the kernel's own, below what Triton allots; no stack."""
    with null_driver(CUDA_90) as log:
        STEADY.run(**STEADY.make(torch.device("cpu"), torch.float32, True))
        passes = [launch for launch in log.binaries() if launch.kernel == "_histogram_pass_kernel"]
    for launch in passes:
        assert launch.compiled.asm["ptx"].count("qk_counts_") >= 1
        assert ".shared .align 16 .b32 qk_counts_" in launch.compiled.asm["ptx"]
        assert resources(launch.compiled.asm["cubin"]).stack == 0


def test_it_is_off():
    """Until a GPU has run it."""
    assert histogram_heuristics.INLINE_PTX is False


# ------------------------------------------------------------------------------------------ the observers


def _observers() -> dict[str, tuple[torch.nn.Module, torch.Tensor]]:
    x = torch.linspace(-2.0, 2.0, 3 * 4 * 5).reshape(3, 4, 5)
    return {
        "HistogramObserver": (modules.HistogramObserver(bins=64), x),
        "PerChannelHistogramObserver": (modules.PerChannelHistogramObserver(bins=64, ch_axis=1), x),
    }


@pytest.mark.interpreter_only
@pytest.mark.parametrize("name", ["HistogramObserver", "PerChannelHistogramObserver"])
def test_three_launches_and_one_read_of_x(name: str):
    """The range grows with the first batch, stays, and grows again."""
    observer, x = _observers()[name]
    for factor, reads in ((1.0, 2), (1.0, 1), (0.5, 1), (2.0, 2)):
        batch = x * factor
        with trace() as recorded, count_host_reads() as found:
            observer(batch)
        assert len(recorded.launches) == 3
        loads, stores, _ = recorded.counts(batch)
        assert (loads == reads).all() and (stores == 0).all()
        assert recorded.faults == {} and found == {}
    with trace() as recorded, count_host_reads() as found:
        observer.searched_qparams()
    assert recorded.launches == ["_search_kernel", "_choose_qparams_kernel"]
    assert found == {}


@pytest.mark.interpreter_only
def test_a_disabled_observer_reads_nothing():
    observer, x = _observers()["HistogramObserver"]
    with trace() as recorded:
        observer.observe_(x, torch.zeros(1, dtype=torch.uint8))
    loads, _, _ = recorded.counts(x)
    assert (loads == 0).all() and len(recorded.launches) == 3
    assert not observer.histogram.any()


@pytest.mark.parametrize("name", ["HistogramObserver", "PerChannelHistogramObserver"])
def test_no_value_is_read(name: str):
    """On the meta device reading one raises."""
    observer, x = _observers()[name]
    observer = observer.to("meta")
    observer(x.to("meta"))
    observer(x.to("meta"))
    scale, _ = observer.searched_qparams()
    assert scale.shape == ((4,) if "PerChannel" in name else (1,))
