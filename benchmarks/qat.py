"""A whole QAT step with learned step sizes, `python -m benchmarks.qat`: forward, loss, backward, SGD with momentum.

The ways start from one state: the float model eager and compiled, torch.ao's `_LearnableFakeQuantize` eager and
compiled as far as it goes (its modules break the graph), ours eager and compiled whole. On a GPU ours are also captured
into a CUDA graph; torch.ao's read flags on the host, which a capture does not allow. They take turns of a few steps.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.ao.quantization as torch_ao
from torch import Tensor, nn
from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize
from torch.ao.quantization.quantize_fx import prepare_qat_fx

import qkernels
from benchmarks import arguments, timer
from benchmarks.allocator import keep_freed_memory
from benchmarks.gate import differences
from benchmarks.models import LARGE_MODELS, MODELS, SMALL_MODELS, Made
from benchmarks.report import environment, heading, write_json
from benchmarks.timer import Timing

Step = Callable[[], None]
SUITE = "qat"
EAGER, COMPILED, GRAPHED = "eager", "compiled", "CUDA graph"
REFERENCE = f"qkernels, {COMPILED}"  # what times_ours of a way refers to
EAGER_CALLS = (
    "eager, every quantizer of ours is Python calls forward and backward where torch.ao's operator is C++, which "
    "weighs where layers are small; compiled, the calls are gone"
)
STEPS_OF_A_TURN = 4
WALL_TIME, KEPT = "wall time", "wall time, freed memory kept"  # see allocator.py
SLOW_COMPILED = "the float model, too, is slower compiled than eager here"
WORK_BESIDE_FLOAT = "a quantized model does the float model's work and quantizes every weight and activation besides"


@dataclass(frozen=True)
class QATRow:
    """One model.

    Attributes:
        model: its name.
        milliseconds: median of a step, by way.
        ratios: of the medians; above 1 ours is faster, and in that to float slower.
        case: as in the other suites.
        input: the batch's shape.
        shape: the batch's shape.
        dtype: the batch's dtype.
        how: "wall time", or "wall time, freed memory kept" where the allocator was told so.
        timings: microseconds of a step by way, and how many times longer it takes than ours compiled.
        absent: ways that were not measured, with the reason.
        why: where ours is slower, the reason.
        wrong: what the gate found, and then nothing was timed.
        suite: "qat".
    """

    model: str
    milliseconds: dict[str, float]
    ratios: dict[str, float]
    case: str
    input: str
    shape: tuple[int, ...]
    dtype: str
    how: str
    timings: dict[str, Timing]
    absent: dict[str, str] = field(default_factory=dict)
    why: str | None = None
    suite: str = SUITE
    wrong: list[str] = field(default_factory=list)


class WrongResult(Exception):
    """Ours computes something else than torch.ao's."""


def quantized(model: nn.Module, x: Tensor) -> nn.Module:
    """The model with torch.ao's learnable quantizers, after ten observed batches, learning."""
    learnable = _LearnableFakeQuantize.with_args(observer=torch_ao.MovingAverageMinMaxObserver, use_grad_scaling=True)
    activation = learnable.with_args(quant_min=0, quant_max=255, dtype=torch.quint8, qscheme=torch.per_tensor_affine)
    weight = learnable.with_args(quant_min=-128, quant_max=127, dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
    mapping = torch_ao.QConfigMapping().set_global(torch_ao.QConfig(activation=activation, weight=weight))
    prepared = prepare_qat_fx(copy.deepcopy(model).train(), mapping, (x,))
    prepared.to(x.device)
    for _ in range(10):
        prepared(torch.randn_like(x))
    for module in prepared.modules():
        if isinstance(module, _LearnableFakeQuantize):
            module.enable_param_learning()
    return prepared


def _parts(model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Step:
    """One training step, always on the same batch, without waiting for the device."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    labels = torch.arange(len(x), device=x.device) % 10

    def step() -> None:
        loss = nn.functional.cross_entropy(forward(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def waited_for(step: Step, x: Tensor) -> Step:
    """The step until the device is done."""

    def run() -> None:
        step()
        if x.is_cuda:
            torch.cuda.synchronize()

    return run


def step_of(model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Step:
    """One training step, until the device is done, warmed up, and so compiled if it is to be."""
    run = waited_for(_parts(model, forward, x), x)
    for _ in range(4):
        run()
    return run


def graphed(model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Step:
    """The whole step as a CUDA graph.

    Raises:
        RuntimeError: it cannot be captured.
    """
    step = _parts(model, forward, x)
    return waited_for(timer.capture(lambda x, dy: step(), [(x, x)]), x)


Forward = Callable[[Tensor], Tensor]


def _made(way: str, source: nn.Module, x: Tensor, fullgraph: bool) -> tuple[nn.Module, Forward]:
    own = copy.deepcopy(source)
    torch._dynamo.reset()  # past its recompile limit Dynamo falls back to eager without a word
    return own, own if way == EAGER else torch.compile(own, fullgraph=fullgraph)


def gate(ours: nn.Module, stock: nn.Module, x: Tensor) -> None:
    """Ours must give torch.ao's output, bit for bit; of a GPU's torch.ao that is not asked.

    Raises:
        WrongResult: it does not.
    """
    found = differences(copy.deepcopy(ours)(x).detach(), copy.deepcopy(stock)(x).detach())
    if found and not x.is_cuda:
        raise WrongResult("; ".join(difference.text for difference in found))


def variants(
    make: Callable[[], Made], device: torch.device, *, compiles: bool = True
) -> tuple[dict[str, Step], dict[str, str], Tensor]:
    """The ways, each on a copy of its own, compiled and warmed up; which ones there are not, and why; the batch.

    Raises:
        WrongResult: ours computes something else than torch.ao's.
    """
    torch.manual_seed(0)
    model, x = make()
    stock = quantized(model, x).to(device)
    model, x = model.to(device).train(), x.to(device)
    ours = copy.deepcopy(stock)
    qkernels.swap(ours)
    gate(ours, stock, x)
    steps: dict[str, Step] = {}
    absent: dict[str, str] = {}
    for label, source in (("float", model), ("torch.ao", stock), ("qkernels", ours)):
        for way in (EAGER, COMPILED) if compiles else (EAGER,):
            key = f"{label}, {way}"
            try:
                steps[key] = step_of(*_made(way, source, x, fullgraph=label != "torch.ao"), x)
            except RuntimeError as error:
                if label == "qkernels":
                    raise
                absent[key] = f"{type(error).__name__}: {error}".splitlines()[0]
    for way in (EAGER, COMPILED) if device.type == "cuda" else ():
        key = f"qkernels, {way}, {GRAPHED}"
        try:
            steps[key] = graphed(*_made(way, ours, x, fullgraph=True), x)
        except RuntimeError as error:
            absent[key] = str(error).splitlines()[0]
    reason = "it reads flags on the host, which a capture does not allow" if device.type == "cuda" else "no GPU"
    absent[f"torch.ao, {GRAPHED}"] = reason
    if device.type != "cuda":
        absent[f"qkernels, {GRAPHED}"] = reason
    for _ in range(2):  # each reset threw away what was compiled before it; from here on nothing is
        for step in steps.values():
            step()
    return steps, absent, x


def measure(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Microseconds of each, taking turns in an order drawn anew for every round.

    A turn is one step that is not timed and some that are: a training loop repeats its own step, and finds its own code
    and data in the caches, not those of the way before it.
    """
    samples: dict[str, list[float]] = {key: [] for key in steps}
    order, draw = list(steps), random.Random(0)
    for _ in range(rounds):
        draw.shuffle(order)
        for key in order:
            step = steps[key]
            step()
            for _ in range(STEPS_OF_A_TURN):
                start = time.perf_counter()
                step()
                samples[key].append(1e6 * (time.perf_counter() - start))
    return samples


_RATIOS = {
    "torch.ao eager / ours eager": (f"torch.ao, {EAGER}", f"qkernels, {EAGER}"),
    "torch.ao eager / ours compiled": (f"torch.ao, {EAGER}", REFERENCE),
    "torch.ao compiled / ours compiled": (f"torch.ao, {COMPILED}", REFERENCE),
    "ours compiled / float compiled": (REFERENCE, f"float, {COMPILED}"),
}


def row_of(
    name: str, samples: dict[str, list[float]], absent: dict[str, str], x: Tensor, how: str = WALL_TIME
) -> QATRow:
    """The medians, their ratios and spreads."""
    timings = timer.timings_of(samples, REFERENCE if REFERENCE in samples else f"qkernels, {EAGER}")
    medians = {key: timing.microseconds.median / 1e3 for key, timing in timings.items()}
    ratios = {
        label: medians[above] / medians[below]
        for label, (above, below) in _RATIOS.items()
        if above in medians and below in medians
    }
    reasons = []
    if ratios["torch.ao eager / ours eager"] < 1:
        reasons.append(EAGER_CALLS)
    if ratios.get("torch.ao eager / ours compiled", 1) < 1:
        slow = medians[f"float, {COMPILED}"] > medians[f"float, {EAGER}"]
        reasons.append(SLOW_COMPILED if slow else "no explanation is known for ours compiled against torch.ao eager")
    if ratios.get("ours compiled / float compiled", 0) > 1:
        reasons.append(WORK_BESIDE_FLOAT)
    why = "; ".join(reasons) or None
    shape = tuple(x.shape)
    title = "x".join(map(str, shape))
    dtype = str(x.dtype).removeprefix("torch.")
    return QATRow(name, medians, ratios, case_name(name), title, shape, dtype, how, timings, absent, why)


def case_name(model: str) -> str:
    """The row's name in all suites."""
    return f"QAT step, {model}"


def rows(models: Iterable[str], device: torch.device, rounds: int | None = None) -> Iterator[QATRow]:
    """One row per model. `rounds` None takes 30 for small models and 5 for large ones."""
    how = KEPT if device.type == "cpu" and keep_freed_memory() else WALL_TIME
    for name in models:
        try:
            steps, absent, x = variants(MODELS[name], device)
        except WrongResult as error:
            yield QATRow(name, {}, {}, case_name(name), "", (), "", how, {}, wrong=[str(error)])
            continue
        samples = measure(steps, rounds or (5 if name in LARGE_MODELS else 30))
        yield row_of(name, samples, absent, x, how)


def text(row: QATRow) -> str:
    """A block for people."""
    if row.wrong:
        return f"{row.model}: WRONG: {'; '.join(row.wrong)}"
    lines = [f"{row.model}: milliseconds per step"]
    for key, value in row.milliseconds.items():
        spread = row.timings[key].microseconds
        lines.append(f"  {key:<32}{value:>9.2f}  ({spread.p20 / 1e3:.2f}-{spread.p80 / 1e3:.2f})")
    lines += [f"  {key:<34}{value:>7.2f}" for key, value in row.ratios.items()]
    lines += [f"  not measured: {key}: {reason}" for key, reason in row.absent.items()]
    return "\n".join(lines + ([f"  why: {row.why}"] if row.why else []))


def main(argv: list[str] | None = None) -> int:
    """Print a table; 0, or 1 if a gate found something wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.qat", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", action="append", choices=MODELS, help="only this one (repeatable); without, the small ones"
    )
    parser.add_argument("--rounds", type=arguments.positive, help="of turns; default: 30, and 5 for the large models")
    parser.add_argument("--threads", type=arguments.positive, default=1)
    parser.add_argument("--device", type=arguments.device, default=torch.device("cpu"))
    parser.add_argument("--json", type=arguments.output, metavar="FILE", help="also write the results there")
    args: Any = parser.parse_args(argv)
    arguments.quiet()
    torch.set_num_threads(args.threads)
    where = environment(args.device, 0, SUITE)
    print(heading(where))
    done: list[QATRow] = []
    path: Path | None = args.json
    for row in rows(args.model or SMALL_MODELS, args.device, args.rounds):
        done.append(row)
        print(f"\n{text(row)}", flush=True)
        if path:
            write_json(path, done, where)
    return 1 if any(row.wrong for row in done) else 0


if __name__ == "__main__":
    sys.exit(main())
