"""The same observers and fake quantizers on torchao's base classes, for its PT2E flow. Needs torchao.

torchao's classes have the constructors, buffers and numbers of torch.ao's under other base classes, which its
prepare_pt2e and convert_pt2e ask for. Two things differ and are kept: a NaN in the statistics makes
`calculate_qparams` raise, and `with_args` gives torchao's partial wrapper.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

try:
    from torchao.quantization.pt2e import fake_quantize as stock
    from torchao.quantization.pt2e import observer as stock_observer
except ImportError as error:
    raise ImportError("qkernels.modules.pt2e needs torchao: pip install 'qkernels[torchao]'") from error

from qkernels.modules.factories import counterpart
from qkernels.modules.fake_quant_core import FakeQuantizeCore, FixedQParamsCore, FusedMovingAvgCore
from qkernels.modules.observer_core import MinMaxCore, PerChannelMinMaxCore, StockConstructor
from qkernels.modules.simple_observers import FixedQParamsCore as FixedQParamsObserverCore
from qkernels.modules.simple_observers import PassThroughCore, RecordingCore

disable_fake_quant = stock.disable_fake_quant
disable_observer = stock.disable_observer
enable_fake_quant = stock.enable_fake_quant
enable_observer = stock.enable_observer
get_observer_state_dict = stock_observer.get_observer_state_dict
load_observer_state_dict = stock_observer.load_observer_state_dict

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
        observed: bool = super()._observed()  # type: ignore[misc]
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


def __getattr__(name: str) -> Any:
    """The factories of torchao (`default_fake_quant`, `default_weight_observer`, ...), built from our classes."""
    for library in (stock, stock_observer):
        if name in library.__all__ and name.startswith(("default_", "weight_", "per_channel_", "fused_")):
            return counterpart(getattr(library, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
