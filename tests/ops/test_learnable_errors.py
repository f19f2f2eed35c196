"""Bad input to learnable_fake_quantize: the type and the text of every error, with every argument as it was.

Rules shared with fake_quantize are its cases under the other name; the checks are those of test_errors.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import qkernels.ops as qops
from tests.ops import test_errors as errors
from tests.ops.test_errors import CHANNEL, F32, ORDER, Case, flag_cases, full, on_meta, unique_ids

OPERATORS = ("learnable_fake_quantize", "learnable_fake_quantize_backward")
SHARED = ("fake_quantize", "fake_quantize_backward")


@dataclass(frozen=True)
class LearnableCase(Case):
    """A case whose operator takes the arguments of fake_quantize, and more by name."""

    def call(self, values: dict[str, object]) -> object:
        order = ORDER[self.op.removeprefix("learnable_")]
        extra = {k: values[k] for k in self.change if k not in order}
        return getattr(qops, self.op)(*(values[k] for k in order), **extra)


def shared_cases() -> list[LearnableCase]:
    """Those of fake_quantize, but for the restriction on fractional zero points, which a learned one does not have."""
    return [
        LearnableCase(f"learnable_{c.op}", c.error, f"learnable_{c.text}", c.change, c.needs_real)
        for c in errors.CASES
        if c.op in SHARED and c.error is not NotImplementedError
    ]


def own_cases(op: str) -> list[LearnableCase]:
    unsupported = f"{op}: scale must be float16, bfloat16 or float32 and the quantization bounds within +-2**23; got "
    mask = f"{op}: grad_mask must be 'rounded' or 'lsq'; got "
    return [
        *(LearnableCase(c.op, c.error, c.text, c.change, c.needs_real) for c in flag_cases(op, "learning")),
        LearnableCase(op, ValueError, f"{mask}'esser'", {"grad_mask": "esser"}),
        LearnableCase(op, ValueError, f"{mask}''", {"grad_mask": ""}),
        LearnableCase(op, NotImplementedError, f"{unsupported}torch.float64, -128 and 127",
                      {"scale": full((1,), 1, torch.float64)}),
        LearnableCase(op, NotImplementedError, f"{unsupported}torch.float32, {-(2**31)} and {2**31 - 1}",
                      {"quant_min": -(2**31), "quant_max": 2**31 - 1}),
        LearnableCase(op, NotImplementedError, f"{unsupported}torch.float32, -128 and {2**23 + 1}",
                      {"quant_max": 2**23 + 1}),
        LearnableCase(op, TypeError, f"{op}: zero_point must be int32, int64 or floating-point other than float64; got",
                      {"zero_point": full((1,), 0, torch.float64)}),
        LearnableCase(op, ValueError, f"{op}: zero_point must have shape (C,) = (64,) to match x.shape[1]; got (32,)",
                      {**CHANNEL, "zero_point": full((32,), 0, F32)}),
        LearnableCase(op, ValueError, f"{op}: axis must be in [-4, 3] for a 4-dimensional x; got 4", {"axis": 4}),
        LearnableCase(op, ValueError, f"{op}: learning must be on x's device (cpu); got meta",
                      {"grad_mask": "lsq", "learning": on_meta((1,), torch.int32)}, True),
    ]  # fmt: skip


CASES = [*shared_cases(), *(c for op in OPERATORS for c in own_cases(op))]
ON_FAKES = [c for c in CASES if not c.needs_real]


def test_nothing_is_missing() -> None:
    """Both operators, and every rule that the shared cases should bring along."""
    for op in OPERATORS:
        texts = " ".join(c.text for c in CASES if c.op == op)
        for word in (": x must", "axis must", "scale must", "zero_point must", "quant_min", "enabled", "learning"):
            assert word in texts, f"{op}: {word}"
    assert sum(": dy must" in c.text for c in CASES) >= 4


@pytest.mark.interpreter
@pytest.mark.parametrize("case", CASES, ids=unique_ids(CASES))
def test_error_text_and_untouched_arguments(case: Case, device: torch.device) -> None:
    errors.test_error_text_and_untouched_state(case, device)


@pytest.mark.parametrize("case", ON_FAKES, ids=unique_ids(ON_FAKES))
def test_same_error_on_meta_and_fake_tensors(case: Case) -> None:
    errors.test_same_error_on_meta_and_fake_tensors(case)


COMPILED = [
    c
    for c in ON_FAKES
    if any(word in c.text for word in ("got (32,)", "got 7", "torch.int64", "'esser'", "shape (3,)", "float64, -128"))
]


@pytest.mark.parametrize("case", COMPILED, ids=unique_ids(COMPILED))
def test_same_text_under_compile(case: Case, device: torch.device) -> None:
    errors.test_same_text_under_compile(case, device)


@pytest.mark.parametrize("op", OPERATORS)
def test_valid_arguments_are_valid(op: str, device: torch.device) -> None:
    """Otherwise every case above could pass for the wrong reason; the widest bounds are valid too."""
    for change in ({}, {"grad_mask": "lsq"}, {"quant_min": -(2**23), "quant_max": 2**23}, {"scale": full((1, 1))}):
        case = LearnableCase(op, Exception, "", change)
        case.call(case.arguments(device))


def test_a_parameter_keeps_its_gradient_after_an_error(device: torch.device) -> None:
    scale = torch.nn.Parameter(torch.full((3,), 0.1, device=device))
    scale.grad = torch.ones(3, device=device)
    x = torch.randn(2, 4, device=device, requires_grad=True)
    with pytest.raises(ValueError, match="scale must have shape"):
        qops.learnable_fake_quantize(x, scale, torch.zeros(4, device=device), -8, 7, axis=1)
    assert scale.grad.tolist() == [1.0, 1.0, 1.0] and scale.tolist() == pytest.approx([0.1] * 3) and x.grad is None
