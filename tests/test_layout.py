"""Layouts against a loop over NumPy indices: every element, once, in its channel, within the promised vector width."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qkernels.layout import Channels, Flat, plan


def element_strides(array: np.ndarray) -> tuple[int, ...]:
    return tuple(s // array.itemsize for s in array.strides)


def channels_and_offsets(layout: Flat | Channels, operand: int) -> list[tuple[int, int]]:
    """(channel, offset) of every element the kernels would visit, in their order of rows, channels, runs."""
    if isinstance(layout, Flat):
        return [(0, i) for i in range(layout.n)]
    visited = []
    row_strides = layout.row_strides[operand]
    for digits in itertools.product(*(range(size) for size in reversed(layout.rows))):
        row = sum(d * s for d, s in zip(reversed(digits), row_strides, strict=True))
        for c, k in itertools.product(range(layout.channels), range(layout.run)):
            visited.append((c, row + c * layout.channel_strides[operand] + k * layout.run_strides[operand]))
    return visited


def expected(shape: tuple[int, ...], strides: tuple[int, ...], axis: int | None) -> list[tuple[int, int]]:
    return [
        (0 if axis is None else index[axis], sum(i * s for i, s in zip(index, strides, strict=True)))
        for index in np.ndindex(*shape)
    ]


@st.composite
def views(draw: st.DrawFn) -> np.ndarray:
    """A view of a dense array: permuted, sliced, with repeated dimensions."""
    ndim = draw(st.integers(0, 5))
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=ndim, max_size=ndim)))
    steps = draw(st.lists(st.integers(1, 2), min_size=ndim, max_size=ndim))
    view = np.arange(int(np.prod([n * s for n, s in zip(shape, steps, strict=True)])), dtype=np.float32)
    view = view.reshape([n * s for n, s in zip(shape, steps, strict=True)])
    view = view[tuple(slice(None, None, s) for s in steps)]
    view = view.transpose(draw(st.permutations(range(ndim))))
    if ndim < 5 and draw(st.booleans()):
        view = np.broadcast_to(view[..., None], (*view.shape, 3))
    return view


@given(views(), st.data())
def test_plan_visits_every_element_in_its_channel(x: np.ndarray, data: st.DataObject) -> None:
    axis = data.draw(st.none() | st.integers(0, x.ndim - 1)) if x.ndim else None
    out = np.empty(x.shape, np.float32)
    operands = (element_strides(out), element_strides(x))
    layout = plan(x.shape, operands, axis)
    for number, strides in enumerate(operands):
        assert sorted(channels_and_offsets(layout, number)) == sorted(expected(x.shape, strides, axis))
    # The operands are walked in step: the same position is the same element in both.
    pairs = zip(channels_and_offsets(layout, 0), channels_and_offsets(layout, 1), strict=True)
    wanted = zip(expected(x.shape, operands[0], axis), expected(x.shape, operands[1], axis), strict=True)
    assert sorted(pairs) == sorted(wanted)


@given(views(), st.data())
def test_skip_repeats_visits_every_place_once(x: np.ndarray, data: st.DataObject) -> None:
    axis = data.draw(st.none() | st.integers(0, x.ndim - 1)) if x.ndim else None
    layout = plan(x.shape, (element_strides(x),), axis, skip_repeats=True)
    visited = channels_and_offsets(layout, 0)
    assert len(visited) == len(set(visited))
    assert set(visited) == set(expected(x.shape, element_strides(x), axis))


@given(views(), st.data())
def test_vec_divides_what_it_promises(x: np.ndarray, data: st.DataObject) -> None:
    axis = data.draw(st.none() | st.integers(0, x.ndim - 1)) if x.ndim else None
    layout = plan(x.shape, (element_strides(x),), axis)
    if isinstance(layout, Flat):
        return
    fast, stride = (
        (layout.channels, layout.channel_strides[0])
        if layout.channel_innermost
        else (layout.run, layout.run_strides[0])
    )
    others = [*layout.row_strides[0], *(() if layout.channel_innermost else layout.channel_strides)]
    assert layout.vec in (1, 2, 4, 8, 16)
    if layout.vec > 1:
        assert stride == 1
    assert fast % layout.vec == 0
    assert all(other % layout.vec == 0 for other in others)


@pytest.mark.parametrize(
    ("shape", "strides", "axis", "kind"),
    [
        ((4, 8, 7, 7), (392, 49, 7, 1), None, "flat"),
        ((4, 8, 7, 7), (392, 1, 56, 8), None, "flat"),
        ((4, 8, 7, 7), (392, 49, 7, 1), 1, "runs"),
        ((4, 8, 7, 7), (392, 1, 56, 8), 1, "channels"),
        ((64, 27), (27, 1), 0, "runs"),
        ((64, 27), (27, 1), 1, "channels"),
        ((), (), None, "flat"),
        ((1,), (1,), 0, "flat"),
    ],
)
def test_common_tensors_need_one_row_dimension(
    shape: tuple[int, ...], strides: tuple[int, ...], axis: int | None, kind: str
) -> None:
    layout = plan(shape, (strides,), axis)
    if kind == "flat":
        assert isinstance(layout, Flat)
    else:
        assert isinstance(layout, Channels)
        assert layout.channel_innermost == (kind == "channels")
        assert len(layout.rows) == 1
