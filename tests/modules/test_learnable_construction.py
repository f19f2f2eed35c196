"""LearnableFakeQuantize of both faces: constructor forms, errors, factories, copies, casts, apply functions."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
import torch.ao.quantization as torch_ao
from torch.ao.quantization import _learnable_fake_quantize as stock_ao
from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize

import qkernels.modules as ours
from tests.modules import support as s
from tests.modules.learnable_support import (
    EACH_CASE,
    EACH_FACE,
    NEEDS_TORCHAO,
    Case,
    TorchaoLearnable,
    dy_like,
    ours_pt2e,
    torchao,
)

OPTIONS = ("grad_factor", "grad_scale_elements", "grad_mask")


def of(face: str) -> tuple[Any, Any, Any]:
    """(our class, our library, the stock class)."""
    if face == "torchao":
        return ours_pt2e.LearnableFakeQuantize, ours_pt2e, TorchaoLearnable
    return ours.LearnableFakeQuantize, ours, _LearnableFakeQuantize


# ------------------------------------------------------------------------------------------ forms and errors


@EACH_FACE
def test_signature_is_stock_and_keywords_of_ours(face: str) -> None:
    cls, _, stock = of(face)
    mine = inspect.signature(cls).parameters
    theirs = inspect.signature(stock).parameters
    extra = [name for name in mine if name not in theirs]
    assert extra == [*(["channel_len"] if face == "torchao" else []), *OPTIONS]
    assert all(mine[name].kind is inspect.Parameter.KEYWORD_ONLY for name in extra)
    for name, parameter in theirs.items():
        assert (mine[name].kind, mine[name].default) == (parameter.kind, parameter.default), name
    assert [name for name in mine if name in theirs] == list(theirs)


def test_the_positional_order_of_2_13() -> None:
    arguments = (0, 15, 0.25, 3.0, 4, True)
    kwargs = {"dtype": torch.quint8, "qscheme": torch.per_channel_affine, "ch_axis": 1}
    mine = ours.LearnableFakeQuantize(ours.PerChannelMinMaxObserver, *arguments, **kwargs)
    theirs = _LearnableFakeQuantize(torch_ao.PerChannelMinMaxObserver, *arguments, **kwargs)
    names = ("quant_min", "quant_max", "use_grad_scaling", "dtype", "qscheme", "ch_axis", "bitwidth")
    for name in names:
        assert getattr(mine, name) == getattr(theirs, name), name
    for name in ("scale", "zero_point"):
        a, b = getattr(mine, name), getattr(theirs, name)
        assert isinstance(a, torch.nn.Parameter) and a.requires_grad == b.requires_grad is True
        s.check_bits(a, b, name)
    assert (mine.activation_post_process.quant_min, mine.activation_post_process.quant_max) == (0, 15)


def test_the_keyword_form_of_july_2020() -> None:
    """scale, zero_point, channel_len and grad_factor by name; integers for the two that are floats."""
    mine = ours.LearnableFakeQuantize(
        observer=ours.MovingAveragePerChannelMinMaxObserver,
        quant_min=-8,
        quant_max=7,
        scale=2,
        zero_point=-1,
        channel_len=3,
        grad_factor=0.125,
        dtype=torch.qint8,
        qscheme=torch.per_channel_affine,
        averaging_constant=0.5,
    )
    assert mine.scale.dtype == mine.zero_point.dtype == torch.float32
    assert mine.scale.tolist() == [2.0] * 3 and mine.zero_point.tolist() == [-1.0] * 3
    mine.enable_param_learning()
    x, twin = torch.randn(3, 5), copy.deepcopy(mine)
    twin.grad_factor = None
    for module in (mine, twin):
        module(x).backward(dy_like(x))
    assert mine.scale.grad.abs().min() > 0
    torch.testing.assert_close(mine.scale.grad, twin.scale.grad * 0.125, rtol=1e-6, atol=0)
    torch.testing.assert_close(mine.zero_point.grad, twin.zero_point.grad * 0.125, rtol=1e-6, atol=0)


@EACH_FACE
def test_errors(face: str) -> None:
    """AssertionError where stock raises it; ValueError, naming the option, for what stock does not have."""
    cls, library, stock = of(face)
    for arguments in ((7, 7), (8, 7), (-129, 127), (-128, 128)):
        for c, observer in ((cls, library.MinMaxObserver), (stock, torch_ao.MinMaxObserver)):
            with pytest.raises(AssertionError):
                c(observer, *arguments, dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
    for option, value, rule in (
        ("grad_scale_elements", "row", r"grad_scale_elements must be one of .*'sample'.*; got 'row'"),
        ("grad_mask", "soft", r"grad_mask must be one of .*'lsq'.*; got 'soft'"),
    ):
        with pytest.raises(ValueError, match=f"LearnableFakeQuantize: {rule}"):
            cls(library.MinMaxObserver, **{option: value})
    for quant_min, quant_max in ((-8, 0), (-8, -1)):
        with pytest.raises((ValueError, AssertionError), match=r"use_grad_scaling needs a quant_max|zero|0"):
            cls(library.MinMaxObserver, quant_min, quant_max, use_grad_scaling=True, dtype=torch.qint8)
    with pytest.raises(TypeError):
        cls(library.MinMaxObserver, no_such_argument=1)
    if face == "torch.ao":
        for channels in (0, -2):
            for c in (cls, stock):
                with pytest.raises(AssertionError, match="Channel size must be a positive integer"):
                    c(torch_ao.PerChannelMinMaxObserver, channel_len=channels)


@EACH_CASE
def test_wrong_inputs_leave_the_state_alone(case: Case, device: torch.device) -> None:
    mine = case.mine(device)
    mine(case.batch(0).to(device))
    before = s.snapshot(mine)
    parameters = [p.detach().clone() for p in mine.parameters()]
    with pytest.raises(TypeError, match="must be float"):
        mine(torch.ones(case.shape(), dtype=torch.int64, device=device))
    if case.per_channel:
        with pytest.raises(ValueError, match="shape"):
            mine(torch.ones(case.other(channels=case.channels + 1).shape(), device=device))
    s.check_untouched(mine, before)
    for parameter, value in zip(mine.parameters(), parameters, strict=True):
        s.check_bits(parameter, value.cpu(), "parameter after an error")


@EACH_CASE
def test_an_empty_batch_is_not_observed(case: Case, device: torch.device) -> None:
    """Also as the first batch, when the number of channels is unknown."""
    mine = case.mine(device)
    shape = list(case.shape())
    shape[2] = 0
    for seed in range(2):
        before = s.snapshot(mine)
        x = torch.empty(shape, device=device, requires_grad=True)
        y = mine(x)
        assert y.shape == x.shape
        s.check_untouched(mine, before)
        mine(case.batch(seed).to(device))


# ------------------------------------------------------------------------------------------ what it is


@EACH_FACE
def test_class_relations_and_names(face: str) -> None:
    cls, library, stock = of(face)
    mine = cls(library.MinMaxObserver)
    base = torch_ao.FakeQuantizeBase if face == "torch.ao" else torchao.FakeQuantizeBase
    assert isinstance(mine, stock) and isinstance(mine, base) and issubclass(cls, stock)
    assert not isinstance(stock(torch_ao.MinMaxObserver), cls)
    assert isinstance(mine.activation_post_process, library.MinMaxObserver)
    assert cls.__name__ == "LearnableFakeQuantize"
    if face == "torch.ao":
        assert ours._LearnableFakeQuantize is cls
        assert {"LearnableFakeQuantize", "_LearnableFakeQuantize"} <= set(ours.__all__)


@NEEDS_TORCHAO
def test_the_pt2e_namespace_has_torchaos_names() -> None:
    for name in ("ObserverBase", "FakeQuantizeBase", "enable_range_learning", "disable_range_learning"):
        assert getattr(ours_pt2e, name) is getattr(torchao, name), name


@EACH_CASE
def test_with_args_makes_independent_modules(case: Case) -> None:
    mine = case.mine()
    factory = type(mine).with_args(observer=type(mine.activation_post_process), **case.kwargs(), grad_mask="lsq")
    a, b = factory(), factory.with_args(quant_max=1, use_grad_scaling=False)()
    assert type(a) is type(b) is type(mine)
    assert (a.quant_max, b.quant_max, a.grad_mask) == (mine.quant_max, 1, "lsq")
    assert type(factory) is type(case.theirs().with_args()) and a.scale is not factory().scale
    assert type(a.activation_post_process) is type(mine.activation_post_process)


@EACH_CASE
def test_repr_says_what_it_is(case: Case) -> None:
    mine = case.mine()
    mine(case.batch(0))
    text = repr(mine)
    assert text.startswith("LearnableFakeQuantize(")
    for part in (f"quant_min={mine.quant_min}", f"quant_max={mine.quant_max}", str(mine.qscheme), case.observer):
        assert part in text, text
    if case.face == "torchao":
        theirs = case.theirs()
        theirs(case.batch(0))
        # The Parameters of ours require a gradient in every stage.
        assert mine.extra_repr().replace(", requires_grad=True", "") == theirs.extra_repr()


# ------------------------------------------------------------------------------------------ for model.apply


def flags(module: Any) -> list[Any]:
    names = ("static_enabled", "learning_enabled", "fake_quant_enabled", "observer_enabled")
    return [int(getattr(module, n)) for n in names if hasattr(module, n)]


def test_apply_functions_of_torch_ao() -> None:
    """On stock modules as on ours; other modules are passed over."""
    mine, theirs = Case().pair()
    model = torch.nn.Sequential(mine, theirs, ours.FakeQuantize(), torch.nn.Linear(2, 2))
    seen = []
    for function in (ours.enable_param_learning, ours.enable_static_estimate, ours.enable_static_observation):
        model.apply(function)
        assert flags(mine) == flags(theirs), function
        seen.append(flags(mine)[:3])
    assert seen == [[0, 1, 1], [1, 0, 1], [1, 0, 0]]
    for function in (torch_ao.disable_observer, torch_ao.enable_fake_quant, torch_ao.enable_observer,
                     torch_ao.disable_fake_quant):  # fmt: skip
        model.apply(function)
        assert flags(mine) == flags(theirs), function
    for name in ("enable_param_learning", "toggle_observer_update", "toggle_qparam_learning", "toggle_fake_quant"):
        assert getattr(mine, name)() is mine  # they chain, as stock's do
    assert not stock_ao.__all__  # torch.ao has no such functions of its own


@NEEDS_TORCHAO
def test_apply_functions_of_torchao() -> None:
    for seen in (False, True):
        mine, theirs = Case("torchao").pair()
        if seen:
            mine(torch.ones(3)), theirs(torch.ones(3))
        model = torch.nn.Sequential(mine, theirs, torch.nn.Linear(2, 2))
        for function in (ours_pt2e.enable_range_learning, torchao.disable_observer, torchao.enable_observer,
                         torchao.disable_fake_quant, ours_pt2e.enable_range_learning,
                         ours_pt2e.disable_range_learning, torchao.enable_fake_quant):  # fmt: skip
            model.apply(function)
            assert flags(mine) == flags(theirs), function
        model.apply(ours_pt2e.enable_range_learning)
        assert flags(mine) == [1, 1, 0]


@EACH_CASE
def test_observe_quant_params_and_calculate_qparams(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    """calculate_qparams raises the scale to eps in place, and gives int64 zero points inside the range."""
    mine, theirs = case.pair()
    x = case.batch(0)
    mine(x), theirs(x)
    with torch.no_grad():
        for module in (mine, theirs):
            module.scale[0] = -3.0
            module.zero_point[0] = 2.75
            module.zero_point[-1] = 1e6 if case.per_channel else 3.5
    s.check_qparams(mine, theirs)
    s.check_bits(mine.scale, theirs.scale, "scale in place")
    s.check_bits(mine.zero_point, theirs.zero_point, "zero_point in place")
    mine.observe_quant_params()
    assert str(mine.scale.detach()) in capsys.readouterr().out
