"""Audit the memory accesses of kernels in Triton's interpreter: what is touched, how often, by whom, in which order.

Recorded for every launch inside a `trace` block:
* loads and stores per element of every tensor that a kernel is given (so "reads x once" is an assertion);
* accesses that hit no element of those tensors, masked lanes aside. They are suppressed, so an out-of-bounds access is
  a report, not a crash. The gaps of a strided view are out of bounds;
* races: two programs touch an element, one of them writes, and no release/acquire chain of atomics orders them. Judged
  from the accesses, not from the result, which may happen to be right. A block store by many threads is published by
  an atomic only after a barrier (`tl.debug_barrier`), as on a GPU.
`order` shuffles the order in which programs run.

Private interfaces used (Triton 3.6 to 3.9): `triton.runtime.interpreter`'s `InterpreterBuilder.create_*` methods,
`interpreter_builder`, `GridExecutor.__call__`, `TensorHandle`.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton
from triton.runtime import interpreter

from tests.lanes.null_driver import flatten

_UNPUBLISHED = np.iinfo(np.int64).max
_PUBLISHING = {"RELEASE", "ACQUIRE_RELEASE"}
_SEEING = {"ACQUIRE", "ACQUIRE_RELEASE"}


class _Storage:
    """Counters of one storage; every array has an entry per byte, used where an element starts."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.keep = tensor.untyped_storage()  # alive, so that its addresses are not handed out again
        self.base = self.keep.data_ptr()
        self.size = self.keep.nbytes()
        self.loads = np.zeros(self.size, np.int64)
        self.stores = np.zeros(self.size, np.int64)
        self.traffic = 0
        self.start_launch()

    def start_launch(self) -> None:
        self.legal = np.zeros(self.size, np.uint8)  # bit mask of the element sizes that may be accessed here
        self.writer = np.full(self.size, -1, np.int64)
        self.written_at = np.zeros(self.size, np.int64)
        self.atomic = np.zeros(self.size, bool)
        self.reader = np.full(self.size, -1, np.int64)
        self.read_at = np.zeros(self.size, np.int64)


def element_offsets(tensor: torch.Tensor) -> np.ndarray:
    """Byte offset, within its storage, of every logical element of a tensor (repeats for expanded ones)."""
    offsets = np.full((), tensor.storage_offset(), np.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = np.add.outer(offsets, np.arange(size, dtype=np.int64) * stride)
    return offsets.ravel() * tensor.element_size()


@dataclass
class Trace:
    """What was recorded.

    Attributes:
        launches: kernel names, in order.
        programs: how many programs ran in all.
        faults: out-of-bounds accesses and races, counted by description.
        storages: counters by address of the storage.
    """

    launches: list[str] = field(default_factory=list)
    programs: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    storages: dict[int, _Storage] = field(default_factory=dict)

    def counts(self, tensor: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(loads, stores, multiplicity) of each distinct element of `tensor`; multiplicity > 1 for expanded ones."""
        offsets, multiplicity = np.unique(element_offsets(tensor), return_counts=True)
        storage = self.storages.get(tensor.untyped_storage().data_ptr())
        if storage is None:
            return np.zeros_like(offsets), np.zeros_like(offsets), multiplicity
        return storage.loads[offsets], storage.stores[offsets], multiplicity

    def traffic_outside(self, tensors: list[torch.Tensor]) -> int:
        """Bytes loaded and stored in storages that none of `tensors` lives in."""
        named = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        return sum(storage.traffic for base, storage in self.storages.items() if base not in named)


class _Recorder:
    """Runs beside the interpreter: resolves addresses, counts, and keeps vector clocks of programs."""

    def __init__(self) -> None:
        self.trace = Trace()
        self.kernel = ""

    def start_launch(self, kernel: str, leaves: list[tuple[str, Any]]) -> None:
        self.kernel = kernel
        self.trace.launches.append(kernel)
        for storage in self.trace.storages.values():
            storage.start_launch()
        for _, tensor in leaves:
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                base = tensor.untyped_storage().data_ptr()
                storage = self.trace.storages.setdefault(base, _Storage(tensor))
                storage.legal[element_offsets(tensor)] |= tensor.element_size()
        self.seen: dict[int, dict[int, int]] = {}  # program -> what it has seen of the others: program -> epoch
        self.epochs: dict[int, int] = {}
        self.published: dict[int, dict[int, int]] = {}  # address of an atomic -> clock
        self.unfenced: list[tuple[_Storage, np.ndarray]] = []
        self.program = 0

    def start_program(self, number: int) -> None:
        self.trace.programs += 1
        self.program = number
        self.seen.setdefault(number, {})
        self.epochs.setdefault(number, 1)
        self.unfenced = []

    def fault(self, kind: str, count: int) -> None:
        if count:
            self.trace.faults[f"{self.kernel}: {kind}"] += count

    def access(self, kind: str, pointers: Any, mask: Any) -> np.ndarray:
        """Record a load, store or atomic. Returns the mask without the lanes that are out of bounds."""
        addresses = np.asarray(pointers.data).astype(np.int64)
        active = np.broadcast_to(np.asarray(mask.data, bool), addresses.shape)
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        legal = np.zeros(addresses.shape, bool)
        for storage in self.trace.storages.values():
            inside = active & (addresses >= storage.base) & (addresses + size <= storage.base + storage.size)
            if inside.any():
                inside[inside] = (storage.legal[addresses[inside] - storage.base] & size) != 0
                legal |= inside
                self.record(kind, storage, addresses[inside] - storage.base, size, block=addresses.size > 1)
        self.fault(f"{kind} out of bounds", int((active & ~legal).sum()))
        return active & legal

    def record(self, kind: str, storage: _Storage, offsets: np.ndarray, size: int, block: bool) -> None:
        storage.traffic += size * offsets.size * (2 if kind == "atomic" else 1)
        if kind != "store":
            np.add.at(storage.loads, offsets, 1)
        if kind != "load":
            np.add.at(storage.stores, offsets, 1)
        self.check_order(kind, storage, offsets)
        if kind != "load":
            storage.writer[offsets] = self.program
            storage.atomic[offsets] = kind == "atomic"
            storage.written_at[offsets] = _UNPUBLISHED if block and kind == "store" else self.epochs[self.program]
            if block and kind == "store":
                self.unfenced.append((storage, offsets))
        if kind == "load":
            storage.reader[offsets] = self.program
            storage.read_at[offsets] = self.epochs[self.program]

    def check_order(self, kind: str, storage: _Storage, offsets: np.ndarray) -> None:
        late = self.unordered(storage.writer[offsets], storage.written_at[offsets])
        if kind == "atomic":
            late &= ~storage.atomic[offsets]
        self.fault(f"race: {kind} after another program's store", int(late.sum()))
        if kind != "load":
            late = self.unordered(storage.reader[offsets], storage.read_at[offsets])
            self.fault(f"race: {kind} after another program's load", int(late.sum()))

    def unordered(self, programs: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """Where the access by `programs` at `epochs` is another program's and not ordered before this moment."""
        late = (programs >= 0) & (programs != self.program)
        seen = self.seen[self.program]
        for program in np.unique(programs[late]).tolist():
            late &= (programs != program) | (epochs > seen.get(program, 0))
        return late

    def barrier(self) -> None:
        for storage, offsets in self.unfenced:
            mine = offsets[storage.writer[offsets] == self.program]
            storage.written_at[mine] = self.epochs[self.program]
        self.unfenced = []

    def synchronize(self, pointers: Any, semantics: str) -> None:
        """An atomic: take what others published at its addresses, publish what this program did and has seen."""
        seen = self.seen[self.program]
        for address in np.unique(np.asarray(pointers.data)).tolist():
            clock = self.published.setdefault(address, {})
            if semantics in _SEEING:
                _merge(seen, clock)
            if semantics in _PUBLISHING:
                _merge(clock, {**seen, self.program: self.epochs[self.program]})
        if semantics in _PUBLISHING:
            self.epochs[self.program] += 1


def _merge(clock: dict[int, int], other: dict[int, int]) -> None:
    for program, epoch in other.items():
        clock[program] = max(clock.get(program, 0), epoch)


def _with_mask(mask: Any, values: np.ndarray) -> Any:
    return interpreter.TensorHandle(values, mask.dtype)


def _hooks(recorder: _Recorder, original: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Replacements for the builder's memory methods."""

    def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        kept = recorder.access("load", pointers, mask)
        return original["create_masked_load"](self, pointers, _with_mask(mask, kept), *rest)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        kept = recorder.access("store", pointers, mask)
        return original["create_masked_store"](self, pointers, value, _with_mask(mask, kept), *rest)

    def atomic_rmw(self: Any, op: Any, pointer: Any, value: Any, mask: Any, semantics: Any, scope: Any) -> Any:
        # Acquire before the access is judged: an atomic is ordered after the atomics it reads from.
        recorder.synchronize(pointer, semantics.name)
        kept = recorder.access("atomic", pointer, mask)
        return original["create_atomic_rmw"](self, op, pointer, value, _with_mask(mask, kept), semantics, scope)

    def atomic_cas(self: Any, pointer: Any, compare: Any, value: Any, semantics: Any, scope: Any) -> Any:
        recorder.synchronize(pointer, semantics.name)
        everything = interpreter.TensorHandle(np.ones(np.shape(pointer.data), bool), triton.language.int1)
        recorder.access("atomic", pointer, everything)
        return original["create_atomic_cas"](self, pointer, compare, value, semantics, scope)

    def barrier(self: Any) -> Any:
        recorder.barrier()
        return original["create_barrier"](self)

    return {
        "create_masked_load": load,
        "create_masked_store": store,
        "create_atomic_rmw": atomic_rmw,
        "create_atomic_cas": atomic_cas,
        "create_barrier": barrier,
    }


@contextlib.contextmanager
def trace(order: int | None = None) -> Iterator[Trace]:
    """Record every launch inside the block.

    Args:
        order: seed of a shuffled program order; None runs programs in the interpreter's own order.
    """
    recorder = _Recorder()
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    original = {name: getattr(builder, name) for name in _hooks(recorder, {})}
    set_grid_idx, call = builder.set_grid_idx, executor.__call__
    shuffled: dict[tuple[int, ...], tuple[int, int, int]] = {}

    def start_launch(self: Any, *arguments: Any, **keywords: Any) -> Any:
        named = [*zip(self.arg_names, arguments, strict=False), *keywords.items()]
        recorder.start_launch(self.fn.__name__, [leaf for name, value in named for leaf in flatten(name, value)])
        shuffled.clear()
        return call(self, *arguments, **keywords)

    def start_program(self: Any, x: int, y: int, z: int) -> None:
        nx, ny, nz = self.grid_dim
        if not shuffled:
            every = [(i, j, k) for i in range(nx) for j in range(ny) for k in range(nz)]
            others = every[:]
            if order is not None:
                random.Random(order).shuffle(others)
            shuffled.update(zip(every, others, strict=True))
        x, y, z = shuffled[x, y, z]
        recorder.start_program((x * ny + y) * nz + z)
        set_grid_idx(self, x, y, z)

    for name, hook in _hooks(recorder, original).items():
        setattr(builder, name, hook)
    builder.set_grid_idx, executor.__call__ = start_program, start_launch
    try:
        yield recorder.trace
    finally:
        for name, method in original.items():
            setattr(builder, name, method)
        builder.set_grid_idx, executor.__call__ = set_grid_idx, call
