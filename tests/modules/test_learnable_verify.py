"""verify() of models with learnable quantizers: quiet about good ones, exact about a fault, without effect on them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import qkernels
import qkernels.modules as ours
from qkernels.modules.swapping import unswap
from tests.modules import support as s
from tests.modules.learnable_support import EACH_CASE, EACH_FACE, Case, learnables, torchao
from tests.modules.test_flows import _engine as _engine
from tests.modules.test_learnable_gradients import estimate, learn
from tests.modules.test_learnable_swap import BATCHES, eager, fx, pt2e_model


def state_of(model: torch.nn.Module) -> list[Any]:
    modules = [(m, type(m), m.training, list(m._buffers), dict(m._forward_hooks)) for m in model.modules()]
    return [modules, [(n, p, p.requires_grad, p.grad, p._version) for n, p in model.named_parameters()]]


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "FX": fx,
    "eager": eager,
    **({} if torchao is None else {"PT2E": pt2e_model}),
    **{f"ours {name}": partial(make, ours) for name, make in (("FX", fx), ("eager", eager))},
}


@pytest.mark.parametrize("swapped", [False, True], ids=["as it is", "swapped"])
@pytest.mark.parametrize("which", MODELS)
def test_verify_is_green_and_leaves_the_model_alone(which: str, swapped: bool) -> None:
    model = MODELS[which]()
    model(BATCHES[0])
    if swapped:
        qkernels.swap(model)
    for stage in (None, learn, estimate, learn):
        for quantizer in learnables(model).values() if stage is not None else ():
            stage(quantizer)
        before = state_of(model)
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        report = qkernels.verify(model, BATCHES)
        assert report, str(report)
        assert report.batches == 3 and report.layers >= 2 * len(learnables(model))
        assert state_of(model) == before
        for name, buffer in model.named_buffers():
            s.check_same(buffer, buffers[name], name)


@pytest.mark.parametrize("which", MODELS)
def test_verify_of_a_fresh_and_of_a_frozen_model(which: str) -> None:
    model = MODELS[which]()
    report = qkernels.verify(model, BATCHES)
    assert report, str(report)
    model(BATCHES[0])
    for quantizer in learnables(model).values():
        learn(quantizer)
    model.eval()
    expected = model(BATCHES[1])
    qkernels.freeze(model)
    s.check_bits(model(BATCHES[1]), expected, "output of a frozen model")
    report = qkernels.verify(model, BATCHES)
    assert report, str(report)


@EACH_FACE
@pytest.mark.parametrize("fault", ["scale", "zero_point", "output"])
def test_verify_finds_a_planted_difference(face: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a Parameter too, also where the output does not show it."""
    case = Case(face, True)
    mine = case.mine()
    mine(case.batch(0))
    mine.disable_fake_quant()
    forward = type(mine).forward

    def planted(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = forward(self, x)
        if fault == "output":
            return y + 1
        getattr(self, fault).data.add_(1.0)
        return y

    monkeypatch.setattr(type(mine), "forward", planted)
    report = qkernels.verify(mine, [case.batch(1)])
    assert not report
    assert report.differences[0].buffer == fault


@EACH_CASE
@pytest.mark.parametrize("stage", [None, learn, estimate])
@pytest.mark.parametrize("seen", [False, True])
def test_unswap_gives_the_stock_module_back(case: Case, stage: Any, seen: bool) -> None:
    """What verify runs as the stock version: class, buffers, requires_grad, and torchao's missing Parameters."""
    theirs = case.theirs()
    if seen:
        theirs(case.batch(0))
    if stage is not None:
        stage(theirs)
    back = copy.deepcopy(theirs)
    qkernels.swap(back)
    unswap(back)
    assert [type(m) for m in back.modules()] == [type(m) for m in theirs.modules()]
    assert [n for n, _ in back.named_buffers()] == [n for n, _ in theirs.named_buffers()]
    assert [(n, p.requires_grad) for n, p in back.named_parameters()] == [
        (n, p.requires_grad) for n, p in theirs.named_parameters()
    ]
    for seed in range(1, 3):
        s.check_bits(back(case.batch(seed)), theirs(case.batch(seed)), "y")
        s.check_state(back, theirs)
        assert back.scale.requires_grad == theirs.scale.requires_grad
