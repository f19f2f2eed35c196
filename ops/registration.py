"""Registration: one library, one way to give an operator its implementations, its fake and its decomposition.

A call through `torch.library.Library` define/impl takes 2.6 us where `torch.library.custom_op` takes 8.7 us (17.5 us
with a mutated argument), measured on one CPU with a trivial kernel and torch 2.13. Observers are called on tensors so
small that this matters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._C import _are_functorch_transforms_active, _is_tracing, _len_torch_dispatch_stack
from torch._C._autograd import _profiler_enabled
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.compiler import is_compiling

from qkernels.launch import INTERPRETED

# Version of the numbers this package produces under torch.compile. Raise it with every change of a decomposition:
# AOTAutograd's disk cache keys on the graph before decomposition and would otherwise serve code of the old formula.
NUMERICS_VERSION = 5

LIBRARY = torch.library.Library("qkernels", "DEF")


def extend_cache_key() -> None:
    """Put the numerics version into the key of torch.compile's caches, once."""
    tag = f"qkernels:{NUMERICS_VERSION}"
    current = torch.compiler.config.cache_key_tag
    if tag not in current.split("|"):
        torch.compiler.config.cache_key_tag = f"{current}|{tag}" if current else tag


def register(
    schema: str,
    *,
    aten: Callable[..., Any],
    triton: Callable[..., Any],
    fake: Callable[..., Any],
) -> Any:
    """Define `qkernels::<schema>` with its CPU, CUDA and fake implementations.

    Args:
        schema: name and signature in torch's schema language, mutated arguments annotated.
        aten: implementation for CPU tensors.
        triton: implementation for CUDA tensors, and for CPU tensors when Triton interprets.
        fake: shapes, strides and dtypes of the results; raises what the implementations raise.

    Returns:
        The `.default` overload.
    """
    name = LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
    # With TRITON_INTERPRET=1 Triton runs kernels on CPU tensors. The operators then use them there, so that everything
    # built on the operators can be tested against the kernels without a GPU.
    direct = implementations(aten, triton)
    LIBRARY.impl(name, _below_autograd(direct["cpu"]), "CPU")
    LIBRARY.impl(name, _below_autograd(direct["cuda"]), "CUDA")
    torch.library.register_fake(f"qkernels::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.qkernels, name).default


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _below_autograd(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation with autograd out of its way."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return implementation(*args, **kwargs)

    return call


def runs_directly(
    *tensors: Any,
    axis: Any = None,
    ints: tuple[Any, ...] = (),
    numbers: tuple[Any, ...] = (),
    optional: tuple[Any, ...] = (),
) -> bool:
    """Whether an eager call may go past the dispatcher to its implementation.

    learnable_fake_quantize of 64 x 16 elements takes 22 us so, and 38 through the dispatcher (one CPU, torch 2.13).
    Not under torch.compile, torch.func, tracing or a dispatch mode, not for tensor subclasses, and not under the
    profiler, which is to show the operators by name. Nor for arguments of other types: the schema refuses or converts.

    Args:
        tensors: arguments that must be tensors.
        axis: argument that must be int or None.
        ints: arguments that must be int.
        numbers: arguments that must be int, float or None.
        optional: arguments that must be tensors or None.
    """
    if axis is not None and type(axis) is not int:
        return False
    for value in ints:
        if type(value) is not int:
            return False
    for value in numbers:
        if value is not None and type(value) is not float and type(value) is not int:
            return False
    for tensor in optional:
        if tensor is not None and type(tensor) not in _PLAIN:
            return False
    for tensor in tensors:
        if type(tensor) not in _PLAIN:
            return False
    return not (
        is_compiling()
        or _are_functorch_transforms_active()
        or _len_torch_dispatch_stack()
        or _len_torch_dispatch_stack_pre_dispatch()
        or _is_tracing()
        or _profiler_enabled()
    )


def implementations(aten: Callable[..., Any], triton: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """What `register` registers, by device type, for calls that `runs_directly`."""
    return {"cpu": triton if INTERPRETED else aten, "cuda": triton}


def directly(implementations: dict[str, Callable[..., Any]], *tensors: Any, **others: Any) -> Callable[..., Any] | None:
    """The implementation for an eager call that `runs_directly`, with autograd out of its way; else None."""
    if not runs_directly(*tensors, **others):
        return None
    implementation = implementations.get(tensors[0].device.type)
    if implementation is None or not torch.is_grad_enabled():
        return implementation
    return _below_autograd(implementation)


def not_differentiable(op: Any) -> Any:
    """Keep autograd out of an operator: results and written arguments require no gradient, whatever x does.

    The dispatcher skips autograd, and the implementations run below it: else the ATen one would chain every batch's
    graph into the running statistics.
    """
    LIBRARY.impl(op._schema.name.split("::")[1], torch.library.fallthrough_kernel, "Autograd")
    return op


def decompose(op: Any, composition: Callable[..., Any], keep: Callable[..., bool]) -> None:
    """Let torch.compile see `composition` in place of `op`, so that Inductor fuses it with its neighbours.

    torch.export and eager calls still see one operator. The exporter to ONNX does too: it translates the operator.

    Args:
        op: overload returned by `register`.
        composition: the same function in ATen operations.
        keep: called with the operator's arguments; True leaves the operator as it is.
    """

    def rule(mode: Any, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.onnx.is_in_onnx_export() or keep(*args, **kwargs):
            return mode.__torch_dispatch__(func, types, args, kwargs)
        with mode:
            return composition(*args, **kwargs)

    torch.library.register_torch_dispatch(op, FunctionalTensorMode, rule, lib=LIBRARY)


extend_cache_key()
