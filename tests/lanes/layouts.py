"""The ways in which x lies in memory that the launchers tell apart, and some that they should not have to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tests.lanes.cases import Arguments


@dataclass(frozen=True)
class Layout:
    """A way for x to lie in memory.

    Attributes:
        name: part of the case's name.
        shape: (large) -> shape of the storage that `view` looks at.
        view: the storage, as a contiguous tensor -> x.
        axis: channel axis of x, or None.
        vector: see `KernelCase.vector`.
    """

    name: str
    shape: Callable[[bool], tuple[int, ...]]
    view: Callable[[torch.Tensor], torch.Tensor] = lambda storage: storage
    axis: int | None = None
    vector: int = 16

    def tensor(self, device: torch.device, dtype: torch.dtype, large: bool) -> torch.Tensor:
        shape = self.shape(large)
        if large:
            return self.view(torch.empty(shape, dtype=dtype, device=device))
        values = torch.linspace(-3.0, 3.0, math.prod(shape), device=device)
        return self.view(values.reshape(shape).to(dtype))

    def channels(self, x: torch.Tensor) -> int:
        return 1 if self.axis is None else x.shape[self.axis]


def _channels_last(storage: torch.Tensor) -> torch.Tensor:
    return storage.permute(0, 3, 1, 2)


LAYOUTS = (
    Layout("flat", lambda large: ((1 << 22) + 1,) if large else (9001,)),
    # contiguous activations, axis 1: 56 * 56 is a multiple of 16, 14 * 14 only of 4
    Layout("rows", lambda large: (32, 64, 56, 56) if large else (3, 5, 6, 8), axis=1),
    Layout("rows_196", lambda large: (64, 64, 14, 14) if large else (3, 2, 14, 14), axis=1, vector=4),
    Layout("rows_49", lambda large: (64, 64, 7, 7) if large else (3, 2, 7, 7), axis=1, vector=1),
    # contiguous weights, axis 0: one long run per channel
    Layout("weight", lambda large: (256, 64, 3, 3) if large else (5, 7, 3, 3), axis=0),
    Layout("cols", lambda large: (4096, 512) if large else (70, 24), axis=1),
    Layout("cols_ragged", lambda large: (4096, 500) if large else (70, 21), axis=1, vector=4),
    Layout("channels_last", lambda large: (32, 28, 28, 64) if large else (2, 5, 7, 16), _channels_last, axis=1),
    Layout("strided", lambda large: (64, 128, 96) if large else (4, 9, 14), lambda s: s.mT[:, 1::2, ::3], vector=1),
    Layout(
        "strided_channels",
        lambda large: (64, 128, 96) if large else (4, 9, 14),
        lambda s: s.mT[:, 1::2, ::3],
        axis=1,
        vector=1,
    ),
    Layout(
        "expanded",
        lambda large: (128, 1, 512) if large else (5, 1, 24),
        lambda s: s.expand(-1, 3, -1),
        axis=1,
    ),
)


# The layouts that the three code paths are named after: one run of elements, channels outside, channels inside.
THOROUGH = ("flat", "rows", "cols")


def sweep(
    layout: Layout, arguments: Callable[[torch.Tensor], Arguments]
) -> Callable[[torch.dtype, int], Arguments] | None:
    """How to make arguments of n elements; only for the flat layout, whose one extent is the size."""
    return (lambda dtype, n: arguments(torch.empty(n, dtype=dtype))) if layout.name == "flat" else None
