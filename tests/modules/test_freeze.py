"""freeze(): the numbers of a model whose observers are switched off, and no trace of observation in what runs."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.quantization as stock
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

import qkernels
import qkernels.modules as ours
from tests.modules import support as s
from tests.modules.test_flows import Net, check_converted, data, train
from tests.modules.test_flows import _engine as _engine

CHANNEL = {"dtype": torch.qint8, "quant_min": -128, "quant_max": 127, "qscheme": torch.per_channel_symmetric}
FAKE_QUANTIZERS = (stock.FakeQuantizeBase,)


class Layers(torch.nn.Module):
    """Bare observers of each kind between fake quantizers of each kind, with a weight of its own."""

    def __init__(self, library: Any = ours) -> None:
        super().__init__()
        moving, per_channel = library.MovingAverageMinMaxObserver, library.MovingAveragePerChannelMinMaxObserver
        self.input = library.FakeQuantize(observer=library.MinMaxObserver)
        self.weight_fake_quant = library.FusedMovingAvgObsFakeQuantize(observer=per_channel, **CHANNEL)
        self.seen = torch.nn.Sequential(
            library.MinMaxObserver(),
            moving(),
            library.PerChannelMinMaxObserver(ch_axis=1),
            per_channel(ch_axis=1),
        )
        self.fused = library.FusedMovingAvgObsFakeQuantize(observer=moving)
        self.channels = library.FakeQuantize(observer=library.PerChannelMinMaxObserver, ch_axis=1, **CHANNEL)
        fixed = stock.observer.default_affine_fixed_qparams_observer
        self.fixed = getattr(library, "FixedQParamsFakeQuantize", stock.FixedQParamsFakeQuantize)(observer=fixed)
        g = torch.Generator().manual_seed(5)
        self.weight = torch.nn.Parameter(torch.randn(4, 4, generator=g))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.linear(self.input(x), self.weight_fake_quant(self.weight))
        return self.fixed(torch.sigmoid(self.channels(self.fused(self.seen(x)))))


def batch(seed: int, device: torch.device | str = "cpu") -> torch.Tensor:
    return (torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)) * (1 + seed)).to(device)


def by_hand(device: torch.device | str = "cpu", library: Any = ours) -> torch.nn.Module:
    model = Layers(library).to(device)
    for seed in range(3):
        model(batch(seed, device))
    return model


def fx_qat() -> torch.nn.Module:
    torch.manual_seed(7)
    with s.quiet():
        model = prepare_qat_fx(Net().train(), stock.get_default_qat_qconfig_mapping("x86"), (data(1)[0][0],))
    qkernels.swap(model)
    return train(model)


def eager_qat() -> torch.nn.Module:
    torch.manual_seed(7)
    net = Net().train()
    net.qconfig = stock.default_qat_qconfig
    with s.quiet():
        model = stock.prepare_qat(stock.fuse_modules_qat(net, [["conv", "bn", "relu"]]))
    qkernels.swap(model)
    return train(model)


MODELS: dict[str, tuple[Callable[[], torch.nn.Module], Callable[[int], torch.Tensor]]] = {
    "by hand": (by_hand, batch),
    "FX": (fx_qat, lambda seed: data(seed + 1)[seed][0] * (1 + seed)),
    "eager": (eager_qat, lambda seed: data(seed + 1)[seed][0] * (1 + seed)),
}


def silent(model: torch.nn.Module) -> torch.nn.Module:
    """A copy with the observers disabled, as torch.ao does it."""
    twin = copy.deepcopy(model)
    twin.apply(stock.disable_observer)
    return twin


def all_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


def check_buffers_kept(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = all_tensors(model)
    assert after.keys() == before.keys()
    for name, value in after.items():
        s.check_same(value, before[name].cpu(), name)


# ------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("which", MODELS)
def test_outputs_are_those_of_disabled_observers(which: str) -> None:
    make, inputs = MODELS[which]
    model = make().eval()
    expected = silent(model)
    assert qkernels.freeze(model) is model
    state = all_tensors(model)
    for seed in range(3):
        s.check_bits(model(inputs(seed)), expected(inputs(seed)), f"output {seed}")
    check_buffers_kept(model, state)


def test_on_the_device(device: torch.device) -> None:
    model = by_hand(device).eval()
    expected = silent(model)
    qkernels.freeze(model)
    s.check_bits(model(batch(9, device)), expected(batch(9, device)).cpu(), "output")


def test_a_layer_with_fake_quantization_off_stays_off() -> None:
    model = by_hand().eval()
    model.input.disable_fake_quant()
    model.fused.disable_fake_quant()
    expected = silent(model)
    qkernels.freeze(model)
    for seed in range(2):
        s.check_bits(model(batch(seed)), expected(batch(seed)), f"output {seed}")


@pytest.mark.parametrize("name", s.FAKE_QUANTIZERS)
def test_calibrated_with_fake_quantization_off_then_frozen(name: str) -> None:
    """Observe first, quantize later: with the fused kind no batch has turned the statistics into qparams yet."""
    quantizer = getattr(ours, name)(observer=ours.MovingAverageMinMaxObserver)
    quantizer.disable_fake_quant()
    for seed in range(3):
        quantizer(batch(seed))
    quantizer.enable_fake_quant()
    expected = silent(quantizer)
    qkernels.freeze(quantizer)
    s.check_bits(quantizer(batch(5)), expected(batch(5)), "output")


def test_training_changes_weights_and_no_statistics() -> None:
    model = by_hand().train()
    qkernels.freeze(model)
    before = all_tensors(model)
    weight = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for seed in range(5, 8):
        optimizer.zero_grad()
        model(batch(seed)).square().sum().backward()
        optimizer.step()
    assert not torch.equal(model.weight, weight)
    check_buffers_kept(model, before)


@pytest.mark.parametrize("which", ["FX", "eager"])
def test_training_a_prepared_model_changes_no_statistics(which: str) -> None:
    make, inputs = MODELS[which]
    model = qkernels.freeze(make())
    watched = {n: m for n, m in model.named_modules() if isinstance(m, (stock.ObserverBase, stock.FakeQuantizeBase))}
    before = {name: all_tensors(m) for name, m in watched.items()}
    assert before
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(2):
        optimizer.zero_grad()
        model(inputs(seed) * 5).square().sum().backward()
        optimizer.step()
    for name, m in watched.items():
        check_buffers_kept(m, before[name])


def test_gradients_are_those_of_disabled_observers() -> None:
    model = by_hand()
    expected = silent(model)
    qkernels.freeze(model)
    results = []
    for m in (model, expected):
        x = batch(4).requires_grad_()
        m(x).square().sum().backward()
        results.append((x.grad, m.weight.grad))
    for mine, theirs in zip(*results, strict=True):
        s.check_bits(mine, theirs, "gradient")


# ------------------------------------------------------------------------------------------ what freezing is


def test_observers_become_identities_and_fake_quantizers_stop_observing() -> None:
    model = qkernels.freeze(by_hand())
    observers = [m for m in model.modules() if isinstance(m, stock.UniformQuantizationObserverBase)]
    assert len(observers) >= 8
    for m in observers:
        before = all_tensors(m)
        x = batch(11)
        assert m(x) is x
        check_buffers_kept(m, before)
    for m in model.modules():
        if isinstance(m, FAKE_QUANTIZERS):
            assert int(m.observer_enabled) == 0
            assert int(m.fake_quant_enabled) == 1


def test_a_recording_observer_stops_recording() -> None:
    recorder = ours.RecordingObserver()
    recorder(batch(0))
    qkernels.freeze(recorder)
    x = batch(1)
    assert recorder(x) is x
    assert len(recorder.tensor_val) == 1


def test_freezing_twice_and_one_quantizer_alone() -> None:
    quantizer = ours.FakeQuantize()
    quantizer(batch(0))
    expected = silent(quantizer)
    assert qkernels.freeze(qkernels.freeze(quantizer)) is quantizer
    s.check_bits(quantizer(batch(3)), expected(batch(3)), "output")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_frozen_too(copied: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    model = qkernels.freeze(by_hand())
    twin = copied(model)
    before = all_tensors(twin)
    s.check_bits(twin(batch(8)), model(batch(8)), "output")
    check_buffers_kept(twin, before)


def test_the_mode_and_the_checkpoint_stay() -> None:
    """Nothing is added to state_dict: a frozen model's checkpoint goes into a stock model."""
    model = by_hand().train()
    keys = list(model.state_dict())
    qkernels.freeze(model)
    assert model.training
    assert list(model.state_dict()) == keys
    other = Layers(stock)
    other.load_state_dict(model.state_dict(), strict=True)
    s.check_state(other, model)
    s.check_bits(other(batch(6)), model(batch(6)), "output")


def test_a_loaded_checkpoint_is_what_a_frozen_model_applies() -> None:
    model = qkernels.freeze(by_hand().eval())
    other = Layers()
    for seed in (7, 8):
        other(batch(seed) * 3)
    other = silent(other.eval())
    model.load_state_dict(other.state_dict(), strict=True)
    before = all_tensors(model)
    s.check_bits(model(batch(2)), other(batch(2)), "output")
    check_buffers_kept(model, before)


def test_a_frozen_model_converts_like_any_other() -> None:
    model = fx_qat().eval()
    expected = convert_fx(copy.deepcopy(model))
    check_converted(convert_fx(qkernels.freeze(model)), expected)


# ------------------------------------------------------------------------------------------ graphs


def operators(graph_module: torch.fx.GraphModule) -> list[str]:
    """Operators of a graph and of the graphs inside it."""
    return [
        str(node.target)
        for module in graph_module.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if node.op == "call_function"
    ]


def observing(names: list[str]) -> list[str]:
    """Those that look for a range or turn one into qparams."""
    return [name for name in names if re.search(r"observe|qparams|minmax|moving_avg|\b(amin|amax|min|max)\b", name)]


def runs(model: torch.nn.Module, x: torch.Tensor) -> int:
    """How often fake quantizers run in one call; FX lets one run in several places."""
    calls: list[None] = []
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, FAKE_QUANTIZERS):
            module.register_forward_hook(lambda *_: calls.append(None))
    model(x)
    return len(calls)


def exported(model: torch.nn.Module, x: torch.Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(model, (x,), strict=False)


def test_an_exported_graph_holds_fake_quantizers_and_no_observation() -> None:
    model = by_hand().eval()
    assert observing(operators(exported(copy.deepcopy(model), batch(0)).graph_module)), "the search finds observation"
    expected = model_output(silent(model), batch(3))
    qkernels.freeze(model)
    program = exported(model, batch(0))
    names = operators(program.graph_module)
    assert not observing(names), names
    assert len([name for name in names if "fake_quantize" in name]) == runs(model, batch(0)) == 5, names
    assert not program.graph_signature.buffers_to_mutate
    s.check_bits(program.module()(batch(3)), expected, "output of the exported program")


def model_output(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("which", ["FX", "eager"])
def test_a_prepared_model_exports(which: str) -> None:
    make, inputs = MODELS[which]
    model = make().eval()
    expected = model_output(silent(model), inputs(1))
    program = exported(qkernels.freeze(model), inputs(0))
    names = operators(program.graph_module)
    assert not observing(names), names
    assert len([name for name in names if "fake_quantize" in name]) == runs(model, inputs(0)) >= 5, names
    s.check_bits(program.module()(inputs(1)), expected, "output of the exported program")


def test_a_frozen_model_compiles_to_one_graph_without_observation() -> None:
    model = qkernels.freeze(by_hand().eval())
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=keep)
    before = all_tensors(model)
    s.check_bits(compiled(batch(2)), model(batch(2)), "output")
    check_buffers_kept(model, before)
    assert len(graphs) == 1
    assert not observing(operators(graphs[0])), operators(graphs[0])


# ------------------------------------------------------------------------------------------ stock modules


def test_what_cannot_be_frozen_is_named() -> None:
    """A bare observer that stays torch.ao's goes on observing; nobody should learn that from a graph."""
    own = type("OwnObserver", (stock.MinMaxObserver,), {})
    model = torch.nn.Sequential(stock.FakeQuantize(), own())
    model(batch(0))
    with pytest.warns(UserWarning, match=r"\b1\b"):
        qkernels.freeze(model)


def test_a_fake_quantizer_around_a_histogram_is_frozen() -> None:
    model = stock.FakeQuantize(observer=stock.HistogramObserver)
    model(batch(0))
    expected = silent(model)
    qkernels.swap(model)
    qkernels.freeze(model)
    before = all_tensors(model)
    s.check_bits(model(batch(4)), expected(batch(4)), "output")
    check_buffers_kept(model, before)


def test_a_model_without_observers_is_as_it_was() -> None:
    model = torch.nn.Linear(4, 2)
    x = batch(0)
    expected = model(x)
    assert torch.equal(qkernels.freeze(model)(x), expected)
