"""update_qparams_: observe a batch and renew scale and zero point, in one launch on a GPU."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch

from qkernels.launch import mark_written
from qkernels.ops import checks, statistics_numpy
from qkernels.ops.minmax import cast_like, check_observe, choose, extremes, fold, keep_on_gpu, kernels_support
from qkernels.ops.qparams import check_rule, fits_kernel
from qkernels.ops.qparams_rules import apply_rule
from qkernels.ops.registration import decompose, directly, implementations, not_differentiable, register

Tensor = torch.Tensor


class _Update(NamedTuple):
    """The operator's arguments, as in its schema."""

    x: Tensor
    min_val: Tensor
    max_val: Tensor
    scale: Tensor
    zero_point: Tensor
    quant_min: int
    quant_max: int
    rule: str = "affine"
    symmetric_zero_point: int = 0
    eps: Tensor | None = None
    averaging_constant: float | None = None
    axis: int | None = None
    enabled: Tensor | None = None
    workspace: Tensor | None = None
    qparams_enabled: Tensor | None = None
    scale_floor: Tensor | None = None

    @property
    def fused(self) -> bool:
        """Whether the arithmetic is that of torch's fused operator."""
        return self.rule.startswith("fused")


def _check(update: _Update) -> _Update:
    """Raise on a bad argument; else return the arguments with axis in [0, x.ndim) or None."""
    op = "update_qparams_"
    x = update.x
    check_rule(op, update.rule, update.quant_min, update.quant_max, update.eps)
    axis = check_observe(op, x, update.min_val, update.max_val, update.axis, update.enabled, update.workspace)
    checks.check_qparams(op, x, update.scale, update.zero_point, axis)
    checks.check_flag(op, "qparams_enabled", update.qparams_enabled, x)
    if update.eps is not None:
        checks.check_device(op, "eps", update.eps, x)
    if update.scale_floor is not None:
        checks.check_device(op, "scale_floor", update.scale_floor, x)
        if update.fused or update.scale_floor.numel() != 1:
            raise ValueError(
                f"{op}: scale_floor must have 1 element and goes with the observers' rules alone; got shape "
                f"{tuple(update.scale_floor.shape)} and rule {update.rule!r}"
            )
    if update.fused and update.averaging_constant is None:
        raise ValueError(f"{op}: averaging_constant must be given for rule {update.rule!r}; got None")
    return update if axis == update.axis else update._replace(axis=axis)


def _kept(update: _Update) -> tuple[Tensor, Tensor]:
    """scale and zero point where they are not renewed."""
    if update.scale_floor is None:
        return update.scale, update.zero_point
    symmetric = update.rule == "symmetric"
    zero_point = torch.zeros_like(update.zero_point) if symmetric else update.zero_point
    return torch.maximum(update.scale, update.scale_floor.reshape(()).to(update.scale.dtype)), zero_point


def _are_kept(update: _Update) -> bool:
    """Whether `_kept`, on the CPU, would give scale and zero point as they are."""
    floor = update.scale_floor
    if floor is None or update.scale.numel() != 1 or not update.scale.item() >= floor.item():
        return False
    return update.rule != "symmetric" or update.zero_point.item() == 0


def _composition(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    update = _Update(*args, **kwargs)
    x, min_val, max_val, scale, zero_point = update[:5]
    if x.numel() > 0:
        axis = None if update.axis is None else update.axis % x.ndim
        batch = extremes(x, axis)
        low, high = fold(*batch, min_val, max_val, update.averaging_constant, replace_any_infinity=update.fused)
        low, high = choose(update.enabled, low, min_val), choose(update.enabled, high, max_val)
        new_scale, new_zero_point = apply_rule(
            low, high, update.quant_min, update.quant_max, update.rule, update.symmetric_zero_point, update.eps
        )
        flag = update.enabled if update.qparams_enabled is None else update.qparams_enabled
        kept_scale, kept_zero_point = _kept(update)
        if update.scale_floor is not None and update.rule == "symmetric":
            new_zero_point = kept_zero_point
        new_scale = choose(flag, cast_like(new_scale, scale), kept_scale)
        new_zero_point = choose(flag, cast_like(new_zero_point, zero_point), kept_zero_point)
        min_val.copy_(low)
        max_val.copy_(high)
        scale.copy_(new_scale)
        zero_point.copy_(new_zero_point)
    return scale.clone(), zero_point.clone()


@lru_cache(maxsize=1)
def _always_on() -> Tensor:
    return torch.ones(1, dtype=torch.int64, device="cpu")  # whatever the default device


def _by_torchs_fused_op(update: _Update) -> None:
    """The per-tensor fused rules on the CPU: torch's own operator, shown only the batch's min and max.

    Its arithmetic on scalars takes one call where the composition takes thirty.
    """
    on = _always_on() if update.enabled is None else update.enabled
    assert update.averaging_constant is not None  # _check has seen to it for the fused rules
    torch.fused_moving_avg_obs_fake_quant(
        torch.stack(torch.aminmax(update.x.detach())).float(),
        on,
        on if update.qparams_enabled is None else update.qparams_enabled,
        update.min_val,
        update.max_val,
        update.scale,
        update.zero_point,
        update.averaging_constant,
        update.quant_min,
        update.quant_max,
        0,
        symmetric_quant=update.rule == "fused_symmetric",
    )
    mark_written(*update[1:5])  # it writes through raw pointers


def _aten(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    update = _check(_Update(*args, **kwargs))
    state = update[1:4]
    if (
        update.fused
        and update.axis is None
        and update.x.numel() > 0
        and all(t.dtype == torch.float32 for t in state)
        and update.zero_point.dtype == torch.int32
    ):
        _by_torchs_fused_op(update)
        return update.scale.clone(), update.zero_point.clone()
    if update.qparams_enabled is None and update.enabled is not None:
        if not update.enabled.item():  # a CPU tensor: no sync
            if update.scale_floor is not None and not _are_kept(update):
                scale, zero_point = _kept(update)
                update.scale.copy_(scale)
                update.zero_point.copy_(zero_point)
            return update.scale.clone(), update.zero_point.clone()
        update = update._replace(enabled=None)
    if update.x.numel() > 0 and update.enabled is None and update.qparams_enabled is None and not update.fused:
        batch = extremes(update.x, update.axis)
        if update.scale_floor is None and statistics_numpy.update(batch, update[1:5], *update[5:11]):
            return update.scale.clone(), update.zero_point.clone()
    return _composition(*update)


def _triton(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    update = _check(_Update(*args, **kwargs))
    x, min_val, max_val, scale, zero_point = update[:5]
    fits = (
        kernels_support(x, min_val, max_val, scale)
        and zero_point.is_contiguous()
        and fits_kernel(update.quant_min, update.quant_max)
    )
    if x.numel() == 0 or not fits:
        return _composition(*update)
    from qkernels.minmax import Statistics, launch_minmax
    from qkernels.qparams import rule_arguments

    scale_copy, zero_point_copy = torch.empty_like(scale), torch.empty_like(zero_point)
    statistics = Statistics(
        min_val,
        max_val,
        update.averaging_constant or 0.0,
        update.enabled,
        scale,
        zero_point,
        scale_copy,
        zero_point_copy,
        update.qparams_enabled,
        rule_arguments(update.quant_min, update.quant_max, update.symmetric_zero_point, update.eps),
        update.scale_floor,
    )
    if update.averaging_constant is None:
        how = "extremes"
    else:
        how = "fused_average" if update.fused else "average"
    launch_minmax(x, statistics, axis=update.axis, update=how, rule=update.rule, workspace=update.workspace)
    mark_written(min_val, max_val, scale, zero_point)
    return scale_copy, zero_point_copy


def _fake(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    update = _check(_Update(*args, **kwargs))
    return torch.empty_like(update.scale), torch.empty_like(update.zero_point)


_UPDATE = implementations(_aten, _triton)

_update_qparams_op = not_differentiable(
    register(
        "update_qparams_(Tensor x, Tensor(a!) min_val, Tensor(b!) max_val, Tensor(c!) scale, Tensor(d!) zero_point, "
        "int quant_min, int quant_max, str rule='affine', int symmetric_zero_point=0, Tensor? eps=None, "
        "float? averaging_constant=None, int? axis=None, Tensor? enabled=None, Tensor(e!)? workspace=None, "
        "Tensor? qparams_enabled=None, Tensor? scale_floor=None) -> (Tensor scale_copy, Tensor zero_point_copy)",
        aten=_aten,
        triton=_triton,
        fake=_fake,
    )
)


# Elements up to which a reduction in vain costs less than calling the operator (11 us, one CPU, torch 2.13).
_SMALL = 1 << 16


def _keep(*args: Any, **kwargs: Any) -> bool:
    """Whether torch.compile sees the operator: on a GPU, and on the CPU for learned qparams of a large x.

    Learned qparams are renewed in the first steps alone. The operator reads the flag and goes home; decomposed it would
    reduce x for nothing in all the steps after.
    """
    update = _Update(*args, **kwargs)
    elements = update.x.numel()
    small = isinstance(elements, int) and elements <= _SMALL
    return keep_on_gpu(*args, **kwargs) or (update.scale_floor is not None and not small)


decompose(_update_qparams_op, _composition, _keep)


def update_qparams_(
    x: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    *,
    rule: str = "affine",
    symmetric_zero_point: int = 0,
    eps: Tensor | None = None,
    averaging_constant: float | None = None,
    axis: int | None = None,
    enabled: Tensor | None = None,
    workspace: Tensor | None = None,
    qparams_enabled: Tensor | None = None,
    scale_floor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Observe a batch, then renew scale and zero point, all in place; return fresh copies of the two.

    The copies are for `fake_quantize`: what autograd saves is then safe from a later in-place observation.
    `update_qparams_` and `fake_quantize` together are the fused step of FusedMovingAvgObsFakeQuantize.

    Args:
        x: a batch. Any shape and layout; float16, bfloat16, float32 or float64. Empty: nothing changes.
        min_val: running min, +inf before the first batch. 1 element for axis=None, else shape (C,); float.
        max_val: running max, -inf before the first batch; dtype of min_val.
        scale: step size to renew, shaped like the statistics; float.
        zero_point: zero point to renew, shaped like scale; int32, int64 or float.
        quant_min: smallest code.
        quant_max: largest code, greater than quant_min.
        rule: "affine", "symmetric" or "float_qparams", the arithmetic of torch.ao's observers (`choose_qparams`), or
            "fused_affine" or "fused_symmetric", that of torch.fused_moving_avg_obs_fake_quant. The two differ for
            symmetric ranges: the fused operator widens by half a step.
        symmetric_zero_point: zero point of the rule "symmetric".
        eps: smallest scale of the observers' rules, 1 element; None is float32's eps.
        averaging_constant: weight of the batch in a moving average; None keeps the extremes of all batches.
        axis: channel axis of x, negative allowed; None for one group.
        enabled: device flag, 1 element; 0 leaves the statistics alone. None is on.
        workspace: as in `observe_minmax_`.
        qparams_enabled: device flag that gates scale and zero_point; None follows `enabled`.
        scale_floor: 1 element, for a scale and zero point that an optimizer changes too. Where they are not renewed,
            the scale is raised to it; the zero point of the rule "symmetric" is 0 throughout. None leaves them alone.
            Not with the fused rules.

    Returns:
        Copies of scale and zero_point after the update.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, value or device.

    Note:
        On a GPU one launch, no host sync, x read once, for float32 statistics and bounds within +-2**23; other
        arguments take ATen operations. Deterministic.

    Reference:
        aten/src/ATen/native/quantized/cpu/fused_obs_fake_quant.cpp and torch/ao/quantization/observer.py, torch 2.13.
    """
    update = (
        directly(
            *(_UPDATE, x, min_val, max_val, scale, zero_point),
            axis=axis,
            ints=(quant_min, quant_max, symmetric_zero_point),
            numbers=(averaging_constant,),
            optional=(eps, enabled, workspace, qparams_enabled, scale_floor),
        )
        or _update_qparams_op
    )
    return update(
        x, min_val, max_val, scale, zero_point, quant_min, quant_max, rule, symmetric_zero_point, eps,
        averaging_constant, axis, enabled, workspace, qparams_enabled, scale_floor,
    )  # fmt: skip
