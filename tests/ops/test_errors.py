"""Bad input: the type and the text of every public error, and state that is as it was before.

The text names the operator, the argument, the rule and what came. Every case runs eagerly; shapes and dtypes are
checked on meta tensors, fake tensors and under torch.compile too: the fakes must raise what the implementations raise.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import qkernels.ops as qops
from tests.oracles import assert_bits_equal

pytestmark = pytest.mark.interpreter


def make(device: torch.device | str) -> dict[str, object]:
    """Valid arguments for every operator: x is (2, 64, 3, 3)."""
    return {
        "x": torch.linspace(-3, 3, 2 * 64 * 9, device=device).reshape(2, 64, 3, 3),
        "dy": torch.ones(2, 64, 3, 3, device=device),
        "scale": torch.full((1,), 0.1, device=device),
        "zero_point": torch.full((1,), 3, dtype=torch.int32, device=device),
        "min_val": torch.full((1,), -1.0, device=device),
        "max_val": torch.full((1,), 1.0, device=device),
        "quant_min": -128,
        "quant_max": 127,
    }


ORDER = {
    "aminmax": ("x",),
    "observe_minmax_": ("x", "min_val", "max_val"),
    "choose_qparams": ("min_val", "max_val", "quant_min", "quant_max"),
    "update_qparams_": ("x", "min_val", "max_val", "scale", "zero_point", "quant_min", "quant_max"),
    "fake_quantize": ("x", "scale", "zero_point", "quant_min", "quant_max"),
    "fake_quantize_backward": ("dy", "x", "scale", "zero_point", "quant_min", "quant_max"),
}
STATE = ("min_val", "max_val", "scale", "zero_point", "workspace")

F32 = torch.float32


def full(shape: tuple[int, ...], value: float = 1.0, dtype: torch.dtype = F32) -> Callable[[str], torch.Tensor]:
    return lambda device: torch.full(shape, value, dtype=dtype, device=device)


def on_meta(shape: tuple[int, ...], dtype: torch.dtype = F32) -> Callable[[str], torch.Tensor]:
    return lambda device: torch.empty(shape, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Case:
    """One bad call: what is changed in the valid arguments, and what must be raised."""

    op: str
    error: type[Exception]
    text: str
    change: dict[str, object] = field(default_factory=dict)
    needs_real: bool = False  # the rule is about two devices, or not about tensors: meaningless on meta

    def __str__(self) -> str:
        return f"{self.op}-{re.sub(r'[^A-Za-z0-9]+', '_', self.text)[len(self.op) : len(self.op) + 60]}"

    def arguments(self, device: torch.device | str) -> dict[str, object]:
        values = make(device)
        for key, value in self.change.items():
            values[key] = value(device) if callable(value) else value
        return values

    def call(self, values: dict[str, object]) -> object:
        positional = [values[k] for k in ORDER[self.op]]
        extra = {k: values[k] for k in self.change if k not in ORDER[self.op]}
        return getattr(qops, self.op)(*positional, **extra)


CHANNEL = {"scale": full((64,)), "zero_point": full((64,), 0, torch.int32), "axis": 1}
SHAPE = "(2, 64, 3, 3)"


def qparam_cases(op: str) -> list[Case]:
    """The rules that every operator with scale and zero_point shares."""
    order = "be less than" if "min_val" in ORDER[op] else "not exceed"
    channel = CHANNEL | ({"min_val": full((64,)), "max_val": full((64,))} if "min_val" in ORDER[op] else {})
    return [
        Case(op, ValueError, f"{op}: scale must have shape (C,) = (64,) to match x.shape[1]; got (32,)",
             {**channel, "scale": full((32,))}),
        Case(op, ValueError, f"{op}: zero_point must have shape (C,) = (64,) to match x.shape[1]; got (1,)",
             {**channel, "zero_point": full((1,), 0, torch.int32)}),
        Case(op, ValueError, f"{op}: scale must have shape (C,) = (64,) to match x.shape[1]; got (64, 1)",
             {**channel, "scale": full((64, 1))}),
        Case(op, ValueError, f"{op}: scale must have 1 element when axis is None; got shape (3,)",
             {"scale": full((3,))}),
        Case(op, ValueError, f"{op}: zero_point must have 1 element when axis is None; got shape (0,)",
             {"zero_point": full((0,), 0, torch.int32)}),
        Case(op, TypeError, f"{op}: scale must ", {"scale": full((1,), 1, torch.int32)}),
        Case(op, TypeError, f"{op}: zero_point must be int32, int64 or floating",
             {"zero_point": full((1,), 0, torch.uint8)}),
        Case(op, ValueError, f"{op}: quant_min must {order} quant_max; got 5 and 3", {"quant_min": 5, "quant_max": 3}),
        Case(op, ValueError, f"{op}: scale must be on x's device (cpu); got meta", {"scale": on_meta((1,))}, True),
        Case(op, ValueError, f"{op}: zero_point must be on x's device (cpu); got meta",
             {"zero_point": on_meta((1,), torch.int32)}, True),
    ]  # fmt: skip


def x_cases(op: str) -> list[Case]:
    """The rules about x and axis."""
    rule = "must be float16, bfloat16, float32 or float64; got"
    return [
        Case(op, TypeError, f"{op}: x {rule} torch.int64", {"x": full((2, 64, 3, 3), 1, torch.int64)}),
        Case(op, TypeError, f"{op}: x {rule} torch.bool", {"x": full((2, 64, 3, 3), 1, torch.bool)}),
        Case(op, TypeError, f"{op}: x {rule} torch.complex64", {"x": full((2, 64, 3, 3), 1, torch.complex64)}),
        Case(op, ValueError, f"{op}: axis must be in [-4, 3] for a 4-dimensional x; got 7", {"axis": 7}),
        Case(op, ValueError, f"{op}: axis must be in [-4, 3] for a 4-dimensional x; got -5", {"axis": -5}),
        Case(op, ValueError, f"{op}: axis must be ",
             {"axis": 0, "x": full(()), **({"dy": full(())} if "dy" in ORDER[op] else {})}),
    ]  # fmt: skip


def flag_cases(op: str, name: str = "enabled") -> list[Case]:
    return [
        Case(op, TypeError, f"{op}: {name} must be ", {name: full((1,), 1.0, F32)}),
        Case(op, ValueError, f"{op}: {name} must have 1 element; got shape (2,)", {name: full((2,), 1, torch.uint8)}),
        Case(op, ValueError, f"{op}: {name} must have 1 element; got shape (0,)", {name: full((0,), 1, torch.uint8)}),
        Case(
            op,
            ValueError,
            f"{op}: {name} must be on x's device (cpu); got meta",
            {name: on_meta((1,), torch.uint8)},
            True,
        ),
    ]


def statistics_cases(op: str) -> list[Case]:
    return [
        Case(op, ValueError, f"{op}: min_val must have 1 element when axis is None; got shape (3,)",
             {"min_val": full((3,))}),
        Case(op, ValueError, f"{op}: max_val must have 1 element when axis is None; got shape (3,)",
             {"max_val": full((3,))}),
        Case(op, ValueError, f"{op}: min_val must have shape (C,) = (64,) to match x.shape[1]; got (2,)",
             {**CHANNEL, "min_val": full((2,)), "max_val": full((64,))}),
        Case(op, ValueError, f"{op}: max_val must have shape (C,) = (64,) to match x.shape[1]; got ()",
             {**CHANNEL, "min_val": full((64,)), "max_val": full(())}),
        Case(op, TypeError, f"{op}: min_val must be ", {"min_val": full((1,), 1, torch.int32)}),
        Case(op, TypeError, f"{op}: max_val must be ", {"max_val": full((1,), 1, torch.int32)}),
        Case(op, ValueError, f"{op}: min_val must be on x's device (cpu); got meta", {"min_val": on_meta((1,))}, True),
        Case(op, TypeError, f"{op}: workspace must ", {"workspace": full((1,), 0, torch.int64)}),
        Case(op, ValueError, f"{op}: workspace must ", {"workspace": full((0,), 0, torch.int32)}),
        Case(op, ValueError, f"{op}: workspace must be on x's device (cpu); got meta",
             {"workspace": on_meta((1,), torch.int32)}, True),
    ]  # fmt: skip


def without_scale(case: Case) -> Case:
    """For operators that take no scale and zero point."""
    change = {k: v for k, v in case.change.items() if k not in ("scale", "zero_point")}
    return Case(case.op, case.error, case.text, change, case.needs_real)


CASES = [
    *x_cases("aminmax"),
    Case("aminmax", ValueError, "aminmax: x must not be empty; got shape (0, 3)", {"x": full((0, 3))}),
    Case("aminmax", ValueError, "aminmax: x must not be empty; got shape (0, 3)", {"x": full((0, 3)), "axis": 1}),
    Case("aminmax", ValueError, "aminmax: x must not be empty; got shape (0, 3)", {"x": full((0, 3)), "axis": 0}),
    *x_cases("observe_minmax_"),
    *flag_cases("observe_minmax_"),
    *(without_scale(c) for c in statistics_cases("observe_minmax_")),
    # One code leaves no step to divide the range by, so the qparams operators need two.
    Case("choose_qparams", ValueError, "choose_qparams: quant_min must be less than quant_max; got 5 and 3",
         {"quant_min": 5, "quant_max": 3}),
    Case("choose_qparams", ValueError, "choose_qparams: quant_min must be less than quant_max; got 5 and 5",
         {"quant_min": 5, "quant_max": 5}),
    Case("choose_qparams", ValueError,
         "choose_qparams: min_val and max_val must have one shape, () or (C,); got (1,) and (4,)",
         {"max_val": full((4,))}),
    Case("choose_qparams", TypeError, "choose_qparams: min_val and max_val must have one dtype",
         {"max_val": full((1,), 1, torch.float16)}),
    Case("choose_qparams", TypeError, "choose_qparams: min_val must ", {"min_val": full((1,), 1, torch.int64)}),
    Case("choose_qparams", ValueError, "choose_qparams: max_val must be on ",
         {"max_val": on_meta((1,))}, True),
    Case("choose_qparams", (ValueError, NotImplementedError), "choose_qparams: qscheme ",
         {"qscheme": "per_tensor"}, True),
    *x_cases("update_qparams_"),
    *qparam_cases("update_qparams_"),
    *flag_cases("update_qparams_"),
    *flag_cases("update_qparams_", "qparams_enabled"),
    *statistics_cases("update_qparams_"),
    Case("update_qparams_", ValueError, "update_qparams_: rule must be ", {"rule": "afine"}),
    Case("update_qparams_", ValueError, "update_qparams_: eps must ", {"eps": full((2,))}),
    Case("update_qparams_", ValueError, "update_qparams_: eps must be on x's device (cpu); got meta",
         {"eps": on_meta((1,))}, True),
    Case("update_qparams_", ValueError,
         "update_qparams_: averaging_constant must be given for rule 'fused_affine'; got None",
         {"rule": "fused_affine"}),
    *x_cases("fake_quantize"),
    *qparam_cases("fake_quantize"),
    *flag_cases("fake_quantize"),
    Case("fake_quantize", NotImplementedError, "fake_quantize: ",
         {**CHANNEL, "zero_point": full((64,), 0.5), "quant_min": -(2**31), "quant_max": 2**31 - 1}),
    Case("fake_quantize", NotImplementedError, "fake_quantize: ",
         {**CHANNEL, "zero_point": full((64,), 0.5), "x": full((2, 64, 3, 3), 1, torch.float64)}),
    *x_cases("fake_quantize_backward"),
    *qparam_cases("fake_quantize_backward"),
    *flag_cases("fake_quantize_backward"),
    Case("fake_quantize_backward", ValueError,
         f"fake_quantize_backward: dy must have x's shape {SHAPE}; got (2, 64, 3)", {"dy": full((2, 64, 3))}),
    Case("fake_quantize_backward", ValueError,
         f"fake_quantize_backward: dy must have x's shape {SHAPE}; got (2, 64, 3, 1)", {"dy": full((2, 64, 3, 1))}),
    Case("fake_quantize_backward", TypeError, "fake_quantize_backward: dy must ",
         {"dy": full((2, 64, 3, 3), 1, torch.int64)}),
    Case("fake_quantize_backward", TypeError, "fake_quantize_backward: dy must ",
         {"dy": full((2, 64, 3, 3), 1, torch.float16)}),
    Case("fake_quantize_backward", ValueError, "fake_quantize_backward: dy must be on x's device (cpu); got meta",
         {"dy": on_meta((2, 64, 3, 3))}, True),
]  # fmt: skip


def unique_ids(cases: list[Case]) -> list[str]:
    seen: dict[str, int] = {}
    ids = []
    for case in cases:
        seen[str(case)] = seen.get(str(case), 0) + 1
        ids.append(f"{case}-{seen[str(case)]}")
    return ids


@pytest.mark.parametrize("case", CASES, ids=unique_ids(CASES))
def test_error_text_and_untouched_state(case: Case, device: torch.device) -> None:
    values = case.arguments(device)
    tensors = {k: v for k, v in values.items() if isinstance(v, torch.Tensor) and v.device.type != "meta"}
    before = {k: (v.clone(), v._version) for k, v in tensors.items()}
    with pytest.raises(case.error) as caught:
        case.call(values)
    text = str(caught.value)
    here = str(values["x"].device)  # "cuda:0" where the fixture says "cuda"
    assert text.startswith(case.text.replace("(cpu)", f"({here})")), text
    assert "\n" not in text
    for name, tensor in tensors.items():
        assert_bits_equal(tensor, before[name][0], signed_zero=True, context=f"{name} after the error")
        assert tensor._version == before[name][1], f"{name}: version moved"


ON_FAKES = [c for c in CASES if not c.needs_real]


@pytest.mark.parametrize("case", ON_FAKES, ids=unique_ids(ON_FAKES))
def test_same_error_on_meta_and_fake_tensors(case: Case) -> None:
    """A tracer sees the same rules as an eager call: the fake repeats the checks."""
    with pytest.raises(case.error) as caught:
        case.call(case.arguments("meta"))
    assert str(caught.value).startswith(case.text.replace("(cpu)", "(meta)")), str(caught.value)
    with FakeTensorMode(), pytest.raises(case.error) as caught:
        case.call(case.arguments("cpu"))
    assert str(caught.value).startswith(case.text), str(caught.value)


COMPILED = [
    c
    for c in CASES
    if c.op in ("fake_quantize", "observe_minmax_", "update_qparams_", "aminmax")
    and any(word in c.text for word in ("got (32,)", "got 7", "torch.int64", "quant_min", "be empty", "shape (3,)"))
]


@pytest.mark.parametrize("case", COMPILED, ids=unique_ids(COMPILED))
def test_same_text_under_compile(case: Case, device: torch.device) -> None:
    """Dynamo wraps an error of a fake in its own type; the sentence must survive in it, and the state too."""
    values = case.arguments(device)
    before = {k: values[k].clone() for k in STATE if k in values}
    # dynamic=False: else a second shape would make sizes symbolic, and the text would show their symbols
    run = torch.compile(lambda v: case.call(v), backend="eager", fullgraph=True, dynamic=False)
    with pytest.raises(Exception) as caught:
        run(values)
    assert case.text in str(caught.value)
    for name, tensor in before.items():
        assert_bits_equal(values[name], tensor, context=f"{name} after the error")


@pytest.mark.parametrize("op", sorted(ORDER))
def test_valid_arguments_of_this_file_are_valid(op: str, device: torch.device) -> None:
    """Otherwise every case above could pass for the wrong reason."""
    Case(op, Exception, "").call(make(device))


def test_values_are_not_validated(device: torch.device) -> None:
    """Nothing is checked by reading values: NaN, zero and negative scales, zero points out of range just compute."""
    x = torch.tensor([1.0, -2.0], device=device)
    for scale in (0.0, -0.1, math.nan):
        s = torch.tensor([scale], device=device)
        qops.fake_quantize(x, s, torch.zeros(1, dtype=torch.int32, device=device), -128, 127)
    out_of_range = torch.tensor([300], dtype=torch.int32, device=device)
    y = qops.fake_quantize(x, torch.ones(1, device=device), out_of_range, -128, 127)
    assert y.tolist() == [127.0 - 300, 127.0 - 300]


@pytest.mark.parametrize("value", [1.5, "x", None], ids=str)
def test_non_tensors_are_type_errors(value: object, device: torch.device) -> None:
    with pytest.raises((TypeError, RuntimeError)):
        qops.fake_quantize(value, torch.ones(1), torch.zeros(1, dtype=torch.int32), -128, 127)
    with pytest.raises((TypeError, RuntimeError)):
        qops.aminmax(value)
