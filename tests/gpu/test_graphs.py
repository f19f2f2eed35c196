"""A training step captured once as a CUDA graph: every replay does what the same step does eagerly, flags included."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qkernels.modules import (
    FakeQuantize,
    FusedMovingAvgObsFakeQuantize,
    LearnableFakeQuantize,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
)
from tests.oracles import assert_bits_equal

Step = Callable[[], None]
Record = Callable[[Step], Step]  # makes of a step what repeats it
CHANNELS = 6
SHAPE = (8, CHANNELS, 331, 57)  # several programs share the tensor, and each channel; the runs have ragged ends
SMALL = (2, CHANNELS, 33, 7)
LEARNING_RATE = 1e-3


def calls(step: Step) -> Step:
    """The step itself: what stands for a graph on the CPU."""
    return step


def captured(step: Step) -> Step:
    """The step as a CUDA graph; returns its replay. Capturing runs nothing."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def observe(observer: type, **kwargs: Any) -> dict[str, Any]:
    return {"observer": observer, "quant_min": -128, "quant_max": 127, "dtype": torch.qint8, **kwargs}


PER_TENSOR = observe(MovingAverageMinMaxObserver, averaging_constant=0.25)
PER_CHANNEL = observe(
    MovingAveragePerChannelMinMaxObserver, averaging_constant=0.25, ch_axis=1, qscheme=torch.per_channel_affine
)
MODULES: dict[str, Callable[[], Any]] = {
    "FakeQuantize": lambda: FakeQuantize(**PER_TENSOR),
    "FakeQuantize per channel": lambda: FakeQuantize(**PER_CHANNEL),
    "FusedMovingAvgObsFakeQuantize": lambda: FusedMovingAvgObsFakeQuantize(**PER_TENSOR),
    "LearnableFakeQuantize": lambda: LearnableFakeQuantize(**PER_TENSOR, use_grad_scaling=True),
    "LearnableFakeQuantize per channel": lambda: LearnableFakeQuantize(**PER_CHANNEL, channel_len=CHANNELS),
}


class Training:
    """A module in training: forward, backward and a step of its parameters, in tensors that stay where they are."""

    def __init__(self, module: nn.Module, like: Tensor) -> None:
        self.module = module
        self.x = torch.zeros_like(like).requires_grad_()
        self.dy, self.y, self.dx = (torch.zeros_like(like) for _ in range(3))

    def step(self) -> None:
        parameters = list(self.module.parameters())
        y = self.module(self.x)
        dx, *gradients = torch.autograd.grad(y, (self.x, *parameters), self.dy)
        with torch.no_grad():
            self.y.copy_(y)
            self.dx.copy_(dx)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(gradient, alpha=LEARNING_RATE)

    def take(self, batch: Tensor, dy: Tensor) -> None:
        with torch.no_grad():
            self.x.copy_(batch)
            self.dy.copy_(dy)

    def results(self) -> dict[str, Tensor]:
        return {"y": self.y, "dx": self.dx, **self.module.state_dict()}


def turn_flags(module: Any, number: int) -> None:
    """Observe in the first two batches; then the quantizers hold still, or learn. In place, on the device."""
    if isinstance(module, LearnableFakeQuantize):
        module.set_stage(observing=number < 2, learning=number >= 2)
    elif number == 2:
        module.disable_observer()
    elif number == 3:
        module.disable_fake_quant()


def check_replay(make: Callable[[], nn.Module], record: Record, device: torch.device, shape: tuple[int, ...]) -> None:
    """Four batches through an eager module and a recorded one, of which everything must be equal, bit for bit."""
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randn(shape, generator=generator).to(device) * (1 + n) for n in range(4)]
    dy = torch.randn(shape, generator=generator).to(device)
    module = make().to(device)
    module(batches[0])  # shapes per-channel state
    eager, replayed = (Training(copy.deepcopy(module), dy) for _ in range(2))
    for training in (eager, replayed):
        side = torch.cuda.Stream() if device.type == "cuda" else None
        if side is not None:  # a capture wants a warm-up on a stream of its own
            side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            training.take(batches[1], dy)
            training.step()
        if side is not None:
            torch.cuda.current_stream().wait_stream(side)
    replay = record(replayed.step)
    before = {name: value.clone() for name, value in replayed.results().items()}
    for number, batch in enumerate(batches):
        for training, step in ((eager, eager.step), (replayed, replay)):
            turn_flags(training.module, number)
            training.take(batch, dy)
            step()
        expected = eager.results()
        for name, value in replayed.results().items():
            assert_bits_equal(value, expected[name], context=f"{name} after batch {number}")
    after = replayed.results()
    assert not torch.equal(after["scale"], before["scale"]), "the steps changed nothing"


@pytest.mark.interpreter
@pytest.mark.parametrize("name", MODULES)
def test_the_check_with_calls(name: str) -> None:
    check_replay(MODULES[name], calls, torch.device("cpu"), SMALL)


def test_a_replay_that_does_nothing_is_found() -> None:
    with pytest.raises(AssertionError):
        check_replay(MODULES["FakeQuantize"], lambda step: lambda: None, torch.device("cpu"), SMALL)


def test_a_flag_frozen_into_the_graph_is_found() -> None:
    """As if a flag had been read on the host at capture: the replay goes on observing."""

    def record(step: Step) -> Step:
        step.__self__.module.disable_observer = lambda: None  # type: ignore[attr-defined]
        return step

    with pytest.raises(AssertionError, match="after batch 2"):
        check_replay(MODULES["FakeQuantize"], record, torch.device("cpu"), SMALL)


@pytest.mark.cuda
@pytest.mark.parametrize("name", MODULES)
def test_a_replay_equals_the_eager_step(name: str, device: torch.device) -> None:
    check_replay(MODULES[name], captured, device, SHAPE)
