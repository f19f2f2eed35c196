"""Factories, qconfigs and qconfig mappings: torch.ao's names and arguments, our classes."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
import torch.ao.quantization as stock
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.ao.quantization import qconfig as stock_qconfig
from torch.ao.quantization.observer import _PartialWrapper

import qkernels.modules as ours
from qkernels.modules.factories import counterpart
from tests.modules import support as s
from tests.modules.test_constructors import attempt
from tests.modules.test_simple_observers import check_alike

BACKENDS = ("x86", "fbgemm", "qnnpack", "onednn")
ENABLES = ("enable_observer", "disable_observer", "enable_fake_quant", "disable_fake_quant")


def is_factory(value: Any) -> bool:
    bases = (stock.ObserverBase, stock.FakeQuantizeBase)
    return isinstance(value, _PartialWrapper) or (isinstance(value, type) and issubclass(value, bases))


def build(factory: Any) -> Any:
    """What a place of a qconfig makes; None and other callables' results as they are."""
    with s.quiet():
        return None if factory is None else factory()


EXPORTED = {name: getattr(stock, name) for name in dir(stock) if not name.startswith("_")}
FACTORIES = {n: v for n, v in EXPORTED.items() if is_factory(v) and n[0].islower()}
QCONFIGS = {n: v for n, v in EXPORTED.items() if isinstance(v, stock.QConfig)}


def check_built(mine: Any, theirs: Any) -> None:
    """A module like torch.ao's, of our classes throughout, but for nn.Identity."""
    if theirs is None:
        assert mine is None
        return
    check_alike(mine, theirs)
    for module, module_ref in zip(mine.modules(), theirs.modules(), strict=True):
        if type(module_ref) is nn.Identity:
            assert type(module) is type(module_ref)
        else:
            assert type(module) is getattr(ours, type(module_ref).__name__)


def check_qconfig(mine: Any, theirs: Any) -> None:
    if theirs is None:
        assert mine is None
        return
    assert isinstance(mine, stock.QConfig)
    for place in ("activation", "weight"):
        factory, factory_ref = getattr(mine, place), getattr(theirs, place)
        assert isinstance(factory, _PartialWrapper) == isinstance(factory_ref, _PartialWrapper)
        check_built(build(factory), build(factory_ref))


def test_the_lists_are_what_torch_ao_exports() -> None:
    """The tests below are not about nothing."""
    names = {n for n in stock.__all__ if n.startswith("default_")} - {"default_eval_fn"}
    assert names <= set(FACTORIES) and len(FACTORIES) >= 30 and len(QCONFIGS) >= 20


@pytest.mark.parametrize("name", list(FACTORIES))
def test_factory(name: str) -> None:
    factory = getattr(ours, name)
    assert isinstance(factory, _PartialWrapper) == isinstance(FACTORIES[name], _PartialWrapper)
    check_built(build(factory), build(FACTORIES[name]))
    first, second = factory(), factory()
    pointers = [{b.data_ptr() for b in m.buffers() if b.numel()} for m in (first, second)]
    assert pointers[0].isdisjoint(pointers[1])


@pytest.mark.parametrize("name", list(FACTORIES))
def test_factory_can_be_changed_as_torch_aos(name: str) -> None:
    """Users write default_weight_observer.with_args(...): the arguments take, or fail, as there."""
    for kwargs in ({"dtype": torch.qint8}, {"quant_min": 0, "quant_max": 15}, {"eps": 1e-3}, {"stranger": 1}):
        (mine, error), _ = attempt(lambda k=kwargs: getattr(ours, name).with_args(**k)())
        (theirs, error_ref), _ = attempt(lambda k=kwargs: FACTORIES[name].with_args(**k)())
        assert error == error_ref
        if theirs is not None:
            check_built(mine, theirs)


@pytest.mark.parametrize("name", list(QCONFIGS))
def test_qconfig(name: str) -> None:
    check_qconfig(getattr(ours, name), QCONFIGS[name])


def test_qconfig_class() -> None:
    """QConfig is torch.ao's, or one that its flows take for it, with the same refusal of instances."""
    assert issubclass(ours.QConfig, stock.QConfig)
    errors = [
        attempt(lambda q=q: q(ours.MinMaxObserver(), ours.MinMaxObserver))[0][1] for q in (ours.QConfig, stock.QConfig)
    ]
    assert errors[0] is not None and errors[0] == errors[1]
    qconfig = ours.QConfig(weight=ours.default_weight_observer, activation=ours.MinMaxObserver)
    assert qconfig._fields == ("activation", "weight") and qconfig.activation is ours.MinMaxObserver


@pytest.mark.parametrize("function", ["get_default_qconfig", "get_default_qat_qconfig"])
def test_default_qconfigs_of_backends(function: str) -> None:
    """Every backend and version; the same error, and oneDNN's warning, for the others."""
    mine, theirs = getattr(ours, function), getattr(stock, function)
    assert inspect.signature(mine) == inspect.signature(theirs)
    check_qconfig(mine(), theirs())
    accepted = 0
    for backend in (*BACKENDS, "cuda", "", None):
        for version in (0, 1, 2, None):
            (result, error), warned = attempt(lambda b=backend, v=version: mine(b, v))
            (result_ref, error_ref), warned_ref = attempt(lambda b=backend, v=version: theirs(backend=b, version=v))
            assert (error, warned) == (error_ref, warned_ref), (backend, version)
            check_qconfig(result, result_ref)
            accepted += result_ref is not None
    assert accepted == len(BACKENDS) * (1 if function == "get_default_qconfig" else 2)


@pytest.mark.parametrize("function", ["get_default_qconfig_mapping", "get_default_qat_qconfig_mapping"])
def test_default_qconfig_mappings_of_backends(function: str) -> None:
    mine, theirs = getattr(ours, function), getattr(stock, function)
    assert inspect.signature(mine) == inspect.signature(theirs)
    check_mapping(mine(), theirs())
    for backend in (*BACKENDS, "cuda"):
        for version in (0, 1, 2):
            (result, error), warned = attempt(lambda b=backend, v=version: mine(b, v))
            (result_ref, error_ref), warned_ref = attempt(lambda b=backend, v=version: theirs(b, v))
            assert (error, warned) == (error_ref, warned_ref), (backend, version)
            if result_ref is not None:
                check_mapping(result, result_ref)


def check_mapping(mine: Any, theirs: Any) -> None:
    assert type(mine) is stock.QConfigMapping
    assert list(vars(mine)) == list(vars(theirs))
    check_qconfig(mine.global_qconfig, theirs.global_qconfig)
    for name, qconfigs in vars(theirs).items():
        if name != "global_qconfig":
            assert list(getattr(mine, name)) == list(qconfigs)
            for key, qconfig in qconfigs.items():
                check_qconfig(getattr(mine, name)[key], qconfig)


def test_making_mappings_does_not_change_torch_aos() -> None:
    for function in ("get_default_qconfig_mapping", "get_default_qat_qconfig_mapping"):
        ours_made = getattr(ours, function)()
        ours_made.set_global(None).set_object_type(nn.Linear, None)
        again = getattr(stock, function)()
        assert again.global_qconfig is not None and nn.Linear not in again.object_type_qconfigs
        assert not [m for m in again.global_qconfig.weight().modules() if type(m).__module__.startswith("qkernels")]
    for name, factory in FACTORIES.items():
        assert not [m for m in build(factory).modules() if type(m).__module__.startswith("qkernels")], name


def test_torch_aos_questions_about_qconfigs_get_the_same_answers() -> None:
    """FX compares qconfigs of fused layers, and asks whether an activation is dynamic or reuses its input."""
    for name, theirs in QCONFIGS.items():
        mine = getattr(ours, name)
        with s.quiet():
            if theirs.activation is not None:
                assert stock_qconfig._activation_is_memoryless(mine) == stock_qconfig._activation_is_memoryless(theirs)
            if theirs.activation is not None and theirs.weight is not None:
                assert stock_qconfig._is_reuse_input_qconfig(mine) == stock_qconfig._is_reuse_input_qconfig(theirs)
        for other, other_ref in QCONFIGS.items():
            assert stock.qconfig_equals(mine, getattr(ours, other)) == stock.qconfig_equals(theirs, other_ref), other
    for backend in BACKENDS:
        for function in (ours.get_default_qconfig, ours.get_default_qat_qconfig):
            with s.quiet():
                assert stock.qconfig_equals(function(backend), function(backend))


# ------------------------------------------------------------------------------------------ with_args


CLASSES = (*s.OBSERVERS, *s.FAKE_QUANTIZERS, "PlaceholderObserver", "FixedQParamsObserver")
arguments = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from((torch.qint8, torch.quint8)),
        "quant_min": st.sampled_from((-8, 0)),
        "quant_max": st.sampled_from((7, 100)),
        "eps": st.sampled_from((1e-3, 2**-12)),
        "ch_axis": st.sampled_from((0, 1)),
        "scale": st.just(0.5),
        "zero_point": st.just(0),
        "factory_kwargs": st.sampled_from((None, {"dtype": torch.float64})),
    },
)
links = st.tuples(st.sampled_from(("with_args", "with_callable_args")), arguments)


@s.property_settings(150)
@given(name=st.sampled_from(CLASSES), chain=st.lists(links, min_size=1, max_size=4), last=arguments)
def test_chains_of_factories(name: str, chain: list[tuple[str, dict[str, Any]]], last: dict[str, Any]) -> None:
    """with_args and with_callable_args in any order: the same arguments arrive, the same ones are lost.

    with_args wraps the whole factory before it; a callable's value yields to an argument of the call.
    """

    def run(library: Any) -> tuple[Any, list[str]]:
        called: list[str] = []

        def noting(key: str, value: Any) -> Any:
            return lambda: (called.append(key), value)[1]

        factory = getattr(library, name)
        for method, kwargs in chain:
            if method == "with_callable_args":
                kwargs = {k: noting(k, v) for k, v in kwargs.items()}
            factory = getattr(factory, method)(**kwargs)
        return factory(**last), called

    (mine, error), _ = attempt(lambda: run(ours))
    (theirs, error_ref), _ = attempt(lambda: run(stock))
    assert error == error_ref
    if theirs is not None:
        check_alike(mine[0], theirs[0])
        assert mine[1] == theirs[1]


# ------------------------------------------------------------------------------------------ counterpart


@pytest.mark.parametrize("name", [*s.OBSERVERS, *s.FAKE_QUANTIZERS, "FixedQParamsFakeQuantize", "NoopObserver"])
def test_counterpart_of_a_class(name: str) -> None:
    assert counterpart(getattr(stock, name)) is getattr(ours, name)
    assert counterpart(getattr(ours, name)) is getattr(ours, name)


class UsersObserver(stock.MinMaxObserver):
    """A subclass has code of its own: no class of ours takes its place."""


def test_counterpart_leaves_what_it_does_not_know() -> None:
    for factory in (UsersObserver, nn.Identity, None):
        assert counterpart(factory) is factory
    assert type(counterpart(UsersObserver.with_args(eps=1e-3))()) is UsersObserver
    mixed = counterpart(stock.FakeQuantize.with_args(observer=UsersObserver))()
    assert type(mixed) is ours.FakeQuantize and type(mixed.activation_post_process) is UsersObserver


def test_counterpart_of_a_nested_factory() -> None:
    """Factories in factories, callable arguments, and a chain of wrappers; the stock factory stays as it was."""
    inner = stock.MovingAverageMinMaxObserver.with_args(averaging_constant=0.5, dtype=torch.qint8)
    theirs = stock.FakeQuantize.with_args(observer=inner).with_args(quant_min=-8, quant_max=7)
    with_callable = stock.MinMaxObserver.with_args(eps=1e-3).with_callable_args(
        quant_min=lambda: -8, quant_max=lambda: 7
    )
    for factory in (inner, theirs, with_callable.with_args(dtype=torch.qint8), with_callable):
        before = copy.deepcopy(factory.p.keywords)
        check_built(counterpart(factory)(), factory())
        assert factory.p.keywords == before or "observer" in before
        assert not [m for m in factory().modules() if type(m).__module__.startswith("qkernels")]


# ------------------------------------------------------------------------------------------ functions on models


class Mixed(nn.Module):
    """Fake quantizers of every kind, nested, among other modules."""

    def __init__(self, library: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.a = nn.Sequential(library.FakeQuantize(), nn.ReLU())
        self.b = library.FusedMovingAvgObsFakeQuantize()
        self.c = library.FixedQParamsFakeQuantize(
            observer=library.FixedQParamsObserver.with_args(scale=0.5, zero_point=1)
        )
        self.d = library.MinMaxObserver()


@pytest.mark.parametrize("functions", [ours, stock], ids=["our functions", "torch.ao's functions"])
@pytest.mark.parametrize("name", ENABLES)
def test_flags_through_apply(name: str, functions: Any, device: torch.device) -> None:
    """model.apply(disable_observer): our functions on torch.ao's modules, and the other way round."""
    flag = "observer_enabled" if "observer" in name else "fake_quant_enabled"
    for library in (ours, stock):
        model = Mixed(library).to(device)
        quantizers = [model.a[0], model.b, model.c]
        for start in (0, 1):
            for quantizer in quantizers:
                quantizer.observer_enabled.fill_(start)
                quantizer.fake_quant_enabled.fill_(start)
            buffers = [getattr(q, flag) for q in quantizers]
            model.apply(getattr(functions, name))
            for quantizer, buffer in zip(quantizers, buffers, strict=True):
                assert getattr(quantizer, flag) is buffer  # in place: DDP and compiled graphs hold it
                assert buffer.tolist() == [int(name.startswith("enable"))]
                other = ({"observer_enabled", "fake_quant_enabled"} - {flag}).pop()
                assert getattr(quantizer, other).tolist() == [start]


def prepared(library: Any, per_channel: bool) -> nn.Module:
    model = nn.Sequential(stock.QuantStub(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.5)
    activation = library.PerChannelMinMaxObserver if per_channel else library.default_observer
    model.qconfig = library.QConfig(activation=activation, weight=library.default_weight_observer)
    return stock.prepare(model.eval())


@pytest.mark.parametrize("per_channel", [False, True], ids=["per tensor", "per channel"])
def test_observer_state_dicts(per_channel: bool, device: torch.device) -> None:
    """Saved with one library's function, loaded into the other's model."""
    x = s.Batch("normal", (3, 4)).tensor()
    mine, theirs = prepared(ours, per_channel).to(device), prepared(stock, per_channel)
    mine(x.to(device))
    theirs(x)
    state, state_ref = ours.get_observer_state_dict(mine), stock.get_observer_state_dict(theirs)
    assert list(state) == list(state_ref) and state_ref and type(state) is type(state_ref)
    assert state._metadata == state_ref._metadata
    for key, value in state_ref.items():
        s.check_same(state[key], value, key)
    fresh, fresh_ref = prepared(ours, per_channel).to(device), prepared(stock, per_channel)
    ours.load_observer_state_dict(fresh, copy.deepcopy(state_ref))
    stock.load_observer_state_dict(fresh_ref, {k: v.cpu() for k, v in state.items()})
    for (key, value), value_ref in zip(fresh.state_dict().items(), fresh_ref.state_dict().values(), strict=True):
        s.check_same(value, value_ref, key)
    s.check_same(fresh[1].activation_post_process.min_val, theirs[1].activation_post_process.min_val, "min_val")


def test_observer_state_dict_with_missing_keys() -> None:
    mine, theirs = prepared(ours, False), prepared(stock, False)
    for key in stock.get_observer_state_dict(theirs):
        texts = []
        for load, model in ((ours.load_observer_state_dict, mine), (stock.load_observer_state_dict, theirs)):
            state = stock.get_observer_state_dict(model)
            del state[key]
            texts.append(attempt(lambda f=load, m=model, d=state: f(m, d))[0][1])
        assert texts[0] == texts[1], key
