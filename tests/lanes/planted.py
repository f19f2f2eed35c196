"""Toy kernels, one sound and the others each with one planted fault: what the lanes must pass and must catch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from tests.lanes.cases import Arguments, KernelCase, Outputs

BLOCK = 512  # 4 elements of 4 bytes for each of 128 threads


@triton.jit
def _scale_kernel(y_ptr, x_ptr, s_ptr, n, BLOCK: tl.constexpr):
    """y = x * s, sound: whole tiles without a mask, the ragged end with one."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = start + tl.arange(0, BLOCK)
    s = tl.load(s_ptr)
    if start + BLOCK <= n:
        tl.store(y_ptr + offs, (tl.load(x_ptr + offs).to(tl.float32) * s).to(y_ptr.dtype.element_ty))
    else:
        mask = offs < n
        tl.store(y_ptr + offs, (tl.load(x_ptr + offs, mask).to(tl.float32) * s).to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _masked_kernel(y_ptr, x_ptr, s_ptr, n, BLOCK: tl.constexpr):
    """Fault: the mask of a size that 16 does not divide makes every access scalar."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    x = tl.load(x_ptr + offs, mask).to(tl.float32)
    tl.store(y_ptr + offs, (x * tl.load(s_ptr)).to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _divide_kernel(y_ptr, x_ptr, s_ptr, n, BLOCK: tl.constexpr):
    """Fault: `/` is an approximate division."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    x = tl.load(x_ptr + offs, mask).to(tl.float32)
    tl.store(y_ptr + offs, (x / tl.load(s_ptr)).to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _contracted_kernel(y_ptr, x_ptr, s_ptr, n, BLOCK: tl.constexpr):
    """Fault: the sum of a product is contracted unless the launch forbids it."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    x = tl.load(x_ptr + offs, mask).to(tl.float32)
    s = tl.load(s_ptr)
    tl.store(y_ptr + offs, (x * s + s).to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _promising_kernel(y_ptr, x_ptr, s_ptr, n, BLOCK: tl.constexpr):
    """Fault: promises an alignment that the pointer need not have."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(tl.multiple_of(x_ptr + offs, 16)).to(tl.float32)
    tl.store(y_ptr + offs, (x * tl.load(s_ptr)).to(y_ptr.dtype.element_ty), offs < n)


@triton.jit
def _twice_kernel(y_ptr, x_ptr, s_ptr, n, BLOCK: tl.constexpr):
    """Fault: tiles overlap by one element, which is read and written twice."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, 2 * BLOCK)
    mask = (offs < n) & (tl.arange(0, 2 * BLOCK) <= BLOCK)
    tl.store(
        y_ptr + offs, (tl.load(x_ptr + offs, mask).to(tl.float32) * tl.load(s_ptr)).to(y_ptr.dtype.element_ty), mask
    )


@triton.jit
def _overrun_kernel(y_ptr, x_ptr, s_ptr, n, BLOCK: tl.constexpr):
    """Fault: the load at the ragged end has no mask."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs).to(tl.float32)
    tl.store(y_ptr + offs, (x * tl.load(s_ptr)).to(y_ptr.dtype.element_ty), offs < n)


@triton.jit
def _constant_grid_kernel(y_ptr, x_ptr, s_ptr, n, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    """Fault: the number of programs is compiled in, so that nearly every size compiles again."""
    for tile in range(tl.program_id(0), tl.cdiv(n, BLOCK), PROGRAMS):
        offs = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = offs < n
        x = tl.load(x_ptr + offs, mask).to(tl.float32)
        tl.store(y_ptr + offs, (x * tl.load(s_ptr)).to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _racy_kernel(total_ptr, seen_ptr):
    """Fault: reads and writes one element from every program without an atomic."""
    before = tl.load(total_ptr)
    tl.store(seen_ptr + tl.program_id(0), before)
    tl.store(total_ptr, before + 1.0)


@triton.jit
def _last_program_kernel(
    out_ptr, parts_ptr, counter_ptr, x_ptr, SEMANTICS: tl.constexpr, FENCED: tl.constexpr, BLOCK: tl.constexpr
):
    """Column sums: every program stores a block, the last one adds the blocks up. Sound if acq_rel and fenced."""
    offs = tl.arange(0, BLOCK)
    tl.store(parts_ptr + tl.program_id(0) * BLOCK + offs, tl.load(x_ptr + tl.program_id(0) * BLOCK + offs))
    if FENCED:
        tl.debug_barrier()
    if tl.atomic_add(counter_ptr, 1, sem=SEMANTICS) == tl.num_programs(0) - 1:
        total = tl.zeros((BLOCK,), tl.float32)
        for part in range(tl.num_programs(0)):
            total += tl.load(parts_ptr + part * BLOCK + offs)
        tl.store(out_ptr + offs, total)
        tl.store(counter_ptr, 0)


@triton.jit
def _hungry_kernel(y_ptr, x_ptr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Fault, with few registers per thread: a tile that does not fit is kept until the end."""
    offs = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, x - tl.sum(x, 0)[None, :] * tl.sum(x, 1)[:, None])


@triton.jit
def _hungry_loop_kernel(y_ptr, x_ptr, n_tiles, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Fault, with few registers per thread: accumulators that do not fit go to the stack and back in every turn."""
    offs = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for _ in range(n_tiles):
        total += tl.load(x_ptr + offs) * tl.sum(total, 0)[None, :]
    tl.store(y_ptr + offs, total)


def _make(device: torch.device, dtype: torch.dtype, large: bool) -> Arguments:
    return _sweep(dtype, (1 << 16) + 1 if large else 3 * BLOCK + 5)


def _sweep(dtype: torch.dtype, n: int) -> Arguments:
    return {"x": torch.linspace(-1.0, 1.0, n).to(dtype), "s": torch.full((1,), 3.0)}


def _elementwise(kernel: Any, **options: Any) -> Callable[..., Outputs]:
    def run(x: torch.Tensor, s: torch.Tensor) -> Outputs:
        y = torch.empty_like(x)
        kernel[(triton.cdiv(x.numel(), BLOCK),)](y, x, s, x.numel(), BLOCK=BLOCK, **options)
        return {"y": y}

    return run


def _with_room_behind(device: torch.device, dtype: torch.dtype, large: bool) -> dict[str, torch.Tensor]:
    """The usual arguments, x at the front of a larger storage: whoever overruns it meets no other tensor."""
    arguments = _make(device, dtype, large)
    x = arguments["x"]
    return {**arguments, "x": torch.cat([x, x.new_ones(4 * BLOCK)])[: x.numel()]}


def _case(name: str, run: Callable[..., Outputs], **changes: Any) -> KernelCase:
    contract = {"reads": {"x": 1}, "writes": {"y": 1}, "scratch_bytes": 64, "sweep": _sweep}
    return KernelCase(name, **{"make": _make, "run": run, **contract, **changes})


def _run_twice(x: torch.Tensor, s: torch.Tensor) -> Outputs:
    _elementwise(_scale_kernel)(x, s)
    return _elementwise(_scale_kernel)(x, s)


def _run_item(x: torch.Tensor, s: torch.Tensor) -> Outputs:
    return _elementwise(_scale_kernel)(x, s * s.item())


def _run_copy(x: torch.Tensor, s: torch.Tensor) -> Outputs:
    return _elementwise(_scale_kernel)(x, s.cpu())


def _run_mask(x: torch.Tensor, s: torch.Tensor) -> Outputs:
    return _elementwise(_scale_kernel)(x, s[s == s])


def _run_constant_grid(x: torch.Tensor, s: torch.Tensor) -> Outputs:
    y = torch.empty_like(x)
    programs = min(64, triton.cdiv(x.numel(), BLOCK))
    _constant_grid_kernel[(programs,)](y, x, s, x.numel(), PROGRAMS=programs, BLOCK=BLOCK)
    return {"y": y}


def _run_racy(total: torch.Tensor) -> Outputs:
    seen = torch.zeros(8)
    _racy_kernel[(8,)](total, seen)
    return {"seen": seen}


def _last_program(semantics: str, fenced: bool) -> Callable[..., Outputs]:
    def run(x: torch.Tensor, counter: torch.Tensor) -> Outputs:
        out, parts = torch.empty(BLOCK), torch.empty_like(x)
        grid = (x.numel() // BLOCK,)
        _last_program_kernel[grid](out, parts, counter, x, SEMANTICS=semantics, FENCED=fenced, BLOCK=BLOCK)
        return {"out": out}

    return run


def _last_program_case(name: str, semantics: str, fenced: bool) -> KernelCase:
    def make(device: torch.device, dtype: torch.dtype, large: bool) -> Arguments:
        # small integers: their sums are exact, so program order cannot show in the result
        return {"x": torch.arange(4.0 * BLOCK), "counter": torch.zeros(1, dtype=torch.int32)}

    run = _last_program(semantics, fenced)
    return KernelCase(name, make, run, reads={"x": 1}, writes={"out": 1}, scratch_bytes=4 * 4 * BLOCK * 2 + 64)


def _run_hungry(x: torch.Tensor) -> Outputs:
    y = torch.empty_like(x)
    _hungry_kernel[(1,)](y, x, ROWS=64, BLOCK=128, num_warps=4, maxnreg=32)
    return {"y": y}


def _run_hungry_loop(x: torch.Tensor) -> Outputs:
    y = torch.empty_like(x)
    _hungry_loop_kernel[(1,)](y, x, 7, ROWS=64, BLOCK=128, num_warps=4, maxnreg=32)
    return {"y": y}


SOUND = _case("sound", _elementwise(_scale_kernel))
SOUND_LAST_PROGRAM = _last_program_case("sound_last_program", "acq_rel", True)

MASKED = _case("masked", _elementwise(_masked_kernel))
DIVIDES = _case("divides", _elementwise(_divide_kernel), vector=1)
CONTRACTS = _case("contracts", _elementwise(_contracted_kernel), vector=1)
FORBIDS_CONTRACTION = _case("forbids_contraction", _elementwise(_contracted_kernel, enable_fp_fusion=False), vector=1)
PROMISES_ALIGNMENT = _case("promises_alignment", _elementwise(_promising_kernel))
SPILLS = KernelCase(
    "spills", lambda device, dtype, large: {"x": torch.zeros(64, 128)}, _run_hungry, vector=1, fused_multiply_adds=True
)
SPILLS_IN_A_LOOP = replace(SPILLS, name="spills_in_a_loop", run=_run_hungry_loop, cold_stack=1 << 20)

READS_TWICE = _case("reads_twice", _elementwise(_twice_kernel))
READS_GAPS = replace(
    SOUND,
    name="reads_gaps",  # a strided view whose strides the launcher ignores
    make=lambda device, dtype, large: {"x": torch.ones(4 * BLOCK)[::2], "s": torch.ones(1)},
)
OVERRUNS = _case(
    "overruns",
    _elementwise(_overrun_kernel),
    make=_with_room_behind,
)
RACY = KernelCase("racy", lambda device, dtype, large: {"total": torch.zeros(1)}, _run_racy, scratch_bytes=1000)
RELAXED = _last_program_case("relaxed", "relaxed", True)
UNFENCED = _last_program_case("unfenced", "acq_rel", False)

LAUNCHES_TWICE = _case("launches_twice", _run_twice)
READS_ITEM = _case("reads_item", _run_item)
COPIES_TO_HOST = _case("copies_to_host", _run_copy)
INDEXES_BY_MASK = _case("indexes_by_mask", _run_mask)
CONSTANT_GRID = _case("constant_grid", _run_constant_grid)
