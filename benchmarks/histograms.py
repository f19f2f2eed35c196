"""The cases of histograms: the counts, the observer's step, its calculate_qparams, and a fake quantizer around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import qkernels.ops
from benchmarks import inputs
from benchmarks.cases import Bench, case, of_functions, train_step
from benchmarks.inputs import SMALL, plain
from benchmarks.module_cases import PEERS, calculate_qparams, observe, of_modules

BINS = 2048


@case("histogram, 2048 bins", passes=1)
def _(device: torch.device) -> Bench:
    """torch.histc counts in float32, and wants its range as numbers."""
    low, high = torch.tensor(-8.0, device=device), torch.tensor(8.0, device=device)

    def torchs(x: Tensor) -> Tensor:
        return torch.histc(x, BINS, -8.0, 8.0).to(torch.int64)

    return of_functions(lambda x: qkernels.ops.histogram(x, BINS, low, high), torchs)


@case("HistogramObserver", suite="modules", passes=1, peers=PEERS)
def _(device: torch.device) -> Bench:
    """Timed where the range does not grow any more, as in most of a calibration; the gate lets it grow."""
    return of_modules(lambda library: library.HistogramObserver(), device, observe)


@case(
    "HistogramObserver.calculate_qparams",
    suite="modules",
    passes=0,
    shapes=(SMALL,),
    granularity=inputs.Granularity(plain(SMALL)),
    peers=PEERS,
)
def _(device: torch.device) -> Bench:
    """The search over 2048 bins of a skewed distribution."""

    def make(library: Any) -> nn.Module:
        observer = library.HistogramObserver()
        observer(torch.linspace(-1, 2, 4096) ** 3)
        return observer

    return of_modules(make, device, calculate_qparams)


@case("FakeQuantize HistogramObserver step", suite="modules", passes=6, peers=PEERS)
def _(device: torch.device) -> Bench:
    """Count, search, fake-quantize, backward: torch.ao's `default_histogram_fake_quant` in training."""
    return of_modules(lambda library: library.FakeQuantize(observer=library.HistogramObserver), device, train_step)
