"""choose_qparams (scale and zero point from min and max) and reciprocal: schema, implementations, decomposition."""

from __future__ import annotations

import torch

from qkernels.ops import checks, statistics_numpy
from qkernels.ops.compositions import EXACT_BOUND
from qkernels.ops.minmax import keep_on_gpu, kernels_support
from qkernels.ops.qparams_rules import (
    RULES,
    apply_rule,
    rule_of,
    symmetric_zero_point_of,
    zero_point_dtype,
)
from qkernels.ops.registration import decompose, directly, implementations, not_differentiable, register

Tensor = torch.Tensor


def check_rule(op: str, rule: str, quant_min: int, quant_max: int, eps: Tensor | None) -> None:
    """Checks of a qparams rule and its range that every operator shares."""
    if rule not in RULES:
        raise ValueError(f"{op}: rule must be one of {', '.join(RULES)}; got {rule!r}")
    if quant_min >= quant_max:
        raise ValueError(f"{op}: quant_min must be less than quant_max; got {quant_min} and {quant_max}")
    if eps is not None and (eps.numel() != 1 or not eps.dtype.is_floating_point):
        raise ValueError(f"{op}: eps must have 1 floating-point element; got shape {tuple(eps.shape)} and {eps.dtype}")


def fits_kernel(quant_min: int, quant_max: int) -> bool:
    """Whether the kernels' float32 codes hold the range exactly."""
    return -EXACT_BOUND <= quant_min and quant_max <= EXACT_BOUND


# --- reciprocal --------------------------------------------------------------------------------------------------


def _reciprocal_aten(scale: Tensor) -> Tensor:
    return 1.0 / scale.float()


def _reciprocal_triton(scale: Tensor) -> Tensor:
    from qkernels.qparams import launch_reciprocal

    out = torch.empty(scale.shape, dtype=torch.float32, device=scale.device)
    if scale.numel() > 0:
        launch_reciprocal(out, scale.contiguous())
    return out


def _reciprocal_fake(scale: Tensor) -> Tensor:
    return torch.empty(scale.shape, dtype=torch.float32, device=scale.device)


# Internal: the IEEE 1 / scale per channel that Inductor's CUDA code cannot express (see compositions.py).
_reciprocal_op = not_differentiable(
    register(
        "reciprocal(Tensor scale) -> Tensor", aten=_reciprocal_aten, triton=_reciprocal_triton, fake=_reciprocal_fake
    )
)


# --- choose_qparams ----------------------------------------------------------------------------------------------


def _check_choose(min_val: Tensor, max_val: Tensor, quant_min: int, quant_max: int, rule: str, eps: Tensor) -> None:
    op = "choose_qparams"
    check_rule(op, rule, quant_min, quant_max, eps)
    for name, tensor in (("min_val", min_val), ("max_val", max_val)):
        checks.check_x(op, tensor, name)
    if min_val.shape != max_val.shape or min_val.ndim > 1:
        raise ValueError(
            f"{op}: min_val and max_val must have one shape, () or (C,); "
            f"got {tuple(min_val.shape)} and {tuple(max_val.shape)}"
        )
    if min_val.dtype != max_val.dtype:
        raise TypeError(f"{op}: min_val and max_val must have one dtype; got {min_val.dtype} and {max_val.dtype}")
    checks.check_device(op, "max_val", max_val, min_val)
    checks.check_device(op, "eps", eps, min_val)


def choose_qparams_composition(
    min_val: Tensor, max_val: Tensor, quant_min: int, quant_max: int, rule: str, symmetric_zero_point: int, eps: Tensor
) -> tuple[Tensor, Tensor]:
    """choose_qparams in ATen operations."""
    scale, zero_point = apply_rule(min_val, max_val, quant_min, quant_max, rule, symmetric_zero_point, eps)
    shape = min_val.shape if min_val.ndim else (1,)
    return scale.reshape(shape), zero_point.reshape(shape)


def _choose_qparams_aten(
    min_val: Tensor, max_val: Tensor, quant_min: int, quant_max: int, rule: str, symmetric_zero_point: int, eps: Tensor
) -> tuple[Tensor, Tensor]:
    _check_choose(min_val, max_val, quant_min, quant_max, rule, eps)
    arguments = (min_val, max_val, quant_min, quant_max, rule, symmetric_zero_point, eps)
    return statistics_numpy.choose(*arguments) or choose_qparams_composition(*arguments)


def choose_qparams_triton(
    min_val: Tensor, max_val: Tensor, quant_min: int, quant_max: int, rule: str, symmetric_zero_point: int, eps: Tensor
) -> tuple[Tensor, Tensor]:
    """choose_qparams on a GPU: one launch, or ATen operations for what the kernel does not take."""
    _check_choose(min_val, max_val, quant_min, quant_max, rule, eps)
    if not (kernels_support(min_val, min_val, max_val) and fits_kernel(quant_min, quant_max)):
        return choose_qparams_composition(min_val, max_val, quant_min, quant_max, rule, symmetric_zero_point, eps)
    from qkernels.qparams import launch_choose_qparams, rule_arguments

    scale, zero_point = _choose_qparams_fake(min_val, max_val, quant_min, quant_max, rule, symmetric_zero_point, eps)
    if min_val.numel() > 0:
        arguments = rule_arguments(quant_min, quant_max, symmetric_zero_point, eps)
        launch_choose_qparams(scale, zero_point, min_val, max_val, rule, arguments)
    return scale, zero_point


def _choose_qparams_fake(
    min_val: Tensor, max_val: Tensor, quant_min: int, quant_max: int, rule: str, symmetric_zero_point: int, eps: Tensor
) -> tuple[Tensor, Tensor]:
    _check_choose(min_val, max_val, quant_min, quant_max, rule, eps)
    shape = min_val.shape if min_val.ndim else (1,)
    return min_val.new_empty(shape), min_val.new_empty(shape, dtype=zero_point_dtype(rule, min_val.dtype))


_CHOOSE = implementations(_choose_qparams_aten, choose_qparams_triton)

_choose_qparams_op = not_differentiable(
    register(
        "choose_qparams(Tensor min_val, Tensor max_val, int quant_min, int quant_max, str rule, "
        "int symmetric_zero_point, Tensor eps) -> (Tensor scale, Tensor zero_point)",
        aten=_choose_qparams_aten,
        triton=choose_qparams_triton,
        fake=_choose_qparams_fake,
    )
)


def _keep_choose(min_val: Tensor, *args: object, **kwargs: object) -> bool:
    return keep_on_gpu(min_val)


decompose(_choose_qparams_op, choose_qparams_composition, _keep_choose)


def choose_qparams_by_rule(
    min_val: Tensor, max_val: Tensor, quant_min: int, quant_max: int, rule: str, symmetric_zero_point: int, eps: Tensor
) -> tuple[Tensor, Tensor]:
    """`choose_qparams` for a caller that already knows its rule (`qparams_rules.RULES`) and symmetric zero point."""
    ints = (quant_min, quant_max, symmetric_zero_point)
    choose = directly(_CHOOSE, min_val, max_val, eps, ints=ints) or _choose_qparams_op
    return choose(min_val, max_val, quant_min, quant_max, rule, symmetric_zero_point, eps)


def choose_qparams(
    min_val: Tensor,
    max_val: Tensor,
    quant_min: int,
    quant_max: int,
    *,
    dtype: torch.dtype = torch.quint8,
    qscheme: torch.qscheme = torch.per_tensor_affine,
    eps: float | Tensor = torch.finfo(torch.float32).eps,
    symmetric_zero_point: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point for a range of values, as torch.ao's observers choose them.

    Affine: scale = max((hi - lo) / (quant_max - quant_min), eps), zero_point = clamp(quant_min - rint(lo / scale)),
    with lo = min(min_val, 0) and hi = max(max_val, 0). Symmetric: scale = max(max(-lo, hi) / ((quant_max - quant_min)
    / 2), eps). float_qparams: scale = (max_val - min_val) / (quant_max - quant_min), zero_point = -min_val / scale.

    Args:
        min_val: smallest values, shape () or (C,), float.
        max_val: largest values, like min_val.
        quant_min: smallest code.
        quant_max: largest code, greater than quant_min.
        dtype: quantized dtype; decides the zero point of symmetric schemes.
        qscheme: one of torch's five affine and symmetric schemes.
        eps: smallest scale, a number or a 1-element tensor on min_val's device.
        symmetric_zero_point: zero point of symmetric schemes; None takes torch.ao's: for quint8 and uint8 128 with the
            ranges 0..255 and 0..127 and (quant_min + quant_max) // 2 with any other, 32768 for uint16, else 0.

    Returns:
        (scale, zero_point), shape (1,) or (C,). scale has min_val's dtype; zero_point is int32 for affine schemes,
        int64 for symmetric ones, min_val's dtype for float_qparams. Where min_val > max_val (never observed): 1 and 0.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, value or device.

    Reference:
        UniformQuantizationObserverBase._calculate_qparams, torch/ao/quantization/observer.py, torch 2.13.
    """
    checks.check_x("choose_qparams", min_val, "min_val")
    if symmetric_zero_point is None:
        custom_range = (quant_min, quant_max) not in ((0, 255), (0, 127))
        symmetric_zero_point = symmetric_zero_point_of(dtype, quant_min, quant_max, custom_range)
    if not isinstance(eps, Tensor):
        eps = torch.full((1,), eps, dtype=min_val.dtype, device=min_val.device)
    return choose_qparams_by_rule(min_val, max_val, quant_min, quant_max, rule_of(qscheme), symmetric_zero_point, eps)
