"""Min/max kernels: one launch reads x once, and its last program finishes: store, update statistics, qparams.

For every group (the whole tensor, or each channel) the programs reduce their share of x to one partial per channel.
The last program to arrive, found with one atomic counter, combines the partials and does what the caller asked for:
stores min and max, folds them into running statistics, and derives scale and zero point. No second launch, no host
read. Min and max are exact, so the result does not depend on the order of programs.

Bytes: itemsize of x per element, plus 8 per program and channel for the partials. NaN propagates, as torch.aminmax.
Empty input is the caller's business.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from qkernels.autotune.heuristics import flat_reduction, tiled_reduction
from qkernels.device_math import is_on, max_nan, min_nan, row_offset
from qkernels.launch import launch
from qkernels.layout import Channels, Flat, plan
from qkernels.qparams import NO_RULE, RuleArguments, qparams_of

# How the running statistics take a batch's min and max.
STORE = tl.constexpr("store")  # overwrite: aminmax
EXTREMES = tl.constexpr("extremes")  # running min and max
AVERAGE = tl.constexpr("average")  # moving average; (+inf, -inf) is replaced: torch.ao's MovingAverage observers
FUSED_AVERAGE = tl.constexpr("fused_average")  # moving average; any infinity is replaced: torch's fused op


class Statistics(NamedTuple):
    """What the finishing program reads and writes: pointers to C elements, None where unused. One kernel argument.

    Attributes:
        min_val: min, or running min; float32 (any float dtype for STORE).
        max_val: max, or running max.
        averaging_constant: weight of the new batch.
        enabled: 1-element flag; 0 leaves the statistics alone.
        scale: scale to write, float32.
        zero_point: zero point to write, int32, int64 or float32.
        scale_copy: where a copy of the (new or old) scale goes.
        zero_point_copy: likewise for the zero point.
        qparams_enabled: 1-element flag that gates scale and zero_point; None follows `enabled`.
        rule: arguments of the qparams rule.
    """

    min_val: Any
    max_val: Any
    averaging_constant: float = 0.0
    enabled: Any = None
    scale: Any = None
    zero_point: Any = None
    scale_copy: Any = None
    zero_point_copy: Any = None
    qparams_enabled: Any = None
    rule: RuleArguments = NO_RULE


@triton.jit
def _finish(low, high, channel, mask, stats, UPDATE: tl.constexpr, RULE: tl.constexpr):
    """Fold the batch's min `low` and max `high` of block `channel` into the statistics and derive qparams."""
    on = is_on(stats.enabled)
    if UPDATE != STORE:
        old_low = tl.load(stats.min_val + channel, mask=mask, other=0.0)
        old_high = tl.load(stats.max_val + channel, mask=mask, other=0.0)
        if UPDATE == EXTREMES:
            low = min_nan(low, old_low)
            high = max_nan(high, old_high)
        else:
            constant = stats.averaging_constant
            if UPDATE == AVERAGE:
                first_low = (old_low == float("inf")) & (old_high == float("-inf"))
                first_high = first_low
            else:
                first_low = tl.abs(old_low) == float("inf")
                first_high = tl.abs(old_high) == float("inf")
            low = tl.where(first_low, low, old_low + constant * (low - old_low))
            high = tl.where(first_high, high, old_high + constant * (high - old_high))
        low = tl.where(on, low, old_low)
        high = tl.where(on, high, old_high)
    tl.store(stats.min_val + channel, low.to(stats.min_val.dtype.element_ty), mask=mask)
    tl.store(stats.max_val + channel, high.to(stats.max_val.dtype.element_ty), mask=mask)
    if RULE is not None:
        if stats.qparams_enabled is not None:
            on = is_on(stats.qparams_enabled)
        old_scale = tl.load(stats.scale + channel, mask=mask, other=1.0)
        old_zero_point = tl.load(stats.zero_point + channel, mask=mask, other=0)
        scale, zero_point = qparams_of(low, high, stats.rule, RULE)
        scale = tl.where(on, scale, old_scale)
        zero_point = tl.where(on, zero_point.to(old_zero_point.dtype), old_zero_point)
        tl.store(stats.scale + channel, scale, mask=mask)
        tl.store(stats.zero_point + channel, zero_point, mask=mask)
        tl.store(stats.scale_copy + channel, scale, mask=mask)
        tl.store(stats.zero_point_copy + channel, zero_point, mask=mask)


@triton.jit
def _finish_if_last(
    partials_ptr,  # (2, n_parts, n_channels) float32: minima, then maxima
    counter_ptr,  # (1,) int32, 0 before and after the launch
    n_parts,
    n_channels,
    n_programs,
    stats,
    UPDATE: tl.constexpr,
    RULE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Count this program; the last one combines all partials, channel block by channel block."""
    tl.debug_barrier()  # every thread's partials are stored before one thread announces them
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    if arrived == n_programs - 1:
        for first_channel in range(0, n_channels, BLOCK_C):
            channel = first_channel + tl.arange(0, BLOCK_C)
            mask_c = channel < n_channels
            low = tl.full((BLOCK_P, BLOCK_C), float("inf"), tl.float32)
            high = tl.full((BLOCK_P, BLOCK_C), float("-inf"), tl.float32)
            for first_part in range(0, n_parts, BLOCK_P):
                part = first_part + tl.arange(0, BLOCK_P)
                mask = (part < n_parts)[:, None] & mask_c[None, :]
                offset = part[:, None] * n_channels + channel[None, :]
                # .cg: read from L2, where other programs' stores are; this SM's L1 may hold nothing or something older
                low = min_nan(low, tl.load(partials_ptr + offset, mask, float("inf"), cache_modifier=".cg"))
                offset += n_parts * n_channels
                high = max_nan(high, tl.load(partials_ptr + offset, mask, float("-inf"), cache_modifier=".cg"))
            _finish(tl.reduce(low, 0, min_nan), tl.reduce(high, 0, max_nan), channel, mask_c, stats, UPDATE, RULE)
        tl.store(counter_ptr, 0)


@triton.jit(do_not_specialize=["n"])  # n meets only comparisons: nothing to gain, compilations to lose
def _minmax_flat_kernel(
    x_ptr,  # (n,) any float dtype
    partials_ptr,
    counter_ptr,
    n,
    stats,
    UPDATE: tl.constexpr,
    RULE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    program = tl.program_id(0)
    n_programs = tl.num_programs(0)
    n = tl.where(is_on(stats.enabled), n.to(tl.int64), 0)  # a disabled observer reads nothing
    offs = tl.arange(0, BLOCK)
    low = tl.full((BLOCK,), float("inf"), tl.float32)
    high = tl.full((BLOCK,), float("-inf"), tl.float32)

    # Whole tiles need no mask, so the loads stay 16 bytes wide for every n; one program has the ragged end.
    n_whole = n // BLOCK
    for tile in range(program, n_whole, n_programs):
        x = tl.load(x_ptr + tile * BLOCK + offs).to(tl.float32)
        low = min_nan(low, x)
        high = max_nan(high, x)
    if program == n_whole % n_programs:
        mask = offs < n - n_whole * BLOCK
        x = tl.load(x_ptr + n_whole * BLOCK + offs, mask=mask, other=0.0).to(tl.float32)
        low = min_nan(low, tl.where(mask, x, float("inf")))
        high = max_nan(high, tl.where(mask, x, float("-inf")))

    tl.store(partials_ptr + program, tl.reduce(low, 0, min_nan))
    tl.store(partials_ptr + n_programs + program, tl.reduce(high, 0, max_nan))
    _finish_if_last(partials_ptr, counter_ptr, n_programs, 1, n_programs, stats, UPDATE, RULE, BLOCK_P, 1)


@triton.jit
def _minmax_tiled_kernel(
    x_ptr,
    partials_ptr,
    counter_ptr,
    stats,
    row_sizes,  # tuple of ints, fastest first
    row_strides,  # tuple of ints, in units of VEC when the fast direction is contiguous
    n_rows,
    n_channels,  # in units of VEC if CHANNEL_INNERMOST
    channel_stride,
    run,  # in units of VEC if not CHANNEL_INNERMOST
    run_stride,
    UPDATE: tl.constexpr,
    RULE: tl.constexpr,
    CHANNEL_INNERMOST: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid (channels or blocks of BLOCK_K channels, parts); a part takes every n_parts-th tile of its channels."""
    group = tl.program_id(0)
    part = tl.program_id(1)
    n_parts = tl.num_programs(1)
    lane = tl.arange(0, BLOCK_K)
    low = tl.full((BLOCK_R, BLOCK_K), float("inf"), tl.float32)
    high = tl.full((BLOCK_R, BLOCK_K), float("-inf"), tl.float32)
    if CHANNEL_INNERMOST:
        n_channels = n_channels * VEC
        channel = group * BLOCK_K + lane
        base = x_ptr + channel.to(tl.int64)[None, :] * channel_stride
        mask_k = channel < n_channels
        tiles_per_row = 1
    else:
        run = run * VEC
        channel = group
        base = x_ptr + group.to(tl.int64) * channel_stride * VEC
        mask_k = lane < run
        tiles_per_row = tl.cdiv(run, BLOCK_K)
    n_tiles = tl.cdiv(n_rows, BLOCK_R) * tiles_per_row
    n_tiles = tl.where(is_on(stats.enabled), n_tiles, 0)  # a disabled observer reads nothing

    for tile in range(part, n_tiles, n_parts):
        row = (tile // tiles_per_row) * BLOCK_R + tl.arange(0, BLOCK_R)
        pointers = base + row_offset(row, row_sizes, row_strides)[:, None] * VEC
        if not CHANNEL_INNERMOST:
            k = (tile % tiles_per_row) * BLOCK_K + lane
            pointers += k.to(tl.int64)[None, :] * run_stride
            mask_k = k < run
        mask = (row < n_rows)[:, None] & mask_k[None, :]
        x = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        low = min_nan(low, tl.where(mask, x, float("inf")))
        high = max_nan(high, tl.where(mask, x, float("-inf")))

    low = tl.reduce(low, 0, min_nan)
    high = tl.reduce(high, 0, max_nan)
    partial = partials_ptr + part * n_channels + channel
    maxima = n_parts * n_channels
    if CHANNEL_INNERMOST:
        tl.store(partial, low, mask=channel < n_channels)
        tl.store(partial + maxima, high, mask=channel < n_channels)
    else:
        tl.store(partial, tl.reduce(low, 0, min_nan))
        tl.store(partial + maxima, tl.reduce(high, 0, max_nan))
    n_programs = tl.num_programs(0) * n_parts
    _finish_if_last(partials_ptr, counter_ptr, n_parts, n_channels, n_programs, stats, UPDATE, RULE, BLOCK_P, BLOCK_C)


def launch_minmax(
    x: torch.Tensor,
    stats: Statistics,
    *,
    axis: int | None,
    update: str,
    rule: str | None = None,
    workspace: torch.Tensor | None = None,
) -> None:
    """Reduce x to one min and max per group and finish as asked. One launch.

    Args:
        x: any layout, not empty; float16, bfloat16 or float32.
        stats: tensors of C contiguous elements (1 for axis=None) on x's device.
        axis: channel axis in [0, x.ndim), or None.
        update: "store", "extremes", "average" or "fused_average".
        rule: qparams rule (`qkernels.ops.qparams_rules.RULES`), or None for min and max alone.
        workspace: int32, 1 element, holding 0, and used by no other launch that may run at the same time. None
            allocates one, which costs a memset.
    """
    if workspace is None:
        workspace = torch.zeros(1, dtype=torch.int32, device=x.device)
    layout = plan(tuple(x.shape), (x.stride(),), axis, skip_repeats=True)
    if isinstance(layout, Flat):
        _launch_flat(layout, x, stats, update, rule, workspace)
    else:
        _launch_tiled(layout, x, stats, update, rule, workspace)


def _launch_flat(
    layout: Flat, x: torch.Tensor, stats: Statistics, update: str, rule: str | None, workspace: torch.Tensor
) -> None:
    config = flat_reduction(layout.n, x.device)
    launch(
        _minmax_flat_kernel,
        (config.programs,),
        x,
        torch.empty(2 * config.programs, dtype=torch.float32, device=x.device),
        workspace,
        layout.n,
        stats,
        UPDATE=update,
        RULE=rule,
        BLOCK=config.block,
        BLOCK_P=config.block_parts,
        num_warps=config.num_warps,
    )


def _launch_tiled(
    layout: Channels, x: torch.Tensor, stats: Statistics, update: str, rule: str | None, workspace: torch.Tensor
) -> None:
    inner = layout.channel_innermost
    config = tiled_reduction(layout.n_rows, layout.run, layout.channels, inner, x.device)
    vec = layout.vec
    launch(
        _minmax_tiled_kernel,
        (config.groups, config.parts),
        x,
        torch.empty(2 * config.parts * layout.channels, dtype=torch.float32, device=x.device),
        workspace,
        stats,
        layout.rows,
        tuple(stride // vec for stride in layout.row_strides[0]),
        layout.n_rows,
        layout.channels // (vec if inner else 1),
        layout.channel_strides[0] // (1 if inner else vec),
        layout.run // (1 if inner else vec),
        layout.run_strides[0],
        UPDATE=update,
        RULE=rule,
        CHANNEL_INNERMOST=inner,
        VEC=vec,
        BLOCK_R=config.block_rows,
        BLOCK_K=config.block_lanes,
        BLOCK_P=config.block_parts,
        BLOCK_C=config.block_channels,
        num_warps=config.num_warps,
    )
