"""First values of learned scales and zero points: LSQ, LSQ+, a search for the smallest squared error, the observer's.

The formulas are pure functions of a tensor of any shape and float dtype, computed in float64. The smallest scale that
they give is float32 eps, for zeros (for a constant, where the formula takes max - min); NaN in x gives NaN. Bad
arguments raise TypeError (x is not a floating-point tensor) or ValueError (x is empty or has no such axis, there are
fewer than two codes, or what a function says). Nothing reads a value on the host, but where `initialize` says so.
"""

from __future__ import annotations

import contextlib
import copy
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.modules.learnable_core import SYMMETRIC, LearnableCore
from qkernels.modules.observer_core import MinMaxCore
from qkernels.modules.swapping import check_model
from qkernels.ops import aminmax, fake_quantize
from qkernels.ops.checks import check_axis, check_x
from qkernels.ops.qparams import choose_qparams_by_rule

METHODS = ("observer", "lsq", "lsq+", "mse")
_EPS = torch.finfo(torch.float32).eps


def _check(name: str, x: Tensor, axis: int | None, quant_min: int | None = None, quant_max: int = 0) -> list[int]:
    """Raise unless there are values and codes; else the dimensions that share a scale."""
    check_x(name, x)
    axis = check_axis(name, x, axis)
    if x.numel() == 0:
        raise ValueError(f"{name}: x must not be empty; got shape {tuple(x.shape)}")
    if quant_min is not None and quant_min >= quant_max:
        raise ValueError(f"{name}: quant_min must be below quant_max; got {quant_min} and {quant_max}")
    return [dim for dim in range(x.ndim) if dim != axis]


def _per_scale(reduce: Callable[..., Tensor], x: Tensor, dims: list[int], **kwargs: Any) -> Tensor:
    """`reduce(x, dims)` in float64, shape (1,) or (C,). Per channel of a 1-dimensional x there are no dims."""
    return reduce(x.unsqueeze(-1).double(), dims or [-1], **kwargs).reshape(-1)


@torch.no_grad()
def lsq_scale(x: Tensor, quant_max: int, axis: int | None = None) -> Tensor:
    """First step size of LSQ: 2 * mean|x| / sqrt(quant_max).

    Args:
        x: a weight, or the first batch of an activation.
        quant_max: largest code, at least 1.
        axis: channel axis, negative allowed; None for one scale.

    Returns:
        scale, float32, shape (1,) or (C,).

    Reference:
        Esser et al., Learned Step Size Quantization, ICLR 2020, section 2.1.
    """
    dims = _check("lsq_scale", x, axis)
    if quant_max < 1:
        raise ValueError(f"lsq_scale: quant_max must be at least 1; got {quant_max}")
    mean = _per_scale(torch.mean, x.detach().abs(), dims)
    return (2 * mean / quant_max**0.5).clamp(min=_EPS).float()


@torch.no_grad()
def lsq_plus_weight_scale(x: Tensor, quant_min: int, quant_max: int, axis: int | None = None) -> Tensor:
    """First step size of LSQ+ for weights: max(|mean - 3 sd|, |mean + 3 sd|) / 2^(bits - 1).

    sd is the standard deviation of the population (divided by n, so 0 for one element). bits is what the codes need,
    ceil(log2(quant_max - quant_min + 1)), so the narrow range -127..127 counts as 8.

    Args:
        x: a weight.
        quant_min: smallest code.
        quant_max: largest code.
        axis: channel axis, negative allowed; None for one scale.

    Returns:
        scale, float32, shape (1,) or (C,).

    Reference:
        Bhalgat et al., LSQ+, CVPR Workshops 2020, section 3.2.
    """
    dims = _check("lsq_plus_weight_scale", x, axis, quant_min, quant_max)
    mean, deviation = _per_scale(torch.mean, x, dims), _per_scale(torch.var, x, dims, correction=0).sqrt()
    largest = torch.maximum((mean - 3 * deviation).abs(), (mean + 3 * deviation).abs())
    bits = (quant_max - quant_min).bit_length()
    return (largest / 2 ** (bits - 1)).clamp(min=_EPS).float()


def _range(x: Tensor, axis: int | None, include_zero: bool) -> tuple[Tensor, Tensor]:
    """(min, max), shape (1,) or (C,)."""
    low, high = (bound.double().reshape(-1) for bound in aminmax(x.detach(), axis))
    return (low.clamp(max=0), high.clamp(min=0)) if include_zero else (low, high)


@torch.no_grad()
def lsq_plus_activation_qparams(
    x: Tensor, quant_min: int, quant_max: int, axis: int | None = None, *, include_zero: bool = False
) -> tuple[Tensor, Tensor]:
    """LSQ+'s first s = (max - min) / (quant_max - quant_min) and zero point quant_min - min / s of an activation.

    Args:
        x: the first batch.
        quant_min: smallest code.
        quant_max: largest code.
        axis: channel axis, negative allowed; None for one scale.
        include_zero: widen the range to contain 0, so that the zero point is within the codes. A learnable quantizer
            clamps it to them, where the paper's offset is free; so `initialize` widens.

    Returns:
        (scale, zero_point), float32, shape (1,) or (C,). zero_point is not rounded.

    Reference:
        Bhalgat et al., LSQ+, CVPR Workshops 2020, section 3.2; zero_point is -beta / s.
    """
    _check("lsq_plus_activation_qparams", x, axis, quant_min, quant_max)
    low, high = _range(x, axis, include_zero)
    scale = ((high - low) / (quant_max - quant_min)).clamp(min=_EPS)
    return scale.float(), (quant_min - low / scale).float()


@torch.no_grad()
def mse_qparams(
    x: Tensor, quant_min: int, quant_max: int, axis: int | None = None, symmetric: bool = False, steps: int = 100
) -> tuple[Tensor, Tensor]:
    """Scale and zero point whose fake quantization of x has the smallest squared error, among shrunken ranges.

    The candidates are k / steps of the range from min to max, widened to contain 0, for k from `steps` down to 1, with
    the scale and zero point that an observer gives it: so never worse than a min/max observer. Each channel has its own
    candidate. Of equal errors the widest range wins.

    Args:
        x: values to quantize, as float32.
        quant_min: smallest code.
        quant_max: largest code.
        axis: channel axis, negative allowed; None for one scale.
        symmetric: keep zero point 0.
        steps: number of candidates, at least 1, each a pass over x. Memory stays that of a few copies of x.

    Returns:
        (scale, zero_point), float32, shape (1,) or (C,). zero_point is integral.
    """
    dims = _check("mse_qparams", x, axis, quant_min, quant_max)
    if steps < 1:
        raise ValueError(f"mse_qparams: steps must be at least 1; got {steps}")
    x = x.detach().float()
    low, high = (bound.float() for bound in _range(x, axis, include_zero=True))
    eps = torch.full((1,), _EPS, device=x.device)
    rule = "symmetric" if symmetric else "affine"
    best: list[Tensor] = []  # squared error, scale, zero point
    for k in range(steps, 0, -1):
        part = k / steps
        scale, zero_point = choose_qparams_by_rule(low * part, high * part, quant_min, quant_max, rule, 0, eps)
        y = fake_quantize(x, scale, zero_point.to(torch.int32), quant_min, quant_max, axis)
        # float64, so that the order of summation does not decide between candidates
        candidate = [_per_scale(torch.sum, y.double().sub_(x).square_(), dims), scale, zero_point.float()]
        if best:
            better = candidate[0] < best[0]  # False for NaN
            candidate = [torch.where(better, *pair) for pair in zip(candidate, best, strict=True)]
        best = candidate
    return best[1], best[2]


def _observer_qparams(x: Tensor, observer: Any, axis: int | None) -> tuple[Tensor, Tensor]:
    """What the observer, fresh, computes from x alone. One that cannot be reset goes on from what it has seen."""
    if isinstance(observer, MinMaxCore) and observer.runs_core:
        low, high = (bound.to(observer.min_val.dtype).reshape(-1) for bound in aminmax(x, axis))
        codes = observer.quant_min, observer.quant_max
        return choose_qparams_by_rule(
            low, high, *codes, observer.qparams_rule, observer.symmetric_zero_point, observer.eps
        )
    fresh = copy.deepcopy(observer)
    with contextlib.suppress(AttributeError, NotImplementedError):
        fresh.reset_min_max_vals()
    fresh(x)
    qparams: tuple[Tensor, Tensor] = fresh.calculate_qparams()
    return qparams


def _qparams(quantizer: LearnableCore, x: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """(scale, zero_point) for a quantizer by one of METHODS."""
    low, high, axis = quantizer.quant_min, quantizer.quant_max, quantizer._axis
    symmetric = quantizer.qscheme in SYMMETRIC
    zero_point = None
    if method == "observer":
        scale, zero_point = _observer_qparams(x, quantizer.activation_post_process, axis)
    elif method == "mse":
        scale, zero_point = mse_qparams(x, low, high, axis, symmetric)
    elif method == "lsq":
        scale = lsq_scale(x, high, axis)
    elif symmetric:
        scale = lsq_plus_weight_scale(x, low, high, axis)
    else:
        scale, zero_point = lsq_plus_activation_qparams(x, low, high, axis, include_zero=True)
    scale = torch.maximum(scale, quantizer.eps)
    return scale, torch.zeros_like(scale) if symmetric or zero_point is None else zero_point


@torch.no_grad()
def _set(quantizer: Any, scale: Tensor, zero_point: Tensor) -> None:
    quantizer.give_channels(scale.numel())
    quantizer.scale.copy_(scale)
    quantizer.zero_point.copy_(zero_point)
    if hasattr(quantizer, "uninitialized"):  # torchao's face observes its first batch, whatever the flags say
        quantizer.uninitialized.zero_()


@torch.no_grad()
def quantized_weights(model: nn.Module) -> Iterator[tuple[LearnableCore, Tensor]]:
    """(quantizer, what it quantizes) of weights: `weight_fake_quant`, and in a traced graph what a Parameter reaches.

    A module fused with its batch norm quantizes the product of its weight and the factor that the norm applies.
    """
    for module in model.modules():
        pairs: list[Any] = [(getattr(module, "weight_fake_quant", None), getattr(module, "weight", None))]
        norm: Any = getattr(module, "bn", None)
        if getattr(norm, "running_var", None) is not None:
            factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            pairs = [(q, weight * factor.reshape(-1, *[1] * (weight.ndim - 1))) for q, weight in pairs if q is not None]
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            source = node.args[0] if node.op == "call_module" and node.args else None
            if isinstance(source, torch.fx.Node) and source.op == "get_attr":
                weight = operator.attrgetter(str(source.target))(module)
                pairs += [(module.get_submodule(node.target), weight)] if isinstance(weight, nn.Parameter) else []
        yield from ((q, weight.detach()) for q, weight in pairs if isinstance(q, LearnableCore))


def initialize(model: nn.Module, *inputs: Any, weights: str = "lsq", activations: str = "observer") -> nn.Module:
    """Give the learnable fake quantizers of a model their first scale and zero point, in place.

    Those of weights from the weight; the others from what reaches them in one forward, in which all before them is fake
    quantized with its new values. Nothing else changes, since that forward runs in a copy that shares the Parameters.
    A quantizer that observes replaces the values at its next forward. Symmetric ones keep zero point 0.

    Args:
        model: holds quantizers of `qkernels.modules` or `qkernels.modules.pt2e`.
        *inputs: arguments of the forward, which runs in the mode the model is in. Without any, only weights are set.
        weights: method for weights (`weight_fake_quant`, and what a Parameter reaches): "observer", what the
            quantizer's observer makes of this one tensor; "lsq", `lsq_scale` and zero point 0; "lsq+",
            `lsq_plus_activation_qparams`, for symmetric schemes `lsq_plus_weight_scale`; "mse", `mse_qparams`.
        activations: method for the others.

    Returns:
        The model. A quantizer that several layers share took what reached it first. Frozen ones, and those that
        nothing or only an empty tensor reached, keep their values.

    Raises:
        TypeError: model is not a module.
        ValueError: a method is unknown or does not fit a quantizer ("lsq" needs a quant_max of at least 1).

    Note:
        An observer that is not of this project may read values on the host.
    """
    check_model("initialize", model)
    for name, method in (("weights", weights), ("activations", activations)):
        if method not in METHODS:
            raise ValueError(f"initialize: {name} must be one of {METHODS}; got {method!r}")
    inner = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    done = {id(quantizer) for quantizer in inner.modules() if isinstance(quantizer, LearnableCore) and quantizer.frozen}
    for quantizer, weight in quantized_weights(inner):
        if id(quantizer) not in done:
            _set(quantizer, *_qparams(quantizer, weight, weights))
            done.add(id(quantizer))
    if inputs:
        _initialize_reached(inner, inputs, done, {True: weights, False: activations})
    return model


@torch.no_grad()
def _initialize_reached(model: nn.Module, inputs: tuple[Any, ...], done: set[int], methods: dict[bool, str]) -> None:
    """Run a copy whose quantizers are set just before they run; then give the originals what the copies got."""
    originals = {name: q for name, q in model.named_modules(remove_duplicate=False) if isinstance(q, LearnableCore)}
    learned = {id(parameter) for quantizer in originals.values() for parameter in quantizer.parameters()}
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters() if id(p) not in learned})
    waiting: dict[Any, LearnableCore] = {}
    found: list[tuple[LearnableCore, Tensor, Tensor]] = []

    def set_first(module: Any, arguments: tuple[Any, ...]) -> None:
        x = arguments[0] if arguments else None
        if module in waiting and isinstance(x, Tensor) and x.numel() > 0:
            qparams = _qparams(module, x.detach(), methods[isinstance(x, nn.Parameter)])
            _set(module, *qparams)
            found.append((waiting.pop(module), *qparams))

    for name, original in originals.items():
        module: Any = twin.get_submodule(name)
        if not original.frozen:
            module.set_stage(observing=False, learning=False)
        if id(original) not in done and module not in waiting:
            waiting[module] = original
            module.register_forward_pre_hook(set_first)
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices):  # dropout must not move the random numbers of the training after
        twin(*inputs)
    for quantizer_and_qparams in found:
        _set(*quantizer_and_qparams)
