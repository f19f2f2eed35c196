"""The registry: what is timed, against whom, on which inputs, and how many bytes the job has to move.

A case joins by one builder, decorated with `@case(...)`, that returns a `Bench` for a device. Its `impls` are callables
of an input and a gradient of its shape, "qkernels" first, then the peers; its `results` runs one of them by name on
fresh state and returns what the gate compares.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.inputs import ACTIVATIONS, PER_TENSOR, SMALL, TOKENS, Granularity, Input, Inputs, Shape, plain
from benchmarks.peers import COMPILED, OURS, TORCH, TORCHAO, absence

Impl = Callable[[Tensor, Tensor], object]

JUDGES = (TORCH, TORCHAO)  # on a CPU, ours must give their bits; other peers may round differently, which is reported


@dataclass(frozen=True)
class Bench:
    """One case on one device.

    Attributes:
        impls: implementations of the same job.
        results: what one of them gives for an input.
        absent: peers that do not take part, with the reason.
    """

    impls: dict[str, Impl]
    results: Callable[[str, Tensor], object]
    absent: dict[str, str] = field(default_factory=dict)


Builder = Callable[[torch.device], Bench]


@dataclass(frozen=True)
class Case:
    """A named job.

    Attributes:
        name: unique.
        build: makes its bench for a device.
        passes: how often, at the least, a tensor of the input's size is read or written; 0 where bytes say nothing.
        cpu: its inputs on a CPU.
        cpu_quick: those of a quick run.
        cuda: its inputs on a GPU.
        cpu_more: what a full run adds on a CPU.
        cuda_more: what a full run adds on a GPU.
        suite: "kernels" (operators) or "modules".
        peers: whom it is compared with, where they are installed.
        tiny: a shape that the job takes and that is done in no time.
        dtypes: those that ours takes.
    """

    name: str
    build: Builder
    passes: int
    cpu: Inputs
    cpu_quick: Inputs
    cuda: Inputs = ()
    cpu_more: Inputs = ()
    cuda_more: Inputs = ()
    suite: str = "kernels"
    peers: tuple[str, ...] = (TORCH,)
    tiny: Shape = (6, 5, 4, 3)
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")

    def bytes_moved(self, x: Tensor) -> int:
        """The least that the job reads and writes."""
        return self.passes * x.nbytes

    @property
    def bytes_formula(self) -> str:
        """The same in words."""
        return f"{self.passes} x bytes of the input" if self.passes else "not counted"

    def inputs(self, device: torch.device, suite: str) -> Inputs:
        """What the case is timed on in a suite; nothing where it has no input for such a device."""
        if device.type == "cuda":
            usual, more = self.cuda, self.cuda_more
            quick = (*self.cuda[:1], *self.cuda[-1:])
        else:
            usual, more, quick = self.cpu, self.cpu_more, self.cpu_quick
        chosen: tuple[Input, ...] = quick if suite == "quick" else usual + more if suite == "full" else usual
        return tuple(dict.fromkeys(chosen))


CASES: dict[str, Case] = {}

_USUAL = (SMALL, ACTIVATIONS, TOKENS)


def case(
    name: str,
    *,
    passes: int,
    suite: str = "kernels",
    shapes: tuple[Shape, ...] = _USUAL,
    granularity: Granularity = PER_TENSOR,
    peers: tuple[str, ...] = (TORCH,),
    tiny: Shape = Case.tiny,
    dtypes: tuple[str, ...] = Case.dtypes,
) -> Callable[[Builder], Builder]:
    """Register a builder under `name`. `shapes` are those of the CPU; a quick run leaves out the tokens."""

    def register(build: Builder) -> Builder:
        CASES[name] = Case(
            name,
            build,
            passes,
            cpu=plain(*shapes),
            cpu_quick=plain(*(shape for shape in shapes if shape != TOKENS)),
            cuda=granularity.cuda,
            cpu_more=granularity.full,
            cuda_more=granularity.cuda_full,
            suite=suite,
            peers=peers,
            tiny=tiny,
            dtypes=dtypes,
        )
        return build

    return register


def gather(
    device: torch.device, impls: dict[str, Impl], optional: dict[str, Callable[[], Impl]]
) -> tuple[dict[str, Impl], dict[str, str]]:
    """`impls` and those of the optional peers that can take part, and why the others cannot."""
    taking_part, absent = dict(impls), {}
    for peer, make in optional.items():
        reason = absence(peer, device)
        if reason is None:
            try:
                taking_part[peer] = make()
            except ImportError as error:
                reason = f"installed, but {error}"
        if reason is not None:
            absent[peer] = reason
    return taking_part, absent


def of_steps(
    device: torch.device, impls: dict[str, Impl], optional: dict[str, Callable[[], Impl]] | None = None
) -> Bench:
    """A bench of pure functions of an input and a gradient. `optional` ones are made where the peer is installed."""
    taking_part, absent = gather(device, impls, optional or {})
    return Bench(taking_part, lambda name, x: taking_part[name](x, x), absent)


def of_functions(
    ours: Callable[[Tensor], object],
    torchs: Callable[[Tensor], object],
    compiled: Callable[[Tensor], object] | None = None,
) -> Bench:
    """A bench of pure functions of an input."""
    functions = {OURS: ours, TORCH: torchs, **({COMPILED: compiled} if compiled else {})}
    impls: dict[str, Impl] = {
        name: lambda x, dy, function=function: function(x)  # type: ignore[misc]  # bound by its default
        for name, function in functions.items()
    }
    return Bench(impls, lambda name, x: impls[name](x, x))


def train_step(function: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Forward and backward."""
    leaf = x.detach().requires_grad_()
    y = function(leaf)
    return y.detach(), torch.autograd.grad(y, leaf, dy)[0]
