"""Fake quantization kernels, forward and backward: one launch, every element read once and written once.

    q = rint(x / scale) + zero_point, as x * (1 / scale) with an IEEE reciprocal      (integer zero points)
    q = rint(fma(x, 1 / scale, zero_point))                                           (per-channel float zero points)
    q = rint(x / scale) + clamp(rint(zero_point), quant_min, quant_max)               (learned zero points)
    y = (clamp(q, quant_min, quant_max) - zero_point) * scale                         dx = dy where q is within bounds

All arithmetic is float32 whatever the dtype of x (a fractional zero point is subtracted in float64, as in torch), with
one rounding when y is stored. Bit-equal to
`fake_quantize_per_tensor_affine` and `fake_quantize_per_channel_affine` on the CPU (torch 2.13,
aten/src/ATen/native/quantized/cpu/kernels/QuantizedOpKernels.cpp) for every finite x. NaN stays NaN with gradient 0;
infinities saturate. No mask is saved: the backward computes q again from x, which the layer before mostly keeps alive
anyway.

Bytes per element: forward 2 itemsizes, backward 3.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qkernels.autotune.lookup import flat_elementwise, tiled_elementwise
from qkernels.device_math import clamp_to_low, fma, gate, is_on, learned_zero_point, rint, round_to, row_offset
from qkernels.launch import launch
from qkernels.layout import Channels, Flat, plan

# What a zero point is.
INTEGER = tl.constexpr("integer")  # a float is truncated, as in torch's per-tensor operator
FRACTIONAL = tl.constexpr("fractional")  # a float that takes part in rounding
LEARNED = tl.constexpr("learned")  # a float that is rounded and clamped first


@triton.jit
def _load_qparams(scale_ptr, zero_point_ptr, channel, mask, quant_min, quant_max, ZERO_POINT: tl.constexpr):
    """(scale, 1 / scale, zero_point) as float32 of the channels in block `channel`."""
    scale = tl.load(scale_ptr + channel, mask=mask, other=1.0).to(tl.float32)
    zero_point = tl.load(zero_point_ptr + channel, mask=mask, other=0)
    if ZERO_POINT == INTEGER:
        zero_point = zero_point.to(tl.int32).to(tl.float32)
    if ZERO_POINT == LEARNED:
        zero_point = learned_zero_point(zero_point.to(tl.float32), quant_min, quant_max)
    return scale, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale), zero_point.to(tl.float32)


@triton.jit
def _apply(x, dy, scale, inverse, zero_point, quant_min, quant_max, on, ZERO_POINT: tl.constexpr):
    """y for one block of x, or dx when dy is given; the input itself where the op is off."""
    wide = x.to(tl.float32)
    if ZERO_POINT == FRACTIONAL:
        code = rint(fma(wide, inverse, zero_point)) + 0.0  # as the sum below, this leaves no -0.0
    else:
        code = rint(wide * inverse) + zero_point
    if dy is None:
        code = clamp_to_low(code, quant_min, quant_max)
        if ZERO_POINT == FRACTIONAL:  # code - zero_point is not exact in float32; torch computes it in float64
            y = ((code.to(tl.float64) - zero_point.to(tl.float64)) * scale.to(tl.float64)).to(tl.float32)
        else:
            y = (code - zero_point) * scale
        y = tl.where(wide == wide, y, wide)
        result = tl.where(on, round_to(y, x.dtype), x)
    else:
        inside = ((code >= quant_min) & (code <= quant_max)) | (on == 0)
        result = gate(dy, inside)
    return result


@triton.jit
def _one_tile(
    out_ptr, x_ptr, dy_ptr, mask, scale, inverse, zero_point, quant_min, quant_max, on, ZERO_POINT: tl.constexpr
):
    """Load, compute and store one tile, given its pointers (dy_ptr None in the forward) and mask (or None)."""
    x = tl.load(x_ptr, mask=mask)
    dy = None
    if dy_ptr is not None:
        dy = tl.load(dy_ptr, mask=mask)
    out = _apply(x, dy, scale, inverse, zero_point, quant_min, quant_max, on, ZERO_POINT)
    tl.store(out_ptr, out, mask=mask)


@triton.jit(do_not_specialize=["n"])  # n meets only comparisons: nothing to gain, compilations to lose
def _fake_quant_flat_kernel(
    out_ptr,  # (n,) y, or dx when dy_ptr is given
    x_ptr,  # (n,)
    dy_ptr,  # (n,) or None for the forward
    scale_ptr,  # (1,)
    zero_point_ptr,  # (1,)
    enabled_ptr,  # (1,) or None
    n,
    quant_min,  # float32
    quant_max,  # float32
    ZERO_POINT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # The observer read x front to back just before: going back to front finds the end of x still in L2.
    start = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * BLOCK
    offs = tl.arange(0, BLOCK)
    on = is_on(enabled_ptr)
    only = tl.arange(0, 1)
    scale, inverse, zero_point = _load_qparams(
        scale_ptr, zero_point_ptr, only, only == 0, quant_min, quant_max, ZERO_POINT
    )

    out_ptr += start
    x_ptr += start
    dy_offs = None
    if dy_ptr is not None:
        dy_offs = dy_ptr + start + offs
    if start + BLOCK <= n:  # a whole tile needs no mask: 16-byte accesses for every n
        _one_tile(
            out_ptr + offs, x_ptr + offs, dy_offs, None,
            scale, inverse, zero_point, quant_min, quant_max, on, ZERO_POINT,
        )  # fmt: skip
    else:
        _one_tile(
            out_ptr + offs, x_ptr + offs, dy_offs, start + offs < n,
            scale, inverse, zero_point, quant_min, quant_max, on, ZERO_POINT,
        )  # fmt: skip


@triton.jit
def _fake_quant_tiled_kernel(
    out_ptr,
    x_ptr,
    dy_ptr,  # None for the forward
    scale_ptr,  # (n_channels,), or (1,) if n_channels is 1
    zero_point_ptr,
    enabled_ptr,  # (1,) or None
    row_sizes,  # tuple of ints, fastest first
    out_row_strides,  # tuples of ints, in units of VEC when the fast direction is contiguous
    x_row_strides,
    dy_row_strides,
    n_rows,
    n_channels,  # in units of VEC if CHANNEL_INNERMOST
    run,  # in units of VEC if not CHANNEL_INNERMOST
    channel_strides,  # tuple (out, x, dy)
    run_strides,  # tuple (out, x, dy)
    quant_min,
    quant_max,
    ZERO_POINT: tl.constexpr,
    CHANNEL_INNERMOST: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (channels or blocks of BLOCK_K channels, parts); a part takes every n_parts-th tile of its channels."""
    group = tl.program_id(0)
    part = tl.program_id(1)
    n_parts = tl.num_programs(1)
    lane = tl.arange(0, BLOCK_K)
    on = is_on(enabled_ptr)
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
        out_ptr += group.to(tl.int64) * channel_strides[0] * VEC
        x_ptr += group.to(tl.int64) * channel_strides[1] * VEC
        if dy_ptr is not None:
            dy_ptr += group.to(tl.int64) * channel_strides[2] * VEC
        mask_k = lane < run
        offset_k = lane.to(tl.int64)
        strides = run_strides
        tiles_per_row = (run - 1) // BLOCK_K + 1  # tl.cdiv would overflow just below 2**31
    scale, inverse, zero_point = _load_qparams(
        scale_ptr, zero_point_ptr, channel, mask_c, quant_min, quant_max, ZERO_POINT
    )
    scale = scale[None, :]
    inverse = inverse[None, :]
    zero_point = zero_point[None, :]
    n_tiles = ((n_rows - 1) // BLOCK_R + 1) * tiles_per_row

    for tile in range(part, n_tiles, n_parts):
        row = (tile // tiles_per_row) * BLOCK_R + tl.arange(0, BLOCK_R)
        if not CHANNEL_INNERMOST:
            k = (tile % tiles_per_row) * BLOCK_K + lane
            mask_k = k < run
            offset_k = k.to(tl.int64)
        mask = (row < n_rows)[:, None] & mask_k[None, :]
        out_offs = row_offset(row, row_sizes, out_row_strides)[:, None] * VEC + offset_k[None, :] * strides[0]
        x_offs = row_offset(row, row_sizes, x_row_strides)[:, None] * VEC + offset_k[None, :] * strides[1]
        dy_offs = None
        if dy_ptr is not None:
            dy_offs = row_offset(row, row_sizes, dy_row_strides)[:, None] * VEC + offset_k[None, :] * strides[2]
            dy_offs = dy_ptr + dy_offs
        _one_tile(
            out_ptr + out_offs, x_ptr + x_offs, dy_offs, mask,
            scale, inverse, zero_point, quant_min, quant_max, on, ZERO_POINT,
        )  # fmt: skip


def launch_fake_quant(
    out: torch.Tensor,
    x: torch.Tensor,
    dy: torch.Tensor | None,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    quant_min: int,
    quant_max: int,
    *,
    axis: int | None,
    enabled: torch.Tensor | None = None,
    learned: bool = False,
) -> None:
    """Write y (dy None) or dx to `out`. One launch.

    Args:
        out: the result, same shape and dtype as x, no two elements in one place.
        x: any layout, not empty; float16, bfloat16 or float32.
        dy: gradient of y, any layout, dtype of x; None for the forward.
        scale: (C,) contiguous, or 1 element for axis=None; any float dtype.
        zero_point: like scale; int32, int64 or a float dtype.
        quant_min: smallest code, at least -2**23.
        quant_max: largest code, at most 2**23.
        axis: channel axis in [0, x.ndim), or None.
        enabled: 1-element flag; 0 copies x (or dy) to out.
        learned: round and clamp the zero point first.
    """
    operands = (out, x) if dy is None else (out, x, dy)
    layout = plan(tuple(x.shape), tuple(t.stride() for t in operands), axis)
    tensors = (out, x, dy, scale, zero_point, enabled)
    bounds = (float(quant_min), float(quant_max))
    kind = "fractional" if axis is not None and zero_point.dtype.is_floating_point else "integer"
    if learned:
        kind = "learned"
    if isinstance(layout, Flat):
        _launch_flat(layout, tensors, bounds, kind)
    else:
        _launch_tiled(layout, tensors, bounds, kind)


Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor | None]


def _launch_flat(layout: Flat, tensors: Tensors, bounds: tuple[float, float], zero_point: str) -> None:
    config = flat_elementwise(tensors[0].element_size(), tensors[0].device)
    launch(
        _fake_quant_flat_kernel,
        (triton.cdiv(layout.n, config.block),),
        *tensors,
        layout.n,
        *bounds,
        ZERO_POINT=zero_point,
        BLOCK=config.block,
        num_warps=config.num_warps,
    )


def _launch_tiled(layout: Channels, tensors: Tensors, bounds: tuple[float, float], zero_point: str) -> None:
    out = tensors[0]
    inner = layout.channel_innermost
    config = tiled_elementwise(layout.n_rows, layout.run, layout.channels, inner, out.device, out.element_size())
    vec = layout.vec
    row_strides = [tuple(stride // vec for stride in strides) for strides in layout.row_strides]
    launch(
        _fake_quant_tiled_kernel,
        (config.groups, config.parts),
        *tensors,
        layout.rows,
        row_strides[0],
        row_strides[1],
        row_strides[-1],
        layout.n_rows,
        layout.channels // (vec if inner else 1),
        layout.run // (1 if inner else vec),
        tuple(stride // (1 if inner else vec) for stride in layout.channel_strides),
        layout.run_strides,
        *bounds,
        ZERO_POINT=zero_point,
        CHANNEL_INNERMOST=inner,
        VEC=vec,
        BLOCK_R=config.block_rows,
        BLOCK_K=config.block_lanes,
        num_warps=config.num_warps,
    )
