"""Autograd of learnable_fake_quantize: gradients of x, scale and zero point, for the engine and for torch.func.

Saved are x, the qparams and the flags; no mask and nothing else of x's size.
"""

from __future__ import annotations

from typing import Any

import torch

from qkernels.ops.compositions import learned_zero_point
from qkernels.ops.fake_quant_autograd import Calls, dispatch, refuse, wants_operator
from qkernels.ops.registration import LIBRARY

Tensor = torch.Tensor
Gradients = tuple[Tensor | None, ...]
Options = tuple[Any, ...]  # the operator's arguments after zero_point


def _fake_quantize_backward(dy: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, options: Options) -> Tensor:
    """dx alone: where neither scale nor zero point wants a gradient there are no sums to take."""
    quant_min, quant_max, _, axis, enabled, *_ = options
    zero_point = learned_zero_point(zero_point, quant_min, quant_max).to(torch.int32)
    return torch.ops.qkernels.fake_quantize_backward.default(
        dy, x, scale, zero_point, quant_min, quant_max, axis, enabled
    )


class LearnableFakeQuantize(torch.autograd.Function):
    """learnable_fake_quantize for the autograd engine."""

    @staticmethod
    def forward(ctx: Any, calls: Calls, x: Tensor, scale: Tensor, zero_point: Tensor, options: Options) -> Tensor:
        """y."""
        ctx.calls, ctx.options = calls, options
        ctx.save_for_backward(x, scale, zero_point, options[4], options[6])  # the flags: autograd sees them change
        return calls.forward(x, scale, zero_point, *options)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        """Gradients of x, scale and zero point."""
        x, scale, zero_point, enabled, learning = ctx.saved_tensors
        *numbers, _, grad_mask, _, grad_elements = ctx.options
        options = (*numbers, enabled, grad_mask, learning, grad_elements)
        if grad_mask == "rounded" and not any(ctx.needs_input_grad[2:4]):
            return None, _fake_quantize_backward(dy, x, scale, zero_point, options), None, None, None
        if wants_operator(dy, x):
            backward = torch.ops.qkernels.learnable_fake_quantize_backward.default
        else:
            backward = ctx.calls.backward
        dx, dscale, dzero_point = backward(dy, x, scale, zero_point, *options)
        return None, dx, dscale, dzero_point if ctx.needs_input_grad[3] else None, None


class LearnableFakeQuantizeBackward(torch.autograd.Function):
    """learnable_fake_quantize_backward below the Autograd key; its own backward refuses, with a reason."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Gradients:
        """(dx, dscale, dzero_point); `inputs` are the operator's arguments."""
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.qkernels.learnable_fake_quantize_backward.default(*inputs)

    backward = refuse("learnable_fake_quantize_backward")


class LearnableFakeQuantizeForTransforms(torch.autograd.Function):
    """learnable_fake_quantize for torch.func, which wants the context apart from the forward. Slower, so only there."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        """y; `inputs` are the operator's arguments."""
        return torch.ops.qkernels.learnable_fake_quantize.default(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save x, the qparams and the flags."""
        x, scale, zero_point, *ctx.numbers, enabled, ctx.grad_mask, learning, ctx.grad_elements = inputs
        ctx.save_for_backward(x, scale, zero_point, enabled, learning)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        """Gradients of x, scale and zero point."""
        x, scale, zero_point, enabled, learning = ctx.saved_tensors
        dx, dscale, dzero_point = LearnableFakeQuantizeBackwardForTransforms.apply(
            dy, x, scale, zero_point, *ctx.numbers, enabled, ctx.grad_mask, learning, ctx.grad_elements
        )
        return dx, dscale, dzero_point if ctx.needs_input_grad[2] else None, *(None,) * 8


class LearnableFakeQuantizeBackwardForTransforms(torch.autograd.Function):
    """learnable_fake_quantize_backward for torch.func."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Gradients:
        """(dx, dscale, dzero_point); `inputs` are the operator's arguments."""
        return torch.ops.qkernels.learnable_fake_quantize_backward.default(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Gradients) -> None:
        """Nothing is saved: there is no second derivative."""

    backward = refuse("learnable_fake_quantize_backward")


def register_autograd(forward: Any, backward: Any) -> None:
    """Put the kernels above on the Autograd key of the two operators."""

    def below_autograd(*inputs: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return forward(*inputs)

    calls = Calls(below_autograd, backward)

    def differentiable(*inputs: Any) -> Tensor:
        return LearnableFakeQuantize.apply(calls, *inputs[:3], inputs[3:])

    LIBRARY.impl("learnable_fake_quantize", dispatch(forward, differentiable, 3), "Autograd")
    LIBRARY.impl(
        "learnable_fake_quantize_backward", dispatch(backward, LearnableFakeQuantizeBackward.apply, 4), "Autograd"
    )
