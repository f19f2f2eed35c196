"""The example of `make demo`: runs without a C++ compiler, ends in bit-equality, and would say so if it did not."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ROOT / "examples" / "digits_qat.py"

pytest.importorskip("sklearn", reason="the digits come with scikit-learn (extra: demo)")


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("digits_qat", DIGITS)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["digits_qat"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def test_digits_without_a_compiler() -> None:
    """A few steps of everything; without C++ compiler torch.compile falls back, so this takes seconds."""
    env = os.environ | {"CXX": "no-such-compiler", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(DIGITS), "--device", "cpu", "--float-steps", "5", "--steps", "3"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
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
