"""Device functions shared by the kernels: NaN-propagating min/max, exact rounding, fused multiply-add, addressing.

The interpreter runs kernels in NumPy and has neither libdevice, nor a fused multiply-add, nor rounding to bfloat16, so
three functions carry an exact second form for it. Which form is used is fixed at import (`TRITON_INTERPRET=1`).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from qkernels import launch

INTERPRETED = tl.constexpr(launch.INTERPRETED)


@triton.jit
def min_nan(a, b):
    """Smaller of a and b; NaN if either is NaN, as torch.aminmax."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def max_nan(a, b):
    """Larger of a and b; NaN if either is NaN, as torch.aminmax."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def clamp_to_low(x, low, high):
    """Clamp to [low, high]; NaN gives `low`, as torch's fake quantization does with a NaN code."""
    if INTERPRETED:  # whose maximum lets NaN through whatever it is asked
        x = tl.where(x == x, x, low)
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.NONE)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.NONE)


@triton.jit
def rint(x):
    """Round a float32 to the nearest integer, ties to even."""
    if INTERPRETED:
        # Adding 2**23 leaves no fraction bits, so the addition itself rounds; larger numbers are integers already.
        magnitude = tl.abs(x)
        rounded = (magnitude + 8388608.0) - 8388608.0
        rounded = tl.where(magnitude < 8388608.0, rounded, magnitude)
        return tl.where(x < 0, -rounded, rounded)
    else:
        # cvt.rni.f32.f32 on CUDA and v_rndne_f32 on AMD; libdevice.rint does not lower on AMD.
        return libdevice.nearbyint(x)


@triton.jit
def rint64(x):
    """Round a float64 with |x| < 2**51 to the nearest integer, ties to even. Only additions: nothing can contract."""
    return (x + 6755399441055744.0) - 6755399441055744.0


@triton.jit
def fma(a, b, c):
    """a * b + c in float32, rounded once."""
    if INTERPRETED:
        # The product of two float32 is exact in float64. The sum rounds there first, which can differ from a true
        # fma only when that rounding lands exactly on a float32 midpoint (about 1 in 2**29 random sums).
        return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Round a float32 to a float dtype, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter truncates to bfloat16. Round in integer arithmetic first, so that nothing is left to drop.
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def gate(dy, inside):
    """dy * inside, a product as in torch: an infinite or NaN dy is not hidden by the mask."""
    if INTERPRETED:  # where bfloat16 products are wrong
        return round_to(dy.to(tl.float32) * inside.to(tl.float32), dy.dtype)
    else:
        return dy * inside.to(dy.dtype)


@triton.jit
def learned_zero_point(zero_point, quant_min, quant_max):
    """The integer that a learned float32 zero point stands for; NaN stays NaN."""
    return min_nan(max_nan(rint(zero_point), quant_min), quant_max)


@triton.jit
def is_on(flag_ptr):
    """Value of a device flag of any integer dtype; a missing flag (None) is on."""
    on = True
    if flag_ptr is not None:
        on = tl.load(flag_ptr) != 0
    return on


@triton.jit
def row_offset(row, sizes, strides):
    """Offset in elements (int64) of row number `row` in row dimensions given fastest first."""
    offset = row.to(tl.int64) * 0
    for d in tl.static_range(len(sizes) - 1):
        offset += (row % sizes[d]).to(tl.int64) * strides[d]
        row = row // sizes[d]
    return offset + row.to(tl.int64) * strides[len(sizes) - 1]
