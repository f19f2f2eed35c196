"""What the histogram observers do, independent of whose base classes they stand on; see observer_core.py."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.modules.observer_core import given
from qkernels.modules.stock import is_stock
from qkernels.ops import (
    merge_histograms,
    observe_histogram_,
    search_histogram_qparams,
    search_histogram_range,
    update_qparams_from_histogram_,
)
from qkernels.ops.checks import check_axis
from qkernels.ops.qparams import choose_qparams_by_rule
from qkernels.ops.qparams_rules import rule_of, symmetric_zero_point_of

# torch.ao's words, its line break and indentation included.
_NOT_OBSERVED = (
    "must run observer before calling calculate_qparams.                                    "
    "Returning default scale and zero point "
)
_OTHER_BINS = (
    "The number of bins in histogram should be equal to the number of bins supplied while making this observer"
)
_EMPTY_RANGE = (("min_val", float("inf")), ("max_val", float("-inf")))


def _belongs(lost: Tensor, histogram: Tensor) -> bool:
    """Whether a remainder fits a histogram: `half()` casts both, and users assign histograms."""
    return (
        lost.dtype == histogram.dtype == torch.float32
        and lost.shape == histogram.shape
        and lost.device == histogram.device
    )


class HistogramCore(nn.Module):
    """A running histogram over the running range, and the search for the range to quantize in.

    The stock class in front of which this stands provides `histogram`, `min_val`, `max_val`, `eps`, `bins`,
    `upsample_rate`, `dst_nbins`, `quant_min`, `quant_max`, `dtype`, `qscheme` and `has_customized_qrange`.
    """

    histogram: Tensor
    min_val: Tensor
    max_val: Tensor
    eps: Tensor
    histogram_remainder: Tensor
    bins: int
    upsample_rate: int
    dst_nbins: int
    dtype: torch.dtype
    qscheme: torch.qscheme
    quant_min: int
    quant_max: int
    has_customized_qrange: bool
    frozen: bool = False  # True once `qkernels.freeze` has made an identity of the observer
    runs_core: bool = True  # False for a subclass with a forward or calculate_qparams of its own
    own_search: bool = False  # True for a subclass with a _non_linear_param_search of its own
    own_rule: bool = False  # True for a subclass with a _calculate_qparams of its own
    checks_found: bool = False  # True for a face that refuses ranges
    observed_axis: int | None = None  # channel axis of the statistics; None is per tensor
    derived_buffers = ("histogram_remainder",)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = cls.forward, cls.calculate_qparams
        cls.runs_core = own == (HistogramCore.forward, HistogramCore.calculate_qparams)
        cls.own_search = cls._non_linear_param_search is not HistogramCore._non_linear_param_search
        rule = next((c for c in cls.__mro__ if "_calculate_qparams" in vars(c)), None)
        cls.own_rule = rule is not None and not is_stock(rule)
        cls.checks_found = cls._check_found is not HistogramCore._check_found

    def _init_core(self, eps: float | None = None) -> None:
        """Derive what forward needs. Called after the stock constructor, and when a stock observer is swapped.

        Args:
            eps: what the constructor was given; None reads it from the buffer, which `reset_parameters` restores.
        """
        self._initial_eps = given(self.eps) if eps is None else eps
        self.qparams_rule = rule_of(self.qscheme)
        self.symmetric_zero_point = symmetric_zero_point_of(
            self.dtype, self.quant_min, self.quant_max, self.has_customized_qrange
        )
        # What the float32 histogram cannot hold of bins above 2**24. Not saved: half a unit in the last place at most.
        self.register_buffer("histogram_remainder", torch.zeros_like(self.histogram, dtype=torch.float32), False)

    def forward(self, x_orig: Tensor) -> Tensor:
        """Fold `x_orig` into the histogram and return it unchanged. An empty input leaves the state as it is."""
        if self.frozen or x_orig.numel() == 0:
            return x_orig
        self.observe_(x_orig)
        return x_orig

    def observe_(self, x: Tensor, enabled: Tensor | None = None) -> None:
        """Fold a batch into the state, where the device flag `enabled` is set (or None)."""
        x = x.detach()
        axis = self.observed_axis
        if axis is not None:
            self.prepare_state(x)
        histogram, lost = self.histogram, self.histogram_remainder
        usable = lost if _belongs(lost, histogram) else None
        observe_histogram_(x, histogram, self.min_val, self.max_val, usable, self.upsample_rate, axis, enabled)

    def prepare_state(self, x: Tensor) -> None:
        """Give per-channel state one row per channel of x, at the first batch."""

    def searched_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the range that the search finds; nothing is read on the host of a GPU."""
        if self._has_own_steps():
            return self._qparams_of(*self._non_linear_param_search())
        return search_histogram_qparams(self.histogram, self.min_val, self.max_val, **self._how())

    def _has_own_steps(self) -> bool:
        """Whether the search or the rule is a user's: then each is called, where ours are one operator."""
        return self.own_search or self._rule_is_own() or "_non_linear_param_search" in self.__dict__

    def _rule_is_own(self) -> bool:
        return self.own_rule or "_calculate_qparams" in self.__dict__

    def _how(self) -> dict[str, Any]:
        """Arguments of the search for qparams."""
        return {
            "quant_bins": self.dst_nbins,
            "quant_min": self.quant_min,
            "quant_max": self.quant_max,
            "rule": self.qparams_rule,
            "symmetric_zero_point": self.symmetric_zero_point,
            "eps": self.eps,
        }

    def _qparams_of(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        if self._rule_is_own():
            own: Any = self
            scale, zero_point = own._calculate_qparams(low, high)
            return scale, zero_point
        return choose_qparams_by_rule(
            low, high, self.quant_min, self.quant_max, self.qparams_rule, self.symmetric_zero_point, self.eps
        )

    def _check_found(self, low: Tensor, high: Tensor) -> None:
        """Refuse what the search found, for want of order; torch.ao refuses nothing here.

        Eager calls ask a face that has one, and take two launches to do so: the range has to be there.
        """

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the range that quantizes what was seen with the least squared error.

        Returns:
            (scale, zero_point), shape (1,) or (C,). Before the first batch: 1 and 0, with a warning. Eager calls read
            one flag on the host to find that out; compiled calls do not, and give 1 and 0 without a warning.

        Raises:
            AssertionError: the histogram does not have `bins` bins, as torch.ao raises it.
        """
        if not torch.compiler.is_compiling() and not self._observed():
            warnings.warn(_NOT_OBSERVED, stacklevel=2)
            device = self.min_val.device
            return torch.tensor([1.0], device=device), torch.tensor([0], device=device)
        if self.bins != self.histogram.shape[-1]:
            raise AssertionError(_OTHER_BINS)
        if torch.compiler.is_compiling() or not self.checks_found:
            return self.searched_qparams()
        low, high = self._non_linear_param_search()
        self._check_found(low, high)
        return self._qparams_of(low, high)

    def _observed(self) -> bool:
        if self.min_val.numel() == 1:
            return not (self.min_val.item() == float("inf") and self.max_val.item() == float("-inf"))
        if self.min_val.numel() == 0:
            return False
        return not bool(((self.min_val == float("inf")) & (self.max_val == float("-inf"))).all())

    def _non_linear_param_search(self) -> tuple[Tensor, Tensor]:
        """(min, max) that the search finds, 0-dim or (C,)."""
        return search_histogram_range(self.histogram, self.min_val, self.max_val, self.dst_nbins)

    def renew_qparams_(self, x: Tensor, scale: Tensor, zero_point: Tensor, enabled: Tensor) -> tuple[Tensor, Tensor]:
        """Observe x and write scale and zero point, both where the device flag is set: a fake quantizer's step.

        Returns:
            Copies of scale and zero point.
        """
        self.observe_(x, enabled)
        if not self._has_own_steps():
            state = (self.histogram, self.min_val, self.max_val)
            return update_qparams_from_histogram_(*state, scale, zero_point, **self._how(), enabled=enabled)
        on = enabled.reshape(()).to(torch.bool)
        for buffer, value in zip((scale, zero_point), self.searched_qparams(), strict=True):
            buffer.copy_(torch.where(on, value.to(buffer.dtype), buffer))
        return scale.clone(), zero_point.clone()

    def merge_(self, *others: HistogramCore) -> None:
        """Take in what other observers saw, in place: mass and range are exact, see `qkernels.ops.merge_histograms`.

        Args:
            others: observers with as many bins (and channels), on any device.

        Raises:
            ValueError: one has another shape. Nothing was changed.
        """
        for other in others:
            if other.histogram.shape != self.histogram.shape:
                raise ValueError(
                    f"{type(self).__name__}.merge_: every histogram must have shape {tuple(self.histogram.shape)}; "
                    f"got {tuple(other.histogram.shape)}"
                )
        rows = zip(*(observer._rows(self.histogram.device) for observer in (self, *others)), strict=True)
        for channel, row in enumerate(rows):
            histograms, lows, highs = (torch.stack(values) for values in zip(*row, strict=True))
            merged, low, high = merge_histograms(histograms, lows, highs, self.upsample_rate)
            mine = self.histogram.view(-1, self.bins)[channel]
            mine.copy_(merged)
            lost = self.histogram_remainder.view(-1, self.bins)[channel]
            lost.copy_(torch.where(merged >= 2.0**24, merged - mine.double(), 0.0))
            self.min_val.view(-1)[channel] = low
            self.max_val.view(-1)[channel] = high

    def _rows(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(histogram with its remainder in float64, min, max) of every channel."""
        exact = self.histogram.double()
        if _belongs(self.histogram_remainder, self.histogram):
            exact = exact + self.histogram_remainder
        yield from zip(
            exact.to(device).view(-1, self.bins),
            self.min_val.to(device).view(-1),
            self.max_val.to(device).view(-1),
            strict=True,
        )

    def forget_counts(self) -> None:
        """Empty the histogram, in place, and keep the range.

        For an exact calibration in two passes: observe everything, forget the counts, observe everything again. In the
        second pass the range does not grow, so no bin is ever cut up, and the counts are integers. The histograms of
        processes that agree on the range in between (all_reduce of `min_val` and `max_val`) add up to that of one.
        """
        self.histogram.zero_()
        self.histogram_remainder.zero_()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.histogram_remainder = torch.zeros_like(self.histogram, dtype=torch.float32)

    def reset_parameters(self) -> None:
        """Give every buffer the value it has in a fresh observer: after `to_empty()`, or meta initialisation."""
        self.eps.fill_(self._initial_eps)
        self.histogram.zero_()
        self.histogram_remainder.zero_()
        for name, value in _EMPTY_RANGE:
            getattr(self, name).fill_(value)


class PerChannelHistogramCore(HistogramCore):
    """A histogram and range per channel. The state has no rows before the first batch, then C."""

    ch_axis: int

    def _init_core(self, eps: float | None = None) -> None:
        self.observed_axis = self.ch_axis
        super()._init_core(eps)

    def prepare_state(self, x: Tensor) -> None:
        """Give the state one row per channel of x, at the first batch."""
        axis = check_axis(type(self).__name__, x, self.ch_axis)
        if axis is not None and self.min_val.numel() == 0:
            self._give_rows(x.shape[axis])

    def _give_rows(self, channels: int) -> None:
        """Forget everything, in state of so many channels."""
        for name, value in _EMPTY_RANGE:
            self._replace(name, (channels,), value)
        self._replace("histogram", (channels, self.bins), 0.0)
        self._replace("histogram_remainder", (channels, self.bins), 0.0)

    def _replace(self, name: str, shape: tuple[int, ...], fill: float) -> None:
        buffer = getattr(self, name)
        if torch.compiler.is_compiling():  # a compiled graph cannot keep the object, see observer_core.give_shape
            setattr(self, name, buffer.new_full(shape, fill))
            return
        with torch.inference_mode(False):
            buffer.data = buffer.new_full(shape, fill)

    def reset_min_max_vals(self) -> None:
        """Forget everything seen, the number of channels too."""
        self._give_rows(0)

    def reset_parameters(self) -> None:
        """Give every buffer the value it has in a fresh observer: after `to_empty()`, or meta initialisation."""
        self.eps.fill_(self._initial_eps)
        self._give_rows(0)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        saved = state_dict.get(f"{prefix}histogram")
        if saved is not None and saved.ndim == 2 and saved.shape[1] == self.bins:
            self._give_rows(saved.shape[0])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
