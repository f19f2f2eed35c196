"""Swap torch.ao's and torchao's observers and fake quantizers in a prepared model for ours, in place; freeze a model.

Our classes extend the stock ones and add no persistent state, so a module is swapped by giving it another class. Its
identity, state, flags, device, dtype, training mode, hooks and attributes stay; instances that several layers share
stay shared, and plain references to them (torchao's derived quantizers hold such) stay right.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.ao.quantization.quantize import _observer_forward_hook, _observer_forward_pre_hook

from qkernels.modules.counterparts import counterparts
from qkernels.modules.fake_quant_core import FakeQuantizeCore
from qkernels.modules.histogram_core import HistogramCore
from qkernels.modules.observer_core import MinMaxCore
from qkernels.modules.report import table
from qkernels.modules.simple_observers import PassThroughCore
from qkernels.modules.stock import is_stock

CORES = (MinMaxCore, HistogramCore, FakeQuantizeCore, PassThroughCore)


@dataclass(frozen=True)
class SwapEntry:
    """One module that was swapped: its name in the model, and the names of its old and new class."""

    name: str
    old: str
    new: str


@dataclass(frozen=True)
class LeftEntry:
    """One observer or fake quantizer that was left as it was, and why."""

    name: str
    type: str
    reason: str


@dataclass
class SwapReport:
    """What `swap` did. `print(report)` shows a table.

    Attributes:
        swapped: modules that have our class now.
        left: observers and fake quantizers that do not, each with the reason.
        hooks: number of the eager flow's observer hooks replaced.
    """

    swapped: list[SwapEntry] = field(default_factory=list)
    left: list[LeftEntry] = field(default_factory=list)
    hooks: int = 0

    def __str__(self) -> str:
        rows = [(e.name or "(the model)", _short(e.old), _short(e.new)) for e in self.swapped]
        rows += [(e.name or "(the model)", _short(e.type), f"left: {e.reason}") for e in self.left]
        summary = f"{len(self.swapped)} swapped, {len(self.left)} left, {self.hooks} hooks replaced"
        return f"{table(('module', 'was', 'is'), rows)}\n{summary}" if rows else summary


def _short(class_name: str) -> str:
    """Library and class, without the modules between."""
    library = "torch.ao" if class_name.startswith("torch.ao.") else class_name.split(".")[0]
    return f"{library}: {class_name.split('.')[-1]}"


def _class_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def observe_output(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Forward hook of the eager flow: pass the output through the module's observer, if it still has one."""
    observer = getattr(module, "activation_post_process", None)
    return output if observer is None else observer(output)


def observe_input(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Forward pre-hook of the eager flow: pass the first input through the module's observer, if it still has one."""
    observer = getattr(module, "activation_post_process", None)
    return inputs if observer is None else observer(inputs[0])


# Dynamo skips torch.ao's hooks, so they break every graph; the same functions from here are traced.
_HOOKS: list[tuple[Callable[..., Any], Callable[..., Any]]] = [
    (_observer_forward_hook, observe_output),
    (_observer_forward_pre_hook, observe_input),
]


def _exchange_hooks(model: nn.Module, exchange: list[tuple[Callable[..., Any], Callable[..., Any]]]) -> int:
    count = 0
    for module in model.modules():
        hooks: Any
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in hooks.items():
                replacement = next((new for old, new in exchange if hook is old), None)
                if replacement is not None:
                    hooks[key] = replacement
                    count += 1
    return count


def _reason_to_leave(module: nn.Module, stock: tuple[type, ...]) -> str | None:
    """Why an observer or fake quantizer without a counterpart is left; None for any other module."""
    if isinstance(module, CORES) or not any("ObserverBase" in c.__name__ or "FakeQuantizeBase" in c.__name__
                                            for c in type(module).__mro__ if is_stock(c)):  # fmt: skip
        return None
    if isinstance(module, stock):
        return "a subclass, which may do something else"
    if is_stock(type(module)):
        return "has no counterpart yet"
    return "not one of torch.ao's or torchao's classes"


def check_model(function: str, model: object) -> None:
    """`model` must be a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module; got {type(model).__name__}")


def swap(model: nn.Module) -> SwapReport:
    """Give every torch.ao and torchao observer and fake quantizer in a prepared model our class, in place.

    Nothing else changes: the same state, the same numbers, the same conversion. What changes is what runs: one or two
    launches per quantizer on a GPU, no host sync, and `torch.compile(fullgraph=True)`. A second swap does nothing.

    Args:
        model: a model prepared by the eager, FX or PT2E flow, or a single observer or fake quantizer.

    Returns:
        What was swapped, and what was left and why.

    Raises:
        TypeError: model is not a module.

    Example:
        >>> import torch, qkernels
        >>> from torch.ao.quantization import FakeQuantize
        >>> model = torch.nn.Sequential(torch.nn.ReLU(), FakeQuantize())
        >>> print(qkernels.swap(model).swapped[0].new)
        qkernels.modules.fake_quant.FakeQuantize
    """
    check_model("swap", model)
    pairs = counterparts()
    report = SwapReport()
    module: Any
    for name, module in model.named_modules():
        cls = type(module)
        if cls in pairs:
            module.__class__ = pairs[cls]
            module._init_core()
            report.swapped.append(SwapEntry(name, _class_name(cls), _class_name(pairs[cls])))
        elif reason := _reason_to_leave(module, tuple(pairs)):
            report.left.append(LeftEntry(name, _class_name(cls), reason))
    report.hooks = _exchange_hooks(model, _HOOKS)
    return report


def unswap(model: nn.Module) -> None:
    """Give every module of ours, and every subclass of one, the stock class that it extends, in place.

    Frozen observers stay: a stock one would observe again.
    """
    module: Any
    for module in model.modules():
        if isinstance(module, CORES) and (isinstance(module, FakeQuantizeCore) or not module.frozen):
            before_unswap: Any = getattr(module, "before_unswap", None)
            if before_unswap is not None:
                before_unswap()
            derived = ("workspace", *getattr(module, "derived_buffers", ()))
            module.__class__ = next(cls for cls in type(module).__mro__ if is_stock(cls))
            for name in derived:
                module._buffers.pop(name, None)
                module._non_persistent_buffers_set.discard(name)
    _exchange_hooks(model, [(ours, stock) for stock, ours in _HOOKS])


def freeze(model: nn.Module) -> nn.Module:
    """Stop all observation, in place: observers become identities, fake quantizers apply the qparams they have.

    For evaluation, torch.export and ONNX: no observing operator is left in a graph. Stock observers and fake quantizers
    are swapped first. Observers that have no counterpart cannot be frozen; a warning names them.

    Args:
        model: a prepared model.

    Returns:
        The model.
    """
    check_model("freeze", model)
    report = swap(model)
    for module in model.modules():
        if isinstance(module, FakeQuantizeCore):
            module.freeze()
        elif isinstance(module, MinMaxCore | HistogramCore | PassThroughCore):
            module.frozen = True
    inside = {f"{name}." if name else "" for name, m in model.named_modules() if isinstance(m, FakeQuantizeCore)}
    bare = [entry.name for entry in report.left if not any(entry.name.startswith(prefix) for prefix in inside)]
    if bare:
        warnings.warn(f"freeze: these keep observing, for want of a counterpart: {', '.join(bare)}", stacklevel=2)
    return model
