"""Pairs of histogram observers, ours and torch.ao's, that see the same batches."""

from __future__ import annotations

import torch

from tests.histogram_batches import Batch, stock_step
from tests.modules import support as s


def new_pair(device: torch.device, **kwargs: object) -> tuple[torch.nn.Module, torch.nn.Module]:
    return s.pair("HistogramObserver", device, **kwargs)


def step(mine: torch.nn.Module, theirs: torch.nn.Module, x: torch.Tensor, device: torch.device) -> None:
    """Both observe the batch; same state, same qparams."""
    mine_x = x.to(device)
    with s.quiet():
        assert mine(mine_x) is mine_x
    stock_step(theirs, x)
    s.check_state(mine, theirs)
    s.check_qparams(mine, theirs)


def observed(device: torch.device, *seeds: int, bins: int = 64) -> torch.nn.Module:
    """Ours, after a batch per seed."""
    observer, _ = new_pair(device, bins=bins)
    for seed in seeds:
        observer(Batch("normal", 400, 1.0 + seed % 3, seed=seed).tensor().to(device))
    return observer
