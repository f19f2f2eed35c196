"""Fake quantizers with torch.ao's names, constructors, buffers and state_dicts, on torch.ao's base classes."""

# The misc errors ignored below: stock classes narrow calculate_qparams(**kwargs) of their base, as these do.
from __future__ import annotations

from typing import Any

from torch.ao.quantization import fake_quantize as stock

from qkernels.modules.fake_quant_core import FakeQuantizeCore, FusedMovingAvgCore
from qkernels.modules.fixed_qparams_core import FixedQParamsCore
from qkernels.modules.minmax import MovingAverageMinMaxObserver
from qkernels.modules.simple_observers import FixedQParamsObserver


class FakeQuantize(FakeQuantizeCore, stock.FakeQuantize):  # type: ignore[misc]
    """Observe a tensor and simulate its quantization in training.

    Takes the place of `torch.ao.quantization.FakeQuantize`: equal constructor, buffers, state_dict, qparams, output
    and repr. Differs in what runs: two launches per batch on a GPU, no host sync, `torch.compile(fullgraph=True)`,
    nothing saved for the backward but x and the qparams; and in special values, where NaN stays NaN and infinities
    saturate (`qkernels.ops.fake_quantize`). A flag toggled between a forward and its backward makes autograd raise.
    Observers that are not from qkernels, or override its forward or calculate_qparams, work the stock way.

    Args:
        observer: observer class or factory.
        quant_min: smallest code; the observer's if None.
        quant_max: largest code; the observer's if None.
        is_dynamic: whether this stands for dynamic quantization.
        **observer_kwargs: arguments of the observer.

    Raises:
        AssertionError: the range is empty or does not fit the dtype.

    Reference:
        torch/ao/quantization/fake_quantize.py, torch 2.13.
    """

    def __init__(
        self,
        observer: Any = MovingAverageMinMaxObserver,
        quant_min: int | None = None,
        quant_max: int | None = None,
        is_dynamic: bool = False,
        **observer_kwargs: Any,
    ) -> None:
        stock.FakeQuantize.__init__(self, observer, quant_min, quant_max, is_dynamic, **observer_kwargs)


class FusedMovingAvgObsFakeQuantize(FusedMovingAvgCore, FakeQuantize, stock.FusedMovingAvgObsFakeQuantize):  # type: ignore[misc]
    """FakeQuantize with a moving-average min/max observer and the arithmetic of torch's fused operator.

    Takes the place of `torch.ao.quantization.FusedMovingAvgObsFakeQuantize`. Any channel axis and float dtype works,
    where torch's CPU operator takes axis 0 and float32 alone.

    torch's fused operator chooses other qparams for symmetric schemes than its own observer does, so a model trains
    with one scale and is converted with another. Equality with torch is the default here; with consistent_qparams
    training uses what `calculate_qparams` gives at conversion.

    Args:
        observer: a moving-average min/max observer, class or factory.
        quant_min: smallest code.
        quant_max: largest code.
        consistent_qparams: choose qparams by the observer's rule in training too.
        **observer_kwargs: arguments of the observer.

    Raises:
        AssertionError: the range does not fit the dtype, or the observer does not keep a moving average.

    Reference:
        torch/ao/quantization/fake_quantize.py and aten/src/ATen/native/quantized/cpu/fused_obs_fake_quant.cpp,
        torch 2.13.
    """

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


class FixedQParamsFakeQuantize(FixedQParamsCore, FakeQuantize, stock.FixedQParamsFakeQuantize):  # type: ignore[misc]
    """Simulate quantization with given qparams, as those of a sigmoid's output. Per tensor.

    Takes the place of `torch.ao.quantization.FixedQParamsFakeQuantize`.

    Args:
        observer: class or factory of a FixedQParamsObserver, ours or torch.ao's.

    Raises:
        AssertionError: the observer is another one, or its qscheme is not per tensor.
    """

    def __init__(self, observer: Any) -> None:
        FakeQuantize.__init__(self, observer=observer)
        self._init_fixed(observer, stock.FixedQParamsObserver, FixedQParamsObserver)
