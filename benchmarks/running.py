"""One job, a case on an input: who takes part, the gate, the clock, the counts, the row."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from benchmarks import timer
from benchmarks.cases import Bench, Case
from benchmarks.counts import count
from benchmarks.explanations import explanations
from benchmarks.gate import Verdict, against_contract, against_peers
from benchmarks.inputs import Input
from benchmarks.peers import COMPILED, OURS
from benchmarks.report import Row

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Settings:
    """What a run was asked for.

    Attributes:
        device: where the inputs are.
        seed: of the inputs.
        quick: fewer, shorter rounds.
        compiles: whether the "torch.compile" peers take part; each input costs a compilation, which is not timed.
    """

    device: torch.device
    seed: int = 0
    quick: bool = False
    compiles: bool = False


def refusals(bench: Bench, x: torch.Tensor, names: list[str]) -> dict[str, str]:
    """Who does not take such an input (torch's fused op wants float32, say), and what it answers."""
    refused = {}
    for name in names:
        try:
            bench.impls[name](x, x)
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            refused[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return refused


def measure(case: Case, put: Input, settings: Settings, copy_gb_per_second: float | None) -> Iterator[Row]:
    """Gate, then time: one row on a CPU, two (calls, and replays of a graph) on a GPU."""
    on_gpu = settings.device.type == "cuda"
    x = put.make(settings.device, settings.seed)
    bench = case.build(settings.device)
    absent = dict(bench.absent)
    if COMPILED in bench.impls and not settings.compiles:
        absent[COMPILED] = "compiled only in the suites kernels, modules and full"
    names = [name for name in bench.impls if name not in absent]
    if COMPILED in names:
        torch._dynamo.reset()  # past its recompile limit Dynamo falls back to eager without a word
    refused = refusals(bench, x, names)
    impls = {name: bench.impls[name] for name in names if name not in refused}
    if OURS in refused:  # a peer may refuse, we may not
        verdict = Verdict([refused.pop(OURS)], {})
    elif on_gpu:
        verdict = against_contract(bench, case.build(CPU), x, list(impls))
    else:
        verdict = against_peers(bench, x, list(impls))
    how = "events" if on_gpu else "process time" if torch.get_num_threads() == 1 else "wall time"
    row = Row(case.name, str(put), put.shape, put.dtype, put.layout, how, case.bytes_moved(x), {}, verdict.wrong,
              refused, verdict.peers_differ, {}, suite=case.suite, input_name=put.name, absent=absent)  # fmt: skip
    if verdict.wrong:
        yield row
        return
    row = replace(row, counts={name: count(impl, x, compiled=name == COMPILED) for name, impl in impls.items()})
    inputs = timer.rotating_inputs(x)
    rounds, slice_seconds = (15, 0.004) if settings.quick else (20, 0.005) if on_gpu else (40, 0.01)
    called = {name: timer.calls(impl, inputs) for name, impl in impls.items()}
    captured = [("graph", *timer.capture_all(impls, inputs))] if on_gpu else []
    for way, passes, not_captured in [(how, called, {}), *captured]:
        timings = timer.time_interleaved(passes, inputs, rounds=rounds, slice_seconds=slice_seconds)
        timed = replace(row, how=way, timings=timings, not_captured=not_captured)
        of_copy = timed.gb_per_second / copy_gb_per_second if copy_gb_per_second and timed.bytes_moved else None
        why = explanations(case.name, math.prod(put.shape), timed.lost_to, timed.clearly_lost_to, settings.device.type)
        yield replace(timed, of_copy=of_copy, why=why)
