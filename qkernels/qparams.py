"""Scale and zero point from min and max, on the device: the observers' rule and the rule of torch's fused op.

Sources: `UniformQuantizationObserverBase._calculate_qparams` in torch/ao/quantization/observer.py (float32 arithmetic)
and fbgemm's `ChooseQuantizationParams`, src/QuantUtils.cc, which
`torch.fused_moving_avg_obs_fake_quant` calls (float64 arithmetic), both as of torch 2.13. The two disagree for
symmetric schemes, so both exist here, and a caller names the one it means. Launchers turn off FP contraction: every
product and sum below rounds by itself, as on the CPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from qkernels.device_math import max_nan, min_nan, rint, rint64
from qkernels.launch import launch

AFFINE = tl.constexpr("affine")
SYMMETRIC = tl.constexpr("symmetric")
FLOAT_QPARAMS = tl.constexpr("float_qparams")
FUSED_AFFINE = tl.constexpr("fused_affine")
FUSED_SYMMETRIC = tl.constexpr("fused_symmetric")

# fbgemm and ATen cut scales off here (QuantUtils.h, SMALL_SCALE_THRESHOLD).
SMALL_SCALE = tl.constexpr(6.1e-5)
FLOAT32_EPS = tl.constexpr(torch.finfo(torch.float32).eps)


class RuleArguments(NamedTuple):
    """What a rule needs besides min and max. One argument of a kernel.

    Codes are floats, exact up to 2**23: an integer argument that happens to be 1 would become a constant of the kernel
    and cost a compilation.

    Attributes:
        quant_min: smallest code.
        quant_max: largest code.
        half_steps: (quant_max - quant_min) // 2, for the fused symmetric rule.
        symmetric_zero_point: the zero point of the observers' symmetric rule.
        eps: pointer to the smallest scale, 1 float element; None is float32's eps. The fused rules have none.
    """

    quant_min: float
    quant_max: float
    half_steps: float
    symmetric_zero_point: float
    eps: Any


NO_RULE = RuleArguments(0.0, 0.0, 0.0, 0.0, None)


def rule_arguments(
    quant_min: int, quant_max: int, symmetric_zero_point: int = 0, eps: torch.Tensor | None = None
) -> RuleArguments:
    """Kernel arguments for a quantization range within +-2**23."""
    half_steps = (quant_max - quant_min) // 2
    return RuleArguments(float(quant_min), float(quant_max), float(half_steps), float(symmetric_zero_point), eps)


@triton.jit
def _observer_rule(low, high, arguments, RULE: tl.constexpr):
    """torch.ao's `_calculate_qparams`. low > high (never observed) gives scale 1, zero point 0."""
    eps = FLOAT32_EPS
    if arguments.eps is not None:
        eps = tl.load(arguments.eps).to(tl.float32)
    quant_min = arguments.quant_min
    span = arguments.quant_max - quant_min
    low_0 = min_nan(low, 0.0)
    high_0 = max_nan(high, 0.0)
    if RULE == SYMMETRIC:
        scale = max_nan(tl.div_rn(max_nan(-low_0, high_0), span * 0.5), eps)
        zero_point = tl.full(low.shape, arguments.symmetric_zero_point, tl.float32)
    elif RULE == FLOAT_QPARAMS:
        scale = tl.div_rn(high - low, span)
        scale = tl.where(scale > eps, scale, 1.0)
        zero_point = tl.div_rn(-low, scale)
    else:
        scale = max_nan(tl.div_rn(high_0 - low_0, span), eps)
        zero_point = min_nan(max_nan(quant_min - rint(tl.div_rn(low_0, scale)), quant_min), arguments.quant_max)
    unseen = low > high
    return tl.where(unseen, 1.0, scale), tl.where(unseen, 0.0, zero_point)


@triton.jit
def _fused_rule(low, high, arguments, RULE: tl.constexpr):
    """`ChooseQuantizationParams` as `fused_moving_avg_obs_fake_quant` calls it."""
    quant_min = tl.full((), arguments.quant_min, tl.float64)
    quant_max = tl.full((), arguments.quant_max, tl.float64)
    low_0 = tl.minimum(low, 0.0)
    high_0 = tl.maximum(high, 0.0)
    two_sided = (low < 0.0) & (high > 0.0)
    if RULE == FUSED_SYMMETRIC:
        below = -(arguments.half_steps + 1.0)
        above = arguments.half_steps
        widest = tl.maximum(tl.abs(tl.div_rn(low, below)), tl.abs(tl.div_rn(high, above)))
        low_0 = tl.where(two_sided, tl.minimum(below * widest, 0.0), low_0)
        high_0 = tl.where(two_sided, tl.maximum(above * widest, 0.0), high_0)
    span = quant_max - quant_min
    scale = ((high_0.to(tl.float64) - low_0.to(tl.float64)) / span).to(tl.float32)
    one = tl.full(scale.shape, 1.0, tl.float32)
    scale = tl.where((scale == 0.0) | (tl.div_rn(one, scale) == float("inf")), 0.1, scale)
    # A small scale is cut off, and the range widened to match.
    small = scale < SMALL_SCALE
    amplifier = tl.div_rn(one * SMALL_SCALE, scale)
    reach = one * SMALL_SCALE * span.to(tl.float32)
    wide_low = tl.where(low_0 == 0.0, low_0, tl.where(high_0 == 0.0, -reach, low_0 * amplifier))
    wide_high = tl.where(low_0 == 0.0, reach, tl.where(high_0 == 0.0, high_0, high_0 * amplifier))
    low_0 = tl.where(small, wide_low, low_0)
    high_0 = tl.where(small, wide_high, high_0)
    scale = tl.where(small, SMALL_SCALE, scale)

    from_low = low_0.to(tl.float64) / scale.to(tl.float64)
    from_high = high_0.to(tl.float64) / scale.to(tl.float64)
    low_is_better = tl.abs(quant_min) + tl.abs(from_low) < tl.abs(quant_max) + tl.abs(from_high)
    zero_point = tl.where(low_is_better, quant_min - from_low, quant_max - from_high)
    if RULE == FUSED_SYMMETRIC:
        zero_point = tl.where((low_0 < 0.0) & (high_0 > 0.0), (quant_min + quant_max) / 2.0, zero_point)
    zero_point = tl.minimum(tl.maximum(rint64(zero_point), quant_min), quant_max)
    return scale, zero_point.to(tl.float32)


@triton.jit
def qparams_of(low, high, arguments, RULE: tl.constexpr):
    """(scale, zero point) as float32 for min `low` and max `high`, float32 scalars or blocks."""
    if (RULE == FUSED_AFFINE) | (RULE == FUSED_SYMMETRIC):
        scale, zero_point = _fused_rule(low, high, arguments, RULE)
    else:
        scale, zero_point = _observer_rule(low, high, arguments, RULE)
    return scale, zero_point


@triton.jit
def _choose_qparams_kernel(
    scale_ptr,  # (C,) float32
    zero_point_ptr,  # (C,) int32, int64 or float32
    min_ptr,  # (C,) float32
    max_ptr,  # (C,) float32
    n_channels,
    arguments,  # RuleArguments
    RULE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = channel < n_channels
    low = tl.load(min_ptr + channel, mask=mask, other=0.0)
    high = tl.load(max_ptr + channel, mask=mask, other=0.0)
    scale, zero_point = qparams_of(low, high, arguments, RULE)
    tl.store(scale_ptr + channel, scale, mask=mask)
    tl.store(zero_point_ptr + channel, zero_point.to(zero_point_ptr.dtype.element_ty), mask=mask)


def launch_choose_qparams(
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    min_val: torch.Tensor,
    max_val: torch.Tensor,
    rule: str,
    arguments: RuleArguments,
) -> None:
    """Fill scale and zero_point, (C,), from contiguous float32 min_val and max_val. One launch."""
    n_channels = min_val.numel()
    block = 256
    launch(
        _choose_qparams_kernel,
        (triton.cdiv(n_channels, block),),
        scale,
        zero_point,
        min_val,
        max_val,
        n_channels,
        arguments,
        RULE=rule,
        BLOCK_C=block,
        num_warps=4,
    )


@triton.jit
def _reciprocal_kernel(
    out_ptr,  # (C,) float32
    scale_ptr,  # (C,) any float dtype
    n_channels,
    BLOCK_C: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = channel < n_channels
    scale = tl.load(scale_ptr + channel, mask=mask, other=1.0).to(tl.float32)
    tl.store(out_ptr + channel, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale), mask=mask)


def launch_reciprocal(out: torch.Tensor, scale: torch.Tensor) -> None:
    """Write the IEEE reciprocal of `scale`, (C,) contiguous, to `out`, float32. One launch."""
    n_channels = scale.numel()
    block = 256
    launch(_reciprocal_kernel, (triton.cdiv(n_channels, block),), out, scale, n_channels, BLOCK_C=block, num_warps=4)
