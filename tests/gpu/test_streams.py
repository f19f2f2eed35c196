"""Two streams at once: kernels whose programs share counters and partials must not meet those of another launch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from itertools import count

import pytest
import torch
from torch import Tensor

from qkernels import ops
from qkernels.modules import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver
from tests.oracles import assert_bits_equal

Enter = AbstractContextManager[object]


class Work:
    """What one stream does: two observers, the min and max of a tensor, and the gradients of a learned scale."""

    def __init__(self, seed: int, shape: tuple[int, ...], device: torch.device) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = (torch.randn(shape, generator=generator) * (seed + 1)).to(device)
        self.dy = torch.randn(shape, generator=generator).to(device)
        self.scale = torch.full((1,), 0.05 * (seed + 1), device=device)
        self.zero_point = torch.zeros(1, device=device)
        self.observers = [
            MovingAverageMinMaxObserver(averaging_constant=0.25).to(device),
            MovingAveragePerChannelMinMaxObserver(averaging_constant=0.25, ch_axis=1).to(device),
        ]

    def step(self, number: int) -> tuple[Tensor, ...]:
        x = self.x * (1.0 + number / 8)
        for observer in self.observers:
            observer(x)
        state = [buffer.clone() for observer in self.observers for buffer in (observer.min_val, observer.max_val)]
        gradients = ops.learnable_fake_quantize_backward(self.dy, x, self.scale, self.zero_point, -8, 7)
        return (*state, *ops.aminmax(x), *gradients[1:])


def check_streams(enter: list[Enter], shape: tuple[int, ...], steps: int, device: torch.device) -> None:
    """Alternate between the streams without waiting; then the same work one after the other must give the same bits."""
    works = [Work(seed, shape, device) for seed in range(len(enter))]
    again = [Work(seed, shape, device) for seed in range(len(enter))]
    if device.type == "cuda":
        torch.cuda.synchronize()
    together: list[list[tuple[Tensor, ...]]] = [[] for _ in works]
    for number in range(steps):
        for work, stream, results in zip(works, enter, together, strict=True):
            with stream:
                results.append(work.step(number))
    if device.type == "cuda":
        torch.cuda.synchronize()
    for who, (work, results) in enumerate(zip(again, together, strict=True)):
        for number, result in enumerate(results):
            for place, (got, expected) in enumerate(zip(result, work.step(number), strict=True)):
                assert_bits_equal(got, expected, context=f"stream {who}, step {number}, result {place}")


@pytest.mark.interpreter
def test_the_check_without_streams() -> None:
    check_streams([nullcontext(), nullcontext()], (2, 3, 2000), 3, torch.device("cpu"))


def test_a_result_that_depends_on_the_order_of_launches_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    launches, aminmax = count(), ops.aminmax
    monkeypatch.setattr(ops, "aminmax", lambda x: [value + next(launches) for value in aminmax(x)])
    with pytest.raises(AssertionError, match="step 0, result 4"):
        check_streams([nullcontext(), nullcontext()], (2, 3, 20), 2, torch.device("cpu"))


@pytest.mark.cuda
def test_two_streams(device: torch.device) -> None:
    """4 Mi elements: more programs than a GPU holds at once want to run, so launches of both streams are mixed."""
    streams = [torch.cuda.stream(torch.cuda.Stream()) for _ in range(2)]
    check_streams(streams, (8, 16, 32768), 50, device)
