"""Launch configurations. Heuristics for now: pure functions of size and device that need no GPU to be tested."""

from __future__ import annotations

from qkernels.autotune.heuristics import (
    FlatConfig,
    TiledConfig,
    flat_elementwise,
    flat_reduction,
    tiled_elementwise,
    tiled_reduction,
)

__all__ = [
    "FlatConfig",
    "TiledConfig",
    "flat_elementwise",
    "flat_reduction",
    "tiled_elementwise",
    "tiled_reduction",
]
