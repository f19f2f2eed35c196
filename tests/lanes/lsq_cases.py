"""The registered kernels of learned step sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from qkernels.autotune.heuristics import flat_accumulation, tiled_accumulation
from qkernels.layout import Flat, plan
from qkernels.ops import lsq
from tests.lanes.cases import Arguments, KernelCase, Outputs
from tests.lanes.layouts import LAYOUTS, THOROUGH, Layout, sweep

QUANT_MIN, QUANT_MAX = -128, 127


def _arguments(x: torch.Tensor, channels: int, flagged: bool) -> Arguments:
    scale = torch.linspace(0.02, 0.03, channels, device=x.device)
    zero_point = (torch.arange(channels, device=x.device) % 5 - 2).float()
    arguments: Arguments = {"x": x, "scale": scale, "zero_point": zero_point}
    if flagged:
        arguments["enabled"] = torch.ones(1, dtype=torch.uint8, device=x.device)
        arguments["learning"] = torch.ones(1, dtype=torch.uint8, device=x.device)
    return arguments


def _forward(layout: Layout) -> KernelCase:
    def run(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> Outputs:
        return {"y": lsq._forward_triton(x, scale, zero_point, QUANT_MIN, QUANT_MAX, axis=layout.axis)}

    def arguments(x: torch.Tensor) -> Arguments:
        return _arguments(x, layout.channels(x), flagged=False)

    return KernelCase(
        name=f"learnable_fake_quantize-{layout.name}",
        make=lambda device, dtype, large: arguments(layout.tensor(device, dtype, large)),
        run=run,
        reads={"x": 1},
        writes={"y": 1},
        scratch_bytes=1024,
        vector=layout.vector,
        max_registers=96 if layout.vector == 1 else 64,
        sweep=sweep(layout, arguments),
        thorough=layout.name == "flat",
    )


def _launches(layout: Layout) -> int:
    """One, and a second where programs share channels, for the large input."""
    x = layout.tensor(torch.device("meta"), torch.float32, True)
    shape = plan(tuple(x.shape), (torch.empty_like(x).stride(), x.stride(), x.stride()), layout.axis)
    if isinstance(shape, Flat):
        return 1 if flat_accumulation(shape.n, x.device).programs == 1 else 2
    config = tiled_accumulation(shape.n_rows, shape.run, shape.channels, shape.channel_innermost, x.device)
    return 1 if config.parts == 1 else 2


def _backward(layout: Layout, grad_mask: str = "rounded", flagged: bool = False) -> KernelCase:
    def arguments(x: torch.Tensor) -> Arguments:
        return {"dy": torch.empty_like(x).fill_(0.5), **_arguments(x, layout.channels(x), flagged)}

    def run(dy: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, **flags: Any) -> Outputs:
        gradients = lsq._backward_triton(
            dy, x, scale, zero_point, QUANT_MIN, QUANT_MAX, 0.1, layout.axis, grad_mask=grad_mask, **flags
        )
        return dict(zip(("dx", "dscale", "dzero_point"), gradients, strict=True))

    marks = [grad_mask] * (grad_mask != "rounded") + ["flagged"] * flagged
    return KernelCase(
        name="-".join(["learnable_fake_quantize_backward", *marks, layout.name]),
        make=lambda device, dtype, large: arguments(layout.tensor(device, dtype, large)),
        run=run,
        launches=_launches(layout),
        reads={"x": 1, "dy": 1},
        writes={"dx": 1, "dscale": 1, "dzero_point": 1},
        scratch_bytes=64 * 1024,  # partials: 32 bytes per program and channel, written and read
        vector=layout.vector,
        # Where x is read element by element, with an address each, Triton 3.6 takes 158 and 3.7 takes 126.
        max_registers=160 if layout.vector == 1 else 128,
        fused_multiply_adds=True,  # k * scale - x
        sweep=sweep(layout, arguments) if not flagged else None,
        max_configurations=3,
        thorough=layout.name in THOROUGH and not flagged and grad_mask == "rounded",
    )


def lsq_cases() -> Iterator[KernelCase]:
    """Every case of learnable_fake_quantize and its backward."""
    for layout in LAYOUTS:
        yield _backward(layout)
    flat, rows, cols = LAYOUTS[0], LAYOUTS[1], LAYOUTS[5]
    for layout in (flat, rows, cols):
        yield _forward(layout)
        yield _backward(layout, grad_mask="lsq")
        yield _backward(layout, flagged=True)
