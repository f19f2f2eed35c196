"""Where the tuner looks: configurations around the heuristic's, and which of them their compiled code rules out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import log2

import torch

from qkernels.autotune import heuristics
from qkernels.autotune.config import NUM_WARPS, FlatConfig, LaunchConfig, TiledConfig
from qkernels.autotune.decision import FUNCTIONS, Decision

FACTORS = (0.25, 0.5, 1, 2, 4)  # of a tile's size, and of the number of programs
WAVES = (1, 2, 3, 4, 5, 6, 8)  # programs per multiprocessor of a flat grid that loops
MOST = 64  # candidates beside the heuristic: some ten seconds, most of them compilation (predicted)
PER_THREAD = (1, 64)  # fewest and most elements of a tile per thread


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes.

    Attributes:
        registers: per thread.
        spills: registers spilled, as Triton counts them when it loads a kernel.
        shared: bytes of shared memory per program.
    """

    registers: int
    spills: int
    shared: int


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor offers, and how many there are.

    Attributes:
        multiprocessors: their number.
        registers: of 32 bits.
        threads: resident at once.
        shared: bytes of shared memory.
        warp_size: threads per warp.
    """

    multiprocessors: int
    registers: int = 65536
    threads: int = 2048
    shared: int = 233472
    warp_size: int = 32

    def resident(self, config: LaunchConfig, resources: Resources) -> int:
        """Programs of this configuration that fit on a multiprocessor."""
        threads = self.warp_size * config.to_dict()["num_warps"]
        by_registers = self.registers // (threads * max(resources.registers, 1))
        by_shared = self.shared // resources.shared if resources.shared else by_registers
        return min(by_registers, self.threads // threads, by_shared)


def heuristic_for(decision: Decision, device: torch.device) -> LaunchConfig:
    """The heuristic's answer, whatever is tuned."""
    arguments: dict[str, object] = dict(decision.named())
    if decision.function != "flat_elementwise":  # the one that asks no device
        arguments["device"] = device
    config: LaunchConfig = getattr(heuristics, decision.function)(**arguments)
    return config


def candidates(decision: Decision, heuristic: LaunchConfig, limits: Limits, most: int = MOST) -> list[LaunchConfig]:
    """The heuristic, then the `most` others nearest to it, in order; each once, and each valid for the decision."""
    assert isinstance(heuristic, FlatConfig | TiledConfig)
    around = (
        _flat(decision, heuristic, limits) if isinstance(heuristic, FlatConfig) else _tiled(decision, heuristic, limits)
    )
    unique = dict.fromkeys(config for config in around if _is_valid(decision, config))
    unique.pop(heuristic, None)
    return [heuristic, *sorted(unique, key=lambda config: _distance(config, heuristic))[:most]]


def prune_reason(
    decision: Decision, config: LaunchConfig, resources: Resources, heuristic: Resources, limits: Limits
) -> str | None:
    """Why the compiled code makes timing pointless; None if it does not.

    Args:
        decision: what is being decided.
        config: a candidate.
        resources: of its compiled kernel.
        heuristic: of the heuristic's kernel.
        limits: of the device.
    """
    if resources.spills > heuristic.spills:
        return f"spills {resources.spills} registers, the heuristic {heuristic.spills}"
    resident = limits.resident(config, resources)
    if resident == 0:
        return f"does not fit: {resources.registers} registers, {resources.shared} bytes of shared memory"
    if FUNCTIONS[decision.function].persistent and isinstance(config, FlatConfig):
        held = resident * limits.multiprocessors
        if config.programs > held:
            return f"{config.programs} programs in a grid meant to be resident; the device holds {held}"
    return None


def _warps(heuristic: FlatConfig | TiledConfig, elements: int, limits: Limits) -> Iterator[int]:
    for warps in (heuristic.num_warps // 2, heuristic.num_warps, heuristic.num_warps * 2):
        per_thread = elements / (limits.warp_size * max(warps, 1))
        if warps in NUM_WARPS and PER_THREAD[0] <= per_thread <= PER_THREAD[1]:
            yield warps


def _flat(decision: Decision, heuristic: FlatConfig, limits: Limits) -> Iterator[FlatConfig]:
    for factor in FACTORS:
        block = int(heuristic.block * factor)
        for warps in _warps(heuristic, block, limits):
            if decision.function == "flat_elementwise":
                yield FlatConfig(block, warps)
                continue
            most = min(-(-decision.named()["n"] // block), heuristics.MAX_PARTIALS)
            counts = (1, heuristic.programs, *(limits.multiprocessors * waves for waves in WAVES))
            for programs in sorted({min(count, most) for count in counts}):
                reduces = decision.function == "flat_reduction" and programs > 1
                yield FlatConfig(block, warps, programs, heuristics.MAX_PARTIALS if reduces else 1)


def _tiled(decision: Decision, heuristic: TiledConfig, limits: Limits) -> Iterator[TiledConfig]:
    arguments = decision.named()
    inner = bool(arguments["channel_innermost"])
    channels, run, n_rows = arguments["channels"], arguments["run"], arguments["n_rows"]
    programs = heuristic.groups * heuristic.parts
    for lane_factor in FACTORS:
        lanes = int(heuristic.block_lanes * lane_factor)
        if lanes < 1 or lanes >= 2 * (channels if inner else run):  # empty lanes only
            continue
        groups = -(-channels // lanes) if inner else channels
        for row_factor in FACTORS:
            rows = int(heuristic.block_rows * row_factor)
            if rows < 1 or rows >= 2 * n_rows:
                continue
            tiles = -(-n_rows // rows) * (1 if inner else -(-run // lanes))
            shares = {min(tiles, max(1, -(-int(programs * factor) // groups))) for factor in FACTORS}
            for warps in _warps(heuristic, rows * lanes, limits):
                for parts in sorted({1, *shares}):
                    reduces = decision.function == "tiled_reduction" and parts > 1
                    block_parts = heuristics.finishing_block(lanes, inner) if reduces else 1
                    yield TiledConfig(groups, parts, rows, lanes, warps, block_parts)


def _is_valid(decision: Decision, config: LaunchConfig) -> bool:
    try:
        decision.check(config)
    except ValueError:
        return False
    return True


def _distance(config: LaunchConfig, heuristic: LaunchConfig) -> float:
    """In factors of two, over all fields."""
    own = heuristic.to_dict()
    return sum(abs(log2(max(value, 1) / max(own[name], 1))) for name, value in config.to_dict().items())
