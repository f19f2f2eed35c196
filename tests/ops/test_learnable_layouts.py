"""learnable_fake_quantize over layouts, axes, sizes, qparam shapes and both flags; what does not depend on memory."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qkernels.ops as qops
from tests.ops.learnable_checks import check_learnable, gradient_for
from tests.oracles import INTERPRETER, assert_bits_equal
from tests.strategies import (
    DETERMINISTIC,
    EMPTY_LAYOUTS,
    KERNEL_DTYPES,
    LAYOUTS,
    QPARAMS,
    Layout,
    QParams,
    adversarial,
    cycle,
    dtype_id,
    views,
)

pytestmark = pytest.mark.interpreter

FLAG_DTYPES = (torch.uint8, torch.int64, torch.int32, torch.bool)
# With the interpreter few in 16 bits: only the width of an access depends on the dtype.
LAYOUT_CASES = [
    (layout, dtype)
    for dtype in KERNEL_DTYPES[::-1]
    for layout in LAYOUTS
    if not INTERPRETER or dtype == torch.float32 or (dtype == torch.float16 and "contiguous" in layout.name)
]
FINITE = adversarial(QPARAMS[0], finite=True)


def channel_qparams(n: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """n different quantizers: a channel that reads its neighbour's scale, or writes its sum, is seen."""
    scale = 0.01 + 0.013 * torch.arange(n, dtype=torch.float32)
    return scale.to(device), ((torch.arange(n) * 5) % 17 - 8.25).to(device)


def masks(seed: int) -> str:
    return ("rounded", "lsq")[seed % 2]


@pytest.mark.parametrize(("layout", "dtype"), LAYOUT_CASES, ids=str)
def test_every_layout_and_axis(layout: Layout, dtype: torch.dtype, device: torch.device) -> None:
    """x and dy in this layout, then x alone."""
    values = FINITE.to(dtype)
    values = values[values.isfinite()].clamp(-1e4, 1e4)
    axes = list(layout.some_axes() if INTERPRETER or dtype != torch.float32 else layout.axes())
    if INTERPRETER and dtype != torch.float32:
        axes = axes[-1:]
    for seed, axis in enumerate(axes):
        x = layout.fill(values, device, seed)
        qparams = channel_qparams(1 if axis is None else layout.shape[axis], device)
        dy = layout.fill(torch.randn(50).to(dtype), device, seed + 1)
        check_learnable(x, *qparams, -128, 127, 0.5, dy=dy, axis=axis, grad_mask=masks(seed), context=str(layout))
        if not INTERPRETER:
            check_learnable(x, *qparams, -128, 127, axis=axis, grad_mask=masks(seed + 1), context=str(layout))


@pytest.mark.parametrize("layout", [x for x in LAYOUTS if len(x.shape) > 1][:: 9 if INTERPRETER else 1], ids=str)
def test_dy_of_another_layout(layout: Layout, device: torch.device) -> None:
    x = layout.fill(FINITE, device)
    order = list(range(x.dim()))[::-1]
    dense = torch.randn(x.shape).to(device)
    forms = {
        "transposed": dense.permute(order).contiguous().permute(order),
        "strided": torch.randn(*x.shape[:-1], 2 * x.shape[-1]).to(device)[..., 1::2],
        "expanded": torch.randn(()).to(device).expand(x.shape),
        "expanded_row": torch.randn(x.shape[-1]).to(device).expand(x.shape),
    }
    for name, dy in forms.items():
        for axis in (None, 0, -1):
            qparams = channel_qparams(1 if axis is None else x.shape[axis], device)
            check_learnable(x, *qparams, -128, 127, dy=dy, axis=axis, context=f"{layout} dy {name}")


@pytest.mark.parametrize("layout", EMPTY_LAYOUTS, ids=str)
def test_empty_gives_zero_gradients(layout: Layout, device: torch.device) -> None:
    """Where torch's operators give scale and zero point themselves; also where there is no channel at all."""
    for dtype, grad_mask in itertools.product((*KERNEL_DTYPES, torch.float64), ("rounded", "lsq")):
        x = layout.fill(torch.zeros(1), device).to(dtype)
        for axis in layout.some_axes():
            scale, zero_point = channel_qparams(1 if axis is None else layout.shape[axis], device)
            arguments = (x, scale, zero_point, -128, 127, 1.0, axis, None, grad_mask)
            y = qops.learnable_fake_quantize(*arguments)
            dx, dscale, dzero_point = qops.learnable_fake_quantize_backward(x, *arguments)
            for t in (y, dx):
                assert t.shape == x.shape and t.dtype == dtype and t.stride() == torch.empty_like(x).stride()
            for gradient in (dscale, dzero_point):
                assert_bits_equal(gradient, torch.zeros(scale.shape), signed_zero=True, context=f"axis {axis}")


def test_empty_through_autograd(device: torch.device) -> None:
    x = torch.empty(0, 3, device=device, requires_grad=True)
    scale, zero_point = (t.requires_grad_() for t in channel_qparams(3, device))
    qops.learnable_fake_quantize(x, scale, zero_point, -8, 7, axis=1).sum().backward()
    assert x.grad.shape == (0, 3) and scale.grad.tolist() == zero_point.grad.tolist() == [0.0, 0.0, 0.0]


SIZES = (1, 2, 31, 1023, 1024, 1025, 2047, 2048, 2049, 4099) + (() if INTERPRETER else (65535, 65536, 65537, 300007))


@pytest.mark.parametrize("n", SIZES)
def test_sizes_around_blocks(n: int, device: torch.device) -> None:
    """Around the blocks of the kernels and the 64 Ki pieces of the CPU path; aligned and not."""
    qparams = channel_qparams(1, device)
    storage = cycle(FINITE.clamp(-9, 9), n + 4, n).to(device)
    for offset in (0, 1):
        x = storage[offset : offset + n]
        check_learnable(x, *qparams, -128, 127, grad_mask=masks(n + offset), context=f"n {n} offset {offset}")


SHAPES_2D = ((1, 1), (1, 37), (37, 1), (1, 1025), (5, 17)) + (
    () if INTERPRETER else ((257, 1), (1025, 3), (129, 65), (33, 4096), (3, 70001), (70001, 3))
)


@pytest.mark.parametrize("shape", SHAPES_2D, ids=str)
def test_per_channel_shapes(shape: tuple[int, int], device: torch.device) -> None:
    x = cycle(FINITE.clamp(-9, 9), shape[0] * shape[1], 1).view(shape).to(device)
    for axis in (0, 1):
        qparams = channel_qparams(shape[axis], device)
        check_learnable(x, *qparams, -128, 127, axis=axis, context=f"{shape}")
        check_learnable(x.t(), *qparams, -128, 127, axis=1 - axis, context=f"{shape} transposed")


def test_qparams_of_other_shapes_and_layouts(device: torch.device) -> None:
    """Per tensor one element of any shape, per channel (C,) with any stride; each gradient has its own shape."""
    x = torch.randn(4, 6).to(device)
    for scale_shape, zero_point_shape in itertools.product(((), (1,), (1, 1)), repeat=2):
        scale = torch.full(scale_shape, 0.1, device=device)
        check_learnable(x, scale, torch.full(zero_point_shape, 2.0, device=device), -8, 7)
    scale, zero_point = channel_qparams(6, device)
    strided = torch.stack([scale, scale * 100], 1)[:, 0], torch.stack([zero_point * 0 + 99, zero_point], 1)[:, 1]
    assert strided[0].stride() == (2,)
    check_learnable(x, *strided, -8, 7, axis=1)
    check_learnable(x, scale[:1].expand(6), zero_point[:1].expand(6), -8, 7, axis=1)


# --------------------------------------------------------------------------------------------------------------------
# The flags
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (*KERNEL_DTYPES, torch.float64)[:: 2 if INTERPRETER else 1], ids=dtype_id)
@pytest.mark.parametrize("flag_dtype", FLAG_DTYPES[:: 4 if INTERPRETER else 1], ids=dtype_id)
@pytest.mark.parametrize("axis", [None, 0, 1], ids=str)
def test_flags(axis: int | None, flag_dtype: torch.dtype, dtype: torch.dtype, device: torch.device) -> None:
    """enabled 0: copies, and zero gradients; learning 0: zero gradients and nothing else; NaN and infinities too."""
    x = cycle(adversarial(QPARAMS[0], dtype), 24, 3).to(device)
    x[0], x[1] = float("nan"), float("inf")
    x = torch.stack([x, x.flip(0)])
    dy = gradient_for(x)
    scale, zero_point = channel_qparams(1 if axis is None else x.shape[axis], device)
    for on, learning in itertools.product((0, 1), repeat=2):
        flags = [torch.full(shape, v, device=device).to(flag_dtype) for shape, v in (((1,), on), ((), learning))]
        options = {"axis": axis, "enabled": flags[0], "learning": flags[1], "grad_mask": masks(on + learning)}
        check_learnable(x, scale, zero_point, -128, 127, dy=dy, context=f"{dtype}", **options)
        if on and learning:
            continue
        y = qops.learnable_fake_quantize(x, scale, zero_point, -128, 127, **options)
        dx, *sums = qops.learnable_fake_quantize_backward(dy, x, scale, zero_point, -128, 127, **options)
        if not on:
            assert_bits_equal(y, x, signed_zero=True, context="disabled y")
            assert_bits_equal(dx, dy, signed_zero=True, context="disabled dx")
            assert y.data_ptr() != x.data_ptr() and dx.data_ptr() != dy.data_ptr()
        assert not any(t.any() or torch.signbit(t).any() for t in sums), "not plain zeros"


@pytest.mark.parametrize("axis", [None, 0], ids=str)
def test_nothing_learned_whatever_comes(axis: int | None, device: torch.device) -> None:
    """A switched-off gradient is 0 even where the sum is NaN."""
    x, dy = torch.tensor([[1.0, -50.0, 0.3]], device=device), torch.tensor([[float("nan")] * 3], device=device)
    off = torch.zeros(1, dtype=torch.uint8, device=device)
    arguments = (dy, x, *channel_qparams(1, device), -8, 7, 1.0, axis)
    for flags in ({"enabled": off}, {"learning": off}):
        _, dscale, dzero_point = qops.learnable_fake_quantize_backward(*arguments, **flags)
        assert dscale.item() == dzero_point.item() == 0.0
    _, dscale, dzero_point = qops.learnable_fake_quantize_backward(*arguments)
    assert dscale.isnan().all() and dzero_point.isnan().all()


# --------------------------------------------------------------------------------------------------------------------
# Properties
# --------------------------------------------------------------------------------------------------------------------


@DETERMINISTIC
@given(layout=views(), other=st.integers(0, 5), seed=st.integers(0, 1000))
def test_property_random_views(layout: Layout, other: int, seed: int, device: torch.device) -> None:
    """Views with gaps, any order and expanded dimensions, for x and, of the same shape, for dy."""
    x = layout.fill(FINITE.clamp(-5, 5), device, seed)
    dy = Layout("dy", layout.shape, (*layout.strides[:other], *(1 for _ in layout.strides[other:])))
    dy_view = dy.fill(torch.randn(97), device, seed)
    for axis in layout.some_axes():
        qparams = channel_qparams(1 if axis is None else layout.shape[axis], device)
        context = f"{layout.shape} {layout.strides} dy {dy.strides}"
        check_learnable(x, *qparams, -128, 127, dy=dy_view, axis=axis, grad_mask=masks(seed), context=context)


@DETERMINISTIC
@given(order=st.permutations(range(4)), axis=st.integers(-4, 3))
def test_property_memory_order_changes_no_bit_of_y_and_dx(order: list[int], axis: int, device: torch.device) -> None:
    """And the sums stay within their bound (check_learnable); they may add in another order."""
    x = cycle(adversarial(QPARAMS[0]), 120, 5).reshape(3, 4, 2, 5).to(device)
    inverse = [order.index(d) for d in range(4)]
    relaid = x.permute(order).contiguous().permute(inverse)
    arguments = (*channel_qparams(x.shape[axis], device), -128, 127)
    check_learnable(relaid, *arguments, axis=axis, context=f"{order}")
    y, again = (qops.learnable_fake_quantize(t, *arguments, axis=axis) for t in (x, relaid))
    assert_bits_equal(again, y)


@DETERMINISTIC
@given(bits=st.sampled_from((2, 3, 4, 8)), seed=st.integers(0, 1000))
def test_property_channels_are_independent(bits: int, seed: int, device: torch.device) -> None:
    """Each channel's values are those of its own tensor: per channel is many times per tensor."""
    q = QParams(0.1, 0, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    x = cycle(adversarial(q), 3 * 40, seed).reshape(3, 40).to(device)
    scale, zero_point = channel_qparams(3, device)
    limits = (q.quant_min, q.quant_max)
    check_learnable(x, scale, zero_point, *limits, axis=0, grad_mask=masks(seed))
    y = qops.learnable_fake_quantize(x, scale, zero_point, *limits, axis=0)
    rows = [qops.learnable_fake_quantize(x[c], scale[c], zero_point[c], *limits) for c in range(3)]
    assert_bits_equal(y, torch.stack(rows))


# One program, and several that share their channels, in every kernel; the interpreter takes a while per program.
MANY = ((301,), (7, 5), (4200,), (2, 2100)) if INTERPRETER else ((301,), (17, 29), (4, 5000), (5000, 4), (20000,))


@pytest.mark.parametrize("shape", MANY, ids=str)
def test_deterministic(shape: tuple[int, ...], device: torch.device) -> None:
    x, dy = (torch.randn(shape).to(device) for _ in range(2))
    for axis in (None, *range(len(shape))):
        if INTERPRETER and axis is not None and shape[axis] > 1000:
            continue  # a program for every channel or two
        arguments = (x, *channel_qparams(1 if axis is None else shape[axis], device), -32, 31, 1.0, axis)
        first = qops.learnable_fake_quantize_backward(dy, *arguments)
        for _ in range(1 if INTERPRETER else 5):
            again = qops.learnable_fake_quantize_backward(dy.clone(), x.clone(), *arguments[1:])
            for a, b in zip(again, first, strict=True):
                assert_bits_equal(a, b, signed_zero=True, context=f"axis {axis}")
