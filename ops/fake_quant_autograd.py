"""Autograd of fake_quantize: the straight-through estimator, for the autograd engine and for torch.func.

It saves x and the qparams, no mask. The kernels on the Autograd key are plain Python calling an autograd.Function: 19
us a call against 29 for torch.library.register_autograd, 10 of them the ATen implementation (one CPU, torch 2.13).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from qkernels.ops.registration import LIBRARY, runs_directly

Tensor = torch.Tensor


def transforms_active() -> bool:
    """Whether a torch.func transform (grad, vmap, ...) is running, outside of torch.compile."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether autograd is to record an operation on these."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def wants_operator(dy: Tensor, x: Tensor) -> bool:
    """Whether a backward is for the operator to compute: with create_graph, batched, or where somebody looks on.

    The operator knows that it cannot be differentiated. Batched gradients are plain tensors to Python, and no transform
    is active in the engine.
    """
    return torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(dy) or not runs_directly(dy, x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, zero_point, *ctx.bounds_and_axis, enabled = inputs
    ctx.save_for_backward(x, scale, zero_point, enabled)


def refuse(operator: str) -> Any:
    """The backward of a backward operator: an error that names it."""

    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise NotImplementedError(
            f"{operator}: double backward is not supported; the straight-through estimator has no second derivative"
        )

    return staticmethod(backward)


class Calls(NamedTuple):
    """How the Functions compute: through the dispatcher, or by calling an implementation itself."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


class FakeQuantize(torch.autograd.Function):
    """fake_quantize for the autograd engine."""

    @staticmethod
    def forward(ctx: Any, calls: Calls, *inputs: Any) -> Tensor:
        """y; `inputs` are the operator's arguments."""
        ctx.calls = calls
        y = calls.forward(*inputs)
        _save(ctx, inputs, y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of x alone."""
        x, scale, zero_point, enabled = ctx.saved_tensors
        if wants_operator(dy, x):
            backward = torch.ops.qkernels.fake_quantize_backward.default
        else:
            backward = ctx.calls.backward
        dx = backward(dy, x, scale, zero_point, *ctx.bounds_and_axis, enabled)
        return None, dx, None, None, None, None, None, None


class FakeQuantizeBackward(torch.autograd.Function):
    """fake_quantize_backward below the Autograd key; its own backward refuses, with a reason."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """dx; `inputs` are the operator's arguments."""
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.qkernels.fake_quantize_backward.default(*inputs)

    backward = refuse("fake_quantize_backward")


class FakeQuantizeForTransforms(torch.autograd.Function):
    """fake_quantize for torch.func, which wants the context apart from the forward. Slower, so only there."""

    generate_vmap_rule = True
    setup_context = staticmethod(_save)

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        """y; `inputs` are the operator's arguments."""
        return torch.ops.qkernels.fake_quantize.default(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of x alone."""
        x, scale, zero_point, enabled = ctx.saved_tensors
        dx = FakeQuantizeBackwardForTransforms.apply(dy, x, scale, zero_point, *ctx.bounds_and_axis, enabled)
        return dx, None, None, None, None, None, None


class FakeQuantizeBackwardForTransforms(torch.autograd.Function):
    """fake_quantize_backward for torch.func."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        """dx; `inputs` are the operator's arguments."""
        return torch.ops.qkernels.fake_quantize_backward.default(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is saved: there is no second derivative."""

    backward = refuse("fake_quantize_backward")


def dispatch(op: Any, differentiable: Callable[..., Any], tensors: int) -> Any:
    """Kernel for the Autograd key: `differentiable` if one of the first `tensors` arguments wants a gradient."""

    def kernel(*inputs: Any, **named: Any) -> Any:
        if named:  # the dispatcher passes what the caller named by name; autograd.Function takes positions only
            inputs = (*inputs, *(named.get(a.name, a.default_value) for a in op._schema.arguments[len(inputs) :]))
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs[:tensors]):
            return differentiable(*inputs, *(a.default_value for a in op._schema.arguments[len(inputs) :]))
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    return kernel


def register_autograd(forward: Any, backward: Any) -> None:
    """Put the kernels above on the Autograd key of the two operators."""

    def below_autograd(*inputs: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return forward(*inputs)

    calls = Calls(below_autograd, backward)

    def differentiable(*inputs: Any) -> Tensor:
        return FakeQuantize.apply(calls, *inputs)

    LIBRARY.impl("fake_quantize", dispatch(forward, differentiable, 1), "Autograd")
    LIBRARY.impl("fake_quantize_backward", dispatch(backward, FakeQuantizeBackward.apply, 2), "Autograd")
