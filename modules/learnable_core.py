"""What the learnable fake quantizers do, independent of whose base classes they stand on.

Three stages, told apart by flags that the device reads: observe (the observer sets scale and zero point), estimate (the
same, fake quantizing), learn (an optimizer moves them). Changing the stage neither synchronizes nor recompiles: scale
and zero point are Parameters that require a gradient in every stage, and get zeros as gradient where they do not learn.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from qkernels.modules.fake_quant_core import FakeQuantizeCore, known_off
from qkernels.modules.learnable_cpu import SYMMETRIC, learn_on_cpu
from qkernels.modules.observer_core import MinMaxCore, give_shape
from qkernels.ops import fake_quantize, learnable_fake_quantize
from qkernels.ops.checks import check_axis, check_x
from qkernels.ops.compositions import GRAD_ELEMENTS, learned_zero_point
from qkernels.ops.lsq import GRAD_MASKS

PER_CHANNEL = (torch.per_channel_affine, torch.per_channel_symmetric)


def set_flag(flag: Tensor, value: bool | Tensor) -> None:
    """Write a flag in place."""
    if isinstance(value, Tensor):
        flag.copy_(value.reshape(()))
    else:
        flag.fill_(int(value))


def _written_in_the_graph() -> contextlib.AbstractContextManager[Any]:
    """A context in which torch.compile writes Parameters in its graph, in place, and not in copies after it.

    torch.export would put what is done in it into a submodule.
    """
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return torch.no_grad()
    return contextlib.nullcontext()


class _WithValues(torch.autograd.Function):
    """Copies of scale and zero point in their place: gradients pass through to the two.

    The next forward renews the Parameters in place while autograd still holds what this one used.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(scale: Tensor, zero_point: Tensor, scale_copy: Tensor, zero_point_copy: Tensor) -> Any:
        return scale_copy.view_as(scale_copy), zero_point_copy.view_as(zero_point_copy)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing to save: a gradient passes unchanged."""

    @staticmethod
    def backward(ctx: Any, dscale: Tensor, dzero_point: Tensor) -> tuple[Tensor | None, ...]:
        return dscale, dzero_point, None, None


class LearnableCore(FakeQuantizeCore):
    """Fake quantization whose scale and zero point are Parameters: learned step sizes (LSQ).

    The stock class in front of which this stands provides the Parameters, `activation_post_process`, `quant_min`,
    `quant_max`, `qscheme`, `ch_axis`, `eps`, `use_grad_scaling` and the flags.
    """

    qscheme: torch.qscheme
    quant_min: int
    quant_max: int
    use_grad_scaling: bool
    eps: Tensor
    static_enabled: Tensor
    learning_enabled: Tensor
    gradient_enabled: Tensor  # what requires_grad says in torch.ao, on the device
    derived_buffers: tuple[str, ...] = ("gradient_enabled",)
    forward_steps = (*FakeQuantizeCore.forward_steps, "_qparams", "keep_valid", "_raise_scale", "operator_arguments")
    observing_flags: tuple[str, ...] = ("static_enabled",)  # buffers: any of them on observes
    grad_factor: float | None = None
    grad_scale_elements: str = "tensor"
    grad_mask: str = "rounded"
    _initial_qparams: tuple[float, float] = (1.0, 0.0)  # what `reset_parameters` gives
    _initial_gradient: int = 1

    def _init_core(self) -> None:
        """Derive what forward needs. Called after the stock constructor, and when a stock module is swapped."""
        wants = self.scale.requires_grad
        self.register_buffer(
            "gradient_enabled", torch.tensor([wants], dtype=torch.uint8, device=self.scale.device), False
        )
        self.scale.requires_grad_(True)
        self.zero_point.requires_grad_(True)

    def _check_channel_len(self, channel_len: int) -> None:
        """`channel_len` is -1, or a positive number of channels in a per-channel scheme."""
        if channel_len == -1:
            return
        name = type(self).__name__
        if not isinstance(channel_len, int) or channel_len < 1:
            raise AssertionError(f"{name}: channel_len must be a positive integer or -1; got {channel_len!r}")
        if not self.is_per_channel:
            raise ValueError(f"{name}: channel_len needs a per-channel qscheme; got {channel_len} and {self.qscheme}")

    def _init_options(
        self, grad_factor: float | None = None, grad_scale_elements: str = "tensor", grad_mask: str = "rounded"
    ) -> None:
        """Keep the options that the stock constructors do not have."""
        name = type(self).__name__
        if grad_scale_elements not in GRAD_ELEMENTS:
            raise ValueError(f"{name}: grad_scale_elements must be one of {GRAD_ELEMENTS}; got {grad_scale_elements!r}")
        if grad_mask not in GRAD_MASKS:
            raise ValueError(f"{name}: grad_mask must be one of {GRAD_MASKS}; got {grad_mask!r}")
        if self.use_grad_scaling and grad_factor is None and self.quant_max < 1:
            raise ValueError(f"{name}: use_grad_scaling needs a quant_max of at least 1; got {self.quant_max}")
        self.grad_factor = grad_factor
        self.grad_scale_elements = grad_scale_elements
        self.grad_mask = grad_mask

    @property
    def is_per_channel(self) -> bool:  # type: ignore[override]  # an attribute there; here it follows the scheme
        """Whether there is one scale per channel."""
        return self.qscheme in PER_CHANNEL

    @property
    def _observing(self) -> Tensor:
        return self.static_enabled

    @property
    def _axis(self) -> int | None:
        return self.ch_axis if self.is_per_channel else None

    def forward(self, X: Tensor) -> Tensor:
        """Fake quantize `X` with scale and zero point, renewed by the observer where static estimation is enabled.

        An empty input is not observed. With fake quantization disabled the result is `X` itself in eager mode on the
        CPU, else a copy of it.

        Raises:
            TypeError: X is not a floating-point tensor.
            ValueError: X's channels do not match scale.
            RuntimeError: the number of channels is unknown in a compiled forward.
        """
        y = learn_on_cpu(self, X)
        if y is not None:
            return y
        self._check_input(X)
        if X.numel() == 0 and self.is_per_channel and self.scale.numel() == 1:
            return X
        if self.frozen:
            if known_off(self.fake_quant_enabled):
                return X
            scale, zero_point = self._fixed_qparams()
            return fake_quantize(
                X, scale, zero_point, self.quant_min, self.quant_max, self._axis, self.fake_quant_enabled
            )
        scale, zero_point = self._qparams(X)
        if known_off(self.fake_quant_enabled):
            return X
        return learnable_fake_quantize(*self.operator_arguments(X, scale, zero_point))

    def operator_arguments(self, X: Tensor, scale: Tensor, zero_point: Tensor) -> tuple[Any, ...]:
        """Arguments of learnable_fake_quantize."""
        factor = self.grad_factor
        return (
            X,
            scale,
            zero_point,
            self.quant_min,
            self.quant_max,
            1.0 if factor is None else factor,
            self._axis,
            self.fake_quant_enabled,
            self.grad_mask,
            self.gradient_enabled,
            self.grad_scale_elements if self.use_grad_scaling and factor is None else None,
        )

    def _check_input(self, X: Tensor) -> None:
        """Raise what the operators would raise of X, before anything is observed."""
        name = type(self).__name__
        check_x(name, X)
        check_axis(name, X, self._axis)
        if self.scale.dtype == torch.float64:
            raise NotImplementedError(f"{name}: scale must be float16, bfloat16 or float32; got torch.float64")

    def _qparams(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point to use for X, differentiable where they learn."""
        observer = self.activation_post_process
        if X.numel() == 0:
            pass
        elif known_off(self._observing):
            if self.is_per_channel and self.scale.numel() == 1:
                self.give_channels(X.shape[self.ch_axis])
            self.keep_valid()
        elif not (isinstance(observer, MinMaxCore) and observer.runs_core):
            self._observe_with_foreign(X)
            self.keep_valid()
        else:
            if observer.memoryless:
                self._prepare_state(X, observer.observed_axis)
                observer.forget(self._observing)
            with _written_in_the_graph():
                copies = self._update_qparams(X, observer, scale_floor=self.eps)
            if not (self.scale.requires_grad or self.zero_point.requires_grad):
                return copies
            return _WithValues.apply(self.scale, self.zero_point, *copies)
        return self.scale, self.zero_point

    def keep_valid(self) -> None:
        """Raise the scale to eps and a symmetric zero point to 0, in place, out of autograd's sight as in torch.ao."""
        self._raise_scale()
        if self.qscheme in SYMMETRIC:
            self.zero_point.data.zero_()

    def _raise_scale(self) -> None:
        self.scale.data.clamp_(min=self.eps)

    def _observe_with_foreign(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """The stock way, for observers with code of their own: reads the flag on the host, which syncs on a GPU."""
        if self._observing[0] == 1:
            self.activation_post_process(X.detach())
            scale, zero_point = self.activation_post_process.calculate_qparams()
            if self.scale.shape != scale.shape:
                self._shape_qparams(scale.numel())
            self.scale.data.copy_(scale)
            self.zero_point.data.copy_(zero_point)
        return self.scale, self.zero_point

    def _shape_statistics(self) -> None:
        """Give the statistics their shape, if the number of channels is known: one graph fewer to compile."""
        observer = self.activation_post_process
        channels = self.scale.numel()
        if not (self.is_per_channel and channels > 1 and isinstance(observer, MinMaxCore)):
            return
        if observer.min_val.numel() == 0:
            give_shape(observer, "min_val", channels, float("inf"))
            give_shape(observer, "max_val", channels, float("-inf"))

    def _shape_qparams(self, channels: int) -> None:
        """Give the Parameters one element per channel: copies of the one that they have. Optimizers keep them."""
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"{type(self).__name__}: the number of channels is unknown in a compiled forward; give channel_len, or "
                "run one batch before compiling"
            )
        with torch.inference_mode(False):
            for parameter in (self.scale, self.zero_point):
                parameter.data = parameter.data.reshape(-1)[:1].repeat(channels)
                parameter.grad = None

    def give_channels(self, channels: int) -> None:
        """Tell a per-channel quantizer its number of channels, so that its Parameters exist before the first batch.

        Raises:
            ValueError: another number is known already.
        """
        if not self.is_per_channel or self.scale.numel() == channels:
            return
        if self.scale.numel() != 1:
            raise ValueError(f"{type(self).__name__}: there are {self.scale.numel()} channels already; got {channels}")
        self._shape_qparams(channels)
        self._shape_statistics()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        loaded = [state_dict.get(prefix + name) for name in ("scale", "zero_point")]
        if self.is_per_channel and self.scale.numel() == 1:
            shapes = {tuple(value.shape) for value in loaded if value is not None}
            if len(shapes) == 1 and len(shape := shapes.pop()) == 1:
                self._shape_qparams(shape[0])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for name in self.derived_buffers:  # assign=True may have brought the rest from meta to a device
            buffer = getattr(self, name)
            if buffer.device != self.scale.device:
                value = 1 if buffer.is_meta else buffer.item()
                setattr(self, name, torch.full_like(buffer, value, device=self.scale.device))

    def _fixed_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale, and zero point as integers."""
        zero_point = learned_zero_point(self.zero_point.detach(), self.quant_min, self.quant_max)
        return self.scale.detach(), zero_point.to(torch.int32)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale, raised to eps in place, and zero point as int64, for conversion."""
        self._raise_scale()
        scale, zero_point = self._fixed_qparams()
        return scale, zero_point.long()

    def freeze(self) -> None:
        """Stop observing and learning for good and keep scale and zero point."""
        self.keep_valid()
        self._set_observing(False)
        self._set_learning(False)
        for parameter in (self.scale, self.zero_point):  # an optimizer must leave them alone
            parameter.requires_grad_(False)
            parameter.grad = None
        self.frozen = True

    def set_stage(
        self, *, observing: bool | Tensor, learning: bool | Tensor, fake_quantizing: bool | Tensor = True
    ) -> None:
        """Set the flags of a stage, in place: no host sync, no recompilation.

        Args:
            observing: whether the observer sets scale and zero point.
            learning: whether scale and zero point get gradients; else these are zero.
            fake_quantizing: whether the output is fake quantized.

        Each is a bool, or a tensor of 1 element on the device, so that a graph can decide it. A learning that is True
        also makes scale and zero point require a gradient, if they did not; a tensor leaves that as it is.
        """
        self._set_observing(observing)
        self._set_learning(learning)
        set_flag(self.fake_quant_enabled, fake_quantizing)

    @property
    def stage_flags(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The flags of observing, learning, gradients and fake quantizing, for a schedule that writes many at once."""
        return self._observing_switch, self.learning_enabled, self.gradient_enabled, self.fake_quant_enabled

    @property
    def _observing_switch(self) -> Tensor:
        """The buffer that switches observation."""
        return self.static_enabled

    def _set_observing(self, enabled: bool | Tensor) -> None:
        set_flag(self._observing_switch, enabled)

    def _set_learning(self, enabled: bool | Tensor) -> None:
        set_flag(self.learning_enabled, enabled)
        set_flag(self.gradient_enabled, enabled)
        if enabled is True:
            for parameter in (self.scale, self.zero_point):
                if not parameter.requires_grad:
                    parameter.requires_grad_(True)

    def reset_parameters(self) -> None:
        """Give every Parameter and buffer the value it has in a fresh module: after `to_empty()`, or meta.

        A module that was swapped does not know its first scale and zero point; it takes 1 and 0.
        """
        if hasattr(self.activation_post_process, "reset_parameters"):
            self.activation_post_process.reset_parameters()
        scale, zero_point = self._initial_qparams
        self.scale.data.fill_(scale)
        self.zero_point.data.fill_(zero_point)
        self.eps.fill_(torch.finfo(torch.float32).eps)
        self.fake_quant_enabled.fill_(1)
        self.observer_enabled.fill_(1)
        self._set_observing(True)
        self.learning_enabled.fill_(0)
        self.gradient_enabled.fill_(self._initial_gradient)

    def before_unswap(self) -> None:
        """Give the Parameters the requires_grad that a stock module would have."""
        wants = bool(self.gradient_enabled.item())
        self.scale.requires_grad_(wants)
        self.zero_point.requires_grad_(wants)
