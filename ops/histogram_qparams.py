"""Scale and zero point of the range that a histogram is searched for, in one launch on a GPU: fresh, or in place."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from qkernels.launch import mark_written
from qkernels.ops import checks, statistics_numpy
from qkernels.ops.histogram import check_kernel_bins
from qkernels.ops.histogram_search import check_search, device_quantiles, search_aten, search_triton
from qkernels.ops.minmax import cast_like, choose, kernels_support
from qkernels.ops.qparams import check_rule, choose_qparams_composition, choose_qparams_triton, fits_kernel
from qkernels.ops.qparams_rules import zero_point_dtype
from qkernels.ops.registration import directly, implementations, not_differentiable, register

Tensor = torch.Tensor

_FLOAT32_EPS = torch.finfo(torch.float32).eps


class _Search(NamedTuple):
    """The arguments that the two operators share, in the order of their schemas."""

    histogram: Tensor
    min_val: Tensor
    max_val: Tensor
    quant_bins: int
    quant_min: int
    quant_max: int
    rule: str = "affine"
    symmetric_zero_point: int = 0
    eps: Tensor | None = None
    enabled: Tensor | None = None


def _check(op: str, search: _Search) -> None:
    histogram, min_val, max_val = search[:3]
    check_rule(op, search.rule, search.quant_min, search.quant_max, search.eps)
    check_search(op, histogram, min_val, max_val, search.quant_bins, search.enabled)
    if min_val.ndim > 1 or min_val.shape != max_val.shape:
        raise ValueError(
            f"{op}: min_val and max_val must have one shape, () or (C,); "
            f"got {tuple(min_val.shape)} and {tuple(max_val.shape)}"
        )
    if min_val.dtype != max_val.dtype:
        raise TypeError(f"{op}: min_val and max_val must have one dtype; got {min_val.dtype} and {max_val.dtype}")
    if search.eps is not None:
        checks.check_device(op, "eps", search.eps, histogram)


def _eps(search: _Search) -> Tensor:
    if search.eps is not None:
        return search.eps
    return torch.full((1,), _FLOAT32_EPS, dtype=search.min_val.dtype, device=search.min_val.device)


def _in_aten(search: _Search) -> tuple[Tensor, Tensor]:
    """search_histogram_range, then choose_qparams, on the CPU."""
    arguments: Any = (*search_aten(*search[:4], search.enabled), *search[4:8], _eps(search))
    return statistics_numpy.choose(*arguments) or choose_qparams_composition(*arguments)


def _in_two_steps(search: _Search) -> tuple[Tensor, Tensor]:
    """The same on a GPU: a launch for the search, then another or ATen operations."""
    arguments: Any = (*search_triton(*search[:4], search.enabled), *search[4:8], _eps(search))
    return choose_qparams_triton(*arguments)


def _one_launch(op: str, search: _Search) -> bool:
    """Whether one launch does it. Statistics of other dtypes have qparams in the arithmetic of these dtypes."""
    check_kernel_bins(op, search.histogram.shape[-1], search.histogram.device)
    return kernels_support(search.min_val, search.min_val, search.max_val) and fits_kernel(
        search.quant_min, search.quant_max
    )


def _launch(search: _Search, qparams: tuple[Tensor, Tensor], copies: tuple[Tensor | None, Tensor | None]) -> None:
    """Write scale and zero point, or with copies renew them in place."""
    from qkernels.histogram_search import Found, launch_search
    from qkernels.qparams import rule_arguments

    rule = rule_arguments(search.quant_min, search.quant_max, search.symmetric_zero_point, search.eps)
    if search.min_val.numel() > 0:
        launch_search(
            search.histogram.float().contiguous(),
            search.min_val,
            search.max_val,
            device_quantiles(search.histogram.device),
            search.quant_bins,
            search.enabled,
            Found(None, None, *qparams, *copies, rule),
            search.rule,
        )


# --- search_histogram_qparams ------------------------------------------------------------------------------------


def _search_aten(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    search = _Search(*args, **kwargs)
    _check("search_histogram_qparams", search)
    return _in_aten(search)


def _search_triton(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    search = _Search(*args, **kwargs)
    _check("search_histogram_qparams", search)
    if not _one_launch("search_histogram_qparams", search):
        return _in_two_steps(search)
    qparams = _new_qparams(search)
    _launch(search, qparams, (None, None))
    return qparams


def _search_fake(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    search = _Search(*args, **kwargs)
    _check("search_histogram_qparams", search)
    return _new_qparams(search)


def _new_qparams(search: _Search) -> tuple[Tensor, Tensor]:
    min_val = search.min_val
    shape = min_val.shape if min_val.ndim else (1,)
    return min_val.new_empty(shape), min_val.new_empty(shape, dtype=zero_point_dtype(search.rule, min_val.dtype))


# --- update_qparams_from_histogram_ ------------------------------------------------------------------------------


def _update_arguments(
    histogram: Tensor, min_val: Tensor, max_val: Tensor, scale: Tensor, zero_point: Tensor, *args: Any, **kwargs: Any
) -> tuple[_Search, Tensor, Tensor]:
    """The checked arguments: the search, scale, zero point."""
    op = "update_qparams_from_histogram_"
    search = _Search(histogram, min_val, max_val, *args, **kwargs)
    _check(op, search)
    checks.check_qparams(op, histogram, scale, zero_point, None if histogram.ndim == 1 else 0)
    return search, scale, zero_point


def _update_aten(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    search, scale, zero_point = _update_arguments(*args, **kwargs)
    if search.enabled is None or search.enabled.item():  # a CPU tensor: no sync
        _renew(scale, zero_point, _in_aten(search._replace(enabled=None)), None)
    return scale.clone(), zero_point.clone()


def _update_triton(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    search, scale, zero_point = _update_arguments(*args, **kwargs)
    one_launch = _one_launch("update_qparams_from_histogram_", search)
    if not (one_launch and kernels_support(scale, scale) and zero_point.is_contiguous()):
        _renew(scale, zero_point, _in_two_steps(search), search.enabled)
        return scale.clone(), zero_point.clone()
    copies = torch.empty_like(scale), torch.empty_like(zero_point)
    _launch(search, (scale, zero_point), copies)
    mark_written(scale, zero_point)
    return copies


def _renew(scale: Tensor, zero_point: Tensor, new: tuple[Tensor, Tensor], enabled: Tensor | None) -> None:
    for buffer, value in zip((scale, zero_point), new, strict=True):
        buffer.copy_(choose(enabled, cast_like(value, buffer), buffer))


def _update_fake(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    _, scale, zero_point = _update_arguments(*args, **kwargs)
    return torch.empty_like(scale), torch.empty_like(zero_point)


_SEARCH = implementations(_search_aten, _search_triton)
_UPDATE = implementations(_update_aten, _update_triton)

_HOW = (
    "int quant_bins, int quant_min, int quant_max, str rule='affine', int symmetric_zero_point=0, Tensor? eps=None, "
    "Tensor? enabled=None"
)
_search_op = not_differentiable(
    register(
        f"search_histogram_qparams(Tensor histogram, Tensor min_val, Tensor max_val, {_HOW}) "
        "-> (Tensor scale, Tensor zero_point)",
        aten=_search_aten,
        triton=_search_triton,
        fake=_search_fake,
    )
)
_update_op = not_differentiable(
    register(
        "update_qparams_from_histogram_(Tensor histogram, Tensor min_val, Tensor max_val, Tensor(a!) scale, "
        f"Tensor(b!) zero_point, {_HOW}) -> (Tensor scale_copy, Tensor zero_point_copy)",
        aten=_update_aten,
        triton=_update_triton,
        fake=_update_fake,
    )
)


def search_histogram_qparams(
    histogram: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    quant_bins: int,
    quant_min: int,
    quant_max: int,
    *,
    rule: str = "affine",
    symmetric_zero_point: int = 0,
    eps: Tensor | None = None,
    enabled: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point with which a histogram is quantized with the least squared error, as torch.ao looks for it.

    `choose_qparams` of the range that `search_histogram_range` finds, bit for bit.

    Args:
        histogram: shape (bins,), or (C, bins); float. At most 8192 bins on a GPU.
        min_val: its min, shape () or (1,), or (C,); float.
        max_val: its max, shape and dtype of min_val.
        quant_bins: number of codes that the search reckons with, as 256.
        quant_min: smallest code.
        quant_max: largest code, greater than quant_min.
        rule: a rule of `update_qparams_`.
        symmetric_zero_point: zero point of the rule "symmetric".
        eps: smallest scale of the observers' rules, 1 element; None is float32's eps.
        enabled: device flag, 1 element; 0 gives the qparams of min_val and max_val, unsearched. None is on.

    Returns:
        (scale, zero_point), shape (1,) or (C,), in the dtypes of `choose_qparams`. Where min_val > max_val (never
        observed) 1 and 0, by the observers' rules.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, value or device.
        NotImplementedError: more bins than the kernel holds.

    Note:
        On a GPU one launch for all channels, no host sync, for a float32 histogram and statistics and bounds within
        +-2**23; other arguments take ATen operations besides.

    Reference:
        HistogramObserver.calculate_qparams, torch/ao/quantization/observer.py, torch 2.13.
    """
    ints = (quant_bins, quant_min, quant_max, symmetric_zero_point)
    search = directly(_SEARCH, histogram, min_val, max_val, ints=ints, optional=(eps, enabled)) or _search_op
    return search(
        *(histogram, min_val, max_val, quant_bins, quant_min, quant_max, rule, symmetric_zero_point, eps, enabled)
    )


def update_qparams_from_histogram_(
    histogram: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_bins: int,
    quant_min: int,
    quant_max: int,
    *,
    rule: str = "affine",
    symmetric_zero_point: int = 0,
    eps: Tensor | None = None,
    enabled: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Renew scale and zero point from a histogram, in place; return fresh copies of the two.

    What `search_histogram_qparams` gives, cast to the dtypes of scale and zero_point. `observe_histogram_`, this and
    `fake_quantize` on the copies are the step of a fake quantizer, as `update_qparams_` and `fake_quantize` are.

    Args:
        histogram: shape (bins,), or (C, bins); float. At most 8192 bins on a GPU.
        min_val: its min, shape () or (1,), or (C,); float.
        max_val: its max, shape and dtype of min_val.
        scale: step size to renew, 1 element or shape (C,); float.
        zero_point: zero point to renew, like scale; int32, int64 or float.
        quant_bins: number of codes that the search reckons with, as 256.
        quant_min: smallest code.
        quant_max: largest code, greater than quant_min.
        rule: a rule of `update_qparams_`.
        symmetric_zero_point: zero point of the rule "symmetric".
        eps: smallest scale of the observers' rules, 1 element; None is float32's eps.
        enabled: device flag, 1 element; 0 leaves scale and zero_point alone. None is on.

    Returns:
        Copies of scale and zero_point after the update.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, value or device.
        NotImplementedError: more bins than the kernel holds.

    Note:
        On a GPU one launch for all channels, no host sync, for a float32 histogram, statistics and scale and bounds
        within +-2**23; other arguments take ATen operations besides.

    Reference:
        FakeQuantize.forward and HistogramObserver.calculate_qparams, torch/ao/quantization, torch 2.13.
    """
    ints = (quant_bins, quant_min, quant_max, symmetric_zero_point)
    state = (histogram, min_val, max_val, scale, zero_point)
    update = directly(_UPDATE, *state, ints=ints, optional=(eps, enabled)) or _update_op
    return update(*state, quant_bins, quant_min, quant_max, rule, symmetric_zero_point, eps, enabled)
