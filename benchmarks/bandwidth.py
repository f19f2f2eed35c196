"""How near the kernels come to a plain copy on large inputs, beside what was predicted; and what a launch costs.

    python -m benchmarks.bandwidth --device cuda --json bandwidth.json

A kernel and a copy of the same input take turns within every round, both replayed from CUDA graphs over copies of the
input that together exceed twice the L2 cache. The share is the kernel's bytes over its time, by the copy's. The
predictions were written down before any GPU ran the kernels (arithmetic and generated code); below them, look at grid
and occupancy first, then at prefetching. Results are not checked here: the tests do that.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import timer
from benchmarks.report import environment
from qkernels import ops
from qkernels.autotune import histogram_heuristics

LOW, HIGH = -128, 127
CHANNELS, RUN = 256, 4096  # of a per-channel input
MI = 2**20
SIZES = (64 * MI, 256 * MI)
DTYPES = ("float32", "bfloat16")

Call = Callable[[Tensor, Tensor], object]


@dataclass(frozen=True)
class Kernel:
    """One kernel: how often it reads or writes a tensor of x's size, and which share of a copy it should reach.

    `per_channel`: x has CHANNELS channels in dimension 1, with runs of RUN elements. `predicted` None: nothing was.
    """

    name: str
    passes: int
    predicted: float | None
    make: Callable[[torch.device], Call]
    per_channel: bool = False
    predicted_in_16_bits: float | None = None  # where it is another

    def prediction(self, x: Tensor) -> float | None:
        """For this input; None on a CPU, for which nothing was predicted."""
        if not x.is_cuda:
            return None
        return self.predicted_in_16_bits if self.predicted_in_16_bits and x.element_size() == 2 else self.predicted


def _aminmax(axis: int | None) -> Callable[[torch.device], Call]:
    return lambda device: lambda x, dy: ops.aminmax(x, axis)


def _update(device: torch.device) -> Call:
    low, high = torch.full((1,), -1.0, device=device), torch.full((1,), 1.0, device=device)
    scale, zero_point = _qparams(1, device)
    workspace = torch.zeros(1, dtype=torch.int32, device=device)
    return lambda x, dy: ops.update_qparams_(
        x, low, high, scale, zero_point, LOW, HIGH, rule="affine", averaging_constant=0.01, workspace=workspace
    )


def _qparams(channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.full((channels,), 0.05, device=device), torch.full((channels,), 3, dtype=torch.int32, device=device)


def _fake_quantize(axis: int | None) -> Callable[[torch.device], Call]:
    def make(device: torch.device) -> Call:
        scale, zero_point = _qparams(1 if axis is None else CHANNELS, device)
        return lambda x, dy: ops.fake_quantize(x, scale, zero_point, LOW, HIGH, axis)

    return make


def _backward(op: Callable[..., object], axis: int | None) -> Callable[[torch.device], Call]:
    def make(device: torch.device) -> Call:
        scale, zero_point = _qparams(1 if axis is None else CHANNELS, device)
        if axis is None:
            return lambda x, dy: op(dy, x, scale, zero_point, LOW, HIGH)
        return lambda x, dy: op(dy, x, scale, zero_point, LOW, HIGH, axis=axis)

    return make


def _histogram(limit: float, inline_ptx: bool) -> Callable[[torch.device], Call]:
    """2048 bins from -limit to limit, in one of the two forms."""

    def make(device: torch.device) -> Call:
        low, high = torch.tensor([-limit], device=device), torch.tensor([limit], device=device)

        def call(x: Tensor, dy: Tensor) -> object:
            before = histogram_heuristics.INLINE_PTX
            histogram_heuristics.INLINE_PTX = inline_ptx
            try:
                return ops.histogram(x, 2048, low, high)
            finally:
                histogram_heuristics.INLINE_PTX = before

        return call

    return make


KERNELS = (
    Kernel("aminmax", 1, 0.90, _aminmax(None)),
    Kernel("aminmax axis=1", 1, 0.90, _aminmax(1), per_channel=True),
    Kernel("update_qparams_", 1, 0.90, _update),
    Kernel("fake_quantize", 2, 0.88, _fake_quantize(None)),
    Kernel("fake_quantize axis=1", 2, 0.88, _fake_quantize(1), per_channel=True),
    Kernel("fake_quantize_backward", 3, 0.88, _backward(ops.fake_quantize_backward, None)),
    Kernel("learnable_fake_quantize_backward", 3, 0.85, _backward(ops.learnable_fake_quantize_backward, None)),
    Kernel(
        "learnable_fake_quantize_backward axis=1",
        3,
        0.85,
        _backward(ops.learnable_fake_quantize_backward, 1),
        per_channel=True,
    ),
    # Normal values over all bins, then all of them in two: what equal addresses cost. tl.histogram of Triton 3.6 and
    # 3.7 takes 64 atomics per lane and tile, so nothing was promised of it.
    Kernel("histogram", 1, None, _histogram(12.0, False)),
    Kernel("histogram in two bins", 1, None, _histogram(1e6, False)),
    Kernel("histogram, inline PTX", 1, 0.60, _histogram(12.0, True), predicted_in_16_bits=0.40),
    Kernel("histogram in two bins, inline PTX", 1, 0.60, _histogram(1e6, True), predicted_in_16_bits=0.40),
)


@dataclass(frozen=True)
class Row:
    """One kernel on one input. Microseconds per call; `of_copy` are shares of the copy's bytes per second.

    `predicted` is None where nothing was.
    """

    kernel: str
    elements: int
    dtype: str
    microseconds: timer.Spread
    copy_microseconds: timer.Spread
    gb_per_second: float
    of_copy: timer.Spread
    predicted: float | None
    not_captured: dict[str, str]


def make_input(kernel: Kernel, elements: int, dtype: str, device: torch.device, seed: int) -> Tensor:
    """Normal values, standard deviation 3."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(elements, generator=generator, device=device).mul_(3).to(getattr(torch, dtype))
    if not kernel.per_channel:
        return x
    return x.view(-1, CHANNELS, RUN) if elements % (CHANNELS * RUN) == 0 else x.view(1, CHANNELS, -1)


def measure(kernel: Kernel, x: Tensor, rounds: int, slice_seconds: float) -> Row:
    """Kernel and copy in turn."""
    inputs = timer.rotating_inputs(x)
    destination = torch.empty_like(x)
    impls: dict[str, timer.Impl] = {"kernel": kernel.make(x.device), "copy": lambda x, dy: destination.copy_(x)}
    if x.is_cuda:
        passes, not_captured = timer.capture_all(impls, inputs)
    else:
        passes, not_captured = {name: timer.calls(impl, inputs) for name, impl in impls.items()}, {}
    timings = timer.time_interleaved(passes, inputs, rounds=rounds, slice_seconds=slice_seconds)
    spread, copy = timings["kernel"].microseconds, timings["copy"]
    ratio = copy.times_ours  # the copy's time over the kernel's
    shares = [value * kernel.passes / 2 for value in (ratio.median, ratio.p20, ratio.p80)]
    dtype = str(x.dtype).removeprefix("torch.")
    rate = kernel.passes * x.nbytes / spread.median / 1e3
    return Row(
        kernel.name, x.numel(), dtype, spread, copy.microseconds, rate, timer.Spread(*shares),
        kernel.prediction(x), not_captured,
    )  # fmt: skip


HEADER = (
    f"{'kernel':<42}{'elements':>10} {'dtype':<9}{'us':>9}{'GB/s':>8}  {'share of a copy (p20-p80)':<26}"
    f"{'predicted':<11}"
)


def line(row: Row) -> str:
    """One row for the screen."""
    share = row.of_copy
    text = f"{row.kernel:<42}{row.elements / MI:>9.4g}M {row.dtype:<9}{row.microseconds.median:>9.1f}"
    text += f"{row.gb_per_second:>8.0f}  {f'{share.median:.0%} ({share.p20:.0%}-{share.p80:.0%})':<26}"
    if row.predicted is not None:
        text += f">= {row.predicted:.0%}   {'as predicted' if reached(row) else 'BELOW'}"
    return "   ".join([text, *(f"{name} not captured: {reason}" for name, reason in row.not_captured.items())])


def reached(row: Row) -> bool:
    """Whether the median share is what was predicted."""
    return row.predicted is not None and row.of_copy.median >= row.predicted


# --- the cost of a launch --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """One element: microseconds until a call is back in Python, and of a call in a replayed graph, None without one."""

    call: str
    host_microseconds: float
    replay_microseconds: float | None


def one_element_calls(device: torch.device) -> Iterator[tuple[str, Call]]:
    """Ours, and torch's for the same."""
    scale, zero_point = _qparams(1, device)
    yield "aminmax", _aminmax(None)(device)
    yield "torch.aminmax", lambda x, dy: torch.aminmax(x)
    yield "fake_quantize", _fake_quantize(None)(device)
    yield (
        "torch.fake_quantize_per_tensor_affine",
        lambda x, dy: torch.fake_quantize_per_tensor_affine(x, scale, zero_point, LOW, HIGH),
    )
    yield "update_qparams_", _update(device)
    yield "learnable_fake_quantize_backward", _backward(ops.learnable_fake_quantize_backward, None)(device)


def measure_launch(name: str, call: Call, device: torch.device, calls: int) -> Launch:
    """Medians of 9 runs of so many calls, after one that warms up."""
    x = torch.ones(1, device=device)
    inputs = [(x, x)] * calls
    on_gpu = device.type == "cuda"
    run = timer.calls(call, inputs)
    host = []
    for _ in range(10):
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        host.append((time.perf_counter() - start) / calls * 1e6)
    replay = None
    if on_gpu:
        passes, not_captured = timer.capture_all({"call": call}, inputs)
        if not not_captured:
            seconds = [timer.seconds_of(passes["call"], 1, True) for _ in range(10)]
            replay = statistics.median(seconds[1:]) / calls * 1e6
    return Launch(name, statistics.median(host[1:]), replay)


def launch_line(row: Launch) -> str:
    replay = "-" if row.replay_microseconds is None else f"{row.replay_microseconds:.2f}"
    return f"{row.call:<42}{row.host_microseconds:>10.2f}{replay:>10}"


LAUNCH_HEADER = f"{'one element, microseconds per call':<42}{'host':>10}{'replayed':>10}"


# --- the command line ------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bandwidth", description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument(
        "--elements", type=int, action="append", metavar="N", help=f"size of x (repeatable; default: {SIZES})"
    )
    parser.add_argument(
        "--seconds", type=float, metavar="N", help="start no further kernel after N seconds, and say so"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--slice-ms", type=float, default=5.0, metavar="MS", help="time per kernel and round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    args = parser.parse_args(argv)
    args.elements = args.elements or SIZES
    for elements in args.elements:
        if elements < 1 or elements % CHANNELS:
            parser.error(f"--elements must be a positive multiple of {CHANNELS}; got {elements}")
    if args.rounds < 2:
        parser.error(f"--rounds must be at least 2; got {args.rounds}")
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --device cpu shows the program at work, and no kernel's speed")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    start = time.monotonic()
    found: dict[str, Any] = {**environment(args.device, args.seed), "launches": [], "rows": []}

    def keep() -> None:  # after every row, so that a run cut short leaves what it has
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    print(f"{found['gpu'] or found['device']}, torch {found['torch']}, Triton {found['triton']}\n\n{LAUNCH_HEADER}")
    for name, call in one_element_calls(args.device):
        launch = measure_launch(name, call, args.device, calls=100)
        print(launch_line(launch), flush=True)
        found["launches"].append(asdict(launch))
        keep()
    print(f"\n{HEADER}")
    jobs = [(kernel, n, dtype) for n in args.elements for dtype in DTYPES for kernel in KERNELS]
    rows: list[Row] = []
    for kernel, elements, dtype in jobs:
        if args.seconds is not None and time.monotonic() - start > args.seconds:
            break
        x = make_input(kernel, elements, dtype, args.device, args.seed)
        rows.append(measure(kernel, x, args.rounds, args.slice_ms / 1e3))
        del x
        print(line(rows[-1]), flush=True)
        found["rows"].append(asdict(rows[-1]))
        keep()
    left = f"; {len(jobs) - len(rows)} not run, {args.seconds:g} seconds were over" if len(rows) < len(jobs) else ""
    predicted = sum(row.predicted is not None for row in rows)
    print(f"\n{len(rows)} measured; {sum(map(reached, rows))} of {predicted} reach the share predicted{left}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
