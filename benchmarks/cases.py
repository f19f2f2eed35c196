"""The registry: what is timed, against whom, on which inputs, and how many bytes the job has to move.

A case joins by one builder, decorated with `@case(...)`, that returns a `Bench` for a device. Its `impls` are callables
of an input and a gradient of its shape, "qkernels" first, then the peers; its `results` runs one of them by name on
fresh state and returns what the gate compares.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from types import ModuleType

import torch
import torch.ao.quantization as torch_ao
from torch import Tensor, nn

import qkernels.modules
import qkernels.ops
from benchmarks import inputs
from benchmarks.inputs import ACTIVATIONS, CONV_WEIGHTS, IMAGES, SMALL, TOKENS, Input, both_dtypes, plain

OURS = "qkernels"
TORCH = "torch"

Impl = Callable[[Tensor, Tensor], object]


@dataclass(frozen=True)
class Bench:
    """One case on one device: implementations of the same job, and what each of them gives for an input."""

    impls: dict[str, Impl]
    results: Callable[[str, Tensor], object]


Builder = Callable[[torch.device], Bench]


@dataclass(frozen=True)
class Case:
    """A named job. `passes`: how often, at the least, a tensor of the input's size is read or written."""

    name: str
    build: Builder
    passes: int
    cpu: tuple[Input, ...]
    cpu_quick: tuple[Input, ...]
    cuda: tuple[Input, ...] = ()

    def bytes_moved(self, x: Tensor) -> int:
        """The least that the job reads and writes."""
        return self.passes * x.nbytes

    def inputs(self, device: torch.device, quick: bool) -> tuple[Input, ...]:
        """What the case is timed on; nothing where it has no input for such a device."""
        if device.type != "cuda":
            return self.cpu_quick if quick else self.cpu
        return tuple(dict.fromkeys((*self.cuda[:1], *self.cuda[-1:]))) if quick else self.cuda


CASES: dict[str, Case] = {}

_USUAL = (SMALL, ACTIVATIONS, TOKENS)


def case(
    name: str,
    *,
    passes: int,
    shapes: tuple[inputs.Shape, ...] = _USUAL,
    cuda: tuple[Input, ...] = inputs.PER_TENSOR,
) -> Callable[[Builder], Builder]:
    """Register a builder under `name`. `shapes` are those of the CPU; a quick run leaves out the tokens."""

    def register(build: Builder) -> Builder:
        quick = plain(*(shape for shape in shapes if shape != TOKENS))
        CASES[name] = Case(name, build, passes, plain(*shapes), quick, cuda)
        return build

    return register


def of_functions(ours: Callable[[Tensor], object], torchs: Callable[[Tensor], object]) -> Bench:
    """A bench of two pure functions."""
    return of_steps(lambda x, dy: ours(x), lambda x, dy: torchs(x))


def of_steps(ours: Impl, torchs: Impl) -> Bench:
    """A bench of two pure functions of an input and a gradient."""
    impls = {OURS: ours, TORCH: torchs}
    return Bench(impls, lambda name, x: impls[name](x, x))


def of_modules(
    make: Callable[[ModuleType], nn.Module],
    device: torch.device,
    step: Callable[[nn.Module, Tensor, Tensor], object],
) -> Bench:
    """A bench of one module of ours and torch.ao's of the same name, made by `make(library)` and driven by `step`."""
    libraries = {OURS: qkernels.modules, TORCH: torch_ao}

    def results(name: str, x: Tensor) -> tuple[object, ...]:
        module = make(libraries[name]).to(device)
        after = []
        for batch in (x, x * 1.5):  # the second takes the running path
            output = step(module, batch, batch)
            after.append((output, {key: value.clone() for key, value in module.state_dict().items()}))
        return tuple(after)

    modules = {name: make(library).to(device) for name, library in libraries.items()}
    impls: dict[str, Impl] = {name: partial(step, module) for name, module in modules.items()}
    return Bench(impls, results)


def observe(observer: nn.Module, x: Tensor, dy: Tensor) -> object:
    """A forward alone."""
    return observer(x)


def train_step(function: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Forward and backward."""
    leaf = x.detach().requires_grad_()
    y = function(leaf)
    return y.detach(), torch.autograd.grad(y, leaf, dy)[0]


@lru_cache(maxsize=8)
def per_channel_qparams(channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scales and zero points, computed on the CPU, so that they are the same bits on every device."""
    scale = torch.linspace(0.01, 0.1, channels)
    return scale.to(device), (torch.arange(channels, dtype=torch.int32) % 11 - 5).to(device)


@case("aminmax", passes=1)
def _(device: torch.device) -> Bench:
    return of_functions(qkernels.ops.aminmax, lambda x: tuple(torch.aminmax(x)))


def aminmax_along(axis: int) -> Builder:
    def build(device: torch.device) -> Bench:
        def torchs(x: Tensor) -> tuple[Tensor, Tensor]:
            return tuple(torch.aminmax(x.transpose(0, axis).flatten(1), dim=1))  # as torch.ao's observer does

        return of_functions(lambda x: qkernels.ops.aminmax(x, axis), torchs)

    return build


case("aminmax axis=1", passes=1, cuda=inputs.SECOND_AXIS + both_dtypes(inputs.LLM_LINEAR))(aminmax_along(1))
case("aminmax axis=0", passes=1, shapes=(), cuda=inputs.WEIGHTS)(aminmax_along(0))
case("aminmax axis=-1", passes=1, shapes=(), cuda=inputs.LAST_AXIS)(aminmax_along(-1))


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
    return of_steps(
        lambda x, dy: train_step(lambda leaf: qkernels.ops.fake_quantize(leaf, scale, zero_point, -128, 127), x, dy),
        lambda x, dy: train_step(
            lambda leaf: torch.fake_quantize_per_tensor_affine(leaf, scale, zero_point, -128, 127), x, dy
        ),
    )


def fake_quantize_along(axis: int) -> Builder:
    def build(device: torch.device) -> Bench:
        def ours(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
            scale, zero_point = per_channel_qparams(x.shape[axis], device)
            return train_step(lambda leaf: qkernels.ops.fake_quantize(leaf, scale, zero_point, -128, 127, axis), x, dy)

        def torchs(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
            scale, zero_point = per_channel_qparams(x.shape[axis], device)
            dim = axis % x.ndim
            return train_step(
                lambda leaf: torch.fake_quantize_per_channel_affine(leaf, scale, zero_point, dim, -128, 127), x, dy
            )

        return of_steps(ours, torchs)

    return build


case("fake_quantize axis=1 fwd+bwd", passes=5, cuda=inputs.SECOND_AXIS + both_dtypes(inputs.LLM_LINEAR))(
    fake_quantize_along(1)
)
case("fake_quantize axis=0 fwd+bwd", passes=5, shapes=(), cuda=inputs.WEIGHTS)(fake_quantize_along(0))
case("fake_quantize axis=-1 fwd+bwd", passes=5, shapes=(), cuda=inputs.LAST_AXIS)(fake_quantize_along(-1))


@case("MinMaxObserver", passes=1)
def _(device: torch.device) -> Bench:
    return of_modules(lambda library: library.MinMaxObserver(), device, observe)


@case("MovingAverageMinMaxObserver", passes=1)
def _(device: torch.device) -> Bench:
    return of_modules(lambda library: library.MovingAverageMinMaxObserver(), device, observe)


@case("MovingAverageMinMaxObserver.calculate_qparams", passes=0, shapes=(SMALL,), cuda=plain(SMALL))
def _(device: torch.device) -> Bench:
    def make(library: ModuleType) -> nn.Module:
        observer = library.MovingAverageMinMaxObserver()
        observer(torch.linspace(-1, 2, 1024))
        return observer

    return of_modules(make, device, lambda observer, x, dy: tuple(observer.calculate_qparams()))


@case("PerChannelMinMaxObserver ch_axis=1", passes=1, cuda=inputs.SECOND_AXIS)
def _(device: torch.device) -> Bench:
    return of_modules(lambda library: library.PerChannelMinMaxObserver(ch_axis=1), device, observe)


@case("FakeQuantize step", passes=6)
def _(device: torch.device) -> Bench:
    """Observe, fake-quantize, backward: x is read by the observer, then x -> y, then (dy, x) -> dx."""
    return of_modules(lambda library: library.FakeQuantize(), device, train_step)


@case("FakeQuantize per channel step", passes=6, shapes=(CONV_WEIGHTS,), cuda=inputs.WEIGHTS)
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


@case("FusedMovingAvgObsFakeQuantize step", passes=6, cuda=plain(SMALL, ACTIVATIONS, IMAGES))
def _(device: torch.device) -> Bench:
    """float32 only, as torch's fused operator is."""
    return of_modules(lambda library: library.FusedMovingAvgObsFakeQuantize(), device, train_step)
