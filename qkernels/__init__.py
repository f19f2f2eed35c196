"""qkernels: Triton kernels for quantization statistics and quantization-aware training on PyTorch.

The public face. Importing it is cheap: sub-packages load on first use (PEP 562), Triton on the first CUDA tensor,
torch.ao when `qkernels.modules` is first touched.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkernels.profiling import nvtx_ranges

__version__ = "0.1.0.dev0"

# In a checkout the sub-packages `ops`, `modules` and `autotune` lie beside this folder; an install puts them inside it.
_HERE = Path(__file__).resolve().parent
if not (_HERE / "ops").is_dir() and (_HERE.parent / "pyproject.toml").is_file():
    __path__.append(str(_HERE.parent))

if TYPE_CHECKING:
    from qkernels import autotune, modules, ops
    from qkernels.modules import freeze, swap, swap_qconfig_mapping, verify
    from qkernels.ops.warmup import warmup

_SUBPACKAGES = ("autotune", "modules", "ops")
_FUNCTIONS = ("freeze", "swap", "swap_qconfig_mapping", "verify")  # of qkernels.modules

__all__ = [
    "__version__",
    "autotune",
    "freeze",
    "modules",
    "nvtx_ranges",
    "ops",
    "swap",
    "swap_qconfig_mapping",
    "verify",
    "warmup",
]


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(f"{__name__}.modules"), name)
    if name == "warmup":
        return importlib.import_module(f"{__name__}.ops.warmup").warmup
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBPACKAGES, *_FUNCTIONS, "warmup"})
