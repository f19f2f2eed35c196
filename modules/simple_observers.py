"""Observers that record nothing, or everything: torch.ao's classes with a forward that torch.compile can trace."""

from __future__ import annotations

from torch import Tensor, nn
from torch.ao.quantization import observer as stock

from qkernels.modules.observer_core import StockConstructor, given


class PassThroughCore(nn.Module):
    """An observer that only carries configuration."""

    frozen: bool = False  # True once `qkernels.freeze` has made an identity of the observer

    def _init_core(self) -> None:
        """Nothing to derive."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x."""
        return x

    def reset_parameters(self) -> None:
        """Nothing to reset."""


class FixedQParamsCore(PassThroughCore):
    """An observer whose qparams are given."""

    scale: Tensor
    zero_point: Tensor

    def _init_core(self, scale: float | None = None, zero_point: int | None = None) -> None:
        """Remember the given qparams for `reset_parameters`; None reads the buffers."""
        self._initial_scale = given(self.scale) if scale is None else scale
        self._initial_zero_point = given(self.zero_point) if zero_point is None else zero_point

    def reset_parameters(self) -> None:
        """Give the buffers the qparams of the constructor again: after `to_empty()`, or meta initialisation."""
        self.scale.fill_(self._initial_scale)
        self.zero_point.fill_(self._initial_zero_point)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """The given scale and zero point, shape (1,)."""
        return self.scale, self.zero_point


class RecordingCore(PassThroughCore):
    """An observer that keeps every tensor."""

    tensor_val: list[Tensor]

    def forward(self, x: Tensor) -> Tensor:
        """Keep a copy of x and return x. Compiled, every batch is another graph: Dynamo guards the list's length."""
        if not self.frozen:
            self.tensor_val.append(x.clone())
        return x

    def reset_parameters(self) -> None:
        """Forget every tensor."""
        self.tensor_val.clear()


class FixedQParamsObserver(StockConstructor, FixedQParamsCore, stock.FixedQParamsObserver):  # type: ignore[misc]  # see minmax.py
    """Takes the place of `torch.ao.quantization.observer.FixedQParamsObserver`, whose constructor it has."""


class PlaceholderObserver(StockConstructor, PassThroughCore, stock.PlaceholderObserver):
    """Takes the place of `torch.ao.quantization.PlaceholderObserver`, whose constructor it has."""


class RecordingObserver(StockConstructor, RecordingCore, stock.RecordingObserver):
    """Takes the place of `torch.ao.quantization.RecordingObserver`, whose constructor it has."""


class NoopObserver(StockConstructor, PassThroughCore, stock.NoopObserver):
    """Takes the place of `torch.ao.quantization.NoopObserver`, whose constructor it has."""


class ReuseInputObserver(StockConstructor, PassThroughCore, stock.ReuseInputObserver):
    """Takes the place of `torch.ao.quantization.observer.ReuseInputObserver`, whose constructor it has."""
