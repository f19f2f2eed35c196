"""The inputs: which shapes, layouts and dtypes a case is timed on, and where they come from. A GPU gets its own, larger
than any L2 cache, up to 1 GiB.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

Shape = tuple[int, ...]

ACTIVATIONS = (16, 64, 32, 32)  # 1,048,576 elements
SMALL = (64, 16)  # where the time is Python and dispatch
CONV_WEIGHTS = (256, 128, 3, 3)
TOKENS = (4096, 1024)

# Real networks, small enough for one thread.
ONE = (1, 1)  # two dimensions, so that axis 1 exists
RESNET_CONV2 = (8, 64, 56, 56)
RESNET_CONV5 = (8, 2048, 7, 7)  # 49 positions: no vector of a power of two divides a channel
RESNET_FC = (1000, 2048)
VIT_TOKENS = (8, 197, 768)
VIT_MLP = (3072, 768)
LLAMA_PROJECTION = (4096, 4096)

# On a GPU. 64 Mi elements: 256 MiB in float32, 128 MiB in bfloat16, where the L2 cache of an H200 holds 60.
IMAGES = (64, 256, 64, 64)
LONG_TOKENS = (8, 2048, 4096)
LARGE_CONV_WEIGHTS = (512, 512, 3, 3)
LLM_LINEAR = (4096, 14336)  # 56 Mi elements
RESNET_BATCH = (256, 256, 56, 56)
VIT_BATCH = (256, 197, 768)
GIBIBYTE = (64, 1024, 64, 64)  # 1 GiB in float32

NAMES: dict[Shape, str] = {
    ONE: "one element",
    SMALL: "a small linear layer's output",
    ACTIVATIONS: "CIFAR-sized ResNet activations, batch 16",
    CONV_WEIGHTS: "3x3 convolution, 128 to 256 channels",
    TOKENS: "4096 tokens of width 1024",
    RESNET_CONV2: "ResNet-50 conv2 activations, batch 8",
    RESNET_CONV5: "ResNet-50 conv5 output, batch 8",
    RESNET_FC: "ResNet-50 classifier weight",
    VIT_TOKENS: "ViT-B/16 tokens, batch 8",
    VIT_MLP: "ViT-B first MLP weight",
    LLAMA_PROJECTION: "Llama-3-8B query projection",
    IMAGES: "64 Mi elements of NCHW activations",
    LONG_TOKENS: "8 sequences of 2048 tokens, width 4096 (Llama-3-8B)",
    LARGE_CONV_WEIGHTS: "ResNet-50 conv5 3x3 weight",
    LLM_LINEAR: "Llama-3-8B down projection",
    RESNET_BATCH: "ResNet-50 conv2 output, batch 256",
    VIT_BATCH: "ViT-B/16 tokens, batch 256",
    GIBIBYTE: "1 GiB of float32",
    (8, 3, 64, 64): "8 images of 64 x 64",
    (32, 3, 224, 224): "32 images of 224 x 224",
}


@dataclass(frozen=True)
class Input:
    """One input. `layout` is "contiguous" or "channels_last"."""

    shape: Shape
    dtype: str = "float32"
    layout: str = "contiguous"

    def __str__(self) -> str:
        short = {"float32": "", "bfloat16": " bf16", "float16": " fp16"}[self.dtype]
        return "x".join(map(str, self.shape)) + short + (" cl" if self.layout == "channels_last" else "")

    @property
    def name(self) -> str:
        """What it is in a real network."""
        return NAMES.get(self.shape, "")

    def make(self, device: torch.device, seed: int) -> torch.Tensor:
        """Normal values with a standard deviation of 3, drawn on the device."""
        generator = torch.Generator(device).manual_seed(seed)
        x = torch.randn(self.shape, generator=generator, device=device).mul_(3).to(getattr(torch, self.dtype))
        return x.to(memory_format=torch.channels_last) if self.layout == "channels_last" else x


Inputs = tuple[Input, ...]


def plain(*shapes: Shape) -> Inputs:
    """Contiguous float32."""
    return tuple(Input(shape) for shape in shapes)


def both_dtypes(*shapes: Shape, layout: str = "contiguous") -> Inputs:
    """Each shape in float32 and in bfloat16."""
    return tuple(Input(shape, dtype, layout) for shape in shapes for dtype in ("float32", "bfloat16"))


def all_dtypes(shape: Shape, layout: str = "contiguous") -> Inputs:
    """The shape in float32, bfloat16 and float16."""
    return tuple(replace(Input(shape, layout=layout), dtype=dtype) for dtype in ("float32", "bfloat16", "float16"))


@dataclass(frozen=True)
class Granularity:
    """The inputs that one granularity asks for beyond a case's usual ones.

    Attributes:
        cuda: on a GPU.
        full: what `--suite full` adds on a CPU.
        cuda_full: what `--suite full` adds on a GPU.
    """

    cuda: Inputs
    full: Inputs = ()
    cuda_full: Inputs = ()


_CHANNELS_LAST = "channels_last"

PER_TENSOR = Granularity(
    cuda=plain(SMALL, ACTIVATIONS) + both_dtypes(IMAGES),
    full=plain(ONE, RESNET_CONV2) + all_dtypes(VIT_TOKENS) + plain(LLAMA_PROJECTION),
    cuda_full=plain(ONE) + all_dtypes(VIT_BATCH) + plain(RESNET_BATCH, LLM_LINEAR, GIBIBYTE),
)
AXIS_0 = Granularity(
    cuda=plain(CONV_WEIGHTS, LARGE_CONV_WEIGHTS) + both_dtypes(LLM_LINEAR),
    full=plain(RESNET_FC) + both_dtypes(VIT_MLP),
    cuda_full=(*plain(RESNET_FC, VIT_MLP, GIBIBYTE), Input(LLM_LINEAR, "float16")),
)
AXIS_1 = Granularity(
    cuda=plain(ACTIVATIONS) + both_dtypes(IMAGES) + both_dtypes(IMAGES, layout=_CHANNELS_LAST),
    full=(*all_dtypes(RESNET_CONV2), Input(RESNET_CONV2, layout=_CHANNELS_LAST), Input(RESNET_CONV5)),
    cuda_full=(
        *plain(RESNET_CONV5, RESNET_BATCH, GIBIBYTE),
        Input(RESNET_BATCH, "bfloat16", _CHANNELS_LAST),
        Input(IMAGES, "float16"),
    ),
)
AXIS_1_AND_LINEAR = replace(AXIS_1, cuda=AXIS_1.cuda + both_dtypes(LLM_LINEAR))
LAST_AXIS = Granularity(
    cuda=both_dtypes(LONG_TOKENS), full=both_dtypes(VIT_TOKENS), cuda_full=all_dtypes(VIT_BATCH) + plain(GIBIBYTE)
)
