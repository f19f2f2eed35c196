"""The state of HistogramObserver: checkpoints and copies, merging, and counting in two passes."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

import qkernels.modules as ours
from tests.histogram_batches import Batch
from tests.modules import support as s
from tests.modules.histogram_support import new_pair, observed, step

pytestmark = pytest.mark.interpreter

INF = float("inf")


def test_checkpoints_in_both_directions(device: torch.device) -> None:
    mine, theirs = new_pair(device, bins=64)
    for seed in range(2):
        step(mine, theirs, Batch("normal", 500, 1.0 + seed, seed=seed).tensor(), device)
    mine, theirs = s.crossed(mine, theirs, lambda: new_pair(device, bins=64))
    s.check_state(mine, theirs)
    step(mine, theirs, Batch("normal", 500, 1.5, seed=7).tensor(), device)


def test_an_old_checkpoint(device: torch.device) -> None:
    """Before version 3 an observer that saw nothing had a range without elements."""
    for observer in new_pair(device, bins=8):
        old = observer.state_dict()
        old._metadata[""]["version"] = 2
        old["min_val"] = old["max_val"] = torch.empty(0)
        observer.load_state_dict(old)
        assert (observer.min_val.item(), observer.max_val.item()) == (INF, -INF)


def test_a_loaded_state_drops_the_remainder(device: torch.device) -> None:
    mine, _ = new_pair(device, bins=4)
    fresh = copy.deepcopy(mine.state_dict())
    mine.histogram_remainder.fill_(1.0)
    mine.load_state_dict(fresh)
    assert not mine.histogram_remainder.any()
    assert "histogram_remainder" not in fresh


def test_copies(device: torch.device) -> None:
    mine, theirs = new_pair(device, bins=64)
    step(mine, theirs, Batch("normal", 500).tensor(), device)
    file = io.BytesIO()
    torch.save(mine, file)
    file.seek(0)
    for copied in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine)), torch.load(file, weights_only=False)):
        reference = copy.deepcopy(theirs)
        step(copied, reference, Batch("normal", 500, 1.4, seed=3).tensor(), device)


def test_reset_parameters(device: torch.device) -> None:
    mine, theirs = new_pair(device, bins=64, eps=1e-3)
    mine(torch.linspace(-1, 1, 9, device=device))
    mine.to_empty(device=device)
    mine.reset_parameters()
    s.check_state(mine, theirs)
    with pytest.raises(NotImplementedError):  # as torch.ao's
        mine.reset_min_max_vals()


# ------------------------------------------------------------------------------------------ merge, two passes


def test_merged_range_and_mass_are_one_process(device: torch.device) -> None:
    parts = [observed(device, 0, 1), observed(device), observed(device, 2, 3)]
    whole = observed(device, 0, 1, 2, 3)
    parts[0].merge_(*parts[1:])
    merged = parts[0]
    s.check_same(merged.min_val, whole.min_val.cpu(), "min")
    s.check_same(merged.max_val, whole.max_val.cpu(), "max")
    assert merged.histogram.sum().item() == whole.histogram.sum().item() == 1600
    # A part goes whole to the bin of its middle, once here and up to three times there: by at most a bin either way.
    away = (merged.histogram.cumsum(0) - whole.histogram.cumsum(0)).abs()
    assert away.max() <= 2 * whole.histogram.max()
    scale, whole_scale = merged.calculate_qparams()[0], whole.calculate_qparams()[0]
    assert abs(scale.item() / whole_scale.item() - 1) < 0.05


def test_two_passes_are_exact(device: torch.device) -> None:
    """Two processes that agree on the range, then count: their sum is torch.histc of everything."""
    batches_of = [[Batch("normal", 400, 1.0 + i, seed=i).tensor() for i in part] for part in ((0, 1), (2, 3))]
    parts = [observed(device, bins=64) for _ in batches_of]
    for observer, xs in zip(parts, batches_of, strict=True):
        for x in xs:
            observer(x.to(device))
        observer.forget_counts()
    low = min(observer.min_val.item() for observer in parts)
    high = max(observer.max_val.item() for observer in parts)
    for observer, xs in zip(parts, batches_of, strict=True):
        observer.min_val.fill_(low), observer.max_val.fill_(high)
        for x in xs:
            observer(x.to(device))
    parts[0].merge_(parts[1])
    everything = torch.cat([x for xs in batches_of for x in xs])
    s.check_same(parts[0].histogram, torch.histc(everything, 64, low, high), "histogram")


def test_merging_keeps_large_counts_and_refuses_other_shapes(device: torch.device) -> None:
    mine, other = observed(device, bins=4), observed(device, bins=4)
    for observer in (mine, other):
        observer(torch.tensor([0.0, 1.0], device=device))
        observer.histogram[0] = 2.0**24
    other(torch.zeros(3, device=device))
    mine.merge_(other)
    assert mine.histogram[0].item() + mine.histogram_remainder[0].item() == 2**25 + 3
    before = s.snapshot(mine)
    with pytest.raises(
        ValueError, match=r"HistogramObserver.merge_: every histogram must have shape \(4,\); got \(5,\)"
    ):
        mine.merge_(other, observed(device, bins=5))
    s.check_untouched(mine, before)


def test_merging_channels(device: torch.device) -> None:
    xs = [torch.randn(3, 50, generator=torch.Generator().manual_seed(i)).to(device) for i in range(2)]
    parts = [ours.PerChannelHistogramObserver(bins=16).to(device) for _ in xs]
    for observer, x in zip(parts, xs, strict=True):
        observer(x)
    parts[0].merge_(parts[1])
    assert parts[0].histogram.sum(1).tolist() == [100.0] * 3
    s.check_same(parts[0].max_val, torch.stack(xs).amax((0, 2)).cpu(), "max")
