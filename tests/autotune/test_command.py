"""`python -m qkernels.autotune`: from arguments to files with a machine that is played, and every error by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qkernels.autotune import cache, command, lookup, tables
from qkernels.autotune.config import FlatConfig
from qkernels.autotune.search import candidates, heuristic_for
from qkernels.autotune.tuner import Bench
from tests.autotune.support import CPU, FLAT, LIMITS, MACHINE, FakeBench, tuned

ROOT = Path(__file__).resolve().parent.parent.parent
FIRST = candidates(FLAT, heuristic_for(FLAT, CPU), LIMITS)[1]
SHAPE = "1024x1024"  # 2**20 elements: the decision FLAT


def run(*argv: str, fake: FakeBench | None = None) -> int:
    played = (fake or FakeBench(lambda config, workload: 5.0 if config == FIRST else 10.0)).bench()

    def open_bench(device: torch.device) -> Bench:
        return played

    return command.main(argv, open_bench)


def test_from_the_command_to_the_launcher(
    cache_dir: Path, fake_gpu: torch.device, capsys: pytest.CaptureFixture[str]
) -> None:
    n = FLAT.arguments[0]
    assert lookup.flat_reduction(n, fake_gpu) != FIRST
    assert run("tune", "--op", "aminmax", "--shapes", f"{SHAPE},8x8") == 0
    lookup.reload()
    assert lookup.flat_reduction(n, fake_gpu) == FIRST
    out = capsys.readouterr().out
    assert f"{MACHINE}: 4 workloads, results to {cache.cache_path(cache_dir, MACHINE)}" in out
    assert "[1/2] flat_reduction n=1048576 (aminmax float32 1024x1024 axis=None, aminmax bfloat16" in out
    assert "[2/2] flat_reduction n=64 (aminmax float32 8x8 axis=None, aminmax bfloat16 8x8 axis=None)" in out
    assert "0.500 of its time" in out
    assert "the heuristic stays" in out
    assert "1 of 2 decisions improved, 0 failed" in out
    (entry,) = cache.load(cache.cache_path(cache_dir, MACHINE), MACHINE).values()
    assert (entry.decision, entry.config, entry.ratio, entry.machine) == (FLAT, FIRST, 0.5, MACHINE)


def test_the_subcommand_may_be_left_out(cache_dir: Path) -> None:
    assert run("--op", "aminmax", "--shapes", SHAPE, "--dtype", "float32") == 0
    assert set(cache.load(cache.cache_path(cache_dir, MACHINE), MACHINE)) == {FLAT}


def test_a_heuristic_that_stays_leaves_no_file(cache_dir: Path) -> None:
    assert run("--op", "aminmax", "--shapes", SHAPE, fake=FakeBench()) == 0
    assert not cache_dir.exists()


def test_a_heuristic_that_stays_replaces_what_was_tuned_before(cache_dir: Path, fake_gpu: torch.device) -> None:
    heuristic = heuristic_for(FLAT, CPU)
    arguments = ["--op", "aminmax", "--shapes", f"{SHAPE},4096x512", "--dtype", "float32"]
    assert run(*arguments) == 0
    path = cache.cache_path(cache_dir, MACHINE)
    other = next(decision for decision in cache.load(path, MACHINE) if decision != FLAT)
    assert run("--op", "aminmax", "--shapes", SHAPE, fake=FakeBench()) == 0
    assert set(cache.load(path, MACHINE)) == {other}

    tables.export(tables.table_path(MACHINE.gpu), MACHINE, [tuned()], commit="abc", date="today", how="a test")
    lookup.reload()
    assert lookup.flat_reduction(FLAT.arguments[0], fake_gpu) == tuned().config
    assert run("--op", "aminmax", "--shapes", SHAPE, fake=FakeBench()) == 0
    lookup.reload()
    assert lookup.flat_reduction(FLAT.arguments[0], fake_gpu) == heuristic


def test_out_and_export(cache_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, table = tmp_path / "here" / "tuning.json", tmp_path / "nvidia-h999-80gb.json"
    arguments = ["--op", "aminmax", "--shapes", SHAPE, "--out", str(out), "--export", str(table), "--commit", "abc123"]
    assert run(*arguments) == 0
    assert not cache_dir.exists()
    assert set(cache.load(out, MACHINE)) == {FLAT}
    assert tables.problems_of(table) == []
    document = json.loads(table.read_text())
    assert document["provenance"]["commit"] == "abc123"
    assert document["provenance"]["how"].startswith("python -m qkernels.autotune --op aminmax --shapes 1024x1024 --out")
    assert document["entries"][str(FLAT)]["config"] == FIRST.to_dict()
    assert f"put it at {tables.FOLDER / table.name}" in capsys.readouterr().out


def test_an_export_of_nothing_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "table.json"
    arguments = ["--op", "aminmax", "--shapes", SHAPE, "--export", str(table), "--commit", "abc123"]
    assert run(*arguments, fake=FakeBench()) == 0
    assert "nothing to export" in capsys.readouterr().out
    assert not table.exists()


def test_an_export_wants_a_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "__file__", str(tmp_path / "command.py"))  # as if installed outside of a checkout
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert run("--op", "aminmax", "--shapes", SHAPE, "--export", str(tmp_path / "table.json")) == 1
    assert "--export needs --commit" in capsys.readouterr().err


def test_a_decision_that_fails_does_not_stop_the_others(cache_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake = FakeBench(lambda config, workload: 5.0 if config == FIRST else 10.0)
    bench = fake.bench()

    def compile_small(workload, decision, configs):
        if "4096x512" in workload.name:
            return [torch.OutOfMemoryError("too large")] * len(configs)
        return bench.compile(workload, decision, configs)

    picky = replace(bench, compile=compile_small)
    argv = ["--op", "aminmax", "--shapes", f"4096x512,{SHAPE}"]
    assert command.main(argv, lambda device: picky) == 1
    out = capsys.readouterr().out
    assert "failed: OutOfMemoryError: too large" in out
    assert "1 of 2 decisions improved, 1 failed" in out
    assert set(cache.load(cache.cache_path(cache_dir, MACHINE), MACHINE)) == {FLAT}


def test_a_budget_ends_between_decisions(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter((0.0, 1.0, 11.0))
    monkeypatch.setattr(command.time, "monotonic", lambda: next(clock))
    assert run("--op", "aminmax", "--shapes", f"{SHAPE},4096x512", "--budget", "10") == 0
    out = capsys.readouterr().out
    assert "stopped by --budget after 1 of 2 decisions" in out
    assert "[2/2]" not in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: {tune,info,clear}"),
        (["tune"], "the following arguments are required: --op, --shapes"),
        (["--op", "aminmax"], "the following arguments are required: --shapes"),
        (["--op", "minmax", "--shapes", "4"], "argument --op: 'minmax' is none of aminmax, fake_quantize"),
        (["--op", "aminmax", "--shapes", "4xx4"], "argument --shapes: '4xx4' is no shape"),
        (["--op", "aminmax", "--shapes", "4,0x2"], "argument --shapes: '0x2' is no shape"),
        (["--op", "aminmax", "--shapes", ""], "argument --shapes: '' is no shape"),
        (["--op", "aminmax", "--shapes", "4", "--dtype", "float64"], "'float64' is none of float32, bfloat16, float16"),
        (["--op", "aminmax", "--shapes", "4", "--axis", "last"], "'last': write integers, or none"),
        (["--op", "aminmax", "--shapes", "4", "--device", "gpu"], "'gpu' is no device"),
        (["--op", "aminmax", "--shapes", "4", "--margin", "3%"], "must be at least 0 and below 1; got '3%'"),
        (["--op", "aminmax", "--shapes", "4", "--margin", "1"], "must be at least 0 and below 1; got '1'"),
        (["--op", "aminmax", "--shapes", "4", "--candidates", "0"], "must be a positive integer; got '0'"),
        (["--op", "aminmax", "--shapes", "4", "--budget", "-1"], "must be a number of seconds, at least 0; got '-1'"),
        (["--op", "aminmax", "--shapes", "4", "--budget", "nan"], "must be a number of seconds"),
        (["clear", "all"], "unrecognized arguments: all"),
    ],
    ids=str,
)
def test_wrong_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(*argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_an_axis_outside_of_a_shape(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--op", "aminmax", "--shapes", "4x4", "--axis", "2") == 1
    assert "error: workloads_of: axis must lie within 2 dimensions; got 2" in capsys.readouterr().err


def test_info_lists_what_there_is(
    cache_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    assert command.main(["info"]) == 0
    out = capsys.readouterr().out
    assert "machine: no CUDA device" in out
    assert "shipped tables: none" in out
    assert f"user cache: {cache_dir}, empty" in out

    path = cache.cache_path(cache_dir, MACHINE)
    cache.save(path, [tuned(), tuned(config=FlatConfig(1024, 4, 132, 1024), kernels="0123456789abcdef")])
    (cache_dir / "tuning-broken.json").write_text("{")
    tables.export(tables.table_path("NVIDIA H999 80GB"), MACHINE, [tuned()], commit="abc", date="today", how="a test")
    assert command.main(["info"]) == 0
    out = capsys.readouterr().out
    assert "shipped tables: nvidia-h999-80gb" in out
    assert "tuning-nvidia-h999-80gb.json: 2 entries" in out
    assert f"{tuned().key}: {tuned().config}, 0.9 of the heuristic's time\n" in out
    assert "0.9 of the heuristic's time; stale, of other kernels" in out
    assert "tuning-broken.json is not JSON" in out


def test_info_of_another_machine_and_of_damage(
    cache_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "machine_of", lambda device: replace(MACHINE, torch="2.98.0"))
    path = cache.cache_path(cache_dir, MACHINE)
    cache.save(path, [tuned()])
    assert command.main(["info"]) == 0
    assert "; of another machine or version" in capsys.readouterr().out
    document = json.loads(path.read_text())
    document["entries"][tuned().key]["config"]["num_warps"] = 5
    path.write_text(json.dumps(document))
    assert command.main(["info"]) == 0
    assert "invalid: FlatConfig: num_warps must be one of" in capsys.readouterr().out


def test_info_of_a_device_that_is_not_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command.torch.cuda, "device_count", lambda: 2)
    assert command.main(["info", "--device", "cuda:2"]) == 1
    assert "error: there is no cuda:2; torch sees 2 CUDA device(s)" in capsys.readouterr().err


def test_clear(cache_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = cache.cache_path(cache_dir, MACHINE)
    cache.save(path, [tuned()])
    assert command.main(["clear"]) == 0
    assert f"deleted {path}" in capsys.readouterr().out
    assert not list(cache_dir.iterdir())
    assert command.main(["clear"]) == 0
    assert f"nothing to delete in {cache_dir}" in capsys.readouterr().out


def test_a_bad_variable_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("QKERNELS_AUTOTUNE", "maybe")
    assert command.main(["info"]) == 1
    assert "error: QKERNELS_AUTOTUNE must be 0 or 1; got 'maybe'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--help"], ["{tune,info,clear}", "--op fake_quantize --shapes"]),
        (["tune", "--help"], ["--axis N[,N]", "--export FILE"]),
    ],
    ids=str,
)
def test_help(argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(*argv)
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert [word for word in words if word not in shown] == []


def test_as_a_module(tmp_path: Path) -> None:
    """The spelling that users type, in a process that sees no GPU: an error in one line."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "qkernels.autotune", "--op", "fake_quantize", "--shapes", "64x64"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("python -m qkernels.autotune: error: tuning times kernels, so it needs a CUDA device")
    assert done.stderr.count("\n") == 1
