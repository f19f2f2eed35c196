"""Learned step sizes with the API of torch.ao's `_LearnableFakeQuantize`, on its base class."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.ao.quantization import _learnable_fake_quantize as stock

from qkernels.modules.learnable_core import LearnableCore


class LearnableFakeQuantize(LearnableCore, stock._LearnableFakeQuantize):  # type: ignore[misc]  # see minmax.py
    """Fake quantization with learned scale and zero point: LSQ and LSQ+.

    Takes the place of `torch.ao.quantization._learnable_fake_quantize._LearnableFakeQuantize`, and of its form of July
    2020: equal constructor, Parameters, buffers, state_dict, qparams and methods. Differs in what runs: one pass over x
    and dy in the backward, no full-size temporaries, no host sync, `torch.compile(fullgraph=True)`, any float dtype;
    gradients are right for negative zero points, where torch's are shifted by one; checkpoints load into fresh modules
    of unknown channel count. `enable_param_learning`, `enable_static_estimate` and `enable_static_observation` change
    flags on the device, so the stage changes without recompiling: Parameters keep `requires_grad` and get zeros as
    gradient where they do not learn, where torch.ao's get none. `toggle_qparam_learning` sets `requires_grad` too, as
    in torch.ao, which a compiled graph notices.

    Args:
        observer: observer class or factory.
        quant_min: smallest code.
        quant_max: largest code.
        scale: first value of scale.
        zero_point: first value of zero_point.
        channel_len: number of channels; -1 per tensor, or if it is known only at the first batch.
        use_grad_scaling: scale the gradients of scale and zero point by 1 / sqrt(elements * quant_max).
        grad_factor: factor of these gradients, in place of use_grad_scaling.
        grad_scale_elements: which elements use_grad_scaling counts: "tensor" (all, as torch.ao), "channel" (those of
            one scale), "sample" (without the batch, dimension 0: LSQ's count for activations).
        grad_mask: "rounded", as torch.ao, or "lsq", as the paper (`qkernels.ops.learnable_fake_quantize`).
        **observer_kwargs: arguments of the observer.

    Raises:
        AssertionError: the range is empty or does not fit the observer's dtype, or channel_len is not positive.
        ValueError: channel_len comes with a per-tensor qscheme, an option is unknown, or use_grad_scaling meets a
            quant_max below 1.

    Reference:
        torch/ao/quantization/_learnable_fake_quantize.py, torch 2.13. Esser et al., Learned Step Size Quantization,
        ICLR 2020. Bhalgat et al., LSQ+, CVPR Workshops 2020.
    """

    def __init__(
        self,
        observer: Any,
        quant_min: int = 0,
        quant_max: int = 255,
        scale: float = 1.0,
        zero_point: float = 0.0,
        channel_len: int = -1,
        use_grad_scaling: bool = False,
        *,
        grad_factor: float | None = None,
        grad_scale_elements: str = "tensor",
        grad_mask: str = "rounded",
        **observer_kwargs: Any,
    ) -> None:
        stock._LearnableFakeQuantize.__init__(
            self, observer, quant_min, quant_max, float(scale), float(zero_point), channel_len, use_grad_scaling,
            **observer_kwargs,
        )  # fmt: skip
        self._check_channel_len(channel_len)
        self._initial_qparams = (float(scale), float(zero_point))
        self._init_core()
        self._init_options(grad_factor, grad_scale_elements, grad_mask)
        self._shape_statistics()

    def enable_param_learning(self) -> LearnableFakeQuantize:
        """Learn scale and zero point, fake quantizing; stop observing."""
        self.set_stage(observing=False, learning=True)
        return self

    def enable_static_estimate(self) -> None:
        """Let the observer set scale and zero point, fake quantizing; stop learning."""
        self.set_stage(observing=True, learning=False)

    def enable_static_observation(self) -> None:
        """Let the observer set scale and zero point, without fake quantizing; stop learning."""
        self.set_stage(observing=True, learning=False, fake_quantizing=False)

    def toggle_observer_update(self, enabled: bool = True) -> LearnableFakeQuantize:
        """Switch static estimation on or off, in place."""
        self._set_observing(enabled)
        return self

    def enable_observer(self, enabled: bool = True) -> None:
        """Switch static estimation on or off, in place."""
        self.toggle_observer_update(enabled)

    def disable_observer(self) -> None:
        """Switch static estimation off, in place."""
        self.toggle_observer_update(False)

    def toggle_qparam_learning(self, enabled: bool = True) -> LearnableFakeQuantize:
        """Switch learning on or off, with the `requires_grad` of scale and zero point."""
        self._set_learning(enabled)
        self.scale.requires_grad_(enabled)
        self.zero_point.requires_grad_(enabled)
        return self

    def toggle_fake_quant(self, enabled: bool = True) -> LearnableFakeQuantize:
        """Switch fake quantization on or off, in place."""
        self.fake_quant_enabled.fill_(int(enabled))
        return self

    def extra_repr(self) -> str:
        """Range, scheme and shape."""
        return (
            f"quant_min={self.quant_min}, quant_max={self.quant_max}, dtype={self.dtype}, qscheme={self.qscheme}, "
            f"ch_axis={self.ch_axis}, channels={self.scale.numel()}, use_grad_scaling={self.use_grad_scaling}"
        )


_LearnableFakeQuantize = LearnableFakeQuantize


def enable_param_learning(module: nn.Module) -> None:
    """For `model.apply`: learn the scale and zero point of a learnable fake quantizer."""
    if isinstance(module, stock._LearnableFakeQuantize):
        module.enable_param_learning()


def enable_static_estimate(module: nn.Module) -> None:
    """For `model.apply`: let the observer of a learnable fake quantizer set its scale and zero point."""
    if isinstance(module, stock._LearnableFakeQuantize):
        module.enable_static_estimate()


def enable_static_observation(module: nn.Module) -> None:
    """For `model.apply`: let the observer of a learnable fake quantizer watch, without fake quantizing."""
    if isinstance(module, stock._LearnableFakeQuantize):
        module.enable_static_observation()
