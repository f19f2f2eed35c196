"""What the tests of the benchmarks share: planted cases, and rows made by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks import __main__ as program
from benchmarks.cases import Bench, Case
from benchmarks.inputs import Input
from benchmarks.peers import OURS, TORCH
from benchmarks.report import Row
from benchmarks.timer import Spread, Timing

CPU = torch.device("cpu")
EIGHT = Input((8,))


def planted(bench: Bench, contract: Bench | None = None) -> Case:
    """A case of `bench`, with another one on the CPU where a contract is given."""
    build: Callable[[torch.device], Bench] = lambda device: contract or bench if device == CPU else bench  # noqa: E731  a field of that name
    return Case("planted", build, passes=1, cpu=(EIGHT,), cpu_quick=(EIGHT,), cuda=(EIGHT,))


def one_case(monkeypatch: pytest.MonkeyPatch, bench: Bench) -> None:
    """Leave the program this case alone."""
    monkeypatch.setattr(program, "CASES", {"planted": planted(bench)})


def spread(median: float) -> Spread:
    return Spread(median, 0.9 * median, 1.1 * median)


def row(case: str = "aminmax", ours: float = 10.0, theirs: float = 20.0, peer: str = TORCH) -> Row:
    """A timed row: microseconds of ours and of a peer."""
    timings = {OURS: Timing(spread(ours), spread(1.0)), peer: Timing(spread(theirs), spread(theirs / ours))}
    return Row(case, "8", (8,), "float32", "contiguous", "process time", 32, timings)
