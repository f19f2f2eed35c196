"""The examples of `make demo`: run without a C++ compiler, end in bit-equality, and would say so if they did not."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ROOT / "examples" / "digits_qat.py"
LSQ = ROOT / "examples" / "digits_lsq.py"

pytest.importorskip("sklearn", reason="the digits come with scikit-learn (extra: demo)")


def load(path: Path) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    return load(DIGITS)


@pytest.fixture(scope="module")
def lsq(digits: ModuleType) -> ModuleType:
    """It imports the other example, which is loaded already."""
    return load(LSQ)


def run(example: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A few steps of everything; without C++ compiler torch.compile falls back, so this takes seconds."""
    env = os.environ | {"CXX": "no-such-compiler", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(example), "--device", "cpu", "--float-steps", "5", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)


def test_digits_without_a_compiler() -> None:
    done = run(DIGITS, "--steps", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no C++ compiler found" in done.stdout
    assert done.stdout.count("after 3 steps: equal in 10 of 10 layers") >= 2
    assert done.stdout.count("whole state_dict, weights and statistics: bit-equal") == 2
    assert "NOT equal" not in done.stdout


def test_digits_comparison_finds_one_ulp(digits: ModuleType) -> None:
    scale, zero_point = torch.tensor([0.1, 0.2]), torch.tensor([3, 4], dtype=torch.int32)
    reference = {"a": (scale, zero_point), "b": (scale.clone(), zero_point.clone())}
    assert digits.compare(reference, reference) == "equal in 2 of 2 layers"
    off_by_one_ulp = torch.nextafter(scale, torch.tensor(1.0))
    assert digits.compare(reference, reference | {"b": (off_by_one_ulp, zero_point)}).startswith(
        "equal in 1 of 2 layers"
    )
    assert "zero point 1" in digits.compare(reference, reference | {"a": (scale, zero_point + 1)})


def test_lsq_without_a_compiler() -> None:
    """Past the change of stages, at the bits where weights and activations are fewest, and with int8 operators."""
    done = run(LSQ, "--steps", "12", "--bits", "8", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no C++ compiler found" in done.stdout
    lines = [line.split() for line in done.stdout.splitlines()]
    for bits in ("8", "2"):
        losses, row = (
            [line for line in lines if line[:2] == [bits, "LSQ,"] and line[3] == "eager"][i] for i in (0, -1)
        )
        assert losses[4] == "0.0e+00" and int(losses[6]) > 10, "equal through the observing steps and the first after"
        assert row[4] != "0.0", "accuracy"
    compiled = [line for line in lines if line[1:4] == ["LSQ,", "qkernels,", "compiled"]]
    assert [line[-3] for line in compiled[2:]] == ["1", "1"], "one graph through all stages"


def test_lsq_comparison_finds_one_ulp(lsq: ModuleType) -> None:
    def variant(name: str, first: float) -> SimpleNamespace:
        return SimpleNamespace(name=name, losses=[first, 2.0])

    one_ulp = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)).item()
    for first, equal in ((1.0, True), (one_ulp, False), (float("nan"), False)):
        variants = [variant(lsq.TORCH_AO, 1.0), variant(lsq.EAGER, first), variant(lsq.COMPILED, 1.5)]
        assert lsq.compare_losses(8, variants) is equal


def test_lsq_exit_status(lsq: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first loss outside its bound ends in 1; what is printed about the runs is not of interest here."""
    monkeypatch.setattr(lsq, "run_bits", lambda *args: [])
    monkeypatch.setattr(lsq, "report", lambda *args: None)
    for within, status in ((True, 0), (False, 1)):
        monkeypatch.setattr(lsq, "compare_losses", lambda bits, variants, within=within: within or bits != 4)
        assert lsq.main(["--device", "cpu", "--float-steps", "1", "--threads", str(torch.get_num_threads())]) == status
