"""Whole QAT steps: the networks, the ways, the row."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import models, qat
from benchmarks.models import LARGE_MODELS, MODELS
from benchmarks.timer import Spread
from tests.benchmarks.support import CPU


def test_resnets_have_the_shapes_of_the_paper() -> None:
    """Parameters of torchvision's resnet18 and resnet50 but for their classifiers of 1000 classes."""
    expected = {"resnet18": (11_689_512, 512), "resnet50": (25_557_032, 2048)}
    for name, (parameters, width) in expected.items():
        model, x = LARGE_MODELS[name]()
        assert sum(p.numel() for p in model.parameters()) == parameters - 1000 * (width + 1) + 10 * (width + 1)
        assert x.shape == (8, 3, 64, 64)
        assert model[:-3](x).shape == (8, width, 2, 2)  # halved by the stem, the pool and three stages
    model, _ = models.gpt_block()
    assert sum(p.numel() for p in model[0].parameters()) == 7_087_872  # a layer of GPT-2 small


def small_gpt() -> models.Made:
    return nn.Sequential(models.GPTBlock(16, 2), models.LastToken(), nn.Linear(16, 10)), torch.randn(2, 4, 16)


def small_resnet() -> models.Made:
    return models.resnet(models.bottleneck, 4, (1, 1), width=8), torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize("make", [small_gpt, small_resnet])
def test_all_eager_ways_train(make: object) -> None:
    """The same losses from torch.ao's quantizers and ours, in a network of each kind."""
    steps, absent, x = qat.variants(make, CPU, compiles=False)  # type: ignore[arg-type]  # a parameter of pytest
    assert list(steps) == ["float, eager", "torch.ao, eager", "qkernels, eager"]
    assert absent == {"torch.ao, CUDA graph": "no GPU", "qkernels, CUDA graph": "no GPU"}
    samples = qat.measure(steps, 2)
    assert {key: len(values) for key, values in samples.items()} == dict.fromkeys(steps, 2 * qat.STEPS_OF_A_TURN)
    found = qat.row_of("gpt block", samples, absent, x)
    assert found.ratios.keys() == {"torch.ao eager / ours eager"}


def test_a_turn_starts_with_a_step_that_is_not_timed() -> None:
    called: list[str] = []
    samples = qat.measure({name: lambda name=name: called.append(name) for name in "abc"}, 5)  # type: ignore[misc]  # bound by its default
    turn = 1 + qat.STEPS_OF_A_TURN
    turns = [called[start : start + turn] for start in range(0, len(called), turn)]
    assert all(len(set(steps)) == 1 and len(steps) == turn for steps in turns)
    rounds = [[steps[0] for steps in turns[start : start + 3]] for start in range(0, len(turns), 3)]
    assert len(rounds) == 5 and all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len({tuple(order) for order in rounds}) > 1  # nobody always comes after the same
    assert {len(values) for values in samples.values()} == {5 * qat.STEPS_OF_A_TURN}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_glibc_takes_the_allocators_settings() -> None:
    """In a process of its own: they stay."""
    code = "from benchmarks.allocator import keep_freed_memory; assert keep_freed_memory()"
    subprocess.run([sys.executable, "-c", code], timeout=300, check=True)


def test_a_wrong_model_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def spoil(model: nn.Module) -> None:
        with torch.no_grad():
            next(model.parameters()).add_(1.0)

    monkeypatch.setattr(qat.qkernels, "swap", spoil)
    assert qat.main(["--model", "digits"]) == 1
    said = capsys.readouterr().out
    assert "digits: WRONG: " in said
    assert "of 640 values differ" in said
    assert "milliseconds" not in said


def test_every_way_steps_the_parameters() -> None:
    torch.manual_seed(0)
    model, x = models.digits_cnn()
    before = [p.detach().clone() for p in model.parameters()]
    qat.step_of(model, model, x)
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


SAMPLES = {
    "float, eager": [1000.0, 1100.0],
    "float, compiled": [500.0, 700.0],
    "torch.ao, eager": [3000.0, 3000.0],
    "qkernels, eager": [4000.0, 4000.0],
    "qkernels, compiled": [1000.0, 1000.0],
}


def test_the_row_has_medians_ratios_and_spreads() -> None:
    found = qat.row_of("digits", SAMPLES, {}, torch.zeros(64, 1, 8, 8))
    assert found.case == "QAT step, digits"
    assert found.milliseconds["float, compiled"] == 0.6
    assert found.ratios == {
        "torch.ao eager / ours eager": 0.75,
        "torch.ao eager / ours compiled": 3.0,
        "ours compiled / float compiled": pytest.approx(1 / 0.6),
    }
    assert found.timings["torch.ao, eager"].times_ours == Spread(3.0, 3.0, 3.0)
    assert found.why == f"{qat.EAGER_CALLS}; {qat.WORK_BESIDE_FLOAT}"
    assert "torch.ao, eager" in qat.text(found)
    slower = {**SAMPLES, "torch.ao, eager": [900.0, 900.0]}
    assert "no explanation is known" in (qat.row_of("digits", slower, {}, torch.zeros(1)).why or "")
    both = {**slower, "float, compiled": [1500.0, 1500.0]}
    assert qat.SLOW_COMPILED in (qat.row_of("digits", both, {}, torch.zeros(1)).why or "")
    faster = {**SAMPLES, "qkernels, eager": [2000.0, 2000.0], "float, compiled": [1500.0, 1500.0]}
    assert qat.row_of("digits", faster, {}, torch.zeros(1)).why is None


def test_the_command_writes_rows_like_the_other_suites(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(qat, "variants", lambda make, device: ({}, {"torch.ao, compiled": "it broke"}, torch.zeros(2)))
    monkeypatch.setattr(qat, "measure", lambda steps, rounds: SAMPLES)
    path = tmp_path / "qat.json"
    assert qat.main(["--model", "digits", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["environment"]["suite"] == "qat"
    (row,) = found["rows"]
    assert {"model", "milliseconds", "ratios", "case", "input", "how", "timings", "absent", "why"} <= row.keys()
    assert "not measured: torch.ao, compiled: it broke" in capsys.readouterr().out
    assert set(MODELS) >= {"resnet18", "resnet50", "gpt block"}


@pytest.mark.parametrize(
    ("line", "message"), [("--model nonesuch", "invalid choice: 'nonesuch'"), ("--rounds 0", "above 0; got '0'")]
)
def test_wrong_arguments(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        qat.main(line.split())
    assert message in capsys.readouterr().err
