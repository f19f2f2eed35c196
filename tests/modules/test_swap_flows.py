"""One model, prepared by torch.ao's flows with stock classes, with ours, and swapped: nothing tells them apart.

Always on the CPU: that is where torch.ao's converted models run.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.quantization as stock
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx

import qkernels
import qkernels.modules as ours
from tests.modules import support as s
from tests.modules.test_flows import _engine as _engine
from tests.modules.test_flows import check_converted, data, ptq_qconfigs, qat_qconfigs

STOCK_BASES = (stock.ObserverBase, stock.FakeQuantizeBase)
EXAMPLE = data(1)[0][0]


class Branches(torch.nn.Module):
    """What the flows treat each in its own way: fusion, a functional, fixed qparams, shared observers."""

    def __init__(self) -> None:
        super().__init__()
        self.quant = stock.QuantStub()
        self.conv = torch.nn.Conv2d(2, 4, 3, padding=1)
        self.bn = torch.nn.BatchNorm2d(4)
        self.relu = torch.nn.ReLU()
        self.side = torch.nn.Conv2d(2, 4, 1)
        self.sigmoid = torch.nn.Sigmoid()
        self.pool = torch.nn.MaxPool2d(2)
        self.joined = torch.ao.nn.quantized.FloatFunctional()
        self.linear = torch.nn.Linear(8 * 9, 5)
        self.dequant = stock.DeQuantStub()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.quant(x)
        a = self.pool(self.relu(self.bn(self.conv(x))))
        b = self.pool(self.sigmoid(self.side(x)))
        return self.dequant(self.linear(torch.flatten(self.joined.cat([a, b], 1), 1)))


def observers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, STOCK_BASES)}


def is_ours(module: torch.nn.Module) -> bool:
    return type(module).__module__.startswith("qkernels.")


def check_swapped(model: torch.nn.Module, report: Any) -> None:
    """What can be ours is ours, and the report accounts for every observer and fake quantizer."""
    assert report.swapped
    left = {id(model.get_submodule(entry.name)) for entry in report.left}
    swapped = {id(model.get_submodule(entry.name)) for entry in report.swapped}
    for name, module in observers(model).items():
        assert (id(module) in swapped) == is_ours(module), name
        assert (id(module) in left) != is_ours(module), name
    for entry in report.left:
        assert entry.reason, entry
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert not [h for h in hooks if h.__module__ == "torch.ao.quantization.quantize"]


def train_side_by_side(models: dict[str, torch.nn.Module], steps: int = 5) -> None:
    """SGD on every model; outputs, weights and quantization state compared with the stock model's after every step."""
    optimizers = {}
    for name, model in models.items():
        model.train()
        optimizers[name] = torch.optim.SGD(model.parameters(), lr=0.1)
    for step, (x, target) in enumerate(data(steps)):
        outputs = {}
        for name, model in models.items():
            if step == 3:
                model.apply(stock.disable_observer)
            if step == 4:
                model.apply(torch.ao.nn.intrinsic.qat.freeze_bn_stats)
            optimizers[name].zero_grad()
            outputs[name] = model(x)
            torch.nn.functional.cross_entropy(outputs[name], target).backward()
            optimizers[name].step()
        compare(models, outputs, step)


def calibrate_side_by_side(models: dict[str, torch.nn.Module]) -> None:
    for step, (x, _) in enumerate(data(3)):
        with torch.no_grad():
            compare(models, {name: model(x) for name, model in models.items()}, step)


def compare(models: dict[str, torch.nn.Module], outputs: dict[str, torch.Tensor], step: int) -> None:
    for name in models:
        s.check_bits(outputs[name], outputs["stock"], f"output of {name} at step {step}")
        s.check_state(models[name], models["stock"])


def check_all_converted(models: dict[str, torch.nn.Module], convert: Callable[..., torch.nn.Module]) -> None:
    expected = convert(copy.deepcopy(models["stock"]).eval())
    for name, model in models.items():
        if name != "stock":
            check_converted(convert(model.eval()), expected)


# ------------------------------------------------------------------------------------------ eager


QAT: dict[str, Callable[[Any], stock.QConfig]] = {
    "default": lambda library: library.default_qat_qconfig,
    "x86": lambda library: library.get_default_qat_qconfig("x86"),
    "qnnpack": lambda library: library.get_default_qat_qconfig("qnnpack"),
    "plain": lambda library: qat_qconfigs(library)["plain"],
}
PTQ: dict[str, Callable[[Any], stock.QConfig]] = {
    "default": lambda library: library.default_qconfig,
    "per channel": lambda library: library.default_per_channel_qconfig,
    "moving": lambda library: ptq_qconfigs(library)["moving"],
}


def eager_qat(qconfig: stock.QConfig, model: torch.nn.Module | None = None) -> torch.nn.Module:
    torch.manual_seed(7)
    net = (model or Branches()).train()
    net.qconfig = qconfig
    return stock.prepare_qat(stock.fuse_modules_qat(net, [["conv", "bn", "relu"]]))


def eager_ptq(qconfig: stock.QConfig, linear: stock.QConfig | None = None) -> torch.nn.Module:
    torch.manual_seed(7)
    net = stock.fuse_modules(Branches().eval(), [["conv", "bn", "relu"]])
    net.qconfig = qconfig
    if linear is not None:
        net.linear.qconfig = linear
    return stock.prepare(net)


def three_ways(prepare: Callable[[Any], torch.nn.Module], which: Callable[[Any], Any]) -> dict[str, torch.nn.Module]:
    """The same model prepared with stock factories, with ours, and swapped after preparation."""
    models = {"stock": prepare(which(stock)), "ours": prepare(which(ours)), "swapped": prepare(which(stock))}
    check_swapped(models["swapped"], qkernels.swap(models["swapped"]))
    assert not any(map(is_ours, models["stock"].modules()))
    assert any(is_ours(m) for m in models["ours"].modules())
    return models


@pytest.mark.parametrize("which", QAT)
def test_eager_qat(which: str) -> None:
    models = three_ways(eager_qat, QAT[which])
    train_side_by_side(models)
    check_all_converted(models, stock.convert)


@pytest.mark.parametrize("which", PTQ)
def test_eager_post_training(which: str) -> None:
    models = three_ways(eager_ptq, PTQ[which])
    calibrate_side_by_side(models)
    check_all_converted(models, stock.convert)


def test_eager_histogram_observers_are_swapped_and_work() -> None:
    """The default of torch.ao has HistogramObserver for activations."""

    def prepared(library: Any) -> torch.nn.Module:
        return eager_ptq(library.get_default_qconfig("x86"), linear=library.default_per_channel_qconfig)

    models = {"stock": prepared(stock), "ours": prepared(ours), "swapped": prepared(stock)}
    report = qkernels.swap(models["swapped"])
    check_swapped(models["swapped"], report)
    histograms = {n for n, m in observers(models["stock"]).items() if type(m) is stock.HistogramObserver}
    assert len(histograms) >= 4
    assert histograms <= {entry.name for entry in report.swapped}
    assert report.left == []
    calibrate_side_by_side(models)
    check_all_converted(models, stock.convert)


def test_eager_dynamic_qat_observes_in_a_pre_hook() -> None:
    """A memoryless qconfig makes torch.ao observe the input of a layer: `_observer_forward_pre_hook`."""

    def prepared(library: Any) -> torch.nn.Module:
        torch.manual_seed(7)
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(72, 5), torch.nn.ReLU())
        net.qconfig = library.default_dynamic_qat_qconfig
        return stock.prepare_qat(net.train())

    models = {"stock": prepared(stock), "ours": prepared(ours), "swapped": prepared(stock)}
    assert len(models["stock"][1]._forward_pre_hooks) == 1
    report = qkernels.swap(models["swapped"])
    check_swapped(models["swapped"], report)
    assert report.hooks == len([h for m in models["stock"].modules() for h in m._forward_pre_hooks]) >= 1
    train_side_by_side(models)


def test_hooks_of_a_converted_model_do_nothing() -> None:
    """convert drops only torch.ao's own hooks: ours travel to the int8 modules, where there is nothing to observe."""
    model = eager_qat(stock.get_default_qat_qconfig("x86"))
    assert qkernels.swap(model).hooks >= 3
    calls: list[str] = []
    model.linear.register_forward_hook(lambda *_: calls.append("post"))
    model.linear.register_forward_pre_hook(lambda *_: calls.append("pre"))
    model(EXAMPLE)
    converted = stock.convert(model.eval())
    calls.clear()
    converted(EXAMPLE)
    assert calls == ["pre", "post"]
    assert not [m for m in converted.modules() if isinstance(m, STOCK_BASES)]


def test_the_observer_sees_the_output_before_other_hooks() -> None:
    """torch.ao prepends its hook, so that hooks of users see what the observer returned, fake quantized in training."""
    seen: dict[str, list[torch.Tensor]] = {"stock": [], "swapped": []}
    for name, results in seen.items():
        torch.manual_seed(7)
        net = Branches()
        net.linear.register_forward_hook(lambda module, args, out, results=results: results.append(out.detach()))
        model = eager_qat(stock.get_default_qat_qconfig("x86"), net)
        model.linear.register_forward_hook(lambda module, args, out, results=results: results.append(out.detach()))
        if name == "swapped":
            qkernels.swap(model)
        model(EXAMPLE)
    assert len(seen["stock"]) == 2
    assert torch.equal(seen["stock"][0], seen["stock"][1])
    for mine, theirs in zip(seen["swapped"], seen["stock"], strict=True):
        s.check_bits(mine, theirs, "what a user's hook saw")


# ------------------------------------------------------------------------------------------ FX


def fx_qat(mapping: stock.QConfigMapping, model: torch.nn.Module | None = None) -> torch.nn.Module:
    torch.manual_seed(7)
    return prepare_qat_fx((model or Branches()).train(), mapping, (EXAMPLE,))


def fx_ptq(mapping: stock.QConfigMapping) -> torch.nn.Module:
    torch.manual_seed(7)
    return prepare_fx(Branches().eval(), mapping, (EXAMPLE,))


def mapping_of(qconfigs: dict[str, Callable[[Any], stock.QConfig]]) -> dict[str, Callable[[Any], Any]]:
    return {
        k: lambda library, make=make: stock.QConfigMapping().set_global(make(library)) for k, make in qconfigs.items()
    }


def four_ways(
    prepare: Callable[[Any], torch.nn.Module], mapping: Callable[[Any], stock.QConfigMapping]
) -> dict[str, torch.nn.Module]:
    """As three_ways, and prepared with a stock mapping that swap_qconfig_mapping turned into ours."""
    models = three_ways(prepare, mapping)
    models["mapping"] = prepare(qkernels.swap_qconfig_mapping(mapping(stock)))
    assert {n for n, m in observers(models["mapping"]).items() if is_ours(m)} == {
        n for n, m in observers(models["swapped"]).items() if is_ours(m)
    }
    return models


FX_QAT: dict[str, Callable[[Any], stock.QConfigMapping]] = {
    "x86 mapping": lambda library: library.get_default_qat_qconfig_mapping("x86"),
    **mapping_of({"default": QAT["default"]}),
}
FX_PTQ: dict[str, Callable[[Any], stock.QConfigMapping]] = {
    "x86 mapping": lambda library: library.get_default_qconfig_mapping("x86"),  # HistogramObserver
    "moving": lambda library: library.get_default_qconfig_mapping("x86").set_global(PTQ["moving"](library)),
    **mapping_of({"default": PTQ["default"]}),
}


@pytest.mark.parametrize("which", FX_QAT)
def test_fx_qat(which: str) -> None:
    models = four_ways(fx_qat, FX_QAT[which])
    train_side_by_side(models)
    check_all_converted(models, convert_fx)


@pytest.mark.parametrize("which", FX_PTQ)
def test_fx_post_training(which: str) -> None:
    models = four_ways(fx_ptq, FX_PTQ[which])
    calibrate_side_by_side(models)
    check_all_converted(models, convert_fx)


def test_fx_histogram_observers_are_in_the_report() -> None:
    model = fx_ptq(stock.get_default_qconfig_mapping("x86"))
    histograms = {id(m) for m in model.modules() if type(m) is stock.HistogramObserver}
    report = qkernels.swap(model)
    check_swapped(model, report)
    assert histograms
    assert {id(m) for m in model.modules() if type(m) is ours.HistogramObserver} == histograms
    assert report.left == []


def sharing(model: torch.nn.Module) -> list[set[str]]:
    """Names of one and the same observer, for every observer that has several."""
    names: dict[int, set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, STOCK_BASES):
            names.setdefault(id(module), set()).add(name)
    return sorted((group for group in names.values() if len(group) > 1), key=sorted)


@pytest.mark.parametrize("prepare", [fx_qat, fx_ptq])
def test_fx_shared_observers_stay_shared(prepare: Callable[[Any], torch.nn.Module]) -> None:
    """Pooling and concatenation share the observer of their input."""
    qconfig = stock.default_qat_qconfig if prepare is fx_qat else stock.default_qconfig
    model = prepare(stock.QConfigMapping().set_global(qconfig))
    before = sharing(model)
    assert before
    qkernels.swap(model)
    assert sharing(model) == before


def test_swap_qconfig_mapping_reaches_every_kind_of_entry_and_leaves_its_argument() -> None:
    qconfig = stock.get_default_qat_qconfig("x86")
    mapping = (
        stock.QConfigMapping()
        .set_global(qconfig)
        .set_object_type(torch.nn.Conv2d, stock.default_qat_qconfig)
        .set_object_type(torch.nn.ReLU, None)
        .set_module_name_regex("li.*", stock.default_qat_qconfig_v2)
        .set_module_name("side", stock.default_per_channel_qconfig)
        .set_module_name_object_type_order("", torch.nn.functional.linear, 0, stock.default_qconfig)
    )
    before = copy.deepcopy(mapping.to_dict())
    swapped = qkernels.swap_qconfig_mapping(mapping)
    assert isinstance(swapped, stock.QConfigMapping)
    assert swapped is not mapping
    assert str(mapping.to_dict()) == str(before)
    assert mapping.global_qconfig is qconfig
    pairs = [
        (swapped.global_qconfig, qconfig),
        (swapped.object_type_qconfigs[torch.nn.Conv2d], stock.default_qat_qconfig),
        (swapped.module_name_regex_qconfigs["li.*"], stock.default_qat_qconfig_v2),
        (swapped.module_name_qconfigs["side"], stock.default_per_channel_qconfig),
        (
            swapped.module_name_object_type_order_qconfigs[("", torch.nn.functional.linear, 0)],
            stock.default_qconfig,
        ),
    ]
    assert swapped.object_type_qconfigs[torch.nn.ReLU] is None
    for mine, theirs in pairs:
        assert isinstance(mine, stock.QConfig)
        for ctr, stock_ctr in zip(mine, theirs, strict=True):
            module, expected = ctr(), stock_ctr()
            assert is_ours(module)
            assert type(module).__name__ == type(expected).__name__
            assert all(is_ours(m) for m in module.modules())
            s.check_state(module, expected)
            assert repr(module) == repr(expected)


def test_swap_qconfig_mapping_keeps_what_has_no_counterpart() -> None:
    class Own(stock.MinMaxObserver):
        pass

    own = Own.with_args(reduce_range=True)
    mapping = stock.QConfigMapping().set_global(stock.QConfig(activation=stock.HistogramObserver, weight=own))
    swapped = qkernels.swap_qconfig_mapping(mapping).global_qconfig
    assert type(swapped.activation()) is ours.HistogramObserver
    assert type(swapped.weight()) is Own
    assert swapped.weight().reduce_range


# ------------------------------------------------------------------------------------------ compile


class Small(torch.nn.Module):
    """One fused layer and one with a weight alone: all that Dynamo treats in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.quant = stock.QuantStub()
        self.conv = torch.nn.Conv2d(2, 4, 3)
        self.bn = torch.nn.BatchNorm2d(4)
        self.relu = torch.nn.ReLU()
        self.linear = torch.nn.Linear(4, 5)
        self.dequant = stock.DeQuantStub()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn(self.conv(self.quant(x))))
        return self.dequant(torch.sigmoid(self.linear(x.mean((2, 3)))))


def check_compiled(model: torch.nn.Module, twin: torch.nn.Module, train: bool) -> None:
    """A batch in eager code, then one compiled with fullgraph, against eager code: same output and state.

    The gradients are close, not equal: AOTAutograd adds and multiplies in batch norm's backward in another order.
    """
    (first, _), (x, target) = data(2)
    outputs = []
    for module in (model, twin):
        module.train(train)
        module(first)
        call = torch.compile(module, fullgraph=True, backend="aot_eager") if module is model else module
        outputs.append(call(x))
        if train:
            torch.nn.functional.cross_entropy(outputs[-1], target).backward()
    s.check_bits(outputs[0], outputs[1], "output")
    s.check_state(model, twin)
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        if train:
            torch.testing.assert_close(mine.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}")


PREPARED: dict[str, Callable[[], torch.nn.Module]] = {
    "eager": lambda: eager_qat(stock.get_default_qat_qconfig("x86"), Small()),
    "FX": lambda: fx_qat(stock.get_default_qat_qconfig_mapping("x86"), Small()),
}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("flow", PREPARED)
def test_a_swapped_model_compiles_where_stock_breaks(flow: str, train: bool) -> None:
    """When stock no longer breaks, the reason to swap has to be told differently."""
    model, twin = PREPARED[flow](), PREPARED[flow]()
    twin.load_state_dict(model.state_dict())
    broken = torch.compile(copy.deepcopy(model).train(train), fullgraph=True, backend="eager")
    with pytest.raises((torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError)):
        broken(EXAMPLE)
    torch._dynamo.reset()
    qkernels.swap(model)
    qkernels.swap(twin)
    check_compiled(model, twin, train)


def test_a_swapped_post_training_model_compiles() -> None:
    """Calibration, with the pure observers behind hooks."""
    model = eager_ptq(stock.default_qconfig)
    qkernels.swap(model)
    check_compiled(model, copy.deepcopy(model), train=False)


# ------------------------------------------------------------------------------------------ checkpoints


MAKERS: dict[str, dict[str, Callable[[], torch.nn.Module]]] = {
    "eager": {
        "stock": lambda: eager_qat(stock.get_default_qat_qconfig("x86")),
        "ours": lambda: eager_qat(ours.get_default_qat_qconfig("x86")),
    },
    "FX": {
        "stock": lambda: fx_qat(stock.get_default_qat_qconfig_mapping("x86")),
        "ours": lambda: fx_qat(ours.get_default_qat_qconfig_mapping("x86")),
    },
}


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    """Through a file, by the loader that runs no code."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("flow", MAKERS)
def test_checkpoints_of_whole_prepared_models_go_every_way(flow: str) -> None:
    """Saved in the middle of training by each of three, loaded into fresh models of each kind, training goes on."""

    def make(kind: str) -> torch.nn.Module:
        model = MAKERS[flow]["ours" if kind == "ours" else "stock"]()
        if kind == "swapped":
            qkernels.swap(model)
        return model

    kinds = ("stock", "ours", "swapped")
    sources = {kind: make(kind) for kind in kinds}
    fresh = copy.deepcopy(sources)
    train_side_by_side(sources, steps=2)
    expected = copy.deepcopy(fresh["stock"])
    expected.load_state_dict(copy.deepcopy(sources["stock"].state_dict()), strict=True)
    runs = {"stock": expected}
    for source in kinds:
        state = saved_and_loaded(sources[source].state_dict())
        for target in kinds:
            model = runs[f"{source} into {target}"] = copy.deepcopy(fresh[target])
            model.load_state_dict(copy.deepcopy(state), strict=True)
            s.check_state(model, expected)
    train_side_by_side(runs, steps=2)


def test_swap_in_the_middle_of_training_changes_nothing() -> None:
    models = {name: eager_qat(stock.get_default_qat_qconfig("x86")) for name in ("stock", "swapped")}
    train_side_by_side(models, steps=2)
    before = copy.deepcopy(models["swapped"].state_dict())
    qkernels.swap(models["swapped"])
    s.check_state(models["swapped"], models["stock"])
    assert list(before) == list(models["swapped"].state_dict())
    train_side_by_side(models)
    check_all_converted(models, stock.convert)
