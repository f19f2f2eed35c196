"""Learned step sizes: the operator and the module, forward and backward, against torch's operators and torch.ao."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.ao.quantization as torch_ao
from torch import Tensor, nn
from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize

import qkernels.modules
import qkernels.ops
from benchmarks import inputs, plain
from benchmarks.cases import Bench, Builder, Impl, case
from benchmarks.gate import WithinBound
from benchmarks.inputs import ACTIVATIONS, CONV_WEIGHTS, SMALL
from benchmarks.peers import COMPILED, OURS, TORCH, compiled

LOW, HIGH = -128, 127


def gradient_step(y: Tensor, leaves: tuple[Tensor, ...], dy: Tensor) -> tuple[Tensor, ...]:
    """y and the gradients of `leaves`."""
    return (y.detach(), *torch.autograd.grad(y, leaves, dy))


def sums_within_bound(step: tuple[Tensor, ...], x: Tensor, dy: Tensor, scale: Tensor, axis: int | None) -> object:
    """What the gate compares: y and dx bit for bit, the sums within what float32 can tell.

    The terms are dy * (y - x) / scale inside and dy * code outside, so |dy| and |dy * code| bound them. 1e-6 of the
    first is our promise; torch takes y unrounded in the first term, which is half a unit of the code's last place.
    """
    y, dx, dscale, dzero_point = step
    dims = [d for d in range(x.ndim) if axis is None or d != axis % x.ndim]
    shape = [1] * x.ndim if axis is None else [-1 if d == axis % x.ndim else 1 for d in range(x.ndim)]
    codes = (y.double() / scale.double().reshape(shape)).abs()
    magnitude = dy.double().abs()
    slack = ((2e-6 + 2.0**-23 * codes) * magnitude).sum(dims).reshape(-1)
    saturated = 2e-6 * (magnitude * scale.double().reshape(shape)).sum(dims).reshape(-1)
    return y, dx, WithinBound(dscale.reshape(-1), slack), WithinBound(dzero_point.reshape(-1), saturated)


def learnable_along(axis: int | None) -> Builder:
    """The operator, per tensor or per channel."""

    def build(device: torch.device) -> Bench:
        def leaves(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            channels = 1 if axis is None else x.shape[axis]
            scale = torch.linspace(0.02, 0.05, channels, device=device).requires_grad_()
            zero_point = torch.zeros(channels, device=device).requires_grad_()  # torch is right here
            return x.detach().requires_grad_(), scale, zero_point

        def ours(x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
            all_leaves = leaves(x)
            return gradient_step(
                qkernels.ops.learnable_fake_quantize(*all_leaves, LOW, HIGH, 1.0, axis), all_leaves, dy
            )

        def torchs(x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
            all_leaves = leaves(x)
            if axis is None:
                y = torch._fake_quantize_learnable_per_tensor_affine(*all_leaves, LOW, HIGH, 1.0)
            else:
                y = torch._fake_quantize_learnable_per_channel_affine(*all_leaves, axis % x.ndim, LOW, HIGH, 1.0)
            return gradient_step(y, all_leaves, dy)

        whole = compiled(
            lambda x, scale, zero_point: plain.learnable_fake_quantize(x, scale, zero_point, LOW, HIGH, axis)
        )

        def of_inductor(x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
            all_leaves = leaves(x)
            return gradient_step(whole(*all_leaves), all_leaves, dy)

        steps = {OURS: ours, TORCH: torchs, COMPILED: of_inductor}
        impls: dict[str, Impl] = {**steps}
        return Bench(impls, lambda name, x: sums_within_bound(steps[name](x, x), x, x, leaves(x)[1], axis))

    return build


_PEERS = (TORCH, COMPILED)
case("learnable_fake_quantize fwd+bwd", passes=5, peers=_PEERS)(learnable_along(None))
case(
    "learnable_fake_quantize axis=0 fwd+bwd",
    passes=5,
    shapes=(SMALL, CONV_WEIGHTS),
    granularity=inputs.AXIS_0,
    peers=_PEERS,
)(learnable_along(0))
case(
    "learnable_fake_quantize axis=1 fwd+bwd",
    passes=5,
    shapes=(ACTIVATIONS,),
    granularity=inputs.AXIS_1_AND_LINEAR,
    peers=_PEERS,
)(learnable_along(1))


def learning_module(name: str, channels: int, device: torch.device) -> nn.Module:
    """Ours or torch.ao's quantizer that has observed and learns: per channel of axis 0, or per tensor for -1."""
    if name == OURS:
        make, observers = qkernels.modules.LearnableFakeQuantize, qkernels.modules
    else:
        make, observers = _LearnableFakeQuantize, torch_ao
    per_channel = channels > 0
    module: Any = make(
        observers.MovingAveragePerChannelMinMaxObserver if per_channel else observers.MovingAverageMinMaxObserver,
        quant_min=LOW,
        quant_max=HIGH,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric,
        channel_len=channels,
        use_grad_scaling=True,
        **({"ch_axis": 0} if per_channel else {}),
    ).to(device)
    module(torch.linspace(-3, 3, 8 * max(channels, 1), device=device).reshape(max(channels, 1), 8))
    module.enable_param_learning()
    return module


def module_bench(per_channel: bool) -> Builder:
    """The module in the stage that lasts: learning."""

    def build(device: torch.device) -> Bench:
        modules: dict[tuple[str, int], Any] = {}

        def of(name: str, x: Tensor) -> Any:
            key = (name, x.shape[0] if per_channel else -1)
            if key not in modules:
                modules[key] = learning_module(name, key[1], device)
            return modules[key]

        def step(name: str, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
            module, leaf = of(name, x), x.detach().requires_grad_()
            return gradient_step(module(leaf), (leaf, module.scale, module.zero_point), dy)

        def results(name: str, x: Tensor) -> object:
            return sums_within_bound(step(name, x, x), x, x, of(name, x).scale.detach(), 0 if per_channel else None)

        return Bench({name: partial(step, name) for name in (OURS, TORCH)}, results)

    return build


case("LearnableFakeQuantize learning step", suite="modules", passes=5)(module_bench(per_channel=False))
case(
    "LearnableFakeQuantize per channel learning step",
    suite="modules",
    passes=5,
    shapes=(CONV_WEIGHTS,),
    granularity=inputs.AXIS_0,
)(module_bench(per_channel=True))
