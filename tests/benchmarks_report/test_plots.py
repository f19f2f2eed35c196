"""Plots of results made by hand: what stands in the axes, not pixels; and that two runs write the same bytes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import images, plots
from benchmarks.saved import Results, ResultsError, load
from tests.benchmarks_report.made import folder, row, write

WIN, EVEN, LOSS = (plots.COLOURS[word] for word in ("faster", "even", "slower"))


@pytest.fixture
def drawing() -> None:
    pytest.importorskip("matplotlib", reason="the plots need matplotlib (extra: bench)")


@pytest.fixture
def results(tmp_path: Path) -> Results:
    """Three jobs, two of one case; one has a second peer, one no byte formula."""
    rows = [
        row("op", "8", 2.0, torch=1.0, torchao=4.0),
        row("op", "64x64x64", 10.0, 0.5, torch=80.0),
        row("module", "8", 1.0, 0.1, torch=1.0) | {"bytes_moved": 0},
    ]
    return load(write(tmp_path / "made.json", rows))


def test_one_dot_for_each_comparison(drawing: None, results: Results) -> None:
    (axes,) = plots.speedup_figure(results, results.comparisons).axes
    assert axes.get_xscale() == "log"
    assert len(axes.containers) == 4
    dots = [
        (line.get_xdata()[0], line.get_ydata()[0], line.get_color(), line.get_marker())
        for line, _, _ in axes.containers
    ]
    assert dots == [(0.5, -0.12, LOSS, "o"), (2.0, 0.12, WIN, "D"), (8.0, 1, WIN, "o"), (1.0, 2, EVEN, "o")]
    assert [label.get_text().split() for label in axes.get_yticklabels()] == [
        ["op", "8"],
        ["64x64x64"],
        ["module", "8"],
    ]
    left, right = axes.get_xlim()
    assert left < 0.5
    assert right > 8.5


def test_whiskers_are_the_percentiles(drawing: None, results: Results) -> None:
    (axes,) = plots.speedup_figure(results, results.comparisons).axes
    _, _, (bar,) = axes.containers[2]
    assert bar.get_segments()[0].tolist() == [[7.5, 1.0], [8.5, 1.0]]


def test_the_roof_is_the_copy_of_the_same_run(drawing: None, tmp_path: Path, results: Results) -> None:
    (axes,) = plots.roofline_figure(results).axes
    points = {line.get_label(): np.asarray(line.get_xydata()).tolist() for line in axes.lines}
    assert points == {"op": [[4000, 2.0], [4000, 0.4]]}
    assert [text.get_text() for text in axes.texts] == [
        "no copy bandwidth was measured in this run, so no roof is drawn"
    ]

    roofed = load(write(tmp_path / "roofed.json", [row("op", "8", 2.0, torch=1.0)], copy_gb_per_second=30.0))
    (axes,) = plots.roofline_figure(roofed).axes
    assert [line.get_label() for line in axes.lines] == ["op", "a plain copy, 30 GB/s"]
    assert np.asarray(axes.lines[1].get_ydata()).tolist() == [30.0, 30.0]
    assert not axes.texts


def test_files(drawing: None, tmp_path: Path) -> None:
    """Every image that the docs expect, with the digest of its results; drawn twice, the same bytes."""
    here, again = tmp_path / "here", tmp_path / "again"
    for out in (here, again):
        assert plots.main(["--results", str(folder(tmp_path / "results")), "--out", str(out)]) == 0
    expected = set()
    for path in (tmp_path / "results").iterdir():
        one = load(path)
        expected |= set(images.image_names(one))
        assert all(images.is_of(here / name, one) for name in images.image_names(one))
    assert {path.name for path in here.iterdir()} == expected
    for path in here.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()


# --- without matplotlib ----------------------------------------------------------------------------------------------


def test_names_of_the_images(tmp_path: Path, results: Results) -> None:
    """A plot for each way of timing and for every 60 rows; a roofline where there is a byte formula."""
    assert images.image_names(results) == ["made-speedup.png", "made-roofline.png"]

    many = [
        row("op", str(n), 1.0, torch=2.0) | {"how": how, "bytes_moved": 0}
        for how in ("events", "graph")
        for n in range(1, 63)
    ]
    parts = images.parts(load(write(tmp_path / "gpu.json", many)))
    assert {name: len(part) for name, part in parts.items()} == {
        "gpu-speedup-events-1.png": 60,
        "gpu-speedup-events-2.png": 2,
        "gpu-speedup-graph-1.png": 60,
        "gpu-speedup-graph-2.png": 2,
    }
    assert images.image_names(load(tmp_path / "gpu.json")) == list(parts)


def test_a_roofline_takes_replays_where_there_are_any(tmp_path: Path) -> None:
    rows = [
        row("op", "8", ours, torch=1.0, other=1.0) | {"how": how} for how, ours in (("events", 5.0), ("graph", 2.0))
    ]
    (shown,) = images.with_rates(load(write(tmp_path / "a.json", rows)))
    assert (shown.how, shown.gb_per_second) == ("graph", 2.0)


def test_missing_matplotlib(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("matplotlib", "matplotlib.backends.backend_agg", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ResultsError, match="matplotlib is not installed; it comes with the extra `bench`"):
        plots.speedup_figure(results, results.comparisons)
    assert plots.main(["--results", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "matplotlib is not installed" in capsys.readouterr().err


def test_without_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plots.main(["--results", str(tmp_path)]) == 2
    assert f"no results in {tmp_path}" in capsys.readouterr().err
