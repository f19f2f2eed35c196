"""torch.ao's own flows with a QConfig of our classes: the same scales and zero points, the same int8 model.

Always on the CPU: that is where torch.ao's converted models run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.ao.quantization as stock
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx

import qkernels.modules as ours
from tests.modules import support as s

WEIGHT = {"quant_min": -128, "quant_max": 127, "dtype": torch.qint8, "qscheme": torch.per_channel_symmetric}


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant = stock.QuantStub()
        self.conv = torch.nn.Conv2d(2, 6, 3)
        self.bn = torch.nn.BatchNorm2d(6)
        self.relu = torch.nn.ReLU()
        self.linear = torch.nn.Linear(6 * 16, 5)
        self.dequant = stock.DeQuantStub()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn(self.conv(self.quant(x))))
        return self.dequant(self.linear(torch.flatten(x, 1)))


def qat_qconfigs(library: Any) -> dict[str, stock.QConfig]:
    """The fused qconfig of torch.ao's x86 default (reduce_range as there), and one of FakeQuantize."""
    tensor, channel = library.MovingAverageMinMaxObserver, library.MovingAveragePerChannelMinMaxObserver
    fused, plain = library.FusedMovingAvgObsFakeQuantize, library.FakeQuantize
    return {
        "fused": stock.QConfig(
            activation=fused.with_args(observer=tensor, quant_min=0, quant_max=255, reduce_range=True),
            weight=fused.with_args(observer=channel, **WEIGHT),
        ),
        "plain": stock.QConfig(
            activation=plain.with_args(observer=library.MinMaxObserver, quant_min=0, quant_max=255),
            weight=plain.with_args(observer=library.PerChannelMinMaxObserver, **WEIGHT),
        ),
    }


def ptq_qconfigs(library: Any) -> dict[str, stock.QConfig]:
    channel = library.PerChannelMinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_channel_symmetric)
    return {
        "minmax": stock.QConfig(activation=library.MinMaxObserver.with_args(reduce_range=True), weight=channel),
        "moving": stock.QConfig(
            activation=library.MovingAverageMinMaxObserver.with_args(averaging_constant=0.1),
            weight=library.MovingAveragePerChannelMinMaxObserver.with_args(
                dtype=torch.qint8, qscheme=torch.per_channel_symmetric
            ),
        ),
    }


@pytest.fixture(autouse=True)
def _engine() -> Iterator[None]:
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = next(
        e for e in ("x86", "fbgemm", "onednn", "qnnpack") if e in torch.backends.quantized.supported_engines
    )
    with s.quiet():  # torch.ao announces its own deprecation
        yield
    torch.backends.quantized.engine = before


def data(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(3)
    return [(torch.randn(7, 2, 6, 6, generator=g), torch.randint(0, 5, (7,), generator=g)) for _ in range(steps)]


def train(model: torch.nn.Module) -> torch.nn.Module:
    """Three SGD steps, then one with frozen observers and one with frozen batch norm statistics."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step, (x, target) in enumerate(data(5)):
        if step == 3:
            model.apply(stock.disable_observer)
        if step == 4:
            model.apply(torch.ao.nn.intrinsic.qat.freeze_bn_stats)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()
    return model


def calibrate(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for x, _ in data(3):
            model(x)
    return model


def check_equal(mine: torch.nn.Module, theirs: torch.nn.Module, classes: tuple[type, ...]) -> None:
    """All of the prepared models' state, weights included, and something of ours in there at all."""
    assert sum(isinstance(m, classes) for m in mine.modules()) >= 4
    s.check_state(mine, theirs)


def check_converted(mine: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """Really int8, and the same int8 model: scales, zero points and outputs."""
    assert any("quantized" in type(m).__module__ for m in mine.modules())
    a, b = mine.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    for key, value in b.items():
        if isinstance(value, torch.Tensor):
            if value.is_quantized:
                assert torch.equal(a[key].int_repr(), value.int_repr()), key
                assert str(a[key]) == str(value), key
            else:
                assert torch.equal(a[key], value), key
    x = data(1)[0][0] * 1.5
    s.check_bits(mine(x), theirs(x), "output of the int8 model")


OURS = tuple(getattr(ours, n) for n in (*s.OBSERVERS, *s.FAKE_QUANTIZERS))


@pytest.mark.parametrize("which", ["fused", "plain"])
def test_eager_qat(which: str) -> None:
    model = Net()

    def prepared(library: Any) -> torch.nn.Module:
        net = copy.deepcopy(model).train()
        net.qconfig = qat_qconfigs(library)[which]
        net = stock.fuse_modules_qat(net, [["conv", "bn", "relu"]])
        return train(stock.prepare_qat(net))

    mine, theirs = prepared(ours), prepared(stock)
    check_equal(mine, theirs, OURS)
    check_converted(stock.convert(mine.eval()), stock.convert(theirs.eval()))


@pytest.mark.parametrize("which", ["minmax", "moving"])
def test_eager_post_training(which: str) -> None:
    model = Net().eval()

    def prepared(library: Any) -> torch.nn.Module:
        net = stock.fuse_modules(copy.deepcopy(model), [["conv", "bn", "relu"]])
        net.qconfig = ptq_qconfigs(library)[which]
        return calibrate(stock.prepare(net))

    mine, theirs = prepared(ours), prepared(stock)
    assert sum(isinstance(m, OURS) for m in mine.modules()) >= 3
    s.check_state(mine, theirs)
    check_converted(stock.convert(mine), stock.convert(theirs))


@pytest.mark.parametrize("which", ["fused", "plain"])
def test_fx_qat(which: str) -> None:
    model = Net()

    def prepared(library: Any) -> torch.nn.Module:
        mapping = stock.QConfigMapping().set_global(qat_qconfigs(library)[which])
        return train(prepare_qat_fx(copy.deepcopy(model).train(), mapping, (data(1)[0][0],)))

    mine, theirs = prepared(ours), prepared(stock)
    check_equal(mine, theirs, OURS)
    check_converted(convert_fx(mine.eval()), convert_fx(theirs.eval()))


@pytest.mark.parametrize("which", ["minmax", "moving"])
def test_fx_post_training(which: str) -> None:
    model = Net().eval()

    def prepared(library: Any) -> torch.nn.Module:
        mapping = stock.QConfigMapping().set_global(ptq_qconfigs(library)[which])
        return calibrate(prepare_fx(copy.deepcopy(model), mapping, (data(1)[0][0],)))

    mine, theirs = prepared(ours), prepared(stock)
    assert sum(isinstance(m, OURS) for m in mine.modules()) >= 3
    s.check_state(mine, theirs)
    check_converted(convert_fx(mine), convert_fx(theirs))


def test_a_checkpoint_of_a_stock_qat_model_goes_on_with_ours() -> None:
    """The whole model's state_dict, in the middle of training, both ways."""
    model = Net()

    def prepared(library: Any) -> torch.nn.Module:
        net = copy.deepcopy(model).train()
        net.qconfig = qat_qconfigs(library)["fused"]
        return stock.prepare_qat(stock.fuse_modules_qat(net, [["conv", "bn", "relu"]]))

    middle = train(prepared(stock)).state_dict()
    mine, theirs = prepared(ours), prepared(stock)
    mine.load_state_dict(copy.deepcopy(middle), strict=True)
    theirs.load_state_dict(copy.deepcopy(middle), strict=True)
    train(mine)
    train(theirs)
    s.check_state(mine, theirs)
    back = prepared(stock)
    back.load_state_dict(mine.state_dict(), strict=True)
    s.check_state(back, theirs)
