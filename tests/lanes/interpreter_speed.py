"""Make reductions with a combine function of one's own usable in Triton's interpreter.

It combines element by element in Python, 0.2 s for 4096 elements. A combine function works on blocks as well as on
scalars, so the same reduction is done here as a tree of block operations over neighbours, as associativity allows.

Private interface used (Triton 3.6 to 3.9): `triton.runtime.interpreter.ReduceOps.generic_reduce`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from triton.runtime import interpreter

ORIGINAL = interpreter.ReduceOps.generic_reduce


def tree_reduce(self: Any, inputs: tuple[Any, ...]) -> list[Any]:
    """Stands in for `ReduceOps.generic_reduce`: combine neighbours until one is left. Extents are powers of two."""
    whole = self.axis is None
    blocks = [np.ravel(x.handle.data) if whole else np.moveaxis(x.handle.data, self.axis, 0) for x in inputs]
    while len(blocks[0]) > 1:
        left = [self.to_tensor(block[0::2], x.dtype) for block, x in zip(blocks, inputs, strict=True)]
        right = [self.to_tensor(block[1::2], x.dtype) for block, x in zip(blocks, inputs, strict=True)]
        combined = self.combine_fn.fn(*left, *right)
        blocks = [part.handle.data for part in (combined if isinstance(combined, tuple) else (combined,))]
    results = []
    for block, x in zip(blocks, inputs, strict=True):
        value = block[0]
        if self.keep_dims:
            value = value.reshape((1,) * x.handle.data.ndim) if whole else np.expand_dims(value, self.axis)
        results.append(self.to_tensor(value, x.dtype))
    return results


def install() -> None:
    """Replace the slow reduction in this process."""
    interpreter.ReduceOps.generic_reduce = tree_reduce
