"""Launch configurations: heuristics that need no GPU, tuned ones from files, and an offline tuner.

Launchers ask `qkernels.autotune.lookup`; `python -m qkernels.autotune` tunes. See docs/tuning.md.
"""

from __future__ import annotations

from qkernels.autotune.config import FlatConfig, LaunchConfig, TiledConfig
from qkernels.autotune.lookup import (
    flat_accumulation,
    flat_elementwise,
    flat_reduction,
    reload,
    tiled_accumulation,
    tiled_elementwise,
    tiled_reduction,
)

__all__ = [
    "FlatConfig",
    "LaunchConfig",
    "TiledConfig",
    "flat_accumulation",
    "flat_elementwise",
    "flat_reduction",
    "reload",
    "tiled_accumulation",
    "tiled_elementwise",
    "tiled_reduction",
]
