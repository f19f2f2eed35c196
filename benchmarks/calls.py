"""The calls of the suite overhead: every public operator and module, ours and torch's, as a function of one tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.ao.quantization as torch_ao
from torch import Tensor, nn

import qkernels.modules
import qkernels.ops
from benchmarks import histograms, operators  # noqa: F401 (they register the cases)
from benchmarks.cases import CASES
from benchmarks.learnable import learning_module
from benchmarks.peers import OURS, TORCH

Functions = dict[str, Callable[[Tensor], object]]  # ours and torch's
Make = Callable[[torch.device], Functions]


def _case(name: str) -> Make:
    """The two implementations of a registered case, called with x as its own gradient."""

    def make(device: torch.device) -> Functions:
        impls = CASES[name].build(device).impls
        return {side: lambda x, impl=impls[side]: impl(x, x) for side in (OURS, TORCH)}  # type: ignore[misc]  # bound by its default

    return make


def _fixed(device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    """Given qparams and the range."""
    return torch.tensor([0.05], device=device), torch.tensor([3], dtype=torch.int32, device=device), -128, 127


def _learned(device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    """Qparams that learn, and the range."""
    scale, zero_point = torch.tensor([0.05], device=device), torch.zeros(1, device=device)
    return scale.requires_grad_(), zero_point.requires_grad_(), -128, 127


def _fake_quantize(device: torch.device) -> Functions:
    qparams = _fixed(device)
    return {
        OURS: lambda x: qkernels.ops.fake_quantize(x, *qparams),
        TORCH: lambda x: torch.fake_quantize_per_tensor_affine(x, *qparams),
    }


def _fake_quantize_backward(device: torch.device) -> Functions:
    qparams, mask = _fixed(device), torch.ones(1, dtype=torch.bool, device=device)
    backward = torch.ops.aten.fake_quantize_per_tensor_affine_cachemask_backward
    return {
        OURS: lambda x: qkernels.ops.fake_quantize_backward(x, x, *qparams),
        TORCH: lambda x: backward(x, mask),
    }


def _learnable_fake_quantize(device: torch.device) -> Functions:
    qparams = _learned(device)
    return {
        OURS: lambda x: qkernels.ops.learnable_fake_quantize(x, *qparams),
        TORCH: lambda x: torch._fake_quantize_learnable_per_tensor_affine(x, *qparams, 1.0),
    }


def _learnable_fake_quantize_backward(device: torch.device) -> Functions:
    qparams = _learned(device)
    backward = torch.ops.aten._fake_quantize_learnable_per_tensor_affine_backward
    return {
        OURS: lambda x: qkernels.ops.learnable_fake_quantize_backward(x, x, *qparams),
        TORCH: lambda x: backward(x, x, *qparams, 1.0),
    }


def _observe_histogram_(device: torch.device) -> Functions:
    """Against the observer, since torch has no such operator."""
    state = torch.zeros(2048, device=device), torch.tensor(-1.0, device=device), torch.tensor(1.0, device=device)
    observer: Any = torch_ao.HistogramObserver().to(device)
    observer(torch.tensor([-1.0, 1.0], device=device))
    qkernels.ops.observe_histogram_(torch.tensor([-1.0, 1.0], device=device), *state)

    def ours(x: Tensor) -> object:
        qkernels.ops.observe_histogram_(x, *state)
        return state[0]

    def torchs(x: Tensor) -> object:
        observer(x)
        return observer.histogram

    return {OURS: ours, TORCH: torchs}


def _skewed(device: torch.device) -> tuple[Any, tuple[Tensor, Tensor, Tensor]]:
    """torch.ao's observer after a batch of a skewed distribution, and its histogram, min and max."""
    observer: Any = torch_ao.HistogramObserver().to(device)
    observer(torch.linspace(-1, 2, 4096, device=device) ** 3)
    return observer, (observer.histogram, observer.min_val, observer.max_val)


def _search_histogram_range(device: torch.device) -> Functions:
    """Against the observer's own search."""
    observer, state = _skewed(device)
    return {
        OURS: lambda x: tuple(qkernels.ops.search_histogram_range(*state, observer.dst_nbins)),
        TORCH: lambda x: tuple(observer._non_linear_param_search()),
    }


def _search_histogram_qparams(device: torch.device) -> Functions:
    """Against the observer's calculate_qparams."""
    observer, state = _skewed(device)
    return {
        OURS: lambda x: tuple(qkernels.ops.search_histogram_qparams(*state, observer.dst_nbins, 0, 255)),
        TORCH: lambda x: tuple(observer.calculate_qparams()),
    }


def _update_qparams_from_histogram_(device: torch.device) -> Functions:
    """Against the observer's calculate_qparams, and two copies."""
    observer, state = _skewed(device)
    scale, zero_point = torch.ones(1, device=device), torch.zeros(1, dtype=torch.int32, device=device)

    def ours(x: Tensor) -> object:
        qkernels.ops.update_qparams_from_histogram_(*state, scale, zero_point, observer.dst_nbins, 0, 255)
        return scale, zero_point

    def torchs(x: Tensor) -> object:
        for buffer, value in zip((scale, zero_point), observer.calculate_qparams(), strict=True):
            buffer.copy_(value)
        return scale, zero_point

    return {OURS: ours, TORCH: torchs}


def _module(make: Callable[[Any], nn.Module]) -> Make:
    """A module of ours and torch.ao's, which have seen a batch."""

    def both(device: torch.device) -> Functions:
        modules = {OURS: make(qkernels.modules).to(device), TORCH: make(torch_ao).to(device)}
        for module in modules.values():
            module(torch.ones(1, 1, device=device))
        return dict(modules)

    return both


def _calculate_qparams(make: Callable[[Any], nn.Module]) -> Make:
    def both(device: torch.device) -> Functions:
        modules: Any = _module(make)(device)
        return {
            side: lambda x, module=module: tuple(module.calculate_qparams())  # type: ignore[misc]  # bound by default
            for side, module in modules.items()
        }

    return both


_SYMMETRIC = {"qscheme": torch.per_channel_symmetric, "dtype": torch.qint8}
_OBSERVERS: dict[str, Callable[[Any], nn.Module]] = {
    "MinMaxObserver": lambda library: library.MinMaxObserver(),
    "MovingAverageMinMaxObserver": lambda library: library.MovingAverageMinMaxObserver(),
    "PerChannelMinMaxObserver": lambda library: library.PerChannelMinMaxObserver(**_SYMMETRIC),
    "MovingAveragePerChannelMinMaxObserver": lambda library: library.MovingAveragePerChannelMinMaxObserver(
        **_SYMMETRIC
    ),
    "HistogramObserver": lambda library: library.HistogramObserver(),
    "FixedQParamsObserver": lambda library: library.FixedQParamsObserver(scale=1 / 256, zero_point=0),
    "PlaceholderObserver": lambda library: library.PlaceholderObserver(),
    "NoopObserver": lambda library: library.NoopObserver(),
    "ReuseInputObserver": lambda library: library.ReuseInputObserver(),
}
_QUANTIZERS: dict[str, Callable[[Any], nn.Module]] = {
    "FakeQuantize": lambda library: library.FakeQuantize(),
    "FusedMovingAvgObsFakeQuantize": lambda library: library.FusedMovingAvgObsFakeQuantize(),
    "FixedQParamsFakeQuantize": lambda library: library.FixedQParamsFakeQuantize(
        library.FixedQParamsObserver.with_args(scale=1 / 256, zero_point=0)
    ),
    "LearnableFakeQuantize": lambda library: learning_module(
        OURS if library is qkernels.modules else TORCH, -1, torch.device("cpu")
    ),
}

# Every public operator and module: how ours and torch's are made for a device.
CALLS: dict[str, Make] = {
    "aminmax": _case("aminmax"),
    "observe_minmax_": _case("observe_minmax_"),
    "choose_qparams": _case("choose_qparams, 64 channels"),
    "update_qparams_": _case("update_qparams_"),
    "fake_quantize": _fake_quantize,
    "fake_quantize_backward": _fake_quantize_backward,
    "learnable_fake_quantize": _learnable_fake_quantize,
    "learnable_fake_quantize_backward": _learnable_fake_quantize_backward,
    "histogram": _case("histogram, 2048 bins"),
    "observe_histogram_": _observe_histogram_,
    "search_histogram_range": _search_histogram_range,
    "search_histogram_qparams": _search_histogram_qparams,
    "update_qparams_from_histogram_": _update_qparams_from_histogram_,
    **{name: _module(make) for name, make in (_OBSERVERS | _QUANTIZERS).items()},
    **{
        f"{name}.calculate_qparams": _calculate_qparams(_OBSERVERS[name])
        for name in ("MinMaxObserver", "PerChannelMinMaxObserver", "HistogramObserver")
    },
}
NOT_TIMED = {
    "RecordingObserver": "it stores every input, and a loop of calls would fill the memory",
    "PerChannelHistogramObserver": "torch.ao has no such observer",
}
