"""The last launch of a histogram: add up the programs' counts and, for a running one, carry the old bins over.

torch.ao's growth cuts every old bin into parts, each of which goes whole to the new bin of its middle. Here every new
bin gathers the parts that come to it, in the same order and with the same roundings, so that the bits are those of
torch.ao's CPU code: torch.linspace's fused multiply-adds, and float32 sums one part after another. From 2**24 on, where
float32 no longer counts, a float64 sum takes over, and the remainder keeps what the float32 buffer cannot hold.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from qkernels.histogram_bins import bin_of, counting_range, scaled_width
from qkernels.launch import launch

BLOCK = 128  # bins per program
BLOCK_P = 64  # programs' counts added per step


@triton.jit
def _total(counts_ptr, channel, d, n_parts, BLOCK_BINS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr):
    """int64 sum over the programs of a channel, for bins d."""
    total = tl.zeros((BLOCK,), tl.int64)
    base = counts_ptr + channel.to(tl.int64) * n_parts * BLOCK_BINS + d
    for first in range(0, n_parts, BLOCK_P):
        parts = first + tl.arange(0, BLOCK_P)
        offset = parts[:, None] * BLOCK_BINS
        counts = tl.load(base[None, :] + offset, mask=(parts < n_parts)[:, None], other=0)
        total += tl.sum(counts.to(tl.int64), 0)
    return total


@triton.jit
def _total_kernel(
    out_ptr,  # (C, BINS) int64
    counts_ptr,  # (C, parts, BLOCK_BINS) int32
    n_parts,
    BINS: tl.constexpr,
    BLOCK_BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    channel = tl.program_id(0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = _total(counts_ptr, channel, d, n_parts, BLOCK_BINS, BLOCK, BLOCK_P)
    tl.store(out_ptr + channel.to(tl.int64) * BINS + d, total, mask=d < BINS)


def launch_total(out: torch.Tensor, counts: torch.Tensor, parts: int, width: int) -> None:
    """Add the programs' counts, (C, parts, width) int32, to `out`, int64 (bins,) or (C, bins). One launch."""
    bins = out.shape[-1]
    block = min(BLOCK, width)
    launch(
        _total_kernel,
        (out.numel() // bins, triton.cdiv(bins, block)),
        out,
        counts,
        parts,
        BINS=bins,
        BLOCK_BINS=width,
        BLOCK=block,
        BLOCK_P=BLOCK_P,
        num_warps=4,
    )


@triton.jit
def _old_bins(snapshot_ptr, b, mask, HAS_REMAINDER: tl.constexpr, BLOCK_BINS: tl.constexpr):
    """(bins as float32, bins with what float32 could not hold as float64) of the old histogram."""
    old = tl.load(snapshot_ptr + b, mask=mask, other=0.0)
    exact = old.to(tl.float64)
    if HAS_REMAINDER:
        lost = tl.load(snapshot_ptr + BLOCK_BINS + b, mask=mask, other=0.0)
        lost = tl.where(old + lost == old, lost, 0.0)  # else somebody wrote to the histogram in between
        exact += lost.to(tl.float64)
    return old, exact


@triton.jit
def _gather(
    snapshot_ptr, firsts_ptr, d,
    HAS_REMAINDER: tl.constexpr, BINS: tl.constexpr, BLOCK_BINS: tl.constexpr, UPSAMPLE: tl.constexpr,
):  # fmt: skip
    """The old histogram in the new range, for bins d: (float32 summed as torch.ao does, float64)."""
    first = tl.load(firsts_ptr + d, mask=d < BINS, other=0)
    last = tl.load(firsts_ptr + d + 1, mask=d + 1 < BINS, other=BINS * UPSAMPLE)
    last = tl.where(d < BINS, last, first)
    summed = tl.zeros(d.shape, tl.float32)
    exact = tl.zeros(d.shape, tl.float64)
    first_bin = first // UPSAMPLE
    bins = tl.where(last > first, (last - 1) // UPSAMPLE + 1 - first_bin, 0)
    for t in range(0, tl.max(bins, 0)):
        b = first_bin + t
        parts = tl.minimum(last, (b + 1) * UPSAMPLE) - tl.maximum(first, b * UPSAMPLE)
        old, full = _old_bins(snapshot_ptr, b, parts > 0, HAS_REMAINDER, BLOCK_BINS)
        old = tl.div_rn(old, tl.full(d.shape, UPSAMPLE, tl.float32))
        for k in range(UPSAMPLE):
            summed = tl.where(k < parts, summed + old, summed)
        exact += tl.where(parts > 0, full / UPSAMPLE * parts.to(tl.float64), 0.0)
    return summed, exact


@triton.jit
def _one_value(
    snapshot_ptr, d, value, new_low, new_high,
    HAS_REMAINDER: tl.constexpr, BINS: tl.constexpr, BLOCK_BINS: tl.constexpr,
):  # fmt: skip
    """A histogram of one value in the new range: all of it in one bin."""
    b = tl.arange(0, BLOCK_BINS)
    old, full = _old_bins(snapshot_ptr, b, b < BINS, HAS_REMAINDER, BLOCK_BINS)
    low, high = counting_range(new_low, new_high)
    width, inverse, power = scaled_width(low, high)
    values = tl.full(d.shape, 0.0, tl.float32) + value
    here = d == bin_of(values, low, width, inverse, power, BINS)
    summed = tl.where(width < float("inf"), tl.sum(old.to(tl.float64), 0).to(tl.float32), 0.0)
    exact = tl.where(width < float("inf"), tl.sum(full, 0), 0.0)
    return tl.where(here, summed, 0.0), tl.where(here, exact, 0.0)


@triton.jit
def _commit_kernel(
    histogram_ptr,  # (C, BINS) float32
    remainder_ptr,  # (C, BINS) float32 or None
    min_ptr,  # (C,) float32
    max_ptr,  # (C,) float32
    scratch,  # qkernels.histogram.Scratch
    n_parts,
    BINS: tl.constexpr,
    BLOCK_BINS: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Grid (C, blocks of bins)."""
    channel = tl.program_id(0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = d < BINS
    old_low = tl.load(scratch.ranges + channel * 4)
    old_high = tl.load(scratch.ranges + channel * 4 + 1)
    new_low = tl.load(scratch.ranges + channel * 4 + 2)
    new_high = tl.load(scratch.ranges + channel * 4 + 3)
    offset = channel.to(tl.int64) * BINS + d
    snapshot_ptr = scratch.snapshot + channel.to(tl.int64) * 2 * BLOCK_BINS
    HAS_REMAINDER: tl.constexpr = remainder_ptr is not None

    carried = tl.zeros((BLOCK,), tl.float32)
    exact = tl.zeros((BLOCK,), tl.float64)
    if (new_low == old_low) & (new_high == old_high):
        carried = tl.load(histogram_ptr + offset, mask=mask, other=0.0)
        exact = carried.to(tl.float64)
        if HAS_REMAINDER:
            lost = tl.load(remainder_ptr + offset, mask=mask, other=0.0)
            exact += tl.where(carried + lost == carried, lost, 0.0).to(tl.float64)
    elif (old_low < float("inf")) & (old_high > float("-inf")):
        if old_low == old_high:
            carried, exact = _one_value(snapshot_ptr, d, old_low, new_low, new_high, HAS_REMAINDER, BINS, BLOCK_BINS)
        else:
            carried, exact = _gather(
                snapshot_ptr, scratch.firsts + channel.to(tl.int64) * BLOCK_BINS, d, HAS_REMAINDER, BINS, BLOCK_BINS,
                UPSAMPLE,
            )  # fmt: skip

    total = _total(scratch.counts, channel, d, n_parts, BLOCK_BINS, BLOCK, BLOCK_P)
    exact += total.to(tl.float64)
    full = exact >= 16777216.0
    updated = tl.where(full, exact.to(tl.float32), carried + total.to(tl.float32))
    tl.store(histogram_ptr + offset, updated, mask=mask)
    if HAS_REMAINDER:
        lost = tl.where(full, (exact - updated.to(tl.float64)).to(tl.float32), 0.0)
        tl.store(remainder_ptr + offset, lost, mask=mask)
    if tl.program_id(1) == 0:
        tl.store(min_ptr + channel, new_low)
        tl.store(max_ptr + channel, new_high)


def launch_commit(
    histogram: torch.Tensor,
    remainder: torch.Tensor | None,
    min_val: torch.Tensor,
    max_val: torch.Tensor,
    scratch: Any,
    parts: int,
    width: int,
    upsample_rate: int,
) -> None:
    """Commit what the passes over x left in the scratch. One launch.

    Args:
        histogram: float32 (bins,) or (C, bins), contiguous; written, as are the next three.
        remainder: float32, like histogram, or None.
        min_val: (C,) float32.
        max_val: (C,) float32.
        scratch: `qkernels.histogram.Scratch` of the passes.
        parts: programs per histogram of the passes.
        width: BLOCK_BINS of the passes.
        upsample_rate: parts of a bin when the range grows.
    """
    bins = histogram.shape[-1]
    block = min(BLOCK, width)
    launch(
        _commit_kernel,
        (min_val.numel(), triton.cdiv(bins, block)),
        histogram,
        remainder,
        min_val,
        max_val,
        scratch,
        parts,
        BINS=bins,
        BLOCK_BINS=width,
        UPSAMPLE=upsample_rate,
        BLOCK=block,
        BLOCK_P=BLOCK_P,
        num_warps=4,
    )
