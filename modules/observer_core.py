"""What the min/max observers do, independent of whose base classes they stand on.

torch.ao and torchao have unrelated base classes, and each prepare/convert flow checks for its own. So the behaviour
lives in the mixins here, and thin faces (`qkernels.modules.minmax`) put them in front of a stock class: constructor,
persistent buffers, state_dict and repr come from the stock class, everything that runs in `forward` from here.
Dynamo skips code defined in torch.ao, so one inherited call on that path would break the graph.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.ops import observe_minmax_
from qkernels.ops.checks import check_axis
from qkernels.ops.qparams import choose_qparams_by_rule
from qkernels.ops.qparams_rules import rule_of, symmetric_zero_point_of

_NOT_OBSERVED = "must run observer before calling calculate_qparams. Returning default values."


def give_shape(module: nn.Module, name: str, elements: int, fill: float) -> None:
    """Replace the contents of a buffer by `elements` copies of `fill`.

    Eager calls keep the buffer object, which DDP and others may hold. A compiled graph cannot: resize_ and set_ break
    it, and mutating what .data was assigned is refused, so there the attribute is bound to a new tensor.
    """
    buffer = getattr(module, name)
    if torch.compiler.is_compiling():
        setattr(module, name, buffer.new_full((elements,), fill))
        return
    with torch.inference_mode(False):  # calibrating in inference mode must not make the buffer an inference tensor
        buffer.data = buffer.new_full((elements,), fill)


def shape_statistics(observer: Any, x: Tensor, axis: int | None) -> None:
    """Give an observer's `min_val` and `max_val` one element per channel of x, if they have none yet.

    Raises:
        ValueError: x has no such axis.
    """
    axis = check_axis(type(observer).__name__, x, axis)
    if axis is not None and (observer.min_val.numel() == 0 or observer.max_val.numel() == 0):
        give_shape(observer, "min_val", x.shape[axis], float("inf"))
        give_shape(observer, "max_val", x.shape[axis], float("-inf"))


class MinMaxCore(nn.Module):
    """Running min and max over everything, as MinMaxObserver and MovingAverageMinMaxObserver keep them.

    The stock class in front of which this stands provides `min_val`, `max_val`, `eps`, `quant_min`, `quant_max`,
    `dtype`, `qscheme` and `has_customized_qrange`.
    """

    min_val: Tensor
    max_val: Tensor
    eps: Tensor
    dtype: torch.dtype
    qscheme: torch.qscheme
    quant_min: int
    quant_max: int
    has_customized_qrange: bool
    workspace: Tensor
    runs_core: bool = True  # False for a subclass with a forward or calculate_qparams of its own
    averaging_constant: float | None = None  # weight of a new batch; None keeps the extremes of all batches
    observed_axis: int | None = None  # channel axis of the statistics; None is per tensor

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.runs_core = cls.forward is MinMaxCore.forward and cls.calculate_qparams is MinMaxCore.calculate_qparams

    def _init_core(self) -> None:
        """Derive what forward needs. Called by a face after the stock constructor."""
        self.qparams_rule = rule_of(self.qscheme)
        self.symmetric_zero_point = symmetric_zero_point_of(
            self.dtype, self.quant_min, self.quant_max, self.has_customized_qrange
        )
        # Arrival counter of the kernel: 0 between launches. Owned by this observer, so that two streams, or a
        # replayed CUDA graph and eager work, never count on the same one.
        self.register_buffer("workspace", torch.zeros(1, dtype=torch.int32, device=self.min_val.device), False)

    def prepare_state(self, x: Tensor) -> None:
        """Give per-channel statistics one element per channel of x, at the first batch."""
        shape_statistics(self, x, self.observed_axis)

    def forward(self, x_orig: Tensor) -> Tensor:
        """Record the min and max of `x_orig` and return it unchanged. An empty input leaves the state as it is.

        Integer input is converted to the dtype of the statistics first, as in torch.ao.
        """
        if x_orig.numel() == 0:
            return x_orig
        x = x_orig.detach()
        if not x.is_floating_point():
            if x.is_complex():
                raise TypeError(f"{type(self).__name__}: x must be real; got {x.dtype}")
            x = x.to(self.min_val.dtype)
        self.prepare_state(x)
        observe_minmax_(
            x, self.min_val, self.max_val, self.averaging_constant, self.observed_axis, None, self.workspace
        )
        return x_orig

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point for the range seen so far.

        Returns:
            (scale, zero_point), shape (1,) or (C,). Before the first batch: 1 and 0, with a warning. Eager calls read
            one flag on the host to find that out; compiled calls do not, and give 1 and 0 without a warning.

        Raises:
            AssertionError: min exceeds max, as torch.ao raises it.
        """
        if not torch.compiler.is_compiling() and not self._observed():
            warnings.warn(_NOT_OBSERVED, stacklevel=2)
            device = self.min_val.device
            return torch.tensor([1.0], device=device), torch.tensor([0], device=device)
        return choose_qparams_by_rule(
            self.min_val,
            self.max_val,
            self.quant_min,
            self.quant_max,
            self.qparams_rule,
            self.symmetric_zero_point,
            self.eps,
        )

    def _observed(self) -> bool:
        low, high = self.min_val, self.max_val
        if low.numel() == 0 or high.numel() == 0:
            return False
        if not torch.any(low > high):
            return True
        if low.ndim == 0 and low == float("inf") and high == float("-inf"):
            return False
        raise AssertionError(f"min {low} should be less than max {high}")

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.workspace.zero_()  # a launch that was killed, or to_empty, may have left anything
        super()._load_from_state_dict(*args, **kwargs)

    def reset_min_max_vals(self) -> None:
        """Forget everything seen, in place."""
        self.min_val.fill_(float("inf"))
        self.max_val.fill_(float("-inf"))
        self.workspace.zero_()


class PerChannelMinMaxCore(MinMaxCore):
    """Running min and max per channel. The statistics have no elements before the first batch, then C."""

    ch_axis: int

    def _init_core(self) -> None:
        super()._init_core()
        self.observed_axis = self.ch_axis

    def reset_min_max_vals(self) -> None:
        """Forget everything seen, the number of channels too."""
        give_shape(self, "min_val", 0, float("inf"))
        give_shape(self, "max_val", 0, float("-inf"))
        self.workspace.zero_()
