"""Heuristic launch configurations of the histogram kernels: pure functions, no timing; none tuned on a GPU yet."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from qkernels.autotune.heuristics import MAX_PARTIALS, multiprocessors

# Counting in a shared array through inline PTX: one shared atomic per element on CUDA with Triton 3.6 and 3.7, where
# tl.histogram takes 64 atomics per lane and tile. Off until a GPU has run it.
INLINE_PTX = False
PTX_BINS = 2048  # size of that array


@dataclass(frozen=True)
class HistogramConfig:
    """Launch of the passes over x.

    Attributes:
        block: elements per tile, a power of two.
        num_warps: warps per program.
        parts: programs per histogram.
        inline_ptx: count in a shared array through inline PTX, else by tl.histogram.
    """

    block: int
    num_warps: int
    parts: int
    inline_ptx: bool = False


@lru_cache(maxsize=1024)
def histogram_passes(n: int, channels: int, bins: int, device: torch.device, inline_ptx: bool) -> HistogramConfig:
    """Passes that count n values of each of `channels` histograms.

    A program keeps a histogram of its own and writes it once, so there are no more of them than fill the device, and
    each has a tile at least. One program fills a multiprocessor: tl.histogram takes 255 registers of 8 warps, and with
    inline PTX 32 warps share an array. Inline PTX runs once per replicated element, so a tile has no fewer elements
    than 32 lanes times warps times 8, which is a 16-byte load of 16-bit values per thread.
    """
    inline_ptx = inline_ptx and bins <= PTX_BINS
    block, warps = (8192, 32) if inline_ptx else (4096, 8)
    if bins > 2048:
        block, warps = 8192, 16
    wanted = max(multiprocessors(device) // channels, 1)
    return HistogramConfig(block, warps, min(max(n // block, 1), wanted, MAX_PARTIALS), inline_ptx)
