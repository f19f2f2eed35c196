"""aminmax and observe_minmax_: schema, CPU and Triton implementations, fake, decomposition."""

from __future__ import annotations

from typing import Any

import torch

from qkernels.autotune.heuristics import MAX_SHARED_GROUPS
from qkernels.launch import mark_written
from qkernels.ops import checks, statistics_numpy
from qkernels.ops.registration import decompose, directly, implementations, not_differentiable, register

Tensor = torch.Tensor


def new_workspace(device: torch.device, axis: int | None) -> Tensor:
    """Arrival counters for one observer: enough for whatever input comes along `axis`."""
    return torch.zeros(1 if axis is None else MAX_SHARED_GROUPS, dtype=torch.int32, device=device)


def renewed_workspace(workspace: Tensor, device: torch.device, axis: int | None) -> Tensor:
    """Counters at 0 on `device`: the same tensor if it is there, since a captured CUDA graph may hold its address."""
    return workspace.zero_() if workspace.device == device else new_workspace(device, axis)


def extremes(x: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """(min, max) of x as ATen reductions: 0-dim, or (C,) per channel, without a permuting copy.

    Two reductions, not `aminmax(dim=...)`: on the CPU that one is five times slower than both together.
    """
    if axis is None:
        return torch.aminmax(x)
    others = [d for d in range(x.ndim) if d != axis]
    if not others:
        return x.clone(), x.clone()
    return torch.amin(x, others), torch.amax(x, others)


def cast_like(value: Tensor, state: Tensor) -> Tensor:
    """`value` with the dtype and shape of a state buffer."""
    return value.to(state.dtype).reshape(state.shape)


def fold(
    low: Tensor,
    high: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    averaging_constant: float | None,
    replace_any_infinity: bool = False,
) -> tuple[Tensor, Tensor]:
    """Running statistics after a batch with min `low` and max `high`, in the dtype and shape of the statistics.

    Args:
        low: the batch's min per group.
        high: the batch's max per group.
        min_val: running min.
        max_val: running max.
        averaging_constant: weight of the batch; None for running extremes.
        replace_any_infinity: torch's fused op takes the batch's value wherever the running one is infinite; its
            observers only where min is +inf and max is -inf, their state before the first batch.
    """
    low, high = cast_like(low, min_val), cast_like(high, max_val)
    if averaging_constant is None:
        return torch.minimum(low, min_val), torch.maximum(high, max_val)
    if replace_any_infinity:
        first_low, first_high = torch.isinf(min_val), torch.isinf(max_val)
    else:
        first_low = first_high = (min_val == float("inf")) & (max_val == float("-inf"))
    return (
        torch.where(first_low, low, min_val + averaging_constant * (low - min_val)),
        torch.where(first_high, high, max_val + averaging_constant * (high - max_val)),
    )


def choose(flag: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """`new` where the device flag is set (or absent), else `old`."""
    return new if flag is None else torch.where(flag.reshape(()).to(torch.bool), new, old)


def kernels_support(x: Tensor, *state: Tensor) -> bool:
    """Whether the Triton kernels take these: no float64 x, float32 contiguous state."""
    return x.dtype != torch.float64 and all(t.dtype == torch.float32 and t.is_contiguous() for t in state)


# --- aminmax -----------------------------------------------------------------------------------------------------


def _check_aminmax(x: Tensor, axis: int | None) -> int | None:
    checks.check_x("aminmax", x)
    axis = checks.check_axis("aminmax", x, axis)
    if x.numel() == 0:
        raise ValueError(f"aminmax: x must not be empty; got shape {tuple(x.shape)}")
    return axis


def _aminmax_aten(x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
    return extremes(x, _check_aminmax(x, axis))


def _aminmax_triton(x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
    axis = _check_aminmax(x, axis)
    if not kernels_support(x):
        return extremes(x, axis)
    from qkernels.minmax import Statistics, launch_minmax

    shape = () if axis is None else (x.shape[axis],)
    low, high = x.new_empty(shape), x.new_empty(shape)
    launch_minmax(x, Statistics(low, high), axis=axis, update="store")
    return low, high


def _aminmax_fake(x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
    axis = _check_aminmax(x, axis)
    shape = () if axis is None else (x.shape[axis],)
    return x.new_empty(shape), x.new_empty(shape)


# --- observe_minmax_ ---------------------------------------------------------------------------------------------


def check_observe(
    op: str,
    x: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    axis: int | None,
    enabled: Tensor | None,
    workspace: Tensor | None,
) -> int | None:
    """Checks that every observing operator shares. Returns the axis in [0, x.ndim) or None."""
    checks.check_x(op, x)
    axis = checks.check_axis(op, x, axis)
    checks.check_statistics(op, x, min_val, max_val, axis)
    checks.check_flag(op, "enabled", enabled, x)
    checks.check_workspace(op, workspace, x)
    return axis


def _observe_composition(
    x: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    averaging_constant: float | None = None,
    axis: int | None = None,
    enabled: Tensor | None = None,
    workspace: Tensor | None = None,
) -> None:
    if x.numel() == 0:
        return
    axis = None if axis is None else axis % x.ndim
    low, high = fold(*extremes(x, axis), min_val, max_val, averaging_constant)
    low, high = choose(enabled, low, min_val), choose(enabled, high, max_val)
    min_val.copy_(low)
    max_val.copy_(high)


def _observe_minmax_aten(
    x: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    averaging_constant: float | None = None,
    axis: int | None = None,
    enabled: Tensor | None = None,
    workspace: Tensor | None = None,
) -> None:
    axis = check_observe("observe_minmax_", x, min_val, max_val, axis, enabled, workspace)
    if x.numel() == 0 or (enabled is not None and not enabled.item()):  # a CPU tensor: no sync
        return
    batch = extremes(x, axis)
    if averaging_constant is None and x.dtype == min_val.dtype:
        for value, state, extreme in ((batch[0], min_val, torch.minimum), (batch[1], max_val, torch.maximum)):
            extreme(value if value.shape == state.shape else value.reshape(state.shape), state, out=state)
    elif not statistics_numpy.observe(batch, min_val, max_val, averaging_constant):
        low, high = fold(*batch, min_val, max_val, averaging_constant)
        min_val.copy_(low)
        max_val.copy_(high)


def _observe_minmax_triton(
    x: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    averaging_constant: float | None = None,
    axis: int | None = None,
    enabled: Tensor | None = None,
    workspace: Tensor | None = None,
) -> None:
    axis = check_observe("observe_minmax_", x, min_val, max_val, axis, enabled, workspace)
    if x.numel() == 0:
        return
    if not kernels_support(x, min_val, max_val):
        _observe_composition(x, min_val, max_val, averaging_constant, axis, enabled)
        return
    from qkernels.minmax import Statistics, launch_minmax

    launch_minmax(
        x,
        Statistics(min_val, max_val, averaging_constant or 0.0, enabled),
        axis=axis,
        update="extremes" if averaging_constant is None else "average",
        workspace=workspace,
    )
    mark_written(min_val, max_val)


def _observe_minmax_fake(
    x: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    averaging_constant: float | None = None,
    axis: int | None = None,
    enabled: Tensor | None = None,
    workspace: Tensor | None = None,
) -> None:
    check_observe("observe_minmax_", x, min_val, max_val, axis, enabled, workspace)


_AMINMAX = implementations(_aminmax_aten, _aminmax_triton)
_OBSERVE = implementations(_observe_minmax_aten, _observe_minmax_triton)

_aminmax_op = not_differentiable(
    register(
        "aminmax(Tensor x, int? axis=None) -> (Tensor min, Tensor max)",
        aten=_aminmax_aten,
        triton=_aminmax_triton,
        fake=_aminmax_fake,
    )
)
_observe_minmax_op = not_differentiable(
    register(
        "observe_minmax_(Tensor x, Tensor(a!) min_val, Tensor(b!) max_val, float? averaging_constant=None, "
        "int? axis=None, Tensor? enabled=None, Tensor(c!)? workspace=None) -> ()",
        aten=_observe_minmax_aten,
        triton=_observe_minmax_triton,
        fake=_observe_minmax_fake,
    )
)


def keep_on_gpu(x: Tensor, *args: Any, **kwargs: Any) -> bool:
    """Statistics stay kernels on a GPU: one launch where Inductor's reduction takes three or four.

    On the CPU its C++ code is as good, and fuses with what produced x.
    """
    return x.device.type != "cpu"


def _aminmax_composition(x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
    return extremes(x, None if axis is None else axis % x.ndim)


decompose(_aminmax_op, _aminmax_composition, keep_on_gpu)
decompose(_observe_minmax_op, _observe_composition, keep_on_gpu)


def aminmax(x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """Smallest and largest element of x, over everything or per channel.

    Args:
        x: values. Any shape and layout, not empty; float16, bfloat16, float32 or float64.
        axis: channel axis, negative allowed; None for the whole tensor.

    Returns:
        (min, max), dtype of x; 0-dim for axis=None, else shape (C,).

    Raises:
        TypeError: x has another dtype.
        ValueError: x is empty, or axis is out of range.

    Note:
        Exact. NaN in a group makes both of its results NaN. On a GPU one kernel and a 4-byte memset, x read once.

    Reference:
        torch.aminmax.
    """
    return (directly(_AMINMAX, x, axis=axis) or _aminmax_op)(x, axis)


def observe_minmax_(
    x: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    averaging_constant: float | None = None,
    axis: int | None = None,
    enabled: Tensor | None = None,
    workspace: Tensor | None = None,
) -> None:
    """Fold the min and max of x into running statistics, in place.

    Args:
        x: a batch. Any shape and layout; float16, bfloat16, float32 or float64. Empty: nothing happens.
        min_val: running min, +inf before the first batch. 1 element for axis=None, else shape (C,); float.
        max_val: running max, -inf before the first batch; dtype of min_val.
        averaging_constant: weight of the batch in a moving average, v + c * (batch - v); None keeps the extremes of
            all batches. Where min is +inf and max is -inf the batch's values are taken as they are.
        axis: channel axis of x, negative allowed; None for one pair.
        enabled: device flag, 1 element, uint8, int32, int64 or bool; 0 leaves the statistics alone. None is on.
        workspace: int32 zeros, owned by this observer alone: the kernel's arrival counters, back at 0 afterwards. 1
            element is enough per tensor, 1024 are per channel. None, or too few, allocates (a memset more). Unused on
            the CPU.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, value or device.

    Note:
        On a GPU one launch, no host sync, x read once (not at all when disabled). NaN propagates.

    Reference:
        MinMaxObserver and MovingAverageMinMaxObserver.forward, torch/ao/quantization/observer.py, torch 2.13.
    """
    others: Any = {"axis": axis, "numbers": (averaging_constant,), "optional": (enabled, workspace)}
    observe = directly(_OBSERVE, x, min_val, max_val, **others) or _observe_minmax_op
    observe(x, min_val, max_val, averaging_constant, axis, enabled, workspace)
