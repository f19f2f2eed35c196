"""What the fake quantizers do, independent of whose base classes they stand on.

Flags stay buffers that the device reads: no host sync, no Python branch on a tensor, no recompilation when they are
toggled in place. Eager calls on the CPU read them on the host, where that costs no sync, and skip what is off.
"""

from __future__ import annotations

from abc import ABC
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.launch import INTERPRETED
from qkernels.modules.histogram_core import HistogramCore
from qkernels.modules.observer_core import MinMaxCore, give_shape, shape_statistics
from qkernels.ops import fake_quantize, update_qparams_
from qkernels.ops.checks import check_axis, check_x
from qkernels.ops.minmax import new_workspace, renewed_workspace
from qkernels.ops.qparams import choose_qparams_by_rule
from qkernels.ops.qparams_rules import rule_of, symmetric_zero_point_of
from qkernels.ops.registration import runs_directly
from qkernels.ops.small_cpu import fake_quantize_by_torch, fused_fake_quantize_by_torch


def known_off(flag: Tensor) -> bool:
    """Whether the host may look at the flag and finds it 0."""
    return not torch.compiler.is_compiling() and flag.device.type == "cpu" and type(flag) is Tensor and not flag.item()


class FakeQuantizeCore(ABC, nn.Module):
    """Observe, renew scale and zero point, fake quantize: two launches on a GPU.

    The bases are those of the stock FakeQuantizeBase: CPython gives a stock instance our class (`qkernels.swap`) only
    if the first bases of the two lay out an object alike.

    The stock class in front of which this stands provides `activation_post_process`, the flags, `scale`,
    `zero_point`, `is_per_channel` and `ch_axis`.
    """

    activation_post_process: Any
    fake_quant_enabled: Tensor
    observer_enabled: Tensor
    scale: Tensor
    zero_point: Tensor
    is_per_channel: bool
    ch_axis: int
    frozen: bool = False  # True once `qkernels.freeze` has fixed scale and zero point
    forward_steps: tuple[str, ...] = ("_observing", "_observed_qparams", "_update_qparams", "_check_input")
    short_ways: bool = True  # False for a subclass with a step of its own, which a short way would pass by

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        owners = [base for base in cls.__mro__ if any(step in vars(base) for step in cls.forward_steps)]
        cls.short_ways = all(base.__module__.startswith("qkernels.") for base in owners)

    @property
    def _observing(self) -> Tensor:
        """The device flag of observation."""
        return self.observer_enabled

    def _init_core(self) -> None:
        """Nothing to derive."""

    def forward(self, X: Tensor) -> Tensor:
        """Fake quantize `X` with the qparams of everything observed so far, `X` included.

        An empty input is returned as it is. With fake quantization disabled the result is `X` itself in eager mode on
        the CPU, else a copy of it.
        """
        if X.numel() == 0:
            return X
        y = self._quantize_small(X)
        if y is not None:
            return y
        self._check_input(X)
        scale, zero_point = (self.scale, self.zero_point) if self.frozen else self._observed_qparams(X)
        if known_off(self.fake_quant_enabled):
            return X
        observer = self.activation_post_process
        return fake_quantize(
            X,
            scale,
            zero_point,
            observer.quant_min,
            observer.quant_max,
            self.ch_axis if self.is_per_channel else None,
            self.fake_quant_enabled,
        )

    def _quantize_small(self, X: Tensor) -> Tensor | None:
        """The step of small CPU tensors that are not observed, in as little Python as can be; else None.

        torch's operator saves a mask, so scale and zero point need not be copied.
        """
        buffers: Any = self._buffers  # Module.__getattr__ takes half a microsecond for each
        scale, zero_point = buffers.get("scale"), buffers.get("zero_point")
        flags = observing, enabled = buffers.get("observer_enabled"), buffers.get("fake_quant_enabled")
        if INTERPRETED or not self.short_ways or not runs_directly(X, scale, zero_point, *flags):
            return None
        if not (self.frozen or known_off(observing)) or known_off(enabled):
            return None
        observer = self.activation_post_process
        axis = self.ch_axis if self.is_per_channel else None
        return fake_quantize_by_torch(X, scale, zero_point, observer.quant_min, observer.quant_max, axis, enabled)

    def _observed_qparams(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Observe X if the flag says so; (scale, zero_point) that no later observation changes in place."""
        observer = self.activation_post_process
        if not (isinstance(observer, MinMaxCore | HistogramCore) and observer.runs_core):
            return self._observe_with_foreign(X)
        if known_off(self._observing):
            return self.scale.clone(), self.zero_point.clone()
        if isinstance(observer, HistogramCore):
            observer.prepare_state(X)
            self._prepare_state(X, observer.observed_axis)
            return observer.renew_qparams_(X, self.scale, self.zero_point, self._observing)
        if observer.memoryless:
            self._prepare_state(X, observer.observed_axis)
            observer.forget(self._observing)
        return self._update_qparams(X, observer)

    def _update_qparams(
        self, X: Tensor, source: Any, qparams_enabled: Tensor | None = None, scale_floor: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Observe X and renew scale and zero point; copies of the two.

        Args:
            X: the batch.
            source: who owns rule, symmetric zero point, axis and arrival counters: the observer, or this module.
            qparams_enabled: flag of scale and zero point, if it is not `observer_enabled`.
            scale_floor: smallest scale, if an optimizer changes scale and zero point too.
        """
        observer = self.activation_post_process
        self._prepare_state(X, source.observed_axis)
        scale, zero_point = self.scale, self.zero_point
        if scale.requires_grad or zero_point.requires_grad:
            scale, zero_point = scale.detach(), zero_point.detach()
        return update_qparams_(
            X.detach(),
            observer.min_val,
            observer.max_val,
            scale,
            zero_point,
            observer.quant_min,
            observer.quant_max,
            rule=source.qparams_rule,
            symmetric_zero_point=source.symmetric_zero_point,
            eps=observer.eps,
            averaging_constant=observer.averaging_constant,
            axis=source.observed_axis,
            enabled=self._observing,
            workspace=source.workspace if INTERPRETED or not X.is_cpu else None,  # an input less for a compiled graph
            qparams_enabled=qparams_enabled,
            scale_floor=scale_floor,
        )

    def _check_input(self, X: Tensor) -> None:
        """Raise what fake_quantize would raise of X, before anything is observed."""
        name = type(self).__name__
        check_x(name, X)
        check_axis(name, X, self.ch_axis if self.is_per_channel else None)
        if X.dtype == torch.float64 and self.is_per_channel and self.zero_point.dtype.is_floating_point:
            raise NotImplementedError(
                f"{name}: a per-channel floating-point zero_point needs a float16, bfloat16 or float32 x; got {X.dtype}"
            )

    def _prepare_state(self, X: Tensor, axis: int | None) -> None:
        """Give statistics and qparams one element per channel of X, if they have none yet.

        A count that does not match what was observed before is left for the operator to refuse.
        """
        observer = self.activation_post_process
        shape_statistics(observer, X, axis)
        if axis is not None and (self.scale.numel() == 1 or getattr(observer, "memoryless", False)):
            channels = X.shape[axis]
            if channels != self.scale.numel() and observer.min_val.numel() == channels:
                self._shape_qparams(channels)

    def _shape_qparams(self, channels: int) -> None:
        """Give scale and zero point one element per channel."""
        give_shape(self, "scale", channels, 1)
        give_shape(self, "zero_point", channels, 0)

    def _observe_with_foreign(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """The stock way, for observers with code of their own: reads the flag on the host, which syncs on a GPU."""
        if self._observing[0] == 1:
            self.activation_post_process(X.detach())
            scale, zero_point = self.activation_post_process.calculate_qparams()
            if self.scale.shape != scale.shape:
                self.scale.resize_(scale.shape)
                self.zero_point.resize_(zero_point.shape)
            self.scale.copy_(scale)
            self.zero_point.copy_(zero_point)
        return self.scale.clone(), self.zero_point.clone()

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the observer."""
        return self.activation_post_process.calculate_qparams()

    def freeze(self) -> None:
        """Stop observing for good and keep scale and zero point."""
        self.disable_observer()
        self.frozen = True

    def reset_parameters(self) -> None:
        """Give every buffer the value it has in a fresh module: after `to_empty()`, or meta initialisation."""
        if hasattr(self.activation_post_process, "reset_parameters"):
            self.activation_post_process.reset_parameters()
        if self.is_per_channel:
            give_shape(self, "scale", 1, 1)
            give_shape(self, "zero_point", 1, 0)
        else:
            self.scale.fill_(1)
            self.zero_point.zero_()
        self.fake_quant_enabled.fill_(1)
        self.observer_enabled.fill_(1)

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Switch fake quantization on or off, in place."""
        self.fake_quant_enabled.fill_(int(enabled))

    def disable_fake_quant(self) -> None:
        """Switch fake quantization off, in place."""
        self.enable_fake_quant(False)

    def enable_observer(self, enabled: bool = True) -> None:
        """Switch observation on or off, in place."""
        self.observer_enabled.fill_(int(enabled))

    def disable_observer(self) -> None:
        """Switch observation off, in place."""
        self.enable_observer(False)


class FusedMovingAvgCore(FakeQuantizeCore):
    """The arithmetic of torch.fused_moving_avg_obs_fake_quant, or with `consistent_qparams` the observer's.

    As in that operator, `observer_enabled` gates the statistics and `fake_quant_enabled` gates scale and zero point.
    Of the observer only the state is used, so torch.ao's own will do.
    """

    is_symmetric_quant: bool
    workspace: Tensor

    def _init_core(self, consistent_qparams: bool = False) -> None:
        """Derive what forward needs. Called after the stock constructor, and when a stock module is swapped."""
        self.consistent_qparams = consistent_qparams
        observer = self.activation_post_process
        self.observed_axis = self.ch_axis if self.is_per_channel else None
        self.symmetric_zero_point = symmetric_zero_point_of(
            observer.dtype, observer.quant_min, observer.quant_max, observer.has_customized_qrange
        )
        if consistent_qparams:
            self.qparams_rule = rule_of(observer.qscheme)
        else:
            self.qparams_rule = "fused_symmetric" if self.is_symmetric_quant else "fused_affine"
        # Arrival counters of the kernel, see MinMaxCore.
        self.register_buffer("workspace", new_workspace(self.scale.device, self.observed_axis), False)

    def freeze(self) -> None:
        """Stop observing for good, with the qparams that the next forward would have chosen from the statistics."""
        observer = self.activation_post_process
        if observer.min_val.numel() == self.scale.numel() and self.fake_quant_enabled.item():
            scale, zero_point = choose_qparams_by_rule(
                observer.min_val,
                observer.max_val,
                observer.quant_min,
                observer.quant_max,
                self.qparams_rule,
                self.symmetric_zero_point,
                observer.eps,
            )
            self.scale.copy_(scale)
            self.zero_point.copy_(zero_point)
        super().freeze()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.workspace = renewed_workspace(self.workspace, self.scale.device, self.observed_axis)  # see MinMaxCore

    def reset_parameters(self) -> None:
        """Give every buffer the value it has in a fresh module: after `to_empty()`, or meta initialisation."""
        super().reset_parameters()
        self.workspace.zero_()

    def forward(self, X: Tensor) -> Tensor:
        """Fake quantize `X` with the qparams of everything observed so far, `X` included. See FakeQuantizeCore."""
        y = self._fused_small(X)
        return super().forward(X) if y is None else y

    def _fused_small(self, X: Tensor) -> Tensor | None:
        """The whole step of small CPU tensors by torch's fused operator; else None."""
        if self.frozen or self.consistent_qparams or INTERPRETED or not self.short_ways:
            return None
        buffers: Any = self._buffers  # Module.__getattr__ takes half a microsecond for each
        observer: Any = self._modules.get("activation_post_process")
        if observer is None:
            return None
        statistics = observer._buffers
        state = statistics.get("min_val"), statistics.get("max_val"), buffers.get("scale"), buffers.get("zero_point")
        flags = buffers.get("observer_enabled"), buffers.get("fake_quant_enabled")
        if not runs_directly(X, *state, *flags):
            return None
        return fused_fake_quantize_by_torch(
            X,
            state,
            *flags,
            observer.averaging_constant,
            observer.quant_min,
            observer.quant_max,
            self.observed_axis,
            self.is_symmetric_quant,
        )

    def _quantize_small(self, X: Tensor) -> Tensor | None:
        return super()._quantize_small(X) if self.frozen else None  # qparams are renewed while nothing is observed too

    def _observed_qparams(self, X: Tensor) -> tuple[Tensor, Tensor]:
        if known_off(self.observer_enabled) and known_off(self.fake_quant_enabled):
            return self.scale, self.zero_point  # unused: X is returned as it is
        return self._update_qparams(X, self, self.fake_quant_enabled)
