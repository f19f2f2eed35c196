"""NVTX ranges around kernel launches: off unless the environment or a `with` block asks for them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

SWITCH = "QKERNELS_NVTX"

# What `launch` asks: the NVTX domain that ranges go to, or None. Asking costs it 23 ns of the microseconds it takes, a
# range that no profiler listens to 170 ns (median of five runs, one CPU, Python 3.11).
domain: Any = None


def _open_domain() -> Any:
    try:
        import nvtx
    except ImportError as error:
        raise ImportError(f"nvtx_ranges: the package nvtx must be installed for {SWITCH}=1; {error}") from error
    return nvtx.get_domain("qkernels")


@lru_cache(maxsize=256)
def attributes(domain: Any, name: str) -> Any:
    """The attributes of a range called `name`, made once: making them registers the name with the profiler."""
    return domain.get_event_attributes(message=name)


@contextlib.contextmanager
def nvtx_ranges(enabled: bool = True) -> Iterator[None]:
    """Put every kernel launch of a `with` block into an NVTX range, or into none.

    A range has the kernel's name, as on the GPU's own timeline, lies in the NVTX domain "qkernels" and spans the launch
    on the host. `QKERNELS_NVTX=1` in the environment, read when qkernels is imported, does it for a whole process.

    Args:
        enabled: False switches ranges off where the environment has switched them on.

    Raises:
        ImportError: the package nvtx is not installed.

    Note:
        The switch is the process's, not the thread's: autograd launches backward kernels from threads of its own.
        Without a profiler the ranges go nowhere. Code that torch.compile generates launches its own kernels, without
        ranges. See docs/profiling.md.
    """
    global domain
    before = domain
    domain = _open_domain() if enabled else None
    try:
        yield
    finally:
        domain = before


def _read_switch() -> Any:
    value = os.environ.get(SWITCH, "0")
    if value not in ("", "0", "1"):
        raise ValueError(f"{SWITCH} must be 0 or 1; got {value!r}")
    return _open_domain() if value == "1" else None


domain = _read_switch()
