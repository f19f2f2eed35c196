"""What a tuned configuration holds for: the GPU, the versions of torch and Triton, and the sources of the kernels."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from qkernels.autotune.decision import FUNCTIONS


@dataclass(frozen=True)
class Machine:
    """A GPU and what compiles for it.

    Attributes:
        gpu: its name, as torch gives it.
        capability: sm_90, or the architecture's name on AMD.
        torch: torch's version.
        triton: Triton's version.
    """

    gpu: str
    capability: str
    torch: str
    triton: str

    def __str__(self) -> str:
        return f"{self.gpu}, {self.capability}, torch {self.torch}, triton {self.triton}"

    @property
    def slug(self) -> str:
        """The GPU's name as part of a file name: nvidia-h200."""
        return slug_of(self.gpu)


def slug_of(gpu: str) -> str:
    """A GPU's name in lower-case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


@lru_cache(maxsize=16)
def machine_of(device: torch.device) -> Machine | None:
    """The machine that a CUDA device is part of; None for any other device."""
    if device.type != "cuda":
        return None
    import triton  # a launch is near, so it is loaded or about to be

    properties = torch.cuda.get_device_properties(device)
    capability = properties.gcnArchName if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    return Machine(properties.name, capability, str(torch.__version__), triton.__version__)


def kernel_folder() -> Path:
    """The folder with the kernels' sources, found without importing them."""
    spec = importlib.util.find_spec("qkernels")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the sources of qkernels cannot be found")
    return Path(spec.origin).parent


@lru_cache(maxsize=64)
def kernel_hash(function: str, folder: Path | None = None) -> str:
    """A hash of the kernels that one function of `FUNCTIONS` serves; another one makes tuned configurations stale.

    Raises:
        OSError: a source cannot be read.
    """
    folder = folder or kernel_folder()
    digest = hashlib.sha256()
    for name in FUNCTIONS[function].sources:
        source = (folder / name).read_bytes()
        digest.update(f"{name} {len(source)}\n".encode() + source)
    return digest.hexdigest()[:16]
