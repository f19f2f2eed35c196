"""choose_qparams: bit-equal to the calculate_qparams of torch.ao's live observers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qkernels.ops as qops
from tests.oracles import (
    INTERPRETER,
    PER_CHANNEL_SCHEMES,
    assert_bits_equal,
    torchao_qparams,
)
from tests.strategies import DETERMINISTIC, dtype_id, float32s

pytestmark = pytest.mark.interpreter

EPS = float(torch.finfo(torch.float32).eps)

# (min, max) pairs; every one is a channel of the per-channel tests too.
PAIRS = (
    (-1.0, 1.0),
    (0.0, 0.0),
    (-0.0, 0.0),
    (0.25, 3.0),  # one-sided: the range is widened to zero
    (-3.0, -0.25),
    (-1e-3, 4.7),
    (-127.3, 1e-9),
    (-0.1, 0.30000001),
    (-1e-12, 1e-12),  # narrower than eps
    (1e-45, 1e-44),
    (-1e-40, 3e-39),
    (-6e4, 6.5e4),
    (-1e30, 1e30),
    (0.0, 3.4e38),
    (-3.4e38, 0.0),
    (-1.7014118e38, 1.7014117e38),
    (-2.5, 252.5),  # zero point on a tie: rint(2.5) for 255 steps of 1
    (-3.5, 251.5),
    (-0.5, 254.5),
    (5.0, 5.0),
    (-7.0, -7.0),
    (-128.0, 127.0),
    (-0.7499999, 0.2500001),
)
# torch.ao rejects the difference of these (it overflows to an infinite scale), but gives no error: same here.
OVERFLOWING = ((-3.4e38, 3.4e38), (-1.0, math.inf))

SCHEMES = (
    torch.per_tensor_affine,
    torch.per_tensor_symmetric,
    torch.per_channel_affine,
    torch.per_channel_symmetric,
    torch.per_channel_affine_float_qparams,
)
# (dtype, quant_min, quant_max, customized): `customized` is whether torch.ao is told the range or derives it.
RANGES = (
    (torch.quint8, 0, 255, False),
    (torch.quint8, 0, 127, "reduced"),
    (torch.quint8, 0, 15, True),
    (torch.quint8, 0, 200, True),
    (torch.qint8, -128, 127, False),
    (torch.qint8, -127, 127, True),
    (torch.qint8, -64, 63, "reduced"),
    (torch.qint8, -8, 7, True),
    (torch.int8, -128, 127, False),
    (torch.uint8, 0, 255, False),
    (torch.uint8, 0, 3, True),
    (torch.int16, -32768, 32767, False),
    (torch.uint16, 0, 65535, False),
)


def scheme_id(value: object) -> str:
    return str(value).removeprefix("torch.")


def statistics(
    qscheme: torch.qscheme, pairs: tuple[tuple[float, float], ...]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per channel: all pairs as channels. Per tensor: each pair as a 0-dim and as a 1-element tensor."""
    if qscheme in PER_CHANNEL_SCHEMES:
        low, high = zip(*pairs, strict=True)
        return [(torch.tensor(low), torch.tensor(high))]
    return [(torch.tensor(low), torch.tensor(high)) for low, high in pairs]


def zero_point_dtype(qscheme: torch.qscheme) -> torch.dtype:
    if qscheme == torch.per_channel_affine_float_qparams:
        return torch.float32
    symmetric = qscheme in (torch.per_tensor_symmetric, torch.per_channel_symmetric)
    return torch.int64 if symmetric else torch.int32


@pytest.mark.parametrize("eps", [EPS, 1e-3] if INTERPRETER else [EPS, 2.0**-12, 1e-3], ids=str)
@pytest.mark.parametrize("qscheme", SCHEMES, ids=scheme_id)
@pytest.mark.parametrize("case", RANGES, ids=lambda c: f"{dtype_id(c[0])}_{c[1]}..{c[2]}")
def test_choose_qparams_equals_the_observers(
    case: tuple[torch.dtype, int, int, bool | str], qscheme: torch.qscheme, eps: float, device: torch.device
) -> None:
    dtype, quant_min, quant_max, customized = case
    symmetric = qscheme in (torch.per_tensor_symmetric, torch.per_channel_symmetric)
    reduced = customized == "reduced"
    if reduced and symmetric and dtype == torch.quint8:
        # torch.ao refuses reduce_range here; the operator, told 0..127, takes the default range's zero point.
        reduced, customized = False, True
    ao_range = (quant_min, quant_max) if customized is True else (None, None)
    for low, high in statistics(qscheme, PAIRS):
        want_scale, want_zero_point = torchao_qparams(low, high, *ao_range, dtype, qscheme, eps, reduced)
        if customized is True and dtype == torch.quint8 and symmetric and (quant_min, quant_max) == (0, 127):
            want_zero_point = torch.full_like(want_zero_point, 128)
        scale, zero_point = qops.choose_qparams(
            low.to(device), high.to(device), quant_min, quant_max, dtype=dtype, qscheme=qscheme, eps=eps
        )
        context = f"min {low.tolist()} max {high.tolist()}"
        assert_bits_equal(scale, want_scale, context=f"scale {context}")
        assert_bits_equal(zero_point, want_zero_point, context=f"zero_point {context}")
        assert zero_point.dtype == zero_point_dtype(qscheme)


@pytest.mark.parametrize("qscheme", [torch.per_tensor_symmetric, torch.per_channel_symmetric], ids=scheme_id)
def test_choose_qparams_qint32_symmetric(qscheme: torch.qscheme, device: torch.device) -> None:
    for low, high in statistics(qscheme, PAIRS):
        limits = (-(2**31), 2**31 - 1)
        want = torchao_qparams(low, high, None, None, torch.qint32, qscheme)
        got = qops.choose_qparams(low.to(device), high.to(device), *limits, dtype=torch.qint32, qscheme=qscheme)
        for name, a, b in zip(("scale", "zero_point"), got, want, strict=True):
            assert_bits_equal(a, b, context=f"{name} {low} {high}")


@pytest.mark.parametrize("qscheme", SCHEMES[:4], ids=scheme_id)
def test_choose_qparams_overflowing_range(qscheme: torch.qscheme, device: torch.device) -> None:
    for low, high in statistics(qscheme, OVERFLOWING):
        want = torchao_qparams(low, high, None, None, torch.quint8, qscheme)
        got = qops.choose_qparams(low.to(device), high.to(device), 0, 255, dtype=torch.quint8, qscheme=qscheme)
        for name, a, b in zip(("scale", "zero_point"), got, want, strict=True):
            assert_bits_equal(a, b, context=f"{name} {low} {high}")


@pytest.mark.parametrize("qscheme", SCHEMES[:4], ids=scheme_id)
def test_choose_qparams_nan_statistics_give_nan_scale(qscheme: torch.qscheme, device: torch.device) -> None:
    """As torch.ao 2.13. The zero point of a NaN range is an unspecified conversion there; only its dtype is pinned."""
    nan = torch.tensor([math.nan] if qscheme in PER_CHANNEL_SCHEMES else math.nan)
    want, _ = torchao_qparams(nan, nan, None, None, torch.quint8, qscheme)
    scale, zero_point = qops.choose_qparams(nan.to(device), nan.to(device), 0, 255, dtype=torch.quint8, qscheme=qscheme)
    assert want.isnan().all()
    assert_bits_equal(scale, want)
    assert zero_point.dtype == zero_point_dtype(qscheme)


@pytest.mark.parametrize("qscheme", SCHEMES, ids=scheme_id)
def test_choose_qparams_never_observed_gives_identity(qscheme: torch.qscheme, device: torch.device) -> None:
    """min > max: scale 1, zero point 0, for that channel alone."""
    low, high = torch.tensor(math.inf), torch.tensor(-math.inf)
    if qscheme in PER_CHANNEL_SCHEMES:
        low, high = torch.tensor([math.inf, -1.0, 2.0]), torch.tensor([-math.inf, 1.0, 1.5])
    for dtype, quant_min, quant_max in ((torch.quint8, 0, 255), (torch.qint8, -128, 127)):
        scale, zero_point = qops.choose_qparams(
            low.to(device), high.to(device), quant_min, quant_max, dtype=dtype, qscheme=qscheme
        )
        unseen = torch.tensor([True]) if low.dim() == 0 else low > high
        assert scale.shape == unseen.shape == zero_point.shape
        assert (scale.cpu()[unseen] == 1).all() and (zero_point.cpu()[unseen] == 0).all()
        if low.dim():
            want = torchao_qparams(low[1:2], high[1:2], None, None, dtype, qscheme)
            assert_bits_equal(scale[1:2], want[0])
            assert_bits_equal(zero_point[1:2], want[1])


def test_choose_qparams_symmetric_zero_point_override(device: torch.device) -> None:
    low, high = torch.tensor(-1.0, device=device), torch.tensor(2.0, device=device)
    for value in (0, 127, 64):
        _, zero_point = qops.choose_qparams(
            low, high, 0, 255, dtype=torch.quint8, qscheme=torch.per_tensor_symmetric, symmetric_zero_point=value
        )
        assert zero_point.tolist() == [value]


def test_choose_qparams_leaves_statistics_alone(device: torch.device) -> None:
    low, high = torch.tensor([-1.0, 0.5], device=device), torch.tensor([2.0, 3.0], device=device)
    scale, zero_point = qops.choose_qparams(low, high, 0, 255, qscheme=torch.per_channel_affine)
    scale.fill_(7)
    zero_point.fill_(7)
    assert low.tolist() == [-1.0, 0.5] and high.tolist() == [2.0, 3.0]


def test_choose_qparams_strided_statistics(device: torch.device) -> None:
    stats = torch.tensor([[-1.0, 2.0], [-3.0, 0.5], [0.1, 9.0]], device=device)
    got = qops.choose_qparams(stats[:, 0], stats[:, 1], -128, 127, dtype=torch.qint8, qscheme=torch.per_channel_affine)
    want = torchao_qparams(stats[:, 0], stats[:, 1], None, None, torch.qint8, torch.per_channel_affine)
    for a, b in zip(got, want, strict=True):
        assert_bits_equal(a, b)


@DETERMINISTIC
@given(
    ends=st.tuples(float32s(), float32s()),
    limits=st.sampled_from([(0, 255), (0, 15), (0, 65535)]),
    symmetric=st.booleans(),
)
def test_property_choose_qparams(
    ends: tuple[float, float], limits: tuple[int, int], symmetric: bool, device: torch.device
) -> None:
    low, high = torch.tensor(min(ends)), torch.tensor(max(ends))
    qscheme = torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
    dtype = torch.uint16 if limits[1] > 255 else torch.quint8
    ao_range = limits if limits[1] == 15 else (None, None)
    want = torchao_qparams(low, high, *ao_range, dtype, qscheme)
    got = qops.choose_qparams(low.to(device), high.to(device), *limits, dtype=dtype, qscheme=qscheme)
    for name, a, b in zip(("scale", "zero_point"), got, want, strict=True):
        assert_bits_equal(a, b, context=f"{name} {low} {high}")
