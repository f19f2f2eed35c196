"""Argument checks: one sentence per rule, naming the operator, the argument, the rule and what came.

No check reads a tensor's values: that would be a host sync on a GPU and a graph break under torch.compile.
"""

from __future__ import annotations

import torch

X_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ZERO_POINT_DTYPES = (torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32)
FLAG_DTYPES = (torch.uint8, torch.int64, torch.int32, torch.bool)


def check_x(op: str, x: torch.Tensor, name: str = "x") -> None:
    """`x` must be a floating-point tensor."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor; got {type(x).__name__}")
    if x.dtype not in X_DTYPES:
        raise TypeError(f"{op}: {name} must be float16, bfloat16, float32 or float64; got {x.dtype}")


def check_axis(op: str, x: torch.Tensor, axis: int | None) -> int | None:
    """`axis` must name a dimension of x. Returns it in [0, x.ndim), or None."""
    if axis is None:
        return None
    if not -x.ndim <= axis < x.ndim:
        if x.ndim == 0:
            raise ValueError(f"{op}: axis must be None for a 0-dimensional x; got {axis}")
        raise ValueError(f"{op}: axis must be in [{-x.ndim}, {x.ndim - 1}] for a {x.ndim}-dimensional x; got {axis}")
    return axis % x.ndim


def check_range(op: str, quant_min: int, quant_max: int) -> None:
    """`quant_min` must not exceed `quant_max`."""
    if quant_min > quant_max:
        raise ValueError(f"{op}: quant_min must not exceed quant_max; got {quant_min} and {quant_max}")


def check_device(op: str, name: str, tensor: torch.Tensor, x: torch.Tensor) -> None:
    """`tensor` must be where x is."""
    if tensor.device != x.device:
        raise ValueError(f"{op}: {name} must be on x's device ({x.device}); got {tensor.device}")


def check_group_shape(op: str, name: str, tensor: torch.Tensor, x: torch.Tensor, axis: int | None) -> None:
    """One element per group: 1 in any shape for axis=None, else shape (C,)."""
    if axis is None:
        if tensor.numel() != 1:
            raise ValueError(f"{op}: {name} must have 1 element when axis is None; got shape {tuple(tensor.shape)}")
    elif tensor.ndim != 1 or tensor.shape[0] != x.shape[axis]:
        raise ValueError(
            f"{op}: {name} must have shape (C,) = ({x.shape[axis]},) to match x.shape[{axis}]; "
            f"got {tuple(tensor.shape)}"
        )


def check_qparams(op: str, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int | None) -> None:
    """Dtype, device and shape of scale and zero_point."""
    if not scale.dtype.is_floating_point:
        raise TypeError(f"{op}: scale must have a floating-point dtype; got {scale.dtype}")
    if zero_point.dtype not in ZERO_POINT_DTYPES:
        raise TypeError(
            f"{op}: zero_point must be int32, int64 or floating-point other than float64; got {zero_point.dtype}"
        )
    for name, tensor in (("scale", scale), ("zero_point", zero_point)):
        check_device(op, name, tensor, x)
        check_group_shape(op, name, tensor, x, axis)


def check_statistics(op: str, x: torch.Tensor, min_val: torch.Tensor, max_val: torch.Tensor, axis: int | None) -> None:
    """Dtype, device and shape of the running statistics."""
    for name, tensor in (("min_val", min_val), ("max_val", max_val)):
        if tensor.dtype not in X_DTYPES:
            raise TypeError(f"{op}: {name} must be float16, bfloat16, float32 or float64; got {tensor.dtype}")
        check_device(op, name, tensor, x)
        check_group_shape(op, name, tensor, x, axis)
    if min_val.dtype != max_val.dtype:
        raise TypeError(f"{op}: min_val and max_val must have one dtype; got {min_val.dtype} and {max_val.dtype}")


def check_dy(op: str, dy: torch.Tensor, x: torch.Tensor) -> None:
    """`dy`, the gradient of an elementwise operator's result, must be like x."""
    if dy.dtype != x.dtype:
        raise TypeError(f"{op}: dy must have x's dtype ({x.dtype}); got {dy.dtype}")
    if dy.shape != x.shape:
        raise ValueError(f"{op}: dy must have x's shape {tuple(x.shape)}; got {tuple(dy.shape)}")
    check_device(op, "dy", dy, x)


def check_flag(op: str, name: str, flag: torch.Tensor | None, x: torch.Tensor) -> None:
    """A device flag: 1 integer element where x is, or None."""
    if flag is None:
        return
    if flag.dtype not in FLAG_DTYPES:
        raise TypeError(f"{op}: {name} must be uint8, int32, int64 or bool; got {flag.dtype}")
    if flag.numel() != 1:
        raise ValueError(f"{op}: {name} must have 1 element; got shape {tuple(flag.shape)}")
    check_device(op, name, flag, x)


def check_workspace(op: str, workspace: torch.Tensor | None, x: torch.Tensor) -> None:
    """The last-block counter: at least 1 int32 element where x is, or None."""
    if workspace is None:
        return
    if workspace.dtype != torch.int32:
        raise TypeError(f"{op}: workspace must be int32; got {workspace.dtype}")
    if workspace.numel() < 1:
        raise ValueError(f"{op}: workspace must have at least 1 element; got shape {tuple(workspace.shape)}")
    check_device(op, "workspace", workspace, x)
