"""The modules that the lanes construct, by name. Those that fake quantize are the names with `FakeQuantize`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

import qkernels.modules as modules

_SYMMETRIC = {"dtype": torch.qint8, "qscheme": torch.per_tensor_symmetric}
_PER_CHANNEL = {"dtype": torch.qint8, "qscheme": torch.per_channel_symmetric, "ch_axis": 1}
MODULES: dict[str, Callable[[], torch.nn.Module]] = {
    "MinMaxObserver": modules.MinMaxObserver,
    "MovingAverageMinMaxObserver": modules.MovingAverageMinMaxObserver,
    "PerChannelMinMaxObserver": partial(modules.PerChannelMinMaxObserver, ch_axis=1),
    "MovingAveragePerChannelMinMaxObserver": partial(modules.MovingAveragePerChannelMinMaxObserver, ch_axis=1),
    "FakeQuantize": modules.FakeQuantize,
    "FakeQuantize symmetric": partial(modules.FakeQuantize, quant_min=-128, quant_max=127, **_SYMMETRIC),
    "FakeQuantize per channel": partial(
        modules.FakeQuantize,
        modules.MovingAveragePerChannelMinMaxObserver,
        quant_min=-128,
        quant_max=127,
        **_PER_CHANNEL,
    ),
    "FusedMovingAvgObsFakeQuantize": modules.FusedMovingAvgObsFakeQuantize,
    "FusedMovingAvgObsFakeQuantize consistent": partial(
        modules.FusedMovingAvgObsFakeQuantize, quant_min=-128, quant_max=127, consistent_qparams=True, **_SYMMETRIC
    ),
    "FusedMovingAvgObsFakeQuantize per channel": partial(
        modules.FusedMovingAvgObsFakeQuantize,
        modules.MovingAveragePerChannelMinMaxObserver,
        quant_min=-128,
        quant_max=127,
        **_PER_CHANNEL,
    ),
}
