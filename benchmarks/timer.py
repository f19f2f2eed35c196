"""Timing: implementations take turns, so that a change of clocks or of load falls on all of them alike.

A round times every implementation once, each over as many calls as fill a slice of time, starting with another one each
round. Reported are the median and the 20th and 80th percentile over the rounds, and the ratio to ours *within* a round,
which a drift of the machine does not move.

On a CPU with one thread, CPU time is taken, which stands still while other processes have the core; with more threads,
wall time. On a GPU, CUDA events measure; the calls rotate over copies of the input that together exceed twice the L2
cache, so that every call reads memory, as it would between two other layers.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Impl = Callable[[Tensor], object]


@dataclass(frozen=True)
class Spread:
    """Median, 20th and 80th percentile of some samples."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, samples: list[float]) -> Spread:
        tenths = statistics.quantiles(samples, n=10, method="inclusive")
        return cls(statistics.median(samples), tenths[1], tenths[7])


@dataclass(frozen=True)
class Timing:
    """One implementation: microseconds per call, and how many times longer it takes than ours."""

    microseconds: Spread
    times_ours: Spread


def rotating_inputs(x: Tensor) -> list[Tensor]:
    """The input and, on a GPU, copies of it until they exceed twice the L2 cache (64 at most, for tiny inputs)."""
    if not x.is_cuda:
        return [x]
    l2_bytes = torch.cuda.get_device_properties(x.device).L2_cache_size
    copies = max(1, min(64, 2 * l2_bytes // max(1, x.nbytes) + 1))
    return [x] + [x.clone() for _ in range(copies - 1)]


def seconds_of(impl: Impl, inputs: list[Tensor], calls: int) -> float:
    """Seconds that `calls` calls take together."""
    count = len(inputs)
    if inputs[0].is_cuda:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for index in range(calls):
            impl(inputs[index % count])
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for index in range(calls):
        impl(inputs[index % count])
    return clock() - start


def calls_for(impl: Impl, inputs: list[Tensor], slice_seconds: float) -> int:
    """How many calls fill a slice of time; warms up on the way."""
    seconds_of(impl, inputs, len(inputs))
    calls = 1
    while (seconds := seconds_of(impl, inputs, calls)) < slice_seconds / 4:
        calls *= 4
    return max(1, round(calls * slice_seconds / seconds))


def time_interleaved(impls: dict[str, Impl], x: Tensor, *, rounds: int, slice_seconds: float) -> dict[str, Timing]:
    """Time every implementation on `x`; the first one named is ours."""
    names = list(impls)
    inputs = rotating_inputs(x)
    calls = {name: calls_for(impls[name], inputs, slice_seconds) for name in names}
    samples: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(seconds_of(impls[name], inputs, calls[name]) / calls[name] * 1e6)
    ours = samples[names[0]]
    return {
        name: Timing(Spread.of(samples[name]), Spread.of([b / a for a, b in zip(ours, samples[name], strict=True)]))
        for name in names
    }
