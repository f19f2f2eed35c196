"""Heuristic launch configurations of the histogram kernels: pure functions, no timing; none tuned on a GPU yet."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton

from qkernels.autotune.heuristics import MAX_PARTIALS, multiprocessors

# Whether tl.histogram takes one shared atomic per element on CUDA: from Triton 3.8 on. Before, warps vote: 12 ballots
# per element of 2048 bins, and 64 atomics per lane and tile.
SHARED_ATOMICS = tuple(int(number) for number in triton.__version__.split(".")[:2]) >= (3, 8)

# Counting in a shared array through inline PTX: one shared atomic per element on CUDA with Triton 3.6 and 3.7 too. Off
# until a GPU has run it.
INLINE_PTX = False
PTX_BINS = 2048  # size of that array

BALLOT_BINS = 2048  # of more bins, the counts that ballots keep in registers are spilled in the loop


@dataclass(frozen=True)
class HistogramConfig:
    """Launch of the passes over x.

    Attributes:
        block: elements per tile, a power of two.
        num_warps: warps per program.
        parts: programs per histogram.
        form: what counts. "histogram": tl.histogram. "inline_ptx": a shared array through inline PTX. "global": atomics
            on the program's own counts in global memory, which stay in L2.
        max_registers: registers that a thread may take, or None for the compiler's choice.
    """

    block: int
    num_warps: int
    parts: int
    form: str
    max_registers: int | None


@lru_cache(maxsize=1024)
def histogram_passes(
    n: int, channels: int, bins: int, device: torch.device, inline_ptx: bool, shared_atomics: bool
) -> HistogramConfig:
    """Passes that count n values of each of `channels` histograms.

    A program keeps a histogram of its own and writes it once, so there are no more of them than fill the device, and
    each has a tile at least. One program fills a multiprocessor:

    * One atomic per element, of inline PTX or of `shared_atomics`: 32 warps of 64 registers, all that there are. Told
      so, ptxas spills nothing; by itself it tries for 32, and room for a second program that never comes. The histogram
      is 8 KB of shared memory (32 KB for 8192 bins), and a tile has 32 KB of float32 on the way. Every copy of an
      element takes an atomic, so a tile has no fewer elements than 32 lanes times warps times 8, which is a 16-byte
      load of 16-bit values per thread.
    * Ballots: 255 registers of 8 warps. For more than `BALLOT_BINS` one global atomic per element instead, of 16 warps,
      which are all that a program may have on AMD.
    """
    inline_ptx = inline_ptx and bins <= PTX_BINS
    max_registers = None
    if inline_ptx or shared_atomics:
        form = "inline_ptx" if inline_ptx else "histogram"
        block, warps, max_registers = 8192, 32, 64
    elif bins <= BALLOT_BINS:
        form, block, warps = "histogram", 4096, 8
    else:
        form, block, warps = "global", 8192, 16
    wanted = max(multiprocessors(device) // channels, 1)
    return HistogramConfig(block, warps, min(max(n // block, 1), wanted, MAX_PARTIALS), form, max_registers)
