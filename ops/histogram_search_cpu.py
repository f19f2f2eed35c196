"""torch.ao's search for the range that a histogram is best quantized in, on the CPU: same decisions, same bits.

torch.ao walks inward from both ends of the histogram, one step of 1e-5 of its mass at a time, and stops at the first
candidate range whose squared error is larger than that of the one before. The walk does not depend on the errors, so
here it runs first, jumping over steps that move nothing, and the errors of many candidates are computed together, every
operation rounded as torch.ao's. NumPy does what ATen would do, at a tenth of the price per call; the sums are ATen's,
whose order of additions decides close calls.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
import torch

Tensor = torch.Tensor
Array = np.ndarray[Any, Any]

STEP = 1e-5  # of the mass, torch.ao's `stepsize`
FIRST_CHUNK = 4  # candidates; every chunk is twice as long as the one before, since most searches end early
CHUNK_ELEMENTS = 1 << 26  # candidates times bins of a chunk at the most
BLOCK_ELEMENTS = 1 << 16  # candidates times bins whose temporaries are alive at a time: second-level cache


@lru_cache(maxsize=1)
def quantiles() -> tuple[Array, Array]:
    """(alpha, beta) of every step: 0 plus STEP, and 1 minus STEP, added up one by one in float64 as torch.ao does."""
    steps = np.full(round(1 / STEP) + 3, STEP)
    return np.cumsum(np.concatenate([[0.0], steps])), np.cumsum(np.concatenate([[1.0], -steps]))


def candidates(cumulative: list[float], total: float) -> Iterator[tuple[int, int]]:
    """(first bin, last bin) of every range that the walk comes to, in order.

    Args:
        cumulative: cumulative sum of the histogram, float32 values.
        total: its sum.
    """
    alphas, betas = quantiles()
    start, end = 0, len(cumulative) - 1
    left = right = 0  # steps taken from either side
    while start < end and alphas[left] < betas[right]:
        first = min(max(bisect_left(cumulative, float(np.float32(alphas[left + 1] * total))), start), end)
        last = max(min(bisect_right(cumulative, float(np.float32(betas[right + 1] * total))) - 1, end), start)
        if first - start > end - last:
            left, start = left + 1, first
        else:
            right += 1
            if last == end:
                right = _step_that_moves(betas, right, total, cumulative[end])
                continue
            end = last
        yield start, end


def _step_that_moves(betas: Array, right: int, total: float, mass: float) -> int:
    """The next step, from `right` on, that moves the last bin, whose cumulative mass is `mass`; else one past all."""
    return right + bisect_left(
        range(right, len(betas) - 1), True, key=lambda step: bool(mass > np.float32(betas[step + 1] * total))
    )


def _floor(numerator: Array, divisor: Array, exact: bool) -> Array:
    """Floor of the quotient, as torch.div(rounding_mode="floor") gives it.

    `exact`: all is finite and codes are at most 16 bits, so that the floor of the float64 quotient is the same.
    """
    if exact:
        return np.floor(numerator.astype(np.float64) / divisor.astype(np.float64)).astype(np.float32)
    quotient: Array = torch.div(torch.from_numpy(numerator), torch.from_numpy(divisor), rounding_mode="floor").numpy()
    return quotient


def errors(density: Array, bin_width: float, quant_bins: int, chunk: list[tuple[int, int]]) -> Array:
    """Terms of the squared error of every candidate, float32, shape (candidates, bins): `_compute_quantization_error`.

    Args:
        density: histogram / bin_width, float32.
        bin_width: of the histogram, float64.
        quant_bins: number of codes.
        chunk: (first bin, last bin) of each candidate.
    """
    bins = len(density)
    out = np.empty((len(chunk), bins), np.float32)
    rows = max(BLOCK_ELEMENTS // bins, 1)
    reach = 2.0 * bins * bin_width
    exact = quant_bins <= 1 << 16 and reach < 1e38 and bin_width / quant_bins > 1e-37
    for row in range(0, len(chunk), rows):
        _errors(out[row : row + rows], density, bin_width, quant_bins, np.array(chunk[row : row + rows]), exact)
    return out


def _errors(out: Array, density: Array, bin_width: float, quant_bins: int, chunk: Array, exact: bool) -> None:
    first, last = chunk[:, :1], chunk[:, 1:]
    number = np.float32
    code_width = bin_width * (last - first + 1) / quant_bins  # float64, as in Python
    width, half = code_width.astype(number), (code_width / 2).astype(number)
    cube = half * half * half
    begin = (np.arange(len(density)) - first).astype(number) * number(bin_width)
    end = begin + number(bin_width)
    code_of_begin = np.clip(_floor(begin, width, exact), number(0), number(quant_bins - 1))
    code_of_end = np.clip(_floor(end, width, exact), number(0), number(quant_bins - 1))

    begin -= (code_of_begin + number(0.5)) * width  # distances to the middle of the code
    end -= code_of_end * width + half
    np.multiply(density, (cube - begin * begin * begin) / number(3), out=out)
    out += (code_of_end - code_of_begin - number(1)) * (density * ((cube - -cube) / number(3)))
    out += density * ((end * end * end - -cube) / number(3))


def search_cpu(histogram: Tensor, low: float, high: float, quant_bins: int) -> tuple[float, float]:
    """(min, max) to quantize in.

    Args:
        histogram: float32, shape (bins,), contiguous.
        low: its min, exact in float32.
        high: its max.
        quant_bins: number of codes.
    """
    bins = histogram.numel()
    number = np.float32
    with np.errstate(all="ignore"):
        step = (number(high) - number(low)) / number(bins)
        if step == 0:
            return low, float(number(low) + step)
        start, end = 0, bins - 1
        best = math.inf
        bin_width = (high - low) / bins
        density = np.from_dlpack(histogram) / number(bin_width)
        walk = candidates(np.from_dlpack(torch.cumsum(histogram, 0)).tolist(), torch.sum(histogram).item())
        size = FIRST_CHUNK
        while chunk := list(islice(walk, size)):
            sums = torch.from_dlpack(errors(density, bin_width, quant_bins, chunk)).sum(1)
            for candidate, error in zip(chunk, np.from_dlpack(sums).tolist(), strict=True):
                if error > best:
                    chunk.clear()
                    break
                best = error
                start, end = candidate
            if len(chunk) < size:
                break
            size = min(2 * size, max(CHUNK_ELEMENTS // bins, 1))
        return float(number(low) + step * number(start)), float(number(low) + step * number(end + 1))
