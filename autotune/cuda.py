"""The compiler and the timer of the tuner on a GPU. Nothing here runs outside of `python -m qkernels.autotune`.

Times are those of CUDA graphs, so that the host plays no part: a graph holds one call per copy of the input, and the
copies together exceed twice the L2 cache, so that every call reads memory. Configurations take turns, each round
beginning with another one, so that a change of clocks falls on all alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from qkernels.autotune.config import LaunchConfig
from qkernels.autotune.decision import Decision
from qkernels.autotune.lookup import override, recorded
from qkernels.autotune.machine import machine_of
from qkernels.autotune.search import Limits, Resources
from qkernels.autotune.tuner import Bench, Workload

ROUNDS = 11
SLICE_SECONDS = 0.002  # of device time per configuration and round
MAX_COPIES = 64


def open_bench(device: torch.device, rounds: int = ROUNDS) -> Bench:
    """A GPU to tune on.

    Raises:
        RuntimeError: there is none, or Triton is missing.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        raise RuntimeError(f"tuning times kernels, so it needs a CUDA device; torch {torch.__version__} sees none")
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    check_index(device)
    try:
        machine = machine_of(device)
    except ImportError as error:
        raise RuntimeError(f"tuning needs Triton: {error}") from error
    assert machine is not None
    torch.cuda.set_device(device)
    return Bench(
        device=device,
        machine=machine,
        limits=limits_of(device),
        decide=lambda workload: decisions_of(workload, device),
        compile=lambda workload, decision, configs: compiled(workload, decision, configs, device),
        time=lambda workload, decision, configs: timed(workload, decision, configs, device, rounds),
    )


def check_index(device: torch.device) -> None:
    """Raise RuntimeError if torch sees no CUDA device of that number."""
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise RuntimeError(f"there is no {device}; torch sees {torch.cuda.device_count()} CUDA device(s)")


def limits_of(device: torch.device) -> Limits:
    """What a device offers; where this torch does not say, what an H200 offers."""
    properties = torch.cuda.get_device_properties(device)
    own = Limits(properties.multi_processor_count)
    return Limits(
        properties.multi_processor_count,
        getattr(properties, "regs_per_multiprocessor", own.registers),
        getattr(properties, "max_threads_per_multi_processor", own.threads),
        getattr(properties, "shared_memory_per_multiprocessor", own.shared),
        getattr(properties, "warp_size", own.warp_size),
    )


def decisions_of(workload: Workload, device: torch.device) -> list[Decision]:
    """The decisions that one run makes."""
    with recorded() as record:
        workload.run(*workload.make(device))
    return [decision for decision, _ in record]


@contextlib.contextmanager
def launched_kernels() -> Iterator[list[Any]]:
    """Note Triton's CompiledKernel of every launch inside the block.

    Private interface (Triton 3.6 to 3.9): `JITFunction.run` returns the kernel that it launched, and a kernel that was
    launched has `n_regs` and `n_spills`.
    """
    from triton.runtime.jit import JITFunction

    kernels: list[Any] = []
    original = JITFunction.run

    def run(self: Any, *args: Any, **options: Any) -> Any:
        kernel = original(self, *args, **options)
        kernels.append(kernel)
        return kernel

    with mock.patch.object(JITFunction, "run", run):
        yield kernels


def compiled(
    workload: Workload, decision: Decision, configs: Sequence[LaunchConfig], device: torch.device
) -> list[Resources | Exception]:
    """Compile, load and run every configuration once; of several kernels the first, which the decision is about."""
    arguments = workload.make(device)
    results: list[Resources | Exception] = []
    for config in configs:
        try:
            with override(decision, config), launched_kernels() as kernels:
                workload.run(*arguments)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            results.append(_resources(workload, kernels))
        except Exception as error:  # whatever a compiler may raise; the tuner reports it
            results.append(error)
    return results


def _resources(workload: Workload, kernels: list[Any]) -> Resources:
    if not kernels:
        raise RuntimeError(f"{workload.name}: no Triton kernel was launched")
    return Resources(kernels[0].n_regs, kernels[0].n_spills, kernels[0].metadata.shared)


def copies_for(nbytes: int, l2_bytes: int) -> int:
    """Copies of an input that exceed twice the cache together: at least 2, at most `MAX_COPIES`."""
    return max(2, min(MAX_COPIES, 2 * l2_bytes // max(nbytes, 1) + 1))


def timed(
    workload: Workload, decision: Decision, configs: Sequence[LaunchConfig], device: torch.device, rounds: int
) -> list[list[float]]:
    """Microseconds per call, per configuration and round."""
    first = workload.make(device)
    nbytes = sum(value.nbytes for value in first if isinstance(value, torch.Tensor))
    copies = copies_for(nbytes, torch.cuda.get_device_properties(device).L2_cache_size)
    inputs = [first, *(workload.make(device) for _ in range(copies - 1))]
    replays = []
    for config in configs:
        with override(decision, config):
            replays.append(_capture(workload, inputs))
    seconds = interleaved(replays, _device_seconds, rounds, SLICE_SECONDS)
    return [[sample / copies * 1e6 for sample in samples] for samples in seconds]


def _capture(workload: Workload, inputs: Sequence[tuple[Any, ...]]) -> Callable[[], None]:
    """Replay of one call per input. Its kernels were compiled and loaded before, outside of any capture."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for arguments in inputs:
            workload.run(*arguments)
    return graph.replay


def _device_seconds(run: Callable[[], None], times: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleaved(
    passes: Sequence[Callable[[], None]],
    seconds_of: Callable[[Callable[[], None], int], float],
    rounds: int,
    slice_seconds: float,
) -> list[list[float]]:
    """Seconds per pass, one list per pass, each round beginning with another pass.

    Args:
        passes: what to time; the first says how many repetitions fill a slice.
        seconds_of: seconds that so many repetitions of a pass take.
        rounds: samples per pass.
        slice_seconds: time that a sample should take.
    """
    for run in passes:  # warm-up, each once
        seconds_of(run, 1)
    times = max(1, round(slice_seconds / max(seconds_of(passes[0], 1), 1e-9)))
    samples: list[list[float]] = [[] for _ in passes]
    for start in range(rounds):
        for offset in range(len(passes)):
            index = (start + offset) % len(passes)
            samples[index].append(seconds_of(passes[index], times) / times)
    return samples
