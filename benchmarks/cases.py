"""The registry: what is timed, against whom, on which shapes, and how many bytes the job has to move.

A case joins by one builder, decorated with `@case(...)`, that returns a `Bench`. Its `impls` are callables of one input
tensor, "qkernels" first, then the peers; its `check` calls all of them on fresh state and returns what differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.ao.quantization as torch_ao
from torch import Tensor, nn

import qkernels.modules
import qkernels.ops

OURS = "qkernels"
TORCH = "torch"

Impl = Callable[[Tensor], object]

ACTIVATIONS = (16, 64, 32, 32)  # 1,048,576 elements
SMALL = (64, 16)  # where the time is Python and dispatch
CONV_WEIGHTS = (256, 128, 3, 3)
TOKENS = (4096, 1024)


@dataclass(frozen=True)
class Bench:
    """One case on one device: implementations of the same job, and the proof that they do the same."""

    impls: dict[str, Impl]
    check: Callable[[Tensor], list[str]]


@dataclass(frozen=True)
class Case:
    """A named job. `passes`: how often, at the least, a tensor of the input's size is read or written."""

    name: str
    build: Callable[[torch.device], Bench]
    passes: int
    shapes: tuple[tuple[int, ...], ...]
    quick_shapes: tuple[tuple[int, ...], ...]

    def bytes_moved(self, x: Tensor) -> int:
        return self.passes * x.nbytes


CASES: dict[str, Case] = {}


def case(
    name: str,
    *,
    passes: int,
    shapes: tuple[tuple[int, ...], ...] = (SMALL, ACTIVATIONS, TOKENS),
    quick_shapes: tuple[tuple[int, ...], ...] = (SMALL, ACTIVATIONS),
) -> Callable[[Callable[[torch.device], Bench]], Callable[[torch.device], Bench]]:
    """Register a builder under `name`."""

    def register(build: Callable[[torch.device], Bench]) -> Callable[[torch.device], Bench]:
        CASES[name] = Case(name, build, passes, shapes, quick_shapes)
        return build

    return register


def differences(ours: object, theirs: object) -> list[str]:
    """What is not bit-equal, in one line each. Tensors, and tuples and dicts of them."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        if ours.keys() != theirs.keys():
            return [f"keys {sorted(ours)} and {sorted(theirs)}"]
        return [f"{key}: {line}" for key in ours for line in differences(ours[key], theirs[key])]
    if isinstance(ours, tuple) and isinstance(theirs, tuple) and len(ours) == len(theirs):
        return [line for pair in zip(ours, theirs, strict=True) for line in differences(*pair)]
    if not (isinstance(ours, Tensor) and isinstance(theirs, Tensor)):
        return [f"{type(ours).__name__} and {type(theirs).__name__} do not compare"]
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return [f"{ours.dtype} {tuple(ours.shape)} and {theirs.dtype} {tuple(theirs.shape)}"]
    wrong = int((ours != theirs).sum())
    return [f"{wrong} of {ours.numel()} values differ"] if wrong else []


def of_functions(ours: Impl, torchs: Impl) -> Bench:
    """A bench of two pure functions."""
    return Bench({OURS: ours, TORCH: torchs}, lambda x: differences(ours(x), torchs(x)))


def of_modules(
    make: Callable[[ModuleType], nn.Module], device: torch.device, step: Callable[[nn.Module, Tensor], object]
) -> Bench:
    """A bench of one module of ours and torch.ao's of the same name, made by `make(library)` and driven by `step`."""

    def check(x: Tensor) -> list[str]:
        ours, theirs = make(qkernels.modules).to(device), make(torch_ao).to(device)
        for _ in range(2):  # the second batch takes the running path
            found = differences(step(ours, x), step(theirs, x))
            found += differences(dict(ours.state_dict()), dict(theirs.state_dict()))
            if found:
                return found
            x = x * 1.5
        return []

    ours, theirs = make(qkernels.modules).to(device), make(torch_ao).to(device)
    return Bench({OURS: lambda x: step(ours, x), TORCH: lambda x: step(theirs, x)}, check)


def train_step(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Forward and backward; the incoming gradient is x itself, so that no extra tensor is made."""
    leaf = x.detach().requires_grad_()
    y = function(leaf)
    return y.detach(), torch.autograd.grad(y, leaf, x)[0]


def per_channel_qparams(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    channels = x.shape[axis]
    scale = torch.linspace(0.01, 0.1, channels, device=x.device)
    return scale, torch.arange(channels, device=x.device, dtype=torch.int32) % 11 - 5


@case("aminmax", passes=1)
def _(device: torch.device) -> Bench:
    return of_functions(qkernels.ops.aminmax, lambda x: tuple(torch.aminmax(x)))


@case("aminmax axis=1", passes=1)
def _(device: torch.device) -> Bench:
    def torchs(x: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(torch.aminmax(x.transpose(0, 1).flatten(1), dim=1))  # as torch.ao's PerChannelMinMaxObserver does

    return of_functions(lambda x: qkernels.ops.aminmax(x, 1), torchs)


@case("fake_quantize", passes=2)
def _(device: torch.device) -> Bench:
    scale, zero_point = torch.tensor([0.05], device=device), torch.tensor([3], dtype=torch.int32, device=device)
    return of_functions(
        lambda x: qkernels.ops.fake_quantize(x, scale, zero_point, -128, 127),
        lambda x: torch.fake_quantize_per_tensor_affine(x, scale, zero_point, -128, 127),
    )


@case("fake_quantize fwd+bwd", passes=5)
def _(device: torch.device) -> Bench:
    scale, zero_point = torch.tensor([0.05], device=device), torch.tensor([3], dtype=torch.int32, device=device)
    return of_functions(
        lambda x: train_step(lambda leaf: qkernels.ops.fake_quantize(leaf, scale, zero_point, -128, 127), x),
        lambda x: train_step(lambda leaf: torch.fake_quantize_per_tensor_affine(leaf, scale, zero_point, -128, 127), x),
    )


@case("fake_quantize axis=1 fwd+bwd", passes=5)
def _(device: torch.device) -> Bench:
    cache: dict[int, tuple[Tensor, Tensor]] = {}

    def qparams(x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[1] not in cache:
            cache[x.shape[1]] = per_channel_qparams(x, 1)
        return cache[x.shape[1]]

    def ours(x: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero_point = qparams(x)
        return train_step(lambda leaf: qkernels.ops.fake_quantize(leaf, scale, zero_point, -128, 127, 1), x)

    def torchs(x: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero_point = qparams(x)
        return train_step(lambda leaf: torch.fake_quantize_per_channel_affine(leaf, scale, zero_point, 1, -128, 127), x)

    return of_functions(ours, torchs)


@case("MinMaxObserver", passes=1)
def _(device: torch.device) -> Bench:
    return of_modules(lambda library: library.MinMaxObserver(), device, nn.Module.__call__)


@case("MovingAverageMinMaxObserver", passes=1)
def _(device: torch.device) -> Bench:
    return of_modules(lambda library: library.MovingAverageMinMaxObserver(), device, nn.Module.__call__)


@case("MovingAverageMinMaxObserver.calculate_qparams", passes=0, shapes=(SMALL,), quick_shapes=(SMALL,))
def _(device: torch.device) -> Bench:
    def make(library: ModuleType) -> nn.Module:
        observer = library.MovingAverageMinMaxObserver().to(device)
        observer(torch.linspace(-1, 2, 1024, device=device))
        return observer

    return of_modules(make, device, lambda observer, x: tuple(observer.calculate_qparams()))


@case("PerChannelMinMaxObserver ch_axis=1", passes=1)
def _(device: torch.device) -> Bench:
    return of_modules(lambda library: library.PerChannelMinMaxObserver(ch_axis=1), device, nn.Module.__call__)


@case("FakeQuantize step", passes=6)
def _(device: torch.device) -> Bench:
    """Observe, fake-quantize, backward: x is read by the observer, then x -> y, then (dy, x) -> dx."""
    return of_modules(lambda library: library.FakeQuantize(), device, train_step)


@case("FakeQuantize per channel step", passes=6, shapes=(CONV_WEIGHTS,), quick_shapes=(CONV_WEIGHTS,))
def _(device: torch.device) -> Bench:
    def make(library: ModuleType) -> nn.Module:
        return library.FakeQuantize(
            observer=library.MovingAveragePerChannelMinMaxObserver,
            quant_min=-128,
            quant_max=127,
            dtype=torch.qint8,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
        )

    return of_modules(make, device, train_step)


@case("FusedMovingAvgObsFakeQuantize step", passes=6)
def _(device: torch.device) -> Bench:
    return of_modules(lambda library: library.FusedMovingAvgObsFakeQuantize(), device, train_step)
