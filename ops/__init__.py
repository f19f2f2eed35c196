"""Operators: torch.ops.qkernels.* and the plain functions of the same names."""

from __future__ import annotations

from qkernels.ops.fake_quant import fake_quantize, fake_quantize_backward
from qkernels.ops.lsq import learnable_fake_quantize, learnable_fake_quantize_backward
from qkernels.ops.minmax import aminmax, observe_minmax_
from qkernels.ops.qparams import choose_qparams
from qkernels.ops.update_qparams import update_qparams_

__all__ = [
    "aminmax",
    "choose_qparams",
    "fake_quantize",
    "fake_quantize_backward",
    "learnable_fake_quantize",
    "learnable_fake_quantize_backward",
    "observe_minmax_",
    "update_qparams_",
]
