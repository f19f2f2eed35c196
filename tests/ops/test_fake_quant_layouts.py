"""fake_quantize and its backward over layouts, sizes, qparam shapes and the enabled flag; their properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qkernels.ops as qops
from tests.ops.checks import check_both
from tests.oracles import INTERPRETER, assert_bits_equal, reference_fake_quantize_backward
from tests.strategies import (
    DETERMINISTIC,
    EMPTY_LAYOUTS,
    KERNEL_DTYPES,
    LAYOUTS,
    QPARAMS,
    Layout,
    QParams,
    adversarial,
    arrays32,
    cycle,
    dtype_id,
    qparams,
    views,
)

pytestmark = pytest.mark.interpreter

FLAG_DTYPES = (torch.uint8, torch.int64, torch.int32, torch.bool)


def channel_qparams(n: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """n different quantizers: a channel that reads its neighbour's scale is seen."""
    scale = 0.01 + 0.013 * torch.arange(n, dtype=torch.float32)
    return scale.to(device), ((torch.arange(n) * 5) % 17 - 8).to(torch.int32).to(device)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_and_axis(layout: Layout, dtype: torch.dtype, device: torch.device) -> None:
    values = adversarial(QPARAMS[0], dtype)
    axes = list(layout.some_axes() if INTERPRETER or dtype != torch.float32 else layout.axes())
    if INTERPRETER and dtype != torch.float32:
        axes = axes[-1:]  # addressing does not depend on the dtype, but for the vector width: one axis is enough there
    for seed, axis in enumerate(axes):
        x = layout.fill(values, device, seed)
        scale, zero_point = channel_qparams(1 if axis is None else layout.shape[axis], device)
        check_both(x, scale, zero_point, -128, 127, axis, context=str(layout))


@pytest.mark.parametrize("layout", [x for x in LAYOUTS if len(x.shape) > 1][:: 3 if INTERPRETER else 1], ids=str)
def test_backward_of_differently_laid_out_dy(layout: Layout, device: torch.device) -> None:
    """x of one layout, dy of another: each has its own strides in the kernel, dx those of empty_like."""
    x = layout.fill(adversarial(QPARAMS[0]), device)
    dense = torch.randn(x.shape)
    order = list(range(x.dim()))[::-1]
    forms = {
        "contiguous": dense,
        "transposed": dense.permute(order).contiguous().permute(order),
        "strided": torch.randn(*x.shape[:-1], 2 * x.shape[-1])[..., 1::2],
        "expanded": torch.randn(()).expand(x.shape),
        "expanded_row": torch.randn(x.shape[-1]).expand(x.shape),
    }
    for name, dy in forms.items():
        for axis in (None, 0, -1):
            scale, zero_point = channel_qparams(1 if axis is None else x.shape[axis], device)
            args = (scale, zero_point, -128, 127, axis)
            dx = qops.fake_quantize_backward(dy.to(device), x, *args)
            assert dx.stride() == torch.empty_like(x).stride(), name
            want = reference_fake_quantize_backward(dy, x, *args)
            assert_bits_equal(dx, want, context=f"{layout} dy {name} axis {axis}")


@pytest.mark.parametrize("layout", EMPTY_LAYOUTS, ids=str)
def test_empty(layout: Layout, device: torch.device) -> None:
    for dtype in (*KERNEL_DTYPES, torch.float64):
        x = layout.fill(torch.zeros(1), device).to(dtype)
        for axis in layout.some_axes():
            scale, zero_point = channel_qparams(1 if axis is None else layout.shape[axis], device)
            y = qops.fake_quantize(x, scale, zero_point, -128, 127, axis)
            dx = qops.fake_quantize_backward(x, x, scale, zero_point, -128, 127, axis)
            for t in (y, dx):
                assert t.shape == x.shape and t.dtype == dtype and t.stride() == torch.empty_like(x).stride()


SIZES = (1, 2, 3, 31, 127, 128, 129, 1023, 1024, 1025, 2047, 2048, 2049, 4099) + (
    () if INTERPRETER else (65535, 65537, 300007)
)


@pytest.mark.parametrize("n", SIZES)
def test_sizes_around_blocks_and_the_small_tensor_path(n: int, device: torch.device) -> None:
    """Every element, at sizes around powers of two and around the CPU path's switch near 2 k; aligned and not."""
    scale, zero_point = QPARAMS[0].tensors(device)
    storage = cycle(adversarial(QPARAMS[0]), n + 4, n).to(device)
    for offset in (0, 1):
        check_both(storage[offset : offset + n], scale, zero_point, -128, 127, context=f"n {n} offset {offset}")


SHAPES_2D = ((1, 1), (1, 257), (37, 1), (3, 1025), (33, 17)) + (
    () if INTERPRETER else ((257, 1), (1025, 3), (129, 65), (33, 4096))
)


@pytest.mark.parametrize("shape", SHAPES_2D, ids=str)
def test_per_channel_shapes(shape: tuple[int, int], device: torch.device) -> None:
    x = cycle(adversarial(QPARAMS[0]), shape[0] * shape[1], 1).view(shape).to(device)
    for axis in (0, 1):
        scale, zero_point = channel_qparams(shape[axis], device)
        check_both(x, scale, zero_point, -128, 127, axis, context=f"{shape}")
        check_both(x.t(), scale, zero_point, -128, 127, 1 - axis, context=f"{shape} transposed")


def test_qparams_of_other_shapes_and_layouts(device: torch.device) -> None:
    """Per tensor: one element of any shape. Per channel: (C,) with any stride."""
    x = torch.randn(4, 6).to(device)
    want = qops.fake_quantize(x, torch.tensor([0.1]).to(device), torch.tensor([3], dtype=torch.int32).to(device), -8, 7)
    for shape in ((), (1,), (1, 1)):
        scale = torch.full(shape, 0.1, device=device)
        zero_point = torch.full(shape, 3, dtype=torch.int32, device=device)
        assert_bits_equal(qops.fake_quantize(x, scale, zero_point, -8, 7), want)
    scale, zero_point = channel_qparams(6, device)
    want = qops.fake_quantize(x, scale, zero_point, -8, 7, 1)
    strided_scale = torch.stack([scale, scale * 100], 1)[:, 0]
    strided_zero_point = torch.stack([zero_point * 0 + 99, zero_point], 1)[:, 1]
    assert strided_scale.stride() == (2,)
    assert_bits_equal(qops.fake_quantize(x, strided_scale, strided_zero_point, -8, 7, 1), want)
    dx = qops.fake_quantize_backward(x, x, strided_scale, strided_zero_point, -8, 7, 1)
    assert_bits_equal(dx, qops.fake_quantize_backward(x, x, scale, zero_point, -8, 7, 1))
    one_channel = torch.full((1,), 0.1, device=device).expand(6)
    zeros = torch.zeros(1, dtype=torch.int32, device=device).expand(6)
    assert_bits_equal(
        qops.fake_quantize(x, one_channel, zeros, -8, 7, 1), qops.fake_quantize(x, one_channel[:1], zeros[:1], -8, 7)
    )


# --------------------------------------------------------------------------------------------------------------------
# The enabled flag
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (*KERNEL_DTYPES, torch.float64), ids=dtype_id)
@pytest.mark.parametrize("flag_dtype", FLAG_DTYPES, ids=dtype_id)
def test_disabled_is_a_copy_both_ways(flag_dtype: torch.dtype, dtype: torch.dtype, device: torch.device) -> None:
    x = cycle(adversarial(QPARAMS[0], dtype), 24).to(device)
    x = torch.stack([x, x.flip(0)])
    dy = torch.randn(x.shape).to(dtype).to(device)
    for axis in (None, 0, 1):
        scale, zero_point = channel_qparams(1 if axis is None else x.shape[axis], device)
        flag = torch.ones(1, dtype=flag_dtype, device=device)
        for enabled in (flag, flag.reshape(())):
            enabled.fill_(1)
            y = qops.fake_quantize(x, scale, zero_point, -128, 127, axis, enabled)
            assert_bits_equal(y, qops.fake_quantize(x, scale, zero_point, -128, 127, axis), context="enabled")
            dx = qops.fake_quantize_backward(dy, x, scale, zero_point, -128, 127, axis, enabled)
            want = qops.fake_quantize_backward(dy, x, scale, zero_point, -128, 127, axis)
            assert_bits_equal(dx, want, context="enabled dx")
            enabled.zero_()
            y = qops.fake_quantize(x, scale, zero_point, -128, 127, axis, enabled)
            assert_bits_equal(y, x, signed_zero=True, context="disabled y")
            assert y.data_ptr() != x.data_ptr()
            dx = qops.fake_quantize_backward(dy, x, scale, zero_point, -128, 127, axis, enabled)
            assert_bits_equal(dx, dy, signed_zero=True, context="disabled dx")
            assert dx.data_ptr() != dy.data_ptr()


# --------------------------------------------------------------------------------------------------------------------
# Properties
# --------------------------------------------------------------------------------------------------------------------


@DETERMINISTIC
@given(q=qparams(), x=arrays32(finite=False))
def test_property_contract_on_random_quantizers(q: QParams, x: torch.Tensor, device: torch.device) -> None:
    scale, zero_point = q.tensors(device)
    check_both(x.to(device), scale, zero_point, q.quant_min, q.quant_max, context=f"{q}")
    check_both(x.view(1, -1).to(device), scale, zero_point, q.quant_min, q.quant_max, 0, context=f"{q}")


@DETERMINISTIC
@given(q=qparams(min_scale=1e-20, max_scale=1e20), seed=st.integers(0, 100))
def test_property_idempotent(q: QParams, seed: int, device: torch.device) -> None:
    """fq(fq(x)) == fq(x): y lies on the grid, and the grid maps to itself (codes below 2^17 keep x*inv within half)."""
    scale, zero_point = q.tensors(device)
    x = adversarial(q, finite=True, seed=seed).to(device)
    once = qops.fake_quantize(x, scale, zero_point, q.quant_min, q.quant_max)
    assert_bits_equal(qops.fake_quantize(once, scale, zero_point, q.quant_min, q.quant_max), once, context=f"{q}")


@DETERMINISTIC
@given(q=qparams(), seed=st.integers(0, 100))
def test_property_monotone_within_limits_and_on_the_grid(q: QParams, seed: int, device: torch.device) -> None:
    scale, zero_point = q.tensors(device)
    x = adversarial(q, finite=True, seed=seed).sort().values.to(device)
    y = qops.fake_quantize(x, scale, zero_point, q.quant_min, q.quant_max).cpu()
    assert (y[1:] >= y[:-1]).all(), f"{q}: not monotone"
    step = torch.tensor(q.scale)
    codes = torch.round(y.double() / step.double()) + q.zero_point
    assert codes.min() >= q.quant_min and codes.max() <= q.quant_max, f"{q}: code out of range"
    assert_bits_equal(((codes - q.zero_point).float() * step), y, context=f"{q}: off the grid")


@DETERMINISTIC
@given(layout=views(), seed=st.integers(0, 1000))
def test_property_random_views(layout: Layout, seed: int, device: torch.device) -> None:
    x = layout.fill(adversarial(QPARAMS[0]), device, seed)
    for axis in layout.some_axes():
        scale, zero_point = channel_qparams(1 if axis is None else layout.shape[axis], device)
        check_both(x, scale, zero_point, -128, 127, axis, context=f"{layout.shape} {layout.strides}")


@DETERMINISTIC
@given(order=st.permutations(range(4)), axis=st.integers(-4, 3))
def test_property_memory_order_changes_nothing(order: list[int], axis: int, device: torch.device) -> None:
    x = cycle(adversarial(QPARAMS[0]), 120, 5).reshape(3, 4, 2, 5).to(device)
    inverse = [order.index(d) for d in range(4)]
    relaid = x.permute(order).contiguous().permute(inverse)
    scale, zero_point = channel_qparams(x.shape[axis], device)
    want = qops.fake_quantize(x, scale, zero_point, -128, 127, axis)
    got = qops.fake_quantize(relaid, scale, zero_point, -128, 127, axis)
    assert got.stride() == relaid.stride()
    assert_bits_equal(got, want, context=f"{order} axis {axis}")


@DETERMINISTIC
@given(order=st.permutations(range(5)))
def test_property_permuting_channels_permutes_the_result(order: list[int], device: torch.device) -> None:
    x = cycle(adversarial(QPARAMS[0]), 5 * 7 * 3, 2).reshape(7, 5, 3).to(device)
    scale, zero_point = channel_qparams(5, device)
    y = qops.fake_quantize(x, scale, zero_point, -128, 127, 1)
    index = torch.tensor(order, device=device)
    permuted = qops.fake_quantize(x[:, index], scale[index], zero_point[index], -128, 127, 1)
    assert_bits_equal(permuted, y[:, index], context=f"{order}")


def test_deterministic(device: torch.device) -> None:
    x = torch.randn(17, 29).to(device)
    for axis in (None, 0, 1):
        scale, zero_point = channel_qparams(1 if axis is None else x.shape[axis], device)
        first = qops.fake_quantize(x, scale, zero_point, -128, 127, axis)
        for _ in range(3):
            assert_bits_equal(qops.fake_quantize(x, scale, zero_point, -128, 127, axis), first, signed_zero=True)
