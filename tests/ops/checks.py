"""One fake_quantize call, forward and backward, checked against every oracle that is defined for it."""

from __future__ import annotations

import torch

import qkernels.ops as qops
from tests.oracles import (
    INTERPRETER,
    assert_bits_equal,
    assert_cast_equal,
    reference_codes,
    reference_fake_quantize32,
    reference_fake_quantize_backward,
    torch_fake_quantize,
    torch_is_sane,
)


def check_both(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    dy: torch.Tensor | None = None,
    context: str = "",
) -> torch.Tensor:
    """Forward and backward against the contract everywhere and against torch where torch is sane; returns y."""
    arguments = (scale, zero_point, quant_min, quant_max, axis)
    context = f"{context} axis {axis}"
    before = x.clone()
    codes, _, _ = reference_codes(x, scale, zero_point, axis)
    want32 = reference_fake_quantize32(x, *arguments)
    y = qops.fake_quantize(x, *arguments)
    assert y.device == x.device and y.stride() == torch.empty_like(x).stride(), f"{context}: strides {y.stride()}"
    assert_cast_equal(y, want32, codes=codes, context=f"{context} y")
    sane = torch_is_sane(x, scale, zero_point, axis)
    cpu = [t.detach().cpu() for t in (x, scale, zero_point)]
    in_reach = quant_min <= int(zero_point.min()) and int(zero_point.max()) <= quant_max  # torch refuses others
    if in_reach:
        theirs = torch_fake_quantize(*cpu, quant_min, quant_max, axis)
        # The oracles agree with each other everywhere torch is sane, so the comparison above was with torch as well.
        assert_bits_equal(
            want32.to(x.dtype), theirs, where=sane, codes=codes, context=f"{context}: NumPy and torch disagree"
        )
        if x.device.type == "cpu" and not INTERPRETER:
            assert_bits_equal(y, theirs, where=sane, codes=codes, context=f"{context} y against torch")
    if dy is None:
        dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(x.numel())).to(x.dtype).to(x.device)
    dx = qops.fake_quantize_backward(dy, x, *arguments)
    want_dx = reference_fake_quantize_backward(dy, x, *arguments)
    assert_bits_equal(dx, want_dx, codes=codes, context=f"{context} dx")
    assert_bits_equal(x, before, signed_zero=True, context=f"{context}: x was modified")
    return y
