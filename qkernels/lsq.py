"""Backward of learned step sizes (LSQ): dx and the gradients of scale and zero point in one pass over x and dy.

    z  = clamp(rint(zero_point), quant_min, quant_max),   q = rint(x * (1 / scale)) + z,   k = clamp(q) - z
    m  = quant_min <= q <= quant_max          ("rounded": torch's learnable operators)
    m  = quant_min < x * (1 / scale) + z < quant_max      ("lsq": Esser et al. 2020, strict, before rounding)
    dx = dy * m
    dscale      = grad_factor * sum dy * (m ? (k * scale - x) / scale : k)
    dzero_point = grad_factor * sum dy * (m ? 0 : -scale)

The forward is that of `qkernels.fake_quant` with a learned zero point. A NaN code, of a NaN in x or of a scale whose
reciprocal overflows, adds nothing.

Sums are deterministic: which program adds which elements, and in which order, is fixed by the shape, the device and the
launch configuration. A
program adds up in float32 with the rounding errors kept beside (Knuth's TwoSum), then in float64, so that the result is
within 1e-6 of the sum of |terms| for any number of elements. If several programs share a group of channels, their
partials are added by a second, tiny launch; with one program per group, as for most weights, there is none.

Bytes per element: 3 itemsizes. Two extra float32 per element and thread hold the errors; the arithmetic hides behind
the memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from qkernels.autotune.lookup import flat_accumulation, tiled_accumulation
from qkernels.device_math import clamp_to_low, fma, gate, is_on, learned_zero_point, rint, round_to, row_offset
from qkernels.launch import launch
from qkernels.layout import Channels, Flat, plan


class LearnedQParams(NamedTuple):
    """Scale, zero point, and where their gradients go: pointers to C elements. One kernel argument.

    Attributes:
        scale: any float dtype.
        zero_point: any float dtype, or integers.
        enabled: 1-element flag; 0 passes dy through and gives scale and zero point gradient 0. None is on.
        learning: 1-element flag; 0 gives scale and zero point gradient 0. None is on.
        dscale: gradient of scale, any float dtype.
        dzero_point: gradient of zero_point, any float dtype.
        quant_min: smallest code, float.
        quant_max: largest code, float.
        grad_factor: factor of both gradients.
    """

    scale: Any
    zero_point: Any
    enabled: Any
    learning: Any
    dscale: Any
    dzero_point: Any
    quant_min: float
    quant_max: float
    grad_factor: float


@triton.jit
def _load_qparams(qparams, channel, mask):
    """(scale, 1 / scale, zero point) as float32 of the channels in block `channel`."""
    scale = tl.load(qparams.scale + channel, mask=mask, other=1.0).to(tl.float32)
    zero_point = tl.load(qparams.zero_point + channel, mask=mask, other=0).to(tl.float32)
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    return scale, inverse, learned_zero_point(zero_point, qparams.quant_min, qparams.quant_max)


@triton.jit
def _add(total, rest, term):
    """total + term in float32, and rest + what that sum rounded off (Knuth's TwoSum)."""
    new = total + term
    part = new - total
    return new, rest + ((total - (new - part)) + (term - part))


@triton.jit
def _total(total, rest):
    """Sum and rounding errors together, in float64. An infinite or NaN sum has no error to add."""
    finite = tl.abs(total) < float("inf")
    return total.to(tl.float64) + tl.where(finite, rest, 0.0).to(tl.float64)


@triton.jit
def _one_tile(dx_ptr, x_ptr, dy_ptr, mask, scale, inverse, zero_point, qparams, on, sums, STRICT: tl.constexpr):
    """Gradients of one tile, given its pointers and mask (or None): dx stored, the rest added to `sums`."""
    if mask is None:
        x = tl.load(x_ptr).to(tl.float32)
        dy = tl.load(dy_ptr)
    else:  # zeros add nothing to the sums
        x = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr, mask=mask, other=0.0)
    position = x * inverse
    code = rint(position) + zero_point
    if STRICT:
        inside = (position + zero_point > qparams.quant_min) & (position + zero_point < qparams.quant_max)
    else:
        inside = (code >= qparams.quant_min) & (code <= qparams.quant_max)
    tl.store(dx_ptr, gate(dy, inside | (on == 0)), mask=mask)

    steps = clamp_to_low(code, qparams.quant_min, qparams.quant_max) - zero_point
    known = code == code
    slope = tl.where(inside, fma(steps, scale, -x) * inverse, steps)
    dy = dy.to(tl.float32)
    scale_sum, scale_rest = _add(sums[0], sums[1], tl.where(known, dy * slope, 0.0))
    saturated_sum, saturated_rest = _add(sums[2], sums[3], tl.where(inside | (code != code), 0.0, dy))
    return scale_sum, scale_rest, saturated_sum, saturated_rest


@triton.jit
def _finish(scale_sum, saturated_sum, channel, mask, qparams):
    """Store the gradients of the channels in block `channel`, given the float64 sums."""
    on = is_on(qparams.enabled) & is_on(qparams.learning)
    scale = tl.load(qparams.scale + channel, mask=mask, other=1.0).to(tl.float64)
    dscale = tl.where(on, scale_sum * qparams.grad_factor, 0.0)
    # 0 where nothing saturates, whatever the scale
    dzero_point = tl.where(on & (saturated_sum != 0.0), -scale * saturated_sum * qparams.grad_factor, 0.0)
    dscale = round_to(dscale.to(tl.float32), qparams.dscale.dtype.element_ty)
    dzero_point = round_to(dzero_point.to(tl.float32), qparams.dzero_point.dtype.element_ty)
    tl.store(qparams.dscale + channel, dscale, mask=mask)
    tl.store(qparams.dzero_point + channel, dzero_point, mask=mask)


@triton.jit
def _finish_or_share(scale_sum, saturated_sum, channel, mask, partials_ptr, part, n_parts, n_channels, qparams,
                     SPLIT: tl.constexpr):  # fmt: skip
    if SPLIT:
        partial = partials_ptr + part * n_channels + channel
        tl.store(partial, scale_sum, mask=mask)
        tl.store(partial + n_parts * n_channels, saturated_sum, mask=mask)
    else:
        _finish(scale_sum, saturated_sum, channel, mask, qparams)


@triton.jit(do_not_specialize=["n"])  # n meets only comparisons: nothing to gain, compilations to lose
def _learnable_backward_flat_kernel(
    dx_ptr,  # (n,)
    x_ptr,  # (n,)
    dy_ptr,  # (n,)
    partials_ptr,  # (2, n_programs) float64: terms of dscale, then saturated dy; unused if n_programs is 1
    n,
    qparams,  # LearnedQParams of 1 element
    STRICT: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    n_programs = tl.num_programs(0)
    offs = tl.arange(0, BLOCK)
    on = is_on(qparams.enabled)
    only = tl.arange(0, 1)
    scale, inverse, zero_point = _load_qparams(qparams, only, only == 0)
    zero = tl.zeros((BLOCK,), tl.float32)
    sums = (zero, zero, zero, zero)

    n = n.to(tl.int64)
    n_whole = n // BLOCK  # whole tiles need no mask: 16-byte accesses for every n; one program has the ragged end
    for tile in range(program, n_whole, n_programs):
        offset = tile * BLOCK + offs
        sums = _one_tile(
            dx_ptr + offset, x_ptr + offset, dy_ptr + offset, None,
            scale, inverse, zero_point, qparams, on, sums, STRICT,
        )  # fmt: skip
    if program == n_whole % n_programs:
        offset = n_whole * BLOCK + offs
        sums = _one_tile(
            dx_ptr + offset, x_ptr + offset, dy_ptr + offset, offset < n,
            scale, inverse, zero_point, qparams, on, sums, STRICT,
        )  # fmt: skip

    scale_sum = tl.sum(_total(sums[0], sums[1]), 0, keep_dims=True)
    saturated_sum = tl.sum(_total(sums[2], sums[3]), 0, keep_dims=True)
    _finish_or_share(scale_sum, saturated_sum, only, only == 0, partials_ptr, program, n_programs, 1, qparams, SPLIT)


@triton.jit
def _learnable_backward_tiled_kernel(
    dx_ptr,
    x_ptr,
    dy_ptr,
    partials_ptr,  # (2, n_parts, n_channels) float64; unused if n_parts is 1
    qparams,  # LearnedQParams of n_channels elements
    row_sizes,  # tuple of ints, fastest first
    dx_row_strides,  # tuples of ints, in units of VEC when the fast direction is contiguous
    x_row_strides,
    dy_row_strides,
    n_rows,
    n_channels,  # in units of VEC if CHANNEL_INNERMOST
    run,  # in units of VEC if not CHANNEL_INNERMOST
    channel_strides,  # tuple (dx, x, dy)
    run_strides,  # tuple (dx, x, dy)
    STRICT: tl.constexpr,
    CHANNEL_INNERMOST: tl.constexpr,
    VEC: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (channels or blocks of BLOCK_K channels, parts); a part takes every n_parts-th tile of its channels."""
    group = tl.program_id(0)
    part = tl.program_id(1)
    n_parts = tl.num_programs(1)
    lane = tl.arange(0, BLOCK_K)
    on = is_on(qparams.enabled)
    if CHANNEL_INNERMOST:
        n_channels = n_channels * VEC
        channel = group * BLOCK_K + lane
        mask_c = channel < n_channels
        mask_k = mask_c
        offset_k = channel.to(tl.int64)
        strides = channel_strides
        tiles_per_row = 1
    else:
        run = run * VEC
        channel = group + tl.arange(0, 1)
        mask_c = channel < n_channels
        dx_ptr += group.to(tl.int64) * channel_strides[0] * VEC
        x_ptr += group.to(tl.int64) * channel_strides[1] * VEC
        dy_ptr += group.to(tl.int64) * channel_strides[2] * VEC
        mask_k = lane < run
        offset_k = lane.to(tl.int64)
        strides = run_strides
        tiles_per_row = (run - 1) // BLOCK_K + 1  # tl.cdiv would overflow just below 2**31
    scale, inverse, zero_point = _load_qparams(qparams, channel, mask_c)
    scale = scale[None, :]
    inverse = inverse[None, :]
    zero_point = zero_point[None, :]
    zero = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    sums = (zero, zero, zero, zero)
    n_tiles = ((n_rows - 1) // BLOCK_R + 1) * tiles_per_row

    for tile in range(part, n_tiles, n_parts):
        row = (tile // tiles_per_row) * BLOCK_R + tl.arange(0, BLOCK_R)
        if not CHANNEL_INNERMOST:
            k = (tile % tiles_per_row) * BLOCK_K + lane
            mask_k = k < run
            offset_k = k.to(tl.int64)
        mask = (row < n_rows)[:, None] & mask_k[None, :]
        dx_offs = row_offset(row, row_sizes, dx_row_strides)[:, None] * VEC + offset_k[None, :] * strides[0]
        x_offs = row_offset(row, row_sizes, x_row_strides)[:, None] * VEC + offset_k[None, :] * strides[1]
        dy_offs = row_offset(row, row_sizes, dy_row_strides)[:, None] * VEC + offset_k[None, :] * strides[2]
        sums = _one_tile(
            dx_ptr + dx_offs, x_ptr + x_offs, dy_ptr + dy_offs, mask,
            scale, inverse, zero_point, qparams, on, sums, STRICT,
        )  # fmt: skip

    scale_sum = _total(sums[0], sums[1])
    saturated_sum = _total(sums[2], sums[3])
    if not CHANNEL_INNERMOST:
        scale_sum = tl.sum(scale_sum, 1, keep_dims=True)
        saturated_sum = tl.sum(saturated_sum, 1, keep_dims=True)
    _finish_or_share(
        tl.sum(scale_sum, 0), tl.sum(saturated_sum, 0), channel, mask_c, partials_ptr, part, n_parts, n_channels,
        qparams, SPLIT,
    )  # fmt: skip


@triton.jit
def _sum_partials_kernel(
    partials_ptr,  # (2, n_parts, n_channels) float64
    qparams,
    n_parts,
    n_channels,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid (blocks of BLOCK_C channels,): add the parts in a fixed order and finish."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = channel < n_channels
    scale_sum = tl.zeros((BLOCK_P, BLOCK_C), tl.float64)
    saturated_sum = tl.zeros((BLOCK_P, BLOCK_C), tl.float64)
    for first in range(0, n_parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        mask_p = (part < n_parts)[:, None] & mask[None, :]
        offset = part[:, None] * n_channels + channel[None, :]
        scale_sum += tl.load(partials_ptr + offset, mask=mask_p, other=0.0)
        saturated_sum += tl.load(partials_ptr + n_parts * n_channels + offset, mask=mask_p, other=0.0)
    _finish(tl.sum(scale_sum, 0), tl.sum(saturated_sum, 0), channel, mask, qparams)


def launch_learnable_backward(
    dx: torch.Tensor,
    x: torch.Tensor,
    dy: torch.Tensor,
    qparams: LearnedQParams,
    *,
    axis: int | None,
    strict: bool,
) -> None:
    """Write dx and the gradients of scale and zero point. One launch, or two if programs share channels.

    Args:
        dx: gradient of x, same shape and dtype as x, no two elements in one place.
        x: any layout, not empty; float16, bfloat16 or float32.
        dy: gradient of y, any layout, dtype of x.
        qparams: contiguous tensors of C elements (1 for axis=None) on x's device; bounds within +-2**23.
        axis: channel axis in [0, x.ndim), or None.
        strict: Esser's mask instead of torch's.
    """
    layout = plan(tuple(x.shape), (dx.stride(), x.stride(), dy.stride()), axis)
    if isinstance(layout, Flat):
        partials, n_parts, n_channels = _launch_flat(layout, (dx, x, dy), qparams, strict)
    else:
        partials, n_parts, n_channels = _launch_tiled(layout, (dx, x, dy), qparams, strict)
    if n_parts > 1:
        block_c = 1 if n_channels == 1 else 32
        launch(
            _sum_partials_kernel,
            (triton.cdiv(n_channels, block_c),),
            partials,
            qparams,
            n_parts,
            n_channels,
            BLOCK_P=1024 // block_c,
            BLOCK_C=block_c,
            num_warps=4,
        )


def _partials(x: torch.Tensor, n_parts: int, n_channels: int) -> torch.Tensor:
    """Scratch for the sums of programs that share a group; 1 element, never touched, if none do."""
    count = 2 * n_parts * n_channels if n_parts > 1 else 1
    return torch.empty(count, dtype=torch.float64, device=x.device)


Launched = tuple[torch.Tensor, int, int]  # partials, number of parts, number of channels


def _launch_flat(
    layout: Flat, tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor], qparams: LearnedQParams, strict: bool
) -> Launched:
    config = flat_accumulation(layout.n, tensors[0].device)
    partials = _partials(tensors[0], config.programs, 1)
    launch(
        _learnable_backward_flat_kernel,
        (config.programs,),
        *tensors,
        partials,
        layout.n,
        qparams,
        STRICT=strict,
        SPLIT=config.programs > 1,
        BLOCK=config.block,
        num_warps=config.num_warps,
    )
    return partials, config.programs, 1


def _launch_tiled(
    layout: Channels, tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor], qparams: LearnedQParams, strict: bool
) -> Launched:
    dx = tensors[0]
    inner = layout.channel_innermost
    config = tiled_accumulation(layout.n_rows, layout.run, layout.channels, inner, dx.device)
    vec = layout.vec
    partials = _partials(dx, config.parts, layout.channels)
    launch(
        _learnable_backward_tiled_kernel,
        (config.groups, config.parts),
        *tensors,
        partials,
        qparams,
        layout.rows,
        *(tuple(stride // vec for stride in strides) for strides in layout.row_strides),
        layout.n_rows,
        layout.channels // (vec if inner else 1),
        layout.run // (1 if inner else vec),
        tuple(stride // (1 if inner else vec) for stride in layout.channel_strides),
        layout.run_strides,
        STRICT=strict,
        CHANNEL_INNERMOST=inner,
        VEC=vec,
        SPLIT=config.parts > 1,
        BLOCK_R=config.block_rows,
        BLOCK_K=config.block_lanes,
        num_warps=config.num_warps,
    )
    return partials, config.parts, layout.channels
