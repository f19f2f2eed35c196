"""Types of command-line arguments that several commands share, each with an error in words."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch


def device(text: str) -> torch.device:
    """A CPU, or a CUDA device that is there."""
    try:
        found = torch.device(text)
    except RuntimeError:
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N; got {text!r}")
    if found.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"torch finds no CUDA device; got {text!r}")
    if (found.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"there are {torch.cuda.device_count()} CUDA devices; got {text!r}")
    return torch.device("cuda", found.index or 0)


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0; got {text!r}")
    return int(text)


def seed(text: str) -> int:
    """A whole number that seeds a generator."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 or more; got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """Seconds, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be seconds, 0 or more; got {text!r}")
    return value


def output(text: str) -> Path:
    """A file that can be written; known before anything is measured."""
    path = Path(text)
    above = next(folder for folder in [path, *path.parents] if folder.exists())
    if path.is_dir() or (above != path and not above.is_dir()):
        raise argparse.ArgumentTypeError(f"must be a file in a folder; got {text!r}")
    return path


def quiet() -> None:
    """torch.ao says on every use that it is deprecated."""
    warnings.filterwarnings("ignore", message="torch.ao.quantization is deprecated")
    warnings.filterwarnings("ignore", module=r"torch\.ao\..*")
