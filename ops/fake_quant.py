"""fake_quantize and its backward: schema, CPU and Triton implementations, fake, decomposition."""

from __future__ import annotations

from typing import Any

import torch

from qkernels.launch import INTERPRETED
from qkernels.ops import checks
from qkernels.ops.compositions import (
    fake_quantize_backward_composition,
    fake_quantize_composition,
    is_wide,
    per_channel_float_zero_point,
)
from qkernels.ops.fake_quant_autograd import (
    Calls,
    FakeQuantize,
    FakeQuantizeBackwardForTransforms,
    FakeQuantizeForTransforms,
    register_autograd,
    transforms_active,
    wants_gradient,
)
from qkernels.ops.fake_quant_cpu import fake_quantize_backward_cpu, fake_quantize_cpu
from qkernels.ops.registration import decompose, implementations, register, runs_directly
from qkernels.ops.small_cpu import fake_quantize_by_torch

Tensor = torch.Tensor


def _check(
    op: str,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    enabled: Tensor | None,
) -> int | None:
    checks.check_x(op, x)
    axis = checks.check_axis(op, x, axis)
    checks.check_qparams(op, x, scale, zero_point, axis)
    checks.check_range(op, quant_min, quant_max)
    checks.check_flag(op, "enabled", enabled, x)
    if is_wide(x, quant_min, quant_max) and per_channel_float_zero_point(zero_point, axis):
        raise NotImplementedError(
            f"{op}: a per-channel floating-point zero_point needs a float16, bfloat16 or float32 x and quantization "
            f"bounds within +-2**23; got {x.dtype}, {quant_min} and {quant_max}"
        )
    return axis


def _check_backward(dy: Tensor, x: Tensor, *arguments: Any) -> int | None:
    op = "fake_quantize_backward"
    axis = _check(op, x, *arguments)
    checks.check_dy(op, dy, x)
    return axis


def _fake_quantize_aten(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    enabled: Tensor | None = None,
) -> Tensor:
    axis = _check("fake_quantize", x, scale, zero_point, quant_min, quant_max, axis, enabled)
    return fake_quantize_cpu(x, scale, zero_point, quant_min, quant_max, axis, enabled)


def _fake_quantize_triton(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    enabled: Tensor | None = None,
) -> Tensor:
    axis = _check("fake_quantize", x, scale, zero_point, quant_min, quant_max, axis, enabled)
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    if is_wide(x, quant_min, quant_max):
        return y.copy_(fake_quantize_composition(x, scale, zero_point, quant_min, quant_max, axis, enabled))
    from qkernels.fake_quant import launch_fake_quant

    launch_fake_quant(
        y, x, None, scale.contiguous(), zero_point.contiguous(), quant_min, quant_max, axis=axis, enabled=enabled
    )
    return y


def _fake_quantize_fake(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    enabled: Tensor | None = None,
) -> Tensor:
    _check("fake_quantize", x, scale, zero_point, quant_min, quant_max, axis, enabled)
    return torch.empty_like(x)


def _fake_quantize_backward_aten(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    enabled: Tensor | None = None,
) -> Tensor:
    axis = _check_backward(dy, x, scale, zero_point, quant_min, quant_max, axis, enabled)
    return fake_quantize_backward_cpu(dy, x, scale, zero_point, quant_min, quant_max, axis, enabled)


def _fake_quantize_backward_triton(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    enabled: Tensor | None = None,
) -> Tensor:
    axis = _check_backward(dy, x, scale, zero_point, quant_min, quant_max, axis, enabled)
    dx = torch.empty_like(x)
    if x.numel() == 0:
        return dx
    if is_wide(x, quant_min, quant_max):
        return dx.copy_(
            fake_quantize_backward_composition(dy, x, scale, zero_point, quant_min, quant_max, axis, enabled)
        )
    from qkernels.fake_quant import launch_fake_quant

    launch_fake_quant(
        dx, x, dy, scale.contiguous(), zero_point.contiguous(), quant_min, quant_max, axis=axis, enabled=enabled
    )
    return dx


def _fake_quantize_backward_fake(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    enabled: Tensor | None = None,
) -> Tensor:
    _check_backward(dy, x, scale, zero_point, quant_min, quant_max, axis, enabled)
    return torch.empty_like(x)


_ARGUMENTS = "Tensor scale, Tensor zero_point, int quant_min, int quant_max, int? axis=None, Tensor? enabled=None"

_fake_quantize_op = register(
    f"fake_quantize(Tensor x, {_ARGUMENTS}) -> Tensor",
    aten=_fake_quantize_aten,
    triton=_fake_quantize_triton,
    fake=_fake_quantize_fake,
)
_fake_quantize_backward_op = register(
    f"fake_quantize_backward(Tensor dy, Tensor x, {_ARGUMENTS}) -> Tensor",
    aten=_fake_quantize_backward_aten,
    triton=_fake_quantize_backward_triton,
    fake=_fake_quantize_backward_fake,
)


register_autograd(_fake_quantize_op, _fake_quantize_backward_op)


def _keep(x: Tensor, scale: Tensor, zero_point: Tensor, *rest: Any, axis: int | None = None, **kwargs: Any) -> bool:
    # Inductor's C++ code has no fused multiply-add to offer; the operator keeps the rounding of the kernel.
    if len(rest) > 2:
        axis = rest[2]
    return per_channel_float_zero_point(zero_point, axis)


def _keep_backward(dy: Tensor, *arguments: Any, **kwargs: Any) -> bool:
    return _keep(*arguments, **kwargs)


decompose(_fake_quantize_op, fake_quantize_composition, _keep)
decompose(_fake_quantize_backward_op, fake_quantize_backward_composition, _keep_backward)


_DIRECT = {
    device: Calls(forward, backward)
    for (device, forward), backward in zip(
        implementations(_fake_quantize_aten, _fake_quantize_triton).items(),
        implementations(_fake_quantize_backward_aten, _fake_quantize_backward_triton).values(),
        strict=True,
    )
}


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    enabled: Tensor | None = None,
) -> Tensor:
    """Quantize and dequantize x, with a straight-through gradient.

        q = rint(x * (1 / scale)) + zero_point,  y = (clamp(q, quant_min, quant_max) - zero_point) * scale

    Args:
        x: values. Any shape and layout; float16, bfloat16, float32 or float64. Differentiable.
        scale: step size, positive, not checked on the device. 1 element for axis=None, else shape (C,); any float
            dtype. Gets no gradient here.
        zero_point: code of 0.0, within the bounds, not checked on the device. Shaped like scale; int32, int64 or a
            float dtype. A per-tensor float zero point is truncated; a per-channel one stays fractional, with
            q = rint(fma(x, 1 / scale, zero_point)).
        quant_min: smallest code.
        quant_max: largest code.
        axis: channel axis of x, negative allowed; None for one scale.
        enabled: device flag, 1 element, uint8, int32, int64 or bool; 0 returns a copy of x. None is on. It must not
            be changed in place between the forward and its backward: autograd raises if it is, but for small CPU
            tensors, whose mask the forward has saved.

    Returns:
        y, with the shape, dtype and strides of `torch.empty_like(x)`.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, value or device.
        NotImplementedError: a per-channel float zero point with float64 x or bounds beyond +-2**23.

    Note:
        NaN gives NaN with gradient 0. Infinities saturate, with gradient 0. The gradient is dy * m with m = 1 where
        quant_min <= q <= quant_max, else 0. Deterministic. Arithmetic is float32 (float64 for a float64 x).

    Reference:
        torch.fake_quantize_per_tensor_affine and torch.fake_quantize_per_channel_affine, torch 2.13,
        aten/src/ATen/native/quantized/cpu/kernels/QuantizedOpKernels.cpp; equal to them on the CPU for every finite x
        (the per-channel one overflows for |x / scale| above 2**63, this one saturates).
    """
    arguments = (x, scale, zero_point, quant_min, quant_max, axis, enabled)
    others: Any = {"axis": axis, "ints": (quant_min, quant_max), "optional": (enabled,)}
    if runs_directly(x, scale, zero_point, **others) and x.device.type in _DIRECT:
        if not INTERPRETED and (y := fake_quantize_by_torch(*arguments)) is not None:
            return y
        calls = _DIRECT[x.device.type]
        if wants_gradient(x):
            return FakeQuantize.apply(calls, *arguments)
        with torch._C._AutoDispatchBelowAutograd():  # scale may require a gradient, but gets none here
            return calls.forward(*arguments)
    if transforms_active():
        return FakeQuantizeForTransforms.apply(*arguments)
    return _fake_quantize_op(*arguments)


def fake_quantize_backward(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    enabled: Tensor | None = None,
) -> Tensor:
    """Gradient of `fake_quantize` with respect to x: dy times whether the code of x lies within the bounds.

    Args:
        dy: gradient of y, shape and dtype of x, any layout.
        x: the forward's input.
        scale: as in `fake_quantize`.
        zero_point: as in `fake_quantize`.
        quant_min: smallest code.
        quant_max: largest code.
        axis: channel axis of x, or None.
        enabled: device flag; 0 returns a copy of dy.

    Returns:
        dx, with the shape, dtype and strides of `torch.empty_like(x)`.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, value or device.
        NotImplementedError: the result is differentiated again.
    """
    arguments = (dy, x, scale, zero_point, quant_min, quant_max, axis, enabled)
    others: Any = {"axis": axis, "ints": (quant_min, quant_max), "optional": (enabled,)}
    if runs_directly(dy, x, scale, zero_point, **others) and x.device.type in _DIRECT and not wants_gradient(dy, x):
        with torch._C._AutoDispatchBelowAutograd():
            return _DIRECT[x.device.type].backward(*arguments)
    if transforms_active():
        return FakeQuantizeBackwardForTransforms.apply(*arguments)
    return _fake_quantize_backward_op(*arguments)
