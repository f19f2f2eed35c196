"""verify(): quiet about good models, exact about a planted difference, and without effect on the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.ao.quantization as stock
from torch.ao.quantization.quantize_fx import prepare_fx, prepare_qat_fx

import qkernels
import qkernels.modules as ours
from tests.modules import support as s
from tests.modules.test_flows import Net, data

CHANNEL = {"dtype": torch.qint8, "quant_min": -128, "quant_max": 127, "qscheme": torch.per_channel_symmetric}
BATCHES = [x for x, _ in data(3)]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with s.quiet():
        yield


class Layers(torch.nn.Module):
    """Quantizers and observers by hand, one layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.input = stock.FakeQuantize(observer=stock.MovingAverageMinMaxObserver, averaging_constant=0.1)
        self.channels = stock.FakeQuantize(observer=stock.PerChannelMinMaxObserver, ch_axis=1, **CHANNEL)
        self.seen = torch.nn.Sequential(
            stock.MinMaxObserver(),
            stock.MovingAveragePerChannelMinMaxObserver(ch_axis=1),
        )
        self.fused = stock.FusedMovingAvgObsFakeQuantize(observer=stock.MovingAverageMinMaxObserver)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fused(self.seen(self.channels(self.input(x))))


def batches(count: int = 3) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(5, 4, generator=g) * (1 + i) for i in range(count)]


def fx_qat() -> torch.nn.Module:
    return prepare_qat_fx(Net().train(), stock.get_default_qat_qconfig_mapping("x86"), (BATCHES[0],))


def fx_ptq() -> torch.nn.Module:
    return prepare_fx(Net().eval(), stock.get_default_qconfig_mapping("x86"), (BATCHES[0],))


def eager_qat() -> torch.nn.Module:
    net = Net().train()
    net.qconfig = stock.default_qat_qconfig
    return stock.prepare_qat(stock.fuse_modules_qat(net, [["conv", "bn", "relu"]]))


GOOD: dict[str, Callable[[], torch.nn.Module]] = {
    "FX QAT": fx_qat,
    "FX after training, with HistogramObserver": fx_ptq,
    "eager QAT": eager_qat,
}


# ------------------------------------------------------------------------------------------ good models


@pytest.mark.parametrize("swapped", [False, True], ids=["stock", "swapped"])
@pytest.mark.parametrize("which", GOOD)
def test_good_models(which: str, swapped: bool) -> None:
    model = GOOD[which]()
    if swapped:
        qkernels.swap(model)
    report = qkernels.verify(model, BATCHES)
    assert report, str(report)
    assert bool(report) is report.ok is True
    assert report.batches == 3
    assert not report.differences
    assert str(report)


def test_a_model_that_is_one_quantizer_and_a_model_without_any() -> None:
    assert qkernels.verify(stock.FakeQuantize(), batches())
    assert qkernels.verify(ours.FakeQuantize(), batches())
    assert qkernels.verify(torch.nn.ReLU(), batches())


def test_special_values_count_as_equal() -> None:
    """NaN equals NaN: an observer that saw one holds it in both."""
    model = torch.nn.Sequential(stock.MinMaxObserver(), stock.PerChannelMinMaxObserver(ch_axis=1))
    assert qkernels.verify(model, [torch.tensor([[1.0, float("nan")], [float("inf"), -1.0]])])


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_the_models_and_dropout_is_the_same_in_both(training: bool) -> None:
    modes: list[bool] = []
    layers = Layers()
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), layers).train(training)
    model[0].register_forward_hook(lambda module, *_: modes.append(module.training))
    report = qkernels.verify(model, batches())
    assert report, str(report)
    assert modes == [training] * 6


def test_state_and_flags_are_where_both_start() -> None:
    model = Layers()
    model(batches()[0])
    model.input.disable_observer()
    model.channels.disable_fake_quant()
    assert qkernels.verify(model, batches())
    qkernels.swap(model)
    assert qkernels.verify(model, batches())


def test_a_frozen_model_is_good() -> None:
    model = Layers()
    model(batches()[0])
    report = qkernels.verify(qkernels.freeze(model), batches())
    assert report, str(report)


def test_a_model_that_writes_into_its_input() -> None:
    """Both see the batch as it was, and the caller keeps it so."""

    class InPlace(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = Layers()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x.mul_(2))

    data = batches()
    kept = copy.deepcopy(data)
    report = qkernels.verify(InPlace(), data)
    assert report, str(report)
    for x, before in zip(data, kept, strict=True):
        assert torch.equal(x, before)


# ------------------------------------------------------------------------------------------ batches


class TwoInputs(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = stock.MinMaxObserver()
        self.second = stock.FakeQuantize()

    def forward(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x) * factor)


def test_tuples_are_positional_and_dicts_are_keyword_arguments() -> None:
    got: list[Any] = []
    model = TwoInputs()
    model.register_forward_pre_hook(
        lambda module, args, kwargs: got.append((len(args), sorted(kwargs))), with_kwargs=True
    )
    x = batches()[0]
    report = qkernels.verify(model, [(x, x + 1), {"x": x, "factor": x}, (x, x)])
    assert report, str(report)
    assert report.batches == 3
    assert got[::2] == got[1::2] == [(2, []), (0, ["factor", "x"]), (2, [])]


def test_an_iterator_is_read_once() -> None:
    report = qkernels.verify(Layers(), iter(batches(4)))
    assert report
    assert report.batches == 4


def test_no_batches_is_nothing_verified() -> None:
    assert qkernels.verify(Layers(), []).batches == 0


# ------------------------------------------------------------------------------------------ planted differences


def plant(monkeypatch: pytest.MonkeyPatch, cls: type, fault: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
    """After each forward of our class, the fault in the instance that carries the mark; stock classes never have it."""
    forward = cls.forward

    def planted(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = forward(self, x)
        return fault(self, y) if getattr(self, "marked", False) else y

    monkeypatch.setattr(cls, "forward", planted)


def add(
    buffer: str, index: tuple[int, ...], amount: float, calls: int = 1
) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """A fault: `amount` more at one index of a buffer, from the given call on."""
    count = 0

    def fault(module: Any, y: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        if count >= calls:
            getattr(module, buffer)[index] += amount
        return y

    return fault


def check_found(
    report: Any, layer: str, buffer: str, index: tuple[int, ...], batch: int, amount: float | None = None
) -> None:
    assert not report
    assert report.ok is False
    first = report.differences[0]
    assert (first.layer, first.buffer, tuple(first.index), first.batch) == (layer, buffer, index, batch)
    if amount is not None:
        assert first.ours == pytest.approx(first.stock + amount)
    assert first.ours != first.stock
    text = str(report)
    for part in (layer, buffer, str(index), str(first.stock), str(first.ours)):
        assert part in text, text


@pytest.mark.parametrize("swapped", [False, True], ids=["stock", "swapped"])
def test_it_names_layer_buffer_and_first_index(monkeypatch: pytest.MonkeyPatch, swapped: bool) -> None:
    model = Layers()
    model.channels.marked = True
    plant(monkeypatch, ours.FakeQuantize, add("scale", (2,), 0.25))
    if swapped:
        qkernels.swap(model)
    check_found(qkernels.verify(model, batches()), "channels", "scale", (2,), 0, 0.25)


def test_a_scalar_of_a_later_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Layers()
    model.seen[0].marked = True
    plant(monkeypatch, ours.MinMaxObserver, add("max_val", (), 1.0, calls=3))
    check_found(qkernels.verify(model, batches(4)), "seen.0", "max_val", (), 2, 1.0)


def test_the_first_of_several_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Layers()
    model.seen[1].marked = True

    def fault(module: Any, y: torch.Tensor) -> torch.Tensor:
        module.min_val[1:] -= 1
        return y

    plant(monkeypatch, ours.MovingAveragePerChannelMinMaxObserver, fault)
    check_found(qkernels.verify(model, batches()), "seen.1", "min_val", (1,), 0, -1.0)


def test_one_unit_in_the_last_place(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Layers()
    model.fused.marked = True

    def fault(module: Any, y: torch.Tensor) -> torch.Tensor:
        module.scale.copy_(torch.nextafter(module.scale, torch.tensor(9.0)))
        return y

    plant(monkeypatch, ours.FusedMovingAvgObsFakeQuantize, fault)
    check_found(qkernels.verify(model, batches()), "fused", "scale", (0,), 0)


def test_an_output_though_every_buffer_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Layers()
    model.fused.marked = True

    def fault(module: Any, y: torch.Tensor) -> torch.Tensor:
        y = y.clone()
        y[3, 1] += 0.5
        return y

    plant(monkeypatch, ours.FusedMovingAvgObsFakeQuantize, fault)
    check_found(qkernels.verify(model, batches()), "fused", "output", (3, 1), 0, 0.5)


def test_a_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Layers()
    model.input.marked = True

    def fault(module: Any, y: torch.Tensor) -> torch.Tensor:
        module.disable_observer()
        return y

    plant(monkeypatch, ours.FakeQuantize, fault)
    report = qkernels.verify(model, batches())
    assert not report
    assert (report.differences[0].layer, report.differences[0].buffer) == ("input", "observer_enabled")


def test_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Layers()
    model.channels.marked = True

    def fault(module: Any, y: torch.Tensor) -> torch.Tensor:
        module.zero_point = module.zero_point[:3]
        return y

    plant(monkeypatch, ours.FakeQuantize, fault)
    report = qkernels.verify(model, batches()[:1])
    assert not report
    first = report.differences[0]
    assert (first.layer, first.buffer) == ("channels", "zero_point")
    assert "3" in str(first.ours)
    assert "4" in str(first.stock)


def test_a_constant_of_our_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a buffer but the averaging constant that our forward computes with: seen from the second batch on."""
    forward = ours.MovingAveragePerChannelMinMaxObserver.forward

    def planted(self: Any, x: torch.Tensor) -> torch.Tensor:
        if getattr(self, "marked", False):
            self.averaging_constant = 0.5
        return forward(self, x)

    monkeypatch.setattr(ours.MovingAveragePerChannelMinMaxObserver, "forward", planted)
    model = Layers()
    model.seen[1].marked = True
    report = qkernels.verify(model, batches())
    assert not report
    first = report.differences[0]
    assert (first.layer, first.batch) == ("seen.1", 1)
    assert first.buffer in ("min_val", "max_val")


def test_a_subclass_of_ours_is_compared_with_the_stock_class() -> None:
    """Somebody's change to one of ours: where it stops being torch.ao's."""

    class Wider(ours.MinMaxObserver):
        def forward(self, x_orig: torch.Tensor) -> torch.Tensor:
            super().forward(x_orig)
            self.max_val += 1
            return x_orig

    model = Layers()
    qkernels.swap(model)
    model.seen[0] = Wider()
    check_found(qkernels.verify(model, batches()), "seen.0", "max_val", (), 0, 1.0)
    assert type(model.seen[0]) is Wider


def test_without_the_plant_the_same_model_is_good() -> None:
    """What the tests above find is the plant: marked, but with our classes as they are."""
    model = Layers()
    for module in (model.input, model.channels, model.seen[0], model.seen[1], model.fused):
        module.marked = True
    assert qkernels.verify(model, batches(4))


# ------------------------------------------------------------------------------------------ the model is left alone


@pytest.mark.parametrize("faulty", [False, True])
@pytest.mark.parametrize("swapped", [False, True], ids=["stock", "swapped"])
def test_the_model_is_untouched(monkeypatch: pytest.MonkeyPatch, swapped: bool, faulty: bool) -> None:
    model = eager_qat()
    if swapped:
        qkernels.swap(model)
    model(BATCHES[0])
    model.linear.eval()
    if faulty:
        model.linear.activation_post_process.marked = True
        plant(monkeypatch, ours.FakeQuantize, add("scale", (0,), 1.0))
    modules = [(m, type(m), m.training, dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    buffers = {name: (b, b.clone(), b._version) for name, b in model.named_buffers()}
    parameters = {name: (p, p.detach().clone(), p.grad) for name, p in model.named_parameters()}
    random = torch.get_rng_state()

    assert bool(qkernels.verify(model, BATCHES)) is not faulty

    assert torch.equal(torch.get_rng_state(), random)
    now = [(m, type(m), m.training, dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    assert now == modules
    assert [name for name, _ in model.named_buffers()] == list(buffers)
    for name, b in model.named_buffers():
        before, value, version = buffers[name]
        assert b is before
        assert b._version == version
        s.check_bits(b.double(), value.double(), name)
    for name, p in model.named_parameters():
        before, value, grad = parameters[name]
        assert p is before
        assert p.grad is grad
        s.check_bits(p, value, name)
