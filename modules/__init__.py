"""Observers and fake quantizers with the torch.ao API."""

from __future__ import annotations

from qkernels.modules.fake_quant import FakeQuantize, FusedMovingAvgObsFakeQuantize
from qkernels.modules.minmax import (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
)

__all__ = [
    "FakeQuantize",
    "FusedMovingAvgObsFakeQuantize",
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "PerChannelMinMaxObserver",
]
