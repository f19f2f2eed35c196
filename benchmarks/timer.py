"""Timing: implementations take turns, so that a change of clocks or of load falls on all of them alike.

A round times every implementation once, each over as many calls as fill a slice of time, starting with another one each
round. Reported are the median and the 20th and 80th percentile over the rounds, and the ratio to ours *within* a round,
which a drift of the machine does not move.

On a CPU with one thread, CPU time is taken, which stands still while other processes have the core; with more threads,
wall time. On a GPU, CUDA events measure, twice over: calls from Python, where a small tensor shows the cost of getting
a kernel started, and the replay of a CUDA graph of the same calls, which shows the kernels alone. Calls go over copies
of the input (and of the gradient) that together exceed twice the L2 cache, so that each reads memory, as it would
between two other layers.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Impl = Callable[[Tensor, Tensor], object]
Inputs = list[tuple[Tensor, Tensor]]  # (x, gradient)


@dataclass(frozen=True)
class Spread:
    """Median, 20th and 80th percentile of some samples."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, samples: list[float]) -> Spread:
        """The spread of the samples; of a single one, that one."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        tenths = statistics.quantiles(samples, n=10, method="inclusive")
        return cls(statistics.median(samples), tenths[1], tenths[7])


@dataclass(frozen=True)
class Timing:
    """One implementation: microseconds per call, and how many times longer it takes than ours."""

    microseconds: Spread
    times_ours: Spread


def rotating_inputs(x: Tensor) -> Inputs:
    """Pairs of input and gradient. One on the CPU, where the gradient is x itself.

    On a GPU, copies of x until they exceed twice the L2 cache: two at least, 64 at most, for tiny inputs.
    """
    if not x.is_cuda:
        return [(x, x)]
    l2_bytes = torch.cuda.get_device_properties(x.device).L2_cache_size
    copies = max(2, min(64, 2 * l2_bytes // max(1, x.nbytes) + 1))
    return [(x.clone(), x.clone()) for _ in range(copies)]


def calls(impl: Impl, inputs: Inputs) -> Callable[[], None]:
    """One call from Python per input."""

    def run() -> None:
        for x, dy in inputs:
            impl(x, dy)

    return run


def capture(impl: Impl, inputs: Inputs) -> Callable[[], None]:
    """The same calls as a CUDA graph; returns its replay.

    Raises:
        RuntimeError: the implementation waits for the device, or cannot be captured for another reason.
    """
    # A capture that fails may leave the allocator in a bad state, so what synchronizes is found out before.
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        impl(*inputs[0])
    finally:
        torch.cuda.set_sync_debug_mode(before)
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):  # a capture wants a warm-up on a stream of its own
        for x, dy in [*inputs[:2], inputs[0]]:
            impl(x, dy)
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(current), torch.cuda.graph(graph):  # the outer one brings the stream back after an error
        for x, dy in inputs:
            impl(x, dy)
    return graph.replay


def capture_all(impls: dict[str, Impl], inputs: Inputs) -> tuple[dict[str, Callable[[], None]], dict[str, str]]:
    """Replays by implementation, calls from Python where there is none, and the reasons why there is none."""
    passes, not_captured = {}, {}
    for name, impl in impls.items():
        try:
            passes[name] = capture(impl, inputs)
        except RuntimeError as error:
            not_captured[name] = str(error).splitlines()[0]
            passes[name] = calls(impl, inputs)
    return passes, not_captured


def seconds_of(run: Callable[[], None], times: int, on_gpu: bool, *, host: bool = False) -> float:
    """Seconds that so many passes over the inputs take together.

    Args:
        run: one pass.
        times: how many.
        on_gpu: whether the work is on a GPU.
        host: until the last call has returned, though the device may not be done; it is waited for afterwards.
    """
    if on_gpu and not host:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(times):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    clock = time.process_time if torch.get_num_threads() == 1 and not on_gpu else time.perf_counter
    start = clock()
    for _ in range(times):
        run()
    seconds = clock() - start
    if on_gpu:
        torch.cuda.synchronize()
    return seconds


def passes_for(run: Callable[[], None], slice_seconds: float, on_gpu: bool, *, host: bool = False) -> int:
    """How many passes fill a slice of time; warms up on the way."""
    seconds_of(run, 1, on_gpu, host=host)
    times = 1
    while (seconds := seconds_of(run, times, on_gpu, host=host)) < slice_seconds / 4:
        times *= 4
    return max(1, round(times * slice_seconds / seconds))


def time_interleaved(
    passes: dict[str, Callable[[], None]], inputs: Inputs, *, rounds: int, slice_seconds: float, host: bool = False
) -> dict[str, Timing]:
    """Time every implementation's pass over the inputs; the first one named is ours."""
    names = list(passes)
    on_gpu = inputs[0][0].is_cuda
    times = {name: passes_for(run, slice_seconds, on_gpu, host=host) for name, run in passes.items()}
    samples: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            seconds = seconds_of(passes[name], times[name], on_gpu, host=host)
            samples[name].append(seconds / times[name] / len(inputs) * 1e6)
    return timings_of(samples, names[0])


def timings_of(microseconds: dict[str, list[float]], ours: str) -> dict[str, Timing]:
    """Timings from samples that were taken round by round; ratios are those within a round, to `ours`."""
    reference = microseconds[ours]
    return {
        name: Timing(Spread.of(samples), Spread.of([b / a for a, b in zip(reference, samples, strict=True)]))
        for name, samples in microseconds.items()
    }


def copy_bandwidth(device: torch.device) -> float:
    """GB/s, read and written, of copying 256 MiB on the GPU: the median of 20 slices of 5 ms."""
    x = torch.randn(2**26, device=device)
    y = torch.empty_like(x)
    run = calls(lambda x, y: y.copy_(x), [(x, y)])
    times = passes_for(run, 0.005, True)
    return 2 * x.nbytes / statistics.median(seconds_of(run, times, True) / times for _ in range(20)) / 1e9
