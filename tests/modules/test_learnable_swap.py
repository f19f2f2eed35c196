"""swap(), verify() and conversion of models that the eager, FX and PT2E flows prepared with stock learnable quantizers.

Always on the CPU: that is where torch.ao's converted models run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.quantization as torch_ao
from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

import qkernels
import qkernels.modules as ours
from tests.modules import support as s
from tests.modules.learnable_support import (
    EACH_CASE,
    NEEDS_TORCHAO,
    Case,
    TorchaoLearnable,
    learnables,
    ours_pt2e,
    record,
    step_both,
    take_parameters,
    torchao,
    train_step,
)
from tests.modules.test_flows import Net, check_converted, data
from tests.modules.test_flows import _engine as _engine
from tests.modules.test_learnable_gradients import estimate, learn

CHANNEL = {"quant_min": -128, "quant_max": 127, "dtype": torch.qint8, "qscheme": torch.per_channel_symmetric}
BATCHES = [x for x, _ in data(3)]
Convert = Callable[[torch.nn.Module], torch.nn.Module]


def qconfig(channels: int, library: Any = None) -> torch_ao.QConfig:
    """Learnable activations and weights of torch.ao, or of ours."""
    cls = ours.LearnableFakeQuantize if library is ours else _LearnableFakeQuantize
    library = library or torch_ao
    return torch_ao.QConfig(
        activation=cls.with_args(
            observer=library.MovingAverageMinMaxObserver, quant_min=0, quant_max=255, dtype=torch.quint8,
            use_grad_scaling=True, averaging_constant=0.1,
        ),
        weight=cls.with_args(
            observer=library.MovingAveragePerChannelMinMaxObserver, channel_len=channels, use_grad_scaling=True,
            **CHANNEL,
        ),
    )  # fmt: skip


def fx(library: Any = None) -> torch.nn.Module:
    torch.manual_seed(1)
    mapping = torch_ao.QConfigMapping().set_global(qconfig(6, library))
    for name, channels in (("conv", 6), ("bn", 6), ("relu", 6), ("linear", 5)):
        mapping.set_module_name(name, qconfig(channels, library))
    return prepare_qat_fx(Net().train(), mapping, (BATCHES[0],))


def eager(library: Any = None) -> torch.nn.Module:
    torch.manual_seed(1)
    net = Net().train()
    net.qconfig = qconfig(6, library)
    net.linear.qconfig = qconfig(5, library)
    return torch_ao.prepare_qat(torch_ao.fuse_modules_qat(net, [["conv", "bn", "relu"]]))


FLOWS: dict[str, tuple[Callable[..., torch.nn.Module], Convert]] = {
    "FX": (fx, convert_fx),
    "eager": (eager, torch_ao.convert),
}
each_flow = pytest.mark.parametrize("flow", FLOWS)


def optimizers(*models: torch.nn.Module) -> tuple[torch.optim.Optimizer, ...]:
    """With small steps for the scales: torchao's forward would go on below 0, ours raises them to eps."""
    made = []
    for model in models:
        learned = [p for q in learnables(model).values() for p in q.parameters()]
        rest = [p for p in model.parameters() if not any(p is q for q in learned)]
        groups = [{"params": rest}, {"params": learned, "lr": 1e-3}]
        made.append(torch.optim.SGD(groups, lr=0.02, momentum=0.9))
    return tuple(made)


def train_both(mine: torch.nn.Module, theirs: torch.nn.Module, stages: tuple[Callable[[Any], Any], ...]) -> None:
    """Two steps of each stage, equal to stock's step by step."""
    calls, optims = record(theirs), optimizers(mine, theirs)
    steps = iter(data(2 * len(stages)))
    for stage in stages:
        for model in (mine, theirs):
            for quantizer in learnables(model).values():
                stage(quantizer)
        for _ in range(2):
            train_step((mine, theirs), optims, calls, *next(steps))
            for (name, a), (_, b) in zip(learnables(mine).items(), learnables(theirs).items(), strict=True):
                for which in ("scale", "zero_point"):
                    s.check_bits(getattr(a, which), getattr(b, which), f"{which} of {name}")


# ------------------------------------------------------------------------------------------ swap


@EACH_CASE
@pytest.mark.parametrize("stage", [None, learn, estimate])
def test_a_swapped_module_keeps_everything(case: Case, stage: Any) -> None:
    theirs = case.theirs()
    theirs(case.batch(0))
    if stage is not None:
        stage(theirs)
    mine = copy.deepcopy(theirs)
    tensors = dict(mine.named_parameters()) | dict(mine.named_buffers())
    values = {name: t.detach().clone() for name, t in tensors.items()}
    attributes = {k: v for k, v in vars(mine).items() if not k.startswith("_")}
    report = qkernels.swap(mine)
    library = ours_pt2e if case.face == "torchao" else ours
    assert type(mine) is library.LearnableFakeQuantize
    assert type(mine.activation_post_process) is getattr(library, case.observer)
    assert [e.name for e in report.swapped] == ["", "activation_post_process"] and not report.left
    for name, tensor in tensors.items():
        assert (dict(mine.named_parameters()) | dict(mine.named_buffers()))[name] is tensor, name
        s.check_bits(tensor.float(), values[name].float(), name)
    assert {k: vars(mine)[k] for k in attributes} == attributes
    s.check_state(mine, theirs)
    born = case.mine(**({"channel_len": case.channels} if case.per_channel else {}))
    assert list(mine._buffers) == list(born._buffers)
    assert mine._non_persistent_buffers_set == born._non_persistent_buffers_set
    for seed in range(1, 7):  # first without a change of stage: what requires_grad said still holds
        if seed in (3, 5):
            (learn if seed == 3 else estimate)(mine), (learn if seed == 3 else estimate)(theirs)
        step_both(mine, theirs, case.batch(seed), "cpu")
        take_parameters(mine, theirs)


@EACH_CASE
@pytest.mark.parametrize("learning", [False, True])
def test_a_virgin_module_is_swapped(case: Case, learning: bool) -> None:
    """torchao's has no Parameters yet; ours then does."""
    theirs = case.theirs()
    if learning:
        learn(theirs)
    mine = copy.deepcopy(theirs)
    qkernels.swap(mine)
    assert [name for name, _ in mine.named_parameters()] == ["scale", "zero_point"]
    if learning and case.face == "torch.ao":
        return  # nothing was observed: test_learnable_sequences.py has that
    for seed in range(3):
        step_both(mine, theirs, case.batch(seed), "cpu")
        take_parameters(mine, theirs)


@each_flow
def test_swap_of_a_prepared_model(flow: str) -> None:
    theirs = FLOWS[flow][0]()
    theirs(BATCHES[0])
    mine = copy.deepcopy(theirs)
    report = qkernels.swap(mine)
    assert not report.left
    assert len(learnables(mine)) >= 4
    assert {type(q) for q in learnables(mine).values()} == {ours.LearnableFakeQuantize}
    assert {e.name for e in report.swapped} >= set(learnables(mine))
    assert str(report).count("LearnableFakeQuantize") >= 2 * len(learnables(mine))
    for name, value in theirs.state_dict().items():  # a copied GraphModule has other versions in the metadata
        s.check_same(mine.state_dict()[name], value, name)
    assert not qkernels.swap(mine).swapped


@each_flow
@pytest.mark.parametrize("virgin", [False, True])
def test_training_and_conversion_are_stocks(flow: str, virgin: bool) -> None:
    prepare, convert = FLOWS[flow]
    theirs = prepare()
    if not virgin:
        theirs(BATCHES[0])
    mine = copy.deepcopy(theirs)
    qkernels.swap(mine)
    train_both(mine, theirs, (lambda q: q, learn, estimate, learn))
    assert any(bool(q.zero_point.frac().any()) for q in learnables(theirs).values()), "a zero point was learned"
    check_converted(convert(mine.eval()), convert(theirs.eval()))


@each_flow
def test_a_model_prepared_with_ours(flow: str) -> None:
    """Our class in the QConfig: stock's checkpoint before training, stock's numbers, stock's int8 model."""
    prepare, convert = FLOWS[flow]
    mine, theirs = prepare(ours), prepare()
    assert {type(q) for q in learnables(mine).values()} == {ours.LearnableFakeQuantize}
    mine(BATCHES[0]), theirs(BATCHES[0])
    s.check_state(mine, theirs)
    assert not qkernels.swap(mine).swapped
    train_both(mine, theirs, (learn, estimate))
    check_converted(convert(mine.eval()), convert(theirs.eval()))


def test_counterpart_of_a_factory() -> None:
    factory = ours.counterpart(qconfig(6).weight)
    made = factory()
    assert type(made) is ours.LearnableFakeQuantize and made.scale.shape == (6,)
    assert type(made.activation_post_process) is ours.MovingAveragePerChannelMinMaxObserver


# ------------------------------------------------------------------------------------------ PT2E


def pt2e_model() -> torch.fx.GraphModule:
    """torchao's flow with its learnable quantizers on activations and weights."""
    from tests.modules import test_pt2e_flow as flow

    class Learned(flow.EveryKind):
        def __init__(self) -> None:
            super().__init__(torchao, True)
            act = TorchaoLearnable.with_args(observer=torchao.MovingAverageMinMaxObserver, use_grad_scaling=True)
            weight = TorchaoLearnable.with_args(
                observer=torchao.MovingAveragePerChannelMinMaxObserver, use_grad_scaling=True
            )
            self.act = flow.QuantizationSpec(torch.uint8, act, 0, 255, torch.per_tensor_affine)
            self.weight = flow.QuantizationSpec(observer_or_fake_quant_ctr=weight, ch_axis=0, **flow.WEIGHT)

    return flow.prepared(Learned(), True)


@NEEDS_TORCHAO
@pytest.mark.parametrize("virgin", [False, True])
def test_pt2e_training_and_conversion_are_stocks(virgin: bool) -> None:
    from tests.modules import test_pt2e_flow as flow

    theirs = pt2e_model()
    if not virgin:
        theirs(BATCHES[0])
    mine = copy.deepcopy(theirs)
    qkernels.swap(mine)
    assert len(learnables(mine)) >= 4
    assert {type(q) for q in learnables(mine).values()} == {ours_pt2e.LearnableFakeQuantize}
    for x in BATCHES[:2]:  # an optimizer sees stock's Parameters after the first batch alone
        s.check_bits(mine(x), theirs(x), "output")
        flow.check_state(mine, theirs)
    train_both(mine, theirs, (lambda q: q, learn, estimate, learn))
    flow.check_converted({"stock": theirs, "swapped": mine})
