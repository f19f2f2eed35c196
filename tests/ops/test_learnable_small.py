"""Small CPU tensors, eager: torch's learnable operator serves where it is right, and only there."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import qkernels.ops as qops
from qkernels.ops.small_cpu import SMALL, learnable_fake_quantize_by_torch
from tests.ops.learnable_checks import gradient_for
from tests.oracles import INTERPRETER
from tests.oracles_learnable import assert_learnable, reference_learnable

pytestmark = pytest.mark.skipif(INTERPRETER, reason="with the interpreter the kernels serve, whatever the size")

X = torch.linspace(-3, 3, 60).reshape(3, 4, 5)
SCALE, ZERO = torch.tensor([0.1]), torch.tensor([0.0])
SCALES, ZEROS = torch.tensor([0.1, 0.2, 0.05]), torch.zeros(3)
ONE, EDGES = torch.tensor([1.0]), torch.tensor([127.0, -129.0, 128.0, -128.0, 0.0])
TIES = (torch.arange(-8, 8) + 0.5) * 0.25
SUBNORMAL = torch.tensor([1e-39])


def flag(value: int) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.uint8)


def by_torch(*arguments: Any, **options: Any) -> torch.Tensor | None:
    names = {"grad_factor": 1.0, "axis": None, "enabled": None, "grad_mask": "rounded", "learning": None,
             "grad_elements": None}  # fmt: skip
    return learnable_fake_quantize_by_torch(*arguments, *{**names, **options}.values())


def with_value(value: float) -> torch.Tensor:
    x = X.clone()
    x[1, 1, 1] = value
    return x


SERVED = {
    "zero point 0": ((X, SCALE, ZERO, -8, 7), {}),
    "positive": ((X, SCALE, torch.tensor([3.0]), 0, 15), {}),
    "fractional": ((X, SCALE, torch.tensor([3.4]), 0, 15), {}),
    "beyond the range": ((X, SCALE, torch.tensor([99.0]), 0, 15), {}),
    "negative": ((X, SCALE, torch.tensor([-2.0]), -8, 7), {}),
    "just below 0": ((X, SCALE, torch.tensor([-0.3]), -8, 7), {}),
    "a tie": ((X, SCALE, torch.tensor([2.5]), 0, 15), {}),
    # Code 0, where torch's backward adds 0.5 and truncates. x saturates just above and just below.
    "half a code": ((EDGES, ONE, torch.tensor([0.5]), -128, 127), {}),
    "almost half": ((EDGES, ONE, torch.tensor([0.49999997]), -128, 127), {}),
    "minus half": ((EDGES, ONE, torch.tensor([-0.5]), -128, 127), {}),
    "a quarter": ((EDGES, ONE, torch.tensor([0.25]), -128, 127), {}),
    "tiny": ((EDGES, ONE, torch.tensor([-1e-9]), -128, 127), {}),
    "range above 0": ((X, SCALE, torch.tensor([3.0]), 1, 15), {}),
    "per channel": ((X, SCALES, ZEROS, -8, 7), {"axis": 0}),
    "flags": ((X, SCALE, ZERO, -8, 7), {"enabled": flag(1), "learning": flag(1)}),
    "grad_elements": ((X, SCALES, ZEROS, -8, 7), {"axis": 0, "grad_elements": "channel"}),
    "grad_factor": ((X, SCALE, ZERO, -8, 7), {"grad_factor": 0.37}),
    "ties, odd zero point": ((TIES, torch.tensor([0.25]), torch.tensor([3.0]), 0, 7), {}),
    "minus infinity": ((with_value(-math.inf), SCALE, ZERO, -8, 7), {}),
    "far below int64": ((with_value(-3e38), SCALE, torch.tensor([-2.0]), -8, 7), {}),
    "largest": ((torch.linspace(-3, 3, SMALL), SCALE, ZERO, -8, 7), {}),
}

NOT_SERVED = {
    "a NaN": ((with_value(math.nan), SCALE, ZERO, -8, 7), {}),
    "an infinity": ((with_value(math.inf), SCALE, ZERO, -8, 7), {}),
    "minus infinity in a channel": ((with_value(-math.inf), SCALES, ZEROS, -8, 7), {"axis": 0}),
    "a code beyond int64": ((with_value(3e38), SCALE, ZERO, -8, 7), {}),
    "NaN zero point": ((X, SCALE, torch.tensor([math.nan]), 0, 15), {}),
    "infinite zero point": ((X, SCALE, torch.tensor([math.inf]), 0, 15), {}),
    "subnormal scale": ((X, SUBNORMAL, ZERO, -8, 7), {}),
    "negative scale": ((X, -SCALE, ZERO, -8, 7), {}),
    "infinite scale": ((with_value(-math.inf), SCALE * math.inf, torch.tensor([7.0]), 0, 15), {}),
    "NaN scale": ((X, SCALE * math.nan, ZERO, -8, 7), {}),
    "one NaN scale": ((X, SCALES * torch.tensor([1, math.nan, 1]), ZEROS, -8, 7), {"axis": 0}),
    "per channel, range above 0": ((X, SCALES, ZEROS, 1, 15), {"axis": 0}),
    "per channel, one dimension": ((torch.randn(3), SCALES, ZEROS, -8, 7), {"axis": 0}),
    "one zero point": ((X, SCALES, torch.tensor([0.0, 1.0, 0.0]), -8, 7), {"axis": 0}),
    "bfloat16": ((X.bfloat16(), SCALE, ZERO, -8, 7), {}),
    "float64": ((X.double(), SCALE, ZERO, -8, 7), {}),
    "half scale": ((X, SCALE.half(), ZERO, -8, 7), {}),
    "integer zero point": ((X, SCALE, ZERO.int(), -8, 7), {}),
    "empty": ((X[:0], SCALE, ZERO, -8, 7), {}),
    "strict mask": ((X, SCALE, ZERO, -8, 7), {"grad_mask": "lsq"}),
    "not learning": ((X, SCALE, ZERO, -8, 7), {"learning": flag(0)}),
    "off": ((X, SCALE, ZERO, -8, 7), {"enabled": flag(0)}),
    "transposed": ((X.transpose(0, 2), SCALE, ZERO, -8, 7), {}),
    "negative axis": ((X, SCALES, ZEROS, -8, 7), {"axis": -3}),
    "0-dimensional scale": ((X, SCALE[0], ZERO[0], -8, 7), {}),
    "larger": ((torch.linspace(-3, 3, SMALL + 1), SCALE, ZERO, -8, 7), {}),
}


@pytest.mark.parametrize("name", SERVED)
def test_torch_serves(name: str) -> None:
    arguments, options = SERVED[name]
    assert by_torch(*arguments, **options) is not None


@pytest.mark.parametrize("name", NOT_SERVED)
def test_torch_does_not_serve(name: str) -> None:
    arguments, options = NOT_SERVED[name]
    assert by_torch(*arguments, **options) is None


@pytest.mark.parametrize("name", [*SERVED, *NOT_SERVED])
def test_autograd_gives_the_contract_on_either_side(name: str) -> None:
    """y, dx, dscale and dzero_point through autograd, whoever serves."""
    arguments, options = {**SERVED, **NOT_SERVED}[name]
    x, scale, zero_point = (t.clone().requires_grad_(t.is_floating_point()) for t in arguments[:3])
    dy = gradient_for(x)
    y = qops.learnable_fake_quantize(x, scale, zero_point, *arguments[3:], **options)
    y.backward(dy)
    given = dict(options)
    if given.pop("grad_elements", None):
        given["grad_factor"] = (x.numel() / x.shape[0] * arguments[4]) ** -0.5
    want = reference_learnable(dy, *arguments, **given)
    dzero_point = zero_point.grad
    if dzero_point is None:  # integers
        dzero_point, want = torch.zeros(1), replace(want, dzero_point=np.zeros(1), dzero_point_terms=np.zeros(1))
    assert_learnable(y.detach(), (x.grad, scale.grad, dzero_point), want, (scale, dzero_point), name)


def test_the_operators_refuse_what_is_not_served() -> None:
    """Wrong arguments get our error, not torch's."""
    with pytest.raises(ValueError, match="learnable_fake_quantize: scale must have 1 element"):
        qops.learnable_fake_quantize(X, SCALES, ZEROS, -8, 7)
    with pytest.raises(ValueError, match="learnable_fake_quantize: quant_min must not exceed quant_max"):
        qops.learnable_fake_quantize(X, SCALE, ZERO, 8, 7)
    with pytest.raises(ValueError, match="learnable_fake_quantize: enabled must have 1 element"):
        qops.learnable_fake_quantize(X, SCALE, ZERO, -8, 7, enabled=torch.ones(2, dtype=torch.uint8))


def test_a_second_differentiation_raises() -> None:
    leaves = [t.clone().requires_grad_() for t in (X, SCALE, ZERO)]
    y = qops.learnable_fake_quantize(*leaves, -8, 7)
    gradients = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=r"derivative for .*learnable.* is not implemented"):
        gradients[1].sum().backward()
