"""FakeQuantize around HistogramObserver: one graph, no recompilation, nothing read on the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.ao.quantization as stock

import qkernels.modules as ours
from tests.histogram_batches import Batch
from tests.lanes.interpreter_trace import trace
from tests.lanes.sync_counter import count_host_reads
from tests.modules import support as s

CHANNELS = {"dtype": torch.qint8, "quant_min": -128, "quant_max": 127, "qscheme": torch.per_channel_symmetric}


def step(module: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = x.detach().clone().requires_grad_()
    y = module(leaf)
    y.backward(torch.ones_like(y))
    return y.detach(), leaf.grad


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=[] if not s.INTERPRETER else pytest.mark.skip(reason="compiles"))]
)
def test_training_steps_with_switches(compiled: bool, device: torch.device) -> None:
    theirs = stock.FakeQuantize(observer=stock.HistogramObserver, bins=64)
    mine = ours.FakeQuantize(observer=ours.HistogramObserver, bins=64).to(device)
    run: Any = torch.compile(mine, fullgraph=True) if compiled else mine
    for seed in range(6):
        for module in (theirs, mine):
            module.enable_observer(seed != 3)
            module.enable_fake_quant(seed != 4)
        x = Batch("normal", 200, 1.0 + seed % 3, seed=seed).tensor()
        y_ref, dx_ref = step(theirs, x)
        y, dx = step(run, x.to(device))
        s.check_bits(y, y_ref, "y")
        s.check_same(dx, dx_ref, "dx")
        s.check_state(mine, theirs)
    if compiled:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.skipif(s.INTERPRETER, reason="compiles")
def test_per_channel_in_one_graph(device: torch.device) -> None:
    def made() -> torch.nn.Module:
        return ours.FakeQuantize(observer=ours.PerChannelHistogramObserver, bins=32, ch_axis=0, **CHANNELS).to(device)

    eager, mine = made(), made()
    compiled = torch.compile(mine, fullgraph=True)
    for seed in range(3):
        x = Batch("normal", 90, 1.0 + seed, seed=seed).tensor().reshape(3, 30).to(device)
        s.check_bits(compiled(x), eager(x).cpu(), "y")
    s.check_state(mine.cpu(), eager.cpu())


@pytest.mark.interpreter_only
def test_launches_and_host_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Observe (3), renew qparams, fake quantize: 5 launches, x read twice, or three times where the range grew."""
    from qkernels.modules import fake_quant_core

    monkeypatch.setattr(fake_quant_core, "known_off", lambda flag: False)  # a shortcut that only the CPU takes
    module = ours.FakeQuantize(observer=ours.HistogramObserver, bins=64)
    for factor, reads in ((1.0, 3), (1.0, 2), (2.0, 3)):
        x = torch.linspace(-1, 1, 60) * factor
        with trace() as recorded, count_host_reads() as found:
            module(x)
        loads, _, _ = recorded.counts(x)
        assert len(recorded.launches) == 5 and (loads == reads).all()
        assert found == {} and recorded.faults == {}
