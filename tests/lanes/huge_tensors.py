"""Run a few programs of a launch over tensors of more than 2**31 elements, without the memory or the time.

The tensors are sparse files: they have addresses and no pages. Loads and stores are recorded and suppressed, and of a
loop only the first and the last turns run, so that only address arithmetic is tested: an offset or a bound that wrapped
around at 32 bits leaves the tensor, or does not reach its end.

Private interfaces used (Triton 3.6 to 3.9): those of `interpreter_trace`, and `GridExecutor.grid`.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

_MARGIN = 2**32  # elements before and after, so that an offset off by 2**32 hits no other tensor


def sparse(path: Path, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of any size that takes no memory until it is touched. The file is removed; the mapping keeps it."""
    extent = int(np.prod(shape, dtype=np.int64))
    with path.open("wb") as file:
        file.truncate((extent + 2 * _MARGIN) * dtype.itemsize)
    everything = torch.from_file(str(path), shared=True, size=extent + 2 * _MARGIN, dtype=dtype)
    path.unlink()
    return everything[_MARGIN : _MARGIN + extent].view(*shape)


@dataclass
class Reach:
    """The first and last byte touched in each tracked tensor, relative to its start; and accesses to no tensor."""

    tensors: dict[str, torch.Tensor]
    first: dict[str, int] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)
    astray: int = 0

    def extent(self, name: str) -> int:
        """Bytes from the start of a tensor to its end, gaps of a strided view included."""
        tensor = self.tensors[name]
        reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return reach * tensor.element_size()

    def note(self, pointers: Any, mask: Any) -> None:
        addresses = np.asarray(pointers.data).astype(np.int64)
        addresses = addresses[np.broadcast_to(np.asarray(mask.data, bool), addresses.shape)]
        for name, tensor in self.tensors.items():
            offsets = addresses - tensor.data_ptr()
            inside = (offsets >= 0) & (offsets < self.extent(name))
            if inside.any():
                self.first[name] = min(self.first.get(name, self.extent(name)), int(offsets[inside].min()))
                self.last[name] = max(self.last.get(name, 0), int(offsets[inside].max()))
            addresses = addresses[~inside]
        self.astray += addresses.size


def _first_and_last(*arguments: Any) -> Iterator[int]:
    """Stands in for `range` in a kernel."""
    turns = range(*(operator.index(argument) for argument in arguments))
    yield from turns if len(turns) <= 4 else (*turns[:2], *turns[-2:])


@contextlib.contextmanager
def reach_of(program: int, **tensors: torch.Tensor) -> Iterator[Reach]:
    """Run one program of every launch in the block, and record what it would touch.

    Args:
        program: number of the program in x, y, z order; -1 is the last one.
        **tensors: every tensor that the kernels are given.
    """
    reach = Reach(tensors)
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    names = ("create_masked_load", "create_masked_store", "create_atomic_rmw", "set_grid_dim", "set_grid_idx")
    original = {name: getattr(builder, name) for name in names}
    call = executor.__call__

    def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        reach.note(pointers, mask)
        nothing = interpreter.TensorHandle(np.zeros_like(np.asarray(mask.data, bool)), mask.dtype)
        return original["create_masked_load"](self, pointers, nothing, *rest)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> None:
        reach.note(pointers, mask)

    def atomic(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        reach.note(pointers, mask)
        return interpreter.TensorHandle(np.full_like(value.data, -2), value.dtype)  # never the last to arrive

    def one_program(self: Any, *arguments: Any, **keywords: Any) -> Any:
        grid = (*self.grid, 1, 1)[:3]
        number = program % int(np.prod(grid))
        index = tuple(int(i) for i in np.unravel_index(number, grid))
        builder.set_grid_dim = lambda self, *dims: original["set_grid_dim"](self, *grid)
        builder.set_grid_idx = lambda self, *dims: original["set_grid_idx"](self, *index)
        self.grid = (1, 1, 1)
        self.fn.__globals__["range"] = _first_and_last
        try:
            return call(self, *arguments, **keywords)
        finally:
            del self.fn.__globals__["range"]

    builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw = load, store, atomic
    executor.__call__ = one_program
    try:
        yield reach
    finally:
        for name, method in original.items():
            setattr(builder, name, method)
        executor.__call__ = call
