"""What the fake quantizers do, independent of whose base classes they stand on.

Flags stay buffers that the device reads: no host sync, no Python branch on a tensor, no recompilation when they are
toggled in place. Eager calls on the CPU read them on the host, where that costs no sync, and skip what is off.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qkernels.modules.observer_core import MinMaxCore, give_shape, shape_statistics
from qkernels.ops import fake_quantize, update_qparams_
from qkernels.ops.checks import check_axis, check_x
from qkernels.ops.qparams_rules import rule_of, symmetric_zero_point_of


def _known_off(flag: Tensor) -> bool:
    """Whether the host may look at the flag and finds it 0."""
    return not torch.compiler.is_compiling() and flag.device.type == "cpu" and type(flag) is Tensor and not flag.item()


class FakeQuantizeCore(nn.Module):
    """Observe, renew scale and zero point, fake quantize: two launches on a GPU.

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

    def forward(self, X: Tensor) -> Tensor:
        """Fake quantize `X` with the qparams of everything observed so far, `X` included.

        An empty input is returned as it is. With fake quantization disabled the result is `X` itself in eager mode on
        the CPU, else a copy of it.
        """
        if X.numel() == 0:
            return X
        self._check_input(X)
        scale, zero_point = self._observed_qparams(X)
        if _known_off(self.fake_quant_enabled):
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

    def _observed_qparams(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Observe X if the flag says so; (scale, zero_point) that no later observation changes in place."""
        observer = self.activation_post_process
        if not (isinstance(observer, MinMaxCore) and observer.runs_core):
            return self._observe_with_foreign(X)
        if _known_off(self.observer_enabled):
            return self.scale.clone(), self.zero_point.clone()
        self._prepare_state(X, observer.observed_axis)
        return update_qparams_(
            X.detach(),
            observer.min_val,
            observer.max_val,
            self.scale,
            self.zero_point,
            observer.quant_min,
            observer.quant_max,
            rule=observer.qparams_rule,
            symmetric_zero_point=observer.symmetric_zero_point,
            eps=observer.eps,
            averaging_constant=observer.averaging_constant,
            axis=observer.observed_axis,
            enabled=self.observer_enabled,
            workspace=observer.workspace,
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
        if axis is not None and self.scale.numel() == 1:
            channels = X.shape[axis]
            if channels != 1 and observer.min_val.numel() == channels:
                give_shape(self, "scale", channels, 1)
                give_shape(self, "zero_point", channels, 0)

    def _observe_with_foreign(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """The stock way, for observers with code of their own: reads the flag on the host, which syncs on a GPU."""
        if self.observer_enabled[0] == 1:
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

    def _init_core(self, consistent_qparams: bool) -> None:
        """Derive what forward needs. Called by a face after the stock constructor."""
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
        # Arrival counter of the kernel, see MinMaxCore.
        self.register_buffer("workspace", torch.zeros(1, dtype=torch.int32, device=self.scale.device), False)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.workspace.zero_()  # see MinMaxCore
        super()._load_from_state_dict(*args, **kwargs)

    def _observed_qparams(self, X: Tensor) -> tuple[Tensor, Tensor]:
        observer = self.activation_post_process
        if _known_off(self.observer_enabled) and _known_off(self.fake_quant_enabled):
            return self.scale, self.zero_point
        self._prepare_state(X, self.observed_axis)
        return update_qparams_(
            X.detach(),
            observer.min_val,
            observer.max_val,
            self.scale,
            self.zero_point,
            observer.quant_min,
            observer.quant_max,
            rule=self.qparams_rule,
            symmetric_zero_point=self.symmetric_zero_point,
            eps=observer.eps,
            averaging_constant=observer.averaging_constant,
            axis=self.observed_axis,
            enabled=self.observer_enabled,
            workspace=self.workspace,
            qparams_enabled=self.fake_quant_enabled,
        )
