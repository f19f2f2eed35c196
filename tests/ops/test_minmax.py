"""aminmax: exact in every layout, axis and dtype; NaN propagates."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qkernels.ops as qops
from tests.oracles import (
    INTERPRETER,
    assert_bits_equal,
    reference_aminmax,
    torch_aminmax,
)
from tests.strategies import (
    DETERMINISTIC,
    KERNEL_DTYPES,
    LAYOUTS,
    QPARAMS,
    Layout,
    adversarial,
    arrays32,
    dtype_id,
    views,
)

pytestmark = pytest.mark.interpreter

DTYPES = (*KERNEL_DTYPES, torch.float64)
FLAG_DTYPES = (torch.uint8, torch.int64, torch.int32, torch.bool)
VIRGIN = (math.inf, -math.inf)


def check_aminmax(x: torch.Tensor, axis: int | None, context: str) -> None:
    before = x.clone()
    low, high = qops.aminmax(x, axis=axis)
    assert low.device == x.device and high.device == x.device
    for name, oracle in (("NumPy", reference_aminmax), ("torch", torch_aminmax)):
        want_low, want_high = oracle(x, axis)
        assert_bits_equal(low, want_low, context=f"{context} axis {axis} min against {name}")
        assert_bits_equal(high, want_high, context=f"{context} axis {axis} max against {name}")
    assert_bits_equal(x, before, signed_zero=True, context=f"{context}: input was modified")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_aminmax_every_layout_and_axis(layout: Layout, dtype: torch.dtype, device: torch.device) -> None:
    values = adversarial(QPARAMS[0], dtype, finite=True)
    axes = list(layout.some_axes())
    if INTERPRETER and dtype != torch.float32:
        axes = axes[-1:]  # addressing does not depend on the dtype, but for the vector width: one axis is enough there
    for seed, axis in enumerate(axes):
        check_aminmax(layout.fill(values, device, seed), axis, str(layout))


@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x.shape], ids=str)
def test_aminmax_negative_and_positive_axes_agree(layout: Layout, device: torch.device) -> None:
    x = layout.fill(torch.randn(97), device)
    for axis in range(0, x.dim(), 2 if INTERPRETER else 1):
        for a, b in zip(qops.aminmax(x, axis), qops.aminmax(x, axis - x.dim()), strict=True):
            assert_bits_equal(a, b, context=f"{layout} axis {axis}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("axis", [None, 0, 1, -1], ids=str)
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf], ids=str)
def test_aminmax_special_value_reaches_its_channel_only(
    special: float, axis: int | None, dtype: torch.dtype, device: torch.device
) -> None:
    # First, last, and in between: a partial reduction that loses NaN does so at one particular place.
    n = 9 if INTERPRETER else 37
    for position in ((0, 0, 0), (4, n - 1, 1), (2, n // 2, 1), (4, 0, 0)):
        x = torch.randn(5, n, 2).to(dtype)
        x[position] = special
        check_aminmax(x.to(device), axis, f"{special} at {position}")


def test_aminmax_of_nan_and_inf_only(device: torch.device) -> None:
    for fill in (math.nan, math.inf, -math.inf):
        x = torch.full((3, 40), fill, device=device)
        for axis in (None, 0, 1):
            check_aminmax(x, axis, f"all {fill}")


SIZES_1D = (1, 2, 31, 127, 128, 129, 1023, 1024, 1025) + (() if INTERPRETER else (4099, 65535, 65537, 300007))


@pytest.mark.parametrize("n", SIZES_1D)
def test_aminmax_extreme_is_found_at_every_end(n: int, device: torch.device) -> None:
    """A block boundary that is off by one loses the first or the last element of some block."""
    for offset in (0, 1):
        storage = torch.zeros(n + offset + 3, device=device)
        storage[n + offset :] = 1e9  # behind the view: must not be read into the result
        storage[:offset] = -1e9
        x = storage[offset : offset + n]
        for position in {0, n // 2, n - 1}:
            x.zero_()
            x[position] = -5.0
            low, high = qops.aminmax(x)
            assert (low.item(), high.item()) == (-5.0, -5.0 if n == 1 else 0.0), (n, offset, position)
            x[position] = 7.0
            low, high = qops.aminmax(x)
            assert (low.item(), high.item()) == (7.0 if n == 1 else 0.0, 7.0), (n, offset, position)


# One program per channel or so, each about a millisecond in the interpreter.
SHAPES_2D = ((1, 1), (1, 257), (37, 1), (3, 1025), (33, 17)) + (
    () if INTERPRETER else ((257, 1), (1025, 3), (129, 65), (7, 4096), (64, 127))
)


@pytest.mark.parametrize("shape", SHAPES_2D, ids=str)
def test_aminmax_per_channel_shapes(shape: tuple[int, int], device: torch.device) -> None:
    g = torch.Generator().manual_seed(shape[0] * 31 + shape[1])
    x = torch.randn(shape, generator=g).to(device)
    for axis in (0, 1, None):
        check_aminmax(x, axis, f"{shape}")
        check_aminmax(x.t(), axis, f"{shape} transposed")


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=dtype_id)
def test_aminmax_keeps_dtype_shape_and_limits(dtype: torch.dtype, device: torch.device) -> None:
    info = torch.finfo(dtype)
    x = torch.tensor([[info.min, info.max, 0.0], [info.tiny, -info.tiny, 0.0]], dtype=dtype, device=device)
    low, high = qops.aminmax(x)
    assert low.shape == high.shape == ()
    low, high = qops.aminmax(x, axis=-2)
    assert low.shape == high.shape == (2,) and low.dtype == high.dtype == dtype
    check_aminmax(x, None, "limits")
    check_aminmax(x, 0, "limits")


def test_aminmax_is_deterministic(device: torch.device) -> None:
    x = torch.randn(17, 29).to(device)
    for axis in (None, 0, 1):
        first = qops.aminmax(x, axis)
        for _ in range(3):
            for a, b in zip(first, qops.aminmax(x, axis), strict=True):
                assert_bits_equal(a, b, signed_zero=True)


@DETERMINISTIC
@given(a=arrays32(finite=False), b=arrays32(finite=False))
def test_property_aminmax_of_a_concatenation_is_the_combination(
    a: torch.Tensor, b: torch.Tensor, device: torch.device
) -> None:
    a, b = a.to(device), b.to(device)
    low_a, high_a = qops.aminmax(a)
    low_b, high_b = qops.aminmax(b)
    low, high = qops.aminmax(torch.cat((a, b)))
    assert_bits_equal(low, torch.minimum(low_a, low_b), context="min")
    assert_bits_equal(high, torch.maximum(high_a, high_b), context="max")


@DETERMINISTIC
@given(layout=views(), seed=st.integers(0, 1000))
def test_property_aminmax_on_random_views(layout: Layout, seed: int, device: torch.device) -> None:
    x = layout.fill(adversarial(QPARAMS[0], finite=True), device, seed)
    for axis in layout.some_axes():
        check_aminmax(x, axis, f"{layout.shape} {layout.strides}")


@DETERMINISTIC
@given(order=st.permutations(range(4)), axis=st.integers(0, 3))
def test_property_channel_extremes_do_not_depend_on_the_memory_order(
    order: list[int], axis: int, device: torch.device
) -> None:
    x = torch.randn(3, 4, 2, 5, generator=torch.Generator().manual_seed(axis), dtype=torch.float32).to(device)
    inverse = [order.index(d) for d in range(4)]
    relaid = x.permute(order).contiguous().permute(inverse)
    for a, b in zip(qops.aminmax(x, axis), qops.aminmax(relaid, axis), strict=True):
        assert_bits_equal(a, b, context=f"{order}")
