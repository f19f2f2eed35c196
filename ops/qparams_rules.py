"""Qparams rules as ATen compositions, and the mapping from torch.ao's (dtype, qscheme) to a rule.

The same formulas as the device functions in qkernels/qparams.py, which name their sources.
"""

from __future__ import annotations

import struct

import torch

Tensor = torch.Tensor

RULES = ("affine", "symmetric", "float_qparams", "fused_affine", "fused_symmetric")

# fbgemm and ATen cut scales off here (QuantUtils.h, SMALL_SCALE_THRESHOLD), in float32.
SMALL_SCALE = struct.unpack("f", struct.pack("f", 6.1e-5))[0]

_QSCHEME_RULES = {
    torch.per_tensor_affine: "affine",
    torch.per_channel_affine: "affine",
    torch.per_tensor_symmetric: "symmetric",
    torch.per_channel_symmetric: "symmetric",
    torch.per_channel_affine_float_qparams: "float_qparams",
}


def rule_of(qscheme: torch.qscheme) -> str:
    """The observers' rule for a qscheme."""
    try:
        return _QSCHEME_RULES[qscheme]
    except KeyError:
        raise ValueError(f"choose_qparams: qscheme must be an affine or symmetric one; got {qscheme}") from None


def symmetric_zero_point_of(dtype: torch.dtype, quant_min: int, quant_max: int, custom_range: bool) -> int:
    """The zero point of torch.ao's symmetric schemes: the middle of an unsigned dtype, else 0.

    For an 8-bit dtype a custom range has its own middle, rounded down; 0..255 given as a custom range makes that 127.
    """
    if dtype in (torch.quint8, torch.uint8):
        return (quant_min + quant_max) // 2 if custom_range else 128
    return 2**15 if dtype == torch.uint16 else 0


def zero_point_dtype(rule: str, statistics_dtype: torch.dtype) -> torch.dtype:
    """The dtype torch.ao's calculate_qparams gives the zero point."""
    if rule == "float_qparams":
        return statistics_dtype
    return torch.int64 if rule == "symmetric" else torch.int32


def _divide(numerator: Tensor, divisor: float) -> Tensor:
    """IEEE division by a number. ATen's CUDA kernel multiplies by the reciprocal of a Python scalar instead."""
    if numerator.device.type == "cpu":
        return numerator / divisor
    return numerator / torch.full((), divisor, dtype=torch.float64, device=numerator.device)


def apply_rule(
    min_val: Tensor,
    max_val: Tensor,
    quant_min: int,
    quant_max: int,
    rule: str,
    symmetric_zero_point: int,
    eps: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(scale, zero point) from min and max, elementwise, in the dtype and shape of the statistics.

    The zero point has `zero_point_dtype`. Groups that were never observed (min > max) get scale 1 and zero point 0
    from the observers' rules. eps None is float32's.
    """
    if rule.startswith("fused"):
        return _fused_rule(min_val, max_val, quant_min, quant_max, rule)
    floor = torch.finfo(torch.float32).eps if eps is None else eps.reshape(())
    unseen = min_val > max_val
    low, high = torch.clamp(min_val, max=0), torch.clamp(max_val, min=0)
    if rule == "symmetric":
        scale = torch.clamp(_divide(torch.maximum(-low, high), float(quant_max - quant_min) / 2), min=floor)
        zero_point = torch.full_like(scale, symmetric_zero_point, dtype=torch.int64)
    elif rule == "float_qparams":
        scale = _divide(max_val - min_val, float(quant_max - quant_min))
        scale = torch.where(scale > floor, scale, 1.0)
        zero_point = -min_val / scale
    else:
        scale = torch.clamp(_divide(high - low, float(quant_max - quant_min)), min=floor)
        zero_point = torch.clamp(quant_min - torch.round(low / scale).to(torch.int32), quant_min, quant_max)
    return torch.where(unseen, 1.0, scale), torch.where(unseen, 0, zero_point)


def _fused_rule(min_val: Tensor, max_val: Tensor, quant_min: int, quant_max: int, rule: str) -> tuple[Tensor, Tensor]:
    min_val, max_val = min_val.float(), max_val.float()
    low, high = torch.clamp(min_val, max=0), torch.clamp(max_val, min=0)
    two_sided = (min_val < 0) & (max_val > 0)
    if rule == "fused_symmetric":
        above = float((quant_max - quant_min) // 2)
        below = -(above + 1.0)
        widest = torch.maximum(_divide(min_val, below).abs(), _divide(max_val, above).abs())
        low = torch.where(two_sided, below * widest, low)
        high = torch.where(two_sided, above * widest, high)
    span = quant_max - quant_min
    scale = _divide(high.double() - low.double(), float(span)).float()
    scale = torch.where((scale == 0) | torch.isinf(1.0 / scale), 0.1, scale)
    # A small scale is cut off, and the range widened to match.
    small = scale < SMALL_SCALE
    amplifier = torch.full_like(scale, SMALL_SCALE) / scale  # number / tensor would be a reciprocal and a product
    reach = SMALL_SCALE * span
    wide_low = torch.where(low == 0, low, torch.where(high == 0, -reach, low * amplifier))
    wide_high = torch.where(low == 0, reach, torch.where(high == 0, high, high * amplifier))
    low, high = torch.where(small, wide_low, low), torch.where(small, wide_high, high)
    scale = torch.where(small, SMALL_SCALE, scale)

    from_low, from_high = low.double() / scale.double(), high.double() / scale.double()
    low_is_better = abs(quant_min) + from_low.abs() < abs(quant_max) + from_high.abs()
    zero_point = torch.where(low_is_better, quant_min - from_low, quant_max - from_high)
    if rule == "fused_symmetric":
        zero_point = torch.where((low < 0) & (high > 0), (quant_min + quant_max) / 2.0, zero_point)
    return scale, torch.clamp(torch.round(zero_point), quant_min, quant_max).to(torch.int32)
