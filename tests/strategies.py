"""Adversarial inputs for operator tests: values, quantization parameters, memory layouts, Hypothesis strategies.

Everything is deterministic: generators are seeded by their arguments and Hypothesis is derandomized (`DETERMINISTIC`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tests.oracles import INTERPRETER

HALF_DTYPES = (torch.float16, torch.bfloat16)
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# The interpreter runs a Triton program in about a millisecond: fewer examples there, the same property.
DETERMINISTIC = settings(
    derandomize=True,
    deadline=None,
    max_examples=12 if INTERPRETER else 60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    database=None,
)


# Random ties per quantizer, beside the fixed ones around the limits and zero.
N_TIES = 8 if INTERPRETER else 48


def dtype_id(dtype: torch.dtype) -> str:
    """`torch.float16` -> `float16`, for test ids."""
    return str(dtype).removeprefix("torch.")


# --------------------------------------------------------------------------------------------------------------------
# Quantization parameters
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QParams:
    """One affine quantizer: scale and zero point as Python numbers, and the limits of the code."""

    scale: float
    zero_point: int
    quant_min: int
    quant_max: int

    def __str__(self) -> str:
        return f"s{self.scale:g}_z{self.zero_point}_{self.quant_min}..{self.quant_max}"

    def tensors(
        self, device: torch.device | str = "cpu", zero_point_dtype: torch.dtype = torch.int32
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(scale, zero_point) with one element each."""
        return (
            torch.tensor([self.scale], dtype=torch.float32, device=device),
            torch.tensor([self.zero_point], device=device).to(zero_point_dtype),
        )


QPARAMS = (
    QParams(0.0371, 3, -128, 127),  # odd zero point: rint(x*inv) + zp and rint(x*inv + zp) differ on ties
    QParams(0.1, 0, -128, 127),
    QParams(0.1, -7, -128, 127),
    QParams(1 / 3, 10, 0, 255),  # even zero point
    QParams(0.25, 128, 0, 255),  # scale a power of two: x*inv is exact, so every tie is hit exactly
    QParams(0.02, -128, -128, 127),  # extreme zero points
    QParams(0.02, 255, 0, 255),
    QParams(0.7, 7, 0, 15),
    QParams(1.3, 0, -1, 0),
    QParams(0.9, 2, 2, 2),  # one code
    QParams(1e-3, 32768, 0, 65535),
    QParams(1e-38, 0, -128, 127),
    QParams(1e-38, 5, 0, 255),
    QParams(1e30, 1, -128, 127),
    QParams(3e-5, 1, -8388608, 8388607),  # the largest limits the kernels take
    QParams(1e-40, 0, -128, 127),  # subnormal scale: its reciprocal is infinite, 0 * inf is NaN
    QParams(1e-40, 3, 0, 255),
)

# qint32: beyond 2^23 the ATen composition always runs.
QINT32 = QParams(0.1, 1, -(2**31), 2**31 - 1)

SPECIALS = (
    0.0,
    -0.0,
    1.0,
    -1.0,
    5e-324,
    1e-45,
    -1e-45,
    1e-40,
    -1e-40,
    1.1754944e-38,
    -1.1754944e-38,
    1e-30,
    6e-8,
    -6e-5,
    65504.0,
    -65504.0,
    1e19,
    -1e19,
    9.3e18,
    1e30,
    -1e30,
    3.0e38,
    -3.0e38,
    3.4028235e38,
    -3.4028235e38,
)
NON_FINITE = (math.inf, -math.inf, math.nan)


def _with_neighbours(values: np.ndarray) -> np.ndarray:
    up = np.nextafter(values, np.float32(np.inf))
    down = np.nextafter(values, np.float32(-np.inf))
    return np.concatenate([values, up, down])


def adversarial(
    q: QParams, dtype: torch.dtype = torch.float32, *, finite: bool = False, n_ties: int = N_TIES, seed: int = 0
) -> torch.Tensor:
    """1-d CPU values made to break a fake quantizer: ties, clamp borders, float neighbours of both, extremes.

    Ties are (k + .5) * scale for k around the limits, around zero and at random in between.
    """
    rng = np.random.default_rng(seed)
    low, high = q.quant_min - q.zero_point, q.quant_max - q.zero_point
    near = [c + d for c in (low, high, 0) for d in (-2, -1, 0, 1)]
    inside = rng.integers(low - 3, high + 4, size=n_ties)
    k = np.concatenate([np.array(near, np.float64), inside.astype(np.float64)])
    with np.errstate(over="ignore"):
        ties = ((k + 0.5) * np.float64(np.float32(q.scale))).astype(np.float32)
        grid = (k * np.float64(np.float32(q.scale))).astype(np.float32)
        smooth = (rng.standard_normal(n_ties) * q.scale * max(abs(low), abs(high), 1)).astype(np.float32)
        specials = np.array(SPECIALS, np.float64).astype(np.float32)
    parts = [_with_neighbours(ties), _with_neighbours(grid), smooth, specials]
    if not finite:
        parts.append(np.array(NON_FINITE, np.float32))
    values = torch.from_numpy(np.concatenate(parts)).to(dtype)
    if finite:
        values = torch.where(torch.isfinite(values), values, torch.zeros((), dtype=dtype))
    return hide_unreadable(values)


def hide_unreadable(values: torch.Tensor) -> torch.Tensor:
    """In the interpreter lane bfloat16 subnormals become 0: Triton 3.7.1's interpreter doubles them on load."""
    if INTERPRETER and values.dtype == torch.bfloat16:
        return torch.where(values.float().abs() < 2.0**-126, torch.zeros((), dtype=values.dtype), values)
    return values


def cycle(values: torch.Tensor, n: int, seed: int = 0) -> torch.Tensor:
    """n of the values in a seeded order; every value appears when n allows it."""
    if values.numel() == 0 or n == 0:
        return values[:0].clone()
    g = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(values.numel(), generator=g) for _ in range(-(-n // values.numel()))])
    return values[order[:n]]


# --------------------------------------------------------------------------------------------------------------------
# Layouts
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """A view of a flat storage: torch.as_strided's arguments. torch knows no negative strides (flip copies)."""

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    def __str__(self) -> str:
        return self.name

    @property
    def storage_size(self) -> int:
        """Elements the storage needs, with some to spare behind the last one."""
        last = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True) if n > 0)
        return self.offset + last + 1 + 5

    def view(self, storage: torch.Tensor) -> torch.Tensor:
        """The view of this storage."""
        return storage.as_strided(self.shape, self.strides, self.offset)

    def fill(self, values: torch.Tensor, device: torch.device | str = "cpu", seed: int = 0) -> torch.Tensor:
        """A tensor of this layout with the given values (any 1-d tensor) in its storage, gaps included."""
        return self.view(cycle(values, self.storage_size, seed).to(device))

    def axes(self) -> Iterator[int | None]:
        """None, then every axis in its negative and non-negative form."""
        yield None
        yield from range(-len(self.shape), len(self.shape))

    def some_axes(self) -> Iterator[int | None]:
        """None, then every axis once, in alternating form."""
        yield None
        for d in range(len(self.shape)):
            yield d if d % 2 == 0 else d - len(self.shape)


def _contiguous(shape: tuple[int, ...], offset: int = 0, name: str | None = None) -> Layout:
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return Layout(name or "contiguous_" + "x".join(map(str, shape)), shape, tuple(reversed(strides)), offset)


LAYOUTS = (
    _contiguous((37,)),
    _contiguous((5, 13)),
    _contiguous((3, 5, 7)),
    _contiguous((2, 5, 3, 4)),
    Layout("channels_last", (2, 5, 3, 4), (60, 1, 20, 5)),
    Layout("channels_last_3d", (2, 3, 2, 3, 2), (36, 1, 18, 6, 3)),
    Layout("transposed", (5, 13), (1, 5)),
    Layout("permuted_3d", (5, 3, 4), (4, 20, 1)),
    Layout("permuted_4d", (3, 2, 4, 5), (20, 60, 1, 4)),
    Layout("sliced_rows", (4, 13), (26, 1), 13),
    Layout("sliced_columns", (5, 6), (13, 2), 1),
    Layout("sliced_both", (3, 4), (26, 3), 2),
    Layout("cropped", (3, 4, 5), (63, 9, 1), 20),
    Layout("sliced_3d", (3, 3, 3), (140, 20, 2), 7),
    Layout("sliced_5d", (2, 2, 2, 2, 3), (972, 162, 36, 9, 2), 11),
    Layout("every_second", (19,), (2,)),
    Layout("expanded_rows", (4, 7), (0, 1)),
    Layout("expanded_columns", (4, 7), (1, 0)),
    Layout("expanded_middle", (3, 4, 5), (5, 0, 1)),
    Layout("expanded_all", (3, 4), (0, 0), 1),
    Layout("overlapping_windows", (6, 5), (2, 1)),
    Layout("overlapping_1d", (3, 4, 3), (3, 2, 1)),
    _contiguous((33,), offset=1, name="unaligned_1d"),
    _contiguous((3, 9), offset=3, name="unaligned_2d"),
    _contiguous((1,)),
    _contiguous((1, 1, 1)),
    Layout("size_one_dims", (1, 6, 1, 3), (77, 3, 1000, 1)),
    Layout("zero_dim", (), ()),
    Layout("zero_dim_offset", (), (), 3),
)

EMPTY_LAYOUTS = (
    _contiguous((0,), name="empty_1d"),
    _contiguous((0, 3), name="empty_rows"),
    _contiguous((3, 0), name="empty_columns"),
    Layout("empty_strided", (2, 0, 4), (1, 2, 3)),
)


# --------------------------------------------------------------------------------------------------------------------
# Hypothesis
# --------------------------------------------------------------------------------------------------------------------


def float32s(*, finite: bool = True) -> st.SearchStrategy[float]:
    """Any float32, subnormals included; NaN and infinities on request."""
    return st.floats(width=32, allow_nan=not finite, allow_infinity=not finite, allow_subnormal=True)


def arrays32(*, finite: bool = True, min_size: int = 1, max_size: int = 40) -> st.SearchStrategy[torch.Tensor]:
    """1-d float32 tensors."""
    values = st.lists(float32s(finite=finite), min_size=min_size, max_size=max_size)
    return values.map(lambda v: torch.tensor(v, dtype=torch.float32))


@st.composite
def qparams(draw: st.DrawFn, *, min_scale: float = 1e-30, max_scale: float = 1e30) -> QParams:
    """Quantizers with up to 16-bit codes; the zero point is one of the codes."""
    low = draw(st.integers(-32768, 32767))
    high = draw(st.integers(low, min(low + 65535, 65535)))
    zero_point = draw(st.integers(low, high))
    exponent = draw(st.floats(math.log10(min_scale), math.log10(max_scale)))
    return QParams(float(np.float32(10.0**exponent)), zero_point, low, high)


@st.composite
def views(draw: st.DrawFn, *, max_dims: int = 5, max_size: int = 4) -> Layout:
    """Random strided views: permuted, with gaps, offsets, expanded dimensions; never empty."""
    ndim = draw(st.integers(0, max_dims))
    shape = [draw(st.integers(1, max_size)) for _ in range(ndim)]
    order = draw(st.permutations(range(ndim)))
    strides, step = [0] * ndim, 1
    for d in order:
        step *= draw(st.integers(1, 2))
        strides[d] = step
        step *= shape[d]
    for d in range(ndim):
        if draw(st.integers(0, 5)) == 0:
            strides[d] = 0
    return Layout("random", tuple(shape), tuple(strides), draw(st.integers(0, 3)))
