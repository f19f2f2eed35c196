"""torchao's PT2E flow: stock observers, ours, and swapped ones give the same numbers and the same converted program.

torchao is an optional dependency of the library and part of its test environment. On the CPU, where converted
programs run.
"""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import qkernels
import qkernels.modules
from tests.modules import support as s

stock = pytest.importorskip("torchao.quantization.pt2e", reason="torchao is not installed (extra: torchao)")
from torchao.quantization.pt2e import allow_exported_model_train_eval, qat_utils  # noqa: E402
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e  # noqa: E402
from torchao.quantization.pt2e.quantizer import (  # noqa: E402
    DerivedQuantizationSpec,
    FixedQParamsQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86  # noqa: E402

import qkernels.modules.pt2e as ours  # noqa: E402  (imports torchao)

STOCK_BASES = (stock.ObserverBase, stock.FakeQuantizeBase)
WEIGHT = {"dtype": torch.int8, "quant_min": -127, "quant_max": 127, "qscheme": torch.per_channel_symmetric}
Annotate = Callable[[torch.fx.Node, QuantizationAnnotation], None]


class Net(torch.nn.Module):
    def __init__(self, bn: bool) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 4, 3, padding=1)
        self.bn = torch.nn.BatchNorm2d(4) if bn else torch.nn.Identity()
        self.side = torch.nn.Conv2d(2, 4, 1)
        self.linear = torch.nn.Linear(4 * 9, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = torch.relu(self.bn(self.conv(x)))
        b = torch.sigmoid(self.side(x))
        x = torch.nn.functional.max_pool2d(a + b, 2)
        return self.linear(torch.flatten(x, 1))


def data(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(3)
    return [(torch.randn(7, 2, 6, 6, generator=g), torch.randint(0, 5, (7,), generator=g)) for _ in range(steps)]


EXAMPLE = data(1)[0][0]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with s.quiet():
        yield


# ------------------------------------------------------------------------------------------ quantizers


def x86_quantizer(library: Any, is_qat: bool) -> Quantizer:
    """torchao's own quantizer with its own default config; for `ours` with our classes in the specs."""
    config = x86.get_default_x86_inductor_quantization_config(is_qat=is_qat)
    if library is not stock:
        swapped = {
            field.name: of_library(getattr(config, field.name), library)
            for field in dataclasses.fields(config)
            if isinstance(getattr(config, field.name), QuantizationSpec)
        }
        config = dataclasses.replace(config, **swapped)
    return x86.X86InductorQuantizer().set_global(config)


def of_library(spec: QuantizationSpec, library: Any) -> QuantizationSpec:
    """The spec with the class of the same name from another library."""
    partial = spec.observer_or_fake_quant_ctr.p
    keywords = dict(partial.keywords)
    if "observer" in keywords:
        keywords["observer"] = getattr(library, keywords["observer"].__name__)
    cls = getattr(library, partial.func.__name__, partial.func)
    return dataclasses.replace(spec, observer_or_fake_quant_ctr=cls.with_args(**keywords))


def bias_qparams(sources: list[torch.nn.Module]) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale of the bias from those of the activation and the weight, as accelerators want it."""
    activation, weight = (source.calculate_qparams() for source in sources)
    scale = (activation[0] * weight[0]).to(torch.float32)
    return scale, torch.zeros_like(scale, dtype=torch.int32)


class EveryKind(Quantizer):
    """A quantizer that uses each kind of spec: plain, per channel, fixed, shared and derived."""

    def __init__(self, library: Any, is_qat: bool) -> None:
        if is_qat:
            fake = library.FusedMovingAvgObsFakeQuantize
            act = fake.with_args(observer=library.MovingAverageMinMaxObserver, eps=2**-12)
            weight = library.FakeQuantize.with_args(observer=library.MovingAveragePerChannelMinMaxObserver)
        else:
            act = library.MovingAverageMinMaxObserver.with_args(averaging_constant=0.1)
            weight = library.PerChannelMinMaxObserver.with_args(eps=2**-12)
        self.act = QuantizationSpec(torch.uint8, act, 0, 255, torch.per_tensor_affine)
        self.weight = QuantizationSpec(observer_or_fake_quant_ctr=weight, ch_axis=0, **WEIGHT)
        self.fixed = FixedQParamsQuantizationSpec(torch.uint8, 1 / 256, 0, 0, 255, torch.per_tensor_affine)

    def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
        kinds: dict[Any, Annotate] = {
            torch.ops.aten.conv2d.default: self._layer,
            torch.ops.aten.linear.default: self._layer,
            torch.ops.aten.sigmoid.default: self._sigmoid,
            torch.ops.aten.max_pool2d.default: self._pool,
        }
        for node in model.graph.nodes:
            if node.target in kinds:
                annotation = QuantizationAnnotation(_annotated=True)
                kinds[node.target](node, annotation)
                node.meta["quantization_annotation"] = annotation
        return model

    def _layer(self, node: torch.fx.Node, annotation: QuantizationAnnotation) -> None:
        x, weight, bias = node.args[:3]
        derived = DerivedQuantizationSpec(
            derived_from=[(x, node), (weight, node)],
            derive_qparams_fn=bias_qparams,
            dtype=torch.int32,
            quant_min=-(2**31),
            quant_max=2**31 - 1,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
        )
        annotation.input_qspec_map = {x: self.act, weight: self.weight, bias: derived}
        if node.target is torch.ops.aten.linear.default:
            annotation.output_qspec = self.act

    def _sigmoid(self, node: torch.fx.Node, annotation: QuantizationAnnotation) -> None:
        annotation.input_qspec_map = {node.args[0]: self.act}
        annotation.output_qspec = self.fixed

    def _pool(self, node: torch.fx.Node, annotation: QuantizationAnnotation) -> None:
        annotation.input_qspec_map = {node.args[0]: self.act}
        annotation.output_qspec = SharedQuantizationSpec((node.args[0], node))

    def validate(self, model: torch.fx.GraphModule) -> None:
        pass


QUANTIZERS: dict[str, Callable[[Any, bool], Quantizer]] = {"x86": x86_quantizer, "every kind": EveryKind}


# ------------------------------------------------------------------------------------------ harness


def prepared(quantizer: Quantizer, is_qat: bool, bn: bool = False) -> torch.fx.GraphModule:
    """Without batch norm unless asked for: in training that takes torchao several seconds to fuse and to fold."""
    torch.manual_seed(7)
    net = Net(bn or not is_qat).train(is_qat)
    exported = torch.export.export(net, (EXAMPLE,), strict=True).module()
    model = (prepare_qat_pt2e if is_qat else prepare_pt2e)(exported, quantizer)
    return allow_exported_model_train_eval(model)


def three_ways(which: str, is_qat: bool) -> tuple[dict[str, torch.fx.GraphModule], Any]:
    """Prepared with stock classes, with ours, and swapped; and the report of the swap."""
    make = QUANTIZERS[which]
    models = {
        "stock": prepared(make(stock, is_qat), is_qat),
        "ours": prepared(make(ours, is_qat), is_qat),
        "swapped": prepared(make(stock, is_qat), is_qat),
    }
    report = qkernels.swap(models["swapped"])
    assert report.swapped
    assert not any(is_ours(m) for m in models["stock"].modules())
    assert any(is_ours(m) for m in models["ours"].modules())
    return models, report


def is_ours(module: torch.nn.Module) -> bool:
    return type(module).__module__.startswith("qkernels.")


def observers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, STOCK_BASES)}


def compare(models: dict[str, torch.fx.GraphModule], outputs: dict[str, torch.Tensor], step: int) -> None:
    for name, model in models.items():
        s.check_bits(outputs[name], outputs["stock"], f"output of {name} at step {step}")
        check_state(model, models["stock"])


def check_state(mine: torch.fx.GraphModule, theirs: torch.fx.GraphModule) -> None:
    """As support's, but for what copying a GraphModule changes: the order of shared modules, versions of containers."""
    a, b = mine.state_dict(), theirs.state_dict()
    assert sorted(a) == sorted(b)
    for name in observers(theirs):
        assert a._metadata[name] == b._metadata[name], name
    for key, value in b.items():
        s.check_same(a[key], value, key)


def run_side_by_side(models: dict[str, torch.fx.GraphModule], is_qat: bool, steps: int = 4) -> None:
    optimizers = {}
    for name, model in models.items():
        model.train(is_qat)
        optimizers[name] = torch.optim.SGD(model.parameters(), lr=0.1)
    for step, (x, target) in enumerate(data(steps)):
        outputs = {}
        for name, model in models.items():
            if is_qat and step == 3:
                model.apply(stock.disable_observer)
            with torch.set_grad_enabled(is_qat):
                outputs[name] = model(x)
            if is_qat:
                optimizers[name].zero_grad()
                torch.nn.functional.cross_entropy(outputs[name], target).backward()
                optimizers[name].step()
        compare(models, outputs, step)


def program(model: torch.fx.GraphModule) -> list[tuple[str, str, str]]:
    return [
        (n.op, str(n.target), str([a for a in n.args if not isinstance(a, torch.fx.Node)])) for n in model.graph.nodes
    ]


def check_converted(models: dict[str, torch.fx.GraphModule]) -> None:
    """The same program with the same constants, quantized indeed, and the same output."""
    for model in models.values():
        model.eval()  # of an exported program, which returns None
    converted = {name: convert_pt2e(model) for name, model in models.items()}
    expected = converted.pop("stock")
    assert any("quantize_per" in target for _, target, _ in program(expected))
    x = EXAMPLE * 1.5
    for name, model in converted.items():
        assert program(model) == program(expected), name
        a, b = model.state_dict(), expected.state_dict()
        assert list(a) == list(b), name
        for key, value in b.items():
            s.check_same(a[key], value, f"{key} of {name}")
        s.check_bits(model(x), expected(x), f"output of {name}")


# ------------------------------------------------------------------------------------------ tests


@pytest.mark.parametrize("is_qat", [True, False], ids=["QAT", "post training"])
@pytest.mark.parametrize("which", QUANTIZERS)
def test_flow(which: str, is_qat: bool) -> None:
    models, report = three_ways(which, is_qat)
    left = {id(models["swapped"].get_submodule(entry.name)) for entry in report.left}
    for name, module in observers(models["swapped"]).items():
        assert (id(module) in left) != is_ours(module), name
    run_side_by_side(models, is_qat)
    check_converted(models)


@pytest.fixture
def only_conv2d(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of torchao's conv-bn patterns try those for conv2d alone: each kind takes seconds, and the model has no other."""
    for name in ("_fuse_conv_bn_qat_helper", "_fold_conv_bn_qat_helper"):
        helper = getattr(qat_utils, name)

        def for_conv2d(model: Any, conv_fn: Any, *args: Any, helper: Any = helper, **kwargs: Any) -> Any:
            return helper(model, conv_fn, *args, **kwargs) if conv_fn is torch.nn.functional.conv2d else model

        monkeypatch.setattr(qat_utils, name, for_conv2d)


@pytest.mark.usefixtures("only_conv2d")
def test_fused_conv_bn() -> None:
    """torchao finds the fake quantizers between conv and batch norm by pattern when it folds them."""
    models = {"stock": prepared(EveryKind(stock, True), True, bn=True)}
    assert any("running_mean" in name for name, _ in models["stock"].named_buffers())
    models["swapped"] = copy.deepcopy(models["stock"])
    assert qkernels.swap(models["swapped"]).swapped
    run_side_by_side(models, True)
    check_converted(models)


def test_histogram_observers_are_swapped_and_work() -> None:
    """The default of torchao's quantizers after training."""
    models, report = three_ways("x86", is_qat=False)
    histograms = {n for n, m in observers(models["stock"]).items() if type(m) is stock.HistogramObserver}
    assert histograms
    assert histograms <= {e.name for e in report.swapped}
    assert report.left == []
    names = {type(m).__name__ for m in observers(models["swapped"]).values() if is_ours(m)}
    assert names == {"HistogramObserver", "PerChannelMinMaxObserver"}


def test_pt2e_classes_stand_on_torchaos_bases() -> None:
    """torchao's prepare and convert ask isinstance of its own classes; torch.ao's would be refused."""
    torch_ao = (torch.ao.quantization.ObserverBase, torch.ao.quantization.FakeQuantizeBase)
    for name in (*s.OBSERVERS, *s.FAKE_QUANTIZERS, "FixedQParamsObserver", "FixedQParamsFakeQuantize",
                 "PlaceholderObserver", "RecordingObserver", "NoopObserver", "ReuseInputObserver"):  # fmt: skip
        cls = getattr(ours, name)
        assert cls.__name__ == name
        assert issubclass(cls, getattr(stock, name)), name
        assert not issubclass(cls, torch_ao), name
        assert cls is not getattr(qkernels.modules, name), name


def test_swap_takes_the_class_of_the_modules_own_library() -> None:
    model = torch.nn.ModuleDict(
        {
            "torchao": stock.FakeQuantize(observer=stock.MovingAverageMinMaxObserver),
            "torch_ao": torch.ao.quantization.FakeQuantize(),
        }
    )
    qkernels.swap(model)
    assert type(model["torchao"]) is ours.FakeQuantize
    assert type(model["torchao"].activation_post_process) is ours.MovingAverageMinMaxObserver
    assert type(model["torch_ao"]) is qkernels.modules.FakeQuantize
    assert type(model["torch_ao"].activation_post_process) is qkernels.modules.MovingAverageMinMaxObserver


@pytest.mark.parametrize("is_qat", [True, False], ids=["QAT", "post training"])
def test_shared_and_derived_ones_keep_their_sources(is_qat: bool) -> None:
    model = prepared(EveryKind(stock, is_qat), is_qat)

    def groups() -> list[list[str]]:
        names: dict[int, list[str]] = {}
        for name, m in model.named_modules(remove_duplicate=False):
            if isinstance(m, STOCK_BASES):
                names.setdefault(id(m), []).append(name)
        return sorted(group for group in names.values() if len(group) > 1)

    def derived() -> list[stock.DerivedObserverOrFakeQuantize]:
        return [m for m in model.modules() if isinstance(m, stock.DerivedObserverOrFakeQuantize)]

    def sources() -> list[list[str]]:
        names = {id(m): n for n, m in model.named_modules()}
        return [[names[id(source)] for source in m.obs_or_fqs] for m in derived()]

    before = groups(), sources()
    assert before[0]
    assert len(before[1]) == 3
    report = qkernels.swap(model)
    assert (groups(), sources()) == before
    for m in derived():
        assert all(is_ours(source) for source in m.obs_or_fqs)
    left = {entry.name: entry for entry in report.left}
    for name, m in model.named_modules():
        if isinstance(m, stock.DerivedObserverOrFakeQuantize):
            assert left.pop(name).reason
    assert not left
    model(EXAMPLE)
    for m in derived():
        scale = m.obs_or_fqs[0].calculate_qparams()[0] * m.obs_or_fqs[1].calculate_qparams()[0]
        s.check_bits(m.calculate_qparams()[0], scale, "derived scale")


def test_a_second_swap_does_nothing() -> None:
    model = prepared(EveryKind(stock, True), True)
    first = qkernels.swap(model)
    types = {name: type(m) for name, m in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    second = qkernels.swap(model)
    assert first.swapped
    assert not second.swapped
    assert second.left == first.left
    assert {name: type(m) for name, m in model.named_modules()} == types
    for key, value in model.state_dict().items():
        s.check_same(value, state[key], key)


def test_checkpoints_of_whole_prepared_models_go_every_way() -> None:
    """Saved in the middle of training by each of three, loaded into fresh ones of each, and training goes on."""
    sources, _ = three_ways("every kind", is_qat=True)
    fresh = copy.deepcopy(sources)
    run_side_by_side(sources, True, steps=2)
    expected = copy.deepcopy(fresh["stock"])
    expected.load_state_dict(copy.deepcopy(sources["stock"].state_dict()), strict=True)
    runs = {"stock": expected}
    for source, model in sources.items():
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        for target, other in fresh.items():
            file.seek(0)
            loaded = runs[f"{source} into {target}"] = copy.deepcopy(other)
            loaded.load_state_dict(torch.load(file, weights_only=True), strict=True)
            check_state(loaded, expected)
    run_side_by_side(runs, True, steps=2)


def test_a_checkpoint_goes_between_torch_ao_and_torchao() -> None:
    """One class, two libraries, ours over each: the same state_dict."""
    libraries = {
        "torch.ao": torch.ao.quantization,
        "torchao": stock,
        "ours": qkernels.modules,
        "ours pt2e": ours,
    }

    def make(library: Any) -> torch.nn.Module:
        return torch.nn.Sequential(
            library.FusedMovingAvgObsFakeQuantize(observer=library.MovingAverageMinMaxObserver),
            library.FakeQuantize(observer=library.MovingAveragePerChannelMinMaxObserver, **WEIGHT),
            library.MinMaxObserver(),
            library.PerChannelMinMaxObserver(ch_axis=1),
        )

    for source in libraries.values():
        trained = make(source)
        trained(torch.randn(6, 5))
        for target in libraries.values():
            other = make(target)
            other.load_state_dict(copy.deepcopy(trained.state_dict()), strict=True)
            s.check_state(other, trained)
            x = torch.randn(6, 5) * 2
            twin = copy.deepcopy(trained)
            s.check_bits(other(x), twin(x), "output")
            s.check_state(other, twin)


def test_a_swapped_program_compiles_where_stock_breaks() -> None:
    model = prepared(EveryKind(stock, True), True)
    broken = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    with pytest.raises((torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError)):
        broken(EXAMPLE)
    torch._dynamo.reset()
    qkernels.swap(model)
    model(EXAMPLE)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for x, _ in data(2):
        s.check_bits(compiled(x), twin(x), "output")
        check_state(model, twin)


def test_verify_and_freeze_a_pt2e_model() -> None:
    model = prepared(EveryKind(stock, True), True)
    batches = [x for x, _ in data(3)]
    report = qkernels.verify(model, batches)
    assert report, str(report)
    assert report.batches == 3
    assert not any(is_ours(m) for m in model.modules())
    qkernels.swap(model)
    report = qkernels.verify(model, batches)
    assert report, str(report)
    for x in batches:
        model(x)
    model.eval()
    silent = copy.deepcopy(model)
    silent.apply(stock.disable_observer)
    assert qkernels.freeze(model) is model
    state = copy.deepcopy(model.state_dict())
    for x in batches:
        s.check_bits(model(x * 3), silent(x * 3), "output of a frozen model")
    for key, value in model.state_dict().items():
        s.check_same(value, state[key], key)
