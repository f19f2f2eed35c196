"""histogram and observe_histogram_: schema, CPU and Triton implementations, fake."""

from __future__ import annotations

import torch

from qkernels.launch import mark_written
from qkernels.ops import checks
from qkernels.ops.histogram_cpu import counts_of, observe_cpu
from qkernels.ops.registration import directly, implementations, not_differentiable, register

Tensor = torch.Tensor

MAX_BINS = 8192  # of the kernels: a program keeps its counts in registers or in shared memory
UPSAMPLE_RATE = 16  # parts that a bin is cut into when the range grows, as in torch.ao


def by_channel(x: Tensor, axis: int | None) -> Tensor:
    """Values as rows, shape (C, n): a view where there is one."""
    return x.reshape(1, -1) if axis is None else x.movedim(axis, 0).reshape(x.shape[axis], -1)


def check_bins(op: str, bins: int) -> None:
    """At least 2 bins."""
    if bins < 2:
        raise ValueError(f"{op}: bins must be at least 2; got {bins}")


def check_kernel_bins(op: str, bins: int, device: torch.device) -> None:
    """What the kernels hold."""
    if bins > MAX_BINS:
        raise NotImplementedError(f"{op}: at most {MAX_BINS} bins on {device.type}; got {bins}")


def check_histogram(op: str, histogram: Tensor, min_val: Tensor, max_val: Tensor, channels: int | None) -> None:
    """A running histogram and its range: (bins,) with 1 element each, or (C, bins) with (C,) each.

    Args:
        op: name of the operator.
        histogram: the histogram.
        min_val: its min.
        max_val: its max.
        channels: C, or None for one histogram.
    """
    for name, tensor in (("histogram", histogram), ("min_val", min_val), ("max_val", max_val)):
        if tensor.dtype not in checks.X_DTYPES:
            raise TypeError(f"{op}: {name} must be float16, bfloat16, float32 or float64; got {tensor.dtype}")
        checks.check_device(op, name, tensor, histogram)
    shape = tuple(histogram.shape)
    if channels is None and histogram.ndim != 1:
        raise ValueError(f"{op}: histogram must have shape (bins,) when axis is None; got {shape}")
    if channels is not None and (histogram.ndim != 2 or shape[0] != channels):
        raise ValueError(f"{op}: histogram must have shape (C, bins) with C = {channels}; got {shape}")
    check_bins(op, shape[-1])
    for name, tensor in (("min_val", min_val), ("max_val", max_val)):
        if (channels is None and tensor.numel() != 1) or (channels is not None and tuple(tensor.shape) != (channels,)):
            wanted = "1 element" if channels is None else f"shape ({channels},)"
            raise ValueError(f"{op}: {name} must have {wanted}, as histogram has; got shape {tuple(tensor.shape)}")


# --- histogram ---------------------------------------------------------------------------------------------------


def _check_counts(x: Tensor, bins: int, low: Tensor, high: Tensor, axis: int | None) -> int | None:
    op = "histogram"
    checks.check_x(op, x)
    axis = checks.check_axis(op, x, axis)
    check_bins(op, bins)
    for name, tensor in (("low", low), ("high", high)):
        checks.check_x(op, tensor, name)
        checks.check_device(op, name, tensor, x)
        checks.check_group_shape(op, name, tensor, x, axis)
    return axis


def _counts_aten(x: Tensor, bins: int, low: Tensor, high: Tensor, axis: int | None = None) -> Tensor:
    axis = _check_counts(x, bins, low, high, axis)
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    if axis is None:
        edge = low.to(work).item(), high.to(work).item()
        return counts_of(x.reshape(-1).to(work), bins, edge)
    counts = _counts_fake(x, bins, low, high, axis)
    edges = zip(low.reshape(-1).to(work).tolist(), high.reshape(-1).to(work).tolist(), strict=True)
    for row, out, edge in zip(by_channel(x, axis), counts.reshape(-1, bins), edges, strict=True):
        out.copy_(counts_of(row.to(work), bins, edge))
    return counts


def _counts_triton(x: Tensor, bins: int, low: Tensor, high: Tensor, axis: int | None = None) -> Tensor:
    axis = _check_counts(x, bins, low, high, axis)
    check_kernel_bins("histogram", bins, x.device)
    from qkernels.histogram import launch_histogram

    counts = _counts_fake(x, bins, low, high, axis)
    if x.numel() == 0:
        return counts.zero_()
    launch_histogram(counts, x, low.float().contiguous(), high.float().contiguous(), axis=axis)
    return counts


def _counts_fake(x: Tensor, bins: int, low: Tensor, high: Tensor, axis: int | None = None) -> Tensor:
    axis = _check_counts(x, bins, low, high, axis)
    shape = (bins,) if axis is None else (x.shape[axis], bins)
    return x.new_empty(shape, dtype=torch.int64)


# --- observe_histogram_ ------------------------------------------------------------------------------------------


def _check_observe(
    x: Tensor,
    histogram: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    remainder: Tensor | None,
    upsample_rate: int,
    axis: int | None,
    enabled: Tensor | None,
) -> int | None:
    op = "observe_histogram_"
    checks.check_x(op, x)
    axis = checks.check_axis(op, x, axis)
    checks.check_device(op, "histogram", histogram, x)
    check_histogram(op, histogram, min_val, max_val, None if axis is None else x.shape[axis])
    if remainder is not None:
        checks.check_device(op, "remainder", remainder, x)
        if remainder.dtype != torch.float32 or remainder.shape != histogram.shape:
            raise ValueError(
                f"{op}: remainder must be float32 of histogram's shape {tuple(histogram.shape)}; "
                f"got {remainder.dtype} and {tuple(remainder.shape)}"
            )
    if upsample_rate < 1:
        raise ValueError(f"{op}: upsample_rate must be at least 1; got {upsample_rate}")
    checks.check_flag(op, "enabled", enabled, x)
    return axis


def _observe_aten(
    x: Tensor,
    histogram: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    remainder: Tensor | None = None,
    upsample_rate: int = UPSAMPLE_RATE,
    axis: int | None = None,
    enabled: Tensor | None = None,
) -> None:
    axis = _check_observe(x, histogram, min_val, max_val, remainder, upsample_rate, axis, enabled)
    if x.numel() == 0 or (enabled is not None and not enabled.item()):  # a CPU tensor: no sync
        return
    if axis is None:
        observe_cpu(x, histogram, min_val, max_val, remainder, upsample_rate)
        return
    for channel, row in enumerate(by_channel(x, axis)):
        lost = None if remainder is None else remainder[channel]
        observe_cpu(row, histogram[channel], min_val[channel], max_val[channel], lost, upsample_rate)


def _observe_triton(
    x: Tensor,
    histogram: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    remainder: Tensor | None = None,
    upsample_rate: int = UPSAMPLE_RATE,
    axis: int | None = None,
    enabled: Tensor | None = None,
) -> None:
    axis = _check_observe(x, histogram, min_val, max_val, remainder, upsample_rate, axis, enabled)
    check_kernel_bins("observe_histogram_", histogram.shape[-1], x.device)
    if x.numel() == 0:
        return
    from qkernels.histogram import launch_observe_histogram

    state = (histogram, min_val, max_val)
    held = [t if t.dtype == torch.float32 and t.is_contiguous() else t.float().contiguous() for t in state]
    bins, low, high = held
    lost = None if remainder is None else remainder.contiguous()
    launch_observe_histogram(x, bins, low, high, lost, upsample_rate=upsample_rate, axis=axis, enabled=enabled)
    for tensor, new in zip(state, held, strict=True):
        if new is tensor:
            mark_written(tensor)
        else:
            tensor.copy_(new)
    if remainder is not None and lost is not None:
        if lost is remainder:
            mark_written(remainder)
        else:
            remainder.copy_(lost)


def _observe_fake(
    x: Tensor,
    histogram: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    remainder: Tensor | None = None,
    upsample_rate: int = UPSAMPLE_RATE,
    axis: int | None = None,
    enabled: Tensor | None = None,
) -> None:
    _check_observe(x, histogram, min_val, max_val, remainder, upsample_rate, axis, enabled)


_COUNTS = implementations(_counts_aten, _counts_triton)
_OBSERVE = implementations(_observe_aten, _observe_triton)

_counts_op = not_differentiable(
    register(
        "histogram(Tensor x, int bins, Tensor low, Tensor high, int? axis=None) -> Tensor",
        aten=_counts_aten,
        triton=_counts_triton,
        fake=_counts_fake,
    )
)
_observe_op = not_differentiable(
    register(
        "observe_histogram_(Tensor x, Tensor(a!) histogram, Tensor(b!) min_val, Tensor(c!) max_val, "
        "Tensor(d!)? remainder=None, int upsample_rate=16, int? axis=None, Tensor? enabled=None) -> ()",
        aten=_observe_aten,
        triton=_observe_triton,
        fake=_observe_fake,
    )
)


def histogram(x: Tensor, bins: int, low: Tensor, high: Tensor, axis: int | None = None) -> Tensor:
    """Count the values of x in `bins` bins of equal width between `low` and `high`.

    bin = trunc((x - low) * bins / (high - low)), every step rounded to float32; high itself belongs to the last bin.

    Args:
        x: values. Any shape and layout; float16, bfloat16, float32 or float64 (kernels round float64 to float32).
        bins: number of bins, at least 2; at most 8192 on a GPU.
        low: lower end, 1 element for axis=None, else shape (C,); float. Not read on the host on a GPU.
        high: upper end, like low. Where low == high both move outwards by 1.
        axis: channel axis, negative allowed; None for one histogram.

    Returns:
        Counts, int64, shape (bins,) or (C, bins). Values outside the range, and NaN, are not counted.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, value or device.
        NotImplementedError: more bins than the kernels hold.

    Reference:
        torch.histc, whose float32 counts these are, exact beyond 2**24.
    """
    return (directly(_COUNTS, x, low, high) or _counts_op)(x, bins, low, high, axis)


def observe_histogram_(
    x: Tensor,
    histogram: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    remainder: Tensor | None = None,
    upsample_rate: int = UPSAMPLE_RATE,
    axis: int | None = None,
    enabled: Tensor | None = None,
) -> None:
    """Fold x into a running histogram over its own running range, in place.

    The range is that of all finite values so far. Where x widens it, the old histogram is carried over: every old bin
    is cut into `upsample_rate` parts, each of which goes whole to the new bin of its middle.

    Args:
        x: a batch. Any shape and layout; float16, bfloat16, float32 or float64. Empty: nothing happens.
        histogram: shape (bins,), or (C, bins); float. At most 8192 bins on a GPU.
        min_val: running min, +inf before the first batch. 1 element for axis=None, else shape (C,); float.
        max_val: running max, -inf before the first batch; like min_val.
        remainder: what a float32 histogram cannot hold of bins above 2**24, float32 of its shape, zeros at first. None
            lets that go.
        upsample_rate: parts of a bin.
        axis: channel axis of x, negative allowed; None for one histogram.
        enabled: device flag, 1 element, uint8, int32, int64 or bool; 0 leaves the state alone. None is on.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, value or device.
        NotImplementedError: more bins than the kernels hold.

    Note:
        On a GPU three launches, no host sync, x read once, twice where the range grew. NaN and infinities are left out;
        of infinities the CPU path warns, as torch.ao does.

    Reference:
        HistogramObserver.forward, torch/ao/quantization/observer.py, torch 2.13.
    """
    observe = directly(_OBSERVE, x, histogram, min_val, max_val) or _observe_op
    observe(x, histogram, min_val, max_val, remainder, upsample_rate, axis, enabled)
