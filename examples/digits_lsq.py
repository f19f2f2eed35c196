"""Learned step sizes on real handwritten digits, at 8, 4 and 2 bits: against straight-through QAT and against torch.ao.

The small CNN of digits_qat.py is trained in float, then with weights (per channel) and activations quantized, all but
the last layer's, which stay at 8 bits, four times for each number of bits, from the same float state, over the same
batches, with the same optimizer:

* straight-through QAT: scales from moving averages, with our FakeQuantize in eager mode;
* learned step sizes (LSQ) with torch.ao's own `_LearnableFakeQuantize`, in eager mode;
* the same with ours, in eager mode: its first loss is equal bit for bit, or this script exits with status 1;
* the same with ours under `torch.compile(fullgraph=True)`: one graph, through the change from observing to learning.

The four take turns at every step, so that whatever else the machine does slows all of them. Run it with `make demo` or
`python examples/digits_lsq.py`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._functorch.config
import torch.ao.quantization as torch_ao
from digits_qat import BATCH, WARMUP_STEPS, Digits, accuracy, has_compiler, make_cnn, train
from torch import Tensor, nn
from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

import qkernels.modules as ours
from qkernels.modules.learning import (
    LearningSchedule,
    learnable_qconfig,
    learnable_qconfig_mapping,
    parameter_groups,
    prepare_learnable,
)

OBSERVE_STEPS = 10  # activations are observed for so long before their scales learn
FIRST_STEPS = 20  # the losses of torch.ao and ours are compared over so many steps
RATE, QPARAM_RATE = 0.05, 0.03  # falling to 0 along a cosine
LAST_LAYER = "11"  # stays at 8 bits, as in the paper
TORCH_AO, EAGER, COMPILED = "LSQ, torch.ao, eager", "LSQ, qkernels, eager", "LSQ, qkernels, compiled"
FIRST_LOSS_BOUND = 0.0  # ours in eager mode, against torch.ao on the CPU: the forward promises equal bits


@dataclass
class Variant:
    """One way to train at one number of bits: what runs, and what came of it."""

    name: str
    model: nn.Module
    forward: Callable[[Tensor], Tensor]  # the model itself, or what torch.compile made of it
    groups: list[dict[str, Any]]
    steps: int
    after_step: Callable[[], Any] = int  # changes the stage when it is time; int() does nothing
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    scales_before: dict[str, Tensor] = field(default_factory=dict)  # when they begin to learn
    graphs: int | None = None

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD(self.groups, lr=RATE, momentum=0.9)
        self.decay = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, self.steps)

    def step(self, x: Tensor, y: Tensor) -> None:
        """One training step, timed with what its schedule does."""
        start = time.perf_counter()
        self.model.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(self.forward(x), y)
        loss.backward()
        self.optimizer.step()
        self.after_step()
        if x.is_cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - start)
        self.decay.step()
        self.losses.append(loss.item())
        if len(self.losses) == OBSERVE_STEPS:
            self.scales_before = scales(self.model)

    @property
    def seconds_per_step(self) -> float:
        """Median of the steps that learn, but of all if there are none, without the first, which compile."""
        return statistics.median(self.seconds[max(WARMUP_STEPS, OBSERVE_STEPS + 1) :] or self.seconds[1:])


def scales(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the scales of learnable quantizers; ours are instances of torch.ao's class too."""
    return {
        name: module.scale.detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, _LearnableFakeQuantize)
    }


def activation_bits(bits: int) -> int:
    """8 bits of activations are 7 on CPUs without VNNI, whose int8 operators overflow: torch.ao's reduce_range."""
    return 7 if bits == 8 and not torch.cpu._is_vnni_supported() else bits


def prepare(
    float_model: nn.Module, example: Tensor, bits: int, fake_quantize: Any, observers: Any, learned: bool
) -> nn.Module:
    """torch.ao's FX flow with a class of fake quantizers, told the numbers of channels if they are to be learned."""
    mapping = torch_ao.QConfigMapping()
    for name, layer in float_model.named_children():
        # Each layer has its own number of channels, so its own qconfig, and what it is fused with has the same.
        if isinstance(layer, nn.Conv2d | nn.Linear):
            width = 8 if name == LAST_LAYER else bits
            half = 2 ** (width - 1)
            options = {"use_grad_scaling": True} if learned else {}
            activation = fake_quantize.with_args(
                observer=observers.MovingAverageMinMaxObserver,
                quant_min=0,
                quant_max=2 ** activation_bits(width) - 1,
                **options,
            )
            weight = fake_quantize.with_args(
                observer=observers.MovingAveragePerChannelMinMaxObserver,
                quant_min=-half,
                quant_max=half - 1,
                dtype=torch.qint8,
                qscheme=torch.per_channel_symmetric,
                **(options | {"channel_len": len(layer.weight)} if learned else {}),
            )
            qconfig = torch_ao.QConfig(activation=activation, weight=weight)
        mapping.set_module_name(name, qconfig)
    return prepare_qat_fx(copy.deepcopy(float_model).train(), mapping, (example,))


def torch_ao_stages(model: nn.Module) -> Callable[[], None]:
    """What LearningSchedule does, for torch.ao: it has only the flags, set and read on the host."""
    quantizers = [module for module in model.modules() if isinstance(module, _LearnableFakeQuantize)]
    for quantizer in quantizers:
        quantizer.toggle_qparam_learning(False)
    steps = 0

    def after_step() -> None:
        nonlocal steps
        steps += 1
        if steps == OBSERVE_STEPS:
            for quantizer in quantizers:
                quantizer.enable_param_learning()

    return after_step


def torch_ao_groups(model: nn.Module, prepared: nn.Module) -> list[dict[str, Any]]:
    """The parameter groups of `prepared`, which holds ours, for torch.ao's model: by name."""
    names = {id(parameter): name for name, parameter in prepared.named_parameters()}
    parameters = dict(model.named_parameters())
    groups = parameter_groups(prepared, qparam_lr=QPARAM_RATE)
    return [group | {"params": [parameters[names[id(p)]] for p in group["params"]]} for group in groups]


def make_variants(float_model: nn.Module, example: Tensor, bits: int, backend: str, steps: int) -> list[Variant]:
    """All of them at one number of bits, from one float state; those that learn from one prepared state."""
    model = prepare(float_model, example, bits, ours.FakeQuantize, ours, learned=False)
    variants = [Variant("straight-through, eager", model, model, [{"params": list(model.parameters())}], steps)]

    options = {"grad_scale_elements": "tensor"}  # torch.ao's count for the gradients' scale; the default is the paper's
    mapping = learnable_qconfig_mapping(bits, activation_bits(bits), **options)
    mapping.set_module_name(LAST_LAYER, learnable_qconfig(8, activation_bits(8), **options))
    prepared = prepare_learnable(float_model, mapping, example, weight_init="mse")
    model = prepare(float_model, example, bits, _LearnableFakeQuantize, torch_ao, learned=True)
    model.load_state_dict(prepared.state_dict())  # the same names and shapes, or this raises
    groups = torch_ao_groups(model, prepared)
    variants.append(Variant(TORCH_AO, model, model, groups, steps, torch_ao_stages(model)))
    for name in (EAGER, COMPILED):
        model = copy.deepcopy(prepared)
        schedule = LearningSchedule(model, OBSERVE_STEPS)
        forward = model if name == EAGER else torch.compile(model, backend=backend, fullgraph=True)
        groups = parameter_groups(model, qparam_lr=QPARAM_RATE)
        variants.append(Variant(name, model, forward, groups, steps, schedule.step))
    return variants


def train_all(variants: list[Variant], digits: Digits, bits: int, args: argparse.Namespace) -> None:
    """Train all of them in turns, and show the progress."""
    for step, (x, y) in enumerate(digits.batches(args.steps, args.seed + 1)):
        for variant in variants:
            variant.step(x, y)
        if sys.stdout.isatty():
            print(f"\r  {bits} bits: step {step + 1} of {args.steps}, loss {variants[-1].losses[-1]:.3f}", end="")
            sys.stdout.flush()
    back = "\r" if sys.stdout.isatty() else ""
    total = sum(sum(variant.seconds) for variant in variants)
    first = f"the first compiled step {variants[-1].seconds[0]:.1f} s"
    print(f"{back}  {bits} bits: {args.steps} steps of each in {total:.1f} s, {first}", flush=True)


def run_bits(
    bits: int, float_model: nn.Module, digits: Digits, backend: str, args: argparse.Namespace
) -> list[Variant]:
    """Prepare and train all variants at one number of bits, and count the graphs of the compiled one."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    variants = make_variants(float_model, digits.train_x[:BATCH], bits, backend, args.steps)
    # torch 2.13's fused conv-bn modules read running_var before it is updated, and a compiled backward may read it
    # again after that: gradients off by several percent, with any quantizer (docs/learning.md). This forbids that.
    with torch._functorch.config.patch(max_dist_from_bw=0):
        train_all(variants, digits, bits, args)
    variants[-1].graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return variants


def change(variant: Variant) -> str:
    """By how much the scales moved while they learned: the median and the 95th percentile, in percent."""
    if not variant.scales_before:
        return "-"
    after = scales(variant.model)
    moved = torch.cat([(after[name] / before - 1).abs() for name, before in variant.scales_before.items()])
    return " / ".join(f"{100 * moved.quantile(q).item():.1f}" for q in (0.5, 0.95))


def report(bits: int, variants: list[Variant], digits: Digits) -> None:
    """Print accuracy, time, graphs and how the scales moved, of each variant."""
    images, labels = digits.test_x.cpu(), digits.test_y.cpu()
    reference = next(variant for variant in variants if variant.name == TORCH_AO).seconds_per_step
    for variant in variants:
        moved = change(variant)
        variant.model.cpu().eval().apply(torch_ao.disable_observer)  # or evaluation would move the scales
        fake = accuracy(variant.model, images, labels)
        int8 = f"{accuracy(convert_fx(copy.deepcopy(variant.model)), images, labels):.2f}" if bits == 8 else "-"
        graphs = "-" if variant.graphs is None else variant.graphs
        cells = f"{fake:>14.2f}{int8:>16}{moved:>17}{graphs:>8}"
        cells += f"{variant.seconds_per_step:>10.5f}{variant.seconds_per_step / reference:>8.2f}"
        print(f"{bits:>4}  {variant.name:<24}{cells}")


def compare_losses(bits: int, variants: list[Variant]) -> bool:
    """Print how the losses of ours compare with torch.ao's; says whether the first in eager mode is in its bound."""
    losses = {variant.name: variant.losses for variant in variants}
    expected = losses[TORCH_AO]
    for name in (EAGER, COMPILED):
        differences = [abs(loss - other) / abs(other) for loss, other in zip(losses[name], expected, strict=True)]
        equal = next((step for step, difference in enumerate(differences) if difference), len(differences))
        first = differences[:FIRST_STEPS]
        print(f"{bits:>4}  {name:<24}{differences[0]:>12.1e}{max(first):>16.1e}{equal:>20}")
    return abs(losses[EAGER][0] - expected[0]) <= FIRST_LOSS_BOUND * abs(expected[0])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description="Learned step sizes on handwritten digits, at few bits.")
    parser.add_argument("--steps", type=int, default=100, help="QAT steps of each variant (default: %(default)s)")
    parser.add_argument("--float-steps", type=int, default=300, help="float steps before (default: %(default)s)")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 2], choices=range(2, 9), metavar="2..8")
    parser.add_argument("--threads", type=int, default=1, help="the model is too small for more than %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, default=torch.device(default_device))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run everything; 1 when the first loss of ours in eager mode differs from torch.ao's on the CPU."""
    args = parse_args(argv)
    warnings.filterwarnings("ignore", message="torch.ao.quantization is deprecated")  # said on every call
    warnings.filterwarnings("ignore", module=r"torch\.ao\..*")
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.deterministic = True
    digits = Digits.load(args.device, args.seed)
    print(
        f"learned step sizes, handwritten digits: {len(digits.train_x)} for training, {len(digits.test_x)} for", end=" "
    )
    print(f"testing; torch {torch.__version__} on {args.device}, {args.threads} thread(s)")
    backend = "inductor" if has_compiler(args.device) else "aot_eager"
    if backend != "inductor":
        print("  note: no C++ compiler found, so torch.compile uses backend aot_eager: the same graph, no speed")
    if 8 in args.bits and activation_bits(8) < 8:
        print("  note: this CPU has no VNNI, so 8 bits are 7 for activations, torch.ao's reduce_range")

    float_model = make_cnn().to(args.device)
    train("float", float_model, float_model, digits.batches(args.float_steps, args.seed), rate=3e-3)
    float_accuracy = accuracy(float_model.eval(), digits.test_x, digits.test_y)
    runs = {bits: run_bits(bits, float_model, digits, backend, args) for bits in args.bits}

    print("\nlosses against torch.ao's: relative difference, and steps before one differs at all")
    print(f"bits  {'':<24}{'first step':>12}{f'first {FIRST_STEPS} steps':>16}{'equal bit for bit':>20}")
    within = [compare_losses(bits, variants) for bits, variants in runs.items()]

    print(f"\n{'':<30}accuracy on the test images, %   scales moved, %           seconds    time")
    print(f"{'bits':<30}fake-quantized  int8 operators    median / 95th  graphs  per step  torch.ao = 1")
    print(f"   -  {'float':<24}{float_accuracy:>14.2f}")
    for bits, variants in runs.items():
        report(bits, variants, digits)
    return 0 if all(within) or args.device.type != "cpu" else 1


if __name__ == "__main__":
    sys.exit(main())
