"""Histogram observers with torch.ao's names, constructors, buffers and state_dicts, on torch.ao's base classes."""

# The misc errors ignored below: stock classes narrow calculate_qparams(**kwargs) of their base, as these do.
from __future__ import annotations

from typing import Any

import torch
from torch.ao.quantization import observer as stock

from qkernels.modules.histogram_core import HistogramCore, PerChannelHistogramCore

_EPS = torch.finfo(torch.float32).eps


class HistogramObserver(HistogramCore, stock.HistogramObserver):  # type: ignore[misc]  # see minmax.py
    """Observer of a running histogram; its qparams minimize the squared error of quantization.

    Takes the place of `torch.ao.quantization.HistogramObserver`: equal constructor, buffers, state_dict, qparams and
    repr. Differs in what runs: three launches per batch on a GPU and no host sync, one launch for the qparams,
    `torch.compile(fullgraph=True)`. NaN is left out as infinities are; torch.ao raises. Bins count on beyond 2**24.

    Args:
        bins: number of bins, at least 2; at most 8192 on a GPU.
        dtype: quantized dtype, as `torch.quint8`.
        qscheme: `torch.per_tensor_affine` or `torch.per_tensor_symmetric`.
        reduce_range: halve the range of codes.
        quant_min: smallest code; the dtype's if None.
        quant_max: largest code; the dtype's if None.
        factory_kwargs: device and dtype of the buffers.
        eps: smallest scale.
        is_dynamic: not supported.
        **kwargs: passed to the stock base class.

    Raises:
        NotImplementedError: the qscheme is per channel, or is_dynamic.
        TypeError: the dtype is no integer one.
        AssertionError: the dtype or the quantization range is not allowed.

    Reference:
        torch/ao/quantization/observer.py, torch 2.13.
    """

    def __init__(
        self,
        bins: int = 2048,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme = torch.per_tensor_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        factory_kwargs: dict[str, Any] | None = None,
        eps: float = _EPS,
        is_dynamic: bool = False,
        **kwargs: Any,
    ) -> None:
        stock.HistogramObserver.__init__(
            self, bins, dtype, qscheme, reduce_range, quant_min, quant_max, factory_kwargs, eps, is_dynamic, **kwargs
        )
        self._init_core(eps)


class PerChannelHistogramObserver(PerChannelHistogramCore, stock.UniformQuantizationObserverBase):  # type: ignore[misc]  # see minmax.py
    """Observer of a running histogram per channel; the qparams of each minimize its squared error.

    torch.ao has none. Every channel is a `HistogramObserver` of its own, with the same numbers.

    Args:
        bins: number of bins of a channel, at least 2; at most 8192 on a GPU.
        ch_axis: channel axis, negative allowed.
        dtype: quantized dtype.
        qscheme: `torch.per_channel_affine` or `torch.per_channel_symmetric`.
        reduce_range: halve the range of codes.
        quant_min: smallest code; the dtype's if None.
        quant_max: largest code; the dtype's if None.
        factory_kwargs: device and dtype of the buffers.
        eps: smallest scale.
        is_dynamic: not supported.
        **kwargs: passed to the stock base class.

    Raises:
        NotImplementedError: the qscheme is per tensor or has float qparams, or is_dynamic.
        TypeError: the dtype is no integer one.
        AssertionError: the dtype or the quantization range is not allowed.

    Attributes:
        histogram: shape (C, bins), (0, bins) before the first batch.
        min_val: shape (C,).
        max_val: shape (C,).
    """

    def __init__(
        self,
        bins: int = 2048,
        ch_axis: int = 0,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme = torch.per_channel_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        factory_kwargs: dict[str, Any] | None = None,
        eps: float = _EPS,
        is_dynamic: bool = False,
        **kwargs: Any,
    ) -> None:
        if qscheme not in (torch.per_channel_affine, torch.per_channel_symmetric):
            raise NotImplementedError(
                "PerChannelHistogramObserver: qscheme must be per_channel_affine or per_channel_symmetric; "
                f"got {qscheme}"
            )
        if is_dynamic:
            raise NotImplementedError("PerChannelHistogramObserver: is_dynamic must be False; got True")
        super().__init__(
            dtype=dtype,
            qscheme=qscheme,
            reduce_range=reduce_range,
            quant_min=quant_min,
            quant_max=quant_max,
            factory_kwargs=factory_kwargs,
            eps=eps,
            is_dynamic=is_dynamic,
            **kwargs,
        )
        made = torch.nn.factory_kwargs(factory_kwargs)
        self.bins = bins
        self.ch_axis = ch_axis
        self.dst_nbins = 2 ** torch.iinfo(dtype).bits
        self.upsample_rate = 16
        self.register_buffer("histogram", torch.zeros(0, bins, **made))
        self.register_buffer("min_val", torch.zeros(0, **made))
        self.register_buffer("max_val", torch.zeros(0, **made))
        self._init_core(eps)

    def extra_repr(self) -> str:
        """The ranges."""
        return f"min_val={self.min_val}, max_val={self.max_val}"
