"""Independent references for the operators: NumPy written from the numerics contract, and torch's own operators.

Two oracles are used wherever both are defined. The NumPy one follows the contract literally: reciprocal, multiply,
round half to even, clamp in float; NaN propagates, infinities saturate. torch's own CPU operators are the second one,
on the inputs where they are right: see `torch_is_sane`.

Nothing here imports qkernels.
"""

from __future__ import annotations

import os
import warnings

import numpy as np
import torch

INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"

# torch's per-channel operator converts to int64 before it clamps, so a quotient from 2^63 on wraps to quant_min.
_INT64_SAFE = 2.0**62


# --------------------------------------------------------------------------------------------------------------------
# Fake quantization, from the contract
# --------------------------------------------------------------------------------------------------------------------


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Correctly rounded float32 a*b + c, by rounding the float64 sum to odd before the one rounding to float32.

    The float64 product of two float32 numbers is exact. A float64 sum followed by a float32 rounding would round twice;
    rounding the first time to odd (Boldo and Melquiond) makes the second one right, because 53 >= 24 + 2.
    """
    product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
    addend = np.broadcast_to(np.asarray(c, np.float64), product.shape)
    with np.errstate(all="ignore"):
        total = product + addend
        virtual = total - product
        error = (product - (total - virtual)) + (addend - virtual)
        even = (total.view(np.int64) & 1) == 0
        fix = np.isfinite(total) & (error != 0) & even
        total = np.where(fix, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)
        return total.astype(np.float32)


def to_numpy32(t: torch.Tensor) -> np.ndarray:
    """A float32 NumPy copy of a tensor of any dtype and layout."""
    return t.detach().to("cpu").to(torch.float32).contiguous().numpy().copy()


def expand_channel(values: np.ndarray, ndim: int, axis: int | None) -> np.ndarray:
    """Shape (C,) or one element, ready to broadcast against an `ndim`-dimensional array."""
    if axis is None:
        return values.reshape(())
    shape = [1] * ndim
    shape[axis % ndim] = -1
    return values.reshape(shape)


def reference_codes(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The unclamped float32 q, and scale and zero point as they enter the arithmetic (broadcastable to x)."""
    xs = to_numpy32(x)
    s = expand_channel(to_numpy32(scale), xs.ndim, axis)
    zs = to_numpy32(zero_point)
    fractional = axis is not None and zero_point.dtype.is_floating_point
    if not fractional:
        zs = np.trunc(zs)
    z = expand_channel(zs, xs.ndim, axis)
    with np.errstate(all="ignore"):
        inv = np.float32(1) / s
        if fractional:
            q = np.rint(fma32(xs, np.broadcast_to(inv, xs.shape), z))
        else:
            q = np.rint(xs * inv) + z
    return q.astype(np.float32), s, z


def reference_fake_quantize32(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    enabled: torch.Tensor | None = None,
) -> torch.Tensor:
    """The float32 result before the one cast to x's dtype (CPU, contiguous)."""
    xs = to_numpy32(x)
    if enabled is not None and int(enabled) == 0:
        return torch.from_numpy(xs)
    q, s, z = reference_codes(x, scale, zero_point, axis)
    # torch's per-channel operator subtracts and multiplies in double and rounds once at the end. With integer zero
    # points that equals float32 arithmetic (q - zp is exact); with fractional ones it does not.
    wide = np.float64 if axis is not None else np.float32
    with np.errstate(all="ignore"):
        # A q that is NaN although x is not (0 * inf, from a subnormal scale) becomes quant_min, as in torch.
        q = np.where(np.isnan(q), np.float32(quant_min), q)
        clamped = np.minimum(np.maximum(q, np.float32(quant_min)), np.float32(quant_max))
        y = ((clamped.astype(wide) - z.astype(wide)) * s.astype(wide)).astype(np.float32)
    return torch.from_numpy(np.where(np.isnan(xs), np.float32(np.nan), y).astype(np.float32))


def reference_fake_quantize(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    """`reference_fake_quantize32` cast once to x's dtype. float16, bfloat16, float32 only."""
    return reference_fake_quantize32(x, *args, **kwargs).to(x.dtype)


def reference_fake_quantize_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    enabled: torch.Tensor | None = None,
) -> torch.Tensor:
    """dy where quant_min <= q <= quant_max on the unclamped q, else 0; NaN in x, or a NaN q, gives 0."""
    dy = dy.detach().to("cpu").contiguous()
    if enabled is not None and int(enabled) == 0:
        return dy.clone()
    q, _, _ = reference_codes(x, scale, zero_point, axis)
    with np.errstate(invalid="ignore"):
        mask = (q >= np.float32(quant_min)) & (q <= np.float32(quant_max))
    return torch.where(torch.from_numpy(np.array(mask)), dy, torch.zeros((), dtype=dy.dtype))


# --------------------------------------------------------------------------------------------------------------------
# Fake quantization, by torch
# --------------------------------------------------------------------------------------------------------------------


def torch_fake_quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
) -> torch.Tensor:
    """torch's own CPU operator (differentiable in x). int64 per-channel zero points, which it refuses, are narrowed."""
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(x, scale.reshape(1), zero_point.reshape(1), quant_min, quant_max)
    if not zero_point.dtype.is_floating_point:
        zero_point = zero_point.to(torch.int32)
    return torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis % x.dim(), quant_min, quant_max)


def torch_is_sane(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int | None = None
) -> torch.Tensor:
    """Where torch's CPU operator is an oracle: finite x, and per channel no quotient that wraps in int64.

    The contract departs from torch on purpose elsewhere: NaN propagates, infinities and huge quotients saturate.
    """
    finite = torch.isfinite(x.detach().cpu().float())
    if axis is None:
        return finite
    q, _, _ = reference_codes(x, scale, zero_point, axis)
    with np.errstate(invalid="ignore"):
        in_range = np.abs(q) < np.float32(_INT64_SAFE)
    # A NaN q from a finite x is quant_min on both sides.
    return finite & torch.from_numpy(np.array(in_range | np.isnan(q)))


# --------------------------------------------------------------------------------------------------------------------
# Statistics
# --------------------------------------------------------------------------------------------------------------------


def reference_aminmax(x: torch.Tensor, axis: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """A NumPy minimum and maximum over everything, or over every dimension but `axis`; NaN propagates."""
    values = x.detach().to("cpu")
    wide = np.float64 if values.dtype == torch.float64 else np.float32
    array = values.to(torch.float64 if wide is np.float64 else torch.float32).numpy()
    dims = None if axis is None else tuple(d for d in range(array.ndim) if d != axis % array.ndim)
    low, high = np.min(array, axis=dims), np.max(array, axis=dims)
    return (torch.from_numpy(np.asarray(low, wide)).to(x.dtype), torch.from_numpy(np.asarray(high, wide)).to(x.dtype))


def torch_aminmax(x: torch.Tensor, axis: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """torch.aminmax, per channel after moving the axis to the front (as torch.ao's observers do)."""
    values = x.detach().to("cpu")
    if axis is None:
        low, high = torch.aminmax(values)
    else:
        low, high = torch.aminmax(values.movedim(axis, 0).flatten(1) if x.dim() > 1 else values.unsqueeze(1), dim=1)
    return low, high


def reference_observe(
    x: torch.Tensor,
    min_val: torch.Tensor,
    max_val: torch.Tensor,
    averaging_constant: float | None = None,
    axis: int | None = None,
    enabled: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What torch.ao's MinMax / MovingAverage observers would hold after one more batch (new tensors)."""
    old_min, old_max = min_val.detach().cpu().clone(), max_val.detach().cpu().clone()
    if x.numel() == 0 or (enabled is not None and int(enabled) == 0):
        return old_min, old_max
    cur_min, cur_max = (t.reshape(old_min.shape) for t in torch_aminmax(x.to(min_val.dtype), axis))
    if averaging_constant is None:
        return torch.min(cur_min, old_min), torch.max(cur_max, old_max)
    virgin = (old_min == float("inf")) & (old_max == float("-inf"))
    avg_min = old_min + averaging_constant * (cur_min - old_min)
    avg_max = old_max + averaging_constant * (cur_max - old_max)
    return torch.where(virgin, cur_min, avg_min), torch.where(virgin, cur_max, avg_max)


# --------------------------------------------------------------------------------------------------------------------
# Quantization parameters, by live torch.ao observers
# --------------------------------------------------------------------------------------------------------------------

PER_CHANNEL_SCHEMES = (
    torch.per_channel_affine,
    torch.per_channel_symmetric,
    torch.per_channel_affine_float_qparams,
)


def torchao_qparams(
    min_val: torch.Tensor,
    max_val: torch.Tensor,
    quant_min: int | None,
    quant_max: int | None,
    dtype: torch.dtype = torch.quint8,
    qscheme: torch.qscheme = torch.per_tensor_affine,
    eps: float = float(torch.finfo(torch.float32).eps),
    reduce_range: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """scale and zero point of a live torch.ao observer that holds these statistics.

    `quant_min=None` leaves the observer on its dtype's default range (that decides symmetric unsigned zero points).
    """
    from torch.ao.quantization.observer import MinMaxObserver, PerChannelMinMaxObserver

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        common = {
            "dtype": dtype,
            "qscheme": qscheme,
            "quant_min": quant_min,
            "quant_max": quant_max,
            "eps": eps,
            "reduce_range": reduce_range,
        }
        if qscheme in PER_CHANNEL_SCHEMES:
            observer = PerChannelMinMaxObserver(ch_axis=0, **common)
        else:
            observer = MinMaxObserver(**common)
        observer.min_val = min_val.detach().cpu().clone()
        observer.max_val = max_val.detach().cpu().clone()
        scale, zero_point = observer.calculate_qparams()
    return scale, zero_point


def torch_fused_step(
    x: torch.Tensor,
    min_val: torch.Tensor,
    max_val: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    averaging_constant: float,
    quant_min: int,
    quant_max: int,
    *,
    per_channel: bool = False,
    symmetric: bool = False,
    observe: bool = True,
) -> torch.Tensor:
    """torch.fused_moving_avg_obs_fake_quant on the CPU (state written in place, float32, channel axis 0); returns y."""
    return torch.fused_moving_avg_obs_fake_quant(
        x,
        torch.tensor([int(observe)]),
        torch.ones(1, dtype=torch.long),
        min_val,
        max_val,
        scale,
        zero_point,
        averaging_constant,
        quant_min,
        quant_max,
        0,
        per_channel,
        symmetric,
    )


# --------------------------------------------------------------------------------------------------------------------
# Comparison
# --------------------------------------------------------------------------------------------------------------------

_INT_VIEW = {
    torch.float16: (torch.int16, 16),
    torch.bfloat16: (torch.int16, 16),
    torch.float32: (torch.int32, 32),
    torch.float64: (torch.int64, 64),
}


def _ordered(t: torch.Tensor) -> np.ndarray:
    """Float bits as integers that count representable values, so that a difference is a distance in ulp."""
    int_dtype, bits = _INT_VIEW[t.dtype]
    raw = t.contiguous().view(int_dtype).to(torch.int64).numpy().astype(object)
    sign = -(1 << (bits - 1))
    return np.where(raw < 0, sign - raw, raw)


def assert_bits_equal(
    actual: torch.Tensor,
    expected: torch.Tensor,
    *,
    where: torch.Tensor | None = None,
    signed_zero: bool = False,
    codes: np.ndarray | None = None,
    context: str = "",
) -> None:
    """Same dtype, same shape, same value everywhere; NaN equals NaN. No tolerance.

    -0.0 equals +0.0 unless `signed_zero`. Two places need that freedom: torch returns +0.0 for a per-channel float zero
    point of 0 because it rounds through int64, where float arithmetic keeps -0.0; and masked gradients are dy * 0 in
    torch (-0.0 for negative dy) but a selected 0 here. No code and no magnitude can differ.

    Args:
        actual: Result under test, any device and layout.
        expected: Oracle's answer, same dtype and shape.
        where: Bool mask of the elements to compare; None compares all.
        signed_zero: Tell the two zeros apart.
        codes: Unclamped q of the oracle, printed for the first difference.
        context: Said first in the failure text.
    """
    a, e = actual.detach().cpu(), expected.detach().cpu()
    assert a.dtype == e.dtype, f"{context}: dtype {a.dtype} instead of {e.dtype}"
    assert a.shape == e.shape, f"{context}: shape {tuple(a.shape)} instead of {tuple(e.shape)}"
    if not a.dtype.is_floating_point:
        bad = a != e
    else:
        bad = ~((a == e) | (a.isnan() & e.isnan()))
        if signed_zero:
            bad |= (a == 0) & (e == 0) & (torch.signbit(a) != torch.signbit(e))
    if where is not None:
        bad = bad & where.expand_as(bad)
    if not bool(bad.any()):
        return
    index = tuple(int(i) for i in bad.nonzero()[0])
    got, want = a[index], e[index]
    text = f"{context}: {int(bad.sum())} of {bad.numel()} differ; first at {index}: "
    text += f"got {got.item()!r}, want {want.item()!r}"
    if a.dtype.is_floating_point:
        gap = int(_ordered(got.reshape(1))[0] - _ordered(want.reshape(1))[0])
        text += f", {gap} ulp"
    if codes is not None:
        text += f", oracle's unclamped q = {np.broadcast_to(codes, tuple(e.shape))[index]!r}"
    raise AssertionError(text)


def assert_cast_equal(actual: torch.Tensor, expected32: torch.Tensor, **kwargs: object) -> None:
    """`actual` equals `expected32` cast once to `actual`'s dtype, rounding to nearest even.

    Triton 3.7.1's interpreter garbles bfloat16 subnormals in loads and stores (it doubles them, or worse), so in that
    lane, and there alone, bfloat16 results in the subnormal range are not compared. Its stores also truncate; the
    kernels round by themselves there, so rounding is compared in full.
    """
    where = kwargs.pop("where", None)
    if INTERPRETER and actual.dtype == torch.bfloat16:
        readable = ~((expected32 != 0) & (expected32.abs() < 2.0**-126))
        where = readable if where is None else readable & where
    assert_bits_equal(actual, expected32.to(actual.dtype), where=where, **kwargs)
