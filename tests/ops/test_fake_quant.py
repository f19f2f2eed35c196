"""fake_quantize and its backward, the numbers: bit-equal to torch's CPU operators, and to the contract beyond them.

No tolerance anywhere: one ulp of y or one code is a failure.
"""

from __future__ import annotations

import math

import pytest
import torch

import qkernels.ops as qops
from tests.ops.checks import check_both
from tests.oracles import INTERPRETER, assert_bits_equal, reference_codes, torch_fake_quantize, torch_is_sane
from tests.strategies import KERNEL_DTYPES, QINT32, QPARAMS, QParams, adversarial, dtype_id

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("zero_point_dtype", [torch.int32, torch.int64, torch.float32], ids=dtype_id)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("q", QPARAMS, ids=str)
def test_per_tensor_adversarial(
    q: QParams, dtype: torch.dtype, zero_point_dtype: torch.dtype, device: torch.device
) -> None:
    x = adversarial(q, dtype).to(device)
    scale, zero_point = q.tensors(device, zero_point_dtype)
    check_both(x, scale, zero_point, q.quant_min, q.quant_max, context=f"{q}")


@pytest.mark.parametrize(
    "zero_point_dtype", [torch.int32, torch.float32] + [torch.int64] * (not INTERPRETER), ids=dtype_id
)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("q", QPARAMS, ids=str)
def test_per_channel_adversarial(
    q: QParams, dtype: torch.dtype, zero_point_dtype: torch.dtype, device: torch.device
) -> None:
    """Channels of one quantizer each: the one under test, and its neighbours in scale and zero point."""
    row = adversarial(q, dtype)
    scale = torch.tensor([q.scale, q.scale * 1.5, q.scale * 0.3], device=device)
    middle = (q.quant_min + q.quant_max) // 2
    zero_point = torch.tensor([q.zero_point, q.quant_min, middle], device=device).to(zero_point_dtype)
    x = torch.stack([row, row.flip(0), row.roll(1)]).to(device)
    check_both(x, scale, zero_point, q.quant_min, q.quant_max, 0, context=f"{q} rows")
    if INTERPRETER and dtype != torch.float32:
        return  # a program per block of columns, each with the same arithmetic
    check_both(x.t().contiguous(), scale, zero_point, q.quant_min, q.quant_max, 1, context=f"{q} columns")


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("value", [3.7, -3.7, 0.999, -0.5, 127.9], ids=str)
def test_per_tensor_float_zero_point_is_truncated(value: float, dtype: torch.dtype, device: torch.device) -> None:
    q = QParams(0.0371, math.trunc(value), -128, 127)
    x = adversarial(q, dtype).to(device)
    scale, integer = q.tensors(device)
    fractional = torch.tensor([value], device=device)
    y = check_both(x, scale, fractional, q.quant_min, q.quant_max, context=f"zero point {value}")
    assert_bits_equal(y, qops.fake_quantize(x, scale, integer, q.quant_min, q.quant_max))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("scale", [0.0371, 0.25, 1e-38, 1e30, 3e-5], ids=str)
def test_per_channel_float_zero_point_stays_fractional(scale: float, dtype: torch.dtype, device: torch.device) -> None:
    zero_points = torch.tensor([3.7, -3.7, 0.5, -0.5, 2.5, 1e-20, 1 / 3, 0.0, -0.0, 127.5], device=device)
    x = torch.stack([adversarial(QParams(scale, int(z), -128, 127), dtype) for z in zero_points]).to(device)
    scales = torch.full((len(zero_points),), scale, device=device)
    check_both(x, scales, zero_points, -128, 127, 0, context=f"scale {scale}")
    if not INTERPRETER:
        check_both(x.t(), scales, zero_points, -128, 127, 1, context=f"scale {scale} transposed")


@pytest.mark.skipif(
    INTERPRETER, reason="the interpreter has no fused multiply-add; its stand-in rounds in float64 first"
)
def test_per_channel_float_zero_point_is_a_true_fma(device: torch.device) -> None:
    """x / scale is exactly 2.5 + 2^-23, halfway between 2.5 and the next float32; the sign of 2^-60 decides.

    Rounded once, the sum is above 2.5 (code 3) or 2.5 (a tie, code 2). In float64 2^-60 vanishes and both would be 2.
    """
    scale = torch.tensor([2 / 3, 2 / 3], device=device)
    x = torch.full((2, 1), 6990507 * 2.0**-22, device=device)
    assert (1 / scale).tolist() == [1.5, 1.5] and x[0].double().item() * 1.5 == 2.5 + 2.0**-23
    zero_point = torch.tensor([2.0**-60, -(2.0**-60)], device=device)
    codes, _, _ = reference_codes(x, scale, zero_point, 0)
    assert codes.tolist() == [[3.0], [2.0]]
    check_both(x, scale, zero_point, -128, 127, 0)
    y = qops.fake_quantize(x, scale, zero_point, -128, 127, 0)
    assert y.tolist() == [[2.0], [(2 * scale[0]).item()]]


@pytest.mark.parametrize("axis", [None, 0], ids=str)
@pytest.mark.parametrize("zero_point", [1, 0, -7, 2**30, -(2**31)])
def test_qint32_limits(zero_point: int, axis: int | None, device: torch.device) -> None:
    """Codes beyond 2^24 are not float32 integers any more; torch's arithmetic is still matched."""
    g = torch.Generator().manual_seed(1)
    x = torch.cat([adversarial(QINT32, finite=True), torch.randn(500, generator=g) * 1e8]).view(1, -1).to(device)
    scale, _ = QINT32.tensors(device)
    z = torch.tensor([zero_point], dtype=torch.int32, device=device)
    check_both(x, scale, z, QINT32.quant_min, QINT32.quant_max, axis, context=f"zero point {zero_point}")


@pytest.mark.parametrize("axis", [None, 0], ids=str)
@pytest.mark.parametrize("q", QPARAMS, ids=str)
def test_float64_equals_torch(q: QParams, axis: int | None, device: torch.device) -> None:
    """float64 x goes through torch's arithmetic (double product; float32 dequantization only per tensor)."""
    x = torch.cat([adversarial(q, torch.float64, finite=True), torch.randn(200, dtype=torch.float64) * q.scale * 50])
    x = x.view(1, -1)
    scale, zero_point = q.tensors()
    leaf = x.clone().requires_grad_()
    theirs = torch_fake_quantize(leaf, scale, zero_point, q.quant_min, q.quant_max, axis)
    dy = torch.randn(x.shape, dtype=torch.float64)
    theirs.backward(dy)
    sane = torch_is_sane(x, scale, zero_point, axis)
    args = (scale.to(device), zero_point.to(device), q.quant_min, q.quant_max, axis)
    y = qops.fake_quantize(x.to(device), *args)
    assert_bits_equal(y, theirs, where=sane, context=f"{q}")
    dx = qops.fake_quantize_backward(dy.to(device), x.to(device), *args)
    assert_bits_equal(dx, leaf.grad, where=sane, context=f"{q} dx")


@pytest.mark.parametrize("dtype", (*KERNEL_DTYPES, torch.float64), ids=dtype_id)
@pytest.mark.parametrize("axis", [None, 0], ids=str)
def test_special_values_by_hand(axis: int | None, dtype: torch.dtype, device: torch.device) -> None:
    """Written out: no oracle shared with anything. scale 1/4, zero point 1, codes -8..7."""
    x = torch.tensor(
        [[math.nan, math.inf, -math.inf, 6e4, -6e4, 0.0, -0.0, 0.125, 0.375, -0.125,
          1.5, 1.625, -2.25, -2.375, -2.4375]],
        dtype=dtype,
    )  # fmt: skip
    scale, zero_point = torch.tensor([0.25]), torch.tensor([1], dtype=torch.int32)
    want = [math.nan, 1.5, -2.25, 1.5, -2.25, 0.0, 0.0, 0.0, 0.5, 0.0, 1.5, 1.5, -2.25, -2.25, -2.25]
    kept = [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0]
    # 1.625 / .25 = 6.5 ties to 6, code 7: inside. -2.375 / .25 = -9.5 ties to -10, code -9: outside.
    args = (scale.to(device), zero_point.to(device), -8, 7, axis)
    y = qops.fake_quantize(x.to(device), *args)
    assert_bits_equal(y, torch.tensor([want], dtype=dtype), context="y")
    dy = torch.arange(1.0, 16.0).to(dtype).view(1, -1)
    dx = qops.fake_quantize_backward(dy.to(device), x.to(device), *args)
    assert_bits_equal(dx, dy * torch.tensor([kept]).to(dtype), context="dx")


@pytest.mark.parametrize("axis", [None, 0, 1], ids=str)
def test_finite_quotients_beyond_int64_saturate(axis: int | None, device: torch.device) -> None:
    """torch's per-channel operator wraps these to quant_min; the contract clamps in float."""
    x = torch.tensor([[1e30, -1e30], [3e38, -3e38]], device=device)
    n = 1 if axis is None else 2
    scale = torch.full((n,), 0.5, device=device)
    zero_point = torch.full((n,), -3, dtype=torch.int32, device=device)
    y = qops.fake_quantize(x, scale, zero_point, -128, 127, axis)
    assert y.tolist() == [[65.0, -62.5], [65.0, -62.5]]
    dx = qops.fake_quantize_backward(torch.ones_like(x), x, scale, zero_point, -128, 127, axis)
    assert dx.tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_the_mask_multiplies_as_in_torch(device: torch.device) -> None:
    """dx = dy * m: an infinite or NaN dy shows, where a saturated element would hide it behind a 0."""
    x = torch.tensor([100.0, math.nan, 0.5, 0.5], device=device)
    dy = torch.tensor([math.inf, math.nan, math.inf, math.nan], device=device)
    scale, zero_point = QPARAMS[1].tensors(device)
    dx = qops.fake_quantize_backward(dy, x, scale, zero_point, -128, 127)
    assert_bits_equal(dx, torch.tensor([math.nan, math.nan, math.inf, math.nan]))


def test_infinite_scale_gives_nan_for_finite_x_as_torch(device: torch.device) -> None:
    """An observed infinity makes the scale infinite (torch.ao too): 0 * inf is NaN in both."""
    x = torch.tensor([0.0, 1.0, -3e38])
    scale, zero_point = torch.tensor([math.inf]), torch.tensor([3], dtype=torch.int32)
    want = torch_fake_quantize(x, scale, zero_point, -128, 127)
    y = qops.fake_quantize(x.to(device), scale.to(device), zero_point.to(device), -128, 127)
    assert_bits_equal(y, want)


@pytest.mark.skipif(INTERPRETER, reason="torch is bit-exact here only on the ATen path; kernels may keep -0.0")
@pytest.mark.parametrize("axis", [None, 0], ids=str)
def test_no_negative_zero_comes_out(axis: int | None, device: torch.device) -> None:
    """x that rounds to code zero_point gives +0.0 in torch, whatever the sign of x (integer zero points)."""
    if device.type != "cpu":
        pytest.skip("signed zeros are pinned on the CPU only")
    for q in QPARAMS:
        x = adversarial(q, finite=True).view(1, -1)
        scale, zero_point = q.tensors()
        y = qops.fake_quantize(x, scale, zero_point, q.quant_min, q.quant_max, axis)
        theirs = torch_fake_quantize(x, scale, zero_point, q.quant_min, q.quant_max, axis)
        sane = torch_is_sane(x, scale, zero_point, axis)
        assert_bits_equal(y, theirs, where=sane, signed_zero=True, context=f"{q}")
