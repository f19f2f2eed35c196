"""Launching: the right device, no contraction, NVTX ranges, and the version counters of what a kernel wrote."""

from __future__ import annotations

import os
from typing import Any

import torch

from qkernels import profiling

# Whether Triton interprets kernels, on CPU tensors. Triton reads the variable when a kernel is decorated, and in
# these spellings.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a Triton kernel on the device of its first tensor argument.

    A direct Triton launch runs on the *current* device, so the device is switched when the tensors live on another.
    FP contraction is off for every kernel: a fused multiply-add is written `fma` where it is meant, and nowhere else,
    so that all targets round as the CPU does. With `qkernels.nvtx_ranges` the launch is a range of the kernel's name.
    """
    device = args[0].device
    domain = profiling.domain  # read once, so that what was opened is closed whoever turns the switch meanwhile
    if domain is not None:
        domain.push_range(profiling.attributes(domain, kernel.__name__))
    try:
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                kernel[grid](*args, enable_fp_fusion=False, **options)
        else:
            kernel[grid](*args, enable_fp_fusion=False, **options)
    finally:
        if domain is not None:
            domain.pop_range()


def mark_written(*tensors: torch.Tensor) -> None:
    """Bump the version counters of tensors that a kernel wrote through raw pointers, as an in-place op would."""
    # An inference tensor has no counter, and autograd never saves it.
    torch.autograd.graph.increment_version([tensor for tensor in tensors if not tensor.is_inference()])
