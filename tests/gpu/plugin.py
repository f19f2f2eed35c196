"""A pytest plugin for GPU machines, where one may install nothing: shards, and tests that lack Hypothesis skip.

python -m pytest -p tests.gpu.plugin --shard 0/4 --device cuda
"""

from __future__ import annotations

import functools
import importlib.machinery
import inspect
import sys
import types
import zlib
from collections.abc import Callable
from typing import Any

import pytest

REASON = "hypothesis is not installed"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="0/1", metavar="K/N", help="run the K-th (from 0) of N parts of the tests")


def shard_of(config: pytest.Config) -> tuple[int, int]:
    text = config.getoption("--shard")
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and int(number) < int(parts)):
        raise pytest.UsageError(f"--shard must be K/N with K below N; got {text!r}")
    return int(number), int(parts)


def pytest_configure(config: pytest.Config) -> None:
    shard_of(config)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """All parameters of a test stay in one shard: they compile the same kernels."""
    number, parts = shard_of(config)
    mine = [zlib.crc32(item.nodeid.partition("[")[0].encode()) % parts == number for item in items]
    config.hook.pytest_deselected(items=[item for item, keep in zip(items, mine, strict=True) if not keep])
    items[:] = [item for item, keep in zip(items, mine, strict=True) if keep]


# --- without Hypothesis ----------------------------------------------------------------------------------------------


class Anything:
    """Stands for strategies and whatever is made of them; nothing draws from it, since the tests are skipped."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def __or__(self, other: Any) -> Any:
        return self


class Settings:
    """Leaves a test as it is."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, test: Any) -> Any:
        return test

    @staticmethod
    def register_profile(*args: Any, **kwargs: Any) -> None:
        pass

    @staticmethod
    def load_profile(*args: Any, **kwargs: Any) -> None:
        pass


def given(*strategies: Any, **named: Any) -> Callable[[Callable[..., Any]], Any]:
    """A skipped test that asks for the arguments which the strategies would not have given."""

    def decorate(test: Callable[..., Any]) -> Any:
        signature = inspect.signature(test)
        left = [parameter for name, parameter in signature.parameters.items() if name not in named]

        @functools.wraps(test)
        def skipped(*args: Any, **kwargs: Any) -> None:
            raise AssertionError(REASON)

        skipped.__signature__ = signature.replace(parameters=left[: len(left) - len(strategies)])  # type: ignore[attr-defined]
        return pytest.mark.skip(reason=REASON)(skipped)

    return decorate


def without_hypothesis() -> dict[str, types.ModuleType]:
    """The modules that stand for `hypothesis` and `hypothesis.strategies`."""
    package, strategies = types.ModuleType("hypothesis"), types.ModuleType("hypothesis.strategies")
    anything = Anything()
    vars(strategies)["__getattr__"] = lambda name: getattr(anything, name)
    vars(package).update(
        __path__=[], given=given, settings=Settings, strategies=strategies, __getattr__=vars(strategies)["__getattr__"]
    )
    modules = {"hypothesis": package, "hypothesis.strategies": strategies}
    for name, module in modules.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)  # torch._dynamo asks every module for it
    return modules


try:
    import hypothesis  # noqa: F401
except ImportError:
    sys.modules.update(without_hypothesis())
