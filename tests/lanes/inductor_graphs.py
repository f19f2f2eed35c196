"""The graphs whose Inductor code the lane looks at, and what it expects of them. One list for CUDA and CPU.

The functions call operators only: they are traced symbolically, as Dynamo would hand them to Inductor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

QUANT_MIN, QUANT_MAX = -128, 127


@dataclass(frozen=True)
class InductorGraph:
    """One graph and its expectations.

    Attributes:
        function: takes the tensors described by `arguments`.
        arguments: (shape, dtype) of every argument.
        forward_kernels: fused kernels of the forward graph.
        backward_kernels: fused kernels of the backward graph; None for an inference graph.
        cuda_calls: opaque operators left in the CUDA code of each graph. On the CPU none are.
        cuda_backward: (kernels, opaque operators) of the backward's CUDA code, where they are others.
        differentiated: positions of the arguments whose gradients the backward graph computes.
    """

    function: Callable[..., torch.Tensor]
    arguments: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    forward_kernels: int
    backward_kernels: int | None = None
    cuda_calls: tuple[str, ...] = ()
    cuda_backward: tuple[int, tuple[str, ...]] | None = None
    differentiated: tuple[int, ...] = (0,)


def fake_quantize(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    return torch.ops.qkernels.fake_quantize(x, scale, zero_point, QUANT_MIN, QUANT_MAX)


def chain(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """relu -> fake_quantize -> mul."""
    return torch.ops.qkernels.fake_quantize(torch.relu(x), scale, zero_point, QUANT_MIN, QUANT_MAX) * factor


def flagged_chain(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, factor: torch.Tensor, enabled: torch.Tensor
) -> torch.Tensor:
    """The chain with a flag that the device reads."""
    y = torch.ops.qkernels.fake_quantize(torch.relu(x), scale, zero_point, QUANT_MIN, QUANT_MAX, None, enabled)
    return y * factor


def per_channel_chain(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, factor: torch.Tensor
) -> torch.Tensor:
    return torch.ops.qkernels.fake_quantize(torch.relu(x), scale, zero_point, QUANT_MIN, QUANT_MAX, 1) * factor


def learnable_chain(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, factor: torch.Tensor, enabled: torch.Tensor
) -> torch.Tensor:
    """relu -> learnable_fake_quantize -> mul, with both flags."""
    y = torch.ops.qkernels.learnable_fake_quantize(
        torch.relu(x), scale, zero_point, QUANT_MIN, QUANT_MAX, 0.1, None, enabled, "rounded", enabled
    )
    return y * factor


def learnable_per_channel_chain(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, factor: torch.Tensor, enabled: torch.Tensor
) -> torch.Tensor:
    y = torch.ops.qkernels.learnable_fake_quantize(
        torch.relu(x), scale, zero_point, QUANT_MIN, QUANT_MAX, 0.1, 1, enabled, "rounded", enabled
    )
    return y * factor


def divides(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """Planted fault: a float32 reciprocal is approximate in Inductor's CUDA code."""
    code = torch.round(x * (1.0 / scale)) + zero_point
    return (torch.clamp(code, QUANT_MIN, QUANT_MAX) - zero_point) * scale


def opaque(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Planted fault: an operator that does not decompose, so that the chain falls apart around it."""
    return torch.ops.qkernels_planted.opaque(torch.relu(x), scale, zero_point) * factor


def define_planted_operator() -> torch.library.Library:
    """Register the operator that `opaque` calls. The library must be kept alive by the caller."""
    library = torch.library.Library("qkernels_planted", "DEF")
    library.define("opaque(Tensor x, Tensor scale, Tensor zero_point) -> Tensor")
    library.impl("opaque", divides, "CompositeExplicitAutograd")
    torch.library.register_fake(
        "qkernels_planted::opaque", lambda x, scale, zero_point: torch.empty_like(x), lib=library
    )
    return library


_X = ((64, 32, 16, 16), torch.float32)
_ONE = ((1,), torch.float32)
_ZERO_POINT = ((1,), torch.int32)
_CHANNELS = ((32,), torch.float32)
_CHANNEL_ZERO_POINTS = ((32,), torch.int32)

GRAPHS: dict[str, InductorGraph] = {
    "fake_quantize": InductorGraph(fake_quantize, (_X, _ONE, _ZERO_POINT), forward_kernels=1),
    "chain": InductorGraph(chain, (_X, _ONE, _ZERO_POINT, _ONE), forward_kernels=1, backward_kernels=1),
    "flagged_chain": InductorGraph(
        flagged_chain, (_X, _ONE, _ZERO_POINT, _ONE, ((1,), torch.uint8)), forward_kernels=1, backward_kernels=1
    ),
    "per_channel_chain": InductorGraph(
        per_channel_chain,
        (_X, _CHANNELS, _CHANNEL_ZERO_POINTS, _ONE),
        forward_kernels=1,
        backward_kernels=1,
        cuda_calls=("qkernels.reciprocal",),  # C elements; as a float64 division it would be done once per element of x
    ),
    # backward per tensor: one pass that writes dx and the partial sums, then one small kernel per sum
    "learnable_chain": InductorGraph(
        learnable_chain,
        (_X, _ONE, _ONE, _ONE, ((1,), torch.uint8)),
        forward_kernels=1,
        backward_kernels=1,
        cuda_backward=(3, ()),
        differentiated=(0, 1, 2),
    ),
    # backward per channel: Inductor would write dx in a second pass, so the operator stays a kernel, between the mul
    # before it and the relu's own backward after it; without a partitioner relu(x) is computed again
    "learnable_per_channel_chain": InductorGraph(
        learnable_per_channel_chain,
        (_X, _CHANNELS, _CHANNELS, _ONE, ((1,), torch.uint8)),
        forward_kernels=1,
        backward_kernels=1,
        cuda_calls=("qkernels.reciprocal",),
        cuda_backward=(3, ("qkernels.learnable_fake_quantize_backward",)),
        differentiated=(0, 1, 2),
    ),
}

PLANTED: dict[str, InductorGraph] = {
    "divides": InductorGraph(divides, (_X, _ONE, _ZERO_POINT), forward_kernels=1),
    "opaque": InductorGraph(opaque, (_X, _ONE, _ZERO_POINT, _ONE), forward_kernels=1),
}


def audit_generated(
    graph: InductorGraph, kernels: list[str], calls: list[str], ptx: list[str], phase: str
) -> list[str]:
    """What is wrong with the CUDA code generated for one phase ("forward" or "backward") of a graph."""
    expected = graph.forward_kernels if phase == "forward" else graph.backward_kernels
    expected_calls = graph.cuda_calls
    if phase == "backward" and graph.cuda_backward is not None:
        expected, expected_calls = graph.cuda_backward
    problems = []
    if len(kernels) != expected:
        problems.append(f"{phase}: {len(kernels)} kernels ({', '.join(kernels)}), expected {expected}")
    if tuple(calls) != expected_calls:
        problems.append(f"{phase}: calls {calls}, expected {list(expected_calls)}")
    if not ptx:
        problems.append(f"{phase}: nothing was compiled")
    problems += [
        f"{phase}: contains {text}" for text in ("div.full", "div.approx", "rcp.approx") if any(text in p for p in ptx)
    ]
    return problems
