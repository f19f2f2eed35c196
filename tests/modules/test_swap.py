"""swap(): what it exchanges, what it leaves and says, and that everything else about a module survives."""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.ao.quantization as torch_ao
from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize

import qkernels
import qkernels.modules
from tests.modules import support as s

ROOT = Path(__file__).resolve().parents[2]
CHANNEL = {"dtype": torch.qint8, "quant_min": -128, "quant_max": 127, "qscheme": torch.per_channel_symmetric}
try:
    import torchao.quantization.pt2e as torchao

    import qkernels.modules.pt2e as ours_pt2e
except ImportError:
    torchao = ours_pt2e = None
NEEDS_TORCHAO = pytest.mark.skipif(torchao is None, reason="torchao is not installed (extra: torchao)")
LIBRARIES = {"torch.ao": (torch_ao, qkernels.modules), "torchao": (torchao, ours_pt2e)}
EACH_LIBRARY = pytest.mark.parametrize("library", ["torch.ao", pytest.param("torchao", marks=NEEDS_TORCHAO)])

# Every class that has a counterpart, made by the library it is asked of.
MAKERS: dict[str, Callable[[Any], torch.nn.Module]] = {
    "MinMaxObserver": lambda q: q.MinMaxObserver(reduce_range=True, eps=1e-3),
    "MovingAverageMinMaxObserver": lambda q: observer(q, "MovingAverageMinMaxObserver")(averaging_constant=0.3),
    "PerChannelMinMaxObserver": lambda q: q.PerChannelMinMaxObserver(ch_axis=1, **CHANNEL),
    "MovingAveragePerChannelMinMaxObserver": lambda q: observer(q, "MovingAveragePerChannelMinMaxObserver")(
        averaging_constant=0.3
    ),
    "FixedQParamsObserver": lambda q: fixed(q)(),
    "PlaceholderObserver": lambda q: q.PlaceholderObserver(dtype=torch.float16),
    "RecordingObserver": lambda q: observer(q, "RecordingObserver")(),
    "NoopObserver": lambda q: q.NoopObserver(dtype=torch.float16),
    "ReuseInputObserver": lambda q: observer(q, "ReuseInputObserver")(),
    "FakeQuantize": lambda q: q.FakeQuantize(observer=q.MinMaxObserver),
    "FakeQuantize per channel": lambda q: q.FakeQuantize(
        observer=observer(q, "MovingAveragePerChannelMinMaxObserver"), **CHANNEL
    ),
    "FixedQParamsFakeQuantize": lambda q: q.FixedQParamsFakeQuantize(observer=fixed(q)),
    "FusedMovingAvgObsFakeQuantize": lambda q: q.FusedMovingAvgObsFakeQuantize(
        observer=observer(q, "MovingAverageMinMaxObserver"), averaging_constant=0.2
    ),
    "FusedMovingAvgObsFakeQuantize per channel": lambda q: q.FusedMovingAvgObsFakeQuantize(
        observer=observer(q, "MovingAveragePerChannelMinMaxObserver"), **CHANNEL
    ),
}


def observer(library: Any, name: str) -> Any:
    """Some observers are in torch.ao.quantization.observer alone."""
    return getattr(library, name, None) or getattr(torch_ao.observer, name)


def fixed(library: Any) -> Any:
    return observer(library, "FixedQParamsObserver").with_args(scale=1 / 128, zero_point=3, quant_min=0, quant_max=255)


def batch(seed: int, device: torch.device | str = "cpu") -> torch.Tensor:
    return (torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)) * (1 + seed)).to(device)


def tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_buffers()), **dict(module.named_parameters())}


def net(library: Any = torch_ao) -> torch.nn.Sequential:
    """A quantizer, an observer, one instance twice, and containers in containers."""
    shared = library.MinMaxObserver()
    return torch.nn.Sequential(
        library.FakeQuantize(observer=library.MovingAverageMinMaxObserver),
        torch.nn.Sequential(library.MinMaxObserver(), torch.nn.Linear(4, 4), shared),
        torch.nn.ModuleList([shared])[0],
        library.FusedMovingAvgObsFakeQuantize(observer=library.MovingAverageMinMaxObserver),
    )


# ------------------------------------------------------------------------------------------ what is exchanged


@pytest.mark.parametrize("case", MAKERS)
@EACH_LIBRARY
def test_every_class(library: str, case: str, device: torch.device) -> None:
    """Swapped after some batches: our class of the same name, the same object, the same state, the same future."""
    stock, ours = LIBRARIES[library]
    theirs = MAKERS[case](stock)
    theirs(batch(0))
    mine = copy.deepcopy(theirs).to(device)
    wrapper = torch.nn.Sequential(mine)
    before = {name: (t, t.clone(), t.data_ptr()) for name, t in tensors(mine).items()}
    attributes = {k: v for k, v in vars(mine).items() if not k.startswith("_")}

    report = qkernels.swap(wrapper)

    assert wrapper[0] is mine
    assert type(mine) is getattr(ours, case.split()[0])
    inner = getattr(mine, "activation_post_process", None)
    assert [e.name for e in report.swapped] == ["0"] + (["0.activation_post_process"] if inner is not None else [])
    assert not report.left
    assert report.hooks == 0
    for name, (tensor, value, pointer) in before.items():
        assert tensors(mine)[name] is tensor, name
        assert tensor.data_ptr() == pointer, name
        s.check_same(tensor, value.cpu(), name)
    assert {k: vars(mine)[k] for k in attributes} == attributes
    s.check_state(mine, theirs)
    assert repr(mine) == repr(theirs)
    for seed in range(1, 4):
        s.check_bits(mine(batch(seed, device)), theirs(batch(seed)), f"output {seed}")
        s.check_state(mine, theirs)
    if case not in ("RecordingObserver", "PlaceholderObserver", "NoopObserver", "ReuseInputObserver"):
        s.check_qparams(mine, theirs)


@pytest.mark.parametrize("case", MAKERS)
def test_a_model_that_is_an_observer(case: str) -> None:
    module = MAKERS[case](torch_ao)
    name = type(module).__name__
    report = qkernels.swap(module)
    assert type(module) is getattr(qkernels.modules, name)
    assert report.swapped[0].name == ""
    assert name in str(report)


@pytest.mark.parametrize("case", MAKERS)
def test_swapped_equals_constructed(case: str) -> None:
    """A swapped module has what one of ours is born with: attributes and buffers, non-persistent ones too."""
    swapped = MAKERS[case](torch_ao)
    qkernels.swap(swapped)
    born = MAKERS[case](qkernels.modules)
    for a, b in zip(swapped.modules(), born.modules(), strict=True):
        assert type(a) is type(b)
        assert a._non_persistent_buffers_set == b._non_persistent_buffers_set
        assert list(a._buffers) == list(b._buffers)
        for key, value in vars(b).items():
            if not key.startswith("_") and not isinstance(value, (torch.Tensor, torch.nn.Module)):
                assert getattr(a, key) == value, key


def test_the_report_names_what_was_swapped() -> None:
    model = net()
    report = qkernels.swap(model)
    assert [entry.name for entry in report.swapped] == [
        "0",
        "0.activation_post_process",
        "1.0",
        "1.2",
        "3",
        "3.activation_post_process",
    ]
    for entry in report.swapped:
        module = model.get_submodule(entry.name)
        assert entry.new.split(".")[-1] == entry.old.split(".")[-1] == type(module).__name__
        assert "qkernels" in entry.new
        assert "qkernels" not in entry.old
    lines = str(report).splitlines()
    for entry in report.swapped:
        (row,) = [line for line in lines if line.split()[:1] == [entry.name]]
        assert row.count(entry.new.split(".")[-1]) == 2
        assert "qkernels" in row
    rows = [line for line in lines if "qkernels" in line]
    assert len(rows) == len(report.swapped)
    assert len({row.index("qkernels") for row in rows}) == 1, "a table has columns"


def test_print_shows_what_was_left_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    model = torch.nn.Sequential(OwnObserver(), torch_ao.MinMaxObserver())
    report = qkernels.swap(model)
    print(report)
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "OwnObserver" in line]
    assert report.left[0].reason in row
    assert row.split()[0] == "0"


def test_a_model_without_observers() -> None:
    report = qkernels.swap(torch.nn.Linear(2, 2))
    assert (report.swapped, report.left, report.hooks) == ([], [], 0)
    assert str(report)


def test_something_that_is_no_model() -> None:
    with pytest.raises(TypeError, match=r"swap.*Module"):
        qkernels.swap("model")  # type: ignore[arg-type]


def test_a_second_swap_changes_nothing() -> None:
    model = net()
    model.append(OwnObserver())
    model(batch(0))
    first = qkernels.swap(model)
    model(batch(1))
    before = s.snapshot(model)
    objects = [(m, type(m)) for m in model.modules()]
    second = qkernels.swap(model)
    assert first.swapped
    assert second.swapped == []
    assert second.hooks == 0
    assert second.left == first.left
    assert [(m, type(m)) for m in model.modules()] == objects
    s.check_untouched(model, before)


def test_modules_of_ours_are_not_in_the_report() -> None:
    report = qkernels.swap(net(qkernels.modules))
    assert report.swapped == []
    assert report.left == []


# ------------------------------------------------------------------------------------------ what is left


class OwnObserver(torch_ao.MinMaxObserver):
    """A user's: a range with a margin."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        super().forward(x.detach() * 1.5)
        return x


class OwnFakeQuantize(torch_ao.FakeQuantize):
    """A user's, without any change; who knows what else relies on the class."""


class FromScratch(torch_ao.ObserverBase):
    def __init__(self) -> None:
        super().__init__(dtype=torch.quint8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def calculate_qparams(self, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([1.0]), torch.tensor([0])


LEFT: dict[str, Callable[[], torch.nn.Module]] = {
    "subclass of an observer": OwnObserver,
    "subclass of a fake quantizer": OwnFakeQuantize,
    "of the base class": FromScratch,
    "subclass of torchao's": lambda: type("Own", (torchao.MinMaxObserver,), {})(),
    "subclass of ours": lambda: type("Mine", (qkernels.modules.MinMaxObserver,), {})(),
    "subclass of HistogramObserver": lambda: type("Own", (torch_ao.HistogramObserver,), {})(),
    "subclass of a learnable": lambda: type("Own", (_LearnableFakeQuantize,), {})(torch_ao.MinMaxObserver),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=NEEDS_TORCHAO if "torchao" in c else ()) for c in LEFT])
def test_what_has_no_counterpart_is_left_with_a_reason(case: str) -> None:
    left = LEFT[case]()
    cls = type(left)
    model = torch.nn.Sequential(torch_ao.MinMaxObserver(), left)
    report = qkernels.swap(model)
    assert model[1] is left
    assert type(left) is cls
    assert [entry.name for entry in report.swapped if entry.name != "1.activation_post_process"] == ["0"]
    if case == "subclass of ours":  # nothing to swap it for: whether the report mentions it is its own affair
        return
    (entry,) = report.left
    assert entry.name == "1"
    assert cls.__name__ in entry.type
    assert len(entry.reason) > 8


def test_a_swapped_fake_quantizer_works_with_an_observer_that_is_left() -> None:
    theirs = torch_ao.FakeQuantize(observer=OwnObserver)
    mine = copy.deepcopy(theirs)
    report = qkernels.swap(mine)
    assert type(mine) is qkernels.modules.FakeQuantize
    assert type(mine.activation_post_process) is OwnObserver
    assert [entry.name for entry in report.left] == ["activation_post_process"]
    for seed in range(4):
        if seed == 3:
            mine.disable_observer()
            theirs.disable_observer()
        s.check_bits(mine(batch(seed)), theirs(batch(seed)), f"output {seed}")
        s.check_state(mine, theirs)


# ------------------------------------------------------------------------------------------ what survives


@EACH_LIBRARY
def test_shared_instances_and_plain_references(library: str) -> None:
    stock, ours = LIBRARIES[library]
    shared = stock.MinMaxObserver()
    model = torch.nn.ModuleDict({"a": shared, "b": torch.nn.Sequential(shared, stock.MinMaxObserver())})
    references = {"in a list": [shared], "elsewhere": (model["b"][1],)}
    model["b"].plain = [shared]
    report = qkernels.swap(model)
    assert model["a"] is model["b"][0] is references["in a list"][0] is model["b"].plain[0] is shared
    assert type(shared) is ours.MinMaxObserver
    assert type(references["elsewhere"][0]) is ours.MinMaxObserver
    assert len(report.swapped) == 2, "one entry for each instance"


def test_flags_mode_dtype_and_attributes(device: torch.device) -> None:
    model = net().to(device)
    model(batch(0, device))
    model[0].disable_fake_quant()
    model[3].disable_observer()
    model[0].eval()
    model[1][0].half()
    model[1][0].note = note = {"kept": True}
    model[3].requires_grad_(False)
    flags = {name: (flag, flag.clone()) for name, flag in model.named_buffers() if name.endswith("enabled")}
    modes = [m.training for m in model.modules()]
    qkernels.swap(model)
    assert len(flags) == 4
    for name, (flag, value) in flags.items():
        assert dict(model.named_buffers())[name] is flag
        s.check_same(flag, value.cpu(), name)
    assert [m.training for m in model.modules()] == modes
    assert modes.count(False) == 2
    assert model[1][0].note is note
    assert {buffer.dtype for buffer in (model[1][0].min_val, model[1][0].max_val, model[1][0].eps)} == {torch.float16}
    assert {buffer.device.type for buffer in model.buffers()} == {device.type}
    y = model[1][0](batch(1, device))
    assert y.dtype == torch.float32
    assert model[1][0].min_val.dtype == torch.float16


def test_a_model_on_the_meta_device() -> None:
    """Swapped before it is materialised: every buffer follows."""
    with torch.device("meta"):
        model = net()
    assert qkernels.swap(model).swapped
    assert {t.device.type for t in tensors(model).values()} == {"meta"}
    model.to_empty(device="cpu")
    theirs = net()
    model.load_state_dict(theirs.state_dict(), strict=True)
    for seed in range(2):
        s.check_bits(model(batch(seed)), theirs(batch(seed)), "output")
    s.check_state(model, theirs)


def test_users_hooks_fire_in_order_and_can_be_removed() -> None:
    model = net()
    calls: list[str] = []
    quantizer = model[0]
    handles = [
        quantizer.register_forward_pre_hook(lambda *_: calls.append("pre")),
        quantizer.register_forward_hook(lambda *_: calls.append("first")),
        quantizer.register_forward_hook(lambda *_: calls.append("second")),
        quantizer.register_full_backward_hook(lambda *_: calls.append("backward")),
        quantizer.register_state_dict_pre_hook(lambda *_: calls.append("state_dict")),
    ]
    qkernels.swap(model)
    model(batch(0).requires_grad_()).sum().backward()
    model.state_dict()
    assert calls == ["pre", "first", "second", "backward", "state_dict"]
    calls.clear()
    for handle in handles:
        handle.remove()
    model(batch(0).requires_grad_()).sum().backward()
    model.state_dict()
    assert calls == []


def eager_prepared() -> torch.nn.Module:
    model = torch.nn.Sequential(torch_ao.QuantStub(), torch.nn.Linear(4, 3), torch.nn.ReLU())
    model.qconfig = torch_ao.default_qat_qconfig
    with s.quiet():
        return torch_ao.prepare_qat(model.train())


@dataclasses.dataclass
class Counter:
    """A hook that is an object: comparable by value, so not hashable."""

    calls: int = 0

    def __call__(self, *args: Any) -> None:
        self.calls += 1


def test_a_hook_may_be_any_callable() -> None:
    model = eager_prepared()
    counter = Counter()
    model[1].register_forward_hook(counter)
    model[1].activation_post_process.register_forward_pre_hook(counter)
    assert qkernels.swap(model).hooks >= 2
    model(batch(0))
    assert counter.calls == 2


def is_stock_hook(hook: Callable[..., Any]) -> bool:
    return hook.__module__ == "torch.ao.quantization.quantize"


def test_the_eager_flows_hooks_are_replaced_in_place() -> None:
    """Same place in the order, same handle; hooks of users between them untouched."""
    model = eager_prepared()
    linear = model[1]
    linear.register_forward_hook(lambda *_: None)
    before = dict(linear._forward_hooks)
    stock_hooks = sum(is_stock_hook(h) for m in model.modules() for h in m._forward_hooks.values())
    report = qkernels.swap(model)
    assert report.hooks == stock_hooks >= 2
    assert not any(is_stock_hook(h) for m in model.modules() for h in m._forward_hooks.values())
    after = dict(linear._forward_hooks)
    assert list(after) == list(before)
    (old, user), (new, same) = before.values(), after.values()
    assert is_stock_hook(old)
    assert new.__module__.startswith("qkernels.")
    assert same is user
    assert qkernels.swap(model).hooks == 0


def test_hooks_without_an_observer_do_nothing() -> None:
    model = eager_prepared()
    qkernels.swap(model)
    expected = torch.nn.functional.linear(batch(0), model[1].weight, model[1].bias)
    for module in (model[0], model[1]):
        del module.activation_post_process
    model[1].weight_fake_quant.disable_fake_quant()
    assert torch.equal(model[:2](batch(0)), expected)


def test_a_swapped_model_copies_and_pickles() -> None:
    model = eager_prepared()
    for module in model.modules():
        vars(module).pop("qconfig", None)  # torch.ao's prepare puts a local function in there, which no pickle takes
    qkernels.swap(model)
    model(batch(0))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        mine = copy.deepcopy(model)
        for seed in (1, 2):
            s.check_bits(twin(batch(seed)), mine(batch(seed)), "output")
            s.check_state(twin, mine)


def test_parameters_and_optimizers_go_on() -> None:
    """An optimizer made before the swap still holds the model's parameters."""
    model, twin = eager_prepared(), eager_prepared()
    twin.load_state_dict(model.state_dict())
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.1) for m in (model, twin)]
    for step in range(4):
        if step == 2:
            qkernels.swap(model)
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            m(batch(step)).square().sum().backward()
            optimizer.step()
        s.check_state(model, twin)


# ------------------------------------------------------------------------------------------ imports


def run_python(code: str) -> str:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_needs_neither_triton_nor_torchao_nor_onnx() -> None:
    """A None in sys.modules makes an import fail, as on a machine that has none; swap, verify and freeze work too."""
    code = (
        "import sys\n"
        "for name in ('triton', 'torchao', 'onnx'): sys.modules[name] = None\n"
        "import torch, qkernels\n"
        "assert not any(name.startswith('qkernels.modules') for name in sys.modules)\n"
        "assert {'swap', 'swap_qconfig_mapping', 'verify', 'freeze'} <= set(dir(qkernels))\n"
        "import torch.ao.quantization as q\n"
        "model = torch.nn.Sequential(q.FakeQuantize(), q.MinMaxObserver())\n"
        "print(bool(qkernels.verify(model, [torch.ones(3)])), len(qkernels.swap(model).swapped), end=' ')\n"
        "print(qkernels.freeze(model)(torch.ones(3)).shape)"
    )
    assert run_python(code) == "True 3 torch.Size([3])"


def test_swapping_a_torch_ao_model_does_not_import_torchao() -> None:
    code = (
        "import sys, torch.ao.quantization as q, qkernels\n"
        "before = set(sys.modules)\n"
        "qkernels.swap(q.FakeQuantize())\n"
        "print(sorted(n for n in set(sys.modules) - before if n.split('.')[0] in ('triton', 'torchao', 'onnx')))"
    )
    assert run_python(code) == "[]"
