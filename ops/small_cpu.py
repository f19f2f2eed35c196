"""Small CPU tensors, eager: torch's own operators, with their autograd in C++, where they give the contract's numbers.

torch's CPU operators are scalar code, but one call. Up to 16 Ki elements, and 32 Ki for the fused one with a backward,
that is less than vector passes and an autograd.Function in Python take: forward and backward of 64 x 16 elements 37 us
against 62 (one thread, torch 2.13).

The forward functions take unchecked arguments that `runs_directly`. All give None where torch's operator would give
other numbers, or raise: then the usual way is right, or says what is wrong.
"""

from __future__ import annotations

import math

import torch
from torch._C._autograd import _top_saved_tensors_default_hooks

from qkernels.launch import mark_written
from qkernels.ops.checks import FLAG_DTYPES
from qkernels.ops.compositions import EXACT_BOUND, GRAD_ELEMENTS, gradient_factor
from qkernels.ops.qparams_rules import SMALL_SCALE

Tensor = torch.Tensor

SMALL = 1 << 14  # elements
FUSED = 1 << 15  # the same for the fused operator where a backward follows, which is one product with its mask
CODE_LIMIT = 2.0**62  # torch's operators convert codes to int64


def is_known_on(flag: Tensor | None) -> bool:
    """Whether this, unchecked, is a flag and on, or None."""
    return flag is None or (flag.is_cpu and flag.numel() == 1 and flag.dtype in FLAG_DTYPES and flag.item() != 0)


def is_small(x: Tensor, most: int | None = None) -> bool:
    """Whether x is one of those that torch's operators are faster for: it has at most `most` elements, None for SMALL.

    Not where saved tensors are looked at: a checkpoint wants to see the same ones twice, and which operator serves may
    depend on qparams that the recomputation has moved.
    """
    return (
        0 < x.numel() <= (SMALL if most is None else most)
        and x.is_cpu
        and x.dtype == torch.float32
        and x.is_contiguous()
        and _top_saved_tensors_default_hooks(True) is None
    )


def is_range(quant_min: int, quant_max: int) -> bool:
    """Whether these, unchecked, are bounds whose codes float32 holds."""
    return -EXACT_BOUND <= quant_min <= quant_max <= EXACT_BOUND


def _codes_fit(x: Tensor, step: float) -> bool:
    """Whether x holds neither NaN nor infinity, and every code of x in steps of `step` is an int64."""
    low, high = torch.aminmax(x.detach())
    return step > 1e-37 and max(-low.item(), high.item()) < CODE_LIMIT * step


def _smallest(values: Tensor) -> float:
    """Smallest of one or more values; NaN if any is."""
    return (values if values.numel() == 1 else torch.min(values)).item()


def _not_finite(value: float) -> bool:
    return not math.isfinite(value)


def _exact_per_tensor(x: Tensor, step: float, code: float) -> bool:
    """Whether torch's learnable operator gives our numbers for a scale of `step` and a zero point of `code`.

    Without NaN, and with no code of x above int64. What is below x86-64 and AArch64 make the lowest int64, as it should
    be.
    """
    return 1e-37 < step < math.inf and abs(code) < EXACT_BOUND and torch.max(x.detach()).item() < CODE_LIMIT * step


def exact_for_torch(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None
) -> bool:
    """Whether torch's learnable operators give our numbers, for a zero point of 0.

    In float32, without NaN, with every code of x an int64, with 0 in the range. They add the zero point before they
    round, which moves ties, and shift a negative one; so per channel it has to be 0, and per tensor it is moved into
    the bounds. Per channel of a one-dimensional x their sums are wrong.
    """
    if not x.dtype == scale.dtype == zero_point.dtype == torch.float32:
        return False
    if axis is None:
        return _exact_per_tensor(x, scale.item(), zero_point.item())
    if x.ndim < 2 or not quant_min <= 0 <= quant_max or zero_point.any():
        return False
    return _codes_fit(x, _smallest(scale))


def _learned_code(code: float, quant_min: int, quant_max: int) -> int:
    """The code that a finite learned zero point stands for."""
    return round(min(max(code, quant_min), quant_max))  # half to even


def learn_per_tensor(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qparams: tuple[float, float],
    quant_min: int,
    quant_max: int,
    factor: float,
) -> Tensor | None:
    """learnable_fake_quantize of an x that `is_small`, with torch's autograd.

    Args:
        x: the batch.
        scale: float32 (1,), on the CPU.
        zero_point: like scale.
        qparams: the values of these two.
        quant_min: smallest code, at least -EXACT_BOUND.
        quant_max: largest code, at most EXACT_BOUND.
        factor: of the gradients of scale and zero point.

    Returns:
        y, or None where torch's operator would give other numbers.
    """
    step, code = qparams
    if not _exact_per_tensor(x, step, code):
        return None
    shift = _learned_code(code, quant_min, quant_max)
    if shift or abs(code) > 0.25:  # torch's backward takes the code of 0.5 to be 1
        zero_point = zero_point - zero_point.detach()  # 0, through which the gradient passes
    return torch._fake_quantize_learnable_per_tensor_affine(
        x, scale, zero_point, quant_min - shift, quant_max - shift, factor
    )


def learnable_fake_quantize_by_torch(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    grad_factor: float,
    axis: int | None,
    enabled: Tensor | None,
    grad_mask: str,
    learning: Tensor | None,
    grad_elements: str | None,
) -> Tensor | None:
    """learnable_fake_quantize with torch's autograd."""
    if not (
        is_small(x)
        and scale.is_cpu
        and zero_point.is_cpu
        and scale.dtype == zero_point.dtype == torch.float32
        and grad_mask == "rounded"
        and is_range(quant_min, quant_max)
        and is_known_on(enabled)
        and is_known_on(learning)
    ):
        return None
    if axis is None:
        if not scale.shape == zero_point.shape == (1,):
            return None
    elif not (0 <= axis < x.ndim and scale.shape == zero_point.shape == (x.shape[axis],)):
        return None
    if grad_elements is not None and (grad_elements not in GRAD_ELEMENTS or quant_max < 1):
        return None
    factor = gradient_factor(x, quant_max, grad_factor, axis, grad_elements)
    if axis is None:
        qparams = scale.item(), zero_point.item()
        return learn_per_tensor(x, scale, zero_point, qparams, quant_min, quant_max, factor)
    if not exact_for_torch(x, scale, zero_point, quant_min, quant_max, axis):
        return None
    return torch._fake_quantize_learnable_per_channel_affine(x, scale, zero_point, axis, quant_min, quant_max, factor)


def learnable_gradients_by_torch(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    grad_factor: float,
    axis: int | None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """All three gradients where they are `exact_for_torch`. None where NaN or infinities show up."""
    if axis is None:
        code = _learned_code(zero_point.item(), quant_min, quant_max)
        dx, dscale, dzero_point = torch.ops.aten._fake_quantize_learnable_per_tensor_affine_backward.default(
            dy, x, scale.reshape(1), scale.new_zeros(1), quant_min - code, quant_max - code, grad_factor
        )
        if not math.isfinite(dscale.item() + dzero_point.item()):
            return None
    else:
        dx, dscale, dzero_point = torch.ops.aten._fake_quantize_learnable_per_channel_affine_backward.default(
            dy, x, scale, zero_point, axis, quant_min, quant_max, grad_factor
        )
        if not math.isfinite((dscale + dzero_point).sum().item()):
            return None
    if dx.stride() != (like := torch.empty_like(x)).stride():
        dx = like.copy_(dx)
    return dx, dscale.reshape(scale.shape), dzero_point.reshape(zero_point.shape)


def fake_quantize_by_torch(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    enabled: Tensor | None,
) -> Tensor | None:
    """fake_quantize with torch's autograd, which saves a mask."""
    if not (
        is_small(x)
        and scale.is_cpu
        and zero_point.is_cpu
        and scale.dtype == torch.float32
        and zero_point.dtype == torch.int32
        and not scale.requires_grad
        and not zero_point.requires_grad
        and is_range(quant_min, quant_max)
        and is_known_on(enabled)
    ):
        return None
    if axis is None:
        if scale.shape == zero_point.shape == (1,) and _codes_fit(x, scale.item()):
            return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, quant_min, quant_max)
        return None
    if not (0 <= axis < x.ndim and scale.shape == zero_point.shape == (x.shape[axis],)):
        return None
    low, high = torch.aminmax(zero_point)
    if quant_min <= low.item() and high.item() <= quant_max and _codes_fit(x, _smallest(scale)):
        return torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis, quant_min, quant_max)
    return None


def fused_fake_quantize_by_torch(
    x: Tensor,
    state: tuple[Tensor, Tensor, Tensor, Tensor],
    observer_enabled: Tensor,
    fake_quant_enabled: Tensor,
    averaging_constant: float,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    symmetric: bool,
) -> Tensor | None:
    """The whole step of torch.fused_moving_avg_obs_fake_quant, the rules "fused_*".

    Args:
        x: the batch.
        state: min_val, max_val, scale and zero point, written in place.
        observer_enabled: flag.
        fake_quant_enabled: flag.
        averaging_constant: weight of the batch.
        quant_min: smallest code.
        quant_max: largest code.
        axis: channel axis, or None.
        symmetric: whether the rule is "fused_symmetric".
    """
    min_val, max_val, scale, zero_point = state
    if not (
        is_small(x, FUSED if x.requires_grad and torch.is_grad_enabled() else None)
        and x.ndim > 0
        and is_known_on(fake_quant_enabled)
        and observer_enabled.is_cpu
        and is_range(quant_min, quant_max)
        and min_val.dtype == max_val.dtype == scale.dtype == torch.float32
        and zero_point.dtype == torch.int32
    ):
        return None
    channels = 1
    if axis is not None:
        if x.ndim < 2 or axis not in (0, -x.ndim):  # it takes no others
            return None
        channels = x.shape[0]
    for tensor in state:
        if not (tensor.is_cpu and tensor.is_contiguous() and tensor.numel() == channels):  # it writes by raw pointers
            return None
    refused = math.isnan if observer_enabled.item() else _not_finite  # infinities come before the first batch
    if refused(_smallest(min_val)) or refused(_smallest(max_val)):
        return None
    if not _codes_fit(x, SMALL_SCALE):  # it chooses no smaller scale
        return None
    y = torch.fused_moving_avg_obs_fake_quant(
        x,
        observer_enabled,
        fake_quant_enabled,
        min_val,
        max_val,
        scale,
        zero_point,
        averaging_constant,
        quant_min,
        quant_max,
        0,
        axis is not None,
        symmetric,
    )
    mark_written(*state)  # it writes through raw pointers
    return y
