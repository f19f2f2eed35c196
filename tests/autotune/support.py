"""A machine that does not exist, a compiler and a timer that only pretend, and a writer for other processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qkernels.autotune import cache
from qkernels.autotune.config import FlatConfig, LaunchConfig
from qkernels.autotune.decision import Decision
from qkernels.autotune.machine import Machine, kernel_hash
from qkernels.autotune.search import Limits, Resources
from qkernels.autotune.tuner import Bench, Workload

CPU = torch.device("cpu")
MACHINE = Machine("NVIDIA H999 80GB", "sm_99", "2.99.0", "3.99.0")
LIMITS = Limits(multiprocessors=132, registers=1 << 24, threads=1 << 16)  # room for every candidate
FLAT = Decision("flat_reduction", (1 << 20,))
TILED = Decision("tiled_reduction", (32, 3136, 256, False, 4))
SMALL = Resources(registers=32, spills=0, shared=0)


def tuned(decision: Decision = FLAT, config: LaunchConfig | None = None, **changes: Any) -> cache.Tuned:
    config = config or FlatConfig(2048, num_warps=4, programs=264, block_parts=1024)
    values = {"machine": MACHINE, "kernels": kernel_hash(decision.function), "ratio": 0.9, "date": "2026-01-02"}
    return cache.Tuned(decision, config, **(values | changes))


def write_entries(path: Path, barrier: Any, writer: int, count: int) -> None:
    """What each of several processes does at the same time: save `count` entries of its own, one by one."""
    barrier.wait(timeout=200)
    for number in range(count):
        decision = Decision("flat_reduction", (10_000_000 + 1000 * writer + number,))
        cache.save(path, [tuned(decision)])


def decision_of(workload: Workload) -> Decision:
    """Of a contiguous x, per tensor, as the launchers decide; read off the workload's name."""
    op, *_, dtype, shape, _ = workload.name.split()
    elements = torch.Size(map(int, shape.split("x"))).numel()
    if op == "fake_quantize":
        return Decision("flat_elementwise", (4 if dtype == "float32" else 2,))
    return Decision("flat_reduction" if op == "aminmax" else "flat_accumulation", (elements,))


@dataclass
class FakeBench:
    """A bench on which a configuration takes as long, and as much, as the test says.

    Attributes:
        microseconds: of a configuration on a workload.
        resources: of a configuration, or the exception that compiling it ends with.
        timings: the configurations of each call of the timer.
    """

    microseconds: Callable[[LaunchConfig, Workload], float] = lambda config, workload: 10.0
    resources: Callable[[LaunchConfig], Resources | Exception] = lambda config: SMALL
    timings: list[list[LaunchConfig]] = field(default_factory=list)

    def bench(self) -> Bench:
        return Bench(CPU, MACHINE, LIMITS, lambda workload: [decision_of(workload)], self._compile, self._time)

    def _compile(
        self, workload: Workload, decision: Decision, configs: Sequence[LaunchConfig]
    ) -> list[Resources | Exception]:
        return [self.resources(config) for config in configs]

    def _time(self, workload: Workload, decision: Decision, configs: Sequence[LaunchConfig]) -> list[list[float]]:
        self.timings.append(list(configs))
        drift = (1.0, 1.5, 3.0)  # of the clock, from round to round; a comparison within rounds does not see it
        return [[self.microseconds(config, workload) * factor for factor in drift] for config in configs]


def workload(name: str = "aminmax float32 1048576 axis=None") -> Workload:
    return Workload(name, lambda device: (), lambda: None)
