"""What a kernel case is: how to call one Triton implementation, and what every lane may expect of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)

# Arguments and results go by name, so that lanes can say which tensor misbehaves.
Arguments = dict[str, Any]
Outputs = dict[str, torch.Tensor]
Make = Callable[[torch.device, torch.dtype, bool], Arguments]


@dataclass(frozen=True)
class KernelCase:
    """One operator on one kind of input, and its contract.

    Attributes:
        name: shown in test ids.
        make: (device, dtype, large) -> arguments of `run`. Small inputs (a few thousand elements, with a ragged end)
            are executed in the interpreter; large ones are only compiled for and never read. Must be deterministic.
        run: calls the Triton implementation; returns the tensors it produced by name. What it mutates stays in the
            arguments.
        launches: kernel launches of one call.
        reads: how often each element of an argument is loaded. An element that an expanded view shows m times may be
            loaded up to m times as often. Arguments not named are small and only bounded by `scratch_bytes`.
        writes: how often each element of an argument or output is stored.
        scratch_bytes: most bytes moved, small input, in all tensors that neither `reads` nor `writes` names.
        vector: consecutive elements that the large input's layout lets a thread take at once, a power of two. Every
            named tensor above `STREAMED` elements must be accessed 16 bytes at a time, or `vector` elements if that is
            less; inside the loop where the kernel loops over it.
        max_registers: per thread, on every CUDA target.
        cold_stack: bytes of stack that may be used outside innermost loops. Inside them a spill is always a fault.
        forbidden_ptx: texts that must not occur in the PTX.
        fused_multiply_adds: True if the formula contains a deliberate fma. False forbids every contraction.
        order_independent: results are bit-identical in every program order.
        dtypes: dtypes to try.
        sweep: (dtype, n) -> arguments, for counting compiled variants over many sizes; None leaves that out.
        max_configurations: most sets of constexprs that one kernel is launched with over the sweep. Each may be
            compiled three times, which Triton's specialization explains: the size is 1, a multiple of 16, or neither.
        thorough: compile for every target and dtype. False: one dtype for one target, because a thorough case goes
            through the same code.
    """

    name: str
    make: Make
    run: Callable[..., Outputs]
    launches: int = 1
    reads: Mapping[str, int] = field(default_factory=dict)
    writes: Mapping[str, int] = field(default_factory=dict)
    scratch_bytes: int = 0
    vector: int = 16
    max_registers: int = 128
    cold_stack: int = 0
    forbidden_ptx: tuple[str, ...] = ("div.full.f32", "div.approx", "rcp.approx")
    fused_multiply_adds: bool = False
    order_independent: bool = True
    dtypes: tuple[torch.dtype, ...] = FLOATS
    sweep: Callable[[torch.dtype, int], Arguments] | None = None
    max_configurations: int = 1
    thorough: bool = False

    def __str__(self) -> str:
        return self.name


STREAMED = 4096  # a named tensor with more elements than this is traffic; a smaller one is a parameter


def short(dtype: torch.dtype) -> str:
    """`float32` of `torch.float32`, for test ids."""
    return str(dtype).removeprefix("torch.")


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, shape and strides one element past the start of a fresh allocation."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    moved = torch.empty(extent + 1, dtype=tensor.dtype, device=tensor.device)
    moved = moved.as_strided(tensor.shape, tensor.stride(), storage_offset=1)
    return moved.copy_(tensor)
