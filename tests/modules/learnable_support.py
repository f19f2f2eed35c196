"""Pairs of learnable fake quantizers, ours and the stock one of either library, and how a step of both is compared.

Stock gradients are the oracle for zero points >= 0, in float32. Ours is compared with the float64 reference within 1e-6
of the sum of |terms|, and with stock within that and what stock's own arithmetic can change: a rounding at the size of
a code in every term (a code is up to 255 times a typical term), and the few elements within such a rounding of a tie,
which torch, rounding x / scale + zero_point where ours rounds x / scale, may count on the other side (`torch_flips`).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.ao.quantization as torch_ao
from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize

import qkernels.modules
from tests.modules import support as s
from tests.oracles_learnable import RELATIVE, assert_sum_close, reference_learnable

try:
    import torchao.quantization.pt2e as torchao
    from torchao.quantization.pt2e.learnable_fake_quantize import LearnableFakeQuantize as TorchaoLearnable

    import qkernels.modules.pt2e as ours_pt2e
except ImportError:
    torchao = ours_pt2e = TorchaoLearnable = None

NEEDS_TORCHAO = pytest.mark.skipif(torchao is None, reason="torchao is not installed (extra: torchao)")
EACH_FACE = pytest.mark.parametrize("face", ["torch.ao", pytest.param("torchao", marks=NEEDS_TORCHAO)])
FACES = ("torch.ao",) if torchao is None else ("torch.ao", "torchao")
BITS = (2, 4, 8)
SYMMETRIC = (torch.per_tensor_symmetric, torch.per_channel_symmetric)
Modules = tuple[Any, Any]


@dataclass(frozen=True)
class Case:
    """One learnable quantizer. Small to print, so that a failure shows all of it."""

    face: str = "torch.ao"
    per_channel: bool = False
    symmetric: bool = False
    bits: int = 8
    axis: int = 0
    channels: int = 3
    moving: bool = False
    use_grad_scaling: bool = False

    @property
    def observer(self) -> str:
        return ("MovingAverage" if self.moving else "") + ("PerChannel" if self.per_channel else "") + "MinMaxObserver"

    @property
    def quant_range(self) -> tuple[int, int]:
        half = 1 << (self.bits - 1)
        return (-half, half - 1) if self.symmetric else (0, 2 * half - 1)

    def kwargs(self) -> dict[str, Any]:
        low, high = self.quant_range
        scheme = f"per_{'channel' if self.per_channel else 'tensor'}_{'symmetric' if self.symmetric else 'affine'}"
        kwargs = {
            "quant_min": low,
            "quant_max": high,
            "dtype": torch.qint8 if self.symmetric else torch.quint8,
            "qscheme": getattr(torch, scheme),
            "use_grad_scaling": self.use_grad_scaling,
        }
        if self.per_channel:
            kwargs["ch_axis"] = self.axis
        if self.moving:
            kwargs["averaging_constant"] = 0.25
        return kwargs

    def mine(self, device: torch.device | str = "cpu", **extra: Any) -> Any:
        library = ours_pt2e if self.face == "torchao" else qkernels.modules
        return library.LearnableFakeQuantize(getattr(library, self.observer), **self.kwargs(), **extra).to(device)

    def theirs(self) -> Any:
        """The stock module, with its channel count where it needs one (torch.ao's does), and no negative axis."""
        library, cls = (torchao, TorchaoLearnable) if self.face == "torchao" else (torch_ao, _LearnableFakeQuantize)
        extra = {"channel_len": self.channels} if self.per_channel and self.face == "torch.ao" else {}
        return cls(getattr(library, self.observer), **self.kwargs(), **extra)

    def pair(self, device: torch.device | str = "cpu", **extra: Any) -> Modules:
        with s.quiet():
            return self.mine(device, **extra), self.theirs()

    def shape(self, ndim: int = 3) -> tuple[int, ...]:
        shape = [4, 5, 2][:ndim]
        if self.per_channel:
            shape[self.axis] = self.channels
        return tuple(shape)

    def batch(self, seed: int, factor: float = 1.0, offset: float = 0.0, ndim: int = 3) -> torch.Tensor:
        g = torch.Generator().manual_seed(seed)
        return torch.randn(self.shape(ndim), generator=g) * factor + offset

    def other(self, **kwargs: Any) -> Case:
        return replace(self, **kwargs)


CASES = {
    f"{face} {'channel' if channel else 'tensor'} {'symmetric' if symmetric else 'affine'}": Case(
        face, channel, symmetric, axis=1 if channel else 0
    )
    for face in FACES
    for channel in (False, True)
    for symmetric in (False, True)
}
EACH_CASE = pytest.mark.parametrize("case", list(CASES.values()), ids=list(CASES))


def dy_like(x: torch.Tensor, seed: int = 7) -> torch.Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + x.numel()))


def axis_of(module: Any) -> int | None:
    return module.ch_axis if module.qscheme in (torch.per_channel_affine, torch.per_channel_symmetric) else None


def factor_of(module: Any, x: torch.Tensor) -> float:
    """torch.ao's gradient factor."""
    return 1.0 / (x.numel() * module.quant_max) ** 0.5 if module.use_grad_scaling else 1.0


def torch_rounding(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int | None) -> torch.Tensor:
    """A rounding of x / scale + zero_point in float32, at most."""
    shape = [] if axis is None else [-1 if d == axis % x.ndim else 1 for d in range(x.ndim)]
    return 2.0**-23 * ((x / scale.reshape(shape)).abs() + zero_point.abs().reshape(shape) + 1)


def torch_flips(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int | None) -> torch.Tensor:
    """Elements whose code torch's backward may round to the other side of a tie than its forward."""
    shape = [] if axis is None else [-1 if d == axis % x.ndim else 1 for d in range(x.ndim)]
    position = x * (1.0 / scale).reshape(shape)
    near = (position - position.floor() - 0.5).abs() <= 4 * torch_rounding(x, scale, zero_point, axis)
    return near & (zero_point.round().reshape(shape) != 0)


def forward_stock(theirs: Any, x: torch.Tensor) -> torch.Tensor:
    """torch's per-channel operator refuses negative axes; torch.ao's observer does not."""
    axis = theirs.ch_axis
    theirs.ch_axis = axis % x.ndim if axis_of(theirs) is not None else axis
    try:
        return theirs(x)
    finally:
        theirs.ch_axis = axis


@dataclass
class Call:
    """One forward and backward of a quantizer: input, gradient of the output, scale and zero point used."""

    x: torch.Tensor
    qparams: Modules
    dy: torch.Tensor | None = None


def check_gradients(mine: Any, theirs: Any, calls: list[Call]) -> None:
    """The gradients of scale and zero point that the calls left, against stock and against float64."""
    axis = axis_of(theirs)
    exact, terms, allowances = ([0.0, 0.0] for _ in range(3))
    for call in calls:
        x, dy, qparams, factor = call.x, call.dy, call.qparams, factor_of(theirs, call.x)
        want = reference_learnable(dy, x, *qparams, theirs.quant_min, theirs.quant_max, factor, axis)
        dims = tuple(d for d in range(x.ndim) if axis is None or d != axis % x.ndim)
        flips = torch_flips(x, *qparams, axis).double()
        changes = (
            flips * (theirs.quant_max - theirs.quant_min + 1) + torch_rounding(x, *qparams, axis),
            flips * qparams[0].double().max(),
        )
        exact = [exact[0] + want.dscale, exact[1] + want.dzero_point]
        terms = [terms[0] + want.dscale_terms, terms[1] + want.dzero_point_terms]
        for i, change in enumerate(changes):
            weighted = dy.abs().double() * change * factor
            allowances[i] = allowances[i] + (weighted.sum(dims) if dims else weighted).reshape(-1)
    for i, name in enumerate(("scale", "zero_point")):
        ours_grad, stock_grad = getattr(mine, name).grad, getattr(theirs, name).grad
        if stock_grad is None:  # ours gets zeros where it does not learn
            assert ours_grad is None or not ours_grad.any(), f"gradient of {name}: {ours_grad} and {stock_grad}"
            continue
        assert ours_grad.shape == stock_grad.shape and ours_grad.dtype == stock_grad.dtype, name
        assert_sum_close(ours_grad, exact[i], terms[i], f"d{name} against float64")
        bound = RELATIVE * torch.as_tensor(terms[i]).reshape(-1) + allowances[i] + 1e-30
        off = (ours_grad.cpu().double() - stock_grad.double()).abs().reshape(-1)
        assert (off <= bound).all(), f"d{name}: off by {off.tolist()}, bound {bound.tolist()}"


def record(model: torch.nn.Module) -> dict[str, list[Call]]:
    """A dict that hooks fill with the calls of every stock learnable quantizer in a model; clear it between steps."""
    calls: dict[str, list[Call]] = {}

    def keep(name: str, module: Any, inputs: Any, output: torch.Tensor) -> None:
        call = Call(inputs[0].detach().clone(), (module.scale.detach().clone(), module.zero_point.detach().clone()))
        calls.setdefault(name, []).append(call)
        if output.requires_grad:
            output.register_hook(lambda dy: setattr(call, "dy", dy.detach().clone()))

    for name, module in learnables(model).items():
        module.register_forward_hook(partial(keep, name))
    return calls


def learnables(model: torch.nn.Module) -> dict[str, Any]:
    """Learnable quantizers by name, stock or ours."""
    classes = tuple(c for c in (_LearnableFakeQuantize, TorchaoLearnable) if c is not None)
    return {name: module for name, module in model.named_modules() if isinstance(module, classes)}


def step_both(
    mine: Any, theirs: Any, x: torch.Tensor, device: torch.device | str = "cpu", wants_dx: bool = True
) -> None:
    """One forward and backward of both: y, dx, state and requires_grad equal, gradients within their bound."""
    a, b = x.to(device).detach().requires_grad_(wants_dx), x.detach().clone().requires_grad_(wants_dx)
    mine.zero_grad()
    theirs.zero_grad()
    y_ref = forward_stock(theirs, b)
    y = mine(a)
    s.check_bits(y, y_ref, "y")
    assert y.requires_grad >= y_ref.requires_grad  # ours requires a gradient in every stage
    check_learned_state(mine, theirs)
    assert theirs.qscheme not in SYMMETRIC or not mine.zero_point.any()
    if not y_ref.requires_grad:
        return
    dy = dy_like(x)
    y_ref.backward(dy)
    y.backward(dy.to(device))
    qparams = theirs.scale.detach().clone(), theirs.zero_point.detach().clone()
    if wants_dx:
        s.check_same(a.grad, b.grad, "dx", ~torch_flips(x, *qparams, axis_of(theirs)))
    check_gradients(mine, theirs, [Call(x, qparams, dy)])


def check_learned_state(mine: Any, theirs: Any) -> None:
    """Every entry of the state_dict, once both have seen a batch: keys, order, versions and bits.

    With fake quantization off, stock leaves a symmetric zero point where the optimizer put it; ours is 0 throughout.
    """
    idle = theirs.qscheme in SYMMETRIC and not theirs.fake_quant_enabled.item()
    s.check_state(mine, theirs, ("zero_point",) if idle else ())
    for name in ("scale", "zero_point"):
        assert isinstance(getattr(mine, name), torch.nn.Parameter)


def take_parameters(mine: Any, theirs: Any) -> None:
    """Ours goes on from stock's learned parameters, so that errors do not accumulate."""
    with torch.no_grad():
        for name in ("scale", "zero_point"):
            getattr(mine, name).copy_(getattr(theirs, name))


def train_step(
    models: Modules, optimizers: Modules, calls: dict[str, list[Call]], x: torch.Tensor, target: torch.Tensor
) -> float:
    """One training step of ours and of stock's model, from equal states: output, loss and every gradient.

    All bit-equal but the gradients of scales and zero points, within their bound. Then ours takes stock's state.
    Returns the loss.
    """
    calls.clear()
    outputs, losses = [], []
    for model, optimizer in zip(models, optimizers, strict=True):
        optimizer.zero_grad()
        outputs.append(model(x))
        losses.append(torch.nn.functional.cross_entropy(outputs[-1], target))
        losses[-1].backward()
    s.check_bits(*outputs, "output")
    s.check_bits(*losses, "loss")
    quantizers, theirs = learnables(models[0]), learnables(models[1])
    assert list(quantizers) == list(theirs) and theirs
    for name, quantizer in theirs.items():
        check_gradients(quantizers[name], quantizer, [call for call in calls.get(name, ()) if call.dy is not None])
    learned = {id(p) for q in theirs.values() for p in q.parameters()}
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if id(b) not in learned:
            s.check_same(a.grad, b.grad, f"gradient of {name}")
    for optimizer in optimizers:
        optimizer.step()
    models[0].load_state_dict(models[1].state_dict(), strict=True)
    optimizers[0].load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    return losses[1].item()


def sgd(theirs: Any, rate: float = 0.02) -> None:
    """One step of the stock module's parameters, if they learn. Zero points stay where torch's backward is right."""
    with torch.no_grad():
        for name in ("scale", "zero_point"):
            parameter = getattr(theirs, name)
            if parameter is not None and parameter.grad is not None:
                step = parameter.grad / (1 + parameter.grad.abs())
                parameter -= rate * step * (1 if name == "zero_point" else parameter.abs())
        if theirs.zero_point is not None and theirs.quant_min == 0:
            theirs.zero_point.clamp_(min=0)
