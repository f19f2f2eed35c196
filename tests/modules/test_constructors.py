"""Constructors: torch.ao's parameter names, order and defaults; the same refusals and warnings for equal arguments."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
import torch.ao.quantization as stock
from hypothesis import given
from hypothesis import strategies as st

import qkernels.modules as ours
from tests.modules import support as s

CLASSES = (*s.OBSERVERS, *s.FAKE_QUANTIZERS)
ALL_SCHEMES = (*s.PER_TENSOR_SCHEMES, *s.PER_CHANNEL_SCHEMES)
ATTRIBUTES = (
    "dtype", "qscheme", "quant_min", "quant_max", "reduce_range", "has_customized_qrange", "is_dynamic", "ch_axis",
    "averaging_constant", "is_per_channel", "is_symmetric_quant",
)  # fmt: skip


def readable_default(default: Any) -> Any:
    """A class by its name: the default observer of ours is ours."""
    return default.__name__ if inspect.isclass(default) and default is not inspect.Parameter.empty else default


def parameters(cls: type) -> list[tuple[str, Any, Any]]:
    """(name, kind, default) of the constructor's parameters in order."""
    found = inspect.signature(cls).parameters.values()
    return [(p.name, p.kind, readable_default(p.default)) for p in found]


@pytest.mark.parametrize("name", CLASSES)
def test_signature(name: str) -> None:
    mine, theirs = parameters(getattr(ours, name)), parameters(getattr(stock, name))
    additions = {  # one each, before **kwargs, off by default
        "FusedMovingAvgObsFakeQuantize": "consistent_qparams",
        "MinMaxObserver": "memoryless",
        "PerChannelMinMaxObserver": "memoryless",
    }
    if name in additions:
        extra = [p for p in mine if p[0] == additions[name]]
        assert [(e[0], e[2]) for e in extra] == [(additions[name], False)]
        mine.remove(extra[0])
    assert mine == theirs


def test_default_observers_are_ours() -> None:
    for name in s.FAKE_QUANTIZERS:
        assert type(getattr(ours, name)().activation_post_process) is ours.MovingAverageMinMaxObserver


def attempt(build: Any) -> tuple[Any, Any]:
    """(module, None) or (None, (exception type, text)), with the texts of the warnings behind."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = build(), None
        except Exception as error:
            result = None, (type(error), str(error))
    return result, [(w.category, str(w.message)) for w in caught]


def compare(build_mine: Any, build_theirs: Any) -> None:
    (mine, error), warned = attempt(build_mine)
    (theirs, error_ref), warned_ref = attempt(build_theirs)
    assert error == error_ref
    assert warned == warned_ref
    if theirs is None:
        return
    for attribute in ATTRIBUTES:
        absent = object()
        ref = getattr(theirs, attribute, absent)
        assert (getattr(mine, attribute, absent) if ref is not absent else absent) == ref, attribute
    s.check_state(mine, theirs)
    if hasattr(theirs, "activation_post_process"):
        compare(lambda: mine.activation_post_process, lambda: theirs.activation_post_process)


some_observer_kwargs = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from((*s.QUANT_DTYPES, torch.quint2x4, torch.float16, torch.float32, torch.int64)),
        "qscheme": st.sampled_from(ALL_SCHEMES),
        "reduce_range": st.booleans(),
        "quant_min": st.sampled_from((None, -200, -128, -8, 0, 3, 7)),
        "quant_max": st.sampled_from((None, -3, 0, 7, 15, 127, 255, 300, 65535)),
        "eps": st.sampled_from((s.EPS, 1e-3, 0.0, 1)),
        "is_dynamic": st.booleans(),
        "ch_axis": st.sampled_from((0, 1, -1)),
        "averaging_constant": st.sampled_from((0.01, 0.5, 1, 1.0)),
        "factory_kwargs": st.sampled_from((None, {}, {"dtype": torch.float64}, {"device": "cpu"}, {"stranger": 1})),
        "stranger": st.just(1),
    },
)


@s.property_settings(500)
@given(name=st.sampled_from(s.OBSERVERS), kwargs=some_observer_kwargs)
def test_observers_take_and_refuse_what_torch_ao_does(name: str, kwargs: dict[str, Any]) -> None:
    compare(lambda: getattr(ours, name)(**kwargs), lambda: getattr(stock, name)(**kwargs))


@s.property_settings(500)
@given(
    name=st.sampled_from(s.FAKE_QUANTIZERS),
    observer=st.sampled_from((None, *s.OBSERVERS)),
    wrapped=st.booleans(),
    kwargs=some_observer_kwargs,
)
def test_fake_quantizers_take_and_refuse_what_torch_ao_does(
    name: str, observer: str | None, wrapped: bool, kwargs: dict[str, Any]
) -> None:
    def build(library: Any) -> torch.nn.Module:
        arguments = dict(kwargs)
        if observer is not None:
            cls = getattr(library, observer)
            # A partial carries its dtype in `.p.keywords`, where FakeQuantize looks for it.
            dtype = {"dtype": arguments.pop("dtype")} if wrapped and "dtype" in arguments else {}
            arguments["observer"] = cls.with_args(**dtype) if wrapped else cls
        return getattr(library, name)(**arguments)

    compare(lambda: build(ours), lambda: build(stock))


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("MinMaxObserver", (torch.qint8, torch.per_tensor_symmetric, False, -8, 7)),
        ("MovingAverageMinMaxObserver", (0.3, torch.qint8, torch.per_tensor_symmetric)),
        ("PerChannelMinMaxObserver", (1, torch.qint8)),
        ("MovingAveragePerChannelMinMaxObserver", (0.3, 1, torch.qint8)),
        ("MinMaxObserver", (torch.qint8, torch.per_channel_affine)),
        ("FakeQuantize", (stock.HistogramObserver, 0, 255)),
        ("FusedMovingAvgObsFakeQuantize", (stock.HistogramObserver, 0, 255)),
        ("FusedMovingAvgObsFakeQuantize", (stock.MovingAverageMinMaxObserver, 0, 127)),
        ("FusedMovingAvgObsFakeQuantize", (stock.MovingAverageMinMaxObserver, 5, 3)),
    ],
)
def test_positional_arguments(name: str, args: tuple[Any, ...]) -> None:
    compare(lambda: getattr(ours, name)(*args), lambda: getattr(stock, name)(*args))


def test_consistent_qparams_reaches_the_module_through_with_args(device: torch.device) -> None:
    x = torch.tensor([-1.0, 2.0], device=device)
    for consistent in (False, True):
        factory = ours.FusedMovingAvgObsFakeQuantize.with_args(
            consistent_qparams=consistent, quant_min=-128, quant_max=127, dtype=torch.qint8,
            qscheme=torch.per_tensor_symmetric,
        )  # fmt: skip
        module = factory().to(device)
        module(x)
        assert torch.equal(module.scale, module.calculate_qparams()[0]) is consistent


@pytest.mark.parametrize("name", CLASSES)
def test_with_args(name: str) -> None:
    """Factories that chain, keep what they are given and make a new module each time."""
    cls = getattr(ours, name)
    factory = cls.with_args(dtype=torch.qint8, quant_min=-8, quant_max=7).with_args(quant_max=5)
    assert isinstance(factory, type(getattr(stock, name).with_args()))
    first, second = factory(), factory()
    assert type(first) is cls and first is not second
    assert (first.dtype, first.quant_min, first.quant_max) == (torch.qint8, -8, 5)
    assert factory(quant_max=6).quant_max == 6
    assert not {b.data_ptr() for b in first.buffers() if b.numel()} & {b.data_ptr() for b in second.buffers()}
    stock_factory = getattr(stock, name).with_args(quant_min=0)
    assert getattr(cls.with_args(quant_min=0), "__module__", None) == getattr(stock_factory, "__module__", None)


@pytest.mark.parametrize("name", s.OBSERVERS)
def test_with_callable_args(name: str) -> None:
    """Called at construction, once per module, and overridden by an explicit argument."""
    calls = []

    def factory_kwargs() -> dict[str, Any]:
        calls.append(1)
        return {"dtype": torch.float64}

    cls = getattr(ours, name)
    builder = cls.with_args(dtype=torch.qint8).with_callable_args(factory_kwargs=factory_kwargs)
    assert not calls
    assert builder().min_val.dtype == torch.float64
    assert builder().min_val.dtype == torch.float64
    assert len(calls) == 2
    assert builder(factory_kwargs=None).min_val.dtype == torch.float32
    assert len(calls) == 2


def test_fake_quantize_takes_foreign_observers(device: torch.device) -> None:
    """An observer this project has no version of yet: the module then is torch.ao's, number for number."""
    mine = ours.FakeQuantize(observer=stock.HistogramObserver).to(device)
    theirs = stock.FakeQuantize(observer=stock.HistogramObserver)
    for seed in range(2):
        x = s.Batch("normal", (8, 9), seed=seed).tensor()
        s.check_bits(mine(x.to(device)), theirs(x), "y")
    if device.type == "cpu":
        s.check_state(mine, theirs)


@pytest.mark.parametrize("fused", s.FAKE_QUANTIZERS)
def test_fake_quantize_with_torch_aos_observers(fused: str, device: torch.device) -> None:
    """torch.ao's own qconfigs name torch.ao's observers; ours around them gives the same numbers."""
    for observer in (stock.MovingAverageMinMaxObserver, stock.MovingAveragePerChannelMinMaxObserver):
        scheme = torch.per_channel_symmetric if "PerChannel" in observer.__name__ else torch.per_tensor_symmetric
        kwargs = {"quant_min": -128, "quant_max": 127, "dtype": torch.qint8, "qscheme": scheme}
        mine = getattr(ours, fused)(observer=observer, **kwargs).to(device)
        theirs = getattr(stock, fused)(observer=observer, **kwargs)
        for seed in range(2):
            x = s.Batch("normal", (3, 9), seed=seed).tensor()
            s.check_bits(mine(x.to(device)), theirs(x), "y")
            s.check_state(mine, theirs)
