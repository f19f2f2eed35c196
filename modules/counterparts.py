"""Which of our classes takes the place of which stock class, for torch.ao and for torchao."""

from __future__ import annotations

import importlib
import sys

from torch.ao.quantization import _learnable_fake_quantize as torch_ao_learnable
from torch.ao.quantization import fake_quantize as torch_ao_fake_quantize
from torch.ao.quantization import observer as torch_ao_observer

OBSERVERS = (
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "PerChannelMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "HistogramObserver",
    "FixedQParamsObserver",
    "PlaceholderObserver",
    "RecordingObserver",
    "NoopObserver",
    "ReuseInputObserver",
)
FAKE_QUANTIZERS = ("FakeQuantize", "FixedQParamsFakeQuantize", "FusedMovingAvgObsFakeQuantize")


def _pairs(observers: object, fake_quantizers: object, ours: object) -> dict[type, type]:
    pairs = {getattr(observers, name): getattr(ours, name) for name in OBSERVERS}
    return pairs | {getattr(fake_quantizers, name): getattr(ours, name) for name in FAKE_QUANTIZERS}


def counterparts() -> dict[type, type]:
    """Stock class -> our class. torchao's are in it only once torchao's PT2E package has been imported."""
    ours = importlib.import_module("qkernels.modules")
    pairs = _pairs(torch_ao_observer, torch_ao_fake_quantize, ours)
    pairs[torch_ao_learnable._LearnableFakeQuantize] = ours.LearnableFakeQuantize
    torchao = "torchao.quantization.pt2e"
    if torchao in sys.modules:
        observers = importlib.import_module(f"{torchao}.observer")
        fake_quantizers = importlib.import_module(f"{torchao}.fake_quantize")
        ours = importlib.import_module("qkernels.modules.pt2e")
        pairs |= _pairs(observers, fake_quantizers, ours)
        learnable = importlib.import_module(f"{torchao}.learnable_fake_quantize")
        pairs[learnable.LearnableFakeQuantize] = ours.LearnableFakeQuantize
    return pairs
