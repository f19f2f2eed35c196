"""torch.ao's fake quantizers, composed into an oracle where they refuse: other axes, other float types."""

from __future__ import annotations

import torch
import torch.ao.quantization as stock

INT64_SAFE = 2.0**62  # torch's per-channel op converts to int64 before it clamps: quotients from 2^63 on wrap


class Stock(torch.nn.Module):
    """torch.ao's module where it works, and composed from it where it does not.

    Its per-channel fake quantization refuses negative axes. Its fused op takes float32 only on the CPU and axis 0 only
    per channel: there the axis is moved to the front and the arithmetic is float32, rounded once at the end.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module
        self.axis = module.ch_axis
        self.fused = isinstance(module, stock.FusedMovingAvgObsFakeQuantize)
        if self.fused and module.is_per_channel:
            module.ch_axis = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.module.is_per_channel:
            return self.module(x.float()).to(x.dtype) if self.fused else self.module(x)
        if self.fused:
            moved = x.movedim(self.axis, 0).float().contiguous()
            return self.module(moved).movedim(0, self.axis).to(x.dtype)
        self.module.ch_axis = self.axis % x.ndim
        y = self.module(x)
        self.module.ch_axis = self.axis
        return y


def comparable(x: torch.Tensor, theirs: torch.nn.Module, axis: int) -> torch.Tensor | None:
    """Where torch's per-channel op can be right; everywhere per tensor.

    Not where its conversion to int64 wraps, and not on the last code of a 32-bit range, which float32 cannot tell from
    the next: torch's per-tensor op, the contract and ours call it inside, its per-channel op outside.
    """
    if not theirs.is_per_channel or theirs.scale.numel() != x.shape[axis]:
        return None
    shape = [1] * x.ndim
    shape[axis] = -1
    scale, zero_point = theirs.scale.reshape(shape), theirs.zero_point.reshape(shape)
    quotient = x.detach().double() / scale.double()
    where = quotient.abs() < INT64_SAFE
    last = theirs.activation_post_process.quant_max
    if last > 2**24:
        where &= (x.detach().float() * (1 / scale)).round() + zero_point.float() < float(torch.tensor(last).float())
    return where
