"""torchao's factories and switches on `qkernels.modules.pt2e`: ours in all but the classes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("torchao", reason="the faces on torchao's bases need torchao")

from torchao.quantization.pt2e import fake_quantize as stock
from torchao.quantization.pt2e import observer as stock_observer

from qkernels.modules import pt2e

PREFIXES = ("default_", "weight_", "per_channel_", "fused_")
# AffineFakeQuantize and its factories are torchao's own and have no counterpart.
FACTORIES = [
    (library, name)
    for library in (stock, stock_observer)
    for name in library.__all__
    if name.startswith(PREFIXES) and "affine_fake" not in name and "groupwise" not in name and "per_axis" not in name
]


@pytest.mark.parametrize(("library", "name"), FACTORIES, ids=lambda value: getattr(value, "__name__", value))
def test_factory_builds_the_counterpart(library: object, name: str) -> None:
    mine, theirs = getattr(pt2e, name)(), getattr(library, name)()
    assert isinstance(mine, type(theirs))
    if "Histogram" not in type(theirs).__name__:
        assert type(mine).__module__ == pt2e.__name__
    state, wanted = mine.state_dict(), theirs.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[key]) for key, value in state.items())


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="default_nothing"):
        pt2e.default_nothing  # noqa: B018


def test_switches_reach_every_quantizer_of_a_model() -> None:
    model = torch.nn.Sequential(pt2e.FakeQuantize(), torch.nn.ReLU(), pt2e.FusedMovingAvgObsFakeQuantize())
    model.apply(pt2e.disable_observer)
    model.apply(pt2e.disable_fake_quant)
    assert [int(m.observer_enabled) + int(m.fake_quant_enabled) for m in (model[0], model[2])] == [0, 0]
    model.apply(pt2e.enable_observer)
    model.apply(pt2e.enable_fake_quant)
    assert [int(m.observer_enabled) + int(m.fake_quant_enabled) for m in (model[0], model[2])] == [2, 2]
