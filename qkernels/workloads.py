"""What the tuner runs: the launchers on inputs of a given shape, by operator.

`python -m qkernels.autotune` loads this module by name; nothing below this folder imports it.
"""

from __future__ import annotations

from typing import Any

import torch

from qkernels.autotune.heuristics import MAX_SHARED_GROUPS
from qkernels.autotune.tuner import Workload
from qkernels.layout import normalize_axis

Tensor = torch.Tensor

QUANT_MIN, QUANT_MAX = -128, 127
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _minmax(x: Tensor, channels: int, axis: int | None) -> tuple[Any, ...]:
    low = torch.full((channels,), float("inf"), device=x.device)
    return x, low, -low, torch.zeros(MAX_SHARED_GROUPS, dtype=torch.int32, device=x.device), axis


def _run_minmax(x: Tensor, low: Tensor, high: Tensor, workspace: Tensor, axis: int | None) -> None:
    from qkernels.minmax import Statistics, launch_minmax

    launch_minmax(x, Statistics(low, high), axis=axis, update="extremes", workspace=workspace)


def _qparams(x: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    zero_point = torch.zeros(channels, dtype=torch.int32, device=x.device)
    return torch.full((channels,), 0.05, device=x.device), zero_point


def _fake_quantize(x: Tensor, channels: int, axis: int | None) -> tuple[Any, ...]:
    return torch.empty_like(x), x, None, *_qparams(x, channels), axis


def _fake_quantize_backward(x: Tensor, channels: int, axis: int | None) -> tuple[Any, ...]:
    return torch.empty_like(x), x, torch.randn_like(x), *_qparams(x, channels), axis


def _run_fake_quantize(
    out: Tensor, x: Tensor, dy: Tensor | None, scale: Tensor, zero_point: Tensor, axis: int | None
) -> None:
    from qkernels.fake_quant import launch_fake_quant

    launch_fake_quant(out, x, dy, scale, zero_point, QUANT_MIN, QUANT_MAX, axis=axis)


def _learnable_backward(x: Tensor, channels: int, axis: int | None) -> tuple[Any, ...]:
    scale, zero_point = _qparams(x, channels)
    zero_point = zero_point.float()
    gradients = (torch.empty_like(scale), torch.empty_like(zero_point))
    return torch.empty_like(x), x, torch.randn_like(x), scale, zero_point, *gradients, axis


def _run_learnable_backward(
    dx: Tensor,
    x: Tensor,
    dy: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    dscale: Tensor,
    dzero_point: Tensor,
    axis: int | None,
) -> None:
    from qkernels.lsq import LearnedQParams, launch_learnable_backward

    qparams = LearnedQParams(
        scale, zero_point, None, None, dscale, dzero_point, float(QUANT_MIN), float(QUANT_MAX), 1.0
    )
    launch_learnable_backward(dx, x, dy, qparams, axis=axis, strict=False)


# By operator: what is run on x, all of it judged together where it shares a decision. The forward of
# learnable_fake_quantize is fake_quantize's kernel.
OPS: dict[str, dict[str, tuple[Any, Any]]] = {
    "aminmax": {"": (_minmax, _run_minmax)},
    "fake_quantize": {
        "forward": (_fake_quantize, _run_fake_quantize),
        "backward": (_fake_quantize_backward, _run_fake_quantize),
    },
    "learnable_fake_quantize": {"backward": (_learnable_backward, _run_learnable_backward)},
}


def workloads_of(op: str, shape: tuple[int, ...], dtype: str, axis: int | None) -> list[Workload]:
    """The workloads of an operator on a contiguous x.

    Args:
        op: a name in `OPS`.
        shape: of x; no dimension may be 0.
        dtype: a name in `DTYPES`.
        axis: channel axis, negative allowed, or None.

    Raises:
        ValueError: an argument is none of these.
    """
    if op not in OPS:
        raise ValueError(f"workloads_of: op must be one of {sorted(OPS)}; got {op!r}")
    if dtype not in DTYPES:
        raise ValueError(f"workloads_of: dtype must be one of {sorted(DTYPES)}; got {dtype!r}")
    if not shape or any(size < 1 for size in shape):
        raise ValueError(f"workloads_of: shape must have positive dimensions; got {shape}")
    if axis is not None:
        try:
            axis = normalize_axis(axis, len(shape))
        except IndexError:
            raise ValueError(f"workloads_of: axis must lie within {len(shape)} dimensions; got {axis}") from None
    channels = 1 if axis is None else shape[axis]
    found = []
    for part, (prepare, run) in OPS[op].items():

        def make(device: torch.device, prepare: Any = prepare) -> tuple[Any, ...]:
            return prepare(torch.randn(shape, device=device, dtype=DTYPES[dtype]), channels, axis)

        name = " ".join(filter(None, [op, part, dtype, "x".join(map(str, shape)), f"axis={axis}"]))
        found.append(Workload(name, make, run))
    return found
