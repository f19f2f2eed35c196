"""qkernels.modules.pt2e: our classes on torchao's bases, number for number torchao's own."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.modules import support as s
from tests.modules.composed import comparable
from tests.modules.test_compile import Net, batch, check_steps
from tests.modules.test_constructors import attempt, compare, parameters, some_observer_kwargs
from tests.modules.test_simple_observers import OBSERVERS as SIMPLE
from tests.modules.test_simple_observers import check_alike, fixed_kwargs, make, other_kwargs

torchao = pytest.importorskip("torchao.quantization.pt2e", reason="torchao is not installed (extra: torchao)")
from torchao.quantization.pt2e.observer import PartialWrapper  # noqa: E402

import qkernels.modules.pt2e as ours  # noqa: E402  (imports torchao)

FAKE_QUANTIZERS = (*s.FAKE_QUANTIZERS, "FixedQParamsFakeQuantize")
CLASSES = (*s.OBSERVERS, *SIMPLE, *FAKE_QUANTIZERS)
BASES = ("ObserverBase", "UniformQuantizationObserverBase", "FakeQuantizeBase")


def build(library: Any, name: str, **kwargs: Any) -> torch.nn.Module:
    if name in SIMPLE or name == "FixedQParamsFakeQuantize":
        return make(library, name)
    return getattr(library, name)(**kwargs)


# ------------------------------------------------------------------------------------------ what torchao asks


@pytest.mark.parametrize("name", CLASSES)
def test_is_an_instance_of_torchaos_class_and_bases(name: str) -> None:
    mine, theirs = build(ours, name), build(torchao, name)
    assert type(mine).__name__ == type(theirs).__name__  # torchao looks for "PerChannel" in it
    assert isinstance(mine, getattr(torchao, name)) and type(mine) is not type(theirs)
    for base in BASES:
        assert isinstance(mine, getattr(torchao, base)) == isinstance(theirs, getattr(torchao, base))
    check_alike(mine, theirs)


@pytest.mark.parametrize("name", CLASSES)
def test_signature(name: str) -> None:
    """torchao's parameters in order; what ours has more of comes after them and may be left out."""
    mine, theirs = parameters(getattr(ours, name)), parameters(getattr(torchao, name))
    extra = [p for p in mine if p not in theirs]
    assert {p[0] for p in extra} <= {"consistent_qparams", "memoryless"}
    assert all(p[2] is False for p in extra)
    assert [p for p in mine if p not in extra] == theirs


@pytest.mark.parametrize("name", [c for c in CLASSES if c != "ReuseInputObserver"])
def test_with_args_is_torchaos(name: str) -> None:
    """prepare_pt2e asks for torchao's PartialWrapper; chaining keeps it one."""
    cls, cls_ref = getattr(ours, name), getattr(torchao, name)
    arguments = (
        {"observer": ours.FixedQParamsObserver} if name == "FixedQParamsFakeQuantize" else {"dtype": torch.qint8}
    )
    factory, factory_ref = cls.with_args(**arguments), cls_ref.with_args(**arguments)
    chained = factory.with_args(quant_min=-8)
    for wrapper in (factory, chained):
        assert type(wrapper) is PartialWrapper
    assert chained.p.keywords == {"quant_min": -8}
    assert getattr(factory, "__module__", None) == getattr(factory_ref, "__module__", None)
    if name in s.OBSERVERS:
        built = cls.with_args(quant_min=-8, quant_max=7).with_callable_args(dtype=lambda: torch.qint8)()
        assert type(built) is cls and (built.quant_min, built.quant_max, built.dtype) == (-8, 7, torch.qint8)


def test_default_observers_are_ours() -> None:
    for name in s.FAKE_QUANTIZERS:
        assert type(build(ours, name).activation_post_process) is ours.MovingAverageMinMaxObserver


def test_flags_through_torchaos_functions() -> None:
    model = torch.nn.Sequential(*(build(ours, name) for name in FAKE_QUANTIZERS))
    for function, flags in (
        (torchao.disable_observer, (0, 1)),
        (torchao.disable_fake_quant, (0, 0)),
        (torchao.enable_observer, (1, 0)),
        (torchao.enable_fake_quant, (1, 1)),
    ):
        model.apply(function)
        assert {(int(m.observer_enabled), int(m.fake_quant_enabled)) for m in model} == {flags}


WITHOUT_TORCHAO = """
import sys
sys.modules["torchao"] = None  # import torchao raises ImportError
import qkernels, qkernels.modules
qkernels.modules.FakeQuantize()
qkernels.modules.factories.counterpart(qkernels.modules.MinMaxObserver)
try:
    import qkernels.modules.pt2e
except ImportError as error:
    print(error)
"""


def test_without_torchao_only_pt2e_is_missing() -> None:
    """The rest works, and the error says what to install."""
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((root, os.environ.get("PYTHONPATH", "")))}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCHAO],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "qkernels[torchao]" in done.stdout


# ------------------------------------------------------------------------------------------ constructors


@s.property_settings(250)
@given(name=st.sampled_from(s.OBSERVERS), kwargs=some_observer_kwargs)
def test_observers_take_and_refuse_what_torchao_does(name: str, kwargs: dict[str, Any]) -> None:
    compare(lambda: getattr(ours, name)(**kwargs), lambda: getattr(torchao, name)(**kwargs))


@s.property_settings(250)
@given(
    name=st.sampled_from(s.FAKE_QUANTIZERS),
    observer=st.sampled_from((None, *s.OBSERVERS, "PlaceholderObserver")),
    wrapped=st.booleans(),
    kwargs=some_observer_kwargs,
)
def test_fake_quantizers_take_and_refuse_what_torchao_does(
    name: str, observer: str | None, wrapped: bool, kwargs: dict[str, Any]
) -> None:
    def construct(library: Any) -> torch.nn.Module:
        arguments = dict(kwargs)
        if observer is not None:
            cls = getattr(library, observer)
            dtype = {"dtype": arguments.pop("dtype")} if wrapped and "dtype" in arguments else {}
            arguments["observer"] = cls.with_args(**dtype) if wrapped else cls
        return getattr(library, name)(**arguments)

    compare(lambda: construct(ours), lambda: construct(torchao))


@s.property_settings(150)
@given(name=st.sampled_from((*SIMPLE, "FixedQParamsFakeQuantize")), fixed=fixed_kwargs, other=other_kwargs)
def test_the_other_classes_take_and_refuse_what_torchao_does(
    name: str, fixed: dict[str, Any], other: dict[str, Any]
) -> None:
    def construct(library: Any) -> torch.nn.Module:
        if name == "FixedQParamsFakeQuantize":
            return library.FixedQParamsFakeQuantize(library.FixedQParamsObserver.with_args(**fixed))
        return getattr(library, name)(**(fixed if "Fixed" in name else dict(list(other.items())[:2])))

    (mine, error), warned = attempt(lambda: construct(ours))
    (theirs, error_ref), warned_ref = attempt(lambda: construct(torchao))
    assert (error, warned) == (error_ref, warned_ref)
    if theirs is not None:
        check_alike(mine, theirs)


# ------------------------------------------------------------------------------------------ numbers


def check_qparams(mine: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """Equal, or the same AssertionError: torchao refuses NaN and crossed statistics."""
    (qparams, error), _ = attempt(mine.calculate_qparams)
    (qparams_ref, error_ref), _ = attempt(theirs.calculate_qparams)
    assert error == error_ref
    if qparams_ref is not None:
        s.check_same(qparams[0], qparams_ref[0], "scale")
        if qparams_ref[0].isfinite().all():
            s.check_same(qparams[1], qparams_ref[1], "zero_point")


@st.composite
def observer_cases(draw: st.DrawFn) -> tuple[str, dict[str, Any], list[Any]]:
    name = draw(st.sampled_from(s.OBSERVERS))
    kwargs = draw(s.observer_kwargs(name))
    channels, axis = None, 0
    if s.is_per_channel(name):
        channels, axis = draw(st.integers(1, 4)), draw(st.sampled_from((0, 1, -1, -2)))
        kwargs["ch_axis"] = axis
    one = s.batches(channels, axis, tuple(s.KINDS), (*s.FLOATS, torch.int32))
    step = st.one_of(one, one, st.sampled_from(("reset", "copy", "exchange")))
    return name, kwargs, [draw(one), *draw(st.lists(step, min_size=1, max_size=2 if s.INTERPRETER else 5))]


def exchanged(modules: list[torch.nn.Module], fresh: Any) -> list[torch.nn.Module]:
    """Fresh modules, each with the other's checkpoint."""
    loaded = fresh()
    for module, other in zip(loaded, modules[::-1], strict=True):
        module.load_state_dict(copy.deepcopy(other.state_dict()), strict=True)
    return loaded


@pytest.mark.interpreter
@s.property_settings(120, 8)
@given(case=observer_cases())
def test_observers_through_random_sequences(case: tuple[str, dict[str, Any], list[Any]], device: torch.device) -> None:
    """Buffers after every step and qparams where torchao gives any; special values included, NaN asserted."""
    name, kwargs, steps = case

    def fresh() -> list[torch.nn.Module]:
        with s.quiet():
            return [getattr(ours, name)(**kwargs).to(device), getattr(torchao, name)(**kwargs)]

    mine, theirs = fresh()
    for step in steps:
        if isinstance(step, s.Batch):
            x = step.tensor()
            given_x = x.to(device)
            assert mine(given_x) is given_x
            theirs(x)
        elif step == "reset":
            mine.reset_min_max_vals()
            theirs.reset_min_max_vals()
        elif step == "copy":
            mine = copy.deepcopy(mine)
        else:
            mine, theirs = exchanged([mine, theirs], fresh)
        s.check_state(mine, theirs)
        if device.type == "cpu":  # the texts print the tensors with their device
            check_qparams(mine, theirs)


@pytest.mark.parametrize("name", s.OBSERVERS)
def test_nan_is_asserted(name: str) -> None:
    """torch.ao lets NaN through, torchao does not; a text, not only a type."""
    mine, theirs = getattr(ours, name)(), getattr(torchao, name)()
    x = torch.tensor([[1.0, float("nan")], [0.0, 1.0]])
    for module in (mine, theirs):
        module(x)
        with pytest.raises(AssertionError, match="should be less than max"):
            module.calculate_qparams()
    check_qparams(mine, theirs)
    s.check_state(mine, theirs)


def test_nan_in_fake_quantize() -> None:
    """torchao's forward raises, after it has written the statistics. Ours reads no value in forward, so it raises at
    conversion; the statistics and what was trained by then are NaN in both.
    """
    x = torch.tensor([1.0, float("nan")])
    mine, theirs = ours.FakeQuantize(), torchao.FakeQuantize()
    with pytest.raises(AssertionError, match="should be less than max"):
        theirs(x)
    assert mine(x).isnan().all()
    s.check_state(mine.activation_post_process, theirs.activation_post_process)
    with pytest.raises(AssertionError, match="should be less than max"):
        mine.calculate_qparams()


@st.composite
def fake_quant_cases(draw: st.DrawFn) -> tuple[str, str, dict[str, Any], list[Any]]:
    """float32 and axis 0, which torchao's fake quantizers take everywhere; other types are tested with torch.ao's."""
    name = draw(st.sampled_from(s.FAKE_QUANTIZERS))
    fused = name != "FakeQuantize"
    observer = draw(st.sampled_from(s.OBSERVERS[1::2] if fused else s.OBSERVERS))
    kwargs = draw(s.observer_kwargs(observer, (torch.qint8, torch.quint8, torch.int8, torch.int16), custom_range=True))
    if fused and kwargs["quant_max"] - kwargs["quant_min"] == 1:  # symmetric, torch's fused op divides by 0 here
        kwargs["quant_min"], kwargs["quant_max"] = (0, 15) if kwargs["dtype"] == torch.quint8 else (-8, 7)
    channels = draw(st.integers(1, 4)) if s.is_per_channel(observer) else None
    one = s.batches(channels, 0, tuple(s.FINITE_KINDS), (torch.float32,), empty=False)
    flag = st.tuples(st.sampled_from(("fake_quant_enabled", "observer_enabled")), st.booleans())
    step = st.one_of(one, one, flag, st.just("exchange"))
    return name, observer, kwargs, [draw(one), *draw(st.lists(step, min_size=1, max_size=5))]


@s.property_settings(100)
@given(case=fake_quant_cases())
def test_fake_quantizers_through_random_sequences(
    case: tuple[str, str, dict[str, Any], list[Any]], device: torch.device
) -> None:
    """Outputs bit for bit, gradients, buffers and the observer's qparams."""
    name, observer, kwargs, steps = case

    def fresh() -> list[torch.nn.Module]:
        with s.quiet():
            return [
                getattr(ours, name)(observer=getattr(ours, observer), **kwargs).to(device),
                getattr(torchao, name)(observer=getattr(torchao, observer), **kwargs),
            ]

    mine, theirs = fresh()
    for step in steps:
        if isinstance(step, tuple):
            for module in (mine, theirs):
                getattr(module, step[0])[0] = int(step[1])
        elif step == "exchange":
            mine, theirs = exchanged([mine, theirs], fresh)
        else:
            x = step.tensor()
            a, b = (x.to(d, copy=True).requires_grad_() for d in (device, "cpu"))
            try:
                y_ref = theirs(b)
            except AssertionError:
                assert not s.ordered(theirs.activation_post_process)
                return
            y = mine(a)
            where = comparable(x, theirs, 0)
            s.check_bits(y, y_ref, "y", where)
            y.sum().backward()
            y_ref.sum().backward()
            s.check_same(a.grad, b.grad, "dx", where)
        s.check_state(mine, theirs)


@pytest.mark.parametrize("name", s.FAKE_QUANTIZERS)
def test_torchaos_observer_in_our_fake_quantizer_and_ours_in_torchaos(name: str, device: torch.device) -> None:
    """prepare_pt2e instantiates what the annotation says: the two may come from different libraries."""
    kwargs = {"quant_min": -128, "quant_max": 127, "dtype": torch.qint8, "qscheme": torch.per_tensor_symmetric}
    modules = [
        getattr(a, name)(observer=b.MovingAverageMinMaxObserver, **kwargs).to(device)
        for a, b in ((ours, torchao), (torchao, ours))
    ]
    theirs = getattr(torchao, name)(observer=torchao.MovingAverageMinMaxObserver, **kwargs)
    for seed in range(3):
        x = s.Batch("shifted", (3, 7), seed=seed).tensor()
        y_ref = theirs(x)
        for module in modules if device.type == "cpu" else modules[:1]:
            s.check_bits(module(x.to(device)), y_ref, "y")
            s.check_state(module, theirs)


def test_an_observer_that_has_no_counterpart(device: torch.device) -> None:
    mine = ours.FakeQuantize(observer=torchao.HistogramObserver).to(device)
    theirs = torchao.FakeQuantize(observer=torchao.HistogramObserver)
    for seed in range(2):
        x = s.Batch("normal", (8, 9), seed=seed).tensor()
        s.check_bits(mine(x.to(device)), theirs(x), "y")


# ------------------------------------------------------------------------------------------ compile


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_one_graph(training: bool, device: torch.device) -> None:
    """Every class of numbers in one network, flags toggled in place: no break, eager's numbers."""
    net = Net(ours).to(device).train(training)
    net(batch(99, device))
    twin = copy.deepcopy(net)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    check_steps(compiled, net, twin, device, range(5))


def test_qparams_in_one_graph(device: torch.device) -> None:
    """calculate_qparams too, whose check for NaN is for eager calls: a graph cannot read a value."""
    for name in (*s.OBSERVERS, "FixedQParamsObserver"):
        observer = build(ours, name).to(device)
        observer(s.case_batch(0, device))

        def observe(x: torch.Tensor, observer: torch.nn.Module = observer) -> tuple[torch.Tensor, torch.Tensor]:
            observer(x)
            return observer.calculate_qparams()

        twin = copy.deepcopy(observer)
        results = torch.compile(observe, fullgraph=True, backend="aot_eager")(s.case_batch(1, device))
        for a, b in zip(results, observe(s.case_batch(1, device), twin), strict=True):
            s.check_same(a, b.cpu(), name)
