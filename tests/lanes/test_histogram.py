"""Histograms in the lanes: one shared atomic per element, in both forms, and what observers launch and read."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from qkernels import modules
from qkernels.autotune import histogram_heuristics
from tests.lanes.audits import audit_binaries, audit_launches
from tests.lanes.cases import FLOATS, KernelCase, short
from tests.lanes.histogram_cases import INLINE_PTX_CASES, TL_HISTOGRAM_CASES
from tests.lanes.inspect_binary import atomic_additions, opcodes, resources
from tests.lanes.interpreter_trace import trace
from tests.lanes.null_driver import CUDA_80, CUDA_90, CUDA_100, HIP_942, Launch, null_driver
from tests.lanes.sync_counter import count_host_reads

INLINE_PTX = INLINE_PTX_CASES[0]
TL_HISTOGRAM = TL_HISTOGRAM_CASES[2048]
TARGETS = (CUDA_80, CUDA_90, CUDA_100)

shared_atomics = pytest.mark.skipif(
    not histogram_heuristics.SHARED_ATOMICS,
    reason=f"Triton {triton.__version__} lowers tl.histogram to ballots, 3.8 to atomics: make lanes TRITON=3.8.0",
)
ballots = pytest.mark.skipif(
    histogram_heuristics.SHARED_ATOMICS, reason=f"Triton {triton.__version__} lowers tl.histogram to shared atomics"
)
FORMS = (
    pytest.param(INLINE_PTX, id="inline_ptx"),
    pytest.param(TL_HISTOGRAM, id="tl.histogram", marks=shared_atomics),
)


def passes(case: KernelCase, dtype: torch.dtype, target: GPUTarget = CUDA_90) -> list[Launch]:
    """The passes over x as they were compiled."""
    with null_driver(target) as log:
        case.run(**case.make(torch.device("cpu"), dtype, True))
        found = [launch for launch in log.binaries() if launch.kernel == "_histogram_pass_kernel"]
    assert len(found) == 2
    return found


def increments_per_tile(launch: Launch, space: str = "shared") -> int:
    count = atomic_additions(launch.compiled.asm["ptx"], space)
    assert count % 2 == 0  # a whole tile in the loop, and the ragged one
    return count // 2


def elements_per_thread(launch: Launch) -> int:
    return launch.constants["BLOCK"] // (32 * launch.num_warps)


# -------------------------------------------------------------------------- one atomic per element, in both forms


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.arch))
@pytest.mark.parametrize("dtype", FLOATS, ids=short)
@pytest.mark.parametrize("case", FORMS)
def test_binaries(case: KernelCase, dtype: torch.dtype, target: GPUTarget):
    """Vector loads; no spill, no stack; one shared atomic per element, which merges equal addresses in a warp."""
    problems, _ = audit_binaries(case, dtype, target)
    assert problems == []
    for launch in passes(case, dtype, target):
        used = resources(launch.compiled.asm["cubin"])
        assert used.stack == 0
        assert used.registers * 32 * launch.num_warps <= 65536  # it fits on a multiprocessor
        assert increments_per_tile(launch) == elements_per_thread(launch)
        atomics = {name for name in opcodes(launch.compiled.asm["cubin"]) if name.startswith("ATOMS")}
        assert atomics == {"ATOMS.POPC.INC.32"}


@pytest.mark.parametrize("case", FORMS)
def test_a_tile_that_is_replicated_is_caught(monkeypatch: pytest.MonkeyPatch, case: KernelCase):
    """512 elements over 32 warps: two threads hold each."""
    chosen: Callable[..., histogram_heuristics.HistogramConfig] = histogram_heuristics.histogram_passes

    def small(*args: object) -> histogram_heuristics.HistogramConfig:
        return replace(chosen(*args), block=512)

    monkeypatch.setattr(histogram_heuristics, "histogram_passes", small)
    for launch in passes(case, torch.float16):
        assert increments_per_tile(launch) > elements_per_thread(launch)


@shared_atomics
@pytest.mark.parametrize("bins", [2, 33, 4096, 8192])
def test_any_number_of_bins(bins: int):
    for target in TARGETS:
        for launch in passes(TL_HISTOGRAM_CASES[bins], torch.bfloat16, target):
            assert increments_per_tile(launch) == elements_per_thread(launch)
            assert resources(launch.compiled.asm["cubin"]).stack == 0


# -------------------------------------------------------------------------- ballots: tl.histogram before Triton 3.8


@ballots
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.arch))
def test_ballots(target: GPUTarget):
    """What the portable form costs: ballots for the mask and for the 11 bits of a bin, 64 atomics whatever the tile.

    Loads are vectors (`test_ahead_of_time`); registers run out, and a few bytes are parked outside of the loop.
    """
    for launch in passes(TL_HISTOGRAM, torch.float32, target):
        used = resources(launch.compiled.asm["cubin"])
        assert (used.registers, used.hot_spills) == (255, 0)
        assert used.stack <= TL_HISTOGRAM.cold_stack
        assert increments_per_tile(launch) == 64
        assert launch.compiled.asm["ptx"].count("vote.sync.ballot") == 2 * 12 * elements_per_thread(launch)


@ballots
@pytest.mark.parametrize("bins", [4096, 8192])
def test_more_bins_than_ballots_can_count(bins: int):
    """One global atomic per element instead: the counts would be spilled in the loop, thousands of times."""
    for target in TARGETS:
        for launch in passes(TL_HISTOGRAM_CASES[bins], torch.bfloat16, target):
            assert "vote.sync.ballot" not in launch.compiled.asm["ptx"]
            assert increments_per_tile(launch, "global") == elements_per_thread(launch)
            used = resources(launch.compiled.asm["cubin"])
            assert used.stack <= TL_HISTOGRAM.cold_stack and used.hot_spills == 0


@ballots
def test_inline_ptx_leaves_no_ballots():
    for launch in passes(INLINE_PTX, torch.float32):
        assert "vote.sync.ballot" not in launch.compiled.asm["ptx"]


# -------------------------------------------------------------------------- AMD


@pytest.mark.parametrize("bins", [2048, 8192])
def test_a_program_fits_on_amd(bins: int):
    """At most 1024 threads, where a warp has 64; and no spill."""
    for launch in passes(TL_HISTOGRAM_CASES[bins], torch.float32, HIP_942):
        assert launch.num_warps * HIP_942.warp_size <= 1024
        assert re.findall(r"\.vgpr_spill_count: +(\d+)", launch.compiled.asm["amdgcn"]) == ["0"]


# -------------------------------------------------------------------------- inline PTX alone


@pytest.mark.parametrize("case", INLINE_PTX_CASES, ids=str)
def test_launches_and_host_reads(case: KernelCase):
    assert audit_launches(case, torch.float32) == []


def test_the_array_is_static_shared_memory():
    """8 KB of the kernel's own, below what Triton allots."""
    for launch in passes(INLINE_PTX, torch.float32):
        assert launch.compiled.asm["ptx"].count("qk_counts_") >= 1
        assert ".shared .align 16 .b32 qk_counts_" in launch.compiled.asm["ptx"]


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
    assert recorded.launches == ["_search_kernel"]
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
