"""Tuning: compile the candidates of a decision, time those whose code allows it, keep one that clearly wins.

Several workloads may ask the same question (a forward and a backward, two dtypes): a configuration must win over all of
them together and lose on none. Compiler and timer are passed in, so that all of this runs without a GPU.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from qkernels.autotune.config import LaunchConfig
from qkernels.autotune.decision import Decision
from qkernels.autotune.machine import Machine
from qkernels.autotune.search import MOST, Limits, Resources, candidates, heuristic_for, prune_reason

MARGIN = 0.03  # of its time that a winner must save, beyond what two runs of one kernel differ by
MAX_LOSS = 0.01  # that it may cost any one workload


@dataclass(frozen=True)
class Workload:
    """One kernel on one kind of input.

    Attributes:
        name: for people: operator, dtype, shape, axis.
        make: a fresh set of arguments on a device.
        run: launches the kernel on such arguments.
    """

    name: str
    make: Callable[[torch.device], tuple[Any, ...]]
    run: Callable[..., None]


@dataclass(frozen=True)
class Bench:
    """A machine to tune on.

    Attributes:
        device: where the workloads run.
        machine: what the results hold for.
        limits: of the device.
        decide: the decisions that one run of a workload makes.
        compile: what each configuration's compiled code takes, or the exception that it ended with.
        time: microseconds per call of each configuration, one list per configuration, in which the samples at one
            index were taken in the same round.
    """

    device: torch.device
    machine: Machine
    limits: Limits
    decide: Callable[[Workload], Sequence[Decision]]
    compile: Callable[[Workload, Decision, Sequence[LaunchConfig]], Sequence[Resources | Exception]]
    time: Callable[[Workload, Decision, Sequence[LaunchConfig]], Sequence[Sequence[float]]]


@dataclass
class Outcome:
    """What came of one decision.

    Attributes:
        decision: the decision.
        heuristic: the heuristic's configuration.
        best: the winner, or the heuristic.
        ratio: the winner's time over the heuristic's; 1.0 for the heuristic.
        timed: configurations timed, the heuristic's included.
        left_out: why each of the others was not, by configuration.
    """

    decision: Decision
    heuristic: LaunchConfig
    best: LaunchConfig
    ratio: float = 1.0
    timed: int = 0
    left_out: dict[LaunchConfig, str] = field(default_factory=dict)

    @property
    def improved(self) -> bool:
        """Whether there is anything to remember."""
        return self.best != self.heuristic


def group(workloads: Sequence[Workload], bench: Bench) -> dict[Decision, list[Workload]]:
    """Workloads by the decision that they make.

    Raises:
        ValueError: a workload makes none, or several.
    """
    grouped: dict[Decision, list[Workload]] = {}
    for workload in workloads:
        made = list(dict.fromkeys(bench.decide(workload)))
        if len(made) != 1:
            raise ValueError(f"{workload.name}: a workload must make one decision; made {[str(d) for d in made]}")
        grouped.setdefault(made[0], []).append(workload)
    return grouped


def tune_decision(
    decision: Decision, workloads: Sequence[Workload], bench: Bench, *, margin: float = MARGIN, most: int = MOST
) -> Outcome:
    """Find the fastest configuration of a decision.

    Args:
        decision: what to decide.
        workloads: every workload to judge by; at least one.
        bench: the machine.
        margin: share of the heuristic's time that a winner must save.
        most: candidates to look at beside the heuristic.

    Returns:
        The outcome. Ties, and all that does not win twice, leave the heuristic.

    Raises:
        Exception: what the heuristic's own configuration failed with.
    """
    heuristic = heuristic_for(decision, bench.device)
    outcome = Outcome(decision, heuristic, heuristic)
    survivors = _compile(outcome, candidates(decision, heuristic, bench.limits, most), workloads, bench)
    outcome.timed = len(survivors)
    if len(survivors) == 1:
        return outcome
    best = _winner(survivors, _ratios(decision, survivors, workloads, bench), margin)
    if best is None or best == heuristic:  # the latter with a margin of 0
        return outcome
    # The best of many is partly the luckiest of many, so it has to win again, alone against the heuristic.
    pair = [heuristic, best]
    ratios = _ratios(decision, pair, workloads, bench)
    if _winner(pair, ratios, margin) == best:
        outcome.best, outcome.ratio = best, statistics.geometric_mean(ratios[1])
    return outcome


def _compile(
    outcome: Outcome, configs: list[LaunchConfig], workloads: Sequence[Workload], bench: Bench
) -> list[LaunchConfig]:
    """The configurations worth timing, the heuristic first; the rest go into outcome.left_out."""
    for workload in workloads:
        compiled = bench.compile(workload, outcome.decision, configs)
        own = compiled[0]
        if isinstance(own, Exception):
            raise own
        for config, result in list(zip(configs, compiled, strict=True))[1:]:
            if isinstance(result, Exception):
                text = str(result).strip().splitlines() or [""]
                outcome.left_out[config] = f"failed: {type(result).__name__}: {text[0]}"
            elif reason := prune_reason(outcome.decision, config, result, own, bench.limits):
                outcome.left_out[config] = reason
        configs = [config for config in configs if config not in outcome.left_out]
    return configs


def _ratios(
    decision: Decision, configs: Sequence[LaunchConfig], workloads: Sequence[Workload], bench: Bench
) -> list[list[float]]:
    """For each configuration its time over the first one's, by workload: the median of the rounds' ratios."""
    by_workload = []
    for workload in workloads:
        samples = bench.time(workload, decision, configs)
        by_workload.append([statistics.median(b / a for a, b in zip(samples[0], own, strict=True)) for own in samples])
    return [[ratios[index] for ratios in by_workload] for index in range(len(configs))]


def _winner(configs: Sequence[LaunchConfig], ratios: Sequence[Sequence[float]], margin: float) -> LaunchConfig | None:
    """The fastest of those that save the margin and lose nowhere; of equals the one nearest to the heuristic."""
    fair = [
        (statistics.geometric_mean(own), index)
        for index, own in enumerate(ratios)
        if max(own) <= 1 + MAX_LOSS and statistics.geometric_mean(own) <= 1 - margin
    ]
    return configs[min(fair)[1]] if fair else None
