"""The registered kernels: every operator on every memory layout its launcher tells apart. Add new kernels here.

`CASES` is what the lanes run. Large inputs are never initialised: nothing reads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from qkernels.ops import fake_quant, minmax, qparams, update_qparams
from tests.lanes.cases import Arguments, KernelCase, Outputs
from tests.lanes.histogram_cases import histogram_cases
from tests.lanes.layouts import LAYOUTS, THOROUGH, Layout, sweep
from tests.lanes.lsq_cases import lsq_cases

QUANT_MIN, QUANT_MAX = -128, 127


def _statistics_registers(layout: Layout) -> int:
    """Bound for the min/max kernels: three programs of 8 warps on a multiprocessor, two where x is read element by
    element with an address each (108 with Triton 3.6, 88 with 3.7).
    """
    return 128 if layout.vector == 1 else 88


# The last program of a reduction finishes for all. ptxas parks a few values on the stack there, once per program, to
# keep the registers of the loop that streams x at a number that fills the multiprocessor (seen: 8 to 24 bytes, on
# other targets and dtypes with every version of Triton).
COLD_STACK = 32


# ------------------------------------------------------------------------------------------------- fake quantization


def _qparams(device: torch.device, channels: int, float_zero_point: bool) -> Arguments:
    scale = torch.linspace(0.02, 0.03, channels, device=device)
    zero_point = torch.arange(channels, device=device) % 5 - 2
    return {"scale": scale, "zero_point": zero_point + 0.25 if float_zero_point else zero_point.to(torch.int32)}


def _fake_quantize(layout: Layout, backward: bool, flagged: bool = False, float_zero_point: bool = False) -> KernelCase:
    def arguments(x: torch.Tensor) -> Arguments:
        rest = _qparams(x.device, layout.channels(x), float_zero_point)
        if flagged:
            rest["enabled"] = torch.ones(1, dtype=torch.uint8, device=x.device)
        return {"x": x, **({"dy": torch.empty_like(x).fill_(0.5)} if backward else {}), **rest}

    def run(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, **rest: Any) -> Outputs:
        bounds = (QUANT_MIN, QUANT_MAX, layout.axis, rest.get("enabled"))
        if backward:
            return {"dx": fake_quant._fake_quantize_backward_triton(rest["dy"], x, scale, zero_point, *bounds)}
        return {"y": fake_quant._fake_quantize_triton(x, scale, zero_point, *bounds)}

    marks = ["backward"] * backward + ["flagged"] * flagged + ["float_zero_point"] * float_zero_point
    return KernelCase(
        name="-".join(["fake_quantize", *marks, layout.name]),
        make=lambda device, dtype, large: arguments(layout.tensor(device, dtype, large)),
        run=run,
        reads={"x": 1, "dy": 1} if backward else {"x": 1},
        writes={"dx": 1} if backward else {"y": 1},
        scratch_bytes=1024,
        vector=layout.vector,
        max_registers=96 if layout.vector == 1 else 80 if float_zero_point else 64,
        fused_multiply_adds=float_zero_point,
        sweep=sweep(layout, arguments) if not (flagged or backward) else None,
        max_configurations=1,
        thorough=layout.name in THOROUGH and not flagged,
    )


# ------------------------------------------------------------------------------------------------------------ min/max


def _aminmax(layout: Layout) -> KernelCase:
    def run(x: torch.Tensor) -> Outputs:
        low, high = minmax._aminmax_triton(x, layout.axis)
        return {"min": low, "max": high}

    return KernelCase(
        name=f"aminmax-{layout.name}",
        make=lambda device, dtype, large: {"x": layout.tensor(device, dtype, large)},
        run=run,
        reads={"x": 1},
        writes={"min": 1, "max": 1},
        scratch_bytes=1024,
        vector=layout.vector,
        max_registers=_statistics_registers(layout),
        cold_stack=COLD_STACK,
        sweep=sweep(layout, lambda x: {"x": x}),
        max_configurations=3,  # a tile of 1024 or 4096 elements; a grid of one, or of more
        thorough=layout.name in THOROUGH,
    )


def _state(x: torch.Tensor, channels: int) -> Arguments:
    return {
        "x": x,
        "min_val": torch.full((channels,), -1.0, device=x.device),
        "max_val": torch.full((channels,), 1.0, device=x.device),
        "enabled": torch.ones(1, dtype=torch.uint8, device=x.device),
        "workspace": torch.zeros(1, dtype=torch.int32, device=x.device),
    }


def _observe(layout: Layout, averaging_constant: float | None) -> KernelCase:
    def run(x: torch.Tensor, min_val: torch.Tensor, max_val: torch.Tensor, **rest: torch.Tensor) -> Outputs:
        minmax._observe_minmax_triton(x, min_val, max_val, averaging_constant, layout.axis, **rest)
        return {}

    def arguments(x: torch.Tensor) -> Arguments:
        return _state(x, layout.channels(x))

    return KernelCase(
        name=f"observe_minmax_-{'average' if averaging_constant else 'extremes'}-{layout.name}",
        make=lambda device, dtype, large: arguments(layout.tensor(device, dtype, large)),
        run=run,
        reads={"x": 1, "min_val": 1, "max_val": 1},
        writes={"min_val": 1, "max_val": 1},
        scratch_bytes=1024,
        vector=layout.vector,
        max_registers=_statistics_registers(layout),
        cold_stack=COLD_STACK,
    )


def _update(layout: Layout, rule: str) -> KernelCase:
    def arguments(x: torch.Tensor) -> Arguments:
        channels = layout.channels(x)
        kept = {
            "scale": torch.ones(channels, device=x.device),
            "zero_point": torch.zeros(channels, dtype=torch.int32, device=x.device),
        }
        return {**_state(x, channels), **kept}

    def run(
        x: torch.Tensor,
        min_val: torch.Tensor,
        max_val: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor,
        enabled: torch.Tensor,
        workspace: torch.Tensor,
    ) -> Outputs:
        copies = update_qparams._triton(
            x,
            min_val,
            max_val,
            scale,
            zero_point,
            QUANT_MIN,
            QUANT_MAX,
            rule=rule,
            averaging_constant=0.01,
            axis=layout.axis,
            enabled=enabled,
            workspace=workspace,
        )
        return dict(zip(("scale_copy", "zero_point_copy"), copies, strict=True))

    state = ("min_val", "max_val", "scale", "zero_point")
    return KernelCase(
        name=f"update_qparams_-{rule}-{layout.name}",
        make=lambda device, dtype, large: arguments(layout.tensor(device, dtype, large)),
        run=run,
        reads={"x": 1, **dict.fromkeys(state, 1)},
        writes=dict.fromkeys([*state, "scale_copy", "zero_point_copy"], 1),
        scratch_bytes=1024,
        vector=layout.vector,
        max_registers=_statistics_registers(layout),
        cold_stack=COLD_STACK,
        thorough=layout.name in THOROUGH and rule in ("affine", "fused_symmetric"),
    )


# ------------------------------------------------------------------------------------------------ pairs and small ones


def _observe_and_fake_quantize() -> KernelCase:
    """The step of FusedMovingAvgObsFakeQuantize: two launches, x read twice."""
    update = _update(LAYOUTS[0], "fused_affine")

    def run(x: torch.Tensor, **state: torch.Tensor) -> Outputs:
        copies = update.run(x, **state)
        y = fake_quant._fake_quantize_triton(
            x, copies["scale_copy"], copies["zero_point_copy"], QUANT_MIN, QUANT_MAX, None, state["enabled"]
        )
        return {"y": y}

    return replace(
        update,
        name="observe_and_fake_quantize-flat",
        run=run,
        launches=2,
        reads={**update.reads, "x": 2},
        writes={**dict.fromkeys(("min_val", "max_val", "scale", "zero_point"), 1), "y": 1},
    )


def _choose_qparams(rule: str) -> KernelCase:
    def make(device: torch.device, dtype: torch.dtype, large: bool) -> Arguments:
        channels = 4097 if large else 300
        low = torch.linspace(-2.0, -1.0, channels, device=device)
        return {"min_val": low, "max_val": -low, "eps": torch.full((1,), 1e-7, device=device)}

    def run(min_val: torch.Tensor, max_val: torch.Tensor, eps: torch.Tensor) -> Outputs:
        both = qparams.choose_qparams_triton(min_val, max_val, QUANT_MIN, QUANT_MAX, rule, 0, eps)
        return dict(zip(("scale", "zero_point"), both, strict=True))

    return KernelCase(
        name=f"choose_qparams-{rule}",
        make=make,
        run=run,
        reads={"min_val": 1, "max_val": 1},
        writes={"scale": 1, "zero_point": 1},
        scratch_bytes=64,
        vector=1,
        dtypes=(torch.float32,),
    )


def _reciprocal() -> KernelCase:
    def run(scale: torch.Tensor) -> Outputs:
        return {"reciprocal": qparams._reciprocal_triton(scale)}

    return KernelCase(
        name="reciprocal",
        make=lambda device, dtype, large: {"scale": torch.linspace(1.0, 2.0, 4097 if large else 300)},
        run=run,
        reads={"scale": 1},
        writes={"reciprocal": 1},
        vector=1,
        dtypes=(torch.float32,),
    )


def _every() -> Iterator[KernelCase]:
    for layout in LAYOUTS:
        yield _fake_quantize(layout, backward=False)
        yield _fake_quantize(layout, backward=True)
        yield _aminmax(layout)
    flat, rows, cols, strided = LAYOUTS[0], LAYOUTS[1], LAYOUTS[5], LAYOUTS[8]
    for layout in (flat, rows, cols):
        yield _fake_quantize(layout, backward=False, flagged=True)
        yield _fake_quantize(layout, backward=True, flagged=True)
    for layout in (rows, cols):
        yield _fake_quantize(layout, backward=False, float_zero_point=True)
        yield _fake_quantize(layout, backward=True, float_zero_point=True)
    for layout in (flat, rows, cols, strided):
        yield _observe(layout, None)
        yield _observe(layout, 0.01)
        yield _update(layout, "affine")
    for rule in ("symmetric", "fused_affine", "fused_symmetric"):
        yield _update(flat, rule)
        yield _update(cols, rule)
    yield _observe_and_fake_quantize()
    for rule in ("affine", "symmetric", "float_qparams", "fused_affine", "fused_symmetric"):
        yield _choose_qparams(rule)
    yield _reciprocal()
    yield from lsq_cases()
    yield from histogram_cases()


def _one_dtype(cases: Iterator[KernelCase]) -> Iterator[KernelCase]:
    """Thorough cases keep all dtypes; the others take turns."""
    for number, case in enumerate(cases):
        turn = number % len(case.dtypes)
        yield case if case.thorough else replace(case, dtypes=case.dtypes[turn : turn + 1])


CASES = tuple(_one_dtype(_every()))
