"""The environment variables of launch configurations, read once. The table of all of them is in docs/tuning.md."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """What the environment asked for when it was first looked at.

    Attributes:
        autotune: whether tuned configurations are used; False leaves the heuristics alone. QKERNELS_AUTOTUNE.
        cache_dir: folder of the user cache. QKERNELS_CACHE_DIR, else qkernels in XDG_CACHE_HOME or ~/.cache.
    """

    autotune: bool
    cache_dir: Path


@lru_cache(maxsize=1)
def settings() -> Settings:
    """The settings of this process.

    Raises:
        ValueError: a variable holds something it cannot mean.
    """
    switch = os.environ.get("QKERNELS_AUTOTUNE", "1")
    if switch not in ("0", "1"):
        raise ValueError(f"QKERNELS_AUTOTUNE must be 0 or 1; got {switch!r}")
    chosen = os.environ.get("QKERNELS_CACHE_DIR")
    if chosen:
        return Settings(switch == "1", Path(chosen).expanduser())
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    return Settings(switch == "1", (Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()) / "qkernels")
