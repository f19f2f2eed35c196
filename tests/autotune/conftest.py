"""A private cache folder and answers that no test leaves to the next."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qkernels.autotune import lookup, tables
from qkernels.autotune.environment import settings
from qkernels.autotune.machine import kernel_hash
from tests.autotune.support import MACHINE


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "cache"
    monkeypatch.setenv("QKERNELS_CACHE_DIR", str(folder))
    monkeypatch.delenv("QKERNELS_AUTOTUNE", raising=False)
    monkeypatch.setattr(tables, "FOLDER", tmp_path / "tables")
    settings.cache_clear()
    lookup.reload()
    yield folder
    settings.cache_clear()
    kernel_hash.cache_clear()
    lookup.reload()


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device that lookups take for a GPU of `MACHINE`."""
    monkeypatch.setattr(lookup, "machine_of", lambda device: MACHINE)
    lookup.reload()
    return torch.device("cpu")
