"""The same observers and fake quantizers on torchao's base classes, for its PT2E flow. Needs torchao.

torchao's classes have the constructors, buffers and numbers of torch.ao's under other base classes, which its
prepare_pt2e and convert_pt2e ask for. Two things differ and are kept: a NaN in the statistics makes
`calculate_qparams` raise, and `with_args` gives torchao's partial wrapper.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

try:
    from torchao.quantization.pt2e import fake_quantize as stock
    from torchao.quantization.pt2e import learnable_fake_quantize as stock_learnable
    from torchao.quantization.pt2e import observer as stock_observer
except ImportError as error:
    raise ImportError("qkernels.modules.pt2e needs torchao: pip install 'qkernels[torchao]'") from error

from qkernels.modules.factories import counterpart
from qkernels.modules.fake_quant_core import FakeQuantizeCore, FusedMovingAvgCore
from qkernels.modules.fixed_qparams_core import FixedQParamsCore
from qkernels.modules.histogram_core import HistogramCore
from qkernels.modules.learnable_core import LearnableCore
from qkernels.modules.observer_core import MinMaxCore, PerChannelMinMaxCore, StockConstructor
from qkernels.modules.simple_observers import FixedQParamsCore as FixedQParamsObserverCore
from qkernels.modules.simple_observers import PassThroughCore, RecordingCore

disable_fake_quant = stock.disable_fake_quant
disable_observer = stock.disable_observer
enable_fake_quant = stock.enable_fake_quant
enable_observer = stock.enable_observer
get_observer_state_dict = stock_observer.get_observer_state_dict
load_observer_state_dict = stock_observer.load_observer_state_dict

enable_range_learning = stock_learnable.enable_range_learning
disable_range_learning = stock_learnable.disable_range_learning

ObserverBase = stock_observer.ObserverBase
UniformQuantizationObserverBase = stock_observer.UniformQuantizationObserverBase
FakeQuantizeBase = stock.FakeQuantizeBase


def _with_memoryless(cls: type) -> inspect.Signature:
    """The stock signature and our keyword."""
    signature = inspect.signature(cls)
    *parameters, kwargs = signature.parameters.values()
    memoryless = inspect.Parameter("memoryless", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool)
    return signature.replace(parameters=[*parameters, memoryless, kwargs])


class _RefusesNaN:
    """torchao asserts min <= max, which a NaN fails, where torch.ao asks for min > max."""

    def _observed(self) -> bool:
        observed: bool = super()._observed()  # type: ignore[misc]  # a mixin: the core behind it has these
        low, high = self.min_val, self.max_val  # type: ignore[attr-defined]
        if observed and not torch.all(low <= high):
            raise AssertionError(f"min {low} should be less than max {high}")
        return observed


class MinMaxObserver(_RefusesNaN, StockConstructor, MinMaxCore, stock_observer.MinMaxObserver):
    """`qkernels.modules.MinMaxObserver` for torchao."""

    def __init__(self, *args: Any, memoryless: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.memoryless = memoryless


class MovingAverageMinMaxObserver(MinMaxObserver, stock_observer.MovingAverageMinMaxObserver):
    """`qkernels.modules.MovingAverageMinMaxObserver` for torchao."""

    __init__ = StockConstructor.__init__


class PerChannelMinMaxObserver(
    _RefusesNaN, StockConstructor, PerChannelMinMaxCore, stock_observer.PerChannelMinMaxObserver
):
    """`qkernels.modules.PerChannelMinMaxObserver` for torchao."""

    def __init__(self, *args: Any, memoryless: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.memoryless = memoryless


class MovingAveragePerChannelMinMaxObserver(
    PerChannelMinMaxObserver, stock_observer.MovingAveragePerChannelMinMaxObserver
):
    """`qkernels.modules.MovingAveragePerChannelMinMaxObserver` for torchao."""

    __init__ = StockConstructor.__init__


for _cls in (MinMaxObserver, PerChannelMinMaxObserver):
    _cls.__signature__ = _with_memoryless(_cls)


class HistogramObserver(StockConstructor, HistogramCore, stock_observer.HistogramObserver):
    """`qkernels.modules.HistogramObserver` for torchao."""

    def _check_found(self, low: Tensor, high: Tensor) -> None:
        if not torch.compiler.is_compiling() and not torch.all(low <= high):
            raise AssertionError(f"min {low} should be less than max {high}")


class FixedQParamsObserver(StockConstructor, FixedQParamsObserverCore, stock_observer.FixedQParamsObserver):
    """`qkernels.modules.FixedQParamsObserver` for torchao."""


class PlaceholderObserver(StockConstructor, PassThroughCore, stock_observer.PlaceholderObserver):
    """`qkernels.modules.PlaceholderObserver` for torchao."""


class RecordingObserver(StockConstructor, RecordingCore, stock_observer.RecordingObserver):
    """`qkernels.modules.RecordingObserver` for torchao."""


class NoopObserver(StockConstructor, PassThroughCore, stock_observer.NoopObserver):
    """`qkernels.modules.NoopObserver` for torchao."""


class ReuseInputObserver(StockConstructor, PassThroughCore, stock_observer.ReuseInputObserver):
    """`qkernels.modules.ReuseInputObserver` for torchao."""


class FakeQuantize(FakeQuantizeCore, stock.FakeQuantize):
    """`qkernels.modules.FakeQuantize` for torchao."""

    def __init__(
        self,
        observer: Any = MovingAverageMinMaxObserver,
        quant_min: int | None = None,
        quant_max: int | None = None,
        is_dynamic: bool = False,
        **observer_kwargs: Any,
    ) -> None:
        stock.FakeQuantize.__init__(self, observer, quant_min, quant_max, is_dynamic, **observer_kwargs)


class FusedMovingAvgObsFakeQuantize(FusedMovingAvgCore, FakeQuantize, stock.FusedMovingAvgObsFakeQuantize):
    """`qkernels.modules.FusedMovingAvgObsFakeQuantize` for torchao."""

    def __init__(
        self,
        observer: Any = MovingAverageMinMaxObserver,
        quant_min: int = 0,
        quant_max: int = 255,
        consistent_qparams: bool = False,
        **observer_kwargs: Any,
    ) -> None:
        stock.FusedMovingAvgObsFakeQuantize.__init__(self, observer, quant_min, quant_max, **observer_kwargs)
        self._init_core(consistent_qparams)


class FixedQParamsFakeQuantize(FixedQParamsCore, FakeQuantize, stock.FixedQParamsFakeQuantize):
    """`qkernels.modules.FixedQParamsFakeQuantize` for torchao."""

    def __init__(self, observer: Any) -> None:
        FakeQuantize.__init__(self, observer=observer)
        self._init_fixed(observer, stock_observer.FixedQParamsObserver, FixedQParamsObserver)


class LearnableFakeQuantize(LearnableCore, stock_learnable.LearnableFakeQuantize):
    """`qkernels.modules.LearnableFakeQuantize` for torchao.

    Unlike torchao's, whose scale and zero point are None before the first batch, this has them from the start, so that
    an optimizer built before sees them and a checkpoint loads into a fresh module. The scale is raised to `eps` in
    forward too.

    Args:
        observer: observer class or factory.
        quant_min: smallest code.
        quant_max: largest code.
        use_grad_scaling: scale the gradients of scale and zero point by 1 / sqrt(elements * quant_max).
        channel_len: number of channels; -1 per tensor, or if it is known only at the first batch.
        grad_factor: factor of these gradients, in place of use_grad_scaling.
        grad_scale_elements: "tensor", "channel" or "sample".
        grad_mask: "rounded" or "lsq".
        **observer_kwargs: arguments of the observer.
    """

    uninitialized: Tensor
    derived_buffers = ("gradient_enabled", "uninitialized")
    observing_flags = ("observer_enabled", "uninitialized")
    _initial_gradient = 0

    def __init__(
        self,
        observer: Any,
        quant_min: int = 0,
        quant_max: int = 255,
        use_grad_scaling: bool = False,
        *,
        channel_len: int = -1,
        grad_factor: float | None = None,
        grad_scale_elements: str = "tensor",
        grad_mask: str = "rounded",
        **observer_kwargs: Any,
    ) -> None:
        stock_learnable.LearnableFakeQuantize.__init__(
            self, observer, quant_min, quant_max, use_grad_scaling, **observer_kwargs
        )
        self._init_core()
        self._init_options(grad_factor, grad_scale_elements, grad_mask)
        self._check_channel_len(channel_len)
        if channel_len > 0:
            self.give_channels(channel_len)

    def _init_core(self) -> None:
        device = self.eps.device
        virgin = self.scale is None
        if virgin:
            wants = not self.learning_enabled.is_meta and bool(self.learning_enabled.item())
            self.scale = nn.Parameter(torch.ones(1, device=device), requires_grad=wants)
            self.zero_point = nn.Parameter(torch.zeros(1, device=device), requires_grad=wants)
        # Set until the first batch, which is observed whatever the flags say, as in torchao.
        self.register_buffer("uninitialized", torch.tensor([virgin], dtype=torch.uint8, device=device), False)
        super()._init_core()

    @property
    def _observing(self) -> Tensor:
        return torch.maximum(self.observer_enabled, self.uninitialized)

    @property
    def _observing_switch(self) -> Tensor:
        return self.observer_enabled

    def _qparams(self, X: Tensor) -> tuple[Tensor, Tensor]:
        qparams = super()._qparams(X)
        if X.numel() > 0:
            self.uninitialized.zero_()
        return qparams

    def enable_range_learning(self) -> None:
        """Learn scale and zero point; stop observing."""
        self._set_learning(True)
        self._set_observing(False)

    def disable_range_learning(self) -> None:
        """Stop learning scale and zero point."""
        self._set_learning(False)

    def enable_observer(self, enabled: bool = True) -> None:
        """Switch observation on or off, in place; on ends learning."""
        self._set_observing(enabled)
        if enabled:
            self._set_learning(False)

    def disable_observer(self) -> None:
        """Switch observation off, in place."""
        self.enable_observer(False)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        virgin = not any(prefix + name in state_dict for name in ("scale", "zero_point"))
        if virgin:  # saved by torchao before the first batch
            for name in ("scale", "zero_point"):
                state_dict[prefix + name] = getattr(self, name).detach()
        fresh = self.uninitialized.clone()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.uninitialized.fill_(int(virgin))
        # A fresh module makes its Parameters as learning_enabled says; others keep what they were told.
        self.gradient_enabled.copy_(torch.where(fresh.bool(), self.learning_enabled, self.gradient_enabled))

    def reset_parameters(self) -> None:
        """Give every Parameter and buffer the value it has in a fresh module: after `to_empty()`, or meta."""
        super().reset_parameters()
        self.uninitialized.fill_(1)

    def before_unswap(self) -> None:
        """Give the state that a stock module would have."""
        super().before_unswap()
        self._initialized = not self.uninitialized.item()
        if not self._initialized:
            del self.scale, self.zero_point
            self.scale = self.zero_point = None  # type: ignore[assignment]  # as torchao's are then


def __getattr__(name: str) -> Any:
    """The factories of torchao (`default_fake_quant`, `default_weight_observer`, ...), built from our classes."""
    for library in (stock, stock_observer):
        if name in library.__all__ and name.startswith(("default_", "weight_", "per_channel_", "fused_")):
            return counterpart(getattr(library, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
