"""Imports go one way, modules -> ops -> qkernels -> autotune, and Triton stays out of what `ops` and `modules` load."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A folder may import its own level and the ones below it, never the ones above.
LEVELS = ("autotune", "qkernels", "ops", "modules")
# Loaded only inside functions, on the first CUDA tensor, so that a machine without Triton can use the CPU path.
LAZY = ("triton",)
# Third-party packages that `ops` and `modules` may import at module level.
THIRD_PARTY = ("torch", "numpy")  # torch imports numpy itself
STANDARD_LIBRARY = sys.stdlib_module_names


def level_of(module: str) -> str | None:
    """The folder that a module of this project lives in; None for other people's modules."""
    parts = module.split(".")
    if parts[0] != "qkernels":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in LEVELS else "qkernels"


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def statements(body: list[ast.stmt], *, inside_functions: bool) -> Iterator[ast.stmt]:
    """The statements that importing the file runs; with `inside_functions` those of its functions too."""
    for node in body:
        if is_type_checking(node):
            continue
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not inside_functions:
            continue
        for field in ("body", "orelse", "finalbody", "handlers"):
            children = getattr(node, field, [])
            for child in children:
                if isinstance(child, ast.ExceptHandler):
                    yield from statements(child.body, inside_functions=inside_functions)
                else:
                    yield from statements([child], inside_functions=inside_functions)


def imported(source: str, package: str, *, inside_functions: bool) -> list[str]:
    """Full names that a file imports. `from qkernels import ops` counts as qkernels.ops, relative ones are resolved."""
    names = []
    for node in statements(ast.parse(source).body, inside_functions=inside_functions):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names += [f"{base}.{alias.name}" for alias in node.names]
    return names


def violations(source: str, folder: str, package: str) -> list[str]:
    """What in a file of `folder` breaks the rules; one line each."""
    above = LEVELS[LEVELS.index(folder) + 1 :]
    found = [
        f"{folder} imports {name}, which is above it"
        for name in imported(source, package, inside_functions=True)
        if level_of(name) in above
    ]
    if folder not in ("ops", "modules"):
        return found
    for name in imported(source, package, inside_functions=False):
        top = name.split(".")[0]
        if top in LAZY:
            found.append(f"{folder} imports {name} at module level")
        elif top not in THIRD_PARTY and top not in STANDARD_LIBRARY and top != "qkernels":
            found.append(
                f"{folder} imports {name} at module level: only torch, numpy, the standard library and qkernels may be"
            )
    return found


def package_of(path: Path) -> str:
    """The package whose file this is, by its installed name."""
    folders = path.parent.relative_to(ROOT).parts
    return ".".join(folders if folders[0] == "qkernels" else ("qkernels", *folders))


# The one module that exists for torchao; nothing imports it but who asks for it by name.
TORCHAO_FACE = ROOT / "modules" / "pt2e.py"

SOURCES = [path for level in LEVELS for path in sorted((ROOT / level).rglob("*.py"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    found = violations(path.read_text(encoding="utf-8"), folder, package_of(path))
    if path == TORCHAO_FACE:
        found = [text for text in found if " imports torchao." not in text]
    assert found == []


def test_every_folder_was_read() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == set(LEVELS)


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("autotune", "from qkernels.layout import plan"),
        ("autotune", "def f():\n    import qkernels.ops"),
        ("qkernels", "from qkernels.ops import aminmax"),
        ("qkernels", "from qkernels import ops"),
        ("qkernels", "try:\n    pass\nexcept ImportError:\n    from qkernels.modules import FakeQuantize"),
        ("ops", "def f():\n    from ..modules import FakeQuantize"),
        ("ops", "import triton"),
        ("ops", "if True:\n    import triton.language as tl"),
        ("ops", "class A:\n    import triton"),
        ("modules", "import torchao"),
        ("modules", "from scipy import stats"),
    ],
)
def test_a_planted_fault_is_found(folder: str, source: str) -> None:
    package = "qkernels" if folder == "qkernels" else f"qkernels.{folder}"
    assert violations(source, folder, package) != []


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("ops", "def f():\n    import triton"),
        ("ops", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import triton"),
        ("ops", "import torch\nfrom qkernels.layout import plan"),
        ("modules", "from qkernels.ops import aminmax\nfrom . import core"),
        ("qkernels", "import triton\nfrom qkernels.autotune import heuristics"),
    ],
)
def test_what_is_allowed_passes(folder: str, source: str) -> None:
    package = "qkernels" if folder == "qkernels" else f"qkernels.{folder}"
    assert violations(source, folder, package) == []
