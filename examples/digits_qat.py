"""Quantization-aware training on real handwritten digits: torch.ao's modules against ours, from the same state.

A small CNN is trained in float on scikit-learn's digits (1,797 images of 8 x 8 pixels, shipped inside that package) and
quantized to 8 bits in four ways, all prepared by torch.ao's FX flow with the same QConfig; ours come in by one line,
`qkernels.swap(model)`, and `qkernels.verify` runs both side by side first:

* post-training quantization (PTQ): HistogramObserver, torch.ao's and ours, watches the training images, then the model
  is converted; both choose the same scales and zero points, and the time of both is shown;
* QAT with torch.ao's fake quantizers, in eager mode: the reference;
* QAT with ours in eager mode, from the same state, over the same batches: bit-equal to the reference;
* QAT with ours under `torch.compile(fullgraph=True)`, where torch.ao's own modules break the graph: once with the graph
  run by torch's own kernels, bit-equal again, and once compiled.

Each is converted to a model of int8 operators in the end. Run it with `make demo` or `python examples/digits_qat.py`.
"""

from __future__ import annotations

import argparse
import copy
import os
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.ao.quantization as torch_ao
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx

import qkernels

BATCH = 64
WARMUP_STEPS = 3  # the first steps compile, allocate and start thread pools; they are trained but not timed


@dataclass
class Digits:
    """Training and test images, shape (n, 1, 8, 8), float32 in [0, 1], and their labels."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @classmethod
    def load(cls, device: torch.device, seed: int) -> Digits:
        """Every fifth image of a seeded shuffle is for testing."""
        raw = load_digits()
        images = torch.from_numpy(raw.images).float().div_(16).unsqueeze(1)
        labels = torch.from_numpy(raw.target).long()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        test, train = order[::5], order[torch.arange(len(order)) % 5 != 0]
        return cls(*(part.to(device) for part in (images[train], labels[train], images[test], labels[test])))

    def batches(self, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The same seed gives the same batches. All are of one size, so that a compiled step compiles once."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.empty(0, dtype=torch.long)
        for _ in range(steps):
            if len(order) < BATCH:
                order = torch.randperm(len(self.train_x), generator=generator)
            picked, order = order[:BATCH], order[BATCH:]
            picked = picked.to(self.train_x.device)
            yield self.train_x[picked], self.train_y[picked]


def make_cnn() -> nn.Sequential:
    """Two convolutions with batch norm, pooled, and a linear layer: 9,306 parameters."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 2 * 2, 32), nn.ReLU(), nn.Linear(32, 10)),
    )


def make_qconfig() -> torch_ao.QConfig:
    """torch.ao's usual 8-bit QAT."""
    activation = torch_ao.FusedMovingAvgObsFakeQuantize.with_args(
        observer=torch_ao.MovingAverageMinMaxObserver, quant_min=0, quant_max=255, dtype=torch.quint8, reduce_range=True
    )
    weight = torch_ao.FakeQuantize.with_args(
        observer=torch_ao.MovingAveragePerChannelMinMaxObserver,
        quant_min=-128,
        quant_max=127,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
    )
    return torch_ao.QConfig(activation=activation, weight=weight)


QParams = dict[str, tuple[Tensor, Tensor]]


@dataclass
class Run:
    """One training run: the model as trained, its (scale, zero point) by layer, and what it cost."""

    name: str
    model: nn.Module
    step_seconds: list[float]
    qparams_first: QParams  # after the first step
    qparams: QParams  # after the last one
    graph_breaks: int | None = None
    swapped: bool = False

    @property
    def seconds_per_step(self) -> float:
        return statistics.median(self.step_seconds[WARMUP_STEPS:] or self.step_seconds)


def qparams_of(model: nn.Module) -> QParams:
    """Copies of what each fake quantizer uses; ours are instances of torch.ao's base class too."""
    return {
        name: (module.scale.detach().cpu().clone(), module.zero_point.detach().cpu().clone())
        for name, module in model.named_modules()
        if isinstance(module, torch_ao.FakeQuantize)
    }


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent of the images that the model gets right."""
    with torch.no_grad():
        return 100.0 * (model(x).argmax(1) == y).double().mean().item()


def train(
    name: str, model: nn.Module, forward: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], rate: float
) -> Run:
    """Train `model` by calling `forward`: the model itself or what torch.compile made of it. Shows its progress."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    seconds: list[float] = []
    first: QParams = {}
    loss = torch.zeros(())
    for x, y in batches:
        start = time.perf_counter()
        loss = nn.functional.cross_entropy(forward(x), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if x.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        first = first or qparams_of(model)
        if sys.stdout.isatty():
            print(f"\r  {name}: step {len(seconds)}, loss {loss.item():.3f}", end="", flush=True)
    back = "\r" if sys.stdout.isatty() else ""
    print(f"{back}  {name}: {len(seconds)} steps in {sum(seconds):.1f} s (the first {seconds[0]:.1f} s),", end=" ")
    print(f"last loss {loss.item():.4f}", flush=True)
    return Run(name, model, seconds, first, qparams_of(model))


@dataclass
class Calibration:
    """A post-training quantization: what its histogram observers took and chose, and the converted model."""

    name: str
    observe_seconds: float
    choose_seconds: float
    qparams: QParams
    model: nn.Module


def post_training_quantize(name: str, float_model: nn.Module, digits: Digits, swapped: bool) -> Calibration:
    """Let HistogramObserver, torch.ao's or ours, watch the training images, and convert: no training."""
    qat = make_qconfig()
    activation = torch_ao.HistogramObserver.with_args(reduce_range=True)
    mapping = torch_ao.QConfigMapping().set_global(torch_ao.QConfig(activation=activation, weight=qat.weight))
    images = digits.train_x.cpu().split(BATCH)
    model = prepare_fx(copy.deepcopy(float_model).cpu().eval(), mapping, (images[0],))
    if swapped:
        qkernels.swap(model)
    with torch.no_grad():
        start = time.perf_counter()
        for batch in images:
            model(batch)
        observed = time.perf_counter()
        observers = {n: m for n, m in model.named_modules() if isinstance(m, torch_ao.HistogramObserver)}
        qparams = {n: observer.calculate_qparams() for n, observer in observers.items()}
        chosen = time.perf_counter()
    return Calibration(name, observed - start, chosen - observed, qparams, convert_fx(model))


def prepare_qat(float_model: nn.Module, example: Tensor) -> torch.fx.GraphModule:
    """The float model with torch.ao's fake quantizers in it, batch norm folded as in inference."""
    mapping = torch_ao.QConfigMapping().set_global(make_qconfig())
    return prepare_qat_fx(copy.deepcopy(float_model).train(), mapping, (example,))


def count_graph_breaks(model: nn.Module, x: Tensor) -> int:
    """How often Dynamo gives up on the model and returns to Python, in one training forward of a copy."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.compile(copy.deepcopy(model).train(), backend="eager")(x)
    return sum(torch._dynamo.utils.counters["graph_break"].values())


def has_compiler(device: torch.device) -> bool:
    """Inductor compiles C++ for the CPU; for a GPU it needs Triton alone."""
    default = "clang++" if sys.platform == "darwin" else "g++"
    return device.type == "cuda" or shutil.which(os.environ.get("CXX", default)) is not None


def variants(device: torch.device) -> list[tuple[str, bool, str | None]]:
    """(name, whether to swap, backend of torch.compile or None for eager mode) of each; the first is the reference."""
    backend = "inductor" if has_compiler(device) else "aot_eager"
    if backend != "inductor":
        print("  note: no C++ compiler found, so torch.compile uses backend aot_eager: the same graphs, no speed")
    return [
        ("torch.ao, eager", False, None),
        ("torch.ao, compiled", False, backend),
        ("qkernels, eager", True, None),
        ("qkernels, one graph", True, "eager"),  # captured whole, then run by torch's own kernels
        ("qkernels, compiled", True, backend),
    ]


def run_all(args: argparse.Namespace, digits: Digits, float_model: nn.Module) -> list[Run]:
    """All the trainings, from one state over the same batches."""
    example = digits.train_x[:BATCH]
    prepared = prepare_qat(float_model, example)
    print(f"  verify: {qkernels.verify(prepared, (x for x, _ in digits.batches(5, args.seed)))}")
    runs = []
    for name, swapped, backend in variants(args.device):
        model = copy.deepcopy(prepared)
        if swapped:
            report = qkernels.swap(model)
            if not runs[-1].swapped:  # the first of ours
                print(f"  swap: {str(report).splitlines()[-1]}")
        breaks = None if backend is None else count_graph_breaks(model, example)
        torch._dynamo.reset()
        # Ours must be one graph, or this raises. torch.ao's modules cannot be, so they get what a user gets.
        forward = model if backend is None else torch.compile(model, backend=backend, fullgraph=swapped)
        run = train(name, model, forward, digits.batches(args.steps, args.seed + 1), rate=1e-3)
        run.graph_breaks = breaks
        run.swapped = swapped
        runs.append(run)
    return runs


def compare(reference: QParams, other: QParams) -> str:
    """How many layers have bit-equal scales and zero points, and how far apart the rest are."""
    same, worst_scale, worst_zero_point = 0, 0.0, 0.0
    for name, (scale, zero_point) in reference.items():
        scale_2, zero_point_2 = other[name]
        same += torch.equal(scale, scale_2) and torch.equal(zero_point, zero_point_2)
        worst_scale = max(worst_scale, ((scale_2 - scale).abs() / scale).max().item())
        worst_zero_point = max(worst_zero_point, (zero_point_2 - zero_point).abs().max().item())
    text = f"equal in {same} of {len(reference)} layers"
    if same < len(reference):
        text += f" (largest difference: scale {worst_scale:.1e} relative, zero point {worst_zero_point:g})"
    return text


def report_calibration(calibrations: list[Calibration], batches: int) -> bool:
    """Print what calibration took; says whether both chose the same scales and zero points."""
    reference, ours = calibrations
    print(f"\ncalibration with HistogramObserver, ms   {batches} batches   choosing qparams")
    for calibration in calibrations:
        took = f"{1e3 * calibration.observe_seconds:>13.0f}{1e3 * calibration.choose_seconds:>19.0f}"
        print(f"  {calibration.name:<36}{took}")
    print(f"  scales and zero points: {compare(reference.qparams, ours.qparams)}")
    return all(
        torch.equal(one, other)
        for name, pair in reference.qparams.items()
        for one, other in zip(pair, ours.qparams[name], strict=True)
    )


def report_cost(runs: list[Run], digits: Digits, float_accuracy: float, calibrations: list[Calibration]) -> None:
    """Print accuracy, time and graph breaks."""
    images, labels = digits.test_x.cpu(), digits.test_y.cpu()
    print("\naccuracy on the test images, %      fake-quantized   int8 operators")
    print(f"  {'float':<32}{float_accuracy:>14.2f}{'-':>17}")
    for calibration in calibrations:
        print(f"  {'PTQ, ' + calibration.name:<32}{'-':>14}{accuracy(calibration.model, images, labels):>17.2f}")
    for run in runs:
        run.model.cpu().eval().apply(torch_ao.disable_observer)  # or evaluation would move the scales
        converted = convert_fx(copy.deepcopy(run.model))
        cells = f"{accuracy(run.model, images, labels):>14.2f}{accuracy(converted, images, labels):>17.2f}"
        print(f"  {'QAT, ' + run.name:<32}{cells}")

    print("\ntraining                      seconds/step   first step   graph breaks")
    for run in runs:
        breaks = "-" if run.graph_breaks is None else run.graph_breaks
        print(f"  {run.name:<28}{run.seconds_per_step:>12.5f}{run.step_seconds[0]:>13.2f}{breaks:>15}")


def report_equality(runs: list[Run]) -> bool:
    """Print how equal ours are to torch.ao's in eager mode; says whether the two that promise it are bit-equal."""
    reference = runs[0]
    stock = reference.model.state_dict()
    steps = len(reference.step_seconds)
    all_equal = True
    print("\nscales and zero points, against torch.ao in eager mode")
    for run in runs[2:]:
        print(f"  {run.name}")
        print(f"    after 1 step:   {compare(reference.qparams_first, run.qparams_first)}")
        print(f"    after {steps} steps: {compare(reference.qparams, run.qparams)}")
        if run.name != "qkernels, compiled":
            mine = run.model.state_dict()
            equal = stock.keys() == mine.keys() and all(torch.equal(value, mine[key]) for key, value in stock.items())
            print(f"    whole state_dict, weights and statistics: {'bit-equal' if equal else 'NOT equal'}")
            all_equal = all_equal and equal
    print("  Compiled convolutions, batch norms and gradients round differently in the last bits, whoever quantizes,")
    print("  and training amplifies that. What is quantized before the first of them is bit-equal there too.")
    return all_equal


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description="QAT on handwritten digits: torch.ao's modules against ours.")
    parser.add_argument("--steps", type=int, default=150, help="QAT steps of each variant (default: %(default)s)")
    parser.add_argument("--float-steps", type=int, default=300, help="float steps before (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="the model is too small for more than %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, default=torch.device(default_device))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run everything; 1 when ours in eager mode differs from torch.ao on the CPU, where equality is promised."""
    args = parse_args(argv)
    warnings.filterwarnings("ignore", message="torch.ao.quantization is deprecated")  # said on every call
    warnings.filterwarnings("ignore", module=r"torch\.ao\..*")
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.deterministic = True
    digits = Digits.load(args.device, args.seed)
    print(f"handwritten digits, 8 x 8: {len(digits.train_x)} for training, {len(digits.test_x)} for testing;", end=" ")
    print(f"torch {torch.__version__} on {args.device}, {args.threads} thread(s)")

    float_model = make_cnn().to(args.device)
    train("float", float_model, float_model, digits.batches(args.float_steps, args.seed), rate=3e-3)
    float_accuracy = accuracy(float_model.eval(), digits.test_x, digits.test_y)
    ways = (("torch.ao", False), ("qkernels", True))
    for way in ways:  # the first of each pays for imports and caches
        post_training_quantize(way[0], float_model, digits, way[1])
    calibrations = [post_training_quantize(name, float_model, digits, swapped) for name, swapped in ways]
    runs = run_all(args, digits, float_model)
    report_cost(runs, digits, float_accuracy, calibrations)
    equal = report_calibration(calibrations, -(-len(digits.train_x) // BATCH))
    equal = report_equality(runs) and equal
    return 0 if equal or args.device.type != "cpu" else 1


if __name__ == "__main__":
    sys.exit(main())
