"""`make gpu` without a GPU: what .ci/gpu does with parts that fail, hang or lack their tool, with stand-ins for python.

The programs it starts have tests of their own; here it is the order, the limits, the summary, the exit status, and that
every file, module and option it names exists.
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.gpu import run_suite

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 600  # of a run on a borrowed GPU

PARTS = ["environment", "histogram", "memcheck", "racecheck", "rounding", "tests", "checks", "bandwidth", "benchmarks",
         "tuning"]  # fmt: skip

# Writes down how it was called; hangs, deaf to SIGINT, or fails where the arguments contain a word of HANG or FAIL.
PYTHON = """#!/usr/bin/env bash
printf '%s\\n' "${*//$'\\n'/ }" >>"$CALLS"
[[ $* == *is_available* ]] && exit "$NO_CUDA"
if [[ -n $HANG && $* == *"$HANG"* ]]; then
    trap '' INT
    echo "hangs here"
    while true; do sleep 0.05; done
fi
[[ -n $FAIL && $* == *"$FAIL"* ]] && { echo "something is wrong"; exit 3; }
echo "all is well"
"""

# Writes down the limit, and has the hanging part killed at once.
TIMEOUT = """#!/usr/bin/env bash
printf '%s\\n' "$3" >>"$LIMITS"
seconds=60
[[ -n $HANG && $* == *"$HANG"* ]] && seconds=0.3
exec {timeout} "$1" --kill-after=0.1 "$seconds" "${{@:4}}"
"""

SANITIZER = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do [[ $1 == --tool ]] && shift; [[ $1 == --error-exitcode ]] && shift; shift; done
exec "$@"
"""


@dataclass
class Run:
    """What one run left behind."""

    status: int
    out: Path
    text: str
    error: str
    calls: list[str]
    limits: list[int]

    @property
    def summary(self) -> dict[str, str]:
        lines = (self.out / "summary.txt").read_text().splitlines()
        return {name: text for name, _, text in (line.partition(" ") for line in lines)}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout with nothing in it but the script and the files whose presence it asks for."""
    for folder in (".ci", "bin", "qkernels", "tests"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / ".ci" / "gpu", tmp_path / ".ci" / "gpu")
    (tmp_path / "qkernels" / "histogram.py").touch()
    timeout = shutil.which("timeout")
    assert timeout
    for name, text in (
        ("python", PYTHON),
        ("timeout", TIMEOUT.format(timeout=timeout)),
        ("compute-sanitizer", SANITIZER),
    ):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def run(tree: Path, *, out: str | None = "out", hang: str = "", fail: str = "", no_cuda: int = 0) -> Run:
    calls, limits = tree / "calls", tree / "limits"
    calls.touch()
    limits.touch()
    env = {**os.environ, "PATH": f"{tree / 'bin'}:{os.environ['PATH']}", "PYTHON": "python", "HANG": hang, "FAIL": fail,
           "NO_CUDA": str(no_cuda), "CALLS": str(calls), "LIMITS": str(limits)}  # fmt: skip
    env.pop("OUT", None)
    if out is not None:
        env["OUT"] = str(tree / out)
    done = subprocess.run(
        [tree / ".ci" / "gpu"], env=env, cwd=tree, capture_output=True, text=True, timeout=300, check=False
    )
    return Run(done.returncode, tree / (out or "out"), done.stdout, done.stderr, calls.read_text().splitlines(),
               [int(line) for line in limits.read_text().splitlines()])  # fmt: skip


def test_every_part_runs_in_order_and_leaves_its_log(tree: Path) -> None:
    done = run(tree)
    assert (done.status, done.error) == (0, "")
    assert list(done.summary) == PARTS
    assert all(re.search(r"passed after \d+ s: all is well", text) for text in done.summary.values())
    assert all((done.out / f"{name}.log").read_text() == "all is well\n" for name in PARTS)
    assert done.text.endswith((done.out / "summary.txt").read_text())


def test_the_summary_quotes_what_a_log_comes_to(tree: Path) -> None:
    """The last line; of the benchmarks, which end with their losses, the mean."""
    python = tree / "bin" / "python"
    lines = 'echo "calls: geometric mean 1.2"; echo "graph: geometric mean 1.3"; echo "- a loss"'
    python.write_text(f"{PYTHON}[[ $* == *quick* ]] && {{ {lines}; }}\nexit 0\n")
    summary = run(tree).summary
    assert summary["benchmarks"].endswith("s: graph: geometric mean 1.3")
    assert summary["bandwidth"].endswith("s: all is well")


def test_the_limits_fit_into_the_time_of_a_run(tree: Path) -> None:
    """What a part leaves over goes to the next: here none takes long, so the last limit is the sum of all."""
    limits = run(tree).limits
    assert len(limits) == len(PARTS)
    assert limits == sorted(limits)
    assert limits[-1] <= SECONDS - 40  # starting, and one part that has to be killed


@pytest.mark.parametrize(
    ("word", "failed"),
    [
        ("run_kernels", ["memcheck", "racecheck"]),
        ("benchmarks.rounding", ["rounding"]),
        ("run_suite", ["tests"]),
        ("checks.xml", ["checks"]),
        ("--budget", ["tuning"]),
    ],
)
def test_a_failing_part_does_not_stop_the_others(tree: Path, word: str, failed: list[str]) -> None:
    done = run(tree, fail=word)
    assert done.status == 1
    assert list(done.summary) == PARTS
    assert [name for name, text in done.summary.items() if "passed" not in text] == failed
    assert all(re.search(r"FAILED, exit 3 after \d+ s: something is wrong", done.summary[name]) for name in failed)


def test_a_hanging_part_is_killed_and_does_not_stop_the_others(tree: Path) -> None:
    done = run(tree, hang="rounding")
    assert done.status == 1
    assert list(done.summary) == PARTS
    assert re.fullmatch(r" *STOPPED, its \d+ s were over: hangs here", done.summary["rounding"])
    assert [name for name, text in done.summary.items() if "passed" not in text] == ["rounding"]


def test_what_is_not_there_is_said_and_no_failure(tree: Path) -> None:
    (tree / "qkernels" / "histogram.py").unlink()
    (tree / "bin" / "compute-sanitizer").unlink()
    if shutil.which("compute-sanitizer") or list(Path("/usr/local").glob("cuda*/bin/compute-sanitizer")):
        pytest.skip("this machine has compute-sanitizer")
    done = run(tree)
    assert done.status == 0
    assert list(done.summary) == PARTS
    assert "not run: qkernels/histogram.py is not there yet" in done.summary["histogram"]
    for tool in ("memcheck", "racecheck"):
        assert "not run: compute-sanitizer is neither on PATH" in done.summary[tool]
    assert not any("run_kernels" in call for call in done.calls)
    assert len(done.limits) == len(PARTS) - 3
    assert done.limits[1] > 100  # their time goes to what comes next


def test_without_out_or_gpu_nothing_is_run(tree: Path) -> None:
    done = run(tree, out=None)
    assert (done.status, done.calls) == (2, [])
    assert "say where the results go" in done.error
    done = run(tree, no_cuda=1)
    assert done.status == 2
    assert "finds no CUDA device through torch; nothing was run" in done.error
    assert not done.out.exists()


def options(module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """The help of `python -m module command`."""
    monkeypatch.setattr(sys, "argv", [module, *command, "--help"])
    if not hasattr(sys.modules.get(module), "__path__"):
        monkeypatch.delitem(sys.modules, module, raising=False)  # runpy warns of what was imported already
    with pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert end.value.code in (0, None)
    return capsys.readouterr().out


def test_what_the_script_names_exists(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files and modules, and every option by the program's own help. One that is misspelt would cost the GPU run."""
    calls = [call.split(" -- ")[0].split() for call in run(tree).calls if " -m " in f" {call}"]
    programs = [(call[1], call[2:]) for call in calls if call[0] == "-m"]
    assert len(programs) == len(PARTS) - 1  # the environment is no module
    for module, arguments in programs:
        if module == "pytest":
            continue
        command = arguments[:1] if module == "qkernels.autotune" else []
        text = options(module, monkeypatch, capsys, *command)
        for word in arguments:
            if word.startswith("--"):
                assert re.search(rf"{word}\b", text), f"python -m {module} has no {word}"
    script = (ROOT / ".ci" / "gpu").read_text()
    for path in re.findall(r"(?<![\w./])(?:tests|benchmarks)/[\w./*]+", script):
        assert list(ROOT.glob(path)), path


def test_the_documentation_lists_the_parts() -> None:
    table = (ROOT / "docs" / "testing.md").read_text().split("## On a GPU")[1].split("##")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert re.findall(r"`(\w+)`", "".join(cells)) == PARTS


# --- the programs beside it -------------------------------------------------------------------------------------------

TESTS = """
import pathlib, time
import pytest

@pytest.mark.parametrize("n", range(3))
def test_good(n): pass
def test_bad(): assert False
@pytest.mark.skip(reason="as it is")
def test_left(): pass
def test_slow():
    pathlib.Path("started").touch()
    time.sleep({seconds})
"""


def suite(folder: Path, seconds: float, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_planted.py").write_text(TESTS.format(seconds=0))
    command = [sys.executable, "-m", "tests.gpu.run_suite", "--processes", "2", "--seconds", str(seconds), "--out",
               str(folder / "out"), "--", str(folder), "--rootdir", str(folder), *arguments]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False)


def test_the_suite_in_shards(tmp_path: Path) -> None:
    done = suite(tmp_path, 200)
    lines = done.stdout.splitlines()
    assert done.returncode == 1, done.stderr
    assert lines[-1] == "4 passed, 1 failed, 0 error, 1 skipped"
    assert [line.split(" - ")[0] for line in lines[:-1]] == ["FAILED test_planted.py::test_bad"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"tests-{n}.{end}" for n in (0, 1) for end in ("log", "xml")
    }


def test_a_suite_passes_only_if_a_test_did(tmp_path: Path) -> None:
    assert suite(tmp_path, 200, "-k", "good or slow").returncode == 0
    assert suite(tmp_path, 200, "-k", "no such test").returncode == 1


def test_a_process_that_hangs_is_interrupted_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_planted.py").write_text(TESTS.format(seconds=250))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    args = argparse.Namespace(processes=1, out=tmp_path, pytest=[str(tmp_path), "--rootdir", str(tmp_path)])
    shard = run_suite.start(0, args)
    until = time.monotonic() + 200
    while not (tmp_path / "started").exists():  # the test that hangs, after all others
        assert shard.process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    assert run_suite.wait([shard], time.monotonic())
    assert shard.counts() == {"passed": 3, "failed": 1, "skipped": 1}
    assert [line.split(" - ")[0] for line in shard.bad_tests()] == ["FAILED test_planted.py::test_bad"]


def test_time_that_is_over_is_a_failure(tmp_path: Path) -> None:
    done = suite(tmp_path, 0.0)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].endswith("interrupted after 0 s, the rest was not run")


def test_a_process_that_dies_is_counted(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("import os\nos._exit(7)\n")
    done = suite(tmp_path, 200)
    assert done.returncode == 1
    assert "process 0 ended with 7 and no result" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("2 processes lost")


PROPERTIES = """
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

settings.register_profile("p", suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("p")

@st.composite
def pairs(draw): return draw(st.integers() | st.floats())

@pytest.mark.parametrize("n", [1, 2])
@settings(max_examples=3)
@given(pair=pairs().map(str), more=st.lists(pairs()))
def test_by_name(n, pair, more): assert False

@given(st.integers())
def test_by_place(tmp_path, number): assert False

def test_without(): pass
"""


def test_property_tests_skip_without_hypothesis(tmp_path: Path) -> None:
    (tmp_path / "hypothesis.py").write_text("raise ImportError('as if it were not installed')\n")
    (tmp_path / "test_properties.py").write_text(PROPERTIES)
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.gpu.plugin",
        "-ra",
        "--rootdir",
        str(tmp_path),
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed, 3 skipped" in done.stdout
    assert "hypothesis is not installed" in done.stdout


def test_a_wrong_shard_is_an_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "tests.gpu.plugin", "--shard", "2/2", "--rootdir", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 4
    assert "--shard must be K/N with K below N; got '2/2'" in done.stderr


@pytest.mark.interpreter_only
def test_the_sanitizers_program_runs_every_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from tests.gpu import run_kernels

    assert run_kernels.main(["--device", "cpu"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:-1] == [case.name for case in run_kernels.CASES]
    assert out[-1] == f"{len(run_kernels.CASES)} of {len(run_kernels.CASES)} kernel cases ran"
    assert run_kernels.main(["--device", "cpu", "--seconds", "-1"]) == 1
    assert torch.get_default_device() == torch.device("cpu")
