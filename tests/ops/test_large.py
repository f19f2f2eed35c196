"""Tensors of more than 2^31 elements, and strides that reach beyond it: 64-bit sizes and offsets."""

from __future__ import annotations

import math

import pytest
import torch

import qkernels.ops as qops
from tests.oracles import assert_bits_equal, reference_fake_quantize, reference_fake_quantize_backward

BIG = 2**31 + 17
# A stride of 2^30 elements and 4 rows: the last row starts beyond 2^31. Sparse, so pages in between stay untouched.
FAR = 2**30 + 3


def qparams(n: int, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((n,), 0.1, device=device), torch.full((n,), 3, dtype=torch.int32, device=device)


@pytest.mark.parametrize("shape", [(BIG,), (3, BIG), (BIG, 3), (1, BIG, 1)], ids=str)
def test_fakes_beyond_int32(shape: tuple[int, ...]) -> None:
    """Shapes and strides only: nothing is allocated."""
    x = torch.empty(shape, device="meta", dtype=torch.float16)
    for axis in (None, *range(len(shape))):
        n = 1 if axis is None else shape[axis]
        y = qops.fake_quantize(x, *qparams(n, "meta"), -128, 127, axis)
        assert y.shape == x.shape and y.stride() == x.stride() and y.numel() > 2**31
        low, high = qops.aminmax(x, axis)
        assert low.shape == high.shape == (() if axis is None else (n,))


@pytest.mark.interpreter
@pytest.mark.parametrize("shape", [(BIG,), (4, FAR), (1, BIG, 3), (2, 3, FAR)], ids=str)
def test_layout_plans_beyond_int32(shape: tuple[int, ...]) -> None:
    """The launch arithmetic on the host: sizes survive in full, in Python integers."""
    from qkernels.layout import Channels, Flat, plan

    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    strides = tuple(reversed(strides))
    flat = plan(shape, (strides,), None)
    assert isinstance(flat, Flat) and flat.n == math.prod(shape)
    for axis in range(len(shape)):
        channels = plan(shape, (strides,), axis)
        if shape[axis] == 1:  # one channel is the whole tensor
            assert channels == Flat(math.prod(shape))
            continue
        assert isinstance(channels, Channels)
        assert channels.channels * channels.n_rows * channels.run == math.prod(shape)
        assert channels.channels == shape[axis]


def far_apart(device: torch.device) -> torch.Tensor:
    """Rows 2^30 elements apart in a float16 storage of more than 2^31 elements (6.5 GB virtual, a few pages real)."""
    storage = torch.empty(3 * FAR + 64, dtype=torch.float16, device=device)
    x = storage.as_strided((4, 8), (FAR, 1), 5)
    x.copy_(torch.arange(32).reshape(4, 8) / 8 - 2)
    return x


@pytest.mark.interpreter
@pytest.mark.parametrize("axis", [None, 0, 1], ids=str)
def test_offsets_beyond_int32_are_addressed(axis: int | None, device: torch.device) -> None:
    """A 32-bit offset wraps to before the tensor: wrong values at best. Touched memory is a few kilobytes."""
    x = far_apart(device)
    assert (x.shape[0] - 1) * x.stride(0) > 2**31
    n = 1 if axis is None else x.shape[axis]
    scale, zero_point = qparams(n, device)
    low, high = qops.aminmax(x, axis)
    dense = x.contiguous().cpu()
    dims = [d for d in range(2) if d != axis] if axis is not None else [0, 1]
    assert_bits_equal(low, dense.amin(dims), context="min")
    assert_bits_equal(high, dense.amax(dims), context="max")
    y = qops.fake_quantize(x, scale, zero_point, -8, 7, axis)
    assert_bits_equal(y, reference_fake_quantize(dense, scale, zero_point, -8, 7, axis))
    dx = qops.fake_quantize_backward(x, x, scale, zero_point, -8, 7, axis)
    assert_bits_equal(dx, reference_fake_quantize_backward(dense, dense, scale, zero_point, -8, 7, axis))
    state = torch.full((n,), math.inf, device=device), torch.full((n,), -math.inf, device=device)
    qops.observe_minmax_(x, *state, axis=axis)
    assert_bits_equal(state[0].half().reshape(low.shape), low)
    assert_bits_equal(state[1].half().reshape(high.shape), high)


def check_dense(n: int, device: torch.device) -> None:
    """A dense tensor of n elements with landmarks beyond 2^31, checked at the landmarks and in sum."""
    x = torch.zeros(n, dtype=torch.float16, device=device)
    landmarks = {0: -1.0, 2**31 - 1: 3.0, 2**31: -4.0, n - 1: 5.0}
    for index, value in landmarks.items():
        x[index] = value
    low, high = qops.aminmax(x)
    assert (low.item(), high.item()) == (-4.0, 5.0)
    low, high = qops.aminmax(x.view(1, -1), 1) if n < 2**20 else qops.aminmax(x.view(1, -1), 0)
    assert (low[0].item(), high[0].item()) == (-4.0, 5.0)
    y = qops.fake_quantize(x, *qparams(1, device), -8, 7)
    for index, value in landmarks.items():
        want = reference_fake_quantize(torch.tensor([value]).half(), *qparams(1, "cpu"), -8, 7)
        assert_bits_equal(y[index : index + 1], want, context=f"at {index}")
    assert int((y != 0).sum()) == len(landmarks)
    dx = qops.fake_quantize_backward(
        torch.ones((), dtype=torch.float16, device=device).expand(n), x, *qparams(1, device), -8, 7
    )
    assert int((dx == 0).sum()) == len(landmarks)
    assert all(dx[i].item() == 0.0 for i in landmarks)


@pytest.mark.slow
def test_dense_beyond_int32_on_the_cpu() -> None:
    """About 30 GB of float16, masks and a float32 intermediate."""
    check_dense(BIG, torch.device("cpu"))


@pytest.mark.cuda
def test_dense_beyond_int32_on_cuda(device: torch.device) -> None:
    """4.3 GB per float16 tensor, three of them."""
    free, _ = torch.cuda.mem_get_info(device)
    if free < 16 * 2**30:
        pytest.skip(f"needs 16 GiB of free GPU memory, {free / 2**30:.1f} are free")
    check_dense(BIG, device)
