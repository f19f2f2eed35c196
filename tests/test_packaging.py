"""The distribution: packages, version, types; importing it from a checkout, without Triton, without torch.ao."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from setuptools import find_packages

import qkernels

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest there

ROOT = Path(__file__).resolve().parent.parent
PACKAGE_FOLDERS = {
    "qkernels": "qkernels",
    "qkernels.ops": "ops",
    "qkernels.modules": "modules",
    "qkernels.autotune": "autotune",
}


def project_table() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def run_python(code: str, *, cwd: Path, **environment: str) -> str:
    """What a fresh process prints, with the checkout on sys.path and the kernels out of the interpreter."""
    env = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    env |= {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_package_list_agrees_with_the_folders() -> None:
    table = project_table()["tool"]["setuptools"]
    on_disk = set()
    for name, folder in table["package-dir"].items():
        on_disk |= {name} | {f"{name}.{inner}" for inner in find_packages(ROOT / folder)}
    assert set(table["packages"]) == on_disk
    assert table["package-dir"] == PACKAGE_FOLDERS
    assert all((ROOT / folder / "__init__.py").is_file() for folder in PACKAGE_FOLDERS.values())


def test_version_is_single_sourced() -> None:
    """qkernels.__version__ is the one place; the wheel test below sees that its file name carries it."""
    table = project_table()
    assert table["project"]["dynamic"] == ["version"]
    assert "version" not in table["project"]
    assert table["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "qkernels.__version__"}


def test_every_requirement_is_pinned() -> None:
    """An unpinned torch pulls another one with gigabytes of CUDA packages, so CI must never resolve by itself."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(str(pin.specifier).startswith("==") for pin in pins)
    project = project_table()["project"]
    wanted = project["dependencies"] + [line for lines in project["optional-dependencies"].values() for line in lines]
    for requirement in map(Requirement, wanted):
        chosen = [pin for pin in pins if pin.name == requirement.name]
        assert chosen, f"{requirement.name} has no line in constraints.txt"
        for pin in chosen:
            version = str(pin.specifier).removeprefix("==")
            assert requirement.specifier.contains(version), f"{pin} is outside {requirement}"


def test_wheel_holds_the_packages_and_nothing_stale(tmp_path: Path) -> None:
    """Built as `make wheel` does it, from a tree with an old build/lib in which a deleted module still lies."""
    tree = tmp_path / "tree"
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_bytes((ROOT / name).read_bytes())
    for folder in PACKAGE_FOLDERS.values():
        for source in (ROOT / folder).rglob("*"):
            if source.is_file() and "__pycache__" not in source.parts:
                target = tree / source.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(source.read_bytes())
    stale = tree / "build" / "lib" / "qkernels" / "deleted_long_ago.py"
    stale.parent.mkdir(parents=True)
    stale.write_text("raise ImportError\n", encoding="utf-8")

    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(tree)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")

    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {"qkernels/py.typed"}
    expected |= {f"qkernels/autotune/tables/{table.name}" for table in (ROOT / "autotune" / "tables").glob("*.json")}
    for package, folder in PACKAGE_FOLDERS.items():
        for source in (ROOT / folder).rglob("*.py"):
            expected.add(f"{package.replace('.', '/')}/{source.relative_to(ROOT / folder).as_posix()}")
    assert packed == expected
    assert wheel.name == f"qkernels-{qkernels.__version__}-py3-none-any.whl"

    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = "import qkernels.ops; print(list(qkernels.__path__), qkernels.ops.__file__)"
    seen = run_python(code, cwd=tmp_path, PYTHONPATH=str(site))
    assert seen == f"{[str(site / 'qkernels')]} {site / 'qkernels' / 'ops' / '__init__.py'}"


def test_checkout_imports_with_the_root_on_the_path(tmp_path: Path) -> None:
    code = "import qkernels.ops, qkernels.modules, qkernels.autotune; print(qkernels.ops.__file__)"
    assert run_python(code, cwd=tmp_path) == str(ROOT / "ops" / "__init__.py")


def test_sub_packages_load_on_first_use(tmp_path: Path) -> None:
    code = (
        "import sys, qkernels\n"
        "before = 'qkernels.ops' in sys.modules\n"
        "print(before, qkernels.ops.__name__, qkernels.autotune.__name__)"
    )
    assert run_python(code, cwd=tmp_path) == "False qkernels.ops qkernels.autotune"


@pytest.mark.parametrize("module", ["qkernels", "qkernels.ops"])
def test_import_leaves_heavy_packages_alone(tmp_path: Path, module: str) -> None:
    """Triton waits for the first CUDA tensor, torch.ao for qkernels.modules; what torch itself loads does not count."""
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        f"import {module}\n"
        "new = set(sys.modules) - before\n"
        "heavy = ('triton', 'torchao', 'torch.ao.quantization', 'sklearn')\n"
        "print(sorted(name for name in new if name.startswith(heavy)))"
    )
    assert run_python(code, cwd=tmp_path) == "[]"


def test_cpu_path_works_without_triton(tmp_path: Path) -> None:
    """A None in sys.modules makes `import triton` fail, as on a machine that has none."""
    code = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import torch, qkernels.ops, qkernels.modules\n"
        "x = torch.tensor([-1.0, 0.24, 0.26, 9.0])\n"
        "y = qkernels.ops.fake_quantize(x, torch.tensor([0.5]), torch.tensor([0], dtype=torch.int32), -8, 7)\n"
        "print(y.tolist(), [bound.item() for bound in qkernels.ops.aminmax(x)])"
    )
    assert run_python(code, cwd=tmp_path) == "[-1.0, 0.0, 0.5, 3.5] [-1.0, 9.0]"
