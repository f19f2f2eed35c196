"""fake_quantize and its backward on the CPU, eager: in-place ATen passes, torch's own operator for tiny tensors.

torch's CPU operator is scalar code. Six in-place vector passes are about nine times faster at 100,000 elements and
four times slower at one element, where each pass costs a microsecond of dispatch; the two meet near 1,000 elements
(one thread, torch 2.13, x86-64).
"""

from __future__ import annotations

import math

import torch

from qkernels.ops.compositions import (
    channel_shape,
    fake_quantize_backward_composition,
    fake_quantize_composition,
    is_wide,
)

Tensor = torch.Tensor

SMALL = 1024  # elements up to which torch's own operator is faster


def _with_strides_of(like: Tensor, values: Tensor) -> Tensor:
    """`values` laid out as torch.empty_like(like), which is what the fake promises."""
    out = torch.empty_like(like)
    return values if values.stride() == out.stride() and values.dtype == like.dtype else out.copy_(values)


def _overflows(inverse: Tensor) -> bool:
    """Whether some 1 / scale is infinite or NaN, so that x = 0 has no code of its own."""
    if inverse.numel() == 1:
        return not math.isfinite(inverse.item())
    return not math.isfinite(inverse.abs().amax().item())


def _codes(x: Tensor, inverse: Tensor, zero_point: Tensor) -> Tensor:
    """rint(x * inverse) + zero_point in a new float32 tensor with the strides of torch.empty_like(x)."""
    code = torch.empty_like(x, dtype=torch.float32)
    if x.dtype == torch.float32:
        torch.mul(x, inverse, out=code)
    else:
        code.copy_(x).mul_(inverse)
    return code.round_().add_(zero_point)


def _is_off(enabled: Tensor | None) -> bool:
    return enabled is not None and not enabled.item()  # a CPU tensor: no sync


def _float_zero_point(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int
) -> tuple[Tensor, Tensor]:
    """(y, mask) for per-channel float zero points, by torch's operator: it has the fused multiply-add.

    x is first clamped to where codes are saturated but do not overflow torch's integer conversion.
    """
    limit = (scale.float() * 2.0**30).reshape(channel_shape(x, axis))
    bounded = torch.clamp(x.float(), -limit, limit)
    y, mask = torch.ops.aten.fake_quantize_per_channel_affine_cachemask(
        bounded, scale.float(), zero_point.float(), axis, quant_min, quant_max
    )
    return torch.where(x.isnan(), x, y.to(x.dtype)), mask


def fake_quantize_cpu(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    enabled: Tensor | None,
) -> Tensor:
    """The forward for checked arguments; axis in [0, x.ndim) or None."""
    if x.numel() == 0 or _is_off(enabled):
        return _with_strides_of(x, x.clone())
    if axis is not None and zero_point.dtype.is_floating_point:
        y, _ = _float_zero_point(x, scale, zero_point, quant_min, quant_max, axis)
        return _with_strides_of(x, y)
    if is_wide(x, quant_min, quant_max):
        return _with_strides_of(x, fake_quantize_composition(x, scale, zero_point, quant_min, quant_max, axis))
    if axis is None and x.numel() <= SMALL:
        y = torch.fake_quantize_per_tensor_affine(x, scale.reshape(1), zero_point.reshape(1), quant_min, quant_max)
        return _with_strides_of(x, torch.where(x.isnan(), x, y))
    shape = channel_shape(x, axis)
    scale = scale.float().reshape(shape)
    inverse = 1.0 / scale
    if _overflows(inverse):
        return _with_strides_of(
            x, fake_quantize_composition(x, scale.reshape(-1), zero_point, quant_min, quant_max, axis)
        )
    zero_point = zero_point.to(torch.int32).reshape(shape)
    y = _codes(x, inverse, zero_point).clamp_(quant_min, quant_max).sub_(zero_point).mul_(scale)
    return y.to(x.dtype)


def fake_quantize_backward_cpu(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    enabled: Tensor | None,
) -> Tensor:
    """The backward for checked arguments; axis in [0, x.ndim) or None."""
    if x.numel() == 0 or _is_off(enabled):
        return torch.empty_like(x).copy_(dy)
    if axis is not None and zero_point.dtype.is_floating_point:
        _, mask = _float_zero_point(x, scale, zero_point, quant_min, quant_max, axis)
        return _with_strides_of(x, torch.where(mask & ~x.isnan(), dy, 0.0))
    if is_wide(x, quant_min, quant_max):
        return _with_strides_of(
            x, fake_quantize_backward_composition(dy, x, scale, zero_point, quant_min, quant_max, axis)
        )
    shape = channel_shape(x, axis)
    code = _codes(x, 1.0 / scale.float().reshape(shape), zero_point.to(torch.int32).reshape(shape))
    # A code equals its clamped self exactly when it lies within the bounds; a NaN equals nothing.
    inside = torch.eq(code, torch.clamp(code, quant_min, quant_max))
    return torch.where(inside, dy, dy.new_zeros(()), out=torch.empty_like(x))
