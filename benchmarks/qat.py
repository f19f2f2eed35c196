"""A whole QAT step with learned step sizes, `python -m benchmarks.qat`: forward, loss, backward, SGD with momentum.

Five ways from one state: the float model eager and compiled, torch.ao's `_LearnableFakeQuantize` eager and compiled as
far as it goes (its modules break the graph), ours eager and compiled whole. Implementations take turns, step by step.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.ao.quantization as torch_ao
from torch import Tensor, nn
from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize
from torch.ao.quantization.quantize_fx import prepare_qat_fx

import qkernels
from benchmarks.report import environment

Step = Callable[[], None]


def _conv_bn_relu(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


def digits_cnn() -> tuple[nn.Module, Tensor]:
    """Two convolutions on 64 images of 8 x 8: what the demo trains. Dispatch is most of its time."""
    layers = [*_conv_bn_relu(1, 16), nn.MaxPool2d(2), *_conv_bn_relu(16, 32), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 10)), torch.randn(64, 1, 8, 8)


def narrow_cnn() -> tuple[nn.Module, Tensor]:
    """Four convolutions of 32 and 64 channels on 16 images of 32 x 32: elementwise work weighs as much as it can."""
    layers = [*_conv_bn_relu(3, 32), *_conv_bn_relu(32, 32), *_conv_bn_relu(32, 64, 2), *_conv_bn_relu(64, 64)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*layers, *head), torch.randn(16, 3, 32, 32)


def wide_cnn() -> tuple[nn.Module, Tensor]:
    """Three convolutions of 128 channels on 8 images of 28 x 28, as in a ResNet-50's middle: convolutions dominate."""
    layers = [*_conv_bn_relu(3, 128), *_conv_bn_relu(128, 128), *_conv_bn_relu(128, 128)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)]
    return nn.Sequential(*layers, *head), torch.randn(8, 3, 28, 28)


def without_batch_norm(make: Callable[[], tuple[nn.Module, Tensor]]) -> Callable[[], tuple[nn.Module, Tensor]]:
    """The same model without batch norm, which torch.ao's QAT modules fold at the price of two more passes."""

    def build() -> tuple[nn.Module, Tensor]:
        model, x = make()
        return nn.Sequential(*(layer for layer in model.children() if not isinstance(layer, nn.BatchNorm2d))), x

    return build


MODELS = {
    "digits": digits_cnn,
    "narrow": narrow_cnn,
    "narrow, no batch norm": without_batch_norm(narrow_cnn),
    "wide": wide_cnn,
    "wide, no batch norm": without_batch_norm(wide_cnn),
}


def quantized(model: nn.Module, x: Tensor) -> nn.Module:
    """The model with torch.ao's learnable quantizers, after ten observed batches, learning."""
    learnable = _LearnableFakeQuantize.with_args(observer=torch_ao.MovingAverageMinMaxObserver, use_grad_scaling=True)
    activation = learnable.with_args(quant_min=0, quant_max=255, dtype=torch.quint8, qscheme=torch.per_tensor_affine)
    weight = learnable.with_args(quant_min=-128, quant_max=127, dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
    mapping = torch_ao.QConfigMapping().set_global(torch_ao.QConfig(activation=activation, weight=weight))
    prepared = prepare_qat_fx(copy.deepcopy(model).train(), mapping, (x,))
    for _ in range(10):
        prepared(torch.randn_like(x))
    for module in prepared.modules():
        if isinstance(module, _LearnableFakeQuantize):
            module.enable_param_learning()
    return prepared


def step_of(model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Step:
    """One training step, always on the same batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    labels = torch.arange(len(x), device=x.device) % 10

    def step() -> None:
        loss = nn.functional.cross_entropy(forward(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if x.is_cuda:
            torch.cuda.synchronize()

    return step


def variants(name: str, device: torch.device) -> dict[str, Step]:
    """The five ways, each on a copy of its own, compiled and warmed up."""
    torch.manual_seed(0)
    model, x = MODELS[name]()
    model, x = model.to(device).train(), x.to(device)
    stock = quantized(model, x)
    ours = copy.deepcopy(stock)
    qkernels.swap(ours)
    steps: dict[str, Step] = {}
    for label, source in (("float", model), ("torch.ao", stock), ("qkernels", ours)):
        for compiled in (False, True):
            own = copy.deepcopy(source)
            torch._dynamo.reset()  # past its recompile limit Dynamo falls back to eager without a word
            fullgraph = label != "torch.ao"
            forward = torch.compile(own, fullgraph=fullgraph) if compiled else own
            key = f"{label}, {'compiled' if compiled else 'eager'}"
            steps[key] = step_of(own, forward, x)
            for _ in range(4):
                steps[key]()
    return steps


def measure(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Median milliseconds of each, taking turns."""
    seconds: dict[str, list[float]] = {key: [] for key in steps}
    for _ in range(rounds):
        for key, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[key].append(time.perf_counter() - start)
    return {key: 1e3 * statistics.median(values) for key, values in seconds.items()}


def main(argv: list[str] | None = None) -> int:
    """Print a table; 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.qat", description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=MODELS, help="only this one (repeatable)")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", message="torch.ao.quantization is deprecated")
    warnings.filterwarnings("ignore", module=r"torch\.ao\..*")
    torch.set_num_threads(args.threads)
    where = environment(args.device, 0)
    print(", ".join(f"{key} {value}" for key, value in where.items() if value is not None))
    rows = []
    for name in args.model or MODELS:
        times = measure(variants(name, args.device), args.rounds)
        ratios = {
            "torch.ao eager / ours eager": times["torch.ao, eager"] / times["qkernels, eager"],
            "torch.ao eager / ours compiled": times["torch.ao, eager"] / times["qkernels, compiled"],
            "ours compiled / float compiled": times["qkernels, compiled"] / times["float, compiled"],
        }
        rows.append({"model": name, "milliseconds": times, "ratios": ratios})
        print(f"\n{name}: milliseconds per step")
        for key, value in times.items():
            print(f"  {key:<22}{value:>9.2f}")
        for key, value in ratios.items():
            print(f"  {key:<34}{value:>6.2f}")
        if args.json:
            args.json.write_text(json.dumps({"environment": where, "rows": rows}, indent=1, default=str) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
