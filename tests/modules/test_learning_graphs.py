"""The schedule of stages, in eager mode and in the graph; training steps of whole blocks as one graph.

Dynamo does not trace an optimizer's `step` behind a backward in one graph (torch 2.13), so the steps that are one graph
use torch's functional SGD, and the optimizers are compiled by themselves, together with `schedule.step()`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.sgd import sgd

import qkernels.modules as ours
from qkernels.modules import learning
from tests.modules import support as s
from tests.modules.test_compile import HOST_READS, Recorder
from tests.modules.test_learning import prepare, quantizers, random

BLOCKS = ("residual block, FX", "transformer, eager")
STAGES = {"observe": (1, 0), "learn": (0, 1), "frozen": (0, 0)}  # static_enabled, learning_enabled
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1),
}
DECAYED = {"qparam_lr": 1e-3, "qparam_weight_decay": 0.1}  # decay moves what has no gradient too


def qparams(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for q in quantizers(model).values() for p in (q.scale, q.zero_point)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, a, b))


def train(model: nn.Module, x: torch.Tensor, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """A step towards a fixed target, the schedule's apart."""
    optimizer.zero_grad()
    loss = (model(x) - random(*x.shape, seed=5, device=x.device)).square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


# ------------------------------------------------------------------------------------------ the schedule


@pytest.mark.parametrize(("observe", "learn"), [(2, 3), (0, 2), (2, 0), (1, None), (0, None)])
@pytest.mark.parametrize("quantizing", [True, False])
def test_stages(observe: int, learn: int | None, quantizing: bool, device: torch.device) -> None:
    """Each has its flags from the start on; initialised weights never observe."""
    model, _ = prepare("transformer, eager", device)
    schedule = learning.LearningSchedule(model, observe, learn, quantizing)
    expected = ["observe"] * observe + ["learn"] * (7 if learn is None else learn) + ["frozen"] * 9
    for stage in expected[:7]:
        assert schedule.stage == stage
        for name, q in quantizers(model).items():
            observing, learns = STAGES[stage]
            assert q.static_enabled.item() == (observing and not name.endswith("weight_fake_quant"))
            assert q.learning_enabled.item() == q.gradient_enabled.item() == learns
            assert q.fake_quant_enabled.item() == (quantizing or stage != "observe")
        schedule.step()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("compiled", [False, True])
def test_frozen_values_are_held(optimizer: str, compiled: bool, device: torch.device) -> None:
    """Against momentum and weight decay, which go on to move parameters; in eager mode and in the optimizer's graph."""
    model, x = prepare("residual block, FX", device)
    schedule = learning.LearningSchedule(model, 1, 3)
    opt = OPTIMIZERS[optimizer](learning.parameter_groups(model, **DECAYED))
    update = inspect.unwrap(type(opt).step)  # without the profiler and the graph break around it

    def optimize() -> None:
        with torch.no_grad():
            update(opt)
        moved.copy_(torch.cat([q.scale for q in quantizers(model).values()]))
        schedule.step()

    moved = torch.cat(qparams(model)[::2])
    counter = CompileCounterWithBackend("aot_eager")
    forward: Any = model
    if compiled:
        forward = torch.compile(model, fullgraph=True, backend="aot_eager")
        optimize = torch.compile(optimize, fullgraph=True, backend=counter)
    previous = qparams(model)
    for step in range(8):
        stage = schedule.stage
        opt.zero_grad(set_to_none=False)  # in eager mode on the CPU there would be no gradient else, and no move
        forward(x).square().mean().backward()
        optimize()
        current = qparams(model)
        if stage == "frozen":
            assert same(current, previous), step
            assert not torch.equal(moved, torch.cat(current[::2])), step  # the optimizer had moved them
        else:
            assert not same(current, previous), step
        previous = current
    if compiled:
        # Adam and SGD make their state in the first step; Adam's steps are tensors, so one graph follows.
        assert counter.frame_count <= 2


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_resume(stop: int, device: torch.device) -> None:
    """Saved in any stage and loaded into fresh objects, training goes on as if nothing had happened."""

    def fresh() -> tuple[nn.Module, learning.LearningSchedule, torch.optim.Optimizer, torch.Tensor]:
        model, x = prepare("residual block, FX", device)
        schedule = learning.LearningSchedule(model, 2, 2)
        return model, schedule, OPTIMIZERS["SGD"](learning.parameter_groups(model, **DECAYED)), x

    def run(parts: Any, steps: int) -> None:
        model, schedule, optimizer, x = parts
        for _ in range(steps):
            train(model, x, optimizer)
            schedule.step()

    whole, first, second = fresh(), fresh(), fresh()
    run(whole, 7)
    run(first, stop)
    for source, target in zip(first[:3], second[:3], strict=True):
        target.load_state_dict(copy.deepcopy(source.state_dict()))
    assert first[1].stage == second[1].stage
    run(second, 7 - stop)
    for (name, a), b in zip(whole[0].state_dict().items(), second[0].state_dict().values(), strict=True):
        s.check_same(b, a.cpu(), name)
    assert same(list(whole[1].state_dict().values()), list(second[1].state_dict().values()))


def test_channels_that_become_known_later(device: torch.device) -> None:
    """Also in a checkpoint. Afterwards they are held like the others."""
    q = ours.LearnableFakeQuantize(ours.PerChannelMinMaxObserver, -8, 7, dtype=torch.qint8).to(device)
    schedule = learning.LearningSchedule(q, 1, 1)
    x = random(3, 4, device=device)
    for _ in range(2):
        q(x)
        schedule.step()
    held = q.scale.detach().clone()
    again = learning.LearningSchedule(ours.LearnableFakeQuantize(ours.MinMaxObserver).to(device), 1, 1)
    again.load_state_dict(schedule.state_dict())
    assert torch.equal(again.held, torch.cat([held, q.zero_point.detach()])) and held.shape == (3,)
    with torch.no_grad():
        q.scale += 1
    schedule.step()
    assert torch.equal(q.scale, held)


def test_schedule_owns_nothing_and_says_what_it_is() -> None:
    model, _ = prepare("residual block, FX", torch.device("cpu"))
    next(iter(quantizers(model).values())).freeze()
    schedule = learning.LearningSchedule(model, 10)
    assert not list(schedule.parameters()) and list(schedule.modules()) == [schedule]
    assert list(schedule.state_dict()) == ["steps", "observes", "held"] and schedule.held.numel() == 0
    count = len(quantizers(model)) - 1
    assert repr(schedule) == (
        f"LearningSchedule(quantizers={count}, observe_steps=10, learn_steps=None, fake_quantize_while_observing=True)"
    )
    with pytest.raises(ValueError, match=r"LearningSchedule: model must hold a learnable quantizer .* got none"):
        learning.LearningSchedule(nn.Linear(2, 2), 1)
    with pytest.raises(ValueError, match="LearningSchedule: observe_steps must be at least 0; got -1"):
        learning.LearningSchedule(model, -1)
    with pytest.raises(ValueError, match="LearningSchedule: learn_steps must be at least 0; got -2"):
        learning.LearningSchedule(model, 1, -2)
    with pytest.raises(TypeError, match="LearningSchedule: observe_steps must be an int; got float"):
        learning.LearningSchedule(model, 1.5)  # type: ignore[arg-type]


def test_torchao_face_is_scheduled_too(device: torch.device) -> None:
    pytest.importorskip("torchao", reason="the PT2E face needs torchao")
    from qkernels.modules import pt2e

    q = pt2e.LearnableFakeQuantize(pt2e.MinMaxObserver).to(device)
    schedule = learning.LearningSchedule(q, 1, 1)
    for observing, learns in STAGES.values():
        q(random(3, 4, device=device))
        assert (q.observer_enabled.item(), q.learning_enabled.item()) == (observing, learns)
        schedule.step()


# ------------------------------------------------------------------------------------------ whole steps as a graph


class Trainer:
    """Forward, backward, SGD with momentum for two groups, and the schedule, in one function."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.model, self.x = prepare(name, device)
        self.target = random(*copy.deepcopy(self.model)(self.x).shape, seed=5, device=device)
        self.schedule = learning.LearningSchedule(self.model, 2, 6)
        groups = learning.parameter_groups(self.model, lr=0.02, qparam_lr=1e-4)
        self.groups = [(group["params"], group["lr"]) for group in groups]
        self.momenta = {id(p): torch.zeros_like(p) for params, _ in self.groups for p in params}
        self.gradients: list[torch.Tensor] = []

    def step(self) -> torch.Tensor:
        parameters = [p for params, _ in self.groups for p in params]
        loss = (self.model(self.x) - self.target).square().mean()
        gradients = dict(
            zip(map(id, parameters), torch.autograd.grad(loss, parameters, materialize_grads=True), strict=True)
        )
        with torch.no_grad():
            for params, lr in self.groups:
                sgd(
                    params, [gradients[id(p)] for p in params], [self.momenta[id(p)] for p in params], foreach=True,
                    weight_decay=0, momentum=0.9, lr=lr, dampening=0, nesterov=False, maximize=False,
                )  # fmt: skip
        self.schedule.step()
        self.gradients = list(gradients.values())
        return loss.detach()

    def state(self) -> list[torch.Tensor]:
        everything = [*self.model.parameters(), *self.model.buffers(), *self.schedule.buffers()]
        return [*everything, *self.momenta.values()]


def check_gradients(mine: Trainer, twin: Trainer, bound: float) -> None:
    """Each within `bound` of eager's largest element, or of 1e-3 of all gradients' largest where it cancels to less."""
    largest = max(float(b.abs().max()) for b in twin.gradients)
    for a, b in zip(mine.gradients, twin.gradients, strict=True):
        error, size = float((a - b).abs().max()), max(float(b.abs().max()), 1e-3 * largest)
        assert error <= bound * size, f"{error} of {size}"


@pytest.mark.parametrize(
    ("name", "backend"), [(BLOCKS[0], "aot_eager"), (BLOCKS[1], "aot_eager"), ("one layer, FX", "inductor")]
)
def test_a_training_step_is_one_graph(name: str, backend: str, device: torch.device) -> None:
    """Through all stages: nothing recompiles; from equal states gradients equal eager's; the loss falls."""
    mine, twin = Trainer(name, device), Trainer(name, device)
    counter = CompileCounterWithBackend(backend)
    stages, losses = [], []
    with torch._dynamo.config.patch(trace_autograd_ops=True, error_on_recompile=True):
        step = torch.compile(mine.step, fullgraph=True, backend=counter)
        for _ in range(11):
            stages.append(mine.schedule.stage)
            with torch.no_grad():
                for a, b in zip(mine.state(), twin.state(), strict=True):
                    a.copy_(b)
            losses.append(float(step()))
            assert abs(losses[-1] - float(twin.step())) <= 1e-5 * losses[-1]
            check_gradients(mine, twin, 1e-4)
            assert mine.schedule.stage == twin.schedule.stage
    assert counter.frame_count == 1
    assert stages == ["observe"] * 2 + ["learn"] * 6 + ["frozen"] * 3
    assert losses[-1] < 0.97 * losses[2]


@pytest.mark.parametrize("name", BLOCKS)
def test_the_graph_holds_no_host_reads(name: str, device: torch.device) -> None:
    trainer, recorder = Trainer(name, device), Recorder()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        step = torch.compile(trainer.step, fullgraph=True, backend=recorder)
        step()
        step()
    assert len(recorder.captured) == 2  # Dynamo's and AOTAutograd's
    assert any("learnable_fake_quantize" in t for t in recorder.targets())
    reads = [t for t in recorder.targets() if any(word == t or word in t.split(".") for word in HOST_READS)]
    assert not reads, reads


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    """A step compiled for one model must not look like a recompilation of another's."""
    torch._dynamo.reset()
    yield


@pytest.mark.parametrize("name", BLOCKS)
def test_switches_do_not_recompile(name: str, device: torch.device) -> None:
    """The methods for model.apply, in any order, around one compiled forward and its backward."""
    (model, x), (twin, _) = prepare(name, device), prepare(name, device)
    for module in (*model.modules(), *twin.modules()):
        if hasattr(module, "_enable_slow_path_for_better_numerical_stability"):
            # torch.ao's short path reads running_var, which the forward then changes; AOTAutograd reads it again in the
            # backward (pytorch PR #197039), with or without quantizers. A step that is one graph is not affected.
            module._enable_slow_path_for_better_numerical_stability = True
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    learn, estimate, observe = ours.enable_param_learning, ours.enable_static_estimate, ours.enable_static_observation
    with torch._dynamo.config.patch(error_on_recompile=True):
        for switch in (observe, estimate, learn, estimate, learn, observe, learn):
            for run, net in ((compiled, model), (twin, twin)):
                net.apply(switch)
                net.zero_grad()
                run(x).square().mean().backward()
            largest = max(float(q.grad.abs().max()) for q in twin.parameters() if q.grad is not None)
            for (key, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
                expected = torch.zeros_like(b) if b.grad is None else b.grad
                bound = 1e-4 * max(float(expected.abs().max()), 1e-3 * largest)
                assert (a.grad - expected).abs().max() <= bound, (switch, key)
                learns = switch is learn or not key.endswith(("scale", "zero_point"))
                assert learns or not a.grad.any(), (switch, key)
    assert counter.frame_count == 1
