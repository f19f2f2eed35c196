"""fake_quantize and its backward on the CPU, eager: in-place ATen passes, torch's own operator for tiny tensors.

torch's CPU operator is scalar code. Four to six in-place vector passes are about nine times faster at 100,000 elements
and half as fast at one element (12.5 us against 6.4), where each pass is a call; the two meet near 1,000 elements
(one thread, torch 2.13, x86-64).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from qkernels.ops.compositions import (
    channel_shape,
    fake_quantize_backward_composition,
    fake_quantize_composition,
    is_wide,
    learnable_fake_quantize_composition,
    learned_zero_point,
)

Tensor = torch.Tensor

_SMALLEST_NORMAL = 2.0**-126  # of float32
_ZERO = torch.zeros((), device="cpu")  # whatever the default device

SMALL = 1024  # elements up to which torch's own operator is faster
BLOCK = 1 << 17  # elements of which a pass stays in the second-level cache


def _with_strides_of(like: Tensor, values: Tensor) -> Tensor:
    """`values` laid out as torch.empty_like(like), which is what the fake promises."""
    out = torch.empty_like(like)
    return values if values.stride() == out.stride() and values.dtype == like.dtype else out.copy_(values)


def _is_degenerate(inverse: Tensor) -> bool:
    """Whether some 1 / scale is not positive and finite: a product with x could be NaN without x being it."""
    if inverse.numel() == 1:
        smallest = largest = inverse.item()
    else:
        smallest, largest = (value.item() for value in torch.aminmax(inverse))
    return not (smallest > 0 and largest < math.inf)


def _steps(x: Tensor, inverse: Any, out: Tensor | None = None) -> Tensor:
    """rint(x * inverse) in a float32 tensor: `out`, or a new one with the strides of torch.empty_like(x)."""
    steps = torch.empty_like(x, dtype=torch.float32) if out is None else out
    if x.dtype == torch.float32:
        torch.mul(x, inverse, out=steps)
    else:
        steps.copy_(x).mul_(inverse)
    return steps.round_()


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors, of one shape, in blocks whose temporaries stay in the cache; whole if they are small or strided."""
    if tensors[0].numel() <= 4 * BLOCK or not all(t.is_contiguous() for t in tensors):
        return iter([tensors])
    return zip(*(t.view(-1).split(BLOCK) for t in tensors), strict=True)


def is_off(enabled: Tensor | None) -> bool:
    """Whether a flag, or a missing one, switches the operator off."""
    return enabled is not None and not enabled.item()  # a CPU tensor: no sync


def _fused_multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c of float32 tensors, rounded once to float32.

    The product is exact in float64. Its sum with c is rounded to odd there: no float32 value, nor the middle between
    two, has an odd last bit in float64, so the second rounding decides as one rounding of the exact sum would.
    """
    product, c = a.double() * b.double(), c.double()
    total = product + c
    rest = total - product
    error = (product - (total - rest)) + (c - rest)
    even = (total.view(torch.int64) & 1) == 0
    towards = torch.copysign(torch.full_like(total, float("inf")), error)
    return torch.where((error != 0) & even & total.isfinite(), torch.nextafter(total, towards), total).float()


def _float_zero_point(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int
) -> tuple[Tensor, Tensor]:
    """(y, whether the code is within the bounds) for per-channel float zero points."""
    shape = channel_shape(x, axis)
    scale, zero_point = scale.float().reshape(shape), zero_point.float().reshape(shape)
    code = _fused_multiply_add(x.float(), 1.0 / scale, zero_point).round_().add_(0.0)  # codes have no -0.0
    inside = (code >= quant_min) & (code <= quant_max)
    code = torch.where(code.isnan(), quant_min, code).clamp_(quant_min, quant_max)
    y = ((code.double() - zero_point.double()) * scale.double()).float()
    return torch.where(x.isnan(), x, y.to(x.dtype)), inside


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
    if x.numel() == 0 or is_off(enabled):
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
    if _is_degenerate(inverse):
        return _with_strides_of(
            x, fake_quantize_composition(x, scale.reshape(-1), zero_point, quant_min, quant_max, axis)
        )
    zero_point = zero_point.to(torch.int32).reshape(shape)
    if axis is None:  # operations with numbers are cheaper
        return _by_passes(x, scale.item(), inverse.item(), zero_point.item(), quant_min, quant_max)
    return _by_passes(x, scale, inverse, zero_point, quant_min, quant_max)


def _by_passes(x: Tensor, scale: Any, inverse: Any, zero_point: Any, quant_min: int, quant_max: int) -> Tensor:
    """y for a zero point of integers; the three qparams are numbers or broadcast against x."""
    if isinstance(scale, Tensor):  # ATen's clamp to tensors is slow
        codes = _steps(x, inverse).add_(zero_point).clamp_(quant_min, quant_max)
        return codes.sub_(zero_point).mul_(scale).to(x.dtype)
    y = torch.empty_like(x)
    for block, result in _blocks(x, y):
        steps = _steps(block, inverse, result if x.dtype == torch.float32 else None)
        # The bounds are moved instead of the codes, exactly.
        steps.clamp_(quant_min - zero_point, quant_max - zero_point)
        # 0 + scale * step rounds like the product, and gives no -0.0.
        torch.add(_ZERO, steps, alpha=scale, out=steps)
        if steps is not result:
            result.copy_(steps)
    return y


def learnable_fake_quantize_cpu(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    enabled: Tensor | None,
) -> Tensor:
    """The forward with a learned zero point, for checked arguments; axis in [0, x.ndim) or None."""
    if x.numel() == 0 or is_off(enabled):
        return _with_strides_of(x, x.clone())
    qparams = learned_qparams(scale, zero_point, quant_min, quant_max, axis)
    if x.dtype == torch.float64 or qparams is None:
        y = learnable_fake_quantize_composition(x, scale, zero_point, quant_min, quant_max, axis=axis)
        return _with_strides_of(x, y)
    step, inverse, code_of_0 = qparams
    if axis is not None:
        shape = channel_shape(x, axis)
        step, inverse, code_of_0 = step.reshape(shape), inverse.reshape(shape), code_of_0.reshape(shape)
    return _by_passes(x, step, inverse, code_of_0, quant_min, quant_max)


def learned_qparams(
    scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None
) -> tuple[Any, Any, Any] | None:
    """(scale, 1 / scale, zero point as integers): float32 tensors per channel, numbers per tensor, which cost less.

    None where 1 / scale is not positive and finite, or a per-tensor zero point is NaN, which Python cannot round: those
    want more care than passes take.
    """
    if axis is not None:
        inverse = scale.float().reciprocal()
        if _is_degenerate(inverse):
            return None
        return scale.float(), inverse, learned_zero_point(zero_point, quant_min, quant_max)
    step, code = scale.item(), zero_point.item()
    if not _SMALLEST_NORMAL <= step < math.inf or code != code:  # 1 / step of a smaller one may overflow
        return None
    reciprocal = float(np.float32(1.0) / np.float32(step))
    if math.isfinite(code):
        code = round(code)  # ties to even, as torch.round
    return step, reciprocal, float(min(max(code, quant_min), quant_max))


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
    if x.numel() == 0 or is_off(enabled):
        return torch.empty_like(x).copy_(dy)
    if axis is not None and zero_point.dtype.is_floating_point:
        _, mask = _float_zero_point(x, scale, zero_point, quant_min, quant_max, axis)
        return _with_strides_of(x, dy * mask)
    if is_wide(x, quant_min, quant_max):
        return _with_strides_of(
            x, fake_quantize_backward_composition(dy, x, scale, zero_point, quant_min, quant_max, axis)
        )
    # Distance of the code from the middle of the range, all in one temporary: a comparison with both bounds would make
    # two masks and cost three times as much. Exact: within +-2**23 float32 holds halves. A NaN is within no distance.
    shape = channel_shape(x, axis)
    offset = zero_point.to(torch.int32).reshape(shape) - (quant_min + quant_max) / 2
    inverse = 1.0 / scale.float().reshape(shape)
    if axis is not None:
        inside = _steps(x, inverse).add_(offset).abs_().le_((quant_max - quant_min) / 2)
        return inside.mul_(dy).to(x.dtype)
    dx = torch.empty_like(x)
    for block, dy_block, result in _blocks(x, dy, dx):
        steps = _steps(block, inverse, result if x.dtype == torch.float32 else None)
        inside = steps.add_(offset).abs_().le_((quant_max - quant_min) / 2)
        torch.mul(inside, dy_block, out=inside)
        if inside is not result:
            result.copy_(inside)
    return dx
