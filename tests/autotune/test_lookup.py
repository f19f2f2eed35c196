"""What launchers get: user cache before table before heuristic, at the cost of a dictionary hit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qkernels.autotune import cache, heuristics, lookup, tables
from qkernels.autotune.config import FlatConfig
from qkernels.autotune.decision import FUNCTIONS, Decision
from qkernels.autotune.environment import Settings, settings
from tests.autotune.support import CPU, FLAT, MACHINE, tuned

ROOT = Path(__file__).resolve().parent.parent.parent
N = FLAT.arguments[0]
SHIPPED = FlatConfig(4096, num_warps=16, programs=132, block_parts=1024)
OWN = FlatConfig(2048, num_warps=4, programs=264, block_parts=1024)


def ship(config: FlatConfig, decision: Decision = FLAT, machine: object = MACHINE) -> Path:
    path = tables.table_path(MACHINE.gpu)
    tables.export(path, MACHINE, [tuned(decision, config)], commit="abc", date="2026-01-02", how="a test")
    return path


def save(config: FlatConfig, cache_dir: Path) -> None:
    cache.save(cache.cache_path(cache_dir, MACHINE), [tuned(FLAT, config)])


def test_user_cache_before_table_before_heuristic(fake_gpu: torch.device, cache_dir: Path) -> None:
    heuristic = heuristics.flat_reduction(N, fake_gpu)
    assert len({heuristic, SHIPPED, OWN}) == 3
    assert lookup.flat_reduction(N, fake_gpu) == heuristic
    ship(SHIPPED)
    assert lookup.flat_reduction(N, fake_gpu) == heuristic  # until somebody asks for another look
    lookup.reload()
    assert lookup.flat_reduction(N, fake_gpu) == SHIPPED
    save(OWN, cache_dir)
    lookup.reload()
    assert lookup.flat_reduction(N, fake_gpu) == OWN
    assert lookup.flat_reduction(N + 1, fake_gpu) == heuristics.flat_reduction(N + 1, fake_gpu)


def test_switched_off_heuristics_decide(
    fake_gpu: torch.device, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ship(SHIPPED)
    save(OWN, cache_dir)
    monkeypatch.setenv("QKERNELS_AUTOTUNE", "0")
    settings.cache_clear()
    lookup.reload()
    assert lookup.flat_reduction(N, fake_gpu) == heuristics.flat_reduction(N, fake_gpu)


def test_a_device_without_cuda_has_heuristics_alone(cache_dir: Path) -> None:
    ship(SHIPPED)
    save(OWN, cache_dir)
    lookup.reload()
    assert lookup.flat_reduction(N, CPU) == heuristics.flat_reduction(N, CPU)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_function_answers_as_its_heuristic(function: str, fake_gpu: torch.device) -> None:
    """The same arguments by the same names; flat_elementwise alone is given a device that its heuristic ignores."""
    values = {"n": 5000, "itemsize": 2, "n_rows": 64, "run": 196, "channels": 96, "channel_innermost": False}
    arguments = {name: values[name] for name in FUNCTIONS[function].arguments}
    device = {} if function == "flat_elementwise" else {"device": fake_gpu}
    heuristic = getattr(heuristics, function)(**arguments, **device)
    assert getattr(lookup, function)(**arguments, device=fake_gpu) == heuristic
    decision = Decision(function, tuple(arguments.values()))
    with lookup.recorded() as record:
        getattr(lookup, function)(**arguments, device=fake_gpu)
    assert record == [(decision, heuristic)]


@pytest.mark.parametrize("damaged", ["cache", "table"])
def test_damage_is_one_warning_and_the_next_best_answer(damaged: str, fake_gpu: torch.device, cache_dir: Path) -> None:
    table = ship(SHIPPED)
    save(OWN, cache_dir)
    path = cache.cache_path(cache_dir, MACHINE) if damaged == "cache" else table
    path.write_text(path.read_text()[:-20])
    with pytest.warns(RuntimeWarning, match="qkernels: .*is not JSON") as warned:
        answers = {lookup.flat_reduction(N, fake_gpu), lookup.flat_reduction(N, torch.device("cpu", 0))}
        lookup.flat_reduction(N + 1, fake_gpu)
    assert len(warned) == 1
    assert answers == {SHIPPED if damaged == "cache" else OWN}


def test_no_sources_to_compare_with(fake_gpu: torch.device, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(OWN, cache_dir)

    def missing(function: str) -> str:
        raise FileNotFoundError("the sources of qkernels cannot be found")

    monkeypatch.setattr(cache, "kernel_hash", missing)
    with pytest.warns(RuntimeWarning, match="sources of qkernels cannot be found"):
        assert lookup.flat_reduction(N, fake_gpu) == heuristics.flat_reduction(N, fake_gpu)


def test_override_and_record(fake_gpu: torch.device, cache_dir: Path) -> None:
    save(OWN, cache_dir)
    lookup.reload()
    with lookup.recorded() as record, lookup.override(FLAT, SHIPPED):
        assert lookup.flat_reduction(N, fake_gpu) == SHIPPED
    assert record == [(FLAT, SHIPPED)]
    assert lookup.flat_reduction(N, fake_gpu) == OWN
    with pytest.raises(ValueError, match="programs must be at least 1"), lookup.override(FLAT, FlatConfig(1024, 4)):
        pass
    assert lookup.flat_reduction(N, fake_gpu) == OWN


def test_a_second_lookup_touches_no_file_and_no_environment(tmp_path: Path) -> None:
    """In a process of its own: an audit hook, which sees every file that Python opens, cannot be taken out again."""
    code = """
import os, sys
import torch
from pathlib import Path
from qkernels.autotune import cache, lookup
from tests.autotune.support import FLAT, MACHINE, tuned

events = []
watching = False
class Environment(dict):
    def get(self, *args):
        events.append("environment")
        return super().get(*args)
    __getitem__ = get

lookup.machine_of = lambda device: MACHINE
cache.save(cache.cache_path(Path(os.environ["QKERNELS_CACHE_DIR"]), MACHINE), [tuned()])
def note(event, args):
    if watching and event != "builtins.id":
        events.append(event)
sys.addaudithook(note)
device = torch.device("cpu")
os.environ = Environment(os.environ)
watching = True
first = lookup.flat_reduction(FLAT.arguments[0], device)
seen = {"open", "environment"} <= set(events)
events.clear()
lookup.flat_reduction(5000, device)  # another size: no file either
second = lookup.flat_reduction(FLAT.arguments[0], device)
watching = False
print(seen, lookup.flat_reduction.cache_info().hits, second is first, first == tuned().config, events)
"""
    env = os.environ | {"QKERNELS_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True 1 True True []"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Settings(True, Path("/home/someone/.cache/qkernels"))),
        ({"QKERNELS_AUTOTUNE": "1"}, Settings(True, Path("/home/someone/.cache/qkernels"))),
        ({"QKERNELS_AUTOTUNE": "0"}, Settings(False, Path("/home/someone/.cache/qkernels"))),
        ({"XDG_CACHE_HOME": "/var/x"}, Settings(True, Path("/var/x/qkernels"))),
        ({"XDG_CACHE_HOME": "relative"}, Settings(True, Path("/home/someone/.cache/qkernels"))),
        ({"XDG_CACHE_HOME": "/var/x", "QKERNELS_CACHE_DIR": "~/q"}, Settings(True, Path("/home/someone/q"))),
    ],
    ids=str,
)
def test_settings(environment: dict[str, str], expected: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QKERNELS_CACHE_DIR", "QKERNELS_AUTOTUNE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings.cache_clear()
    assert settings() == expected
    monkeypatch.setenv("QKERNELS_AUTOTUNE", "never")
    assert settings() == expected  # read once


def test_a_setting_that_means_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QKERNELS_AUTOTUNE", "yes")
    settings.cache_clear()
    with pytest.raises(ValueError, match="QKERNELS_AUTOTUNE must be 0 or 1; got 'yes'"):
        settings()
