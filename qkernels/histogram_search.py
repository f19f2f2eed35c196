"""The range search of histograms: one launch, one program per histogram, no host read.

The walk and the errors are those of `qkernels.ops.histogram_search_cpu`, which says more. The whole histogram stays in
registers. A step is two counts over the cumulative sum; steps that would move nothing are skipped a block at a time; an
error is one pass over the bins. Its sum is float64, rounded once: torch.ao's float32 sum may decide a close call
otherwise.

The launch ends with what the caller asked for: the range that was found, or the scale and zero point that
`qkernels.qparams` chooses for it.

Bytes: 4 per bin and histogram, and up to 16 per step of the walk from the table of quantiles, which L2 holds.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from qkernels.device_math import fma, is_on, max_nan, min_nan
from qkernels.launch import launch
from qkernels.qparams import FLOAT_QPARAMS, NO_RULE, SYMMETRIC, RuleArguments, qparams_of

BLOCK_STEPS = 1024  # steps that are looked ahead at a time


class Found(NamedTuple):
    """Where the results go: pointers to C contiguous elements, None where unused. One kernel argument.

    Attributes:
        low: lower end of the range, any float dtype; without a rule.
        high: upper end, like low.
        scale: float32; with a rule.
        zero_point: int32, int64 or any float dtype; with a rule.
        scale_copy: float32. Given, scale and zero point are renewed in place, where the flag is on, and copies of the
            two, new or old, go here and to zero_point_copy. None writes scale and zero point whatever the flag says.
        zero_point_copy: dtype of zero_point.
        rule: arguments of the qparams rule.
    """

    low: Any = None
    high: Any = None
    scale: Any = None
    zero_point: Any = None
    scale_copy: Any = None
    zero_point_copy: Any = None
    rule: RuleArguments = NO_RULE


@triton.jit
def _floor_quotient(numerator, divisor):
    """Floor of the exact quotient, as torch.div(rounding_mode="floor") up to 2**22; NaN for an infinite numerator."""
    quotient = tl.floor(tl.div_rn(numerator, divisor))
    above = fma(-quotient, divisor, numerator) < 0.0  # the division rounded up to an integer
    quotient = tl.where(above, quotient - 1.0, quotient)
    return tl.where(tl.abs(numerator) < float("inf"), quotient, float("nan"))


@triton.jit
def _error(density, i, mask, start, end, bin_width, quant_bins):
    """Squared error of quantizing in bins start..end: torch.ao's `_compute_quantization_error`, but for its sum."""
    code_width = bin_width * (end - start + 1).to(tl.float64) / tl.full((), quant_bins, tl.float64)
    zero = tl.zeros(density.shape, tl.float32)
    width = zero + code_width.to(tl.float32)
    half = zero + (code_width / 2.0).to(tl.float32)
    step = bin_width.to(tl.float32)
    top = quant_bins - 1.0
    cube = half * half * half
    begin = (i - start).to(tl.float32) * step
    finish = begin + step
    code_of_begin = min_nan(max_nan(_floor_quotient(begin, width), 0.0), top)
    code_of_finish = min_nan(max_nan(_floor_quotient(finish, width), 0.0), top)

    three = tl.full(density.shape, 3.0, tl.float32)
    begin = begin - (code_of_begin + 0.5) * width  # distances to the middle of the code
    finish = finish - (code_of_finish * width + half)
    error = density * tl.div_rn(cube - begin * begin * begin, three)
    error += (code_of_finish - code_of_begin - 1.0) * (density * tl.div_rn(cube + cube, three))
    error += density * tl.div_rn(finish * finish * finish + cube, three)
    return tl.sum(tl.where(mask, error, 0.0).to(tl.float64), 0).to(tl.float32)


@triton.jit
def _store(found, low, high, channel, on, RULE: tl.constexpr):
    """The range [low, high] of a channel, float32, or its scale and zero point."""
    if RULE is None:
        tl.store(found.low + channel, low.to(found.low.dtype.element_ty))
        tl.store(found.high + channel, high.to(found.high.dtype.element_ty))
    else:
        scale, zero_point = qparams_of(low, high, found.rule, RULE)
        if (RULE != FLOAT_QPARAMS) & (RULE != SYMMETRIC):
            zero_point = zero_point.to(tl.int32)  # as choose_qparams has it: what a NaN becomes depends on the integer
        zero_point = zero_point.to(found.zero_point.dtype.element_ty)
        if found.scale_copy is not None:
            scale = tl.where(on, scale, tl.load(found.scale + channel))
            zero_point = tl.where(on, zero_point, tl.load(found.zero_point + channel))
            tl.store(found.scale_copy + channel, scale)
            tl.store(found.zero_point_copy + channel, zero_point)
        tl.store(found.scale + channel, scale)
        tl.store(found.zero_point + channel, zero_point)


@triton.jit
def _search_kernel(
    histogram_ptr,  # (C, BINS) float32
    min_ptr,  # (C,) float32
    max_ptr,  # (C,) float32
    alphas_ptr,  # float64: quantile after so many steps from the left
    betas_ptr,  # float64: quantile after so many steps from the right
    n_steps,  # length of either
    quant_bins,  # float
    enabled_ptr,  # 1-element flag or None
    found,  # Found
    RULE: tl.constexpr,  # None for the range
    BINS: tl.constexpr,
    BLOCK_BINS: tl.constexpr,
    BLOCK_STEPS: tl.constexpr,
):
    channel = tl.program_id(0)
    minimum = tl.load(min_ptr + channel)
    maximum = tl.load(max_ptr + channel)
    bins = tl.full((), BINS, tl.float32)
    step = tl.div_rn(maximum - minimum, bins)
    bin_width = (maximum.to(tl.float64) - minimum.to(tl.float64)) / bins.to(tl.float64)
    on = is_on(enabled_ptr)
    searched = on & (minimum <= maximum)

    i = tl.arange(0, BLOCK_BINS)
    mask = i < BINS
    histogram = tl.load(histogram_ptr + channel.to(tl.int64) * BINS + i, mask=mask, other=0.0)
    cumulative = tl.cumsum(histogram.to(tl.float64), 0)
    total = tl.sum(histogram.to(tl.float64), 0).to(tl.float32).to(tl.float64)
    cumulative = tl.where(mask, cumulative.to(tl.float32), float("inf"))
    density = tl.div_rn(histogram, tl.zeros((BLOCK_BINS,), tl.float32) + bin_width.to(tl.float32))

    start = tl.full((), 0, tl.int32)
    end = tl.full((), BINS - 1, tl.int32)
    left = tl.full((), 0, tl.int32)  # steps taken from either side
    right = tl.full((), 0, tl.int32)
    best = tl.full((), float("inf"), tl.float32)
    going = tl.where(searched & (step != 0.0), 1, 0)
    while going != 0:
        from_left = (tl.load(alphas_ptr + left + 1) * total).to(tl.float32)
        from_right = (tl.load(betas_ptr + right + 1) * total).to(tl.float32)
        first = tl.sum((cumulative < from_left).to(tl.int32), 0)
        last = tl.sum((cumulative <= from_right).to(tl.int32), 0) - 1
        first = tl.minimum(tl.maximum(first, start), end)
        last = tl.maximum(tl.minimum(last, end), start)
        from_the_left = first - start > end - last
        new_start = tl.where(from_the_left, first, start)
        new_end = tl.where(from_the_left, end, last)
        left += tl.where(from_the_left, 1, 0)
        right += tl.where(from_the_left, 0, 1)
        if (new_start != start) | (new_end != end):
            error = _error(density, i, mask, new_start, new_end, bin_width, quant_bins)
            if error > best:
                going = tl.full((), 0, tl.int32)
            else:
                best = error
                start = new_start
                end = new_end
        else:
            # Steps from the right move nothing until one passes the mass below the last bin.
            mass = tl.sum(tl.where(i == end, cumulative, 0.0), 0)
            steps = right + tl.arange(0, BLOCK_STEPS)
            beta = tl.load(betas_ptr + steps + 1, mask=steps + 1 < n_steps, other=-1.0)
            moves = mass > (beta * total).to(tl.float32)
            right = tl.min(tl.where(moves, steps, right + BLOCK_STEPS), 0)
            right = tl.minimum(right, n_steps - 2)
        more = (start < end) & (tl.load(alphas_ptr + left) < tl.load(betas_ptr + right))
        going = tl.where(more, going, 0)

    low = tl.where(searched, minimum + step * start.to(tl.float32), minimum)
    high = tl.where(searched, minimum + step * (end + 1).to(tl.float32), maximum)
    _store(found, low, high, channel, on, RULE)


def launch_search(
    histogram: torch.Tensor,
    min_val: torch.Tensor,
    max_val: torch.Tensor,
    quantiles: tuple[torch.Tensor, torch.Tensor],
    quant_bins: int,
    enabled: torch.Tensor | None,
    found: Found,
    rule: str | None = None,
) -> None:
    """Search every histogram's range. One launch.

    Args:
        histogram: float32 (bins,) or (C, bins), contiguous.
        min_val: C contiguous float32 elements.
        max_val: like min_val.
        quantiles: float64 tables of the walk, on the device.
        quant_bins: number of codes.
        enabled: 1-element flag or None; 0 takes min_val and max_val for the range.
        found: what is written.
        rule: qparams rule (`qkernels.ops.qparams_rules.RULES`), or None for the range itself.
    """
    bins = histogram.shape[-1]
    block = max(triton.next_power_of_2(bins), 16)
    num_warps = min(max(block // 256, 4), 16)
    # By itself ptxas may save registers, and spill, for a second program that never comes.
    limit = {} if torch.version.hip else {"maxnreg": min(65536 // (32 * num_warps), 255)}
    launch(
        _search_kernel,
        (min_val.numel(),),
        histogram,
        min_val,
        max_val,
        *quantiles,
        quantiles[0].numel(),
        float(quant_bins),
        enabled,
        found,
        RULE=rule,
        BINS=bins,
        BLOCK_BINS=block,
        BLOCK_STEPS=BLOCK_STEPS,
        num_warps=num_warps,
        **limit,
    )
