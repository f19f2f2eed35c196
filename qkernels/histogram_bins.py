"""Device functions of the histogram kernels: the exact bin of a value, counting, and torch.linspace's points."""

from __future__ import annotations

import triton
import triton.language as tl

from qkernels.device_math import fma


@triton.jit
def counting_range(low, high):
    """The range that is counted in: one value gets a neighbourhood of 1, as in torch.histc."""
    one_value = low == high
    return tl.where(one_value, low - 1.0, low), tl.where(one_value, high + 1.0, high)


@triton.jit
def scaled_width(low, high):
    """(width * power, 1 / (width * power), power), the power of 2 such that nothing below overflows or underflows."""
    width = high - low
    power = tl.where(width < 8.673617379884035e-19, 1.8446744073709552e19, 1.0)  # 2**-60, 2**64
    power = tl.where(width > 1.152921504606847e18, 5.421010862427522e-20, power)  # 2**60, 2**-64
    scaled = width * power
    inverse = tl.div_rn(tl.full((), 1.0, tl.float32), scaled)
    return scaled, tl.where(width > 0.0, inverse, 0.0), power


@triton.jit
def bin_of(x, low, width, inverse, power, BINS: tl.constexpr):
    """trunc((x - low) * BINS / width) with every step rounded as IEEE division would, for x in the range.

    A product with the reciprocal alone gives another bin for 4 % of values near borders. One step of Newton's with
    fused multiply-adds makes the quotient of a correctly rounded reciprocal correctly rounded (Markstein 1990), without
    the 20 instructions and the call of a division. What overflows belongs to bin 0, as on the CPU.
    """
    numerator = (x - low) * BINS
    overflows = numerator == float("inf")
    numerator = tl.where(overflows, 0.0, numerator * power)
    quotient = numerator * inverse
    quotient = fma(fma(-width, quotient, numerator), inverse, quotient)
    return tl.minimum(quotient.to(tl.int32), BINS - 1)


@triton.jit
def linspace_step(low, high, N: tl.constexpr):
    """Distance of N + 1 points from low to high."""
    return tl.div_rn(high - low, tl.full((), N, tl.float32))


@triton.jit
def linspace_point(i, low, high, step, N: tl.constexpr):
    """Point i of torch.linspace(low, high, N + 1) in float32, whose CPU code multiplies and adds with one rounding."""
    rising = fma(step, i.to(tl.float32), low)
    falling = fma(-step, (N - i).to(tl.float32), high)
    return tl.where(i < (N + 1) // 2, rising, falling)


@triton.jit
def parts_below(edge, low, high, N: tl.constexpr, STEPS: tl.constexpr):
    """How many of the N equal parts of [low, high] have their middle below `edge`: a binary search for each edge.

    The middles are torch.ao's: torch.linspace's points plus half a step, in float32.
    """
    step = linspace_step(low, high, N)
    below = tl.zeros(edge.shape, tl.int32)
    for k in range(STEPS):
        more = below + (1 << (STEPS - 1 - k))
        middle = linspace_point(more - 1, low, high, step, N) + 0.5 * step
        below = tl.where((more <= N) & (middle < edge), more, below)
    return below


# --- counting in a shared array through inline PTX: CUDA only ----------------------------------------------------


@triton.jit
def shared_counts(seed):
    """32-bit shared address of an array of 2048 int32, declared by the kernel that calls this once."""
    return tl.inline_asm_elementwise(
        ".shared .align 16 .b32 qk_counts_${:uid}[2048];\n\tmov.u32 $0, qk_counts_${:uid};",
        "=r,r",
        [seed],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def shared_store(address, value):
    """Store int32 values at shared addresses."""
    return tl.inline_asm_elementwise(
        "st.shared.b32 [$1], $2;\n\tmov.u32 $0, 0;", "=r,r,r", [address, value], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def shared_load(address):
    """Load int32 values from shared addresses."""
    return tl.inline_asm_elementwise(
        "ld.shared.b32 $0, [$1];", "=r,r", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def shared_increment(address, inside):
    """Add 1 at shared addresses where `inside` is not 0: one atomic per element, equal addresses merged."""
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p red.shared.add.u32 [$1], 1; mov.u32 $0, 0; }",
        "=r,r,r",
        [address, inside],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
