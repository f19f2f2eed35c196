"""Two results side by side, on files made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as program
from benchmarks.report import write_json
from tests.benchmarks.support import row

HERE = {"cpu": "one", "device": "cpu", "threads": 1, "commit": "abc", "dirty": True, "torch": "2.13"}


def compared(tmp_path: Path, before: list[Any], after: list[Any], *options: str, **place: Any) -> int:
    write_json(tmp_path / "a.json", before, HERE)
    write_json(tmp_path / "b.json", after, {**HERE, **place})
    return program.main(["--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"), *options])


def test_ratios_and_spreads_and_what_is_new_or_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = [row("faster", ours=10), row("slower", ours=10), row("same", ours=10), row("gone")]
    after = [row("faster", ours=5), row("slower", ours=20), row("same", ours=9), row("new")]
    assert compared(tmp_path, before, after) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("before: commit abc, with uncommitted changes")
    assert lines[3:] == [
        "faster   2.00x  faster, 8, process time: 10.0 (9.0-11.0) -> 5.0 (4.5-5.5) us  "
        "against torch 2.00 (1.80-2.20) -> 4.00 (3.60-4.40)",
        "slower   0.50x  slower, 8, process time: 10.0 (9.0-11.0) -> 20.0 (18.0-22.0) us  "
        "against torch 2.00 (1.80-2.20) -> 1.00 (0.90-1.10)",
        "same     1.11x  same, 8, process time: 10.0 (9.0-11.0) -> 9.0 (8.1-9.9) us  "
        "against torch 2.00 (1.80-2.20) -> 2.22 (2.00-2.44)",
        "new     new, 8, process time, qkernels",
        "gone    gone, 8, process time, qkernels",
        "3 rows in both: 1 faster, 1 same, 1 slower; 1 new, 1 gone",
    ]


def test_different_machines_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compared(tmp_path, [row()], [row()], cpu="another", device="cuda:0") == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "different machines (cpu: one and another; device: cpu and cuda:0)" in said.err


def test_different_machines_are_compared_loudly_when_that_is_meant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compared(tmp_path, [row()], [row()], "--across-machines", threads=2) == 0
    lines = capsys.readouterr().out.splitlines()
    warning = "WARNING: DIFFERENT MACHINES, times are not comparable: threads: 1 and 2"
    assert (lines[3], lines[-1]) == (warning, warning)


def test_what_an_old_file_does_not_say_is_no_difference(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"environment": {"torch": "2.13"}, "rows": []}))
    write_json(tmp_path / "b.json", [row()], HERE)
    assert program.main(["--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read as JSON"),
        ("{", "cannot be read as JSON"),
        ("[]", "has no environment and rows"),
        ('{"rows": []}', "has no environment and rows"),
    ],
)
def test_what_is_no_result_is_an_error(
    text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(tmp_path / "b.json", [row()], HERE)
    if text is not None:
        (tmp_path / "a.json").write_text(text)
    assert program.main(["--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 2
    assert message in capsys.readouterr().err
