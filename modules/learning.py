"""Training with learned step sizes: qconfigs, preparation, parameter groups, and the schedule of the stages."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import QConfig, QConfigMapping, prepare_qat, propagate_qconfig_

from qkernels.modules.factories import default_placeholder_observer, get_default_qat_qconfig_mapping
from qkernels.modules.initializers import initialize, quantized_weights
from qkernels.modules.learnable import LearnableFakeQuantize
from qkernels.modules.learnable_core import SYMMETRIC, LearnableCore
from qkernels.modules.minmax import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver
from qkernels.modules.swapping import check_model, swap

_TRANSPOSED = (
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.functional.conv_transpose1d, nn.functional.conv_transpose2d, nn.functional.conv_transpose3d),
)
_NORMS = (nn.LayerNorm, nn.functional.layer_norm)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def _check_count(function: str, name: str, value: object, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{function}: {name} must be an int; got {type(value).__name__}")
    if value < least or (most is not None and value > most):
        rule = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{function}: {name} must be {rule}; got {value}")


def learnable_qconfig(
    weight_bits: int = 8,
    activation_bits: int = 8,
    *,
    per_channel: bool = True,
    activation_symmetric: bool = False,
    use_grad_scaling: bool = True,
    grad_scale_elements: str | None = None,
    grad_mask: str = "rounded",
) -> QConfig:
    """QConfig of learnable fake quantizers: weights symmetric in qint8, activations affine in quint8.

    Args:
        weight_bits: 2 to 8; codes -2^(b-1) .. 2^(b-1)-1.
        activation_bits: 1 to 8 (2 to 8 if symmetric); codes 0 .. 2^b-1.
        per_channel: one scale per output channel of a weight (axis 0), else one per weight.
        activation_symmetric: activations in qint8 with zero point 0 and codes like those of weights.
        use_grad_scaling: scale the gradients of scale and zero point by 1 / sqrt(elements * quant_max).
        grad_scale_elements: elements to count, see `LearnableFakeQuantize`. None is LSQ's choice: those of one scale
            for weights ("channel"), those of one sample for activations ("sample").
        grad_mask: "rounded" or "lsq", see `LearnableFakeQuantize`.

    Raises:
        TypeError: a number of bits is not an int.
        ValueError: it is out of range, or an option is unknown.
    """
    name = "learnable_qconfig"
    _check_count(name, "weight_bits", weight_bits, 2, 8)
    _check_count(name, "activation_bits", activation_bits, 2 if activation_symmetric else 1, 8)
    options = {"use_grad_scaling": use_grad_scaling, "grad_mask": grad_mask}
    weight = LearnableFakeQuantize.with_args(
        observer=MovingAveragePerChannelMinMaxObserver if per_channel else MovingAverageMinMaxObserver,
        quant_min=-(2 ** (weight_bits - 1)),
        qscheme=torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric,
        grad_scale_elements=grad_scale_elements or "channel",
        quant_max=2 ** (weight_bits - 1) - 1,
        dtype=torch.qint8,
        **options,
    )
    half = 2 ** (activation_bits - 1)
    activation = LearnableFakeQuantize.with_args(
        observer=MovingAverageMinMaxObserver,
        quant_min=-half if activation_symmetric else 0,
        quant_max=half - 1 if activation_symmetric else 2 * half - 1,
        dtype=torch.qint8 if activation_symmetric else torch.quint8,
        qscheme=torch.per_tensor_symmetric if activation_symmetric else torch.per_tensor_affine,
        grad_scale_elements=grad_scale_elements or "sample",
        **options,
    )
    weight(), activation()  # an unknown option is an error of this call
    return QConfig(activation=activation, weight=weight)


def learnable_qconfig_mapping(*args: Any, **kwargs: Any) -> QConfigMapping:
    """torch.ao's default QAT mapping with `learnable_qconfig` in the place of its qconfig.

    As there, sigmoid, tanh and softmax keep their fixed scales, layer norm keeps float weights, and transposed
    convolutions have one scale per weight. Embeddings, which torch.ao quantizes by another scheme, stay in float.

    Args:
        *args: arguments of `learnable_qconfig`.
        **kwargs: arguments of `learnable_qconfig`.
    """
    qconfig = learnable_qconfig(*args, **kwargs)
    mapping = get_default_qat_qconfig_mapping().set_global(qconfig)
    per_tensor = learnable_qconfig(*args, **{**kwargs, "per_channel": False})
    float_weight = QConfig(activation=qconfig.activation, weight=default_placeholder_observer)
    for kinds, chosen in ((_TRANSPOSED, per_tensor), (_NORMS, float_weight), (_EMBEDDINGS, None)):
        for kind in kinds:
            mapping.set_object_type(kind, chosen)
    return mapping


def prepare_learnable(
    model: nn.Module, qconfig_mapping: QConfigMapping, example_inputs: Any = None, *, weight_init: str | None = "lsq"
) -> nn.Module:
    """A copy of a float model, in training mode, with learnable quantizers on it; compiles with `fullgraph=True`.

    Args:
        model: float model, left as it is. For the eager flow fuse it first (`torch.ao.quantization.fuse_modules_qat`).
        qconfig_mapping: such as `learnable_qconfig_mapping()`.
        example_inputs: a tuple of inputs, or one tensor: torch.ao's FX flow, which traces the model. None: its eager
            flow, with quantizers on outputs of modules and on QuantStubs, and the mapping's global, module type and
            module name entries handed down to children as `propagate_qconfig_` does.
        weight_init: method of `initialize` for weights, whose quantizers then learn. None leaves them observing.

    Returns:
        The prepared model. Activations are observed until a `LearningSchedule` or `enable_param_learning` ends that.

    Raises:
        TypeError: model is not a module, or qconfig_mapping not a QConfigMapping.
        ValueError: the model has no place for a learnable quantizer, or weight_init is unknown.
        NotImplementedError: the eager flow meets an entry that needs a graph.
    """
    check_model("prepare_learnable", model)
    if not isinstance(qconfig_mapping, QConfigMapping):
        kind = type(qconfig_mapping).__name__
        raise TypeError(f"prepare_learnable: qconfig_mapping must be a QConfigMapping; got {kind}")
    prepared = copy.deepcopy(model).train()
    if example_inputs is None:
        propagate_qconfig_(prepared, _eager_qconfigs(qconfig_mapping))
        prepared = prepare_qat(prepared, inplace=True)
    else:
        from torch.ao.quantization.quantize_fx import prepare_qat_fx  # a fifth of this package's start-up time

        inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
        prepared = prepare_qat_fx(prepared, qconfig_mapping, inputs)
    swap(prepared)  # the eager flow's hooks
    if not any(isinstance(m, LearnableCore) for m in prepared.modules()):
        raise ValueError("prepare_learnable: qconfig_mapping put no learnable quantizer on the model")
    shape_weight_quantizers(prepared)
    if weight_init is not None:
        initialize(prepared, weights=weight_init)
        for quantizer, _ in quantized_weights(prepared):
            quantizer.set_stage(observing=False, learning=True)
    return prepared


def _eager_qconfigs(mapping: QConfigMapping) -> dict[Any, Any]:
    """What `propagate_qconfig_` takes: qconfigs by module type and by name, the model's own under ""."""
    for kind in ("module_name_regex_qconfigs", "module_name_object_type_order_qconfigs"):
        if getattr(mapping, kind):
            raise NotImplementedError(f"prepare_learnable: {kind} need example_inputs (the FX flow)")
    types = {kind: qconfig for kind, qconfig in mapping.object_type_qconfigs.items() if isinstance(kind, type)}
    return {"": mapping.global_qconfig, **types, **mapping.module_name_qconfigs}


def shape_weight_quantizers(model: nn.Module) -> None:
    """Tell every per-channel learnable quantizer of a weight in `model` its number of channels, before any batch does.

    Raises:
        ValueError: a quantizer has another number of channels already.
    """
    for quantizer, weight in quantized_weights(model):
        if quantizer.is_per_channel:
            quantizer.give_channels(weight.shape[quantizer.ch_axis])


def parameter_groups(
    model: nn.Module,
    *,
    lr: float | None = None,
    weight_decay: float | None = None,
    qparam_lr: float | None = None,
    qparam_weight_decay: float | None = 0.0,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: everything else, and the learned scales and zero points, in this order.

    Args:
        model: holds learnable quantizers.
        lr: learning rate of everything else; None leaves it to the optimizer, here and below.
        weight_decay: of everything else.
        qparam_lr: learning rate of scales and zero points.
        qparam_weight_decay: of scales and zero points.

    Returns:
        Two groups, of which one may be empty. Each parameter is in one of them once, but for the zero points of
        symmetric quantizers: every forward zeroes them, so they are in none.
    """
    check_model("parameter_groups", model)
    quantizers = [m for m in model.modules() if isinstance(m, LearnableCore)]
    learned = {id(q.scale): q.scale for q in quantizers}
    learned |= {id(q.zero_point): q.zero_point for q in quantizers if q.qscheme not in SYMMETRIC}
    taken = {id(parameter) for q in quantizers for parameter in (q.scale, q.zero_point)}
    others = [parameter for parameter in model.parameters() if id(parameter) not in taken]
    groups: list[dict[str, Any]] = [
        {"params": others, "lr": lr, "weight_decay": weight_decay},
        {"params": list(learned.values()), "lr": qparam_lr, "weight_decay": qparam_weight_decay},
    ]
    return [{key: value for key, value in group.items() if value is not None} for group in groups]


class LearningSchedule(nn.Module):
    """Stages of training: observe for some steps, then learn scale and zero point, then, optionally, hold them.

    Call `step()` after every `optimizer.step()`. Steps are counted on the device, which sets the flags too: no host
    sync, no recompilation, and `step()` may be part of a compiled or CUDA-graphed training step. Quantizers that do not
    observe when the schedule is made, such as weights that `prepare_learnable` initialised, keep scale and zero point
    while the others observe. Once frozen, `step()` takes back what the optimizer's momentum or decay did to them.

    The schedule owns no parameters; its state_dict resumes it. Make it when the model is on its device.

    Args:
        model: its learnable quantizers, frozen ones apart, are scheduled from here on; all their flags are set.
        observe_steps: steps before learning, at least 0.
        learn_steps: steps of learning, at least 0; None never ends.
        fake_quantize_while_observing: False trains in float while observing.

    Raises:
        TypeError: model is not a module, or a number of steps is not an int.
        ValueError: a number of steps is negative, or there is nothing to schedule.
    """

    steps: Tensor
    observes: Tensor
    held: Tensor

    def __init__(
        self,
        model: nn.Module,
        observe_steps: int,
        learn_steps: int | None = None,
        fake_quantize_while_observing: bool = True,
    ) -> None:
        super().__init__()
        check_model("LearningSchedule", model)
        for name, count in (("observe_steps", observe_steps), ("learn_steps", learn_steps)):
            _check_count("LearningSchedule", name, 0 if count is None and name == "learn_steps" else count, 0)
        self.observe_steps, self.learn_steps = observe_steps, learn_steps
        self.fake_quantize_while_observing = fake_quantize_while_observing
        # A plain list, so that they are not submodules.
        self._quantizers = [m for m in model.modules() if isinstance(m, LearnableCore) and not m.frozen]
        if not self._quantizers:
            raise ValueError("LearningSchedule: model must hold a learnable quantizer that is not frozen; got none")
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=self._quantizers[0].scale.device))
        self.register_buffer("observes", torch.cat([q._observing for q in self._quantizers]).to(torch.bool))
        self.register_buffer("held", torch.cat(self._learned) if learn_steps is not None else torch.empty(0))
        self._set_flags()

    @property
    def _learned(self) -> list[Tensor]:
        return [p.detach() for q in self._quantizers for p in (q.scale, q.zero_point)]

    def _frozen(self) -> Tensor:
        if self.learn_steps is None:
            return torch.zeros_like(self.steps, dtype=torch.bool)
        return self.steps >= self.observe_steps + self.learn_steps

    @torch.no_grad()
    def step(self) -> None:
        """Count a training step, and set the stage of the next one. On the device; without a host sync."""
        if self.learn_steps is not None:
            learned = self._learned
            values = torch.cat(learned)
            if values.shape != self.held.shape:  # a number of channels has become known
                self.held = values
            self.held.copy_(torch.where(self._frozen(), self.held, values))
            torch._foreach_copy_(learned, list(self.held.split([p.numel() for p in learned])))
        self.steps.add_(1)
        self._set_flags()

    @torch.no_grad()
    def _set_flags(self) -> None:
        """Write all flags of all quantizers: one launch where torch has a fused copy of many tensors."""
        early = self.steps < self.observe_steps
        learning = (~early & ~self._frozen()).to(torch.uint8).reshape(1)
        fake_quantizing = (~early | self.fake_quantize_while_observing).to(torch.uint8).reshape(1)
        observing = (early & self.observes).to(torch.uint8).unsqueeze(1).unbind()
        flags: list[Tensor] = []
        values: list[Tensor] = []
        for quantizer, own in zip(self._quantizers, observing, strict=True):
            flags += quantizer.stage_flags
            values += (own, learning, learning, fake_quantizing)
        torch._foreach_copy_(flags, values)

    @property
    def stage(self) -> str:
        """The stage of the next forward: "observe", "learn" or "frozen". For people: reads the device."""
        if self.steps.item() < self.observe_steps:
            return "observe"
        return "frozen" if self._frozen().item() else "learn"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if prefix + "held" in state_dict:  # numbers of channels, or learn_steps, may have been others
            self.held = torch.empty_like(state_dict[prefix + "held"], device=self.held.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._set_flags()

    def extra_repr(self) -> str:
        """Number of quantizers and steps."""
        names = ("observe_steps", "learn_steps", "fake_quantize_while_observing")
        return ", ".join([f"quantizers={len(self._quantizers)}", *(f"{name}={getattr(self, name)}" for name in names)])
