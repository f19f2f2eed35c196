"""Counts, which a noisy machine does not move: ATen calls on a CPU; launches, host syncs and peak memory on a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

Impl = Callable[[Tensor, Tensor], object]


@dataclass(frozen=True)
class Counts:
    """What one call of an implementation does. None where the device has no such count.

    Attributes:
        aten_calls: on a CPU, ATen operations that PyTorch dispatches, views and allocations too. What a C++ operator
            calls inside is not seen. Ours are counted behind the dispatcher; an eager call may go past it, and then to
            fewer operations.
        launches: on a GPU, kernels, copies and fills.
        host_syncs: on a GPU, how often torch makes the host wait.
        peak_bytes: on a GPU, memory beyond what was allocated before the call.
    """

    aten_calls: int | None = None
    launches: int | None = None
    host_syncs: int | None = None
    peak_bytes: int | None = None


class _CountATen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("aten", "prims"):
            self.calls += 1
            return func(*args, **(kwargs or {}))
        # The Python implementation of an operator runs with this mode off. Its CPU kernel is called with the mode on.
        with self:
            return func._op_dk(torch._C.DispatchKey.CPU, *args, **(kwargs or {}))


def count_aten_calls(impl: Impl, x: Tensor) -> int:
    """ATen operations of one call on CPU tensors, also those inside operators that are written in Python."""
    with _CountATen() as mode:
        impl(x, x)
    return mode.calls


def _count_launches(impl: Impl, x: Tensor) -> int:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiled:
        impl(x, x)
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiled.events())


def _count_syncs(impl: Impl, x: Tensor) -> int:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            impl(x, x)
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def _peak_bytes(impl: Impl, x: Tensor) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(x.device)
    torch.cuda.reset_peak_memory_stats(x.device)
    impl(x, x)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(x.device) - before


def count(impl: Impl, x: Tensor, *, compiled: bool = False) -> Counts:
    """The counts of one call; the implementation has been called on such an input before.

    Of compiled code on a CPU there are none: it calls its own C++, not ATen.
    """
    if x.is_cuda:
        return Counts(
            launches=_count_launches(impl, x), host_syncs=_count_syncs(impl, x), peak_bytes=_peak_bytes(impl, x)
        )
    return Counts() if compiled else Counts(aten_calls=count_aten_calls(impl, x))
