"""Training the digits model with learned step sizes: every step's loss and gradients are torch.ao's, from its state.

Bound, of each of the 20 steps: the output, the loss and the gradients of weights, biases and batch norms bit for bit;
the gradients of scales and zero points within 1e-6 of the sum of their terms' magnitudes from float64, and from
torch.ao within that and torch.ao's own roundings (learnable_support.py).
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.ao.quantization as torch_ao
from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize
from torch.ao.quantization.quantize_fx import prepare_qat_fx

import qkernels
import qkernels.modules as ours
from tests.modules import support as s
from tests.modules.learnable_support import learnables, record, train_step

pytest.importorskip("sklearn", reason="the digits come with scikit-learn (extra: demo)")
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "digits_qat.py"
STEPS = 20


@pytest.fixture(scope="module")
def digits() -> Iterator[ModuleType]:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("digits_qat_for_training", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["digits_qat_for_training"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["digits_qat_for_training"]


def qconfig(channels: int, use_grad_scaling: bool, bits: int) -> torch_ao.QConfig:
    """Weights per channel and symmetric, activations affine with zero points >= 0."""
    half = 1 << (bits - 1)
    common = {"use_grad_scaling": use_grad_scaling}
    return torch_ao.QConfig(
        activation=_LearnableFakeQuantize.with_args(
            observer=torch_ao.MovingAverageMinMaxObserver, quant_min=0, quant_max=2 * half - 1, dtype=torch.quint8,
            **common,
        ),
        weight=_LearnableFakeQuantize.with_args(
            observer=torch_ao.MovingAveragePerChannelMinMaxObserver, quant_min=-half, quant_max=half - 1,
            dtype=torch.qint8, qscheme=torch.per_channel_symmetric, channel_len=channels, **common,
        ),
    )  # fmt: skip


def prepared(digits: ModuleType, x: torch.Tensor, use_grad_scaling: bool, bits: int) -> torch.nn.Module:
    """The example's model with torch.ao's learnable quantizers, calibrated by three batches."""
    model = digits.make_cnn()
    mapping = torch_ao.QConfigMapping().set_global(qconfig(1, use_grad_scaling, bits))
    for name, layer in model.named_children():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            channels = layer.weight.shape[0]
            for following in range(int(name), min(int(name) + 3, len(model))):  # with what it is fused with
                mapping.set_module_name(str(following), qconfig(channels, use_grad_scaling, bits))
    with s.quiet():
        model = prepare_qat_fx(model.train(), mapping, (x,))
    with torch.no_grad():
        for part in x.chunk(3):
            model(part)
    return model


@pytest.mark.parametrize(("use_grad_scaling", "bits"), [(True, 8), (False, 8), (True, 4), (True, 2)])
def test_twenty_steps_of_the_digits_model(digits: ModuleType, use_grad_scaling: bool, bits: int) -> None:
    data = digits.Digits.load(torch.device("cpu"), 0)
    theirs = prepared(digits, data.train_x[:96], use_grad_scaling, bits)
    theirs.apply(ours.enable_param_learning)
    mine = copy.deepcopy(theirs)
    report = qkernels.swap(mine)
    assert not report.left and len(learnables(mine)) == 10
    rate = 0.01 if use_grad_scaling else 1e-5
    calls, optimizers = record(theirs), tuple(sgd(model, rate) for model in (mine, theirs))
    before = {name: (q.scale.detach().clone(), q.zero_point.detach().clone()) for name, q in learnables(mine).items()}
    losses = []
    for step, (x, y) in enumerate(data.batches(STEPS, 1)):
        losses.append(train_step((mine, theirs), optimizers, calls, x, y))
        assert set(calls) == set(before), "every quantizer took part in the comparison"
        assert all((q.zero_point >= -0.5).all() for q in learnables(theirs).values()), f"step {step}: torch is wrong"
    for name, q in learnables(mine).items():
        assert (q.scale != before[name][0]).any(), f"the scale of {name} was learned"
    assert any((q.zero_point != before[name][1]).any() for name, q in learnables(mine).items())
    if bits == 8:
        assert losses[-1] < losses[0]


def sgd(model: torch.nn.Module, rate: float) -> torch.optim.Optimizer:
    learned = {id(p) for q in learnables(model).values() for p in q.parameters()}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if id(p) not in learned]},
        {"params": [p for p in model.parameters() if id(p) in learned], "lr": rate},
    ]
    return torch.optim.SGD(groups, lr=0.02, momentum=0.9)
