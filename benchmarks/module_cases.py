"""The cases of the modules: observer steps, calibration of a whole model, calculate_qparams, fake-quant train steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache, partial
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.ao.quantization as torch_ao
from torch import Tensor, nn
from torch.ao.quantization.quantize_fx import prepare_fx

import qkernels
import qkernels.modules
from benchmarks import inputs, models
from benchmarks.cases import Bench, Impl, case, gather, train_step
from benchmarks.inputs import CONV_WEIGHTS, SMALL, plain
from benchmarks.peers import OURS, TORCH, TORCHAO, load

Library = ModuleType | SimpleNamespace
Step = Callable[[Any, Tensor, Tensor], object]
PEERS = (TORCH, TORCHAO)


def torchao_library() -> SimpleNamespace:
    """torchao's observers and fake quantizers under one roof, as torch.ao has them."""
    observers = vars(load("torchao.quantization.pt2e", "observer"))
    return SimpleNamespace(**{**observers, **vars(load("torchao.quantization.pt2e", "fake_quantize"))})


def after_two_batches(module: nn.Module, step: Step, x: Tensor) -> tuple[object, ...]:
    """Outputs and state after x and after another batch, which takes the running path."""
    after = []
    for batch in (x, x * 1.5):
        output = step(module, batch, batch)
        after.append((output, {key: value.clone() for key, value in module.state_dict().items()}))
    return tuple(after)


def of_modules(make: Callable[[Any], nn.Module], device: torch.device, step: Step) -> Bench:
    """A bench of one module of ours, torch.ao's and torchao's of the same name, made by `make(library)`."""
    libraries: dict[str, Callable[[], Library]] = {
        OURS: lambda: qkernels.modules,
        TORCH: lambda: torch_ao,
        TORCHAO: torchao_library,
    }

    def module(name: str) -> nn.Module:
        return make(libraries[name]()).to(device)

    impls, absent = gather(
        device,
        {name: partial(step, module(name)) for name in (OURS, TORCH)},
        {TORCHAO: lambda: partial(step, module(TORCHAO))},
    )
    return Bench(impls, lambda name, x: after_two_batches(module(name), step, x), absent)


def observe(observer: nn.Module, x: Tensor, dy: Tensor) -> object:
    """A forward alone."""
    return observer(x)


@case("MinMaxObserver", suite="modules", passes=1, peers=PEERS)
def _(device: torch.device) -> Bench:
    return of_modules(lambda library: library.MinMaxObserver(), device, observe)


@case("MovingAverageMinMaxObserver", suite="modules", passes=1, peers=PEERS)
def _(device: torch.device) -> Bench:
    return of_modules(lambda library: library.MovingAverageMinMaxObserver(), device, observe)


@case("PerChannelMinMaxObserver ch_axis=1", suite="modules", passes=1, granularity=inputs.AXIS_1, peers=PEERS)
def _(device: torch.device) -> Bench:
    return of_modules(lambda library: library.PerChannelMinMaxObserver(ch_axis=1), device, observe)


@case(
    "MovingAveragePerChannelMinMaxObserver",
    suite="modules",
    passes=1,
    shapes=(SMALL, CONV_WEIGHTS),
    granularity=inputs.AXIS_0,
    peers=PEERS,
)
def _(device: torch.device) -> Bench:
    return of_modules(lambda library: library.MovingAveragePerChannelMinMaxObserver(), device, observe)


def calculate_qparams(observer: Any, x: Tensor, dy: Tensor) -> object:
    """Scale and zero point; neither x nor dy is looked at."""
    return tuple(observer.calculate_qparams())


_ONE_SMALL = inputs.Granularity(plain(SMALL))


@case(
    "MovingAverageMinMaxObserver.calculate_qparams",
    suite="modules",
    passes=0,
    shapes=(SMALL,),
    granularity=_ONE_SMALL,
    peers=PEERS,
)
def _(device: torch.device) -> Bench:
    def make(library: Any) -> nn.Module:
        observer = library.MovingAverageMinMaxObserver()
        observer(torch.linspace(-1, 2, 1024))
        return observer

    return of_modules(make, device, calculate_qparams)


@case(
    "PerChannelMinMaxObserver.calculate_qparams, 256 channels",
    suite="modules",
    passes=0,
    shapes=(SMALL,),
    granularity=_ONE_SMALL,
    peers=PEERS,
)
def _(device: torch.device) -> Bench:
    def make(library: Any) -> nn.Module:
        observer = library.PerChannelMinMaxObserver(dtype=torch.qint8, qscheme=torch.per_channel_symmetric)
        observer(torch.linspace(-1, 2, 1024).reshape(256, 4))
        return observer

    return of_modules(make, device, calculate_qparams)


@case("FakeQuantize step", suite="modules", passes=6, peers=PEERS)
def _(device: torch.device) -> Bench:
    """Observe, fake-quantize, backward: x is read by the observer, then x -> y, then (dy, x) -> dx."""
    return of_modules(lambda library: library.FakeQuantize(), device, train_step)


@case(
    "FakeQuantize per channel step",
    suite="modules",
    passes=6,
    shapes=(CONV_WEIGHTS,),
    granularity=inputs.AXIS_0,
    peers=PEERS,
)
def _(device: torch.device) -> Bench:
    def make(library: Any) -> nn.Module:
        return library.FakeQuantize(
            observer=library.MovingAveragePerChannelMinMaxObserver,
            quant_min=-128,
            quant_max=127,
            dtype=torch.qint8,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
        )

    return of_modules(make, device, train_step)


@case(
    "FusedMovingAvgObsFakeQuantize step",
    suite="modules",
    passes=6,
    granularity=inputs.Granularity(
        plain(SMALL, inputs.ACTIVATIONS, inputs.IMAGES),
        full=plain(inputs.ONE, inputs.RESNET_CONV2, inputs.VIT_TOKENS),
        cuda_full=plain(inputs.RESNET_BATCH, inputs.GIBIBYTE),
    ),
    peers=PEERS,
)
def _(device: torch.device) -> Bench:
    """float32 only, as torch's fused operator is."""
    return of_modules(lambda library: library.FusedMovingAvgObsFakeQuantize(), device, train_step)


@case("FixedQParamsFakeQuantize step", suite="modules", passes=5, peers=PEERS)
def _(device: torch.device) -> Bench:
    """Given qparams, those of a sigmoid's output: no observation."""

    def make(library: Any) -> nn.Module:
        return library.FixedQParamsFakeQuantize(library.FixedQParamsObserver.with_args(scale=1 / 256, zero_point=0))

    return of_modules(make, device, train_step)


@lru_cache(maxsize=1)
def observed_resnet() -> nn.Module:
    """A ResNet-18-shaped model in eval mode with torch.ao's min/max observers, prepared by FX, on the CPU."""
    model, x = models.resnet18()
    qconfig = torch_ao.QConfig(
        activation=torch_ao.MovingAverageMinMaxObserver.with_args(dtype=torch.quint8),
        weight=torch_ao.PerChannelMinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_channel_symmetric),
    )
    return prepare_fx(model.eval(), torch_ao.QConfigMapping().set_global(qconfig), (x,))


def calibrate(model: Any, x: Tensor, dy: Tensor) -> Tensor:
    """One batch through the model."""
    with torch.no_grad():
        return model(x)


@case(
    "ResNet-18 calibration",
    suite="modules",
    passes=0,
    shapes=((8, 3, 64, 64),),
    granularity=inputs.Granularity(plain((32, 3, 224, 224))),
    tiny=(1, 3, 32, 32),
    dtypes=("float32",),
)
def _(device: torch.device) -> Bench:
    """Whole forward passes of the same float model; only the observers differ. They are a small part of the time."""

    def model(name: str) -> nn.Module:
        prepared = copy.deepcopy(observed_resnet()).to(device)
        if name == OURS:
            qkernels.swap(prepared)
        return prepared

    impls: dict[str, Impl] = {name: partial(calibrate, model(name)) for name in (OURS, TORCH)}
    return Bench(impls, lambda name, x: after_two_batches(model(name), calibrate, x))
