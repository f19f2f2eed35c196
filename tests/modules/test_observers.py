"""Observers after the same batches as torch.ao's: buffers and qparams equal for every dtype, scheme, range and axis."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.ao.quantization as stock
from hypothesis import given
from hypothesis import strategies as st

import qkernels.modules as ours
from tests.modules import support as s

pytestmark = pytest.mark.interpreter

STATS_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def input_dtypes() -> tuple[torch.dtype, ...]:
    return (*s.FLOATS, torch.int32, torch.uint8)


@st.composite
def actions(draw: st.DrawFn, channels: int | None, axis: int) -> list[Any]:
    """Batches, resets, checkpoints exchanged with torch.ao, casts of the observer; always a batch in it."""
    batch = s.batches(channels, axis, tuple(s.KINDS), input_dtypes())
    # Reset rebinds torch.ao's per-channel buffers to float32: casts are left out where it may follow one.
    casting = draw(st.booleans())
    other = ["exchange", "copy"] + ([*STATS_DTYPES] if casting else ["reset"])
    step = batch if s.INTERPRETER else st.one_of(batch, batch, batch, st.sampled_from(other))
    return [draw(batch), *draw(st.lists(step, min_size=1, max_size=3 if s.INTERPRETER else 6))]


def run(name: str, device: torch.device, kwargs: dict[str, Any], steps: list[Any]) -> None:
    """Both observers through the same steps, compared after each."""
    import copy

    mine, theirs = s.pair(name, device, **kwargs)
    for step in steps:
        if isinstance(step, s.Batch):
            x = step.tensor()
            given_x = x.to(device)
            assert mine(given_x) is given_x
            theirs(x)
        elif step == "reset":
            mine.reset_min_max_vals()
            theirs.reset_min_max_vals()
        elif step == "exchange":
            dtype = theirs.min_val.dtype
            mine, theirs = s.crossed(mine, theirs, lambda d=dtype: [m.to(d) for m in s.pair(name, device, **kwargs)])
        elif step == "copy":
            mine = copy.deepcopy(mine)
        else:
            mine, theirs = mine.to(step), theirs.to(step)
        s.check_state(mine, theirs)
        if s.ordered(theirs):
            s.check_qparams(mine, theirs)


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, dict[str, Any], list[Any]]:
    name = draw(st.sampled_from(s.OBSERVERS))
    kwargs = draw(s.observer_kwargs(name))
    channels, axis = None, 0
    if s.is_per_channel(name):
        channels, axis = draw(st.integers(1, 5)), draw(st.sampled_from((0, 1, 2, -1, -2)))
        kwargs["ch_axis"] = axis
    return name, kwargs, draw(actions(channels, axis))


@s.property_settings(250, 20)
@given(case=cases())
def test_random_sequences_equal_torch_ao(case: tuple[str, dict[str, Any], list[Any]], device: torch.device) -> None:
    name, kwargs, steps = case
    run(name, device, kwargs, steps)


@pytest.mark.slow
@s.property_settings(1000, 100, derandomize=False)
@given(case=cases())
def test_many_random_sequences_equal_torch_ao(
    case: tuple[str, dict[str, Any], list[Any]], device: torch.device
) -> None:
    name, kwargs, steps = case
    run(name, device, kwargs, steps)


def scheme_cases(name: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Every scheme, default and custom range, full and reduced, that torch.ao takes for this type."""
    schemes = s.PER_CHANNEL_SCHEMES if s.is_per_channel(name) else s.PER_TENSOR_SCHEMES
    ranges = ((None, None), s.quant_ranges(dtype)[0], s.quant_ranges(dtype)[1])
    found = []
    for qscheme, (low, high), reduce_range in itertools.product(schemes, ranges, (False, True)):
        kwargs = {
            "dtype": dtype, "qscheme": qscheme, "quant_min": low, "quant_max": high, "reduce_range": reduce_range
        }  # fmt: skip
        try:
            with s.quiet():
                getattr(stock, name)(**kwargs)
        except NotImplementedError:  # symmetric quint8 with reduce_range
            continue
        found.append(kwargs)
    return found


@pytest.mark.parametrize(
    "dtype", (torch.qint8, torch.quint8, torch.uint16, torch.qint32) if s.INTERPRETER else s.QUANT_DTYPES, ids=str
)
@pytest.mark.parametrize("name", s.OBSERVERS)
def test_every_dtype_scheme_and_range(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """The grid that random sequences might miss a corner of: two batches each, one of them one-sided."""
    kinds = ("positive", "normal") if dtype != torch.qint8 else ("negative", "normal")
    shape = (3, 5) if s.is_per_channel(name) else (13,)
    found = scheme_cases(name, dtype)
    assert len(found) >= 8
    for kwargs in found if not s.INTERPRETER else found[:: len(found) // 3]:
        run(name, device, kwargs, [s.Batch(kind, shape, seed=i) for i, kind in enumerate(kinds)])


@pytest.mark.parametrize("name", s.OBSERVERS)
@pytest.mark.parametrize("kind", list(s.SPECIAL_KINDS))
def test_special_values(name: str, kind: str, device: torch.device) -> None:
    """NaN and infinities reach the statistics as in torch.ao, and stay there as they do in torch.ao."""
    run(name, device, {}, [s.Batch(kind, (4, 9), seed=2), s.Batch("normal", (4, 9)), s.Batch(kind, (4, 9), seed=3)])


@pytest.mark.parametrize("stats", STATS_DTYPES, ids=str)
@pytest.mark.parametrize("name", s.OBSERVERS)
def test_cast_observers(name: str, stats: torch.dtype, device: torch.device) -> None:
    """`.half()` and friends cast statistics and eps; every later step is rounded in that type, as in torch.ao."""
    for qscheme in s.PER_CHANNEL_SCHEMES if s.is_per_channel(name) else s.PER_TENSOR_SCHEMES:
        steps = [
            stats,
            *(s.Batch(k, (3, 7), torch.float32, seed=i) for i, k in enumerate(("normal", "shifted", "large"))),
        ]
        run(name, device, {"qscheme": qscheme}, steps)


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -2, -3, -4])
@pytest.mark.parametrize("name", [n for n in s.OBSERVERS if s.is_per_channel(n)])
def test_every_axis_of_a_channels_last_batch(name: str, axis: int, device: torch.device) -> None:
    mine, theirs = s.pair(name, device, ch_axis=axis)
    for seed in range(2):
        x = s.Batch("normal", (2, 3, 4, 5), seed=seed).tensor().to(memory_format=torch.channels_last)
        mine(x.to(device))
        theirs(x)
        s.check_state(mine, theirs)
    s.check_qparams(mine, theirs)


@pytest.mark.parametrize("name", s.OBSERVERS)
def test_forward_returns_the_input_object_and_its_graph(name: str, device: torch.device) -> None:
    mine = getattr(ours, name)().to(device)
    leaf = torch.randn(3, 4, device=device, requires_grad=True)
    x = leaf * 2
    assert mine(x) is x
    x.sum().backward()
    assert torch.equal(leaf.grad, torch.full_like(leaf, 2))
    assert not mine.min_val.requires_grad
    empty = torch.empty(0, 4, device=device)
    assert mine(empty) is empty


@pytest.mark.parametrize("name", s.OBSERVERS)
def test_buffers_are_updated_in_place(name: str, device: torch.device) -> None:
    """DDP and DataParallel hold the storages: after the first batch has given the shape, they never move."""
    mine = getattr(ours, name)().to(device)
    objects = (mine.min_val, mine.max_val)
    mine(torch.randn(3, 4, device=device))
    pointers = [b.data_ptr() for b in (mine.min_val, mine.max_val)]
    versions = [b._version for b in (mine.min_val, mine.max_val)]
    for _ in range(3):
        mine(torch.randn(3, 4, device=device) * 3)
    assert objects[0] is mine.min_val and objects[1] is mine.max_val
    assert pointers == [b.data_ptr() for b in (mine.min_val, mine.max_val)]
    assert all(b._version > v for b, v in zip((mine.min_val, mine.max_val), versions, strict=True))


@pytest.mark.parametrize("name", s.OBSERVERS)
def test_reset_keeps_dtype_and_device_and_starts_over(name: str, device: torch.device) -> None:
    """torch.ao rebinds per-channel statistics to float32 on the CPU; ours stay where they were."""
    mine, theirs = s.pair(name, device)
    mine(torch.randn(3, 4, device=device) * 100)
    mine.reset_min_max_vals()
    assert mine.min_val.device.type == device.type
    x = s.Batch("normal", (5, 2)).tensor()  # another channel count: forgotten with the statistics
    mine(x.to(device))
    theirs(x)
    s.check_state(mine, theirs)
    half = getattr(ours, name)().to(device).half()
    half(torch.randn(3, 4, device=device))
    half.reset_min_max_vals()
    assert half.min_val.dtype == torch.float16


@pytest.mark.parametrize("name", s.OBSERVERS)
def test_never_observed(name: str, device: torch.device) -> None:
    """scale 1, zero point 0, shape (1,), and torch.ao's warning."""
    mine, theirs = s.pair(name, device)
    mine(torch.empty(3, 0, device=device))
    with pytest.warns(UserWarning) as said:
        scale, zero_point = mine.calculate_qparams()
    with pytest.warns(UserWarning) as said_ref:
        scale_ref, zero_point_ref = theirs.calculate_qparams()
    assert [str(w.message) for w in said] == [str(w.message) for w in said_ref]
    s.check_same(scale, scale_ref, "scale")
    s.check_same(zero_point, zero_point_ref, "zero_point")
    s.check_state(mine, theirs)


@pytest.mark.parametrize("name", s.OBSERVERS)
def test_ours_inside_torch_ao_fake_quantize(name: str, device: torch.device) -> None:
    """An observer of ours is a torch.ao observer: its FakeQuantize works with it."""
    per_channel = s.is_per_channel(name)
    kwargs = {"qscheme": torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric}
    mixed = stock.FakeQuantize(observer=getattr(ours, name), dtype=torch.qint8, **kwargs).to(device)
    theirs = stock.FakeQuantize(observer=getattr(stock, name), dtype=torch.qint8, **kwargs)
    for seed in range(2):
        x = s.Batch("normal", (3, 4), seed=seed).tensor()
        s.check_bits(mixed(x.to(device)), theirs(x), "y")
        s.check_state(mixed, theirs)
