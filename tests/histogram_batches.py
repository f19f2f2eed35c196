"""Batches for the histogram tests, and torch.ao's HistogramObserver as the oracle that it can be.

torch.ao counts half precision inputs in half precision and raises at NaN; so it gets the finite values in float32.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch.ao.quantization import HistogramObserver as Stock

from tests.oracles import INTERPRETER

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KINDS = (
    "normal",
    "shifted",
    "relu",
    "negative",
    "sparse",
    "constant",
    "zeros",
    "heavy",
    "uniform",
    "offset",
    "infinite",
    "nan",
    "nothing finite",
)


@dataclass(frozen=True)
class Batch:
    """Values that follow from these few; small to print and to shrink."""

    kind: str
    n: int
    size: float = 1.0
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def tensor(self) -> torch.Tensor:
        g = torch.Generator().manual_seed(self.seed)
        x = torch.randn(self.n, generator=g) * self.size
        chance = torch.rand(self.n, generator=g)
        if self.kind == "shifted":
            x = x + 3 * self.size
        elif self.kind == "relu":
            x = x.relu()
        elif self.kind == "negative":
            x = -x.abs()
        elif self.kind == "sparse":
            x = x * (chance < 0.05)
        elif self.kind == "constant":
            x = torch.full_like(x, self.size)
        elif self.kind == "zeros":
            x = torch.zeros_like(x)
        elif self.kind == "heavy":
            x = x**5
        elif self.kind == "uniform":
            x = chance * self.size
        elif self.kind == "offset":
            x = 1000.0 + x * 0.01
        elif self.kind == "infinite":
            x = torch.where(chance < 0.1, float("inf"), torch.where(chance > 0.9, -float("inf"), x))
        elif self.kind == "nan":
            x = torch.where(chance < 0.2, float("nan"), x)
        elif self.kind == "nothing finite":
            x = torch.where(chance < 0.5, float("nan"), float("inf"))
        limit = torch.finfo(self.dtype).max
        return torch.where(x.isfinite(), x.clamp(-limit, limit), x).to(self.dtype)


@st.composite
def batches(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Batch:
    top = 5000 if INTERPRETER else 40000
    return Batch(
        draw(st.sampled_from(kinds)),
        draw(st.one_of(st.integers(1, 20), st.integers(1, top))),
        draw(st.sampled_from((0.01, 0.5, 1.0, 1.0, 1.1, 1.7, 30.0))),
        draw(st.sampled_from(dtypes)),
        draw(st.integers(0, 999)),
    )


def finite(x: torch.Tensor) -> torch.Tensor:
    """What torch.ao is given."""
    x = x.float()
    return x[x.isfinite()]


def stock_step(observer: Stock, x: torch.Tensor) -> None:
    """Let torch.ao observe what is finite of x."""
    values = finite(x)
    if values.numel():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            observer(values)
