"""The modules that the lanes construct, by name. Those that fake quantize are the names with `FakeQuantize`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import qkernels.modules as modules

_SYMMETRIC = {"dtype": torch.qint8, "qscheme": torch.per_tensor_symmetric}
_PER_CHANNEL = {"dtype": torch.qint8, "qscheme": torch.per_channel_symmetric, "ch_axis": 1}


def _learnable(observer: type = modules.MovingAverageMinMaxObserver, **kwargs: Any) -> modules.LearnableFakeQuantize:
    """Observing and learning at once, as constructed: both launches read x."""
    return modules.LearnableFakeQuantize(observer, 0, 255, use_grad_scaling=True, **kwargs)


def _learnable_per_channel() -> modules.LearnableFakeQuantize:
    observer = modules.MovingAveragePerChannelMinMaxObserver
    return modules.LearnableFakeQuantize(observer, -8, 7, channel_len=4, grad_mask="lsq", **_PER_CHANNEL)


def _estimating() -> modules.LearnableFakeQuantize:
    """Gradients off by the device's flag: the same launches, zeros for scale and zero point."""
    module = _learnable()
    module.enable_static_estimate()
    return module


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
    "LearnableFakeQuantize": _learnable,
    "LearnableFakeQuantize estimating": _estimating,
    "LearnableFakeQuantize per channel": _learnable_per_channel,
    "LearnableFakeQuantize memoryless": partial(_learnable, modules.MinMaxObserver, memoryless=True),
}
