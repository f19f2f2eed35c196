"""Host overhead: microseconds per call on one element, and what a process pays once: import, first call, compilation.

On a GPU the clock stops when the call returns, not when the device is done. Part of `python -m benchmarks --suite
overhead`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks import timer
from benchmarks.calls import CALLS, Functions
from benchmarks.counts import count
from benchmarks.explanations import NO_DIFFERENCE
from benchmarks.gate import differences
from benchmarks.peers import COMPILED, OURS, TORCH
from benchmarks.report import FRESH_PROCESS, ROOT, Row

SUITE = "overhead"
BESIDE = "import torch"
IN_PYTHON = (
    "one element, so the call is the time: ours is Python (argument checks, operators, their ATen calls) where torch's "
    "is C++, or torch.ao's a few ATen calls"
)
ONE_CALL = "neither side makes an ATen call: one call of a Python method on either"
PASS_THROUGH = ("FixedQParamsObserver", "PlaceholderObserver", "NoopObserver", "ReuseInputObserver")


_NO_GRADIENT = ("fake_quantize_backward", "learnable_fake_quantize_backward")  # called by autograd, on gradients


def modes(name: str) -> tuple[bool, ...]:
    """Whether x requires a gradient, in the ways a call is timed."""
    return (
        (False,)
        if name in _NO_GRADIENT or name.endswith(("choose_qparams", "calculate_qparams", "_range"))
        else (False, True)
    )


def _title(name: str, grad: bool) -> str:
    return f"{name}, {'requires grad' if grad else 'no grad'}"


def call_names() -> list[str]:
    """The rows of `call_rows`."""
    return [_title(name, grad) for name in CALLS for grad in modes(name)]


def _row(case: str, how: str, put: str, shape: tuple[int, ...]) -> Row:
    return Row(case, put, shape, "float32", "contiguous", how, 0, {}, suite=SUITE)


def wrong_results(functions: Functions, x: Tensor) -> list[str]:
    """The gate, on values alone: what differs between ours and torch's on one call each, from the same state.

    On a GPU torch's may round otherwise; there, the cases' gates are the ones that judge.
    """
    found = {name: function(x) for name, function in functions.items()}
    return [difference.text for difference in differences(found[OURS], found[TORCH])] if not x.is_cuda else []


def call_row(name: str, grad: bool, device: torch.device, *, rounds: int, slice_seconds: float) -> Row:
    """One call in one mode, behind its gate. With a gradient, the graph is recorded but not run."""
    on_gpu = device.type == "cuda"
    how = "host time" if on_gpu else "process time" if torch.get_num_threads() == 1 else "wall time"
    row = _row(_title(name, grad), how, "1 element", (1, 1))
    functions = CALLS[name](device)
    x = torch.full((1, 1), 0.7, device=device, requires_grad=grad)
    with nullcontext() if grad else torch.no_grad():
        if wrong := wrong_results(functions, x):
            return replace(row, wrong=wrong)
        impls: dict[str, timer.Impl] = {
            side: lambda x, dy, function=function: function(x)  # type: ignore[misc]  # bound by its default
            for side, function in functions.items()
        }
        counts = {side: count(impl, x) for side, impl in impls.items()}
        passes = {side: timer.calls(impl, [(x, x)]) for side, impl in impls.items()}
        timings = timer.time_interleaved(passes, [(x, x)], rounds=rounds, slice_seconds=slice_seconds, host=on_gpu)
    row = replace(row, timings=timings, counts=counts)
    return replace(row, why=_why(name, row) if row.lost_to and not on_gpu else None)


def _why(name: str, row: Row) -> str:
    if not row.clearly_lost_to:
        return NO_DIFFERENCE
    return ONE_CALL if name in PASS_THROUGH else IN_PYTHON


def ask(question: str, library: str, device: torch.device) -> dict[str, float]:
    """Seconds, from a fresh process with an empty Inductor cache.

    Raises:
        RuntimeError: the process failed.
    """
    command = [sys.executable, "-m", "benchmarks.probe", question, library, "--device", str(device)]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip().splitlines()[-1:]}")
    seconds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


Ask = Callable[[str, str, torch.device], dict[str, float]]
Once = Callable[[torch.device, int, Ask], Row]


def _import_row(name: str, device: torch.device, repetitions: int, ask: Ask) -> Row:
    """Importing a part of ours when torch is there already, beside torch's own import."""
    samples: dict[str, list[float]] = {OURS: [], BESIDE: []}
    for _ in range(repetitions):
        seconds = ask("import", name, device)
        samples[OURS].append(1e6 * seconds[name])
        samples[BESIDE].append(1e6 * seconds["torch"])
    return replace(_row(_import_title(name), FRESH_PROCESS, "-", ()), timings=timer.timings_of(samples, OURS))


def _import_title(name: str) -> str:
    return f"import {name}, after torch"


def _first_row(question: str, title: str, peers: tuple[str, ...], put: str) -> Once:
    """What the first of something takes, ours and others'."""

    def row(device: torch.device, repetitions: int, ask: Ask) -> Row:
        samples: dict[str, list[float]] = {name: [] for name in (OURS, *peers)}
        for _ in range(repetitions):
            for name, found in samples.items():
                found.append(1e6 * ask(question, name, device)[name])
        return replace(_row(title, FRESH_PROCESS, put, ()), timings=timer.timings_of(samples, OURS))

    return row


_FIRST_CALL, _COMPILE = "first call of fake_quantize", "compiling a FakeQuantize train step"

# torch.ao's FakeQuantize is not among the peers of the compilation: Dynamo skips code that torch.ao defines, so nothing
# of it would be compiled. "torch.compile" is fake quantization in plain PyTorch, without an observer.
ONCE: dict[str, Once] = {
    **{_import_title(name): partial(_import_row, name) for name in ("qkernels", "qkernels.ops", "qkernels.modules")},
    _FIRST_CALL: _first_row("first-call", _FIRST_CALL, (TORCH,), "1 element"),
    _COMPILE: _first_row("compile", _COMPILE, (COMPILED,), "4096 elements"),
}


def once_rows(
    device: torch.device,
    *,
    repetitions: int,
    wanted: Callable[[str], bool] = lambda name: True,
    ask: Ask = ask,
) -> Iterator[Row]:
    """What a process pays once: imports, the first call, the first compilation. Wall time."""
    for name, make in ONCE.items():
        if wanted(name):
            yield make(device, repetitions, ask)


def names() -> list[str]:
    """The rows of the suite."""
    return [*call_names(), *ONCE]


def rows(device: torch.device, *, quick: bool, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """The suite."""
    rounds, slice_seconds = (10, 0.001) if quick or device.type == "cuda" else (30, 0.003)
    for name in CALLS:
        for grad in modes(name):
            if wanted(_title(name, grad)):
                yield call_row(name, grad, device, rounds=rounds, slice_seconds=slice_seconds)
    yield from once_rows(device, repetitions=1 if quick else 3, wanted=wanted)
