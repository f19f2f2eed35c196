"""Device functions of the histogram kernels, each against the operation of torch whose bits it has to give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from qkernels.histogram_bins import linspace_point, linspace_step, parts_below
from qkernels.histogram_search import _floor_quotient
from tests.oracles import assert_bits_equal

pytestmark = pytest.mark.interpreter_only

N = 512


@triton.jit
def _points_kernel(out_ptr, ends_ptr, N: tl.constexpr):
    i = tl.arange(0, 2 * N)
    low = tl.load(ends_ptr)
    high = tl.load(ends_ptr + 1)
    points = linspace_point(i, low, high, linspace_step(low, high, N), N)
    tl.store(out_ptr + i, points, mask=i <= N)


@triton.jit
def _below_kernel(out_ptr, edges_ptr, ends_ptr, N: tl.constexpr, STEPS: tl.constexpr):
    i = tl.arange(0, N)
    edge = tl.load(edges_ptr + i)
    tl.store(out_ptr + i, parts_below(edge, tl.load(ends_ptr), tl.load(ends_ptr + 1), N, STEPS))


@triton.jit
def _floor_kernel(out_ptr, numerator_ptr, divisor_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, _floor_quotient(tl.load(numerator_ptr + i), tl.load(divisor_ptr + i)))


def ranges() -> list[torch.Tensor]:
    rng = np.random.default_rng(0)
    random = [np.sort(rng.standard_normal(2) * 10.0 ** rng.integers(-6, 7)) for _ in range(20)]
    return [torch.tensor(pair, dtype=torch.float32) for pair in (*random, (1000.0, 1000.1), (0.0, 1e-40), (-3e38, 0.0))]


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="torch without fused multiply-add")
def test_points_are_torch_linspaces():
    for ends in ranges():
        out = torch.empty(N + 1)
        _points_kernel[(1,)](out, ends, N=N)
        assert_bits_equal(out, torch.linspace(ends[0].item(), ends[1].item(), N + 1), context=str(ends))


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="torch without fused multiply-add")
def test_parts_are_found_as_bucketize_finds_them():
    """Edges that are middles, and their neighbours: a middle on an edge belongs above it."""
    for ends in ranges()[:20]:
        low, high = ends.tolist()
        middles = torch.linspace(low, high, N + 1)[:-1] + 0.5 * ((ends[1] - ends[0]) / N)
        up, down = torch.tensor(float("inf")), torch.tensor(-float("inf"))
        for edges in (middles, middles.nextafter(up), middles.nextafter(down)):
            out = torch.empty(N, dtype=torch.int32)
            _below_kernel[(1,)](out, edges, ends, N=N, STEPS=N.bit_length())
            assert_bits_equal(out, torch.searchsorted(middles, edges).int(), context=str(ends))


def test_floors_are_torch_divs():
    """Quotients a hair below an integer, which the division rounds up."""
    g = torch.Generator().manual_seed(0)
    divisor = torch.rand(N, generator=g) + 0.1
    near = (torch.randint(1, 256, (N,), generator=g) * divisor).nextafter(torch.tensor(0.0))
    anywhere = torch.randn(N, generator=g) * 50
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -1e-45, 1e-45]).repeat(N)[:N]
    rounded_up = torch.floor(near / divisor) != torch.div(near, divisor, rounding_mode="floor")
    assert rounded_up.any()
    for numerator in (near, anywhere, special):
        out = torch.empty(N)
        _floor_kernel[(1,)](out, numerator, divisor, N=N)
        assert_bits_equal(out, torch.div(numerator, divisor, rounding_mode="floor"))
