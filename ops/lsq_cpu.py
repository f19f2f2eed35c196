"""Backward of learnable_fake_quantize on the CPU, eager: in-place ATen passes over blocks that stay in the cache.

torch's own operator is scalar code that writes three tensors of x's size and sums two of them. A dozen vector passes
over a block of 64 Ki elements, whose temporaries stay in the second-level cache, take a quarter of its time at 1 M
elements (one thread, torch 2.13, x86-64). Up to 16 Ki elements dispatch outweighs that, and torch's operator serves
where it is right. Both round k * scale - x once, so that the gradient of an element does not depend on which ran.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch

from qkernels.ops.compositions import (
    gradient_dtype,
    gradient_factor,
    learnable_fake_quantize_backward_composition,
    learned_zero_point,
)
from qkernels.ops.fake_quant_cpu import fake_quantize_backward_cpu, is_off, learned_qparams
from qkernels.ops.small_cpu import SMALL, exact_for_torch, learnable_gradients_by_torch

Tensor = torch.Tensor

BLOCK = 1 << 16  # elements per thread and pass


def learnable_fake_quantize_backward_cpu(
    dy: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dscale, dzero_point) for checked arguments; axis in [0, x.ndim) or None."""
    on, learns = not is_off(enabled), not is_off(learning)
    if on and not learns and grad_mask == "rounded":  # no sums to take
        code = learned_zero_point(zero_point, quant_min, quant_max).to(torch.int32)
        dx = fake_quantize_backward_cpu(dy, x, scale, code, quant_min, quant_max, axis, None)
        return dx, _like(scale, 0.0, 1.0), _like(zero_point, 0.0, 1.0)
    factor = gradient_factor(x, quant_max, grad_factor, axis, grad_elements)
    small = 0 < x.numel() <= SMALL and on and grad_mask == "rounded"
    if small and exact_for_torch(x, scale, zero_point, quant_min, quant_max, axis):
        gradients = learnable_gradients_by_torch(dy, x, scale, zero_point, quant_min, quant_max, factor, axis)
        if gradients is not None:
            return gradients
    dx = torch.empty_like(x)
    sums: Any = (0.0, 0.0)
    if x.numel() == 0 or not on:
        dx.copy_(dy)
    else:
        arguments = (dx, dy, x, scale, zero_point, quant_min, quant_max, grad_mask == "lsq")
        if x.dtype == torch.float64:
            sums = None
        else:
            sums = _flat(*arguments) if axis is None else _channels(*arguments, axis)
        if sums is None:
            exact = learnable_fake_quantize_backward_composition(
                dy, x, scale, zero_point, quant_min, quant_max, grad_factor, axis, enabled, grad_mask, learning,
                grad_elements,
            )  # fmt: skip
            return dx.copy_(exact[0]), exact[1], exact[2]
        if not learns:
            sums = (0.0, 0.0)
    return dx, _like(scale, sums[0], factor), _like(zero_point, sums[1], factor)


def _like(parameter: Tensor, total: Any, factor: float) -> Tensor:
    """total * factor, a number or (C,) float64, with the shape of a parameter and the dtype of its gradient."""
    dtype = gradient_dtype(parameter)
    if isinstance(total, Tensor):
        return total.mul_(factor).to(dtype).reshape(parameter.shape)
    return torch.full(parameter.shape, total * factor, dtype=dtype, device=parameter.device)


def _flat(
    dx: Tensor, dy: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, strict: bool
) -> tuple[float, float] | None:
    """Write dx; the sums of dscale and dzero_point. None where NaN or infinities show up.

    The qparams are numbers here: an operation with a number is cheaper than one with a tensor.
    """
    qparams = learned_qparams(scale, zero_point, quant_min, quant_max, None)
    if qparams is None:
        return None
    n = x.numel()
    budget = BLOCK * torch.get_num_threads()
    if n <= budget and dx.is_contiguous() and dy.is_contiguous() and x.is_contiguous():  # nothing to cut
        sums = _one_block((dx, dy, x), (None, None), qparams, quant_min, quant_max, strict, None)
        inside, outside, saturated = (part.item() for part in sums)
    else:
        inside = outside = saturated = 0.0
        views = _views((dx, dy, x), None)
        scratch = [torch.empty(min(budget, n), dtype=torch.float32, device=x.device) for _ in range(2)]
        for start in range(0, n, budget):
            block = [view[start : start + budget] for view in views]
            if n - start < budget:
                scratch = [buffer[: n - start] for buffer in scratch]
            sums = _one_block(block, scratch, qparams, quant_min, quant_max, strict, None)
            inside += sums[0].item()
            outside += sums[1].item()
            saturated += sums[2].item()
    result = inside * qparams[1] + outside, -qparams[0] * saturated
    return result if math.isfinite(result[0] + result[1]) else None


def _channels(
    dx: Tensor,
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    strict: bool,
    axis: int,
) -> tuple[Tensor, Tensor] | None:
    """Write dx; the sums of dscale and dzero_point, (C,) float64. None where NaN or infinities show up."""
    qparams = learned_qparams(scale, zero_point, quant_min, quant_max, axis)
    if qparams is None:
        return None
    views = _views((dx, dy, x), axis)
    budget = BLOCK * torch.get_num_threads()
    scratch = [torch.empty(min(budget, x.numel()), dtype=torch.float32, device=x.device) for _ in range(2)]
    if x.numel() <= budget:  # nothing to cut
        own = tuple(t.view(1, -1, 1) for t in qparams)
        buffers = [buffer.view(views[0].shape) for buffer in scratch]
        sums = _one_block(views, buffers, own, quant_min, quant_max, strict, [0, 2])
        totals = [part.double() for part in sums]
    else:
        totals = [torch.zeros(scale.numel(), dtype=torch.float64, device=x.device) for _ in range(3)]
        for index in _pieces(views[0].shape, budget):
            block = [view[index] for view in views]
            buffers = [buffer[: block[0].numel()].view(block[0].shape) for buffer in scratch]
            own = tuple(t[index[1]].view(1, -1, 1) for t in qparams)
            sums = _one_block(block, buffers, own, quant_min, quant_max, strict, [0, 2])
            for total, part in zip(totals, sums, strict=True):
                total[index[1]] += part
    inside, outside, saturated = totals
    result = inside * qparams[1] + outside, -qparams[0] * saturated
    return result if (result[0] + result[1]).isfinite().all() else None


def _one_block(
    block: Sequence[Tensor],
    scratch: Sequence[Tensor | None],
    qparams: tuple[Any, ...],
    quant_min: int,
    quant_max: int,
    strict: bool,
    dims: list[int] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Write dx of one block. The scratch is two float32 tensors of its size, or None, which are allocated.

    Returns:
        Sums over `dims` (None: all) of dy * (k * scale - x) inside, of dy * k where saturated, of dy there.
    """
    dx, dy, x = block
    a, steps = scratch
    scale, inverse, zero_point = qparams
    if x.dtype == torch.float32:
        a = torch.mul(x, inverse, out=a)
    else:
        a = (torch.empty_like(x, dtype=torch.float32) if a is None else a).copy_(x).mul_(inverse)
    inside = None
    if strict:
        unrounded = a + zero_point
        inside = (unrounded > quant_min).logical_and_(unrounded < quant_max)
    # Codes without their zero point: the bounds are moved instead, exactly.
    steps = torch.clamp(a.round_(), quant_min - zero_point, quant_max - zero_point, out=steps)
    if inside is None:
        a.eq_(steps)
    else:
        a.copy_(inside)
    torch.mul(dy, a, out=dx)
    saturated = torch.sub(dy, dx, out=a)
    dy_sum = saturated.sum(dims)
    outside = saturated.mul_(steps).sum(dims)
    # x - k * scale by fused multiply-add, where the processor has it. The sign is turned in the sum.
    if x.dtype != torch.float32:
        x = a.copy_(x)
    if dims is None:
        torch.sub(x, steps, alpha=scale, out=steps)
    else:
        torch.addcmul(x, steps, scale, value=-1, out=steps)
    return steps.mul_(dx).sum(dims).neg_(), outside, dy_sum


def _views(tensors: tuple[Tensor, ...], axis: int | None) -> list[Tensor]:
    """The tensors as (n,), or as (outer, C, inner), in the order of the first one's memory; that one is not copied."""
    first = tensors[0]
    if axis is None and all(t.is_contiguous() for t in tensors):
        return [t.view(-1) for t in tensors]
    order = sorted(range(first.ndim), key=first.stride, reverse=True)
    ordered = [t.permute(order) for t in tensors]
    shape: tuple[int, ...] = (-1,)
    if axis is not None:
        at = order.index(axis)
        sizes = ordered[0].shape
        shape = (math.prod(sizes[:at]), sizes[at], math.prod(sizes[at + 1 :]))
    return [ordered[0].view(shape), *(t.reshape(shape) for t in ordered[1:])]


def _pieces(shape: torch.Size, budget: int) -> Iterator[tuple[slice, ...]]:
    """Cut a contiguous shape into blocks of at most `budget` elements: whole in the fast dimensions, while they fit."""
    steps = []
    for size in reversed(shape):
        step = max(min(size, budget), 1)
        steps.append(step)
        budget = budget // step if step == size else 1
    ranges = [range(0, size, step) for size, step in zip(shape, reversed(steps), strict=True)]
    for starts in product(*ranges):
        yield tuple(slice(start, start + step) for start, step in zip(starts, reversed(steps), strict=True))
