"""The operators as compositions of ATen operations: what torch.compile sees, and the fallback for wide numbers.

Everything here is functional (but for the statistics' buffers), reads no value on the host, and gives the numbers of
the kernels. Inductor fuses it with the neighbours in the graph.
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor

# Codes are held in float32, where sums of two of them are exact up to this magnitude.
EXACT_BOUND = 2**23


def is_wide(x: Tensor, quant_min: int, quant_max: int) -> bool:
    """Whether float32 is not enough: a float64 x, or codes beyond +-2**23 (qint32)."""
    return x.dtype == torch.float64 or quant_min < -EXACT_BOUND or quant_max > EXACT_BOUND


def per_channel_float_zero_point(zero_point: Tensor, axis: int | None) -> bool:
    """Whether the zero point takes part in rounding: q = rint(fma(x, 1 / scale, zero_point))."""
    return axis is not None and zero_point.dtype.is_floating_point


def channel_shape(x: Tensor, axis: int | None) -> tuple[int, ...]:
    """Shape that lets one value per group broadcast against x."""
    if axis is None:
        return ()
    return tuple(-1 if d == axis % x.ndim else 1 for d in range(x.ndim))


def _reciprocal(scale: Tensor, axis: int | None) -> Tensor:
    """IEEE 1 / scale in float32, also in Inductor's CUDA code.

    There a float32 division becomes `div.full.f32`, which may be off by 2 ulp. Through float64 it is exact; the
    compiler does that once per thread for a single scale. Per channel it would do it once per element, so that case
    has an operator of its own, C elements long, which stays a kernel.
    """
    scale = scale.float()
    if scale.device.type != "cuda":
        return 1.0 / scale
    if axis is None:
        return (1.0 / scale.double()).float()
    return torch.ops.qkernels.reciprocal.default(scale)


def _code(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """(q before clamping, scale, zero point), the latter two shaped to broadcast against x."""
    shape = channel_shape(x, axis)
    inverse = _reciprocal(scale, axis).reshape(shape)
    scale = scale.float().reshape(shape)
    zero_point = zero_point.reshape(shape)
    if zero_point.dtype.is_floating_point:
        zero_point = zero_point.to(torch.int32)  # per tensor: truncated, as in torch
    x = x if x.dtype == torch.float64 else x.float()
    return torch.round(x * inverse) + zero_point, scale, zero_point


def _value(code: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, wide: bool) -> Tensor:
    """(code - zero_point) * scale, rounded where torch's CPU operators round."""
    if not wide:
        return (code - zero_point) * scale
    steps = code - zero_point  # float64, exact
    return steps.float() * scale if axis is None else steps * scale.double()


def fake_quantize_composition(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    enabled: Tensor | None = None,
) -> Tensor:
    """fake_quantize for integer zero points (and truncated per-tensor float ones)."""
    wide = is_wide(x, quant_min, quant_max)
    code, scale, zero_point = _code(x, scale, zero_point, axis)
    # A finite x gives a NaN code only through 0 * inf, from a scale whose reciprocal overflows; torch takes quant_min.
    code = torch.where(torch.isnan(code), quant_min, code)
    code = torch.clamp(code.double() if wide else code, quant_min, quant_max)
    y = _value(code, scale, zero_point, axis, wide).to(x.dtype)
    y = torch.where(torch.isnan(x), x, y)
    return y if enabled is None else torch.where(enabled.reshape(()).to(torch.bool), y, x)


def fake_quantize_backward_composition(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    enabled: Tensor | None = None,
) -> Tensor:
    """dx = dy * (quant_min <= q <= quant_max). A product, as in torch: it does not hide an infinite or NaN dy."""
    code, _, _ = _code(x, scale, zero_point, axis)
    inside = (code >= quant_min) & (code <= quant_max)
    if enabled is not None:
        inside = inside | ~enabled.reshape(()).to(torch.bool)
    return dy * inside
