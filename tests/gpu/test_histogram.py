"""Counts of the histogram kernels against NumPy's, in the form that no interpreter runs too: inline PTX."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qkernels import ops

BINS = 2048
KINDS = ("uniform", "gaussian", "relu", "constant")


def values(kind: str, n: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    if kind == "constant":
        return torch.full((n,), 0.75, dtype=dtype)
    draw = torch.rand if kind == "uniform" else torch.randn
    x = draw(n, generator=generator)
    return (x.relu() if kind == "relu" else x).to(dtype)


def counted_by_numpy(x: Tensor, low: float, high: float) -> np.ndarray:
    """trunc((x - low) * bins / (high - low)) in float32, step by step; high itself belongs to the last bin."""
    numbers, first, last = x.float().numpy(), np.float32(low), np.float32(high)
    inside = numbers[(numbers >= first) & (numbers <= last)]
    places = np.trunc((inside - first) * np.float32(BINS) / (last - first)).astype(np.int64)
    return np.bincount(np.minimum(places, BINS - 1), minlength=BINS)


def check_counts(kind: str, n: int, dtype: torch.dtype, device: torch.device) -> None:
    x = values(kind, n, dtype)
    low, high = -1.0, 1.5  # some of the Gaussian values are outside
    ends = torch.tensor([low], device=device), torch.tensor([high], device=device)
    counts = ops.histogram(x.to(device), BINS, *ends)
    np.testing.assert_array_equal(counts.cpu().numpy(), counted_by_numpy(x, low, high))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_check_on_the_cpu(kind: str, dtype: torch.dtype) -> None:
    for n in (1, 15, 4097):
        check_counts(kind, n, dtype, torch.device("cpu"))


def test_a_count_too_many_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    histogram = ops.histogram
    monkeypatch.setattr(ops, "histogram", lambda *arguments: histogram(*arguments).add_(1))
    with pytest.raises(AssertionError):
        check_counts("uniform", 15, torch.float32, torch.device("cpu"))


def in_inline_ptx(module: Any) -> bool:
    """Whether a kernel of the module was compiled with the array that inline PTX declares."""
    kernels = [value for value in vars(module).values() if hasattr(value, "device_caches")]
    binaries = [binary for kernel in kernels for cache in kernel.device_caches.values() for binary in cache[0].values()]
    return any("qk_counts_" in binary.asm["ptx"] for binary in binaries)


@pytest.mark.cuda
@pytest.mark.parametrize("inline", [False, True], ids=["portable", "inline PTX"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_counts(
    kind: str, dtype: torch.dtype, inline: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    import qkernels.histogram
    from qkernels.autotune import histogram_heuristics

    monkeypatch.setattr(histogram_heuristics, "INLINE_PTX", inline)
    for n in (1, 15, 2**20 + 1):
        check_counts(kind, n, dtype, device)
    if inline:
        assert in_inline_ptx(qkernels.histogram), "the switch did not lead to inline PTX"
