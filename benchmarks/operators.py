"""The cases of the operators, but for those with learned step sizes (learnable.py)."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.ao.quantization as torch_ao
from torch import Tensor

import qkernels.ops
from benchmarks import inputs, plain
from benchmarks.cases import Bench, Builder, Impl, case, of_functions, of_steps, train_step
from benchmarks.inputs import SMALL
from benchmarks.peers import (
    COMPILED,
    FLAGGEMS,
    MODELOPT,
    OURS,
    TORCH,
    compiled,
    flaggems_aminmax,
    modelopt_fake_quantize,
)

LOW, HIGH = -128, 127


@lru_cache(maxsize=8)
def per_channel_qparams(channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scales and zero points, computed on the CPU, so that they are the same bits on every device."""
    scale = torch.linspace(0.01, 0.1, channels)
    return scale.to(device), (torch.arange(channels, dtype=torch.int32) % 11 - 5).to(device)


def per_tensor_qparams(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.tensor([0.05], device=device), torch.tensor([3], dtype=torch.int32, device=device)


def aminmax_along(axis: int | None) -> Builder:
    def build(device: torch.device) -> Bench:
        def torchs(x: Tensor) -> tuple[Tensor, ...]:
            if axis is None:
                return tuple(torch.aminmax(x))
            return tuple(torch.aminmax(x.transpose(0, axis).flatten(1), dim=1))  # as torch.ao's observer does

        whole = compiled(lambda x: plain.aminmax(x, axis))

        def flaggems() -> Impl:
            theirs = flaggems_aminmax(axis)
            return lambda x, dy: theirs(x)

        return of_steps(
            device,
            {
                OURS: lambda x, dy: qkernels.ops.aminmax(x, axis),
                TORCH: lambda x, dy: torchs(x),
                COMPILED: lambda x, dy: whole(x),
            },
            {FLAGGEMS: flaggems},
        )

    return build


_AMINMAX_PEERS = (TORCH, COMPILED, FLAGGEMS)
case("aminmax", passes=1, peers=_AMINMAX_PEERS)(aminmax_along(None))
case("aminmax axis=1", passes=1, granularity=inputs.AXIS_1_AND_LINEAR, peers=_AMINMAX_PEERS)(aminmax_along(1))
case("aminmax axis=0", passes=1, shapes=(), granularity=inputs.AXIS_0, peers=_AMINMAX_PEERS)(aminmax_along(0))
case("aminmax axis=-1", passes=1, shapes=(), granularity=inputs.LAST_AXIS, peers=_AMINMAX_PEERS)(aminmax_along(-1))


@case("observe_minmax_", passes=1)
def _(device: torch.device) -> Bench:
    """Running extremes, in place."""

    def statistics() -> tuple[Tensor, Tensor]:
        return torch.tensor(float("inf"), device=device), torch.tensor(float("-inf"), device=device)

    workspace = torch.zeros(1, dtype=torch.int32, device=device)

    def ours(x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        qkernels.ops.observe_minmax_(x, low, high, workspace=workspace)
        return low, high

    def torchs(x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        batch_low, batch_high = torch.aminmax(x.detach())  # out= refuses what requires a gradient
        torch.minimum(low, batch_low.to(low.dtype), out=low)
        torch.maximum(high, batch_high.to(high.dtype), out=high)
        return low, high

    functions = {OURS: ours, TORCH: torchs}
    state = {name: statistics() for name in functions}

    def results(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        fresh = statistics()
        functions[name](x, *fresh)
        functions[name](x * 1.5, *fresh)
        return fresh

    return Bench(
        {
            OURS: lambda x, dy: ours(x, *state[OURS]),
            TORCH: lambda x, dy: torchs(x, *state[TORCH]),
        },
        results,
    )


@case("choose_qparams, 64 channels", passes=0, shapes=(SMALL,), granularity=inputs.Granularity(inputs.plain(SMALL)))
def _(device: torch.device) -> Bench:
    low = torch.linspace(-3, 0.5, 64).to(device)
    high = (torch.linspace(-3, 0.5, 64) + 2).to(device)
    observer = torch_ao.PerChannelMinMaxObserver(dtype=torch.quint8, quant_min=0, quant_max=255).to(device)
    eps = observer.eps
    return of_functions(
        lambda x: qkernels.ops.choose_qparams(low, high, 0, 255, eps=eps),
        lambda x: tuple(observer._calculate_qparams(low, high)),
    )


@case("update_qparams_", passes=1)
def _(device: torch.device) -> Bench:
    """A moving average and the qparams that follow from it; torch.ao's observer does both, in two calls."""

    def ours_of() -> Impl:
        low, high = torch.tensor(float("inf"), device=device), torch.tensor(float("-inf"), device=device)
        scale, zero_point = torch.ones(1, device=device), torch.zeros(1, dtype=torch.int32, device=device)
        workspace = torch.zeros(1, dtype=torch.int32, device=device)
        eps = torch.tensor([torch.finfo(torch.float32).eps], device=device)
        return lambda x, dy: qkernels.ops.update_qparams_(
            x, low, high, scale, zero_point, 0, 255, eps=eps, averaging_constant=0.01, workspace=workspace
        )

    def torchs_of() -> Impl:
        observer = torch_ao.MovingAverageMinMaxObserver().to(device)

        def step(x: Tensor, dy: Tensor) -> object:
            observer(x)
            return tuple(observer.calculate_qparams())

        return step

    makers = {OURS: ours_of, TORCH: torchs_of}

    def results(name: str, x: Tensor) -> object:
        step = makers[name]()
        return tuple(step(batch, batch) for batch in (x, x * 1.5))

    return Bench({name: make() for name, make in makers.items()}, results)


@case("fake_quantize", passes=2, peers=(TORCH, COMPILED))
def _(device: torch.device) -> Bench:
    scale, zero_point = per_tensor_qparams(device)
    return of_functions(
        lambda x: qkernels.ops.fake_quantize(x, scale, zero_point, LOW, HIGH),
        lambda x: torch.fake_quantize_per_tensor_affine(x, scale, zero_point, LOW, HIGH),
        compiled(lambda x: plain.fake_quantize(x, scale, zero_point, LOW, HIGH)),
    )


@case("fake_quantize_backward", passes=3)
def _(device: torch.device) -> Bench:
    """torch multiplies by a mask that its forward stored; ours derives it from x, which the model keeps anyway."""
    scale, zero_point = per_tensor_qparams(device)
    masks: dict[tuple[int, torch.Size], Tensor] = {}

    def torchs(x: Tensor, dy: Tensor) -> Tensor:
        key = (x.data_ptr(), x.shape)
        if key not in masks:
            on = torch.ones(1, dtype=torch.uint8, device=device)
            masks[key] = torch.ops.aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams(
                x, scale, zero_point, on, LOW, HIGH
            )[1]
        return torch.ops.aten.fake_quantize_per_tensor_affine_cachemask_backward(dy, masks[key])

    return of_steps(
        device,
        {
            OURS: lambda x, dy: qkernels.ops.fake_quantize_backward(dy, x, scale, zero_point, LOW, HIGH),
            TORCH: torchs,
        },
    )


@case("fake_quantize fwd+bwd", passes=5, peers=(TORCH, COMPILED))
def _(device: torch.device) -> Bench:
    scale, zero_point = per_tensor_qparams(device)
    whole = compiled(lambda x: plain.fake_quantize(x, scale, zero_point, LOW, HIGH))
    return of_steps(
        device,
        {
            OURS: lambda x, dy: train_step(
                lambda leaf: qkernels.ops.fake_quantize(leaf, scale, zero_point, LOW, HIGH), x, dy
            ),
            TORCH: lambda x, dy: train_step(
                lambda leaf: torch.fake_quantize_per_tensor_affine(leaf, scale, zero_point, LOW, HIGH), x, dy
            ),
            COMPILED: lambda x, dy: train_step(whole, x, dy),
        },
    )


@case("fake_quantize symmetric fwd+bwd", passes=5, peers=(TORCH, MODELOPT))
def _(device: torch.device) -> Bench:
    """Codes -127 to 127 without a zero point: what ModelOpt has, too. It takes 127 / amax for our 1 / scale."""
    scale, zero_point = torch.tensor([0.0625], device=device), torch.zeros(1, dtype=torch.int32, device=device)

    def modelopt() -> Impl:
        theirs = modelopt_fake_quantize(scale * 127)
        return lambda x, dy: train_step(theirs, x, dy)

    return of_steps(
        device,
        {
            OURS: lambda x, dy: train_step(
                lambda leaf: qkernels.ops.fake_quantize(leaf, scale, zero_point, -127, 127), x, dy
            ),
            TORCH: lambda x, dy: train_step(
                lambda leaf: torch.fake_quantize_per_tensor_affine(leaf, scale, zero_point, -127, 127), x, dy
            ),
        },
        {MODELOPT: modelopt},
    )


def fake_quantize_along(axis: int) -> Builder:
    def build(device: torch.device) -> Bench:
        def ours(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
            scale, zero_point = per_channel_qparams(x.shape[axis], device)
            return train_step(lambda leaf: qkernels.ops.fake_quantize(leaf, scale, zero_point, LOW, HIGH, axis), x, dy)

        def torchs(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
            scale, zero_point = per_channel_qparams(x.shape[axis], device)
            dim = axis % x.ndim
            return train_step(
                lambda leaf: torch.fake_quantize_per_channel_affine(leaf, scale, zero_point, dim, LOW, HIGH), x, dy
            )

        whole = compiled(lambda x, scale, zero_point: plain.fake_quantize(x, scale, zero_point, LOW, HIGH, axis))

        def of_inductor(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
            scale, zero_point = per_channel_qparams(x.shape[axis], device)
            return train_step(lambda leaf: whole(leaf, scale, zero_point), x, dy)

        return of_steps(device, {OURS: ours, TORCH: torchs, COMPILED: of_inductor})

    return build


_STEP_PEERS = (TORCH, COMPILED)
case("fake_quantize axis=1 fwd+bwd", passes=5, granularity=inputs.AXIS_1_AND_LINEAR, peers=_STEP_PEERS)(
    fake_quantize_along(1)
)
case("fake_quantize axis=0 fwd+bwd", passes=5, shapes=(), granularity=inputs.AXIS_0, peers=_STEP_PEERS)(
    fake_quantize_along(0)
)
case("fake_quantize axis=-1 fwd+bwd", passes=5, shapes=(), granularity=inputs.LAST_AXIS, peers=_STEP_PEERS)(
    fake_quantize_along(-1)
)
