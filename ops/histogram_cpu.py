"""Histograms on the CPU: vector passes for the bin index, one integer count, and torch.ao's arithmetic for the rest.

The bin of a value is trunc((x - low) * bins / (high - low)), every step rounded, as in torch.histc, whose scalar loop
takes four times as long (1 M float32 in 2048 bins, one thread, torch 2.13). Counts are integers: no bin is ever full.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch

from qkernels.launch import mark_written

Tensor = torch.Tensor
Range = tuple[float, float]  # (min, max), both exact in the dtype that is worked in

BLOCK = 1 << 18  # elements whose temporaries are alive at a time
EXACT_COUNT = 2.0**24  # float32 holds every integer up to here
INFINITY = "torch.inf detected in input tensor, ignoring input"  # torch.ao's words


def working_dtype(state: Tensor) -> torch.dtype:
    """The dtype that bins are computed in: float32, or float64 for a float64 state."""
    return torch.float64 if state.dtype == torch.float64 else torch.float32


def _number(dtype: torch.dtype) -> Any:
    """NumPy's scalar type: Python's arithmetic, rounded as the tensors' is."""
    return np.float64 if dtype == torch.float64 else np.float32


def widened(edges: Range, dtype: torch.dtype) -> Range:
    """The range that torch.histc counts in: one value gets a neighbourhood of 1."""
    number = _number(dtype)
    if edges[0] != edges[1]:
        return edges
    return float(number(edges[0]) - number(1)), float(number(edges[1]) + number(1))


def counts_inside(x: Tensor, bins: int, edges: Range, checked: bool = True) -> Tensor:
    """int64 counts, shape (bins,), of flat values in the range; float32 or float64.

    A range of one value is widened by 1 on both sides; a range whose width overflows counts nothing. Both are
    torch.histc's, as is bin 0 for what overflows on the way.

    Args:
        x: flat values.
        bins: number of bins.
        edges: (min, max) of the range.
        checked: all of x is known to lie in the range. Else what does not, NaN too, is counted apart and dropped.
    """
    low, high = widened(edges, x.dtype)
    with np.errstate(over="ignore"):
        width = float(_number(x.dtype)(high) - _number(x.dtype)(low))
    if not math.isfinite(width):
        return torch.zeros(bins, dtype=torch.int64, device=x.device)
    counts = None
    index_dtype = torch.int32 if bins < EXACT_COUNT else torch.int64
    for block in x.split(BLOCK) if x.numel() > BLOCK else (x,):
        index = torch.sub(block, low).mul_(bins).div_(width).to(index_dtype).clamp_(0, bins - 1)
        if checked:
            batch = torch.bincount(index, minlength=bins)
        else:
            inside = (block >= low).logical_and_(block <= high)
            batch = torch.bincount(index.add_(1).mul_(inside), minlength=bins + 1)[1:]
        counts = batch if counts is None else counts.add_(batch)
    assert counts is not None  # x has at least one element, or one empty block
    return counts


def _range_of(x: Tensor) -> Range:
    low, high = torch.aminmax(x)
    return low.item(), high.item()


def counts_of(x: Tensor, bins: int, edges: Range) -> Tensor:
    """int64 counts, shape (bins,), of flat values; those outside the range, and NaN, are left out."""
    low, high = widened(edges, x.dtype)
    smallest, largest = _range_of(x) if x.numel() > 0 else edges
    return counts_inside(x, bins, edges, checked=low <= smallest and largest <= high)  # false of NaN too


def finite_values(x: Tensor) -> tuple[Tensor, Range]:
    """(finite values of a flat tensor, their range); warns of infinities as torch.ao does."""
    edges = _range_of(x)
    if math.isfinite(edges[0]) and math.isfinite(edges[1]):
        return x, edges
    if bool(torch.isinf(x).any()):
        warnings.warn(INFINITY, stacklevel=2)
    x = x[torch.isfinite(x)]
    return x, _range_of(x) if x.numel() else (math.inf, -math.inf)


def _rebinned(histogram: Tensor, old: Range, new: Range, dtype: torch.dtype, upsample: int) -> Tensor:
    """A histogram over the range `old` as one over `new`, in torch.ao's arithmetic and order.

    Every bin is cut into `upsample` parts, each of which goes whole to the new bin of its middle. The dtype of
    `histogram` is that of the sums; positions are computed in `dtype`.
    """
    bins, number = histogram.numel(), _number(dtype)
    parts = histogram.repeat_interleave(upsample) / upsample
    with np.errstate(over="ignore"):
        half = float(number(0.5) * ((number(old[1]) - number(old[0])) / number(bins * upsample)))
    middles = torch.linspace(*old, bins * upsample + 1, dtype=dtype, device=histogram.device)[:-1] + half
    edges = torch.linspace(*new, bins + 1, dtype=dtype, device=histogram.device)
    bin_of = torch.bucketize(middles, edges, right=True).sub_(1).clamp_(0, bins - 1)
    return torch.bincount(bin_of, weights=parts, minlength=bins)


def carried(histogram: Tensor, old: Range, new: Range, dtype: torch.dtype, upsample: int) -> Tensor:
    """The old histogram in the new range."""
    if old == new:
        return histogram
    if old[0] == old[1]:  # all of it is one value
        bin_of_value = counts_inside(
            torch.tensor(old[:1], dtype=dtype, device=histogram.device), histogram.numel(), new
        )
        return bin_of_value.to(histogram.dtype) * histogram.sum()
    return _rebinned(histogram, old, new, dtype, upsample)


def valid_remainder(histogram: Tensor, remainder: Tensor) -> Tensor:
    """What the float32 histogram could not hold, float64; 0 where somebody wrote to the histogram in between."""
    return torch.where(histogram + remainder == histogram, remainder, 0.0).double()


def add_counts(
    counts: Tensor, histogram: Tensor, remainder: Tensor | None, old: Range, new: Range, upsample: int
) -> None:
    """Fold a batch's counts over `new` into a histogram over `old`, in place.

    Bins below 2**24 get torch.ao's float32 arithmetic. From there on, where torch.ao stops counting, sums are float64
    and `remainder` keeps what the float32 buffer cannot hold.

    Args:
        counts: int64, shape (bins,).
        histogram: running histogram, float32 or float64.
        remainder: float32, shape (bins,), or None.
        old: range of the histogram so far; equal to `new` if it did not grow.
        new: range of the counts.
        upsample: parts of a bin, see `_rebinned`.
    """
    dtype = histogram.dtype
    old_bins = carried(histogram, old, new, dtype, upsample)
    if dtype == torch.float32:  # in NumPy, whose operations on so few values cost half of ATen's
        view = histogram.numpy()
        batch = (view if old_bins is histogram else old_bins.numpy()) + counts.numpy().astype(np.float32)
        if batch.max() < EXACT_COUNT / 2:
            view[...] = batch
            mark_written(histogram)
            return
    summed = old_bins + counts.to(dtype)
    if dtype == torch.float32:
        exact = histogram.double()
        if remainder is not None:
            exact += valid_remainder(histogram, remainder)
        exact = carried(exact, old, new, dtype, upsample) + counts
        full = exact >= EXACT_COUNT
        summed = torch.where(full, exact.float(), summed)
        if remainder is not None:
            remainder.copy_(torch.where(full, exact - summed.double(), 0.0))
    histogram.copy_(summed)


def observe_cpu(
    x: Tensor, histogram: Tensor, min_val: Tensor, max_val: Tensor, remainder: Tensor | None, upsample: int
) -> None:
    """Fold all values of a non-empty x into one running histogram and its range, in place."""
    work = working_dtype(histogram)
    flat = x if x.ndim == 1 else x.reshape(-1)
    values, batch = finite_values(flat if flat.dtype == work else flat.to(work))
    if values.numel() == 0:
        return
    old = min_val.item(), max_val.item()
    counted = histogram if histogram.dtype == work else histogram.to(work)
    if old[0] == math.inf or old[1] == -math.inf:  # nothing was seen yet
        counted = torch.zeros_like(counted)
        if remainder is not None:
            remainder.zero_()
        old = new = batch
    else:
        new = min(old[0], batch[0]), max(old[1], batch[1])
    add_counts(counts_inside(values, counted.numel(), new), counted, remainder, old, new, upsample)
    if counted is not histogram:
        histogram.copy_(counted)
    if new != old or old is batch:
        min_val.fill_(new[0])
        max_val.fill_(new[1])
