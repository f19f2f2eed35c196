"""Min/max kernels: one launch reads x once and finishes: store, update statistics, qparams.

A group of channels (one channel; a block of them where the channel is innermost; the whole tensor) is reduced by one or
several programs. One finishes at once. Of several each stores a partial, and the last to arrive, found with an atomic
counter of the group, combines them. Finishing is what the caller asked for: store min and max, fold them into running
statistics, derive scale and zero point. No second launch, no host read. Min and max are exact, so the result does not
depend on the order of programs.

Bytes: itemsize of x per element, plus 8 per program and channel for the partials. NaN propagates, as torch.aminmax.
Empty input is the caller's business.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from qkernels.autotune.lookup import flat_reduction, tiled_reduction
from qkernels.device_math import is_on, max_nan, min_nan, row_offset
from qkernels.launch import launch
from qkernels.layout import Channels, Flat, plan
from qkernels.qparams import NO_RULE, SYMMETRIC, RuleArguments, qparams_of

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
        scale_floor: 1 element, for a scale and zero point that an optimizer changes too: where they are not renewed,
            the scale is raised to it, and a symmetric rule's zero point is 0. None leaves them alone.
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
    scale_floor: Any = None


@triton.jit
def _finish(low, high, channel, mask, stats, UPDATE: tl.constexpr, RULE: tl.constexpr):
    """Fold the batch's min `low` and max `high` of block `channel` into the statistics and derive qparams."""
    on = is_on(stats.enabled)
    # All old state is read before any is written.
    if UPDATE != STORE:
        old_low = tl.load(stats.min_val + channel, mask=mask, other=0.0)
        old_high = tl.load(stats.max_val + channel, mask=mask, other=0.0)
    if RULE is not None:
        old_scale = tl.load(stats.scale + channel, mask=mask, other=1.0)
        old_zero_point = tl.load(stats.zero_point + channel, mask=mask, other=0)

    if UPDATE == EXTREMES:
        low = tl.where(on, min_nan(low, old_low), old_low)
        high = tl.where(on, max_nan(high, old_high), old_high)
    elif UPDATE != STORE:
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
        scale, zero_point = qparams_of(low, high, stats.rule, RULE)
        if stats.scale_floor is not None:
            old_scale = max_nan(old_scale, tl.load(stats.scale_floor).to(old_scale.dtype))
            if RULE == SYMMETRIC:
                zero_point = tl.zeros_like(zero_point)
                old_zero_point = tl.zeros_like(old_zero_point)
        scale = tl.where(on, scale, old_scale)
        zero_point = tl.where(on, zero_point.to(old_zero_point.dtype), old_zero_point)
        tl.store(stats.scale + channel, scale, mask=mask)
        tl.store(stats.zero_point + channel, zero_point, mask=mask)
        tl.store(stats.scale_copy + channel, scale, mask=mask)
        tl.store(stats.zero_point_copy + channel, zero_point, mask=mask)


@triton.jit
def _combine(
    low,  # (BLOCK_C,) float32: this program's minima of block `channel`
    high,
    channel,  # (BLOCK_C,)
    mask,
    partials_ptr,  # (2, n_parts, n_channels) float32: minima, then maxima; unused if n_parts is 1
    counter_ptr,  # int32, one per group, 0 before and after the launch; unused if n_parts is 1
    group,
    part,
    n_parts,
    n_channels,
    stats,
    UPDATE: tl.constexpr,
    RULE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Finish these channels, if no other program shares them or all others have arrived."""
    if SPLIT:
        partial = partials_ptr + part * n_channels + channel
        tl.store(partial, low, mask=mask)
        tl.store(partial + n_parts * n_channels, high, mask=mask)
        tl.debug_barrier()  # every thread's partials are stored before one thread announces them
        arrived = tl.atomic_add(counter_ptr + group, 1, sem="acq_rel", scope="gpu")
        if arrived == n_parts - 1:
            all_low = tl.full((BLOCK_P, channel.shape[0]), float("inf"), tl.float32)
            all_high = tl.full((BLOCK_P, channel.shape[0]), float("-inf"), tl.float32)
            for first_part in range(0, n_parts, BLOCK_P):
                parts = first_part + tl.arange(0, BLOCK_P)
                mask_p = (parts < n_parts)[:, None] & mask[None, :]
                offset = parts[:, None] * n_channels + channel[None, :]
                # .cg: read from L2, where other programs' stores are; this SM's L1 may hold something older
                all_low = min_nan(all_low, tl.load(partials_ptr + offset, mask_p, float("inf"), cache_modifier=".cg"))
                offset += n_parts * n_channels
                all_high = max_nan(
                    all_high, tl.load(partials_ptr + offset, mask_p, float("-inf"), cache_modifier=".cg")
                )
            _finish(tl.reduce(all_low, 0, min_nan), tl.reduce(all_high, 0, max_nan), channel, mask, stats, UPDATE, RULE)
            tl.store(counter_ptr + group, 0)
    else:
        _finish(low, high, channel, mask, stats, UPDATE, RULE)


@triton.jit(do_not_specialize=["n"])  # n meets only comparisons: nothing to gain, compilations to lose
def _minmax_flat_kernel(
    x_ptr,  # (n,) any float dtype
    partials_ptr,
    counter_ptr,
    n,
    stats,
    UPDATE: tl.constexpr,
    RULE: tl.constexpr,
    SPLIT: tl.constexpr,
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

    only = tl.arange(0, 1)
    low = tl.reduce(low, 0, min_nan, keep_dims=True)
    high = tl.reduce(high, 0, max_nan, keep_dims=True)
    _combine(
        low, high, only, only == 0, partials_ptr, counter_ptr, 0, program, n_programs, 1,
        stats, UPDATE, RULE, SPLIT, BLOCK_P,
    )  # fmt: skip


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
    SPLIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
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
        mask_c = channel < n_channels
        mask_k = mask_c
        tiles_per_row = 1
    else:
        run = run * VEC
        channel = group + tl.arange(0, 1)
        mask_c = channel < n_channels
        base = x_ptr + group.to(tl.int64) * channel_stride * VEC
        mask_k = lane < run
        tiles_per_row = (run - 1) // BLOCK_K + 1  # tl.cdiv would overflow just below 2**31
    n_tiles = ((n_rows - 1) // BLOCK_R + 1) * tiles_per_row
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

    if not CHANNEL_INNERMOST:
        low = tl.reduce(low, 1, min_nan, keep_dims=True)
        high = tl.reduce(high, 1, max_nan, keep_dims=True)
    _combine(
        tl.reduce(low, 0, min_nan), tl.reduce(high, 0, max_nan), channel, mask_c,
        partials_ptr, counter_ptr, group, part, n_parts, n_channels, stats, UPDATE, RULE, SPLIT, BLOCK_P,
    )  # fmt: skip


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
        workspace: int32 zeros that no other launch uses which may run at the same time. None, or fewer than the
            groups that several programs share (MAX_SHARED_GROUPS always suffice), allocates, which costs a memset.
    """
    layout = plan(tuple(x.shape), (x.stride(),), axis, skip_repeats=True)
    if isinstance(layout, Flat):
        _launch_flat(layout, x, stats, update, rule, workspace)
    else:
        _launch_tiled(layout, x, stats, update, rule, workspace)


def _partials(x: torch.Tensor, count: int) -> torch.Tensor:
    return torch.empty(2 * count, dtype=torch.float32, device=x.device)


def _counters(x: torch.Tensor, workspace: torch.Tensor | None, count: int) -> torch.Tensor | None:
    """`count` zeros: the caller's if they are enough, else new ones; None if nothing is to be counted."""
    if count == 0 or (workspace is not None and workspace.numel() >= count):
        return workspace if count else None
    return torch.zeros(count, dtype=torch.int32, device=x.device)


def _launch_flat(
    layout: Flat, x: torch.Tensor, stats: Statistics, update: str, rule: str | None, workspace: torch.Tensor | None
) -> None:
    config = flat_reduction(layout.n, x.device)
    launch(
        _minmax_flat_kernel,
        (config.programs,),
        x,
        _partials(x, config.programs),
        _counters(x, workspace, 1 if config.programs > 1 else 0),
        layout.n,
        stats,
        UPDATE=update,
        RULE=rule,
        SPLIT=config.programs > 1,
        BLOCK=config.block,
        BLOCK_P=config.block_parts,
        num_warps=config.num_warps,
    )


def _launch_tiled(
    layout: Channels, x: torch.Tensor, stats: Statistics, update: str, rule: str | None, workspace: torch.Tensor | None
) -> None:
    inner = layout.channel_innermost
    config = tiled_reduction(layout.n_rows, layout.run, layout.channels, inner, x.device, x.element_size())
    vec = layout.vec
    launch(
        _minmax_tiled_kernel,
        (config.groups, config.parts),
        x,
        _partials(x, config.parts * layout.channels if config.parts > 1 else 1),
        _counters(x, workspace, config.groups if config.parts > 1 else 0),
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
        SPLIT=config.parts > 1,
        BLOCK_R=config.block_rows,
        BLOCK_K=config.block_lanes,
        BLOCK_P=config.block_parts,
        num_warps=config.num_warps,
    )
