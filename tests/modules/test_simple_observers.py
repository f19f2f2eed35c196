"""Observers that record nothing or everything, and fake quantization with given qparams: torch.ao in all but speed."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.quantization as stock
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.utils import counters

import qkernels.modules as ours
from tests.modules import support as s
from tests.modules.test_constructors import ALL_SCHEMES, attempt, parameters

FIXED = {"scale": 0.5, "zero_point": 3}
OBSERVERS: dict[str, dict[str, Any]] = {
    "FixedQParamsObserver": FIXED,
    "PlaceholderObserver": {},
    "RecordingObserver": {},
    "NoopObserver": {},
    "ReuseInputObserver": {},
}
every_observer = pytest.mark.parametrize("name", list(OBSERVERS))
MODULE_ATTRIBUTES = frozenset(vars(torch.nn.Module())) - {"training"}


def make(library: Any, name: str) -> torch.nn.Module:
    """Any class of this file, with arguments it can be built from."""
    if name == "FixedQParamsFakeQuantize":
        return library.FixedQParamsFakeQuantize(observer=library.FixedQParamsObserver.with_args(**FIXED))
    return getattr(library, name)(**OBSERVERS[name])


def check_alike(mine: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """Same class name, plain attributes, state_dict, repr and children. Underscored attributes are each library's."""
    assert type(mine).__name__ == type(theirs).__name__
    for name, value in vars(theirs).items():
        if name in MODULE_ATTRIBUTES or name.startswith("_"):
            continue
        if name == "tensor_val":
            assert len(mine.tensor_val) == len(value)
            for a, b in zip(mine.tensor_val, value, strict=True):
                s.check_bits(a, b, name)
        else:
            assert vars(mine)[name] == value, f"{type(theirs).__name__}.{name}"
    s.check_state(mine, theirs)
    if all(b.device.type == "cpu" for b in mine.buffers()):
        assert repr(mine) == repr(theirs)
    assert list(dict(mine.named_children())) == list(dict(theirs.named_children()))
    for child, child_ref in zip(mine.children(), theirs.children(), strict=True):
        check_alike(child, child_ref)


def compare(build_mine: Any, build_theirs: Any) -> None:
    """Both raise the same error with the same text, or build modules alike; same warnings."""
    (mine, error), warned = attempt(build_mine)
    (theirs, error_ref), warned_ref = attempt(build_theirs)
    assert error == error_ref
    assert warned == warned_ref
    if theirs is not None:
        check_alike(mine, theirs)


# ------------------------------------------------------------------------------------------ constructors


@pytest.mark.parametrize("name", [*OBSERVERS, "FixedQParamsFakeQuantize"])
def test_signature_and_bases(name: str) -> None:
    mine, theirs = getattr(ours, name), getattr(stock, name)
    assert parameters(mine) == parameters(theirs)
    assert mine is not theirs and issubclass(mine, theirs)
    assert mine.forward is not theirs.forward  # torch.compile does not trace torch.ao's
    base = stock.FakeQuantizeBase if "Fake" in name else stock.ObserverBase
    assert isinstance(make(ours, name), base)
    assert issubclass(getattr(ours, base.__name__), base)


def test_base_classes_are_torch_aos() -> None:
    """So that isinstance works in both directions, whoever wrote the module."""
    for name in ("ObserverBase", "UniformQuantizationObserverBase", "FakeQuantizeBase"):
        assert getattr(ours, name) is getattr(stock, name)


@every_observer
def test_defaults_are_alike(name: str) -> None:
    check_alike(make(ours, name), make(stock, name))


DTYPES = (*s.QUANT_DTYPES, torch.float16, torch.float32, torch.int64)
fixed_kwargs = st.fixed_dictionaries(
    {},
    optional={
        "scale": st.sampled_from((0.5, 1 / 256, 1e-3, 2, 1e-46, "half", None, [0.5, 0.25])),
        "zero_point": st.sampled_from((0, 128, -3, 3.7, 2**40, "zero")),
        "dtype": st.sampled_from(DTYPES),
        "qscheme": st.sampled_from(ALL_SCHEMES),
        "quant_min": st.sampled_from((None, -128, 0, 300)),
        "quant_max": st.sampled_from((None, 127, 255, -1)),
        "is_dynamic": st.booleans(),
        "stranger": st.just(1),
    },
)
other_kwargs = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from((*DTYPES, None)),
        "custom_op_name": st.sampled_from(("", "add")),
        "compute_dtype": st.sampled_from((None, torch.quint8)),
        "quant_min": st.sampled_from((None, -8, 0)),
        "quant_max": st.sampled_from((None, 7)),
        "qscheme": st.sampled_from((None, *ALL_SCHEMES)),
        "eps": st.sampled_from((None, 2**-12)),
        "is_dynamic": st.booleans(),
        "stranger": st.just(1),
    },
)


@s.property_settings(200)
@given(kwargs=fixed_kwargs, positional=st.integers(0, 2), fake=st.booleans())
def test_fixed_qparams_take_and_refuse_what_torch_ao_does(kwargs: dict[str, Any], positional: int, fake: bool) -> None:
    given_kwargs = dict(kwargs)
    args = [given_kwargs.pop(k) for k in ("scale", "zero_point")[:positional] if k in given_kwargs]

    def build(library: Any) -> torch.nn.Module:
        if fake:
            return library.FixedQParamsFakeQuantize(library.FixedQParamsObserver.with_args(**kwargs))
        return library.FixedQParamsObserver(*args, **given_kwargs)

    compare(lambda: build(ours), lambda: build(stock))


@s.property_settings(150)
@given(
    name=st.sampled_from([n for n in OBSERVERS if not n.startswith("Fixed")]),
    kwargs=other_kwargs,
    few=st.integers(0, 4),
)
def test_other_observers_take_and_refuse_what_torch_ao_does(name: str, kwargs: dict[str, Any], few: int) -> None:
    kwargs = dict(list(kwargs.items())[:few])  # most combinations have an argument that is refused
    compare(lambda: getattr(ours, name)(**kwargs), lambda: getattr(stock, name)(**kwargs))


def test_positional_arguments() -> None:
    for name, args in {
        "FixedQParamsObserver": (0.25, 7, torch.qint8, torch.per_tensor_symmetric, -8, 7),
        "PlaceholderObserver": (torch.float16, "op", None, 0, 15, torch.per_channel_affine, 1e-3, True),
        "RecordingObserver": (torch.qint8,),
        "NoopObserver": (torch.float32, "op"),
    }.items():
        compare(lambda n=name, a=args: getattr(ours, n)(*a), lambda n=name, a=args: getattr(stock, n)(*a))


# ------------------------------------------------------------------------------------------ behaviour


@every_observer
def test_forward_returns_its_argument(name: str, device: torch.device) -> None:
    mine, theirs = make(ours, name).to(device), make(stock, name)
    for x in (
        torch.randn(3, 4),
        torch.randn(2, 3).t(),
        torch.empty(0, 3),
        torch.tensor(float("nan")),
        torch.arange(4),
        torch.randn(3, requires_grad=True),
        torch.randn(2, dtype=torch.complex64),
    ):
        given_x = x.to(device)
        assert mine(given_x) is given_x
        theirs(x)
    check_alike(mine, theirs)


@every_observer
def test_calculate_qparams(name: str, device: torch.device) -> None:
    mine, theirs = make(ours, name).to(device), make(stock, name)
    if name == "FixedQParamsObserver":
        scale, zero_point = mine.calculate_qparams()
        assert scale is mine.scale and zero_point is mine.zero_point  # as in torch.ao, not copies
        s.check_qparams(mine, theirs)
        return
    errors = [attempt(m.calculate_qparams)[0][1] for m in (mine, theirs)]
    assert errors[0] is not None and errors[0] == errors[1]


def test_recordings_are_copies_in_order(device: torch.device) -> None:
    mine, theirs = ours.RecordingObserver(), stock.RecordingObserver()
    x = torch.zeros(2, 3)
    given_x = x.to(device, copy=True)
    for step in range(3):
        x += step
        given_x += step
        mine(given_x)
        theirs(x)
    check_alike(mine, theirs)
    assert mine.get_tensor_value() is mine.tensor_val
    for a, b in zip(mine.tensor_val, theirs.tensor_val, strict=True):
        assert a.requires_grad == b.requires_grad
    assert not list(mine.buffers())


@every_observer
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(name: str, how: str, device: torch.device) -> None:
    mine, theirs = make(ours, name).to(device).eval(), make(stock, name).eval()
    for module in (mine, theirs):
        module(torch.ones(2))
    check_alike(copied(mine, how), theirs)
    assert type(copied(mine, how)) is type(mine)


def copied(module: torch.nn.Module, how: str) -> torch.nn.Module:
    if how == "deepcopy":
        return copy.deepcopy(module)
    if how == "pickle":
        return pickle.loads(pickle.dumps(module))
    buffer = io.BytesIO()
    torch.save(module, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["FixedQParamsObserver", "FixedQParamsFakeQuantize"])
def test_casts(name: str, cast: torch.dtype, device: torch.device) -> None:
    mine, theirs = make(ours, name).to(device), make(stock, name)
    check_alike(mine.to(cast), theirs.to(cast))
    if cast == torch.float64:  # half qparams of torch.ao's op on a float32 input are another program
        return
    check_alike(mine.float(), theirs.float())
    s.check_qparams(mine, theirs)


@every_observer
def test_factories_chain(name: str) -> None:
    dtypes = iter((torch.qint8, torch.quint8))
    for library in (ours, stock):
        builder = getattr(library, name).with_args(**OBSERVERS[name])
        assert isinstance(builder, stock.observer._PartialWrapper)
        first, second = builder(), builder()
        assert type(first) is type(second) is getattr(library, name) and first is not second
    if name != "ReuseInputObserver":
        cls = getattr(ours, name)
        builder = cls.with_callable_args(dtype=lambda: next(dtypes)).with_args(**OBSERVERS[name])
        assert builder.p.keywords == OBSERVERS[name]
        chained = cls.with_args(**OBSERVERS[name]).with_callable_args(dtype=lambda: next(dtypes))
        assert [chained().dtype, chained().dtype] == [torch.qint8, torch.quint8]
        assert chained(dtype=torch.qint32).dtype == torch.qint32


@pytest.fixture
def graphs() -> Callable[[], int]:
    """How many graphs Dynamo has made since the test began."""
    torch._dynamo.reset()
    counters.clear()
    return lambda: counters["stats"]["unique_graphs"]


class Watched(torch.nn.Module):
    """A layer with every observer of this file behind it."""

    def __init__(self, library: Any) -> None:
        super().__init__()
        self.seen = torch.nn.ModuleList(make(library, name) for name in OBSERVERS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for observer in self.seen:
            x = observer(x * 2)
        return x


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_one_graph(training: bool, device: torch.device) -> None:
    """torch.compile(fullgraph=True) goes through all of them; the recordings are those of an eager run.

    Dynamo guards the length of the list, so a graph with a RecordingObserver is compiled anew for every batch.
    """
    net, twin = Watched(ours).to(device).train(training), Watched(ours).to(device).train(training)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        x = s.case_batch(seed, device)
        s.check_bits(compiled(x), twin(x).cpu(), "y")
    recorded, recorded_ref = net.seen[2].tensor_val, twin.seen[2].tensor_val
    assert len(recorded) == len(recorded_ref) == 3
    for a, b in zip(recorded, recorded_ref, strict=True):
        s.check_bits(a, b.cpu(), "recorded")


# ------------------------------------------------------------------------------------------ FixedQParamsFakeQuantize


class UsersFixedQParams(ours.FixedQParamsObserver):
    """torch.ao asks for the very class (`type(...) is`), so a subclass is refused there."""


@pytest.mark.parametrize(
    "observer",
    ["MinMaxObserver", "PerChannelMinMaxObserver", "HistogramObserver", "PlaceholderObserver", "NoopObserver"],
)
def test_fixed_fake_quantize_refuses_other_observers(observer: str) -> None:
    """With torch.ao's error, be it its own observer or ours."""
    mine = getattr(ours, observer, getattr(stock, observer))
    compare(
        lambda: ours.FixedQParamsFakeQuantize(observer=mine),
        lambda: stock.FixedQParamsFakeQuantize(observer=getattr(stock, observer)),
    )
    (built, _), _ = attempt(lambda: ours.FixedQParamsFakeQuantize(observer=getattr(stock, observer)))
    assert built is None


def test_fixed_fake_quantize_refuses_subclasses_and_per_channel_schemes() -> None:
    with pytest.raises(AssertionError, match="observer must be a FixedQParamsObserver"):
        ours.FixedQParamsFakeQuantize(observer=UsersFixedQParams.with_args(**FIXED))
    with pytest.raises(AssertionError, match="Only per tensor quantization is supported"):
        ours.FixedQParamsFakeQuantize(
            observer=ours.FixedQParamsObserver.with_args(**FIXED, qscheme=torch.per_channel_affine)
        )


@pytest.mark.parametrize("library", [ours, stock], ids=["ours", "torch.ao"])
def test_fixed_fake_quantize_takes_both_observers(library: Any, device: torch.device) -> None:
    """torch.ao's default factories hold torch.ao's observer."""
    mine = ours.FixedQParamsFakeQuantize(observer=library.FixedQParamsObserver.with_args(**FIXED)).to(device)
    theirs = stock.FixedQParamsFakeQuantize(observer=stock.FixedQParamsObserver.with_args(**FIXED))
    x = s.Batch("large", (3, 5)).tensor()
    s.check_bits(mine(x.to(device)), theirs(x), "y")
    s.check_state(mine, theirs)


def test_fixed_fake_quantize_shares_its_observers_qparams() -> None:
    mine = make(ours, "FixedQParamsFakeQuantize")
    assert mine.scale is mine.activation_post_process.scale
    assert mine.zero_point is mine.activation_post_process.zero_point
    assert mine.calculate_qparams() == (mine.scale, mine.zero_point)


@pytest.mark.interpreter
@s.property_settings(80, 6)
@given(
    scale=st.sampled_from((1 / 256, 2 / 256, 0.5, 3e-3, 17.0)),
    codes=st.sampled_from(((0, 255, 128), (0, 255, 0), (-128, 127, -5), (0, 15, 7), (-8, 7, 7))),
    batches=st.lists(s.batches(dtypes=(torch.float16, torch.float32)), min_size=1, max_size=3),
    flags=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=3, max_size=3),
)
def test_fixed_fake_quantize_equals_torch_ao(
    scale: float,
    codes: tuple[int, int, int],
    batches: list[s.Batch],
    flags: list[tuple[bool, bool]],
    device: torch.device,
) -> None:
    """Outputs and gradients, whatever the flags: there is nothing to observe."""
    low, high, zero_point = codes
    kwargs = {"scale": scale, "zero_point": zero_point, "quant_min": low, "quant_max": high}
    mine = ours.FixedQParamsFakeQuantize(observer=ours.FixedQParamsObserver.with_args(**kwargs)).to(device)
    theirs = stock.FixedQParamsFakeQuantize(observer=stock.FixedQParamsObserver.with_args(**kwargs))
    for batch, (observing, quantizing) in zip(batches, flags, strict=False):
        for module in (mine, theirs):
            module.enable_observer(observing)
            module.enable_fake_quant(quantizing)
        x = batch.tensor()
        a, b = (x.to(d, copy=True).requires_grad_() for d in (device, "cpu"))
        y, y_ref = mine(a), theirs(b)
        s.check_bits(y, y_ref, "y")
        if y_ref.numel():
            y.sum().backward()
            y_ref.sum().backward()
            s.check_same(a.grad, b.grad, "dx")
        check_alike(mine, theirs)


def test_fixed_fake_quantize_uses_loaded_qparams(device: torch.device) -> None:
    """A checkpoint's scale replaces the constructor's, in the output and in calculate_qparams, as in torch.ao."""
    mine, theirs = (make(library, "FixedQParamsFakeQuantize") for library in (ours, stock))
    mine = mine.to(device)
    state = theirs.state_dict()
    for key in state:
        if key.endswith("scale"):
            state[key] = torch.tensor([0.125])
        if key.endswith("zero_point"):
            state[key] = torch.tensor([9], dtype=torch.int32)
    for module in (mine, theirs):
        module.load_state_dict(copy.deepcopy(state), strict=True)
    x = s.Batch("normal", (4, 9)).tensor() * 20
    s.check_bits(mine(x.to(device)), theirs(x), "y")
    check_alike(mine, theirs)
    s.check_qparams(mine, theirs)


def test_fixed_fake_quantize_in_one_graph(graphs: Callable[[], int], device: torch.device) -> None:
    """Flags are read by the device: toggling them neither breaks nor recompiles the graph."""
    net, twin = make(ours, "FixedQParamsFakeQuantize").to(device), make(ours, "FixedQParamsFakeQuantize").to(device)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for step, flag in enumerate((1, 1, 0, 1)):
        for module in (net, twin):
            module.fake_quant_enabled[0] = flag
        a, b = (s.case_batch(step, device, 40.0).requires_grad_() for _ in range(2))
        y, y_ref = compiled(a), twin(b)
        s.check_bits(y, y_ref.cpu(), "y")
        y.sum().backward()
        y_ref.sum().backward()
        s.check_same(a.grad, b.grad.cpu(), "dx")
    assert graphs() == 1
