"""histogram against torch.histc, bit for bit."""

from __future__ import annotations

import pytest
import torch

import qkernels.ops as ops
from tests.oracles import INTERPRETER, assert_bits_equal

pytestmark = pytest.mark.interpreter

INF = float("inf")


@pytest.mark.parametrize("bins", [2, 3, 100, 2048, 8192])
@pytest.mark.parametrize("edges", [(-1.0, 2.0), (-1e-3, 1e-3), (0.0, 0.0), (5.0, 5.0), (0.0, 3e38), (0.0, 4e-45)])
def test_counts_are_histcs(bins: int, edges: tuple[float, float], device: torch.device):
    low, high = torch.tensor(edges[0]), torch.tensor(edges[1])
    reach = max(abs(edges[0]), abs(edges[1]), 1e-44)
    x = torch.linspace(-1.3, 1.3, 3001).mul(reach).clamp(-3.4e38, 3.4e38)
    x = torch.cat([x, low.reshape(1), high.reshape(1), low.reshape(1).nextafter(high), high.reshape(1).nextafter(low)])
    counts = ops.histogram(x.to(device), bins, low.to(device), high.to(device))
    expected = torch.histc(x, bins, edges[0], edges[1]) if edges[0] != edges[1] else _histc_of_one(x, bins, edges[0])
    assert_bits_equal(counts, expected.to(torch.int64))


def _histc_of_one(x: torch.Tensor, bins: int, value: float) -> torch.Tensor:
    """torch.histc with min == max takes the range of x; what it does to a range of one value is asked for here."""
    return torch.histc(x, bins, value - 1, value + 1)


def test_bin_borders_are_rounded_as_histcs(device: torch.device):
    """Values on, just below and just above every border, where a product with the reciprocal goes astray."""
    for seed in range(2 if INTERPRETER else 20):
        g = torch.Generator().manual_seed(seed)
        low = torch.randn((), generator=g)
        high = low + 10 ** torch.empty(()).uniform_(-6, 6, generator=g)
        borders = torch.linspace(0, 1, 2049, dtype=torch.float64) * (high - low) + low
        exact = borders.float()
        x = torch.cat([exact, exact.nextafter(torch.tensor(INF)), exact.nextafter(torch.tensor(-INF))])
        counts = ops.histogram(x.to(device), 2048, low.to(device), high.to(device))
        assert_bits_equal(counts, torch.histc(x, 2048, low.item(), high.item()).to(torch.int64))


def test_counts_leave_out_what_is_not_in_the_range(device: torch.device):
    x = torch.tensor([float("nan"), INF, -INF, -0.1, 0.0, 0.5, 1.0, 1.1], device=device)
    counts = ops.histogram(x, 4, torch.tensor(0.0, device=device), torch.tensor(1.0, device=device))
    assert counts.tolist() == [1, 0, 1, 1]


def test_counts_of_nothing(device: torch.device):
    ends = torch.tensor(0.0, device=device), torch.tensor(1.0, device=device)
    assert ops.histogram(torch.empty(0, 3, device=device), 5, *ends).tolist() == [0] * 5
    everywhere = torch.tensor(-3e38, device=device), torch.tensor(3e38, device=device)
    assert ops.histogram(torch.ones(3, device=device), 5, *everywhere).tolist() == [0] * 5  # the width overflows


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "misaligned", "0-dim"])
def test_layouts(layout: str, device: torch.device):
    base = torch.linspace(-1, 1, 35 * 40, device=device).reshape(35, 40)
    x = {
        "transposed": base.T,
        "sliced": base[::2, 1::3],
        "expanded": base[:, None, :7].expand(-1, 3, -1),
        "misaligned": base.reshape(-1)[1:],
        "0-dim": base[3, 3],
    }[layout]
    ends = torch.tensor(-1.0, device=device), torch.tensor(1.0, device=device)
    assert_bits_equal(ops.histogram(x, 33, *ends), torch.histc(x.cpu().contiguous(), 33, -1, 1).to(torch.int64))


def test_errors_of_counting(device: torch.device):
    x, end = torch.zeros(3, device=device), torch.tensor(0.0, device=device)
    with pytest.raises(ValueError, match="histogram: bins must be at least 2; got 1"):
        ops.histogram(x, 1, end, end)
    with pytest.raises(ValueError, match="histogram: low must have 1 element when axis is None"):
        ops.histogram(x, 4, torch.zeros(2, device=device), end)
    with pytest.raises(TypeError, match="histogram: high must be float16"):
        ops.histogram(x, 4, end, torch.tensor(1, device=device))
