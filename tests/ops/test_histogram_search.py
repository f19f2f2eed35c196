"""search_histogram_range against torch.ao's search: the same range, bit for bit."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.ao.quantization import HistogramObserver as Stock

import qkernels.ops as ops
from tests.histogram_batches import KINDS, Batch, batches, stock_step
from tests.lanes.sync_counter import count_host_reads
from tests.oracles import INTERPRETER, assert_bits_equal
from tests.strategies import DETERMINISTIC

pytestmark = pytest.mark.interpreter


def check(stock: Stock, device: torch.device, context: str = "") -> tuple[float, float]:
    """Our search on torch.ao's state gives torch.ao's range."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        low_ref, high_ref = stock._non_linear_param_search()
    state = (stock.histogram, stock.min_val, stock.max_val)
    low, high = ops.search_histogram_range(*(t.to(device) for t in state), stock.dst_nbins)
    assert_bits_equal(low, low_ref, context=f"{context} low")
    assert_bits_equal(high, high_ref, context=f"{context} high")
    return low.item(), high.item()


def observed(*xs: torch.Tensor, **kwargs: object) -> Stock:
    stock = Stock(**kwargs)
    for x in xs:
        stock_step(stock, x)
    return stock


@settings(DETERMINISTIC, max_examples=8 if INTERPRETER else 30)
@given(
    sequence=st.lists(batches(tuple(k for k in KINDS if "finite" not in k)), min_size=1, max_size=3),
    bins=st.sampled_from((2048, 2048, 512, 100, 3, 2)),
    dtype=st.sampled_from((torch.quint8, torch.qint8, torch.uint16)),
)
def test_histograms_of_sequences(sequence: list[Batch], bins: int, dtype: torch.dtype, device: torch.device):
    stock = observed(*(batch.tensor() for batch in sequence), bins=bins, dtype=dtype)
    if stock.min_val <= stock.max_val:
        check(stock, device)


@settings(DETERMINISTIC, max_examples=12)  # torch.ao's search takes half a second where it takes every step
@given(
    counts=st.lists(st.sampled_from((0, 0, 0, 1, 2, 5, 100, 10000, 0.25, 3.0625)), min_size=2, max_size=300),
    low=st.sampled_from((-1.0, 0.0, -3.7, 1000.0, -1e-4)),
    width=st.sampled_from((1.0, 1e-3, 2.5, 900.0)),
)
def test_arbitrary_histograms(counts: list[float], low: float, width: float, device: torch.device):
    """Sparse, with hot bins, empty: where the walk takes long strides and stands still for long."""
    stock = Stock(bins=len(counts))
    stock.histogram = torch.tensor(counts, dtype=torch.float32)
    stock.min_val, stock.max_val = torch.tensor(low), torch.tensor(low + width)
    check(stock, device)


@pytest.mark.parametrize("width", [3.5, 3e-16])
@pytest.mark.parametrize("seed", range(2))
def test_bins_smaller_than_a_step(seed: int, width: float, device: torch.device):
    """One step of the walk, 1e-5 of the mass, passes several bins; with errors of 0 the walk is taken to its end."""
    rng = np.random.default_rng(seed)
    distance = np.abs(np.linspace(-1, 1, 256)) ** 3
    stock = Stock(bins=256)
    stock.histogram = torch.tensor(rng.integers(0, 60, 256) + 1e6 * (rng.random(256) > distance), dtype=torch.float32)
    stock.min_val, stock.max_val = torch.tensor(-0.6 * width), torch.tensor(0.4 * width)
    check(stock, device)


SHAPES = {
    "normal": torch.randn(3000, generator=torch.Generator().manual_seed(1)),
    "relu": torch.randn(3000, generator=torch.Generator().manual_seed(2)).relu(),
    "an outlier": torch.cat([torch.randn(3000, generator=torch.Generator().manual_seed(3)), torch.tensor([300.0])]),
    "two peaks": torch.cat([torch.linspace(-5, -4.9, 999), torch.linspace(4.9, 5, 1999)]),
    "uniform": torch.linspace(-1, 1, 4096),
    "two values": torch.tensor([0.0] * 99 + [1.0]),
    "one value": torch.tensor([2.5] * 7),
    "zeros": torch.zeros(5),
    "subnormal": torch.tensor([0.0, 1e-45]),
    "tiny": torch.linspace(0, 3e-38, 100),
    "1e12": torch.linspace(-1e12, 2e12, 100),
    "errors overflow": torch.linspace(-5e15, 5e15, 1000),
    "errors underflow": torch.linspace(-1e-16, 2e-16, 500),  # all 0, so that the walk is taken to its end
    "1e30": torch.linspace(-1e30, 2e30, 100),
    "largest": torch.tensor([0.0, 3.4e38, 1.0]),
    "width overflows": torch.tensor([-3e38, 3e38]),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, device: torch.device):
    check(observed(SHAPES[name]), device, name)


@pytest.mark.parametrize("dtype", [torch.int16, torch.qint32], ids=str)
@pytest.mark.parametrize("name", ["normal", "relu", "uniform", "tiny"])
def test_many_codes(name: str, dtype: torch.dtype, device: torch.device):
    check(observed(SHAPES[name], bins=256, dtype=dtype), device, name)


def test_a_state_that_saw_nothing(device: torch.device):
    ends = torch.tensor(float("inf"), device=device), torch.tensor(-float("inf"), device=device)
    low, high = ops.search_histogram_range(torch.zeros(16, device=device), *ends, 256)
    assert (low.item(), high.item()) == (float("inf"), -float("inf"))


def test_channels_are_searched_each_for_itself(device: torch.device):
    stocks = [observed(SHAPES[name]) for name in ("normal", "relu", "an outlier", "one value", "two peaks")]
    stacked = [
        torch.stack([getattr(s, name) for s in stocks]).to(device) for name in ("histogram", "min_val", "max_val")
    ]
    low, high = ops.search_histogram_range(*stacked, 256)
    for channel, stock in enumerate(stocks):
        assert (low[channel].item(), high[channel].item()) == check(stock, device)


@pytest.mark.parametrize("on", [0, 1])
def test_the_flag(on: int, device: torch.device):
    stock = observed(SHAPES["an outlier"])
    state = [t.to(device) for t in (stock.histogram, stock.min_val, stock.max_val)]
    low, high = ops.search_histogram_range(*state, 256, torch.tensor([on], dtype=torch.uint8, device=device))
    assert (low.item(), high.item()) == (check(stock, device) if on else (stock.min_val.item(), stock.max_val.item()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_state_in_other_dtypes(dtype: torch.dtype, device: torch.device):
    stock = observed(torch.linspace(-1, 1, 65), bins=16)
    state = [t.to(device, dtype) for t in (stock.histogram, stock.min_val, stock.max_val)]
    low, high = ops.search_histogram_range(*state, 256)
    assert low.dtype == high.dtype == dtype
    assert (low.item(), high.item()) == check(stock, device)


def test_the_state_is_left_alone(device: torch.device):
    stock = observed(SHAPES["normal"])
    state = [t.to(device) for t in (stock.histogram, stock.min_val, stock.max_val)]
    kept = [t.clone() for t in state]
    low, high = ops.search_histogram_range(*state, 256)
    for tensor, before in zip(state, kept, strict=True):
        assert_bits_equal(tensor, before.cpu())
    assert low.data_ptr() != state[1].data_ptr() and high.data_ptr() != state[2].data_ptr()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"histogram": torch.zeros(2, 2, 2)}, ValueError, r"histogram must have shape \(bins,\) or \(C, bins\)"),
        ({"histogram": torch.zeros(8, dtype=torch.int32)}, TypeError, "histogram must be float16"),
        ({"quant_bins": 1}, ValueError, "quant_bins must be at least 2; got 1"),
        ({"max_val": torch.zeros(2)}, ValueError, "max_val must have 1 element"),
        ({"enabled": torch.zeros(1)}, TypeError, "enabled must be uint8"),
    ],
)
def test_errors(change: dict, error: type, text: str, device: torch.device):
    arguments = {"histogram": torch.zeros(8), "min_val": torch.zeros(()), "max_val": torch.ones(()), "quant_bins": 256}
    given_ = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in {**arguments, **change}.items()}
    with pytest.raises(error, match=f"search_histogram_range: {text}"):
        ops.search_histogram_range(**given_)


@pytest.mark.interpreter_only
def test_nothing_is_read_on_the_host():
    stock = observed(SHAPES["normal"])
    with count_host_reads() as reads:
        ops.search_histogram_range(stock.histogram, stock.min_val, stock.max_val, 256)
        ops.observe_histogram_(SHAPES["relu"], stock.histogram, stock.min_val, stock.max_val)
        ops.histogram(SHAPES["relu"], 64, stock.min_val, stock.max_val)
    assert reads == {}


# ------------------------------------------------------------------------------------------------------- the walk


def plain_walk(cumulative: np.ndarray, total: float) -> list[tuple[int, int]]:
    """torch.ao's loop, step by step: every range it would come to."""
    walk = []
    alpha, beta, start, end = 0.0, 1.0, 0, len(cumulative) - 1
    while alpha < beta:
        left, right = start, end
        while left < end and cumulative[left] < np.float32((alpha + 1e-5) * total):
            left += 1
        while right > start and cumulative[right] > np.float32((beta - 1e-5) * total):
            right -= 1
        before = start, end
        if left - start > end - right:
            start, alpha = left, alpha + 1e-5
        else:
            end, beta = right, beta - 1e-5
        if (start, end) != before:
            walk.append((start, end))
    return walk


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 1025, 1026, 1027, 1028, 2051, 2052, 2053, 3000])
def test_the_walk_lands_on_the_step_that_moves(steps: int, device: torch.device):
    """The kernel looks 1024 steps ahead: jumps to before, to and past the borders of such blocks, and over several.

    The first step drops the last bin, which takes so many steps that the walk then stands still for as long. The step
    that moves drops one bin more, and that is the best range: the bin below is heavy, and one step later it is gone.
    """
    bins, per_step = 64, 100  # a mass of 1e5 steps, 1e7, so that every sum is exact in float32
    masses = torch.zeros(bins)
    masses[-1] = steps - 0.5
    masses[-2] = 0.8
    masses[-3] = 6900 - 1.6 * steps  # dearer than what a narrower range gains, which the last bin pays for in part
    masses[0] = 1e5 - masses.double().sum()  # more than a step: the left end stays
    stock = Stock(bins=bins)
    stock.histogram = (masses.double() * per_step).round().float()
    stock.min_val, stock.max_val, stock.dst_nbins = torch.tensor(0.0), torch.tensor(float(bins)), 8
    assert stock.histogram.sum() == 1e5 * per_step
    assert check(stock, device) == (0.0, bins - 2.0)


@pytest.mark.skipif(INTERPRETER, reason="about the CPU's code alone")
def test_every_candidate_is_evaluated_once(monkeypatch: pytest.MonkeyPatch):
    """Chunk by chunk; with errors of 0 the walk is taken to its end."""
    from qkernels.ops import histogram_search_cpu as search

    seen: list[tuple[int, int]] = []
    errors = search.errors

    def recorded(density, bin_width, quant_bins, chunk):
        seen.extend(chunk)
        return errors(density, bin_width, quant_bins, chunk)

    monkeypatch.setattr(search, "errors", recorded)
    histogram = torch.ones(300)
    found = search.search_cpu(histogram, 0.0, 1e-16, 256)
    walk = list(search.candidates(histogram.cumsum(0).tolist(), 300.0))
    assert len(walk) > 4 + 8 + 16 + 32
    assert seen == walk
    assert found[0] == pytest.approx(1e-16 / 300 * walk[-1][0], rel=1e-4)


@pytest.mark.skipif(INTERPRETER, reason="about the CPU's code alone")
@pytest.mark.parametrize("seed", range(8))
def test_jumps_miss_no_step(seed: int):
    """The walk to its very end, which the errors seldom let it reach."""
    from qkernels.ops.histogram_search_cpu import candidates

    rng = np.random.default_rng(seed)
    some = [0, 0, 0, 1, 3, 1000, 0.5] if seed % 2 else [0, 7, 30, 100, 40000]  # many steps in a bin; bins in a step
    histogram = rng.choice(some, 40 if seed % 2 else 400).astype(np.float32)
    cumulative = np.cumsum(histogram, dtype=np.float64).astype(np.float32)
    total = float(cumulative[-1])
    assert list(candidates(cumulative.tolist(), total)) == plain_walk(cumulative, total)


def test_a_histogram_may_require_a_gradient(device: torch.device) -> None:
    """It gets none, and the result requires none."""
    histogram = torch.rand(64, generator=torch.Generator().manual_seed(0)).to(device)
    ends = torch.tensor(-1.0, device=device), torch.tensor(1.0, device=device)
    expected = ops.search_histogram_range(histogram, *ends, 16)
    for search in (ops.search_histogram_range, torch.ops.qkernels.search_histogram_range):
        found = search(histogram.clone().requires_grad_(), *ends, 16)
        for value, other in zip(found, expected, strict=True):
            assert not value.requires_grad
            assert torch.equal(value, other)
