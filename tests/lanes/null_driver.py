"""A Triton driver with no GPU behind it: launchers run on CPU tensors, kernels really compile, nothing executes.

Private interfaces used (Triton 3.6 to 3.9): `triton.runtime.driver._active`, the `DriverBase` protocol with `utils`
and `launcher_cls`, the launcher's call signature, `JITFunction.device_caches`. Not for the interpreter, which never
asks a driver.

What a version changed, and where it is met:

* 3.8: a compiled kernel that is collected unloads its module, through whatever driver is then active. See
  `_Utils.load_binary`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver as _driver_config

CUDA_80 = GPUTarget("cuda", 80, 32)
CUDA_90 = GPUTarget("cuda", 90, 32)
CUDA_100 = GPUTarget("cuda", 100, 32)
HIP_942 = GPUTarget("hip", "gfx942", 64)

# Triton caches compiled kernels per device number; a number of its own for each driver keeps targets and counts apart.
_device_numbers = itertools.count(1000)


def flatten(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The leaves of a kernel argument as (name, value); a tuple's are named `arg.field` or `arg.index`."""
    if isinstance(value, tuple):
        names = getattr(value, "_fields", range(len(value)))
        for name, leaf in zip(names, value, strict=True):
            yield from flatten(f"{prefix}.{name}", leaf)
    else:
        yield prefix, value


@dataclass(frozen=True)
class Launch:
    """One kernel launch as the driver saw it.

    Attributes:
        kernel: name of the kernel function.
        grid: number of programs in x, y, z.
        arguments: leaf arguments by name (see `flatten`), constexprs included.
        compiled: Triton's CompiledKernel: `asm`, `metadata`, `src`.
    """

    kernel: str
    grid: tuple[int, int, int]
    arguments: Mapping[str, Any]
    compiled: Any

    @property
    def num_warps(self) -> int:
        return self.compiled.metadata.num_warps

    @property
    def parameters(self) -> list[str]:
        """Names of the binary's own parameters in order: the leaves that were not compiled in as constants."""
        leaves = [leaf for name, kind in self.compiled.src.signature.items() for leaf in flatten(name, kind)]
        return [name for name, kind in leaves if kind != "constexpr"]

    @property
    def constants(self) -> dict[str, Any]:
        """Values compiled into the binary, by leaf name: constexprs, None, and integers that are 1."""
        leaves = [leaf for name, kind in self.compiled.src.signature.items() for leaf in flatten(name, kind)]
        return {name: self.arguments.get(name) for name, kind in leaves if kind == "constexpr"}

    @property
    def configuration(self) -> tuple[tuple[str, Any], ...]:
        """What the launcher chose to compile in: the declared constexprs and the number of warps."""
        declared = {parameter.name for parameter in self.compiled.src.fn.params if parameter.is_constexpr}
        chosen = [(name, value) for name, value in self.arguments.items() if name in declared]
        return (*chosen, ("num_warps", self.num_warps))

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in self.arguments.items() if isinstance(value, torch.Tensor)}


@dataclass
class LaunchLog:
    """Everything launched under one `null_driver`."""

    launches: list[Launch] = field(default_factory=list)
    functions: set[Any] = field(default_factory=set)

    def clear(self) -> None:
        """Forget the launches; compiled kernels stay compiled, so that variants can be counted over many calls."""
        self.launches.clear()

    @property
    def kernels(self) -> list[str]:
        return [launch.kernel for launch in self.launches]

    def binaries(self) -> list[Launch]:
        """The first launch of every distinct compiled kernel."""
        return list({id(launch.compiled): launch for launch in reversed(self.launches)}.values())[::-1]

    def variants(self) -> dict[str, list[Launch]]:
        """Distinct compiled kernels by kernel name."""
        by_kernel: dict[str, list[Launch]] = {}
        for launch in self.binaries():
            by_kernel.setdefault(launch.kernel, []).append(launch)
        return by_kernel


class _Utils:
    """Loads nothing; the limits are an H200's."""

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[None, object, int, int, int]:
        """Module, function, registers, spills, most threads in a block.

        The module is None, which is never unloaded: Triton 3.8 would do that long after this driver is gone, fail for
        want of a driver, and so break whatever Python was at, such as parsing the next kernel.
        """
        return None, object(), 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": 232448,
            "max_num_regs": 65536,
            "multiprocessor_count": 132,
            "warpSize": 32,
            "sm_clock_rate": 1980000,
            "mem_clock_rate": 3201000,
            "mem_bus_width": 6144,
        }


class NullDriver(DriverBase):
    """Compiles for `target`, and writes every launch into `log`."""

    def __init__(self, target: GPUTarget, log: LaunchLog) -> None:
        self.target = target
        self.log = log
        self.device = next(_device_numbers)
        self.utils = _Utils()

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        """What Triton builds once per compiled kernel and then calls for every launch."""
        function = src.fn

        def record(grid_x: int, grid_y: int, grid_z: int, stream: int, handle: object, *rest: Any) -> None:
            # rest: packed metadata, launch metadata, two hooks, then every argument of the kernel function
            arguments = rest[-len(function.arg_names) :]
            leaves = [leaf for pair in zip(function.arg_names, arguments, strict=True) for leaf in flatten(*pair)]
            cache = function.device_caches[self.device][0]
            compiled = next(kernel for kernel in cache.values() if kernel.metadata is metadata)
            self.log.functions.add(function)
            self.log.launches.append(Launch(function.__name__, (grid_x, grid_y, grid_z), dict(leaves), compiled))

        return record

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return self.device

    def set_current_device(self, device: int) -> None:
        return None

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_benchmarker(self) -> Any:
        raise RuntimeError("the null driver runs nothing, so there is nothing to time")

    def get_empty_cache_for_benchmark(self) -> Any:
        raise RuntimeError("the null driver runs nothing, so there is nothing to time")

    def clear_cache(self, cache: Any) -> None:
        return None


@contextlib.contextmanager
def null_driver(target: GPUTarget = CUDA_90) -> Iterator[LaunchLog]:
    """Make launches inside the block compile for `target` and go into the log that is yielded.

    For an AMD target torch says that it was built for AMD, since that is what launchers ask.
    """
    log = LaunchLog()
    driver = NullDriver(target, log)
    previous = _driver_config._active
    _driver_config.set_active(driver)
    try:
        with mock.patch.object(torch.version, "hip", "0" if target.backend == "hip" else None):
            yield log
    finally:
        _driver_config._active = previous
        for function in log.functions:
            function.device_caches.pop(driver.device, None)
