"""The command line: arguments and their errors, what the suites select, the list, the JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as program
from benchmarks import arguments, overhead, qat
from benchmarks.cases import CASES, of_functions
from benchmarks.models import MODELS, SMALL_MODELS
from benchmarks.report import SCHEMA, environment, heading
from tests.benchmarks.support import CPU, one_case


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """The program sets the number of threads for its process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--op nonesuch", "no case of the suite default matches ['nonesuch']; --list names them"),
        ("--op Observer --suite qat", "no case of the suite qat matches ['Observer']"),
        ("--suite fast", "invalid choice: 'fast'"),
        ("--quick --suite full", "--quick is --suite quick, and --suite full was given too"),
        ("--device gpu", "must be cpu, cuda or cuda:N; got 'gpu'"),
        ("--device meta", "must be cpu, cuda or cuda:N; got 'meta'"),
        ("--dtype int8", "invalid choice: 'int8'"),
        ("--dtype bfloat16 --suite qat", "--dtype is for cases with inputs; the suite qat has none"),
        ("--threads 0", "must be a whole number above 0; got '0'"),
        ("--threads two", "must be a whole number above 0; got 'two'"),
        ("--seed -1", "must be a whole number, 0 or more; got '-1'"),
        ("--seconds nan", "must be seconds, 0 or more; got 'nan'"),
        ("--seconds -3", "must be seconds, 0 or more; got '-3'"),
        ("--across-machines", "--across-machines goes with --compare"),
        ("--compare a.json b.json --suite qat --quick", "does not go with --suite, --quick"),
        ("--compare a.json", "expected 2 arguments"),
        ("--op aminmax_axis --frobnicate", "unrecognized arguments: --frobnicate"),
    ],
)
def test_a_wrong_argument_is_an_error(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        program.main(line.split())
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="the error of a machine without a GPU")
def test_cuda_without_a_gpu_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    for run in (program.main, qat.main):
        with pytest.raises(SystemExit):
            run(["--device", "cuda"])
        assert "torch finds no CUDA device; got 'cuda'" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "results.json"):
        with pytest.raises(SystemExit):
            program.main(["--json", str(path)])
        assert "must be a file in a folder" in capsys.readouterr().err
    assert arguments.output(str(tmp_path / "new" / "results.json")) == tmp_path / "new" / "results.json"


def test_case_without_input_on_the_cpu_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.main(["--op", "aminmax axis=0"])
    assert "['aminmax axis=0'] have no input for cpu in the suite default" in capsys.readouterr().err


def selected(*line: str) -> tuple[set[str], set[str]]:
    """Suites of the cases, and the other names."""
    args = program.parse_args(list(line))
    return {case.suite for case in args.cases}, set(args.extra_names)


def test_suites_select_what_they_say() -> None:
    small = {qat.case_name(name) for name in SMALL_MODELS}
    everything = {qat.case_name(name) for name in MODELS} | set(overhead.names())
    assert selected() == ({"kernels", "modules"}, set())
    assert selected("--quick") == selected("--suite", "quick") == ({"kernels", "modules"}, set())
    assert selected("--suite", "kernels") == ({"kernels"}, set())
    assert selected("--suite", "modules") == ({"modules"}, set())
    assert selected("--suite", "qat") == (set(), small)
    assert selected("--suite", "overhead") == (set(), set(overhead.names()))
    assert selected("--suite", "full") == ({"kernels", "modules"}, everything)
    assert selected("--suite", "full", "--op", "resnet50") == (set(), {qat.case_name("resnet50")})


def test_what_the_jobs_are_of_each_suite() -> None:
    names = [job.name for job in program.parse_args(["--suite", "full"]).jobs]
    assert names[-len(MODELS) - 1 :] == ["overhead", *MODELS]
    assert [job.name for job in program.parse_args(["--suite", "qat"]).jobs] == list(SMALL_MODELS)
    assert [job.name for job in program.parse_args(["--suite", "overhead", "--op", "import"]).jobs] == ["overhead"]


def test_all_inputs_in_one_dtype() -> None:
    args = program.parse_args(["--suite", "full", "--dtype", "float16"])
    assert {put.dtype for _, put in program.ordered(args)} == {"float16"}
    assert "ResNet-18 calibration" not in [case.name for case, _ in program.ordered(args)]


def test_where_time_may_run_out_every_case_has_its_turn() -> None:
    order = [(case.name, put.shape) for case, put in program.ordered(program.parse_args(["--seconds", "100"]))]
    plain = program.ordered(program.parse_args([]))
    assert sorted(order) == sorted((case.name, put.shape) for case, put in plain)
    with_inputs = sorted((case.name, case.cpu[-1].shape) for case in CASES.values() if case.cpu)
    assert sorted(order[: len(with_inputs)]) == with_inputs


def test_what_time_left_out_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    one_case(monkeypatch, of_functions(lambda x: x, lambda x: x))
    assert program.main(["--quick", "--seconds", "0"]) == 0
    assert "1 of 1 inputs were not run: 0 seconds were over" in capsys.readouterr().out


def test_the_list_shows_bytes_inputs_and_peers(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--list", "--suite", "full"]) == 0
    text = capsys.readouterr().out
    for name in (*CASES, *overhead.names(), *map(qat.case_name, MODELS)):
        assert f"{name}\n    suite: " in text
    assert "fake_quantize fwd+bwd\n    suite: kernels; bytes: 5 x bytes of the input; peers: torch, torch.comp" in text
    assert "8x197x768 bf16 (ViT-B/16 tokens, batch 8)" in text
    assert "RecordingObserver\n    suite: overhead; not timed: it stores every input" in text


def test_missing_peers_are_named_everywhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """In the list, in the heading and the summary of a run, and in its JSON."""
    monkeypatch.setattr("benchmarks.peers.importlib.util.find_spec", lambda module: None)
    monkeypatch.setattr("benchmarks.report.version", lambda distribution: None)
    results = tmp_path / "results.json"
    assert program.main(["--list", "--op", "aminmax"]) == 0
    assert "FlagGems [not installed (package flag_gems)]" in capsys.readouterr().out
    assert program.main(["--quick", "--op", "choose_qparams", "--op", "aminmax", "--json", str(results)]) == 0
    text = capsys.readouterr().out
    missing = "torchao (torchao), ModelOpt (nvidia-modelopt), FlagGems (flag_gems)"
    assert f"not installed, so not compared: {missing}" in text
    assert "FlagGems was not compared in 2 cases: not installed (package flag_gems)" in text
    found = json.loads(results.read_text())
    assert [found["environment"][name] for name in ("torchao", "modelopt", "flag_gems")] == [None, None, None]
    absent = [row["absent"] for row in found["rows"] if row["case"] == "aminmax"]
    assert absent[0]["FlagGems"] == "not installed (package flag_gems)"


def test_what_a_result_says_of_its_place(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    assert program.main(["--quick", "--op", "choose_qparams", "--json", str(results), "--seed", "3"]) == 0
    found = json.loads(results.read_text())
    assert list(found) == ["environment", "rows"]
    place = found["environment"]
    assert place["schema"] == SCHEMA
    assert (place["suite"], place["seed"], place["threads"], place["device"]) == ("quick", 3, 1, "cpu")
    assert place["torch"] == torch.__version__
    assert place["cpu"] and place["numpy"] and place["time"].endswith("+00:00")
    assert {"commit", "dirty", "driver", "gpu", "triton", "torchao", "copy_gb_per_second"} <= place.keys()
    (row,) = found["rows"]
    assert (row["case"], row["suite"]) == ("choose_qparams, 64 channels", "kernels")
    assert row["input_name"] == "a small linear layer's output"
    assert row["counts"]["torch"]["aten_calls"] > 1
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_the_heading_says_nothing_of_what_is_there() -> None:
    place = {**environment(CPU, 0), "torchao": "1", "modelopt": "2", "flag_gems": "3"}
    assert "not installed" not in heading(place)
