"""The inputs: which shapes, layouts and dtypes a case is timed on. A GPU gets its own, larger than any L2 cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

Shape = tuple[int, ...]

ACTIVATIONS = (16, 64, 32, 32)  # 1,048,576 elements
SMALL = (64, 16)  # where the time is Python and dispatch
CONV_WEIGHTS = (256, 128, 3, 3)
TOKENS = (4096, 1024)

# On a GPU. 64 Mi elements: 256 MiB in float32, 128 MiB in bfloat16, where the L2 cache of an H200 holds 60.
IMAGES = (64, 256, 64, 64)
LONG_TOKENS = (8, 2048, 4096)
LARGE_CONV_WEIGHTS = (512, 512, 3, 3)
LLM_LINEAR = (4096, 14336)  # 56 Mi elements


@dataclass(frozen=True)
class Input:
    """One input. `layout` is "contiguous" or "channels_last"."""

    shape: Shape
    dtype: str = "float32"
    layout: str = "contiguous"

    def __str__(self) -> str:
        short = {"float32": "", "bfloat16": " bf16", "float16": " fp16"}[self.dtype]
        return "x".join(map(str, self.shape)) + short + (" cl" if self.layout == "channels_last" else "")

    def make(self, device: torch.device, seed: int) -> torch.Tensor:
        """Normal values with a standard deviation of 3, drawn on the device."""
        generator = torch.Generator(device).manual_seed(seed)
        x = torch.randn(self.shape, generator=generator, device=device).mul_(3).to(getattr(torch, self.dtype))
        return x.to(memory_format=torch.channels_last) if self.layout == "channels_last" else x


def plain(*shapes: Shape) -> tuple[Input, ...]:
    """Contiguous float32."""
    return tuple(Input(shape) for shape in shapes)


def both_dtypes(*shapes: Shape, layout: str = "contiguous") -> tuple[Input, ...]:
    """Each shape in float32 and in bfloat16."""
    return tuple(Input(shape, dtype, layout) for shape in shapes for dtype in ("float32", "bfloat16"))


PER_TENSOR = plain(SMALL, ACTIVATIONS) + both_dtypes(IMAGES)
SECOND_AXIS = plain(ACTIVATIONS) + both_dtypes(IMAGES) + both_dtypes(IMAGES, layout="channels_last")
LAST_AXIS = both_dtypes(LONG_TOKENS)
WEIGHTS = plain(CONV_WEIGHTS, LARGE_CONV_WEIGHTS) + both_dtypes(LLM_LINEAR)
