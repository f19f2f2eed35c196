"""learnable_fake_quantize and its backward, the numbers: y and dx bit for bit, the sums within their stated bound.

The reference is NumPy written from the contract. With the interpreter the same tests run the Triton kernels.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qkernels.ops as qops
from tests.ops.learnable_checks import check_learnable, gradient_for
from tests.oracles import INTERPRETER, assert_bits_equal, torch_fake_quantize, torch_is_sane
from tests.oracles_learnable import assert_sum_close, learned_code, reference_learnable
from tests.strategies import DETERMINISTIC, KERNEL_DTYPES, QPARAMS, QParams, adversarial, arrays32, dtype_id, qparams

pytestmark = pytest.mark.interpreter

ALL_DTYPES = (*KERNEL_DTYPES, torch.float64)
MASKS = ("rounded", "lsq")
# All quantizers in float32, and with the interpreter every third in the other dtypes.
VALUES = [(q, d) for d in ALL_DTYPES for q in QPARAMS[:: 3 if INTERPRETER and d != torch.float32 else 1]]
BITS = tuple(QParams(0.3, 0, -(2 ** (b - 1)), 2 ** (b - 1) - 1) for b in (2, 4, 8))


# --------------------------------------------------------------------------------------------------------------------
# Values
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad_mask", MASKS)
@pytest.mark.parametrize(("q", "dtype"), VALUES, ids=str)
def test_per_tensor_adversarial(q: QParams, dtype: torch.dtype, grad_mask: str, device: torch.device) -> None:
    """Ties, borders, their float neighbours, subnormal, huge, infinities and NaN, for odd and even zero points."""
    x = adversarial(q, dtype).to(device)
    scale, zero_point = q.tensors(device, torch.float32)
    check_learnable(x, scale, zero_point, q.quant_min, q.quant_max, grad_mask=grad_mask, context=f"{q}")


@pytest.mark.parametrize("grad_mask", MASKS)
@pytest.mark.parametrize(("q", "dtype"), VALUES[:: 2 if INTERPRETER else 1], ids=str)
def test_per_channel_adversarial(q: QParams, dtype: torch.dtype, grad_mask: str, device: torch.device) -> None:
    row = adversarial(q, dtype)
    scale = torch.tensor([q.scale, q.scale * 1.5, q.scale * 0.3], device=device)
    middle = (q.quant_min + q.quant_max) // 2
    zero_point = torch.tensor([q.zero_point, q.quant_min, middle], device=device).float()
    x = torch.stack([row, row.flip(0), row.roll(1)]).to(device)
    limits = (q.quant_min, q.quant_max)
    check_learnable(x, scale, zero_point, *limits, axis=0, grad_mask=grad_mask, context=f"{q}")
    check_learnable(x.t().contiguous(), scale, zero_point, *limits, axis=1, grad_mask=grad_mask, context=f"{q}")


@pytest.mark.parametrize("q", QPARAMS, ids=str)
@pytest.mark.parametrize("finite_part", [False, True], ids=["all", "finite"])
def test_nothing_saturates(q: QParams, finite_part: bool, device: torch.device) -> None:
    """Only values inside the range: their terms are not drowned in the bound by those of saturated values."""
    x = adversarial(q, finite=finite_part)
    scale, zero_point = q.tensors(device, torch.float32)
    want = reference_learnable(x, x, scale.cpu(), zero_point.cpu(), q.quant_min, q.quant_max)
    inside = x[torch.from_numpy(want.inside)].to(device)
    kept = check_learnable(inside, scale, zero_point, q.quant_min, q.quant_max, context=f"{q}")
    assert kept.dzero_point == 0


@pytest.mark.parametrize("grad_mask", MASKS)
@pytest.mark.parametrize("q", BITS, ids=str)
def test_few_bits(q: QParams, grad_mask: str, device: torch.device) -> None:
    """The two masks differ within half a step of the bounds: at 2 to 4 bits that is a large part of the range."""
    x = torch.linspace(q.quant_min - 1.5, q.quant_max + 1.5, 997, device=device) * q.scale
    scale, zero_point = q.tensors(device, torch.float32)
    want = check_learnable(x, scale, zero_point, q.quant_min, q.quant_max, 0.25, grad_mask=grad_mask)
    other = reference_learnable(
        x, x, scale, zero_point, q.quant_min, q.quant_max, grad_mask=MASKS[grad_mask == "rounded"]
    )
    differ = want.inside != other.inside
    assert differ.any()
    edge = torch.from_numpy(want.codes[differ])
    assert bool(((edge == q.quant_min) | (edge == q.quant_max)).all())


def test_borders_by_hand(device: torch.device) -> None:
    """Written out, no oracle: scale 1/2, codes -2..1, so 0.75 is the tie between codes 1 and 2."""
    x = torch.tensor([-2.0, -1.25, -1.0, -0.75, 0.0, 0.25, 0.5, 0.6, 0.75, 9.0], device=device)
    scale, zero_point = torch.tensor([0.5], device=device), torch.zeros(1, device=device)
    dy = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0], device=device)
    for grad_mask, kept, dscale, saturated in (
        # -1.25 / .5 = -2.5 ties to -2: inside. .75 / .5 = 1.5 ties to 2: outside
        ("rounded", [0, 1, 1, 1, 1, 1, 1, 1, 0, 0],
         1 * -2 + 2 * 0.5 + 8 * -0.5 + 32 * -0.5 + 128 * -0.2 + 256 + 512, 1 + 256 + 512),
        # strictly between -2 and 1 before rounding
        ("lsq", [0, 0, 0, 1, 1, 1, 0, 0, 0, 0],
         (1 + 2 + 4) * -2 + 8 * -0.5 + 32 * -0.5 + 64 + 128 + 256 + 512, 1 + 2 + 4 + 64 + 128 + 256 + 512),
    ):  # fmt: skip
        dx, ds, dz = qops.learnable_fake_quantize_backward(dy, x, scale, zero_point, -2, 1, 2.0, grad_mask=grad_mask)
        assert_bits_equal(dx, dy.cpu() * torch.tensor(kept), context=grad_mask)
        assert ds.item() == pytest.approx(2 * dscale, rel=1e-6), grad_mask
        assert dz.item() == -0.5 * 2 * saturated, grad_mask
    y = qops.learnable_fake_quantize(x, scale, zero_point, -2, 1)
    assert y.tolist() == [-1.0, -1.0, -1.0, -1.0, 0.0, 0.0, 0.5, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("axis", [None, 0, 1], ids=str)
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=dtype_id)
def test_special_values_by_hand(dtype: torch.dtype, axis: int | None, device: torch.device) -> None:
    """NaN passes and adds nothing, not even a NaN dy there; infinities saturate with the saturated gradients."""
    x = torch.tensor([[math.nan, math.inf, -math.inf, 6e4, -6e4]], dtype=dtype, device=device)
    x = x.t().contiguous() if axis == 1 else x
    dy = torch.tensor([math.nan, 2.0, 3.0, 5.0, 7.0], dtype=dtype, device=device).view(x.shape)
    scale, zero_point = torch.tensor([0.25], device=device), torch.tensor([1.0], device=device)
    y = qops.learnable_fake_quantize(x, scale, zero_point, -8, 7, axis=axis)
    assert_bits_equal(y.flatten(), torch.tensor([math.nan, 1.5, -2.25, 1.5, -2.25], dtype=dtype))
    for grad_mask in MASKS:
        dx, ds, dz = qops.learnable_fake_quantize_backward(
            dy, x, scale, zero_point, -8, 7, axis=axis, grad_mask=grad_mask
        )
        assert_bits_equal(dx.flatten(), torch.tensor([math.nan, 0, 0, 0, 0], dtype=dtype), context="0 * NaN is NaN")
        assert ds.item() == 6 * (2 + 5) - 9 * (3 + 7) and dz.item() == -0.25 * (2 + 3 + 5 + 7)


@pytest.mark.parametrize("grad_mask", MASKS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("at", [0.3, 0.0, 1e3, -1e3, math.inf], ids=str)
def test_a_gradient_that_is_not_finite_shows(at: float, bad: float, grad_mask: str, device: torch.device) -> None:
    """In its own channel and nowhere else; where y = x it is inf * 0, where x saturates dx is 0 * inf."""
    x = torch.linspace(-1, 1, 12, device=device).view(3, 4).clone()
    dy = gradient_for(x)
    x[1, 2], dy[1, 2] = at, bad
    scale, zero_point = torch.tensor([0.1, 0.2, 0.3], device=device), torch.tensor([0.0, 1.0, -1.0], device=device)
    want = check_learnable(x, scale, zero_point, -8, 7, axis=0, dy=dy, grad_mask=grad_mask)
    assert not math.isfinite(want.dscale[1]) and math.isfinite(want.dscale[0] + want.dscale[2])
    check_learnable(x, scale[1:2], zero_point[1:2], -8, 7, dy=dy, grad_mask=grad_mask)


# --------------------------------------------------------------------------------------------------------------------
# Scale, zero point, factor
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [None, 0], ids=str)
@pytest.mark.parametrize("scale_dtype", KERNEL_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("zero_point_dtype", [*KERNEL_DTYPES, torch.int32, torch.int64], ids=dtype_id)
def test_qparam_dtypes(
    zero_point_dtype: torch.dtype, scale_dtype: torch.dtype, axis: int | None, device: torch.device
) -> None:
    """Gradients have the parameter's dtype; an integer zero point still gets its sum, in float32."""
    for dtype in ALL_DTYPES if not INTERPRETER else (torch.float32, torch.bfloat16):
        x = adversarial(QPARAMS[0], dtype, finite=True).clamp(-9, 9).view(1, -1).to(device)
        scale = torch.tensor([0.0371], device=device).to(scale_dtype)
        zero_point = torch.tensor([3], device=device).to(zero_point_dtype)
        check_learnable(x, scale, zero_point, -128, 127, 0.01, axis=axis, context=f"{dtype}")


@pytest.mark.parametrize("value", [0.5, 1.5, -0.5, -1.5, -43.0, 2.4999, 300.0, -300.0, 6.5, 7.4, -8.5], ids=str)
def test_zero_point_is_rounded_half_to_even_and_clamped(value: float, device: torch.device) -> None:
    """One zero point in both directions, where torch's per-tensor backward takes another one for negative values."""
    x = adversarial(QParams(0.25, round(max(min(value, 7), -8)), -8, 7), finite=True).to(device)
    scale, zero_point = torch.tensor([0.25], device=device), torch.tensor([value], device=device)
    integer = torch.from_numpy(learned_code(zero_point, -8, 7)).to(torch.int32).to(device)
    assert integer.item() == max(min(round(value), 7), -8)
    for grad_mask in MASKS:
        check_learnable(x, scale, zero_point, -8, 7, grad_mask=grad_mask, context=f"zero point {value}")
    for axis in (None, 0):
        view = x.view(1, -1)
        y = qops.learnable_fake_quantize(view, scale, zero_point, -8, 7, axis=axis)
        theirs = torch_fake_quantize(view.cpu(), scale.cpu(), integer.cpu(), -8, 7, axis)
        assert_bits_equal(y, theirs, where=torch_is_sane(view, scale, integer, axis), context="against torch")


@pytest.mark.parametrize("q", QPARAMS, ids=str)
@pytest.mark.parametrize("axis", [None, 0], ids=str)
def test_float64_y_equals_torchs(axis: int | None, q: QParams, device: torch.device) -> None:
    x = adversarial(q, torch.float64, finite=True).view(1, -1)
    scale, zero_point = q.tensors()
    arguments = (scale.to(device), zero_point.to(device), q.quant_min, q.quant_max)
    y = qops.learnable_fake_quantize(x.to(device), *arguments, axis=axis)
    theirs = torch_fake_quantize(x, scale, zero_point, q.quant_min, q.quant_max, axis)
    assert_bits_equal(y, theirs, where=torch_is_sane(x, scale, zero_point, axis), context=f"{q}")


@pytest.mark.parametrize("factor", [0.0, 1.0, -2.5, 1e-3, 1 / math.sqrt(3 * 127), 1e20], ids=str)
def test_grad_factor_scales_the_sums_and_not_dx(factor: float, device: torch.device) -> None:
    x = torch.randn(4, 50, device=device) * 3
    scale, zero_point = torch.full((4,), 0.04, device=device), torch.full((4,), 2.0, device=device)
    for axis in (None, 0):
        n = 1 if axis is None else 4
        check_learnable(x, scale[:n], zero_point[:n], -32, 31, factor, axis=axis)


# --------------------------------------------------------------------------------------------------------------------
# Long sums, properties
# --------------------------------------------------------------------------------------------------------------------


def long_shapes(device: torch.device) -> list[tuple[tuple[int, ...], int | None]]:
    """Shapes and axes with 4 channels: per tensor, channel innermost, outermost, in the middle."""
    n = 1 << (26 if device.type == "cuda" else 12 if INTERPRETER else 20)
    return [((n,), None), ((n // 4, 4), 1), ((4, n // 4), 0), ((64, 4, n // 256), 1)]


def check_equal_terms(x: torch.Tensor, axis: int | None) -> None:
    """All x equal, all dy equal: the exact sum is known without adding."""
    n = 1 if axis is None else x.shape[axis]
    dy = torch.full(x.shape, 0.1, device=x.device)
    scale, zero_point = torch.full((n,), 0.1, device=x.device), torch.zeros(n, device=x.device)
    _, ds, dz = qops.learnable_fake_quantize_backward(dy, x, scale, zero_point, -8, 7, axis=axis)
    value, dy64, s64 = x.flatten()[0].item(), dy.flatten()[0].item(), scale[0].item()
    slope = 7.0 if value > 1 else -value / s64
    for gradient, term in ((ds, dy64 * slope), (dz, -s64 * dy64 if value > 1 else 0.0)):
        total = np.full(n, x.numel() // n * term)
        assert_sum_close(gradient, total, abs(total), f"{tuple(x.shape)} axis {axis}")


@pytest.mark.parametrize("value", [0.0333, 1e3], ids=["inside", "saturated"])
@pytest.mark.parametrize("which", range(4))
def test_long_sums_of_one_sign(which: int, value: float, device: torch.device) -> None:
    """2^20 equal terms: one float32 accumulator would be off by far more than the bound allows."""
    shape, axis = long_shapes(device)[which]
    check_equal_terms(torch.full(shape, value, device=device), axis)


@pytest.mark.interpreter_only
@pytest.mark.parametrize(("axis", "value"), [(None, 1e3), (0, 1e3), (1, 0.0333)])
def test_kernels_keep_the_rounding_errors(
    axis: int | None, value: float, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One program of few lanes adds it all, so a chain is as long as on a GPU with many million elements."""
    from qkernels import lsq

    def flat(n: int, device: torch.device) -> object:
        return replace(FLAT(n, device), block=16, programs=1)

    def tiled(*arguments: object) -> object:
        config = TILED(*arguments)
        return replace(config, parts=1, block_rows=1, block_lanes=config.block_lanes if axis else 16)

    FLAT, TILED = lsq.flat_accumulation, lsq.tiled_accumulation
    monkeypatch.setattr(lsq, "flat_accumulation", flat)
    monkeypatch.setattr(lsq, "tiled_accumulation", tiled)
    shape = (400, 8) if axis == 1 else (1, 4096)
    check_equal_terms(torch.full(shape, value, device=device), axis)


@DETERMINISTIC
@given(q=qparams(), x=arrays32(finite=False), grad_mask=st.sampled_from(MASKS))
def test_property_contract_on_random_quantizers(
    q: QParams, x: torch.Tensor, grad_mask: str, device: torch.device
) -> None:
    scale, zero_point = q.tensors(device, torch.float32)
    x = x.to(device)
    check_learnable(x, scale, zero_point, q.quant_min, q.quant_max, grad_mask=grad_mask, context=f"{q}")
    check_learnable(
        x.view(1, -1), scale, zero_point, q.quant_min, q.quant_max, axis=0, grad_mask=grad_mask, context=f"{q}"
    )
