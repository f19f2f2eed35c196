"""The stage of a learnable fake quantizer that lasts, on the CPU, in eager mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qkernels.launch import INTERPRETED
from qkernels.ops import learnable_fake_quantize
from qkernels.ops.compositions import GRAD_ELEMENTS, gradient_factor
from qkernels.ops.registration import runs_directly
from qkernels.ops.small_cpu import (
    is_known_on,
    is_range,
    is_small,
    learn_per_tensor,
    learnable_fake_quantize_by_torch,
)

SYMMETRIC = (torch.per_tensor_symmetric, torch.per_channel_symmetric)


def learn_on_cpu(quantizer: Any, X: Tensor) -> Tensor | None:
    """A step that neither observes nor passes x on, for float32, in as little Python as can be; else None.

    Between the layers of a network this code has left the caches: what it does not look up is what makes it fast.
    """
    # Module.__getattr__ takes half a microsecond for each.
    parameters, buffers = quantizer._parameters, quantizer._buffers
    scale, zero_point, eps = parameters.get("scale"), parameters.get("zero_point"), buffers.get("eps")
    if not quantizer.short_ways or quantizer.frozen or INTERPRETED or not runs_directly(X, scale, zero_point, eps):
        return None
    if not (X.is_cpu and scale.is_cpu and zero_point.is_cpu and X.dtype == scale.dtype == torch.float32):
        return None
    for name in quantizer.observing_flags:
        flag = buffers.get(name)
        if flag is None or flag.item():
            return None
    flag = buffers.get("fake_quant_enabled")
    if flag is None or not is_known_on(flag) or X.numel() == 0:
        return None
    if not quantizer.is_per_channel:
        return _learn_one_scale(quantizer, X, scale, zero_point, eps)
    axis = quantizer.ch_axis
    if type(axis) is not int or not -X.ndim <= axis < X.ndim:
        return None
    if not scale.shape == zero_point.shape == (X.shape[axis],):
        return None
    quantizer.keep_valid()
    arguments = quantizer.operator_arguments(X, scale, zero_point)
    y = learnable_fake_quantize_by_torch(*arguments)
    return learnable_fake_quantize(*arguments) if y is None else y


def _learn_one_scale(quantizer: Any, X: Tensor, scale: Tensor, zero_point: Tensor, eps: Tensor) -> Tensor | None:
    """The rest of `learn_on_cpu`, per tensor."""
    if not scale.shape == zero_point.shape == eps.shape == (1,):
        return None
    step, code = scale.item(), zero_point.item()
    if not step >= eps.item() or (code and quantizer.qscheme in SYMMETRIC):
        quantizer.keep_valid()
        step, code = scale.item(), zero_point.item()
    quant_min, quant_max, factor = quantizer.quant_min, quantizer.quant_max, quantizer.grad_factor
    learning = quantizer._buffers.get("gradient_enabled")
    if (
        is_small(X)
        and zero_point.dtype == torch.float32
        and quantizer.grad_mask == "rounded"
        and quantizer.grad_scale_elements in GRAD_ELEMENTS
        and is_range(quant_min, quant_max)
        and quant_max >= 1
        and learning is not None
        and is_known_on(learning)
    ):
        if factor is None:
            elements = quantizer.grad_scale_elements if quantizer.use_grad_scaling else None
            factor = gradient_factor(X, quant_max, 1.0, None, elements)
        y = learn_per_tensor(X, scale, zero_point, (step, code), quant_min, quant_max, factor)
        if y is not None:
            return y
    return learnable_fake_quantize(*quantizer.operator_arguments(X, scale, zero_point))
