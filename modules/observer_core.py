"""What the min/max observers do, independent of whose base classes they stand on.

torch.ao and torchao have unrelated base classes, and each prepare/convert flow checks for its own. So the behaviour
lives in the mixins here, and thin faces (`qkernels.modules.minmax`) put them in front of a stock class: constructor,
persistent buffers, state_dict and repr come from the stock class, everything that runs in `forward` from here.
Dynamo skips code defined in torch.ao, so one inherited call on that path would break the graph.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.modules.stock import is_stock
from qkernels.ops import observe_minmax_
from qkernels.ops.checks import check_axis
from qkernels.ops.minmax import new_workspace, renewed_workspace
from qkernels.ops.qparams import choose_qparams_by_rule
from qkernels.ops.qparams_rules import rule_of, symmetric_zero_point_of

_EPS = torch.finfo(torch.float32).eps
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
    if axis is None:
        return
    known = observer.min_val.numel()
    forgets = getattr(observer, "memoryless", False) and known != x.shape[axis]
    if known == 0 or observer.max_val.numel() == 0 or forgets:
        give_shape(observer, "min_val", x.shape[axis], float("inf"))
        give_shape(observer, "max_val", x.shape[axis], float("-inf"))


def given(buffer: Tensor) -> float:
    """What a constructor put into a 1-element buffer.

    On meta nothing can be read. NaN then (0 for integers): `reset_parameters` of a model that was swapped on meta makes
    scales that show, until a state_dict is loaded.
    """
    if buffer.is_meta:
        return float("nan") if buffer.dtype.is_floating_point else 0
    return buffer.item()


class StockConstructor(nn.Module):
    """Construct the stock class, whose signature a subclass shows, then derive what our forward needs.

    `_init_core` is given those of the constructor's arguments that it names.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stock = next((c for c in cls.__mro__ if is_stock(c)), None)
        if stock is not None:
            cls.__signature__ = inspect.signature(stock)  # type: ignore[attr-defined]  # classes may have one

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        stock = next(c for c in type(self).__mro__ if is_stock(c))
        bound = inspect.signature(stock).bind(*args, **kwargs)
        bound.apply_defaults()
        derive: Any = self._init_core
        named = inspect.signature(derive).parameters
        derive(**{name: bound.arguments[name] for name in named if name in bound.arguments})


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
    frozen: bool = False  # True once `qkernels.freeze` has made an identity of the observer
    memoryless: bool = False  # whether every batch forgets the earlier ones
    runs_core: bool = True  # False for a subclass with a forward or calculate_qparams of its own
    averaging_constant: float | None = None  # weight of a new batch; None keeps the extremes of all batches
    observed_axis: int | None = None  # channel axis of the statistics; None is per tensor

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.runs_core = cls.forward is MinMaxCore.forward and cls.calculate_qparams is MinMaxCore.calculate_qparams

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
        # Arrival counters of the kernel: 0 between launches. Owned by this observer, so that two streams, or a
        # replayed CUDA graph and eager work, never count on the same ones.
        self.register_buffer("workspace", new_workspace(self.min_val.device, self.observed_axis), False)

    def prepare_state(self, x: Tensor) -> None:
        """Give per-channel statistics one element per channel of x, at the first batch."""
        shape_statistics(self, x, self.observed_axis)

    def forward(self, x_orig: Tensor) -> Tensor:
        """Record the min and max of `x_orig` and return it unchanged. An empty input leaves the state as it is.

        Integer input is converted to the dtype of the statistics first, as in torch.ao.
        """
        if self.frozen or x_orig.numel() == 0:
            return x_orig
        x = x_orig.detach()
        if not x.is_floating_point():
            if x.is_complex():
                raise TypeError(f"{type(self).__name__}: x must be real; got {x.dtype}")
            x = x.to(self.min_val.dtype)
        self.prepare_state(x)
        if self.memoryless:
            self.forget(None)
        state: Any = self._buffers  # Module.__getattr__ takes half a microsecond for each
        observe_minmax_(
            x, state["min_val"], state["max_val"], self.averaging_constant, self.observed_axis, None, state["workspace"]
        )
        return x_orig

    def forget(self, enabled: Tensor | None) -> None:
        """Take the statistics back to before the first batch, where the device flag `enabled` is set (or None)."""
        for buffer, value in ((self.min_val, float("inf")), (self.max_val, float("-inf"))):
            if enabled is None:
                buffer.fill_(value)
            else:
                buffer.masked_fill_(enabled.reshape(()).to(torch.bool), value)

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
        if torch.all((low == float("inf")) & (high == float("-inf"))):
            return False  # shaped, but never observed
        raise AssertionError(f"min {low} should be less than max {high}")

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # A launch that was killed, or to_empty, may have left anything in it; assign=True may have moved the rest.
        self.workspace = renewed_workspace(self.workspace, self.min_val.device, self.observed_axis)

    def reset_min_max_vals(self) -> None:
        """Forget everything seen, in place."""
        self.forget(None)
        self.workspace.zero_()

    def reset_parameters(self) -> None:
        """Give every buffer the value it has in a fresh observer: after `to_empty()`, or meta initialisation."""
        self.eps.fill_(self._initial_eps)
        self.reset_min_max_vals()


class PerChannelMinMaxCore(MinMaxCore):
    """Running min and max per channel. The statistics have no elements before the first batch, then C."""

    ch_axis: int

    def _init_core(self, eps: float | None = None) -> None:
        self.observed_axis = self.ch_axis
        super()._init_core(eps)

    def _unseen(self) -> bool:
        """Whether the statistics have their shape, but saw no batch: a state that the stock class does not know."""
        low, high = self.min_val, self.max_val
        if low.numel() == 0 or low.is_meta:
            return False
        return bool(((low == float("inf")) & (high == float("-inf"))).all())

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._unseen():  # the stock class saves no elements then
            for name in ("min_val", "max_val"):
                destination[prefix + name] = destination[prefix + name].new_empty(0)

    def before_unswap(self) -> None:
        """Give the state that a stock observer would have."""
        if self._unseen():
            self.reset_min_max_vals()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        version = local_metadata.get("version")
        if version is not None and version < 3:
            # Before version 3 the names were min_vals and max_vals; torch.ao 2.13 makes room for them, loads nothing.
            for name in ("min_val", "max_val"):
                if f"{prefix}{name}s" in state_dict:
                    state_dict[prefix + name] = state_dict[f"{prefix}{name}s"]
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)

    def reset_min_max_vals(self) -> None:
        """Forget everything seen, the number of channels too."""
        give_shape(self, "min_val", 0, float("inf"))
        give_shape(self, "max_val", 0, float("-inf"))
        self.workspace.zero_()
