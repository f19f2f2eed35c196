"""Gradients of the learnable modules: where there are none, whose values they are of, factors and masks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.ao.quantization as torch_ao
from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize
from torch.utils.checkpoint import checkpoint

import qkernels
import qkernels.modules as ours
from tests.modules import support as s
from tests.modules.learnable_support import EACH_CASE, Case, dy_like, forward_stock, step_both, take_parameters
from tests.oracles_learnable import assert_learnable, reference_learnable

EACH_AFFINE = pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])


def learn(module: Any) -> Any:
    """Into the stage of learning."""
    (module.enable_range_learning if hasattr(module, "enable_range_learning") else module.enable_param_learning)()
    return module


def estimate(module: Any) -> Any:
    """Back to the stage of estimation."""
    (module.enable_observer if hasattr(module, "enable_range_learning") else module.enable_static_estimate)()
    return module


def backward(module: Any, x: torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
    a = x.detach().to(device).requires_grad_()
    y = forward_stock(module, a) if not type(module).__module__.startswith("qkernels") else module(a)
    y.backward(dy_like(x).to(device, y.dtype))
    return a.grad


def grads(module: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return module.scale.grad, module.zero_point.grad


def reference(module: Any, x: torch.Tensor, factor: float = 1.0, mask: str = "rounded") -> Any:
    axis = module.ch_axis if module.is_per_channel else None
    qparams = module.scale.detach().cpu(), module.zero_point.detach().cpu()
    return reference_learnable(dy_like(x), x, *qparams, module.quant_min, module.quant_max, factor, axis, None, mask)


# ------------------------------------------------------------------------------------------ where nothing is learned


@EACH_CASE
@pytest.mark.interpreter
def test_zeros_where_it_does_not_learn(case: Case, device: torch.device) -> None:
    """On every device and under compile alike. Stock clears requires_grad and gives none."""
    mine = case.mine(device)
    for stage in (learn, estimate, learn, estimate):
        mine.zero_grad()
        stage(mine)
        backward(mine, case.batch(1), device)
        assert bool(grads(mine)[0].any()) == (stage is learn)
        assert all(g is not None for g in grads(mine))
        assert mine.scale.requires_grad and mine.zero_point.requires_grad  # in every stage, as documented


@EACH_CASE
def test_gradients_of_an_earlier_stage_stay(case: Case) -> None:
    """Neither clears .grad; a stage that does not learn adds zeros to it."""
    mine = learn(case.mine())
    mine(case.batch(0))
    backward(mine, case.batch(1))
    kept = [g.clone() for g in grads(mine)]
    backward(estimate(mine), case.batch(2))
    for g, value in zip(grads(mine), kept, strict=True):
        assert torch.equal(g, value)


def test_requires_grad_semantics_of_torch_ao() -> None:
    """toggle_qparam_learning sets it, the stages do not clear it, enable_param_learning and set_stage bring it back."""
    mine = Case().mine()
    parameters = (mine.scale, mine.zero_point)
    mine(torch.ones(3))
    assert mine.toggle_qparam_learning(False) is mine
    assert not any(p.requires_grad for p in parameters)
    mine.enable_param_learning()
    assert all(p.requires_grad for p in parameters)
    for stage in (mine.enable_static_estimate, mine.enable_static_observation, mine.enable_param_learning):
        stage()
        assert all(p.requires_grad for p in parameters)
    for p in parameters:  # frozen by hand, as transfer learning does
        p.requires_grad_(False)
    backward(mine, torch.randn(5))
    assert grads(mine) == (None, None)


@pytest.mark.parametrize("kind", [bool, torch.tensor], ids=["bool", "tensor"])
def test_set_stage(kind: Any, device: torch.device) -> None:
    """Documented: `learning` says whether scale and zero point get gradients."""
    x = torch.randn(20)
    mine = Case().mine(device)
    for observing in (True, False):
        for learning in (True, False):
            for on in (True, False):
                mine.set_stage(observing=kind(observing), learning=kind(learning), fake_quantizing=kind(on))
                flags = (mine.static_enabled, mine.learning_enabled, mine.fake_quant_enabled)
                assert [int(f) for f in flags] == [observing, learning, on]
                assert all(f.dtype == torch.uint8 and f.shape == (1,) for f in flags)
                mine.zero_grad()
                before = mine.activation_post_process.max_val.clone()
                x = x * 2
                backward(mine, x, device)
                assert (mine.activation_post_process.max_val > before).item() == observing
                if on:
                    assert bool(grads(mine)[0].any()) == learning


def test_set_stage_after_learning_was_toggled_off() -> None:
    mine = Case().mine()
    mine(torch.ones(3))
    mine.toggle_qparam_learning(False)
    mine.set_stage(observing=False, learning=True)
    backward(mine, torch.randn(5))
    assert grads(mine)[0] is not None


# ------------------------------------------------------------------------------------------ freeze


@EACH_CASE
@pytest.mark.parametrize("how", ["method", "model"])
def test_freeze_ends_observation_and_learning(case: Case, how: str, device: torch.device) -> None:
    mine = learn(case.mine(device))
    mine(case.batch(0).to(device))
    if not case.symmetric:
        with torch.no_grad():
            mine.zero_point.add_(0.75)  # which rounds up
    expected = mine(case.batch(1).to(device)).detach()
    mine.freeze() if how == "method" else qkernels.freeze(torch.nn.Sequential(mine))
    before, parameters = s.snapshot(mine), [p.detach().clone() for p in mine.parameters()]
    s.check_bits(mine(case.batch(1).to(device)), expected.cpu(), "frozen y")
    dx = backward(mine, case.batch(1), device)
    s.check_same(dx, reference(mine, case.batch(1)).dx, "frozen dx")
    assert grads(mine) == (None, None)
    s.check_untouched(mine, before)
    mine(case.batch(5, 100.0).to(device))
    for p, value in zip(mine.parameters(), parameters, strict=True):
        s.check_bits(p, value.cpu(), "frozen parameter")


@EACH_CASE
def test_freeze_right_after_an_optimizer_step(case: Case, device: torch.device) -> None:
    """The step left a symmetric zero point off 0 and a scale below eps; frozen, y is that of the next forward."""
    mine = learn(case.mine(device))
    x = case.batch(1).to(device)
    mine(x)
    with torch.no_grad():
        mine.zero_point.add_(-1.75)
        mine.scale[0] = 1e-12
    twin = copy.deepcopy(mine)
    expected = twin(x)
    mine.freeze()
    s.check_bits(mine(x), expected.cpu(), "frozen y")


# ------------------------------------------------------------------------------------------ whose values


@EACH_CASE
def test_forward_twice_then_backward_of_both(case: Case, device: torch.device) -> None:
    """A shared quantizer that observes and learns: the second batch renews the Parameters in place. Gradients are
    those of the values that each forward used; stock's of the first one are of the second's.
    """
    mine = case.mine(device)
    if case.face == "torch.ao":
        mine.toggle_qparam_learning(True)
    else:
        mine.set_stage(observing=True, learning=True)
        mine._set_learning(True)
    batches = [case.batch(0), case.batch(1, 3.0)]
    outputs, wants = [], []
    for x in batches:
        a = x.to(device).requires_grad_()
        outputs.append((a, mine(a)))
        wants.append(reference(mine, x))
    assert not torch.equal(outputs[0][1], outputs[1][1])
    total = [torch.zeros_like(p) for p in mine.parameters()]
    for order in (1, 0):
        mine.zero_grad()
        a, y = outputs[order]
        y.backward(dy_like(batches[order]).to(device), retain_graph=True)
        gradients = (a.grad, *grads(mine))
        assert_learnable(y.detach(), gradients, wants[order], (mine.scale, mine.zero_point), f"forward {order}")
        total = [t + g for t, g in zip(total, grads(mine), strict=True)]
    mine.zero_grad()
    ((outputs[0][1] * dy_like(batches[0]).to(device)).sum()
     + (outputs[1][1] * dy_like(batches[1]).to(device)).sum()).backward()  # fmt: skip
    for g, t in zip(grads(mine), total, strict=True):
        torch.testing.assert_close(g, t, rtol=1e-6, atol=1e-6)


@EACH_CASE
def test_accumulation_over_micro_batches(case: Case, device: torch.device) -> None:
    """Four backwards without zero_grad: the sum of the four."""
    mine = learn(case.mine(device))
    mine(case.batch(0).to(device))
    alone = []
    for seed in range(1, 5):
        mine.zero_grad()
        backward(mine, case.batch(seed), device)
        alone.append([g.clone() for g in grads(mine)])
    mine.zero_grad()
    for seed in range(1, 5):
        backward(mine, case.batch(seed), device)
    for i, g in enumerate(grads(mine)):
        torch.testing.assert_close(g, sum(a[i] for a in alone), rtol=1e-6, atol=1e-6)


@EACH_CASE
def test_activation_checkpointing(case: Case, device: torch.device) -> None:
    """The forward runs twice. An observer of extremes is none the wiser; a moving average sees the batch twice."""
    mine = learn(case.mine(device))
    mine(case.batch(0).to(device))
    for observing in (False, True):
        mine.set_stage(observing=observing, learning=True)
        mine.zero_grad()
        twin = copy.deepcopy(mine)
        results = []
        for module, call in ((mine, lambda m, x: checkpoint(m, x, use_reentrant=False)), (twin, lambda m, x: m(x))):
            x = case.batch(1, 2.0).to(device).requires_grad_()
            y = call(module, torch.relu(x))
            y.backward(dy_like(x).to(device))
            results.append((y, x.grad, *grads(module), *module.parameters()))
        for a, b in zip(*results, strict=True):
            s.check_bits(a, b.cpu(), "checkpointed")


# ------------------------------------------------------------------------------------------ observers of other kinds


@pytest.mark.parametrize("symmetric", [False, True])
@EACH_AFFINE
def test_memoryless_observer(per_channel: bool, symmetric: bool, device: torch.device) -> None:
    """Estimation of every batch by itself: a fresh stock module per batch."""
    case = Case(per_channel=per_channel, symmetric=symmetric)
    mine = case.mine(device, memoryless=True)
    for seed in range(4):
        theirs = case.theirs()
        step_both(mine, theirs, case.batch(seed, 4.0 - seed), device)
    learn(mine), learn(theirs)
    take_parameters(mine, theirs)
    step_both(mine, theirs, case.batch(9), device)


class Shouting(torch_ao.MinMaxObserver):
    """A user's observer, with a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        super().forward(x * 1.5)
        return x


@pytest.mark.parametrize("observer", [torch_ao.HistogramObserver, Shouting, torch_ao.MinMaxObserver])
def test_foreign_observers_of_torch_ao(observer: Any) -> None:
    mine = ours.LearnableFakeQuantize(observer, 0, 255, dtype=torch.quint8)
    theirs = _LearnableFakeQuantize(observer, 0, 255, dtype=torch.quint8)
    for seed in range(7):
        if seed in (2, 5):
            learn(mine), learn(theirs)
        if seed == 4:
            estimate(mine), estimate(theirs)
        step_both(mine, theirs, Case().batch(seed, 1.0 + seed))
        take_parameters(mine, theirs)
