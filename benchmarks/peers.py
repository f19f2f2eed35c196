"""The peers: who else does the job, whether they are installed, and how they are called."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

OURS = "qkernels"
TORCH = "torch"
COMPILED = "torch.compile"
TORCHAO = "torchao"
MODELOPT = "ModelOpt"
FLAGGEMS = "FlagGems"


@dataclass(frozen=True)
class Package:
    """A peer that is a package of its own: what is imported, and what it is called in a package index."""

    module: str
    distribution: str


PACKAGES = {
    TORCHAO: Package("torchao", "torchao"),
    MODELOPT: Package("modelopt", "nvidia-modelopt"),
    FLAGGEMS: Package("flag_gems", "flag_gems"),
}


def version(distribution: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def absence(peer: str, device: torch.device) -> str | None:
    """Why a peer cannot take part on a device; None where it can."""
    package = PACKAGES.get(peer)
    if package is not None and importlib.util.find_spec(package.module) is None:
        return f"not installed (package {package.distribution})"
    if peer == FLAGGEMS and device.type != "cuda":
        return "its Triton kernels need a GPU"
    return None


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """torchao reports CUDA extensions that do not load, which says nothing about its Python modules."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as sink, contextlib.redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def load(module: str, name: str) -> Any:
    """An attribute of a peer's module.

    Raises:
        ImportError: there is no such module or attribute; versions of a peer differ.
    """
    with quiet_imports():
        found = importlib.import_module(module)
    try:
        return getattr(found, name)
    except AttributeError as error:
        raise ImportError(f"{module} has no {name}") from error


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as Inductor compiles it, on first call, for the very shape and dtype of its input."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def modelopt_fake_quantize(amax: Tensor) -> Callable[[Tensor], Tensor]:
    """ModelOpt's INT8: symmetric, codes -127 to 127, range given by the largest magnitude.

    Source: modelopt/torch/quantization/tensor_quant.py, `fake_tensor_quant(inputs, amax, bias, num_bits, ...)`.
    """
    function = load("modelopt.torch.quantization.tensor_quant", "fake_tensor_quant")
    return lambda x: function(x, amax)


def flaggems_aminmax(axis: int | None) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """FlagGems' aminmax, over everything or over all dimensions but one.

    Source: src/flag_gems/ops/aminmax.py, `aminmax(inp, dim=None, keepdim=False)`; dim may be a list.
    """
    function = load("flag_gems.ops.aminmax", "aminmax")
    if axis is None:
        return lambda x: tuple(function(x))
    return lambda x: tuple(function(x, [d for d in range(x.ndim) if d != axis % x.ndim]))
