"""Run a prepared model with stock classes and with ours, side by side, and name the first difference."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.modules.report import table
from qkernels.modules.swapping import CORES, check_model, swap, unswap


@dataclass(frozen=True)
class Difference:
    """One place where the two differ.

    Attributes:
        batch: number of the batch, from 0.
        layer: name of the observer or fake quantizer.
        buffer: name of the buffer or parameter, or "output".
        index: first index that differs; () if shapes or dtypes differ, or for a scalar.
        stock: the stock value there, or its shape and dtype.
        ours: our value there, or its shape and dtype.
    """

    batch: int
    layer: str
    buffer: str
    index: tuple[int, ...]
    stock: Any
    ours: Any


@dataclass
class VerifyReport:
    """Outcome of `verify`; true if nothing differs. `print(report)` names the first differences.

    Attributes:
        batches: number of batches run.
        layers: number of observers and fake quantizers compared.
        differences: the first difference of every buffer and output, in the order they appeared.
    """

    batches: int = 0
    layers: int = 0
    differences: list[Difference] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return not self.differences

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        summary = f"{self.layers} layers over {self.batches} batches: "
        if self.ok:
            return summary + "every buffer and every fake-quantized output is equal, bit for bit"
        rows = [
            (str(d.batch), d.layer or "(the model)", d.buffer, str(d.index), str(d.stock), str(d.ours))
            for d in self.differences
        ]
        header = ("batch", "layer", "buffer", "index", "stock", "ours")
        return f"{summary}{len(rows)} differ\n{table(header, rows)}"


def _first_difference(stock: Tensor, ours: Tensor) -> tuple[tuple[int, ...], Any, Any] | None:
    """(index, stock value, our value) of the first element that differs; NaN equals NaN."""
    if stock.shape != ours.shape or stock.dtype != ours.dtype:
        return (), (tuple(stock.shape), stock.dtype), (tuple(ours.shape), ours.dtype)
    differs = (stock != ours) & ~(stock.isnan() & ours.isnan())
    if not differs.any():
        return None
    index = tuple(int(i) for i in differs.nonzero()[0])
    return index, stock[index].item(), ours[index].item()


def _outputs(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """A dict that forward hooks fill with the latest output of the named modules."""
    latest: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    for name in names:

        def keep(module: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
            latest[name] = output.detach().clone()

        modules[name].register_forward_hook(keep)
    return latest


def _run(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple | list):
        model(*batch)
    else:
        model(batch)


def _state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own buffers and parameters."""
    yield from module.named_buffers(recurse=False)
    yield from ((name, parameter.detach()) for name, parameter in module.named_parameters(recurse=False))


def _compare(stock: nn.Module, ours: nn.Module, outputs: tuple[dict[str, Tensor], dict[str, Tensor]],
             names: list[str]) -> Iterator[tuple[str, str, tuple[int, ...], Any, Any]]:  # fmt: skip
    """(layer, buffer, index, stock value, our value) of everything that differs now."""
    stock_modules, our_modules = dict(stock.named_modules()), dict(ours.named_modules())
    for name in names:
        state = dict(_state(our_modules[name]))
        pairs = [(key, value, state[key]) for key, value in _state(stock_modules[name]) if key in state]
        if name in outputs[0] and name in outputs[1]:
            pairs.append(("output", outputs[0][name], outputs[1][name]))
        for buffer, theirs, mine in pairs:
            if found := _first_difference(theirs, mine):
                yield name, buffer, *found


def verify(model: nn.Module, batches: Iterable[Any]) -> VerifyReport:
    """Check that swapping changes nothing: run the stock version and ours over the same batches and compare.

    Both run on deep copies, from the same state and the same random numbers, in the model's own mode (train or eval),
    without gradients. After each batch every buffer and parameter of every observer and fake quantizer is compared bit
    for bit, and the output of every one of them.

    Args:
        model: a prepared model, with stock classes or with ours. It is left as it is.
        batches: what the model takes: tensors, tuples of positional or mappings of keyword arguments.

    Returns:
        The report; true if nothing differs. Comparison stops after the first batch with a difference, since all that
        comes later follows from it.
    """
    check_model("verify", model)
    stock, ours = copy.deepcopy(model), copy.deepcopy(model)
    unswap(stock)
    swap(ours)
    names = [name for name, module in ours.named_modules() if isinstance(module, CORES)]
    outputs = _outputs(stock, names), _outputs(ours, names)
    report = VerifyReport(layers=len(names))
    for number, batch in enumerate(batches):
        for variant in (stock, ours):
            with torch.no_grad(), torch.random.fork_rng():
                torch.manual_seed(number)  # the same dropout in both, on every device
                _run(variant, copy.deepcopy(batch))  # a model may write into its input
        report.batches += 1
        report.differences = [Difference(number, *found) for found in _compare(stock, ours, outputs, names)]
        if report.differences:
            break
    return report
