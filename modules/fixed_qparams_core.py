"""What the fake quantizers with given qparams do, independent of whose base classes they stand on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qkernels.modules.fake_quant_core import FakeQuantizeCore
from qkernels.modules.observer_core import given


class FixedQParamsCore(FakeQuantizeCore):
    """Fake quantization with given qparams: nothing to observe."""

    qscheme: torch.qscheme

    def _init_core(self) -> None:
        """Remember the given qparams for `reset_parameters`."""
        fixed = self.activation_post_process
        ours = hasattr(fixed, "_initial_scale")  # constructed by us, so known on meta too
        self._initial_scale = fixed._initial_scale if ours else given(self.scale)
        self._initial_zero_point = fixed._initial_zero_point if ours else given(self.zero_point)

    def _init_fixed(self, observer_factory: Any, *fixed_classes: type) -> None:
        """What the stock constructor does after its own check, which asks for the very stock class."""
        fixed = self.activation_post_process
        if type(fixed) not in fixed_classes:
            raise AssertionError(f"{type(self).__name__}'s observer must be a {fixed_classes[0].__name__}")
        self._observer_ctr = observer_factory
        self.scale = fixed.scale
        self.zero_point = fixed.zero_point
        if self.qscheme not in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            raise AssertionError(
                "Only per tensor quantization is supported FixedQParamsFakeQuantize module, got qscheme:"
                + str(self.qscheme)
            )
        self._init_core()

    def _observed_qparams(self, X: Tensor) -> tuple[Tensor, Tensor]:
        return self.scale, self.zero_point

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """The given scale and zero point."""
        return self.scale, self.zero_point

    def reset_parameters(self) -> None:
        """Give every buffer the value it has in a fresh module: after `to_empty()`, or meta initialisation."""
        fixed = self.activation_post_process
        self.scale, self.zero_point = fixed.scale, fixed.zero_point  # to_empty unties what the constructor tied
        self.scale.fill_(self._initial_scale)
        self.zero_point.fill_(self._initial_zero_point)
        self.fake_quant_enabled.fill_(1)
        self.observer_enabled.fill_(1)
