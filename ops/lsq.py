"""learnable_fake_quantize and its backward: schema, CPU and Triton implementations, fake, decomposition."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from qkernels.launch import INTERPRETED
from qkernels.ops import checks
from qkernels.ops.compositions import (
    GRAD_ELEMENTS,
    gradient_dtype,
    gradient_factor,
    is_wide,
    learnable_fake_quantize_backward_composition,
    learnable_fake_quantize_composition,
)
from qkernels.ops.fake_quant_autograd import Calls, transforms_active, wants_gradient
from qkernels.ops.fake_quant_cpu import learnable_fake_quantize_cpu
from qkernels.ops.lsq_autograd import (
    LearnableFakeQuantize,
    LearnableFakeQuantizeBackwardForTransforms,
    LearnableFakeQuantizeForTransforms,
    register_autograd,
)
from qkernels.ops.lsq_cpu import learnable_fake_quantize_backward_cpu
from qkernels.ops.registration import decompose, register, runs_directly
from qkernels.ops.small_cpu import learnable_fake_quantize_by_torch

Tensor = torch.Tensor

GRAD_MASKS = ("rounded", "lsq")


class _Arguments(NamedTuple):
    """What forward and backward share, in the order of their schemas."""

    x: Tensor
    scale: Tensor
    zero_point: Tensor
    quant_min: int
    quant_max: int
    grad_factor: float = 1.0
    axis: int | None = None
    enabled: Tensor | None = None
    grad_mask: str = "rounded"
    learning: Tensor | None = None
    grad_elements: str | None = None


def _check(op: str, *args: Any, **kwargs: Any) -> _Arguments:
    """Raise on a bad argument; else the arguments with axis in [0, x.ndim) or None."""
    arguments = _Arguments(*args, **kwargs)
    x, scale, zero_point, quant_min, quant_max = arguments[:5]
    checks.check_x(op, x)
    axis = checks.check_axis(op, x, arguments.axis)
    checks.check_qparams(op, x, scale, zero_point, axis)
    checks.check_range(op, quant_min, quant_max)
    checks.check_flag(op, "enabled", arguments.enabled, x)
    checks.check_flag(op, "learning", arguments.learning, x)
    if arguments.grad_mask not in GRAD_MASKS:
        raise ValueError(f"{op}: grad_mask must be 'rounded' or 'lsq'; got {arguments.grad_mask!r}")
    if arguments.grad_elements is not None:
        if arguments.grad_elements not in GRAD_ELEMENTS:
            raise ValueError(
                f"{op}: grad_elements must be None or one of {GRAD_ELEMENTS}; got {arguments.grad_elements!r}"
            )
        if quant_max < 1:
            raise ValueError(f"{op}: grad_elements needs a quant_max of at least 1; got {quant_max}")
    if is_wide(scale, quant_min, quant_max):
        raise NotImplementedError(
            f"{op}: scale must be float16, bfloat16 or float32 and the quantization bounds within +-2**23; "
            f"got {scale.dtype}, {quant_min} and {quant_max}"
        )
    return arguments._replace(axis=axis)


def _check_backward(dy: Tensor, *args: Any, **kwargs: Any) -> _Arguments:
    op = "learnable_fake_quantize_backward"
    arguments = _check(op, *args, **kwargs)
    checks.check_dy(op, dy, arguments.x)
    return arguments


# The implementations proper take checked arguments, axis in [0, x.ndim) or None.


def _forward_on_cpu(*checked: Any) -> Tensor:
    a = _Arguments(*checked)
    return learnable_fake_quantize_cpu(a.x, a.scale, a.zero_point, a.quant_min, a.quant_max, a.axis, a.enabled)


def _forward_by_kernel(*checked: Any) -> Tensor:
    a = _Arguments(*checked)
    y = torch.empty_like(a.x)
    if a.x.numel() == 0:
        return y
    if a.x.dtype == torch.float64:
        return y.copy_(learnable_fake_quantize_composition(*a))
    from qkernels.fake_quant import launch_fake_quant

    launch_fake_quant(
        y, a.x, None, a.scale.contiguous(), a.zero_point.contiguous(), a.quant_min, a.quant_max,
        axis=a.axis, enabled=a.enabled, learned=True,
    )  # fmt: skip
    return y


def _gradients(a: _Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Room for dx, dscale and dzero_point."""
    return (
        torch.empty_like(a.x),
        torch.empty_like(a.scale, dtype=gradient_dtype(a.scale), memory_format=torch.contiguous_format),
        torch.empty_like(a.zero_point, dtype=gradient_dtype(a.zero_point), memory_format=torch.contiguous_format),
    )


def _backward_by_kernel(dy: Tensor, *checked: Any) -> tuple[Tensor, Tensor, Tensor]:
    a = _Arguments(*checked)
    dx, dscale, dzero_point = _gradients(a)
    if a.x.numel() == 0:
        return dx, dscale.zero_(), dzero_point.zero_()
    if a.x.dtype == torch.float64:
        exact = learnable_fake_quantize_backward_composition(dy, *a)
        return dx.copy_(exact[0]), dscale.copy_(exact[1]), dzero_point.copy_(exact[2])
    from qkernels.lsq import LearnedQParams, launch_learnable_backward

    qparams = LearnedQParams(
        a.scale.contiguous(), a.zero_point.contiguous(), a.enabled, a.learning, dscale, dzero_point,
        float(a.quant_min), float(a.quant_max),
        float(gradient_factor(a.x, a.quant_max, a.grad_factor, a.axis, a.grad_elements)),
    )  # fmt: skip
    launch_learnable_backward(dx, a.x, dy, qparams, axis=a.axis, strict=a.grad_mask == "lsq")
    return dx, dscale, dzero_point


def _forward_aten(*args: Any, **kwargs: Any) -> Tensor:
    return _forward_on_cpu(*_check("learnable_fake_quantize", *args, **kwargs))


def _forward_triton(*args: Any, **kwargs: Any) -> Tensor:
    return _forward_by_kernel(*_check("learnable_fake_quantize", *args, **kwargs))


def _forward_fake(*args: Any, **kwargs: Any) -> Tensor:
    return torch.empty_like(_check("learnable_fake_quantize", *args, **kwargs).x)


def _backward_aten(dy: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    return learnable_fake_quantize_backward_cpu(dy, *_check_backward(dy, *args, **kwargs))


def _backward_triton(dy: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _backward_by_kernel(dy, *_check_backward(dy, *args, **kwargs))


def _backward_fake(dy: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(_check_backward(dy, *args, **kwargs))


_ARGUMENTS = (
    "Tensor x, Tensor scale, Tensor zero_point, int quant_min, int quant_max, float grad_factor=1.0, int? axis=None, "
    "Tensor? enabled=None, str grad_mask='rounded', Tensor? learning=None, str? grad_elements=None"
)

_forward_op = register(
    f"learnable_fake_quantize({_ARGUMENTS}) -> Tensor",
    aten=_forward_aten,
    triton=_forward_triton,
    fake=_forward_fake,
)
_backward_op = register(
    f"learnable_fake_quantize_backward(Tensor dy, {_ARGUMENTS}) -> (Tensor dx, Tensor dscale, Tensor dzero_point)",
    aten=_backward_aten,
    triton=_backward_triton,
    fake=_backward_fake,
)
register_autograd(_forward_op, _backward_op)


def _keep_backward(dy: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> bool:
    # On a GPU. Per channel Inductor writes dx in a kernel of its own: 20 bytes per element where ours moves 12. In the
    # strict mask nothing stands between a product and a sum, so that Inductor's CUDA code would contract them.
    arguments = _Arguments(x, *args, **kwargs)
    return x.device.type == "cuda" and (arguments.axis is not None or arguments.grad_mask == "lsq")


decompose(_forward_op, learnable_fake_quantize_composition, lambda *args, **kwargs: False)
decompose(_backward_op, learnable_fake_quantize_backward_composition, _keep_backward)


_KERNELS = Calls(_forward_by_kernel, _backward_by_kernel)
_DIRECT = {"cpu": _KERNELS if INTERPRETED else Calls(_forward_on_cpu, learnable_fake_quantize_backward_cpu)}
_DIRECT["cuda"] = _KERNELS


def learnable_fake_quantize(
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
    """Quantize and dequantize x with gradients for scale and zero point: learned step size quantization (LSQ).

        z = clamp(rint(zero_point), quant_min, quant_max),  q = rint(x * (1 / scale)) + z,  k = clamp(q) - z
        y = k * scale,    m = quant_min <= q <= quant_max
        dx = dy * m,      dscale = grad_factor * sum dy * (m ? (k * scale - x) / scale : k),
        dzero_point = grad_factor * sum dy * (m ? 0 : -scale)

    Args:
        x: values. Any shape and layout; float16, bfloat16, float32 or float64. Differentiable.
        scale: step size, positive, not checked on the device. 1 element for axis=None, else shape (C,); float16,
            bfloat16 or float32. Differentiable.
        zero_point: code of 0.0 before rounding and clamping. Shaped like scale; a float dtype, then differentiable, or
            int32 or int64.
        quant_min: smallest code.
        quant_max: largest code.
        grad_factor: factor of dscale and dzero_point.
        axis: channel axis of x, negative allowed; None for one scale. The sums go over all other dimensions.
        enabled: device flag, 1 element, uint8, int32, int64 or bool; 0 returns a copy of x, passes dy through, and
            gives scale and zero point gradient 0. None is on.
        grad_mask: m. "rounded" is the formula above, that of torch's learnable operators. "lsq" is that of the paper,
            strict and before rounding: quant_min < x / scale + z < quant_max. They differ within half a step of the
            bounds, which matters at 2 to 4 bits.
        learning: device flag; 0 gives scale and zero point gradient 0 and changes nothing else. None is on.
        grad_elements: LSQ's gradient scale: grad_factor is divided by sqrt(elements * quant_max), where the elements
            are those of x ("tensor"), of one channel ("channel") or of one sample, dimension 0 being the batch
            ("sample"). Taken from x's shape, so a dynamic batch does not recompile. None leaves grad_factor as it is.

    Returns:
        y, with the shape, dtype and strides of `torch.empty_like(x)`.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, value or device.
        NotImplementedError: float64 scale, bounds beyond +-2**23, or a second differentiation (small CPU tensors, which
            torch's own operator serves: torch's RuntimeError).

    Note:
        NaN gives NaN with gradient 0 and adds nothing to the other gradients. Infinities saturate. An empty x gives
        gradients of 0. The sums are deterministic and within 1e-6 of the sum of |terms| (numerics.md); on a GPU one
        pass, and no host sync.

    Reference:
        Esser et al., Learned Step Size Quantization, ICLR 2020. torch._fake_quantize_learnable_per_tensor_affine and
        _per_channel_affine, torch 2.13, of which the former's backward shifts negative zero points by one.
    """
    arguments = (x, scale, zero_point, quant_min, quant_max, grad_factor, axis, enabled, grad_mask, learning,
                 grad_elements)  # fmt: skip
    others: Any = {
        "axis": axis,
        "ints": (quant_min, quant_max),
        "numbers": (grad_factor,),
        "optional": (enabled, learning),
    }
    if runs_directly(x, scale, zero_point, **others) and grad_factor is not None and x.device.type in _DIRECT:
        if not INTERPRETED and (y := learnable_fake_quantize_by_torch(*arguments)) is not None:
            return y
        checked = _check("learnable_fake_quantize", *arguments)
        calls = _DIRECT[x.device.type]
        if wants_gradient(x, scale, zero_point):
            return LearnableFakeQuantize.apply(calls, x, scale, zero_point, checked[3:])
        return calls.forward(*checked)
    if transforms_active():
        return LearnableFakeQuantizeForTransforms.apply(*arguments)
    return _forward_op(*arguments)


def learnable_fake_quantize_backward(
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
    """Gradients of `learnable_fake_quantize` with respect to x, scale and zero point.

    Args:
        dy: gradient of y, shape and dtype of x, any layout.
        x: the forward's input.
        scale: as in `learnable_fake_quantize`, like all that follow.
        zero_point: code of 0.0.
        quant_min: smallest code.
        quant_max: largest code.
        grad_factor: factor of dscale and dzero_point.
        axis: channel axis of x, or None.
        enabled: device flag; 0 returns a copy of dy and zeros.
        grad_mask: "rounded" or "lsq".
        learning: device flag; 0 returns zeros for scale and zero point.
        grad_elements: None, "tensor", "channel" or "sample".

    Returns:
        (dx, dscale, dzero_point), of x's, scale's and zero_point's shape and dtype; dzero_point is float32 for an
        integer zero point.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, value or device.
        NotImplementedError: the result is differentiated again, or as in `learnable_fake_quantize`.
    """
    arguments = (dy, x, scale, zero_point, quant_min, quant_max, grad_factor, axis, enabled, grad_mask, learning,
                 grad_elements)  # fmt: skip
    tensors = (dy, x, scale, zero_point)
    others: Any = {
        "axis": axis,
        "ints": (quant_min, quant_max),
        "numbers": (grad_factor,),
        "optional": (enabled, learning),
    }
    direct = runs_directly(*tensors, **others) and grad_factor is not None and x.device.type in _DIRECT
    if direct and not wants_gradient(*tensors):
        checked = _check_backward(*arguments)
        return _DIRECT[x.device.type].backward(dy, *checked)
    if transforms_active():
        return LearnableFakeQuantizeBackwardForTransforms.apply(*arguments)
    return _backward_op(*arguments)
