"""What launchers call: for each decision the user cache's answer, else the shipped table's, else the heuristic's.

Every function is an `lru_cache`: a launch costs a dictionary hit, and files and environment are looked at once per
process, when the first CUDA tensor arrives. Devices that are not CUDA have heuristics alone.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import TypeVar

import torch

from qkernels.autotune import cache, heuristics, tables
from qkernels.autotune.config import FlatConfig, LaunchConfig, TiledConfig
from qkernels.autotune.decision import Decision
from qkernels.autotune.environment import settings
from qkernels.autotune.machine import Machine, machine_of

Config = TypeVar("Config", bound=LaunchConfig)


@lru_cache(maxsize=1024)
def flat_reduction(n: int, device: torch.device) -> FlatConfig:
    """Per-tensor reduction of n elements on a device."""
    return _chosen("flat_reduction", (n,), device, heuristics.flat_reduction(n, device))


@lru_cache(maxsize=64)
def flat_elementwise(itemsize: int, device: torch.device) -> FlatConfig:
    """Per-tensor elementwise kernel on elements of so many bytes."""
    return _chosen("flat_elementwise", (itemsize,), device, heuristics.flat_elementwise(itemsize))


@lru_cache(maxsize=1024)
def flat_accumulation(n: int, device: torch.device) -> FlatConfig:
    """Per-tensor pass over n elements that writes every one of them and sums."""
    return _chosen("flat_accumulation", (n,), device, heuristics.flat_accumulation(n, device))


@lru_cache(maxsize=1024)
def tiled_reduction(
    n_rows: int, run: int, channels: int, channel_innermost: bool, device: torch.device, itemsize: int
) -> TiledConfig:
    """Per-channel (or strided) reduction; the extents are those of `qkernels.layout.Channels`."""
    heuristic = heuristics.tiled_reduction(n_rows, run, channels, channel_innermost, device, itemsize)
    return _chosen("tiled_reduction", (n_rows, run, channels, channel_innermost, itemsize), device, heuristic)


@lru_cache(maxsize=1024)
def tiled_accumulation(
    n_rows: int, run: int, channels: int, channel_innermost: bool, device: torch.device
) -> TiledConfig:
    """Per-channel (or strided) pass that writes every element and sums."""
    heuristic = heuristics.tiled_accumulation(n_rows, run, channels, channel_innermost, device)
    return _chosen("tiled_accumulation", (n_rows, run, channels, channel_innermost), device, heuristic)


@lru_cache(maxsize=1024)
def tiled_elementwise(
    n_rows: int, run: int, channels: int, channel_innermost: bool, device: torch.device, itemsize: int
) -> TiledConfig:
    """Per-channel (or strided) elementwise kernel."""
    heuristic = heuristics.tiled_elementwise(n_rows, run, channels, channel_innermost, device, itemsize)
    return _chosen("tiled_elementwise", (n_rows, run, channels, channel_innermost, itemsize), device, heuristic)


_FUNCTIONS = (
    *(flat_reduction, flat_elementwise, flat_accumulation),
    *(tiled_reduction, tiled_accumulation, tiled_elementwise),
)

# The tuner's: answers that precede all others, and where decisions are noted. None in every other process.
_overrides: Mapping[Decision, LaunchConfig] | None = None
_record: list[tuple[Decision, LaunchConfig]] | None = None


def _chosen(function: str, arguments: tuple[int, ...], device: torch.device, heuristic: Config) -> Config:
    tuned = tuned_for(device)
    if not tuned and _overrides is None and _record is None:
        return heuristic
    decision = Decision(function, arguments)
    config = (_overrides or {}).get(decision) or tuned.get(decision) or heuristic
    assert isinstance(config, type(heuristic))  # files are checked when they are read, overrides when they are set
    if _record is not None:
        _record.append((decision, config))
    return config


@lru_cache(maxsize=16)
def tuned_for(device: torch.device) -> Mapping[Decision, LaunchConfig]:
    """Tuned configurations of a device by decision, the user cache's before the shipped table's."""
    machine = machine_of(device)
    if machine is None or not settings().autotune:
        return {}
    return _tuned_on(machine)


@lru_cache(maxsize=16)
def _tuned_on(machine: Machine) -> Mapping[Decision, LaunchConfig]:
    try:
        shipped = tables.load(machine.gpu)
        own = cache.load(cache.cache_path(settings().cache_dir, machine), machine)
    except OSError as error:  # no sources to compare with: a frozen application
        warnings.warn(f"qkernels: tuned launch configurations are not used: {error}", RuntimeWarning, stacklevel=2)
        return {}
    return {**shipped, **{decision: tuned.config for decision, tuned in own.items()}}


def reload() -> None:
    """Forget all answers, so that the next launches look at the files again. Captured CUDA graphs keep theirs."""
    tuned_for.cache_clear()
    _tuned_on.cache_clear()
    for function in _FUNCTIONS:
        function.cache_clear()


@contextlib.contextmanager
def override(decision: Decision, config: LaunchConfig) -> Iterator[None]:
    """Answer one decision with `config` inside the block, in all threads. For the tuner.

    Raises:
        ValueError: the decision's kernels cannot take the configuration.
    """
    global _overrides
    decision.check(config)
    before = _overrides
    _overrides = {**(before or {}), decision: config}
    _forget_answers()
    try:
        yield
    finally:
        _overrides = before
        _forget_answers()


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[Decision, LaunchConfig]]]:
    """Note the decisions that launches inside the block ask for, with their answers. For the tuner."""
    global _record
    before, _record = _record, []
    _forget_answers()
    try:
        yield _record
    finally:
        _record = before
        _forget_answers()


def _forget_answers() -> None:
    for function in _FUNCTIONS:
        function.cache_clear()
