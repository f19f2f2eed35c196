"""Running statistics and qparams on the CPU, eager, in NumPy: an operation on few values costs a tenth of ATen's.

The same formulas as `ops/minmax.py` (fold) and `ops/qparams_rules.py` (apply_rule), step by step in float32, so the
same bits. Single values are read and filled, several read and written through a view of the buffer's memory.

The functions give None, or False, where they do not apply: other dtypes, NaN, infinities, the rules of torch's fused
operator and float qparams. Then nothing was written, and the compositions serve.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from qkernels.launch import mark_written

Tensor = torch.Tensor
Values = Any  # a float32 NumPy scalar, or an array of them

_INTEGERS = (torch.int32, torch.int64)
_LIMIT = np.float32(1e38)  # of magnitudes, so that no difference overflows
_ZERO = np.float32(0)
_EPS = np.float32(np.finfo(np.float32).eps)


# Underflow is legal, and whoever sets numpy.seterr does not mean us.
_whatever_numpy_is_told = np.errstate(all="ignore")


def _applies(*state: Tensor) -> bool:
    return all(t.is_cpu and t.dtype == torch.float32 for t in state)


def _load(state: Tensor) -> Values:
    """One value as a scalar, several as an array on the same memory."""
    return np.float32(state.item()) if state.numel() == 1 else state.detach().numpy()


def _store(state: Tensor, values: Values) -> None:
    if state.numel() == 1:
        state.fill_(values.item())
    else:
        state.detach().numpy()[...] = values
        mark_written(state)


def _ordinary(low: Values, high: Values) -> bool:
    """Whether all are finite, of usual size, and in order. Infinities and NaN fail every comparison here."""
    if isinstance(low, np.ndarray):
        return bool(np.all((low >= -_LIMIT) & (low <= high) & (high <= _LIMIT)))
    return bool(-_LIMIT <= low <= high <= _LIMIT)


def _folded(
    low: Values, high: Values, old_low: Values, old_high: Values, averaging_constant: float | None
) -> tuple[Values, Values] | None:
    """Running (min, max) after a batch; None for a moving average of anything but ordinary values."""
    if averaging_constant is None:
        return np.minimum(low, old_low), np.maximum(high, old_high)
    if not _ordinary(low, high):
        return None
    if not _ordinary(old_low, old_high):
        return (low, high) if np.all((old_low == np.inf) & (old_high == -np.inf)) else None
    weight = np.float32(averaging_constant)
    return old_low + weight * (low - old_low), old_high + weight * (high - old_high)


def _rule(
    low: Values, high: Values, quant_min: int, quant_max: int, rule: str, symmetric_zero_point: int, eps: Tensor | None
) -> tuple[Values, Values] | None:
    """(scale, zero point) of finite ranges by the rules "affine" and "symmetric"."""
    floor = _EPS if eps is None else np.float32(eps.item())
    if not floor > 0:
        return None
    low, high = np.minimum(low, _ZERO), np.maximum(high, _ZERO)
    if rule == "symmetric":
        half = np.float32((quant_max - quant_min) / 2)
        scale = np.maximum(np.maximum(-low, high) / half, floor)
        return scale, np.full_like(scale, symmetric_zero_point)
    if rule != "affine":
        return None
    scale = np.maximum((high - low) / np.float32(quant_max - quant_min), floor)
    zero_point = np.float32(quant_min) - np.rint(low / scale)  # exact: codes of at most 2**23
    return scale, np.minimum(np.maximum(zero_point, np.float32(quant_min)), np.float32(quant_max))


def _fits(quant_min: int, quant_max: int, symmetric_zero_point: int) -> bool:
    """Whether codes are exact in float32."""
    return -(2**22) <= quant_min < quant_max <= 2**22 and abs(symmetric_zero_point) <= 2**22


@_whatever_numpy_is_told
def observe(batch: tuple[Tensor, Tensor], min_val: Tensor, max_val: Tensor, averaging_constant: float | None) -> bool:
    """Fold a batch's (min, max) into running statistics; whether that was done."""
    if not _applies(*batch, min_val, max_val):
        return False
    running = _folded(_load(batch[0]), _load(batch[1]), _load(min_val), _load(max_val), averaging_constant)
    if running is None:
        return False
    _store(min_val, running[0])
    _store(max_val, running[1])
    return True


@_whatever_numpy_is_told
def update(
    batch: tuple[Tensor, Tensor],
    state: tuple[Tensor, Tensor, Tensor, Tensor],
    quant_min: int,
    quant_max: int,
    rule: str,
    symmetric_zero_point: int,
    eps: Tensor | None,
    averaging_constant: float | None,
) -> bool:
    """Fold a batch's (min, max) into min_val, max_val, scale and zero point; whether that was done."""
    min_val, max_val, scale, zero_point = state
    if not (
        _applies(*batch, *state[:3])
        and zero_point.dtype in _INTEGERS
        and _fits(quant_min, quant_max, symmetric_zero_point)
    ):
        return False
    running = _folded(_load(batch[0]), _load(batch[1]), _load(min_val), _load(max_val), averaging_constant)
    if running is None or not _ordinary(*running):
        return False
    low, high = running
    chosen = _rule(low, high, quant_min, quant_max, rule, symmetric_zero_point, eps)
    if chosen is None:
        return False
    _store(min_val, low)
    _store(max_val, high)
    _store(scale, chosen[0])
    _store(zero_point, chosen[1])
    return True


@_whatever_numpy_is_told
def choose(
    min_val: Tensor, max_val: Tensor, quant_min: int, quant_max: int, rule: str, symmetric_zero_point: int, eps: Tensor
) -> tuple[Tensor, Tensor] | None:
    """What `choose_qparams` gives, or None."""
    if not (_applies(min_val, max_val) and min_val.numel() > 0 and _fits(quant_min, quant_max, symmetric_zero_point)):
        return None
    low, high = _load(min_val), _load(max_val)
    chosen = _rule(low, high, quant_min, quant_max, rule, symmetric_zero_point, eps) if _ordinary(low, high) else None
    if chosen is None:
        return None
    shape = min_val.shape if min_val.ndim else (1,)
    scale = torch.empty(shape, dtype=torch.float32, device=min_val.device)
    zero_point = torch.empty(shape, dtype=torch.int64 if rule == "symmetric" else torch.int32, device=min_val.device)
    _store(scale, chosen[0])
    _store(zero_point, chosen[1])
    return scale, zero_point
