"""Merging histograms that were taken apart: by several processes, or over several data sets. On the CPU, in float64."""

from __future__ import annotations

import torch

from qkernels.ops import checks
from qkernels.ops.histogram import UPSAMPLE_RATE, check_bins
from qkernels.ops.histogram_cpu import Range, carried

Tensor = torch.Tensor


def _check(histograms: Tensor, min_val: Tensor, max_val: Tensor) -> None:
    op = "merge_histograms"
    for name, tensor in (("histograms", histograms), ("min_val", min_val), ("max_val", max_val)):
        checks.check_x(op, tensor, name)
    shape = tuple(histograms.shape)
    if len(shape) != 2 or shape[0] == 0:
        raise ValueError(f"{op}: histograms must have shape (R, bins) with R at least 1; got {shape}")
    check_bins(op, shape[1])
    for name, tensor in (("min_val", min_val), ("max_val", max_val)):
        if tuple(tensor.shape) != shape[:1]:
            raise ValueError(f"{op}: {name} must have shape ({shape[0]},); got {tuple(tensor.shape)}")


def merge_histograms(
    histograms: Tensor, min_val: Tensor, max_val: Tensor, upsample_rate: int = UPSAMPLE_RATE
) -> tuple[Tensor, Tensor, Tensor]:
    """One histogram of several, over the range of all.

    A histogram whose range is smaller is carried over as when a running range grows: every bin is cut into
    `upsample_rate` parts, each of which goes whole to the new bin of its middle. So mass and range are exact, and the
    bins are where all ranges are the same; agree on the range before counting where the bins must be.

    Args:
        histograms: shape (R, bins); float.
        min_val: their mins, shape (R,); float. +inf, with a max of -inf, for one that saw nothing.
        max_val: their maxs, like min_val.
        upsample_rate: parts of a bin.

    Returns:
        (histogram, min, max): float64 shape (bins,), and 0-dim in the dtype of min_val; on the device of histograms.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape.

    Note:
        Reads everything on the host: for the end of a calibration, not for its steps.
    """
    _check(histograms, min_val, max_val)
    ranges: list[Range] = list(zip(min_val.tolist(), max_val.tolist(), strict=True))
    seen = [(row, edges) for row, edges in zip(histograms.cpu().double(), ranges, strict=True) if edges[0] <= edges[1]]
    total = torch.zeros(histograms.shape[1], dtype=torch.float64, device="cpu")
    low, high = float("inf"), float("-inf")
    if seen:
        low, high = min(edges[0] for _, edges in seen), max(edges[1] for _, edges in seen)
    dtype = torch.float64 if min_val.dtype == torch.float64 else torch.float32
    for row, edges in seen:
        total += carried(row, edges, (low, high), dtype, upsample_rate)
    device, ends = histograms.device, torch.tensor([low, high], dtype=min_val.dtype, device="cpu")
    return total.to(device), ends[0].to(device), ends[1].to(device)
