"""Tables: exactly what a results file made by hand should give, losses marked; and files that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import tables
from benchmarks.saved import ResultsError, load
from tests.benchmarks_report.made import row, spread, step, write


def expected(name: str) -> str:
    """Markdown written by hand, beside this file."""
    return (Path(__file__).parent / f"{name}.md").read_text(encoding="utf-8").removesuffix("\n")


def test_every_comparison_has_its_line(tmp_path: Path) -> None:
    won = row("wins", "64x64x64", 10.0, torch=40.0, torchao=20.0) | {"input_name": "a cube"}
    lost = row("loses", "8", 1000.0, torch=500.0) | {
        "why": "a | reason",
        "refused": {"torchao": "TypeError: no"},
        "input_name": "a row",
    }
    even = row("module", "8", 1.234, 0.5, torch=1.234) | {"suite": "modules", "bytes_moved": 0}
    counts = {"qkernels": {"aten_calls": 3, "launches": None}, "torch": {"aten_calls": 1200, "launches": None}}
    wrong = row("broken", "8", 1.0) | {"wrong": ["1 of 8 values differ", "2 of 8 values differ"], "timings": {}}
    differs = {"peers_differ": {"torch": [{"text": "3 of 8 values differ", "elements": 3}]}}
    path = write(tmp_path / "made.json", [won, lost | {"counts": counts} | differs, even, wrong])
    assert tables.section(load(path)) == expected("operators_and_modules")


def test_training_steps(tmp_path: Path) -> None:
    one = step("one", float_compiled=10, stock_eager=30, stock_compiled=20, ours_eager=40, ours_compiled=12)
    one |= {"why": "Python", "absent": {"qkernels, CUDA graph": "no GPU"}}
    two = step("two", float_compiled=100, stock_eager=300, ours_eager=250.4, ours_compiled=150)
    path = write(tmp_path / "steps.json", [one, two], suite=None)
    assert tables.section(load(path)) == expected("training_steps")


def test_training_steps_that_are_even(tmp_path: Path) -> None:
    """Ratios by rounds are to ours compiled; there a spread across 1 is no loss."""
    rounds = {
        "qkernels, compiled": {"microseconds": spread(11e3), "times_ours": spread(1.0)},
        "qkernels, eager": {"microseconds": spread(20e3), "times_ours": spread(1.8, 0.1)},
        "torch.ao, compiled": {"microseconds": spread(10e3), "times_ours": spread(0.95, 0.1)},
        "torch.ao, eager": {"microseconds": spread(19e3), "times_ours": spread(1.7, 0.1)},
    }
    one = step("one", ours_compiled=11, ours_eager=20, stock_compiled=10, stock_eager=19) | {"timings": rounds}
    results = load(write(tmp_path / "steps.json", [one]))
    assert [(c.input, c.speedup.median, c.speedup.p80, c.verdict) for c in results.comparisons] == [
        ("compiled", 0.95, 1.05, "even"),
        ("eager", 0.95, 0.95, "slower"),
    ]
    assert "| one | 11.0 | 20.0, a loss | 10.0 | 19.0 |" in tables.steps_table(results)


def test_means_by_suite_and_way(tmp_path: Path) -> None:
    """None of what a process pays once, which stays in the table."""
    rows = [
        row("op", "8", 1.0, torch=2.0),
        row("module", "8", 1.0, torch=4.0) | {"suite": "modules"},
        row("import", "-", 1.0, torch=100.0) | {"suite": "overhead", "how": "fresh process"},
    ]
    results = load(write(tmp_path / "a.json", rows))
    assert [sentence.partition(" over")[0] for sentence in tables.means(results.comparisons)] == [
        "Operators: against torch, geometric mean of the speedups 2.00",
        "Modules: against torch, geometric mean of the speedups 4.00",
    ]
    assert "| `import` | - | torch | 100 | 1.00 | 100.00 |" in tables.section(results)


def test_calls_and_replays_on_a_gpu(tmp_path: Path) -> None:
    """Two rows of one job, with a share of the copy; the environment names the GPU."""
    called = row("op", "8", 10.0, torch=20.0) | {"how": "events", "of_copy": 0.125}
    replayed = row("op", "8", 2.0, torch=20.0) | {"how": "graph", "not_captured": {"torch": "it synchronizes"}}
    environment = {"gpu": "Some GPU", "device": "cuda:0", "copy_gb_per_second": 1234.56}
    text = tables.section(load(write(tmp_path / "gpu.json", [called, replayed], **environment)))
    assert "\nSome GPU (cuda:0); " in text
    assert "; copy gb per second 1234.6; method: CUDA events around calls from Python and CUDA events around" in text
    assert "| `op` | 8 | events | torch | 20.0 | 10.0 | 2.00 | 0.4 | 12% |" in text
    assert "| `op` | 8 | graph | torch | 20.0 | 2.00 | 10.00 | 2.0 | - |" in text
    assert "* Against torch, timed by CUDA events around replays of a CUDA graph, geometric mean" in text
    assert "* `op` 8: timed by calls, as no graph could be captured, for torch: it synchronizes" in text


def test_a_remark_on_many_rows_is_one_line(tmp_path: Path) -> None:
    rows = [row("op", f"{n}", 1.0, torch=2.0) | {"absent": {"ModelOpt": "not installed"}} for n in range(1, 5)]
    assert tables.remarks(load(write(tmp_path / "a.json", rows))) == [
        "4 rows: not compared with ModelOpt: not installed"
    ]


def test_reasons_are_for_losses_and_may_differ_by_peer(tmp_path: Path) -> None:
    both = row("op", "8", 2.0, torch=1.0, torchao=4.0) | {"why": {"torch": "one reason", "torchao": "another"}}
    against_torch, against_torchao = load(write(tmp_path / "a.json", [both])).comparisons
    assert (against_torch.why, against_torchao.why) == ("one reason", None)


def test_unknown_and_absent_fields(tmp_path: Path) -> None:
    """Old and new files give the same table: only case, input, how and timings are needed."""
    full = row("op", "8", 2.0, torch=1.0)
    needed = {key: full[key] for key in ("case", "input", "how", "timings")}
    (old,) = load(write(tmp_path / "old.json", [needed])).comparisons
    (new,) = load(write(tmp_path / "new.json", [full | {"unknown": 1, "counts": {}}], unknown=[1])).comparisons
    assert (old.case, old.speedup, old.verdict, old.peer) == (new.case, new.speedup, new.verdict, new.peer)
    assert (old.elements, old.gb_per_second) == (None, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "needs an object with `environment` and a non-empty list `rows`"),
        (json.dumps({"environment": {}, "rows": []}), "needs an object with"),
        (json.dumps({"environment": {}, "rows": [{"case": "op", "input": "8"}]}), r"rows\[0\] has no 'how'"),
        (json.dumps({"environment": {}, "rows": [3]}), r"rows\[0\] is not such a row"),
    ],
)
def test_files_that_are_no_results(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(ResultsError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.json", [row("op", "8", 2.0, torch=1.0)])
    assert tables.main([str(path)]) == 0
    assert capsys.readouterr().out == tables.section(load(path)) + "\n"
    assert tables.main([str(tmp_path / "none.json")]) == 2
    assert "none.json: cannot be read as JSON" in capsys.readouterr().err
