"""Heuristic launch configurations: pure functions of extents, element size and device, no timing, no compilation.

Launchers call the functions of the same names in `qkernels.autotune.lookup`, which ask here where nothing is tuned.

The thresholds come from arithmetic (registers per thread, CTAs per SM, bytes in flight) and from reading compiled
code for sm_90; none has been tuned on a GPU yet.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch

from qkernels.autotune.config import FlatConfig, TiledConfig

DEFAULT_MULTIPROCESSORS = 132  # H100 and H200; used where there is no CUDA device to ask
MAX_PARTIALS = 1024  # partials the finishing program of a flat reduction loads per step
MAX_SHARED_GROUPS = 1024  # counters a tiled reduction may need: one per group of channels that programs share


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """Number of streaming multiprocessors of a CUDA device; H200's for any other device."""
    if device.type != "cuda":
        return DEFAULT_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _power_of_two_above(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@lru_cache(maxsize=1024)
def flat_reduction(n: int, device: torch.device) -> FlatConfig:
    """Per-tensor reduction of n elements: a grid that stays resident and loops.

    A tile of 4096 float32 over 8 warps is 16 values, four 16-byte loads, per thread; with two accumulators that is
    about 64 registers, so four programs fit on a multiprocessor and the whole grid runs in one wave. Only three
    configurations exist, so that a new n hardly ever compiles a kernel.
    """
    if n <= 1024:
        return FlatConfig(1024, num_warps=4, programs=1)
    programs = min(-(-n // 4096), 4 * multiprocessors(device), MAX_PARTIALS)
    return FlatConfig(4096, num_warps=8, programs=programs, block_parts=1 if programs == 1 else MAX_PARTIALS)


def flat_elementwise(itemsize: int) -> FlatConfig:
    """Per-tensor elementwise kernel: one tile per program.

    Two 16-byte accesses per thread and operand in float32. In 16 bits one: the values widen to float32 in registers,
    and 16 of them per thread spilled in the backward.
    """
    return FlatConfig(1024, num_warps=4) if itemsize == 4 else FlatConfig(2048, num_warps=8)


@lru_cache(maxsize=1024)
def flat_accumulation(n: int, device: torch.device) -> FlatConfig:
    """Per-tensor pass that writes every element and sums: a grid that stays resident and loops.

    8 elements per thread of each operand. Two sums with their rounding errors take 32 registers per thread beside
    them, so three programs of 8 warps fit on a multiprocessor.
    """
    if n <= 1024:
        return FlatConfig(1024, num_warps=4, programs=1)
    return FlatConfig(2048, num_warps=8, programs=min(-(-n // 2048), 3 * multiprocessors(device)))


def _tile(n_rows: int, run: int, channels: int, channel_innermost: bool, itemsize: int, elements: int) -> TiledConfig:
    """One part per group, with a tile of at most `elements`: long in the fast direction, no longer than the data."""
    if channel_innermost:
        # One 128-byte line per row: whole sectors, and few enough channels per group that many programs share the work.
        lanes = min(_power_of_two_above(channels), 128 // itemsize)
        groups = -(-channels // lanes)
    else:
        lanes = min(_power_of_two_above(run), elements)
        groups = channels
    rows = min(max(elements // lanes, 1), _power_of_two_above(n_rows))
    return TiledConfig(groups, 1, rows, lanes, num_warps=8 if rows * lanes >= 2048 else 4)


def _with_parts(config: TiledConfig, n_rows: int, run: int, channel_innermost: bool, programs: int) -> TiledConfig:
    """Split every group over enough parts to reach at least `programs` programs, one tile per part at least."""
    tiles = -(-n_rows // config.block_rows) * (1 if channel_innermost else -(-run // config.block_lanes))
    return replace(config, parts=max(1, min(tiles, -(-programs // config.groups), 65535)))


@lru_cache(maxsize=1024)
def tiled_reduction(
    n_rows: int, run: int, channels: int, channel_innermost: bool, device: torch.device, itemsize: int
) -> TiledConfig:
    """Per-channel (or strided) reduction: enough parts per channel to fill the device once.

    A tile is two 16-byte loads per thread. Groups are shared by several programs only while there are fewer groups
    than programs to place, so at most MAX_SHARED_GROUPS counters are needed.
    """
    config = _tile(n_rows, run, channels, channel_innermost, itemsize, 2048 if itemsize == 4 else 4096)
    config = _with_parts(config, n_rows, run, channel_innermost, min(4 * multiprocessors(device), MAX_SHARED_GROUPS))
    if config.parts == 1:
        return config
    return replace(config, block_parts=finishing_block(config.block_lanes, channel_innermost))


def finishing_block(block_lanes: int, channel_innermost: bool) -> int:
    """Parts per step of a finishing program: enough to hide a load's latency, few enough for the registers."""
    return max(1024 // block_lanes, 1) if channel_innermost else 128


@lru_cache(maxsize=1024)
def tiled_accumulation(
    n_rows: int, run: int, channels: int, channel_innermost: bool, device: torch.device
) -> TiledConfig:
    """Per-channel (or strided) pass that writes every element and sums: enough parts to fill the device once.

    Tiles of 1024 elements over 4 warps: 8 per thread, as in `flat_accumulation`, whatever the dtype.
    """
    lanes_itemsize = 4 if channel_innermost else 1
    config = _tile(n_rows, run, channels, channel_innermost, lanes_itemsize, 1024)
    return _with_parts(config, n_rows, run, channel_innermost, 6 * multiprocessors(device))


@lru_cache(maxsize=1024)
def tiled_elementwise(
    n_rows: int, run: int, channels: int, channel_innermost: bool, device: torch.device, itemsize: int
) -> TiledConfig:
    """Per-channel (or strided) elementwise kernel: several resident waves, so that a slow program hides."""
    config = _tile(n_rows, run, channels, channel_innermost, itemsize, 1024 if itemsize == 4 else 2048)
    return _with_parts(config, n_rows, run, channel_innermost, 32 * multiprocessors(device))
