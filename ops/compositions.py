"""The operators as compositions of ATen operations: what torch.compile sees, and the fallback for wide numbers.

Everything here is functional (but for the statistics' buffers), reads no value on the host, and gives the numbers of
the kernels. Inductor fuses it with the neighbours in the graph.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

Tensor = torch.Tensor

# Codes are held in float32, where sums of two of them are exact up to this magnitude.
EXACT_BOUND = 2**23

GRAD_ELEMENTS = ("tensor", "channel", "sample")  # whose number LSQ's gradient scale counts


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


def _once(value: Tensor) -> Tensor:
    """A 1-element value, 0-dim, that Inductor's C++ computes before its loop over x.

    What it inlines is computed again for every vector, as the loop might be writing over the scale for all that the
    compiler knows: a division takes a sixth of the loop's time. A reduction is not inlined.
    """
    return value.reshape(1).expand(16).amax()


def _reciprocal(scale: Tensor, axis: int | None) -> Tensor:
    """IEEE 1 / scale in float32, also in Inductor's CUDA code.

    There a float32 division becomes `div.full.f32`, which may be off by 2 ulp. Through float64 it is exact; the
    compiler does that once per thread for a single scale. Per channel it would do it once per element, so that case
    has an operator of its own, C elements long, which stays a kernel.
    """
    scale = scale.float()
    if scale.device.type != "cuda":
        return 1.0 / scale if axis is not None else _once(1.0 / scale)
    if axis is None:
        return (1.0 / scale.double()).float()
    return torch.ops.qkernels.reciprocal.default(scale)


def _truncated(zero_point: Tensor) -> Tensor:
    """A per-tensor float zero point as an integer, truncated as in torch."""
    return zero_point.to(torch.int32) if zero_point.dtype.is_floating_point else zero_point


def learned_zero_point(zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """The integer that a learned zero point stands for, as float32: clamp(rint(zero_point)). NaN stays NaN."""
    return zero_point.float().round().clamp(quant_min, quant_max)


def is_on(flag: Tensor) -> Tensor:
    """A device flag as a 0-dim bool."""
    return flag.reshape(()).to(torch.bool)


class _Codes(NamedTuple):
    """x in units of the step size; scale, inverse and zero point broadcast against x."""

    position: Tensor  # x / scale
    code: Tensor  # rint(position) + zero_point, before clamping
    scale: Tensor
    inverse: Tensor
    zero_point: Tensor


def _codes(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> _Codes:
    shape = channel_shape(x, axis)
    inverse = _reciprocal(scale, axis).reshape(shape)
    scale = scale.float().reshape(shape)
    zero_point = zero_point.reshape(shape)
    position = (x if x.dtype == torch.float64 else x.float()) * inverse
    return _Codes(position, torch.round(position) + zero_point, scale, inverse, zero_point)


def _clamped(code: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """The code within the bounds; NaN, of a finite x, is quant_min as in torch.

    A finite x gives a NaN code only through 0 * inf, from a scale whose reciprocal overflows.
    """
    return torch.clamp(torch.where(code != code, quant_min, code), quant_min, quant_max)


def _value(code: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, wide: bool) -> Tensor:
    """(code - zero_point) * scale, rounded where torch's CPU operators round."""
    if not wide:
        return (code - zero_point) * scale
    steps = code - zero_point  # float64, exact
    return steps.float() * scale if axis is None else steps * scale.double()


def _fake_quantized(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    enabled: Tensor | None,
) -> Tensor:
    """fake_quantize for a zero point of integers, in any dtype."""
    wide = is_wide(x, quant_min, quant_max)
    codes = _codes(x, scale, zero_point, axis)
    code = _clamped(codes.code.double() if wide else codes.code, quant_min, quant_max)
    y = _value(code, codes.scale, codes.zero_point, axis, wide).to(x.dtype)
    y = torch.where(x != x, x, y)  # not isnan, which Inductor's C++ computes element by element
    return y if enabled is None else torch.where(is_on(enabled), y, x)


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
    return _fake_quantized(x, scale, _truncated(zero_point), quant_min, quant_max, axis, enabled)


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
    code = _codes(x, scale, _truncated(zero_point), axis).code
    inside = (code >= quant_min) & (code <= quant_max)
    if enabled is not None:
        inside = inside | ~is_on(enabled)
    return dy * inside


def learnable_fake_quantize_composition(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    grad_factor: float = 1.0,
    axis: int | None = None,
    enabled: Tensor | None = None,
    grad_mask: str = "rounded",
    learning: Tensor | None = None,
    grad_elements: str | None = None,
) -> Tensor:
    """learnable_fake_quantize."""
    zero_point = learned_zero_point(zero_point, quant_min, quant_max)
    return _fake_quantized(x, scale, zero_point, quant_min, quant_max, axis, enabled)


def learnable_fake_quantize_backward_composition(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    grad_factor: float = 1.0,
    axis: int | None = None,
    enabled: Tensor | None = None,
    grad_mask: str = "rounded",
    learning: Tensor | None = None,
    grad_elements: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dscale, dzero_point) of learnable_fake_quantize."""
    # Tie everything to dy. What depends on x and the qparams alone the partitioner moves into the forward and saves: a
    # mask and a slope of 5 bytes per element.
    x = torch.where(dy == dy, x, x)
    codes = _codes(x, scale, learned_zero_point(zero_point, quant_min, quant_max), axis)
    clamped = torch.clamp(codes.code, quant_min, quant_max)  # a NaN stays NaN, neither inside nor saturated
    if grad_mask == "lsq":
        unrounded = codes.position + codes.zero_point
        inside = (unrounded > quant_min) & (unrounded < quant_max)
    else:
        inside = clamped == codes.code
    known = codes.code == codes.code
    steps = clamped - codes.zero_point
    distance = _distance(steps, codes.scale, x, quant_max - quant_min)
    passed = inside if enabled is None else inside | ~is_on(enabled)
    # The terms of dscale read dx: so Inductor's C++ takes the sums in the loop that writes it. It fuses a reduction
    # with what comes before alone, and would go over x and dy twice.
    dx = dy * passed
    wide_dy = dy.to(distance.dtype)
    dims = [d for d in range(x.ndim) if axis is None or d != axis % x.ndim]
    term = torch.where(inside, dx.to(distance.dtype) * (distance * codes.inverse), wide_dy * steps)
    dscale = _sum(torch.where(known, term, 0.0), dims)
    saturated = _sum(torch.where(inside | ~known, 0.0, wide_dy), dims)
    dzero_point = torch.where(saturated == 0, 0.0, -scale.double().reshape(saturated.shape) * saturated)
    factor = gradient_factor(x, quant_max, grad_factor, axis, grad_elements)
    gradients = []
    for gradient, parameter in ((dscale, scale), (dzero_point, zero_point)):
        gradient = gradient * factor
        for flag in (enabled, learning):
            if flag is not None:
                gradient = torch.where(is_on(flag), gradient, 0.0)
        gradients.append(gradient.reshape(parameter.shape).to(gradient_dtype(parameter)))
    return dx, gradients[0], gradients[1]


def _distance(steps: Tensor, scale: Tensor, x: Tensor, largest: int) -> Tensor:
    """steps * scale - x for |steps| <= largest, the product not rounded.

    Inductor's CUDA code contracts by itself. Its C++ code has no fused multiply-add, and float64 would double the time
    of the kernel. So scale is split in two: the product with the upper 12 bits is exact, and so is its difference to an
    x that is less than half a step away.
    """
    if x.device.type == "cuda":
        return steps * scale - x
    if x.dtype == torch.float64 or largest > 4096:
        return steps.double() * scale.double() - x.double()
    upper = (scale.view(torch.int32) & -4096).view(torch.float32)
    return (steps * upper - x) + steps * (scale - upper)


def _sum(terms: Tensor, dims: list[int]) -> Tensor:
    """In float64: in float32 Inductor's C++ loses 7e-5 of a million equal terms."""
    return terms.sum(dims, dtype=torch.float64) if dims else terms.double()


def gradient_factor(x: Tensor, quant_max: int, grad_factor: float, axis: int | None, grad_elements: str | None) -> Any:
    """Factor of dscale and dzero_point. A 0-dim tensor where the size of x is symbolic, so that it stays so."""
    elements = x.numel()
    if grad_elements is None or (isinstance(elements, int) and elements == 0):
        return grad_factor
    if grad_elements == "channel" and axis is not None:
        elements = elements // x.shape[axis]
    elif grad_elements == "sample" and x.ndim > 0:
        elements = elements // x.shape[0]
    if isinstance(elements, int):
        return grad_factor / (elements * quant_max) ** 0.5
    count = torch.scalar_tensor(elements, dtype=torch.float64, device=x.device)
    return grad_factor / torch.sqrt(count * quant_max)


def gradient_dtype(parameter: Tensor) -> torch.dtype:
    """dtype of the gradient of scale or zero point: its own, float32 for integers, which get none."""
    return parameter.dtype if parameter.dtype.is_floating_point else torch.float32
