"""Offsets past 2**31 elements: the first and the last program stay inside their tensors and reach both ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from qkernels.fake_quant import launch_fake_quant
from qkernels.minmax import Statistics, launch_minmax
from tests.lanes.huge_tensors import reach_of, sparse

pytestmark = pytest.mark.interpreter_only

# name: (shape of the storage, view of it, axis)
LAYOUTS = {
    "flat": ((2**31 + 4099,), lambda s: s, None),
    "rows": ((3, 5, 2**28 + 8), lambda s: s, 1),
    "long_runs": ((2, 2**31 + 64), lambda s: s, 0),
    "odd_runs": ((2, 2**31 + 1), lambda s: s, 0),
    "nearly_2**31": ((2, 2**31 - 16), lambda s: s, 0),  # where tl.cdiv overflows
    "cols": ((2**24 + 1, 132), lambda s: s, 1),
    "long_rows": ((2, 3, 2**30), lambda s: s, 1),
    "strided_run": ((2**31 + 8, 2), lambda s: s[:, 1], None),
    "many_rows": ((2**31 + 8, 3), lambda s: s[:, 1:], None),
}


@pytest.fixture
def huge(tmp_path: Path):
    return lambda name, shape: sparse(tmp_path / name, shape, torch.float16)


def _check(reach, *names: str, starts: bool) -> None:
    """Nothing astray; the start, or nearly the end, is reached. Programs take turns over the tiles of a channel, so the
    last program comes within as many tiles of the end as there are programs.
    """
    assert reach.astray == 0
    for name in names:
        assert name in reach.first, f"{name} was not touched"
        if starts:
            assert reach.first[name] == 0
        else:
            assert reach.last[name] >= reach.extent(name) - 2**26


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_quantize(huge, layout: str, backward: bool):
    shape, view, axis = LAYOUTS[layout]
    x = view(huge("x", shape))
    out = huge("out", x.shape)
    dy = huge("dy", x.shape) if backward else None
    channels = 1 if axis is None else x.shape[axis]
    scale, zero_point = torch.ones(channels), torch.zeros(channels, dtype=torch.int32)
    streamed = {"x": x, "out": out, **({"dy": dy} if backward else {})}
    for program in (0, -1):
        with reach_of(program, **streamed, scale=scale, zero_point=zero_point) as reach:
            launch_fake_quant(out, x, dy, scale, zero_point, -128, 127, axis=axis)
        # the flat kernel walks from the end to the start
        _check(reach, *streamed, starts=(program == -1) == (layout == "flat"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_minmax(huge, monkeypatch: pytest.MonkeyPatch, layout: str):
    shape, view, axis = LAYOUTS[layout]
    x = view(huge("x", shape))
    channels = 1 if axis is None else x.shape[axis]
    low, high, workspace = torch.empty(channels), torch.empty(channels), torch.zeros(1024, dtype=torch.int32)
    partials = torch.empty(1 << 20)
    monkeypatch.setattr(torch, "empty", lambda size, **options: partials[:size])  # the launcher's, to track it
    for program in (0, -1):
        with reach_of(program, x=x, low=low, high=high, workspace=workspace, partials=partials) as reach:
            launch_minmax(x, Statistics(low, high), axis=axis, update="store", workspace=workspace)
        _check(reach, "x", starts=program == 0)


@triton.jit
def _narrow_kernel(y_ptr, x_ptr, BLOCK: tl.constexpr):
    """Planted fault: a 32-bit product of program number and block."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))


def test_a_32_bit_offset_is_caught(huge):
    x, y = huge("x", (2**31 + 4096,)), huge("y", (2**31 + 4096,))
    with reach_of(-1, x=x, y=y) as reach:
        _narrow_kernel[(x.numel() // 4096,)](y, x, BLOCK=4096)
    assert reach.astray == 2 * 4096
