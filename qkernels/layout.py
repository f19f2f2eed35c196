"""Memory layouts: turn (shape, strides, axis) into the few index shapes the kernels understand.

A kernel never sees a tensor's dimensions. It sees either a `Flat` run of n elements, or `Channels`: for every channel
a set of rows, each row a run of elements. Dimensions that are adjacent in memory are merged first, so that nearly
every real tensor (contiguous, channels_last, transposed) ends as one row dimension, and nothing is ever copied to
bring the channel axis to the front.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

Dim = tuple[int, tuple[int, ...]]  # (size, stride in each operand)


@dataclass(frozen=True)
class Flat:
    """n elements, consecutive in every operand.

    Attributes:
        n: number of elements.
    """

    n: int


@dataclass(frozen=True)
class Channels:
    """Rows of a run of elements, per channel: element (r, c, k) is at offset(r) + c * channel_stride + k * run_stride.

    Attributes:
        rows: sizes of the row dimensions, fastest first; their product is the number of rows. At least one entry.
        row_strides: for each operand, the strides of the row dimensions.
        channels: number of channels C (1 for a per-tensor operation on a strided tensor).
        channel_strides: for each operand, the stride between channels.
        run: number of elements K of a run.
        run_strides: for each operand, the stride between the elements of a run.
        channel_innermost: True if neighbouring channels are nearer in memory than neighbouring run elements;
            the run then has one element and the kernels walk along the channels instead.
        vec: the largest power of two, at most 16, that divides the fast extent and every other stride, when the
            fast direction has stride 1 everywhere; otherwise 1. It lets the compiler prove that vector loads are safe.
    """

    rows: tuple[int, ...]
    row_strides: tuple[tuple[int, ...], ...]
    channels: int
    channel_strides: tuple[int, ...]
    run: int
    run_strides: tuple[int, ...]
    channel_innermost: bool
    vec: int

    @property
    def n_rows(self) -> int:
        """Number of rows: the product of the row sizes."""
        n = 1
        for size in self.rows:
            n *= size
        return n


Layout = Flat | Channels


def normalize_axis(axis: int, ndim: int) -> int:
    """Return `axis` in [0, ndim), or raise IndexError if it lies outside [-ndim, ndim)."""
    if not -ndim <= axis < ndim:
        raise IndexError(axis)
    return axis % ndim


def _merge(dims: list[Dim]) -> list[Dim]:
    """Merge neighbours (slow, fast) whose strides chain in every operand. Input and output are slowest first."""
    merged: list[Dim] = []
    for size, strides in dims:
        if merged:
            slow_size, slow_strides = merged[-1]
            if all(slow == size * fast for slow, fast in zip(slow_strides, strides, strict=True)):
                merged[-1] = (slow_size * size, strides)
                continue
        merged.append((size, strides))
    return merged


def _vec(extent: int, fast_strides: Sequence[int], others: Sequence[int]) -> int:
    if any(stride != 1 for stride in fast_strides) or extent >= 2**31:
        return 1  # kernels multiply the extent back by vec, in 32 bits if extent // vec fits
    vec = 16
    while vec > 1 and (extent % vec or any(stride % vec for stride in others)):
        vec //= 2
    return vec


@lru_cache(maxsize=4096)
def plan(
    shape: tuple[int, ...],
    strides: tuple[tuple[int, ...], ...],
    axis: int | None,
    skip_repeats: bool = False,
) -> Layout:
    """Choose the kernel layout for operands of one shape.

    Args:
        shape: the common shape. No dimension may be 0.
        strides: the strides of each operand, in elements. The first operand decides the order in which memory is
            walked: give the tensor that is written, or the only one that is read.
        axis: channel axis in [0, len(shape)), or None for one group over the whole tensor.
        skip_repeats: visit elements that an expanded (stride 0) dimension repeats only once. Right for idempotent
            reductions such as min and max; wrong for anything that writes or sums per element.

    Returns:
        `Flat` when axis is None (or has one channel) and all operands are dense in the same order; else `Channels`.
    """
    n_ops = len(strides)
    if axis is None or shape[axis] == 1:
        channel: Dim = (1, (0,) * n_ops)
        axis = None
    else:
        channel = (shape[axis], tuple(s[axis] for s in strides))
    dims = [(size, tuple(s[d] for s in strides)) for d, size in enumerate(shape) if d != axis and size != 1]
    if skip_repeats:
        dims = [(size, st) for size, st in dims if any(st)]
    dims.sort(key=lambda dim: dim[1], reverse=True)
    dims = _merge(dims)

    if channel[0] == 1 and (not dims or (len(dims) == 1 and all(st == 1 for st in dims[0][1]))):
        return Flat(dims[0][0] if dims else 1)

    channel_innermost = channel[0] > 1 and (not dims or channel[1][0] < dims[-1][1][0])
    run: Dim = (1, (1,) * n_ops) if channel_innermost or not dims else dims.pop()
    rows = [*reversed(dims)] or [(1, (0,) * n_ops)]
    row_strides = tuple(tuple(st[op] for _, st in rows) for op in range(n_ops))
    fast, slow = (channel, run) if channel_innermost else (run, channel)
    others = [stride for per_op in row_strides for stride in per_op]
    if not channel_innermost:
        others.extend(slow[1])
    return Channels(
        rows=tuple(size for size, _ in rows),
        row_strides=row_strides,
        channels=channel[0],
        channel_strides=channel[1],
        run=run[0],
        run_strides=run[1],
        channel_innermost=channel_innermost,
        vec=_vec(fast[0], fast[1], others),
    )
