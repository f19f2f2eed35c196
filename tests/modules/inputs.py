"""Inputs of the module tests: batches small to print and to shrink, and constructor arguments that torch.ao takes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"

OBSERVERS = (
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "PerChannelMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
)
FAKE_QUANTIZERS = ("FakeQuantize", "FusedMovingAvgObsFakeQuantize")
PER_TENSOR_SCHEMES = (torch.per_tensor_affine, torch.per_tensor_symmetric)
PER_CHANNEL_SCHEMES = (
    torch.per_channel_affine,
    torch.per_channel_symmetric,
    torch.per_channel_affine_float_qparams,
)
QUANT_DTYPES = (
    torch.qint8,
    torch.quint8,
    torch.quint4x2,
    torch.qint32,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.float8_e5m2,
    torch.float8_e4m3fn,
    torch.uint16,
)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
EPS = torch.finfo(torch.float32).eps


def is_per_channel(name: str) -> bool:
    return "PerChannel" in name


def _normal(shape: tuple[int, ...], g: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


FINITE_KINDS: dict[str, Callable[[tuple[int, ...], torch.Generator], torch.Tensor]] = {
    "normal": _normal,
    "shifted": lambda s, g: _normal(s, g) * 0.5 + 3,
    "positive": lambda s, g: _normal(s, g).abs() + 1e-3,
    "negative": lambda s, g: -_normal(s, g).abs() - 1e-3,
    "constant": lambda s, g: torch.full(s, float(torch.randn((), generator=g)), dtype=torch.float64),
    "zeros": lambda s, g: torch.zeros(s, dtype=torch.float64),
    "signed zeros": lambda s, g: torch.zeros(s, dtype=torch.float64) * _normal(s, g),
    "ties": lambda s, g: (_normal(s, g) * 8).round() * 0.25 + 0.125,
    "tiny": lambda s, g: _normal(s, g) * 1e-6,
    "subnormal": lambda s, g: _normal(s, g) * 1e-41,
    "large": lambda s, g: _normal(s, g) * 1e4,
    "huge": lambda s, g: _normal(s, g).clamp(-4, 4) * 1e36,
    "spread": lambda s, g: _normal(s, g) * 10.0 ** torch.randint(-12, 12, s, generator=g),
}
SPECIAL_KINDS: dict[str, Callable[[tuple[int, ...], torch.Generator], torch.Tensor]] = {
    "overflowing": lambda s, g: _normal(s, g).sign() * 3.3e38,
    "infinite": lambda s, g: torch.where(_normal(s, g) > 1, float("inf"), _normal(s, g)),
    "minus infinite": lambda s, g: torch.where(_normal(s, g) > 1, -float("inf"), _normal(s, g)),
    "nan": lambda s, g: torch.where(_normal(s, g) > 1, float("nan"), _normal(s, g)),
}
KINDS = {**FINITE_KINDS, **SPECIAL_KINDS}
LAYOUTS = ("contiguous", "reversed", "sliced", "expanded")


@dataclass(frozen=True)
class Batch:
    """One input, small to print and to shrink: the values come from the seed."""

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    seed: int = 0

    def tensor(self) -> torch.Tensor:
        g = torch.Generator().manual_seed(self.seed)
        values = KINDS[self.kind](self.shape, g).float()  # what float32 cannot hold would round twice
        limit = torch.finfo(self.dtype).max if self.dtype.is_floating_point else torch.iinfo(self.dtype).max
        if self.kind in FINITE_KINDS:
            values = values.clamp(-min(limit, 3e38), min(limit, 3e38))
        if not self.dtype.is_floating_point:
            values = values.nan_to_num(0, 100, -100).clamp(0 if self.dtype == torch.uint8 else -100, 100)
        return laid_out(values.to(self.dtype), self.layout)


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of x in another memory layout (for `expanded` the first row repeated)."""
    if layout == "reversed" and x.ndim:  # dimension 0 innermost: channels_last-like and transposed at once
        order = list(range(x.ndim))[::-1]
        return x.permute(order).contiguous().permute(order)
    if layout == "sliced" and x.ndim:
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), 77, dtype=x.dtype)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "expanded" and x.ndim and x.shape[0] > 1:
        return x[:1].expand(x.shape)
    return x


@st.composite
def batches(
    draw: st.DrawFn,
    channels: int | None = None,
    axis: int = 0,
    kinds: tuple[str, ...] = tuple(FINITE_KINDS),
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    empty: bool = True,
) -> Batch:
    """A batch; with `channels`, of any rank that has the axis, channels being shape[axis]."""
    top = 4 if INTERPRETER else 6
    lowest = 0 if channels is None else max(2, axis + 1 if axis >= 0 else -axis)
    shape = list(draw(st.lists(st.integers(0 if empty else 1, top), min_size=lowest, max_size=max(lowest, 4))))
    if channels is not None:
        shape[axis] = channels
    elif not INTERPRETER and draw(st.integers(0, 7)) == 0:
        shape = [53, 59]  # past the size at which the CPU implementation changes
    return Batch(
        draw(st.sampled_from(kinds)),
        tuple(shape),
        draw(st.sampled_from(dtypes)),
        draw(st.sampled_from(LAYOUTS)),
        draw(st.integers(0, 999)),
    )


RANGES: dict[str, tuple[tuple[int, int], ...]] = {
    "signed": ((-128, 127), (-127, 127), (-8, 7), (-1, 0), (-100, 27)),
    "unsigned": ((0, 255), (0, 127), (0, 15), (0, 1), (0, 200)),
}


def quant_ranges(dtype: torch.dtype) -> tuple[tuple[int, int], ...]:
    """Custom ranges inside the bounds of the type, as FakeQuantize demands."""
    signed = dtype in (torch.qint8, torch.int8, torch.int16, torch.int32, torch.qint32)
    wide = ((-2048, 2047),) if dtype in (torch.int16, torch.int32, torch.qint32) else ()
    narrow = ((0, 15), (0, 7), (0, 1)) if dtype == torch.quint4x2 else RANGES["signed" if signed else "unsigned"]
    return narrow + wide


@st.composite
def observer_kwargs(
    draw: st.DrawFn, name: str, dtypes: tuple[torch.dtype, ...] = QUANT_DTYPES, custom_range: bool | None = None
) -> dict[str, Any]:
    """Constructor arguments that torch.ao takes (for those it refuses see test_constructors.py)."""
    dtype = draw(st.sampled_from(dtypes))
    schemes = PER_CHANNEL_SCHEMES if is_per_channel(name) else PER_TENSOR_SCHEMES
    kwargs: dict[str, Any] = {"dtype": dtype, "qscheme": draw(st.sampled_from(schemes))}
    symmetric = kwargs["qscheme"] in (torch.per_tensor_symmetric, torch.per_channel_symmetric)
    if draw(st.booleans()) if custom_range is None else custom_range:
        kwargs["quant_min"], kwargs["quant_max"] = draw(st.sampled_from(quant_ranges(dtype)))
    # halving (0, 1) or (-1, 0) leaves no range, and torch.ao refuses symmetric quint8 with reduce_range
    span = kwargs.get("quant_max", 9) - kwargs.get("quant_min", 0)
    if span > 1 and not (symmetric and dtype == torch.quint8) and draw(st.booleans()):
        kwargs["reduce_range"] = True
    kwargs["eps"] = draw(st.sampled_from((EPS, 2**-12, 1e-3, 1e-5, 1e-12, 0.3)))
    if name.startswith("MovingAverage"):
        kwargs["averaging_constant"] = draw(st.sampled_from((0.01, 0.1, 1 / 3, 0.5, 1, 1.0)))
    return kwargs
