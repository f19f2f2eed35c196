"""What every test shares: the device, the choice between interpreter and ordinary run, seeds and private caches."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Inductor's disk cache does not notice a changed fake or decomposition, so every process gets an empty one. Set before
# torch is imported; pytest-xdist's workers run this file too and so have one each.
_CACHE_DIR = tempfile.mkdtemp(prefix="qkernels-inductor-")
atexit.register(shutil.rmtree, _CACHE_DIR, ignore_errors=True)
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _CACHE_DIR
# Inductor compiles in the process that asks. Its pool of helpers gains nothing beside two workers on two cores and
# may outlive the processes that tests start, holding their pipes open.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import torch  # noqa: E402

_LANES = Path(__file__).resolve().parent / "lanes"
INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device of the tensors under test: cpu (default) or cuda")


def pytest_configure(config: pytest.Config) -> None:
    device = torch.device(config.getoption("--device"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device {device}: torch sees no CUDA device")
    if device.type == "cuda" and INTERPRETER:
        raise pytest.UsageError(
            "--device cuda and TRITON_INTERPRET=1 exclude each other: the interpreter runs on the CPU"
        )
    _load_hypothesis_profile()
    if INTERPRETER:
        from tests.lanes import interpreter_speed

        interpreter_speed.install()
        # Masked lanes compute too, on whatever they hold; NumPy says so where a GPU would not.
        config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


def _load_hypothesis_profile() -> None:
    """The same examples in every run: a failure on one machine is a failure on all."""
    try:
        from hypothesis import HealthCheck, settings
    except ImportError:  # a GPU machine without the test extra; the property tests then say so themselves
        return
    settings.register_profile(
        "qkernels",
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
    settings.load_profile("qkernels")


@pytest.hookimpl(tryfirst=True)  # before `-m` selects, which has to see the marker added here
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep what this process can run.

    With the interpreter: only tests marked `interpreter` (or `interpreter_only`, which implies it). Without: all but
    `interpreter_only`. On the CPU: nothing marked `cuda`. On a GPU: no GPU-free lanes, which say nothing about it and
    replace parts of torch.cuda. Deselected rather than skipped, because another command runs them.
    """
    device = torch.device(config.getoption("--device"))
    keep, drop = [], []
    for item in items:
        if item.get_closest_marker("interpreter_only"):
            item.add_marker("interpreter")
        wanted = bool(item.get_closest_marker("interpreter")) if INTERPRETER else not _has(item, "interpreter_only")
        wanted &= not (_LANES in item.path.parents if device.type == "cuda" else _has(item, "cuda"))
        (keep if wanted else drop).append(item)
    if drop:
        config.hook.pytest_deselected(items=drop)
        items[:] = keep


def _has(item: pytest.Item, marker: str) -> bool:
    return item.get_closest_marker(marker) is not None


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device under test."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def inductor_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An Inductor cache of this test's own, for tests that look into it or start processes that share it."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> Iterator[None]:
    """Reset Dynamo after a test that compiled something: recompile limits and counters must not leak into the next."""
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and any(dynamo.utils.counters.values()):
        dynamo.reset()
        dynamo.utils.counters.clear()
