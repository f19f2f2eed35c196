"""Fake quantization in plain PyTorch, what one would write and compile: the "torch.compile" peers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _along(value: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """One value per channel, shaped to broadcast against x."""
    if axis is None:
        return value.reshape(())
    return value.reshape([-1 if d == axis % x.ndim else 1 for d in range(x.ndim)])


def aminmax(x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """The smallest and largest value, of all or per channel."""
    dims = [d for d in range(x.ndim) if axis is None or d != axis % x.ndim]
    return torch.amin(x, dims), torch.amax(x, dims)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, axis: int | None
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.low, ctx.high, ctx.axis = low, high, axis
        scale, zero_point = _along(scale, x, axis), _along(zero_point, x, axis)
        codes = (torch.round(x.float() * (1.0 / scale)) + zero_point).clamp(low, high)
        return ((codes - zero_point) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, scale, zero_point = ctx.saved_tensors
        scale, zero_point = _along(scale, x, ctx.axis), _along(zero_point, x, ctx.axis)
        codes = torch.round(x.float() * (1.0 / scale)) + zero_point
        inside = (codes >= ctx.low) & (codes <= ctx.high)
        return torch.where(inside, dy, 0), None, None, None, None, None


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, axis: int | None = None) -> Tensor:
    """Round to codes and back; the gradient of x passes where the code is inside the range."""
    return _FakeQuantize.apply(x, scale, zero_point, low, high, axis)


class _Learnable(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, axis: int | None
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.low, ctx.high, ctx.axis = low, high, axis
        scale, zero_point = _along(scale, x, axis), _along(zero_point, x, axis).round().clamp(low, high)
        codes = (torch.round(x.float() * (1.0 / scale)) + zero_point).clamp(low, high)
        return ((codes - zero_point) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, scale, zero_point = ctx.saved_tensors
        low, high, axis = ctx.low, ctx.high, ctx.axis
        along_scale, along_zero = _along(scale, x, axis), _along(zero_point, x, axis).round().clamp(low, high)
        inverse = 1.0 / along_scale
        codes = torch.round(x.float() * inverse) + along_zero
        inside = (codes >= low) & (codes <= high)
        offset = codes.clamp(low, high) - along_zero
        dims = [d for d in range(x.ndim) if axis is None or d != axis % x.ndim]
        dscale = (dy * torch.where(inside, offset - x * inverse, offset)).sum(dims)
        dzero_point = torch.where(inside, 0, -dy * along_scale).sum(dims)
        return (
            torch.where(inside, dy, 0),
            dscale.reshape(scale.shape).to(scale.dtype),
            dzero_point.reshape(zero_point.shape).to(zero_point.dtype),
            None,
            None,
            None,
        )


def learnable_fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, axis: int | None = None
) -> Tensor:
    """`fake_quantize` whose scale and zero point have gradients, those of LSQ+, unscaled."""
    return _Learnable.apply(x, scale, zero_point, low, high, axis)
