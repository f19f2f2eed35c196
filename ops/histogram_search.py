"""search_histogram_range: schema, CPU and Triton implementations, fake."""

from __future__ import annotations

from functools import lru_cache

import torch

from qkernels.ops import checks
from qkernels.ops.histogram import check_histogram, check_kernel_bins
from qkernels.ops.histogram_search_cpu import quantiles, search_cpu
from qkernels.ops.registration import directly, implementations, not_differentiable, register

Tensor = torch.Tensor


@lru_cache(maxsize=16)
def device_quantiles(device: torch.device) -> tuple[Tensor, Tensor]:
    """The walk's quantiles on a device, copied there once (1.6 MB): a CUDA graph is captured after the first call."""
    alphas, betas = (torch.from_numpy(table).to(device) for table in quantiles())
    return alphas, betas


def check_search(
    op: str, histogram: Tensor, min_val: Tensor, max_val: Tensor, quant_bins: int, enabled: Tensor | None
) -> None:
    """Checks of a finished histogram and of how to search it."""
    if histogram.ndim not in (1, 2):
        raise ValueError(f"{op}: histogram must have shape (bins,) or (C, bins); got {tuple(histogram.shape)}")
    check_histogram(op, histogram, min_val, max_val, None if histogram.ndim == 1 else histogram.shape[0])
    if quant_bins < 2:
        raise ValueError(f"{op}: quant_bins must be at least 2; got {quant_bins}")
    checks.check_flag(op, "enabled", enabled, histogram)


def _search_into(low: Tensor, high: Tensor, histogram: Tensor, quant_bins: int) -> None:
    """Search one histogram over the range in `low` and `high`, which are overwritten."""
    ends = low.item(), high.item()
    if ends[0] <= ends[1]:
        found = search_cpu(histogram, *ends, quant_bins)
        low.fill_(found[0])
        high.fill_(found[1])


def search_aten(
    histogram: Tensor, min_val: Tensor, max_val: Tensor, quant_bins: int, enabled: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The search on the CPU, of checked arguments."""
    low, high = min_val.clone(), max_val.clone()
    if enabled is not None and not enabled.item():
        return low, high
    histogram = histogram.detach()  # NumPy reads it
    if histogram.dtype != torch.float32 or not histogram.is_contiguous():
        histogram = histogram.float().contiguous()
    if histogram.ndim == 1:
        _search_into(low, high, histogram, quant_bins)
    else:
        for channel, row in enumerate(histogram):
            _search_into(low[channel], high[channel], row, quant_bins)
    return low, high


def search_triton(
    histogram: Tensor, min_val: Tensor, max_val: Tensor, quant_bins: int, enabled: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The search on a GPU, of checked arguments."""
    from qkernels.histogram_search import Found, launch_search

    low, high = torch.empty_like(min_val), torch.empty_like(max_val)
    state = (histogram.float().contiguous(), min_val.float().contiguous(), max_val.float().contiguous())
    launch_search(*state, device_quantiles(histogram.device), quant_bins, enabled, Found(low, high))
    return low, high


def _aten(
    histogram: Tensor, min_val: Tensor, max_val: Tensor, quant_bins: int, enabled: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    check_search("search_histogram_range", histogram, min_val, max_val, quant_bins, enabled)
    return search_aten(histogram, min_val, max_val, quant_bins, enabled)


def _triton(
    histogram: Tensor, min_val: Tensor, max_val: Tensor, quant_bins: int, enabled: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    check_search("search_histogram_range", histogram, min_val, max_val, quant_bins, enabled)
    check_kernel_bins("search_histogram_range", histogram.shape[-1], histogram.device)
    return search_triton(histogram, min_val, max_val, quant_bins, enabled)


def _fake(
    histogram: Tensor, min_val: Tensor, max_val: Tensor, quant_bins: int, enabled: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    check_search("search_histogram_range", histogram, min_val, max_val, quant_bins, enabled)
    return torch.empty_like(min_val), torch.empty_like(max_val)


_SEARCH = implementations(_aten, _triton)
_op = not_differentiable(
    register(
        "search_histogram_range(Tensor histogram, Tensor min_val, Tensor max_val, int quant_bins, "
        "Tensor? enabled=None) -> (Tensor low, Tensor high)",
        aten=_aten,
        triton=_triton,
        fake=_fake,
    )
)


def search_histogram_range(
    histogram: Tensor, min_val: Tensor, max_val: Tensor, quant_bins: int, enabled: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The range in which a histogram is quantized with the least squared error, as torch.ao looks for it.

    From both ends inwards, by steps of 1e-5 of the mass, until the error grows. A local minimum of an approximation:
    values are taken to be uniform within a bin, and what lies outside the range to be clamped.

    Args:
        histogram: shape (bins,), or (C, bins); float. At most 8192 bins on a GPU.
        min_val: its min, 1 element, or shape (C,); float.
        max_val: its max, like min_val.
        quant_bins: number of codes, as 256.
        enabled: device flag, 1 element; 0 gives min_val and max_val, unsearched. None is on.

    Returns:
        (min, max), shape and dtype of min_val. Where min_val > max_val (never observed) the two as they are.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, value or device.
        NotImplementedError: more bins than the kernel holds.

    Note:
        On a GPU one launch for all channels, no host sync.

    Reference:
        HistogramObserver._non_linear_param_search, torch/ao/quantization/observer.py, torch 2.13.
    """
    search = directly(_SEARCH, histogram, min_val, max_val) or _op
    return search(histogram, min_val, max_val, quant_bins, enabled)
