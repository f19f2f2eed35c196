"""Min/max observers with torch.ao's names, constructors, buffers and state_dicts, on torch.ao's base classes."""

# The misc errors ignored below: stock classes narrow calculate_qparams(**kwargs) of their base, as these do.
from __future__ import annotations

from typing import Any

import torch
from torch.ao.quantization import observer as stock

from qkernels.modules.observer_core import MinMaxCore, PerChannelMinMaxCore

_EPS = torch.finfo(torch.float32).eps


class MinMaxObserver(MinMaxCore, stock.MinMaxObserver):  # type: ignore[misc]
    """Observer of the smallest and largest value seen.

    Takes the place of `torch.ao.quantization.MinMaxObserver`: equal constructor, buffers, state_dict, qparams and
    repr. Differs in what runs: one launch per batch on a GPU, no host sync, `torch.compile(fullgraph=True)`.

    Args:
        dtype: quantized dtype, as `torch.quint8`.
        qscheme: `torch.per_tensor_affine` or `torch.per_tensor_symmetric`.
        reduce_range: halve the range of codes.
        quant_min: smallest code; the dtype's if None.
        quant_max: largest code; the dtype's if None.
        factory_kwargs: device and dtype of the buffers.
        eps: smallest scale.
        is_dynamic: whether the observer stands for dynamic quantization.
        memoryless: whether every batch forgets the earlier ones, as in torch.ao 1.12: dynamic quantization in QAT.
        **kwargs: passed to the stock base class.

    Raises:
        NotImplementedError: the qscheme is per channel, or quint8 is symmetric with reduce_range.
        AssertionError: the dtype or the quantization range is not allowed.

    Reference:
        torch/ao/quantization/observer.py, torch 2.13.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme = torch.per_tensor_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        factory_kwargs: dict[str, Any] | None = None,
        eps: float = _EPS,
        is_dynamic: bool = False,
        *,
        memoryless: bool = False,
        **kwargs: Any,
    ) -> None:
        stock.MinMaxObserver.__init__(
            self, dtype, qscheme, reduce_range, quant_min, quant_max, factory_kwargs, eps, is_dynamic, **kwargs
        )
        self._init_core(eps)
        self.memoryless = memoryless


class MovingAverageMinMaxObserver(MinMaxObserver, stock.MovingAverageMinMaxObserver):  # type: ignore[misc]
    """Observer of moving averages of each batch's smallest and largest value.

    Takes the place of `torch.ao.quantization.MovingAverageMinMaxObserver`; see `MinMaxObserver`.

    Args:
        averaging_constant: weight c of a new batch, v + c * (batch - v).
        dtype: quantized dtype.
        qscheme: `torch.per_tensor_affine` or `torch.per_tensor_symmetric`.
        reduce_range: halve the range of codes.
        quant_min: smallest code; the dtype's if None.
        quant_max: largest code; the dtype's if None.
        eps: smallest scale.
        is_dynamic: whether the observer stands for dynamic quantization; needs averaging_constant 1.
        **kwargs: passed to `MinMaxObserver`.

    Raises:
        NotImplementedError: the qscheme is per channel, or is_dynamic with another averaging_constant.
        AssertionError: the dtype or the quantization range is not allowed.
    """

    def __init__(
        self,
        averaging_constant: float = 0.01,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme = torch.per_tensor_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        eps: float = _EPS,
        is_dynamic: bool = False,
        **kwargs: Any,
    ) -> None:
        stock.MovingAverageMinMaxObserver.__init__(
            self, averaging_constant, dtype, qscheme, reduce_range, quant_min, quant_max, eps, is_dynamic, **kwargs
        )
        self._init_core(eps)


class PerChannelMinMaxObserver(PerChannelMinMaxCore, stock.PerChannelMinMaxObserver):  # type: ignore[misc]
    """Observer of the smallest and largest value seen in each channel.

    Takes the place of `torch.ao.quantization.PerChannelMinMaxObserver`; see `MinMaxObserver`. Any channel axis and
    memory layout is read in place: nothing is permuted or copied.

    Args:
        ch_axis: channel axis, negative allowed.
        dtype: quantized dtype.
        qscheme: `torch.per_channel_affine`, `torch.per_channel_symmetric` or
            `torch.per_channel_affine_float_qparams`.
        reduce_range: halve the range of codes.
        quant_min: smallest code; the dtype's if None.
        quant_max: largest code; the dtype's if None.
        factory_kwargs: device and dtype of the buffers.
        eps: smallest scale.
        is_dynamic: not supported per channel.
        memoryless: whether every batch forgets the earlier ones, as in torch.ao 1.12: dynamic quantization in QAT.
        **kwargs: passed to the stock base class.

    Raises:
        NotImplementedError: the qscheme is per tensor, or is_dynamic.
        AssertionError: the dtype or the quantization range is not allowed.
    """

    def __init__(
        self,
        ch_axis: int = 0,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme = torch.per_channel_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        factory_kwargs: dict[str, Any] | None = None,
        eps: float = _EPS,
        is_dynamic: bool = False,
        *,
        memoryless: bool = False,
        **kwargs: Any,
    ) -> None:
        stock.PerChannelMinMaxObserver.__init__(
            self, ch_axis, dtype, qscheme, reduce_range, quant_min, quant_max, factory_kwargs, eps, is_dynamic, **kwargs
        )
        self._init_core(eps)
        self.memoryless = memoryless


class MovingAveragePerChannelMinMaxObserver(PerChannelMinMaxObserver, stock.MovingAveragePerChannelMinMaxObserver):  # type: ignore[misc]
    """Observer of moving averages of each batch's smallest and largest value in each channel.

    Takes the place of `torch.ao.quantization.MovingAveragePerChannelMinMaxObserver`; see `PerChannelMinMaxObserver`.

    Args:
        averaging_constant: weight c of a new batch, v + c * (batch - v).
        ch_axis: channel axis, negative allowed.
        dtype: quantized dtype.
        qscheme: a per-channel one.
        reduce_range: halve the range of codes.
        quant_min: smallest code; the dtype's if None.
        quant_max: largest code; the dtype's if None.
        eps: smallest scale.
        is_dynamic: not supported per channel.
        **kwargs: passed to `PerChannelMinMaxObserver`.

    Raises:
        NotImplementedError: the qscheme is per tensor, or is_dynamic.
        AssertionError: the dtype or the quantization range is not allowed.
    """

    def __init__(
        self,
        averaging_constant: float = 0.01,
        ch_axis: int = 0,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme = torch.per_channel_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        eps: float = _EPS,
        is_dynamic: bool = False,
        **kwargs: Any,
    ) -> None:
        stock.MovingAveragePerChannelMinMaxObserver.__init__(
            self, averaging_constant, ch_axis, dtype, qscheme, reduce_range, quant_min, quant_max, eps, is_dynamic,
            **kwargs,
        )  # fmt: skip
        self._init_core(eps)
