"""Histogram kernels: count in a given range, and observe: three launches, no host read, x read once.

Observing is optimistic. The first launch takes min and max of x and counts in the *old* range. The second reads x again
only if the device finds that the range grew, and counts in the new one. The third adds up the programs' counts, carries
the old histogram over to the new range if need be, and commits. Counts are integers, so no order shows in the result.

The second launch leaves copies of what the third overwrites while other programs still read it: the ranges and, if the
range grew, the old histogram. So there is no counter of arrivals and no workspace.

Bytes: itemsize of x per element (twice that where the range grew), plus 8 per program and bin for the programs' counts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from qkernels.autotune import histogram_heuristics
from qkernels.autotune.heuristics import MAX_PARTIALS
from qkernels.device_math import is_on, row_offset
from qkernels.histogram_bins import (
    bin_of,
    counting_range,
    linspace_point,
    linspace_step,
    parts_below,
    scaled_width,
    shared_counts,
    shared_increment,
    shared_load,
    shared_store,
)
from qkernels.histogram_commit import launch_commit, launch_total
from qkernels.launch import INTERPRETED, launch
from qkernels.layout import Flat, plan

# What a pass over x is for.
GIVEN = tl.constexpr("given")  # count in a given range
FIRST = tl.constexpr("first")  # count in the old range, take min and max
SECOND = tl.constexpr("second")  # count in the new range, if it is another

# How it counts, see `qkernels.autotune.histogram_heuristics.HistogramConfig`.
INLINE_PTX = tl.constexpr("inline_ptx")
GLOBAL = tl.constexpr("global")


class Rows(NamedTuple):
    """Where the values of a histogram lie: rows of runs, see `qkernels.layout.Channels`. One kernel argument.

    Attributes:
        sizes: sizes of the row dimensions, fastest first.
        strides: their strides, in units of VEC.
        n_rows: number of rows.
        run: elements of a run, in units of VEC.
        run_stride: stride inside a run.
        channel_stride: stride between histograms.
    """

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    n_rows: int
    run: int
    run_stride: int
    channel_stride: int


class Scratch(NamedTuple):
    """What the launches of one call hand on; pointers. One kernel argument.

    Attributes:
        counts: (C, parts, BLOCK_BINS) int32.
        extremes: (C, 2, parts) float32: each program's min, and max.
        ranges: (C, 4) float32: old low, old high, new low, new high.
        snapshot: (C, 2, BLOCK_BINS) float32: old histogram and remainder; written if the range grew.
        firsts: (C, BLOCK_BINS) int32: parts of the old bins that lie below each new bin; written if the range grew.
    """

    counts: Any
    extremes: Any = None
    ranges: Any = None
    snapshot: Any = None
    firsts: Any = None


@triton.jit
def _take(
    x, counts, smallest, largest, span, array,
    EXTREMES: tl.constexpr, BINS: tl.constexpr, BLOCK_BINS: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Count a tile of x, and its finite extremes. NaN is in no range."""
    low, high, width, inverse, power = span
    if EXTREMES:
        finite = tl.abs(x) < float("inf")
        groups: tl.constexpr = (smallest.shape[0], x.shape[0] // smallest.shape[0])
        smallest = tl.minimum(smallest, tl.min(tl.reshape(tl.where(finite, x, float("inf")), groups), 1))
        largest = tl.maximum(largest, tl.max(tl.reshape(tl.where(finite, x, float("-inf")), groups), 1))
    inside = (x >= low) & (x <= high)
    index = bin_of(tl.where(inside, x, low), low, width, inverse, power, BINS)
    if FORM == INLINE_PTX:
        shared_increment(array + index * 4, inside.to(tl.int32))
    elif FORM == GLOBAL:
        tl.atomic_add(array + index, 1, mask=inside, sem="relaxed")
    else:
        counts += tl.histogram(index, BLOCK_BINS, mask=inside)
    return counts, smallest, largest


@triton.jit
def _count(
    x_ptr, rows, n, low, high, scratch, channel, part, n_parts,
    EXTREMES: tl.constexpr, FLAT: tl.constexpr, VEC: tl.constexpr, BINS: tl.constexpr, BLOCK_BINS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """One program's share of x: counts in [low, high] and extremes, into the scratch. low > high counts nothing."""
    low, high = counting_range(low, high)
    width, inverse, power = scaled_width(low, high)
    high = tl.where(width < float("inf"), high, float("nan"))  # no value is inside, as in torch.histc
    span = (low, high, width, inverse, power)
    bins = tl.arange(0, BLOCK_BINS)
    counts = tl.zeros((BLOCK_BINS,), tl.int32)
    own_ptr = scratch.counts + (channel.to(tl.int64) * n_parts + part) * BLOCK_BINS
    array = own_ptr
    if FORM == INLINE_PTX:
        array = shared_counts(part)
        shared_store(array + bins * 4, counts)
        tl.debug_barrier()
    elif FORM == GLOBAL:
        tl.store(own_ptr + bins, counts)
        tl.debug_barrier()  # a thread adds to what another has set to 0
    # Four neighbours of a run are one thread's: their extremes need no shuffle, and a quarter of the registers.
    NEIGHBOURS: tl.constexpr = 4 if FLAT or VEC % 4 == 0 else 1
    smallest = tl.full((BLOCK // NEIGHBOURS,), float("inf"), tl.float32)
    largest = tl.full((BLOCK // NEIGHBOURS,), float("-inf"), tl.float32)
    offs = tl.arange(0, BLOCK)

    if FLAT:
        # Whole tiles need no mask, so the loads stay 16 bytes wide for every n; one program has the ragged end.
        n_whole = n // BLOCK
        for tile in range(part, n_whole, n_parts):
            x = tl.load(x_ptr + tile * BLOCK + offs).to(tl.float32)
            counts, smallest, largest = _take(
                x, counts, smallest, largest, span, array, EXTREMES, BINS, BLOCK_BINS, FORM
            )
        if part == n_whole % n_parts:
            mask = offs < n - n_whole * BLOCK
            x = tl.load(x_ptr + n_whole * BLOCK + offs, mask=mask, other=float("nan")).to(tl.float32)
            counts, smallest, largest = _take(
                x, counts, smallest, largest, span, array, EXTREMES, BINS, BLOCK_BINS, FORM
            )
    else:
        BLOCK_R: tl.constexpr = BLOCK // BLOCK_K
        run = rows.run * VEC
        tiles_per_row = (run - 1) // BLOCK_K + 1
        n_tiles = ((rows.n_rows - 1) // BLOCK_R + 1) * tiles_per_row
        n_tiles = tl.where(n > 0, n_tiles, 0)
        base = x_ptr + channel.to(tl.int64) * rows.channel_stride * VEC
        for tile in range(part, n_tiles, n_parts):
            row = (tile // tiles_per_row) * BLOCK_R + tl.arange(0, BLOCK_R)
            k = (tile % tiles_per_row) * BLOCK_K + tl.arange(0, BLOCK_K)
            pointers = base + row_offset(row, rows.sizes, rows.strides)[:, None] * VEC
            pointers += k.to(tl.int64)[None, :] * rows.run_stride
            mask = (row < rows.n_rows)[:, None] & (k < run)[None, :]
            x = tl.load(pointers, mask=mask, other=float("nan")).to(tl.float32)
            x = tl.reshape(x, (BLOCK,))
            counts, smallest, largest = _take(
                x, counts, smallest, largest, span, array, EXTREMES, BINS, BLOCK_BINS, FORM
            )

    if FORM == INLINE_PTX:
        tl.debug_barrier()
        counts = shared_load(array + bins * 4)
    if FORM != GLOBAL:
        tl.store(own_ptr + bins, counts)
    if EXTREMES:
        tl.store(scratch.extremes + channel * 2 * n_parts + part, tl.min(smallest, 0))
        tl.store(scratch.extremes + (channel * 2 + 1) * n_parts + part, tl.max(largest, 0))


@triton.jit
def _new_range(old_low, old_high, scratch, channel, n_parts, BLOCK_P: tl.constexpr):
    """The range with this batch in it, from the programs' extremes. Unchanged if nothing of x is finite."""
    parts = tl.arange(0, BLOCK_P)
    offset = scratch.extremes + channel * 2 * n_parts + parts
    low = tl.min(tl.load(offset, mask=parts < n_parts, other=float("inf")), 0)
    high = tl.max(tl.load(offset + n_parts, mask=parts < n_parts, other=float("-inf")), 0)
    seen = (old_low < float("inf")) & (old_high > float("-inf"))
    none = low > high
    low = tl.where(none, old_low, tl.where(seen, tl.minimum(low, old_low), low))
    high = tl.where(none, old_high, tl.where(seen, tl.maximum(high, old_high), high))
    return low, high


@triton.jit(do_not_specialize=["n"])  # n meets only comparisons: nothing to gain, compilations to lose
def _histogram_pass_kernel(
    x_ptr,  # any float dtype
    min_ptr,  # (C,) float32: running min, or the given low
    max_ptr,  # (C,) float32
    histogram_ptr,  # (C, BINS) float32; SECOND only
    remainder_ptr,  # (C, BINS) float32 or None; SECOND only
    enabled_ptr,  # 1-element flag or None
    scratch,  # Scratch
    rows,  # Rows; unused if FLAT
    n,
    PURPOSE: tl.constexpr,
    FLAT: tl.constexpr,
    VEC: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    STEPS: tl.constexpr,
    FORM: tl.constexpr,
):
    """Grid (C, parts)."""
    channel = tl.program_id(0)
    part = tl.program_id(1)
    n_parts = tl.num_programs(1)
    n = tl.where(is_on(enabled_ptr), n.to(tl.int64), 0)  # a disabled observer reads nothing
    low = tl.load(min_ptr + channel)
    high = tl.load(max_ptr + channel)
    count = True
    if PURPOSE == FIRST:
        seen = low <= high
        low = tl.where(seen, low, 0.0)
        high = tl.where(seen, high, -1.0)
    elif PURPOSE == SECOND:
        new_low, new_high = _new_range(low, high, scratch, channel, n_parts, BLOCK_P)
        count = (new_low != low) | (new_high != high)
        if part == 0:
            tl.store(scratch.ranges + channel * 4, low)
            tl.store(scratch.ranges + channel * 4 + 1, high)
            tl.store(scratch.ranges + channel * 4 + 2, new_low)
            tl.store(scratch.ranges + channel * 4 + 3, new_high)
            if count:
                bins = tl.arange(0, BLOCK_BINS)
                offset = channel.to(tl.int64) * BINS + bins
                copy = scratch.snapshot + channel.to(tl.int64) * 2 * BLOCK_BINS + bins
                tl.store(copy, tl.load(histogram_ptr + offset, mask=bins < BINS, other=0.0))
                if remainder_ptr is not None:
                    tl.store(copy + BLOCK_BINS, tl.load(remainder_ptr + offset, mask=bins < BINS, other=0.0))
                step = linspace_step(new_low, new_high, BINS)
                edge = linspace_point(bins, new_low, new_high, step, BINS)
                edge = tl.where(step < float("inf"), edge, float("-inf"))  # all goes to the last bin, as in torch.ao
                firsts = tl.where(bins == 0, 0, parts_below(edge, low, high, BINS * UPSAMPLE, STEPS))
                tl.store(scratch.firsts + channel.to(tl.int64) * BLOCK_BINS + bins, firsts)
        low = new_low
        high = new_high
    if count:
        _count(
            x_ptr, rows, n, low, high, scratch, channel, part, n_parts,
            PURPOSE == FIRST, FLAT, VEC, BINS, BLOCK_BINS, BLOCK, BLOCK_K, FORM,
        )  # fmt: skip


class _Geometry(NamedTuple):
    """How a call reads x."""

    rows: Rows
    n: int
    flat: bool
    vec: int
    block_k: int
    config: histogram_heuristics.HistogramConfig


def _geometry(x: torch.Tensor, axis: int | None, bins: int) -> _Geometry:
    layout = plan(tuple(x.shape), (x.stride(),), axis)
    channels = 1 if axis is None else x.shape[axis]
    flat = isinstance(layout, Flat)
    cuda = torch.version.hip is None
    inline_ptx = histogram_heuristics.INLINE_PTX and flat and not INTERPRETED and cuda
    shared_atomics = histogram_heuristics.SHARED_ATOMICS and cuda
    n = x.numel() // channels
    config = histogram_heuristics.histogram_passes(n, channels, bins, x.device, inline_ptx, shared_atomics)
    if isinstance(layout, Flat):
        return _Geometry(Rows((1,), (0,), 1, 1, 1, 0), layout.n, True, 1, config.block, config)
    vec = 1 if layout.channel_innermost else layout.vec
    rows = Rows(
        layout.rows,
        tuple(stride // vec for stride in layout.row_strides[0]),
        layout.n_rows,
        layout.run // vec,
        layout.run_strides[0],
        layout.channel_strides[0] // vec,
    )
    block_k = min(triton.next_power_of_2(layout.run), config.block)
    return _Geometry(rows, x.numel(), False, vec, block_k, config)


def _launch_pass(
    geometry: _Geometry,
    purpose: str,
    x: torch.Tensor,
    state: tuple[torch.Tensor | None, ...],
    scratch: Scratch,
    channels: int,
    bins: int,
    upsample_rate: int = 1,
) -> None:
    config = geometry.config
    limit = {} if config.max_registers is None else {"maxnreg": config.max_registers}
    launch(
        _histogram_pass_kernel,
        (channels, config.parts),
        x,
        *state,
        scratch,
        geometry.rows,
        geometry.n,
        PURPOSE=purpose,
        FLAT=geometry.flat,
        VEC=geometry.vec,
        BINS=bins,
        BLOCK_BINS=block_bins(bins),
        BLOCK=config.block,
        BLOCK_K=geometry.block_k,
        BLOCK_P=MAX_PARTIALS,
        UPSAMPLE=upsample_rate,
        STEPS=(bins * upsample_rate).bit_length(),
        FORM=config.form,
        num_warps=config.num_warps,
        **limit,
    )


def block_bins(bins: int) -> int:
    """Bins of a block that holds them all: a power of two."""
    return max(triton.next_power_of_2(bins), 16)


def launch_histogram(
    counts: torch.Tensor, x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, *, axis: int | None
) -> None:
    """Count x in a given range. Two launches.

    Args:
        counts: int64 (bins,) or (C, bins), contiguous; written.
        x: any layout, not empty; any float dtype.
        low: lower ends, C contiguous float32 elements (1 for axis=None).
        high: upper ends.
        axis: channel axis in [0, x.ndim), or None.
    """
    bins, channels = counts.shape[-1], low.numel()
    geometry = _geometry(x, axis, bins)
    programs = channels * geometry.config.parts
    scratch = Scratch(torch.empty(programs * block_bins(bins), dtype=torch.int32, device=x.device))
    _launch_pass(geometry, "given", x, (low, high, None, None, None), scratch, channels, bins)
    launch_total(counts, scratch.counts, geometry.config.parts, block_bins(bins))


def launch_observe_histogram(
    x: torch.Tensor,
    histogram: torch.Tensor,
    min_val: torch.Tensor,
    max_val: torch.Tensor,
    remainder: torch.Tensor | None,
    *,
    upsample_rate: int,
    axis: int | None,
    enabled: torch.Tensor | None,
) -> None:
    """Fold x into running histograms. Three launches.

    Args:
        x: any layout, not empty; any float dtype.
        histogram: float32 (bins,) or (C, bins), contiguous; written, as are the next three.
        min_val: C contiguous float32 elements (1 for axis=None).
        max_val: like min_val.
        remainder: float32, like histogram, or None.
        upsample_rate: parts of a bin when the range grows.
        axis: channel axis in [0, x.ndim), or None.
        enabled: 1-element flag or None.
    """
    bins, channels = histogram.shape[-1], min_val.numel()
    geometry = _geometry(x, axis, bins)
    parts, width = geometry.config.parts, block_bins(bins)
    floats = x.new_empty(channels * (2 * width + 4 + 2 * parts), dtype=torch.float32)
    # Whatever the number of parts, all three begin at a multiple of 16 bytes: Triton compiles anew for what does not.
    snapshot, ranges, extremes = floats.split([channels * 2 * width, channels * 4, channels * 2 * parts])
    integers = torch.empty(channels * width * (parts + 1), dtype=torch.int32, device=x.device)
    counts, firsts = integers.split([channels * width * parts, channels * width])
    scratch = Scratch(counts, extremes, ranges, snapshot, firsts)
    state = (min_val, max_val, histogram, remainder, enabled)
    _launch_pass(geometry, "first", x, state, scratch, channels, bins)
    _launch_pass(geometry, "second", x, state, scratch, channels, bins, upsample_rate)
    launch_commit(histogram, remainder, min_val, max_val, scratch, parts, width, upsample_rate)
