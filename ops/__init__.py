"""Operators: torch.ops.qkernels.* and the plain functions of the same names."""

from __future__ import annotations

from qkernels.ops.fake_quant import fake_quantize, fake_quantize_backward
from qkernels.ops.histogram import histogram, observe_histogram_
from qkernels.ops.histogram_merge import merge_histograms
from qkernels.ops.histogram_qparams import search_histogram_qparams, update_qparams_from_histogram_
from qkernels.ops.histogram_search import search_histogram_range
from qkernels.ops.lsq import learnable_fake_quantize, learnable_fake_quantize_backward
from qkernels.ops.minmax import aminmax, observe_minmax_
from qkernels.ops.qparams import choose_qparams
from qkernels.ops.update_qparams import update_qparams_

__all__ = [
    "aminmax",
    "choose_qparams",
    "fake_quantize",
    "fake_quantize_backward",
    "histogram",
    "learnable_fake_quantize",
    "learnable_fake_quantize_backward",
    "merge_histograms",
    "observe_histogram_",
    "observe_minmax_",
    "search_histogram_qparams",
    "search_histogram_range",
    "update_qparams_",
    "update_qparams_from_histogram_",
]
