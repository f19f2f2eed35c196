"""One learnable_fake_quantize call, forward and backward, checked against the reference."""

from __future__ import annotations

import torch

import qkernels.ops as qops
from tests.oracles import assert_bits_equal
from tests.oracles_learnable import Learned, assert_learnable, reference_learnable


def gradient_for(x: torch.Tensor, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed + x.numel())
    return torch.randn(x.shape, generator=g).to(x.dtype).to(x.device)


def check_learnable(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    *numbers: object,
    dy: torch.Tensor | None = None,
    context: str = "",
    **options: object,
) -> Learned:
    """Forward and backward against the reference; nothing that came in changes."""
    dy = gradient_for(x) if dy is None else dy
    arguments = (x, scale, zero_point, *numbers)
    before = [t.clone() for t in (dy, *arguments[:3])]
    want = reference_learnable(dy, *arguments, **options)
    y = qops.learnable_fake_quantize(*arguments, **options)
    gradients = qops.learnable_fake_quantize_backward(dy, *arguments, **options)
    context = f"{context} {options}"
    assert_learnable(y, gradients, want, (scale, zero_point), context)
    for result in (y, gradients[0]):
        assert result.stride() == torch.empty_like(x).stride(), f"{context}: strides {result.stride()}"
    for tensor, old in zip((dy, *arguments[:3]), before, strict=True):
        assert_bits_equal(tensor, old, signed_zero=True, context=f"{context}: an argument was modified")
    return want
