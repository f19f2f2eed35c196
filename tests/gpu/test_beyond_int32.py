"""More than 2^31 elements on a GPU, what tests/ops/test_large.py leaves: bfloat16, channels, statistics, gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from qkernels import ops
from tests.ops.test_large import BIG
from tests.oracles import assert_bits_equal, reference_fake_quantize

LOW, HIGH = -8, 7
# Within the bounds, off the grid, saturated; at the first element, on both sides of 2^31, at the last.
VALUES = (-0.33, 3.0, -4.0, 0.26)


def landmarks(n: int) -> list[int]:
    middle = 2**31 if n > 2**31 else n // 2
    return [0, middle - 1, middle, n - 1]


def sparse(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Zeros with landmarks, and the landmarks alone."""
    x = torch.zeros(n, dtype=torch.bfloat16, device=device)
    for index, value in zip(landmarks(n), VALUES, strict=True):
        x[index] = value
    return x, torch.tensor(VALUES, dtype=torch.bfloat16)


def check_learned(n: int, device: torch.device) -> None:
    """A zero has code 0 and adds nothing to a sum, so the gradients are those of the landmarks alone."""
    x, few = sparse(n, device)
    scale, zero_point = torch.tensor([0.1]), torch.zeros(1)
    one = torch.ones((), dtype=torch.bfloat16)
    arguments = (scale.to(device), zero_point.to(device), LOW, HIGH)
    y = ops.learnable_fake_quantize(x, *arguments)
    assert_bits_equal(y[landmarks(n)].cpu(), ops.learnable_fake_quantize(few, scale, zero_point, LOW, HIGH))
    assert int((y != 0).sum()) == len(VALUES)
    del y
    dx, dscale, dzero_point = ops.learnable_fake_quantize_backward(one.to(device).expand(n), x, *arguments)
    expected = ops.learnable_fake_quantize_backward(one.expand(len(VALUES)), few, scale, zero_point, LOW, HIGH)
    assert_bits_equal(dx[landmarks(n)].cpu(), expected[0])
    assert int((dx != 1).sum()) == int((expected[0] != 1).sum()) == 2  # those that saturate
    for got, sum_of_few in ((dscale, expected[1]), (dzero_point, expected[2])):
        torch.testing.assert_close(got.cpu(), sum_of_few, rtol=1e-6, atol=0)


def check_statistics(n: int, device: torch.device) -> None:
    x, _ = sparse(n, device)
    low, high = torch.full((1,), math.inf, device=device), torch.full((1,), -math.inf, device=device)
    scale, zero_point = torch.ones(1, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    ops.update_qparams_(x, low, high, scale, zero_point, LOW, HIGH, rule="affine")
    assert (low.item(), high.item()) == (-4.0, 3.0)
    assert scale.item() == pytest.approx(7 / 15)


def check_channels(n: int, channels_last: bool, device: torch.device) -> None:
    """Two channels, as rows of half the tensor or as columns: offsets and strides pass 2^31 either way."""
    x, _ = sparse(n // 2 * 2, device)
    x = x.view(-1, 2) if channels_last else x.view(2, -1)
    axis = 1 if channels_last else 0
    low, high = ops.aminmax(x, axis)
    dense = [x.select(axis, channel) for channel in range(2)]
    assert low.tolist() == [part.min().item() for part in dense]
    assert high.tolist() == [part.max().item() for part in dense]
    scale, zero_point = torch.tensor([0.1, 0.3], device=device), torch.tensor([2, -1], dtype=torch.int32, device=device)
    y = ops.fake_quantize(x, scale, zero_point, LOW, HIGH, axis)
    flat_x, flat_y = x.view(-1), y.view(-1)
    for index in landmarks(x.numel()):
        channel = index % 2 if channels_last else index // (x.numel() // 2)
        got, value = flat_y[index : index + 1], flat_x[index : index + 1].cpu()
        expected = reference_fake_quantize(
            value, scale[channel : channel + 1].cpu(), zero_point[channel : channel + 1].cpu(), LOW, HIGH
        )
        assert_bits_equal(got, expected, context=f"at {index}")
    assert int((y != 0).sum()) == len(VALUES)


@pytest.mark.interpreter
@pytest.mark.parametrize("n", [4, 5001])
def test_the_checks_on_small_tensors(n: int) -> None:
    cpu = torch.device("cpu")
    check_learned(n, cpu)
    check_statistics(n, cpu)
    for channels_last in (False, True):
        check_channels(n - n % 2, channels_last, cpu)


@pytest.mark.parametrize("place", range(4))
def test_a_lost_landmark_is_found(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a 32-bit offset would lose it: nothing is written there."""
    forward = ops.fake_quantize

    def forgetful(x: Tensor, *arguments: Any) -> Tensor:
        y = forward(x, *arguments)
        y.view(-1)[landmarks(100)[place]] = 0
        return y

    monkeypatch.setattr(ops, "fake_quantize", forgetful)
    with pytest.raises(AssertionError, match=f"at {landmarks(100)[place]}"):
        check_channels(100, True, torch.device("cpu"))


def needs_memory(device: torch.device, gib: int) -> None:
    free = torch.cuda.mem_get_info(device)[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of free GPU memory, {free:.1f} are free")


@pytest.mark.cuda
@pytest.mark.parametrize("what", ["learned", "statistics", "rows", "columns"])
def test_beyond_int32(what: str, device: torch.device) -> None:
    """4.3 GB per bfloat16 tensor, at most three of them and a mask at once."""
    needs_memory(device, 20)
    if what == "learned":
        check_learned(BIG, device)
    elif what == "statistics":
        check_statistics(BIG, device)
    else:
        check_channels(BIG, what == "columns", device)
