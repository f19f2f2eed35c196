"""The registered kernels of histograms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from qkernels.autotune import histogram_heuristics
from qkernels.ops.histogram import _counts_triton, _observe_triton
from qkernels.ops.histogram_qparams import _search_triton as search_qparams_triton
from qkernels.ops.histogram_qparams import _update_triton as update_qparams_triton
from qkernels.ops.histogram_search import _triton as search_triton
from tests.lanes.cases import Arguments, KernelCase, Outputs
from tests.lanes.layouts import LAYOUTS, Layout, sweep

BINS = 2048

# Of the launch that commits. The passes over x have limits of their own in test_histogram.py; ballots take all.
COMMIT_REGISTERS = 168
MAX_REGISTERS = COMMIT_REGISTERS if histogram_heuristics.SHARED_ATOMICS else 255

# What ptxas parks outside of loops: 16 bytes (Triton 3.6), 8 (3.7) in the first pass on sm_100; 8 in the commit (3.9).
COLD_STACK = 16

# Every program writes its counts and the last launch reads them; a handful of programs on the small inputs.
SCRATCH = 1 << 20


def _state(x: torch.Tensor, channels: int, reach: float, bins: int) -> Arguments:
    """A running histogram over [-reach, reach]; the small inputs lie in [-3, 3]."""
    return {
        "x": x,
        "histogram": torch.ones(channels, bins, device=x.device),
        "min_val": torch.full((channels,), -reach, device=x.device),
        "max_val": torch.full((channels,), reach, device=x.device),
        "remainder": torch.zeros(channels, bins, device=x.device),
        "enabled": torch.ones(1, dtype=torch.uint8, device=x.device),
    }


def _observe(layout: Layout, grows: bool, bins: int = BINS) -> KernelCase:
    def run(x: torch.Tensor, histogram: torch.Tensor, remainder: torch.Tensor, **rest: torch.Tensor) -> Outputs:
        if layout.axis is None:
            histogram, remainder = histogram[0], remainder[0]
        ends = rest["min_val"], rest["max_val"]
        _observe_triton(x, histogram, *ends, remainder, 16, layout.axis, rest["enabled"])
        return {}

    def arguments(x: torch.Tensor) -> Arguments:
        return _state(x, layout.channels(x), 1.0 if grows else 3.0, bins)

    return KernelCase(
        name=f"observe_histogram_-{'grown' if grows else 'steady'}-{bins}-{layout.name}",
        make=lambda device, dtype, large: arguments(layout.tensor(device, dtype, large)),
        run=run,
        launches=3,
        reads={"x": 2 if grows else 1, "histogram": 1, "remainder": 1},
        writes={"histogram": 1, "remainder": 1},
        scratch_bytes=SCRATCH,
        vector=layout.vector,
        max_registers=MAX_REGISTERS,
        cold_stack=COLD_STACK,
        fused_multiply_adds=True,
        sweep=sweep(layout, arguments) if not grows else None,
        max_configurations=2,  # the first pass and the second
        thorough=layout.name == "flat" and not grows,
    )


def _with_inline_ptx(case: KernelCase) -> KernelCase:
    """The same, counting in shared memory by inline PTX. CUDA alone, and never in the interpreter."""

    def run(**arguments: torch.Tensor) -> Outputs:
        before = histogram_heuristics.INLINE_PTX
        histogram_heuristics.INLINE_PTX = True
        try:
            return case.run(**arguments)
        finally:
            histogram_heuristics.INLINE_PTX = before

    return replace(case, name=f"{case.name}-inline_ptx", run=run, max_registers=COMMIT_REGISTERS, sweep=None)


def _counts(layout: Layout) -> KernelCase:
    def arguments(x: torch.Tensor) -> Arguments:
        channels = layout.channels(x)
        return {"x": x, "low": torch.full((channels,), -3.0), "high": torch.full((channels,), 3.0)}

    def run(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> Outputs:
        return {"counts": _counts_triton(x, BINS, low, high, layout.axis)}

    return KernelCase(
        name=f"histogram-{layout.name}",
        make=lambda device, dtype, large: arguments(layout.tensor(device, dtype, large)),
        run=run,
        launches=2,
        reads={"x": 1},
        writes={"counts": 1},
        scratch_bytes=SCRATCH,
        vector=layout.vector,
        max_registers=MAX_REGISTERS,
        cold_stack=COLD_STACK,
        fused_multiply_adds=True,
    )


def _search(channels: int, bins: int) -> KernelCase:
    def make(device: torch.device, dtype: torch.dtype, large: bool) -> Arguments:
        peak = torch.linspace(-3, 3, bins, device=device).square().neg().exp().mul(1000).round()
        return {
            "histogram": peak.repeat(channels, 1),
            "min_val": torch.full((channels,), -3.0, device=device),
            "max_val": torch.full((channels,), 3.0, device=device),
        }

    def run(histogram: torch.Tensor, min_val: torch.Tensor, max_val: torch.Tensor) -> Outputs:
        return dict(zip(("low", "high"), search_triton(histogram, min_val, max_val, 256), strict=True))

    return KernelCase(
        name=f"search_histogram_range-{channels}x{bins}",
        make=make,
        run=run,
        reads={"histogram": 1, "min_val": 1, "max_val": 1},
        writes={"low": 1, "high": 1},
        scratch_bytes=1 << 20,  # of the tables of quantiles, a little per step
        vector=1,
        max_registers=255,
        fused_multiply_adds=True,
        dtypes=(torch.float32,),
        thorough=bins == BINS,
    )


def _search_qparams(channels: int, bins: int, rule: str) -> KernelCase:
    """The same launch, which ends with scale and zero point in place of the range."""
    search = _search(channels, bins)

    def make(device: torch.device, dtype: torch.dtype, large: bool) -> Arguments:
        return {**search.make(device, dtype, large), "eps": torch.full((1,), 1e-7, device=device)}

    def run(eps: torch.Tensor, **state: torch.Tensor) -> Outputs:
        both = search_qparams_triton(*state.values(), 256, -128, 127, rule, 0, eps)
        return dict(zip(("scale", "zero_point"), both, strict=True))

    return replace(
        search,
        name=f"search_histogram_qparams-{rule}-{channels}x{bins}",
        make=make,
        run=run,
        writes={"scale": 1, "zero_point": 1},
    )


def _update_qparams(channels: int, bins: int) -> KernelCase:
    """Scale and zero point renewed in place, under a flag, and copied."""
    search = _search(channels, bins)

    def make(device: torch.device, dtype: torch.dtype, large: bool) -> Arguments:
        return {
            **search.make(device, dtype, large),
            "scale": torch.ones(channels, device=device),
            "zero_point": torch.zeros(channels, dtype=torch.int32, device=device),
            "enabled": torch.ones(1, dtype=torch.uint8, device=device),
        }

    def run(enabled: torch.Tensor, **state: torch.Tensor) -> Outputs:
        copies = update_qparams_triton(*state.values(), 256, -128, 127, enabled=enabled)
        return dict(zip(("scale_copy", "zero_point_copy"), copies, strict=True))

    return replace(
        search,
        name=f"update_qparams_from_histogram_-{channels}x{bins}",
        make=make,
        run=run,
        reads={**search.reads, "scale": 1, "zero_point": 1},
        writes=dict.fromkeys(("scale", "zero_point", "scale_copy", "zero_point_copy"), 1),
    )


def histogram_cases() -> Iterator[KernelCase]:
    """Cases of observe_histogram_, histogram and the searches of its range that run in the interpreter."""
    flat, rows, cols, strided = LAYOUTS[0], LAYOUTS[1], LAYOUTS[5], LAYOUTS[8]
    yield _observe(flat, grows=False)
    yield _observe(flat, grows=True)
    yield _observe(flat, grows=True, bins=100)
    yield _observe(flat, grows=False, bins=4096)
    yield _counts(flat)
    yield _observe(strided, grows=False, bins=512)
    yield _observe(rows, grows=False, bins=64)
    yield _observe(replace(cols, vector=1), grows=False, bins=64)  # a histogram takes one channel, element by element
    yield _observe(rows, grows=True, bins=64)
    yield _search(1, BINS)
    yield _search(3, 64)
    yield _search_qparams(1, BINS, "affine")
    for rule in ("affine", "symmetric", "float_qparams", "fused_affine", "fused_symmetric"):
        yield _search_qparams(3, 64, rule)
    yield _update_qparams(1, BINS)
    yield _update_qparams(3, 64)


INLINE_PTX_CASES = tuple(_with_inline_ptx(_observe(LAYOUTS[0], grows)) for grows in (False, True))
TL_HISTOGRAM_CASES = {bins: _observe(LAYOUTS[0], grows=False, bins=bins) for bins in (2, 33, BINS, 4096, 8192)}
