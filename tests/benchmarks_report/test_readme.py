"""README, docs/benchmarks.md and the plots say what the committed results say; an edit of either side is found."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks import images, readme
from benchmarks.readme import KERNELS, README_PEER, README_ROWS, RESULTS, ROOT, TRAINING
from benchmarks.saved import ResultsError, load_all
from tests.benchmarks_report.made import folder, row, write


def test_documents_and_plots_agree_with_the_committed_results() -> None:
    assert readme.drift(ROOT, load_all(RESULTS)) == []


def test_the_worst_committed_loss_is_in_the_readme() -> None:
    """Whatever README_ROWS names: found in the JSON itself, without the code that chooses the rows."""
    load_all(RESULTS)  # says what to do if there are none
    rows = json.loads((RESULTS / f"{KERNELS}.json").read_text(encoding="utf-8"))["rows"]
    speedups = {
        (timing["times_ours"]["median"], row["case"], row["input"], peer): timing["times_ours"]["p80"]
        for row in rows
        for peer, timing in row["timings"].items()
        if peer != "qkernels"
    }
    ratio, case, put, peer = min(speedups)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith(f"| `{case}` | {put} | {peer} |"))
    assert f"| {ratio:.2f}" in line
    assert line.endswith(", a loss |") == (speedups[min(speedups)] < 1)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return folder(tmp_path / "results")


@pytest.fixture
def root(tmp_path: Path, results: Path) -> Path:
    """A copy of the documents, written from `results`, with plots that are only text."""
    root = tmp_path / "root"
    (root / images.IMAGES).mkdir(parents=True)
    for path in readme.BLOCKS:
        shutil.copy(ROOT / path, root / path)
    everything = load_all(results)
    for path, text in readme.generate(root, everything).items():
        (root / path).write_text(text, encoding="utf-8")
    for one in everything.values():
        for name in images.image_names(one):
            (root / images.IMAGES / name).write_text(images.source(one))
    return root


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_what_was_written_has_not_drifted(root: Path, results: Path) -> None:
    assert readme.drift(root, load_all(results)) == []


@pytest.mark.parametrize("path", readme.BLOCKS)
def test_an_edited_number_is_found(root: Path, results: Path, path: Path) -> None:
    edit(
        root / path,
        "| `left out` | 8 | torch | 1.00 | 10.0 | 0.10, a loss |",
        "| `left out` | 8 | torch | 1.00 | 10.0 | 1.10 |",
    )
    (diff,) = readme.drift(root, load_all(results))
    assert diff.startswith(f"--- {path} as it is\n+++ {path} from the results\n")
    changed = [line for line in diff.splitlines()[2:] if line[0] in "+-"]
    assert [line[0] for line in changed] == ["-", "+"]
    assert "1.10" in changed[0]
    assert "0.10, a loss" in changed[1]


def test_an_edited_result_is_found(root: Path, results: Path) -> None:
    """In the README, in the docs and in each plot of that file; other plots stay."""
    edit(results / f"{TRAINING}.json", '"qkernels, eager": 40', '"qkernels, eager": 4')
    found = readme.drift(root, load_all(results))
    assert [line.split()[1 if line.startswith("---") else 0] for line in found] == [
        "README.md",
        "docs/benchmarks.md",
        f"docs/images/{TRAINING}-speedup.png",
    ]
    assert found[-1].endswith(f"is missing or was not drawn from this {TRAINING}.json")


def test_a_missing_plot_is_found(root: Path, results: Path) -> None:
    name = f"{KERNELS}-roofline.png"
    (root / images.IMAGES / name).unlink()
    assert readme.drift(root, load_all(results)) == [
        f"docs/images/{name} is missing or was not drawn from this {KERNELS}.json"
    ]


def test_text_outside_the_markers_is_left_alone(root: Path, results: Path) -> None:
    edit(root / "README.md", "\n## What is supported\n", "\nOf our own.\n\n## What is supported\n")
    assert readme.drift(root, load_all(results)) == []
    assert "\nOf our own.\n" in readme.generate(root, load_all(results))[Path("README.md")]


def test_every_file_of_results_is_in_the_docs(root: Path, results: Path) -> None:
    write(results / "another.json", [row("op", "8", 1.0, torch=2.0)])
    text = readme.generate(root, load_all(results))[Path("docs/benchmarks.md")]
    assert re.findall(r"^### `(.*)`", text, re.MULTILINE) == ["another.json", f"{KERNELS}.json", f"{TRAINING}.json"]
    assert "![another-speedup.png](images/another-speedup.png)" in text


# --- which rows the README shows -------------------------------------------------------------------------------------


def test_the_worst_losses_join_the_chosen_rows(results: Path) -> None:
    """All peers count, a gain does not join, and no row comes twice."""
    rows = [(one.case, one.input, one.peer) for one in readme.readme_rows(load_all(results)[KERNELS])]
    chosen = [(case, put, README_PEER) for case, put in README_ROWS]
    assert rows == [*chosen, ("left out", "8", "torch"), ("left out too", "8", "torch")]


def test_a_chosen_row_that_is_not_in_the_file(results: Path) -> None:
    case, put = README_ROWS[0]
    write(results / f"{KERNELS}.json", [row(case, "2x2", 1.0, torch=2.0)])
    message = f"names '{case}' on {put} against torch, which cpu-kernels.json does not have; of that case it has: 2x2"
    with pytest.raises(ResultsError, match=re.escape(message)):
        readme.readme_rows(load_all(results)[KERNELS])


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "no marker",
        "<!-- benchmarks:begin a -->",
        "<!-- benchmarks:end a --> <!-- benchmarks:begin a -->",
        "<!-- benchmarks:begin a --> <!-- benchmarks:end a -->" * 2,
    ],
)
def test_markers_that_are_no_pair(text: str) -> None:
    with pytest.raises(ResultsError, match=r"where\.md: needs <!-- benchmarks:begin a --> and, after it, "):
        readme.replace_block(text, "a", "body", "where.md")


def test_without_results_it_says_how_to_get_some(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert readme.main(["--check", "--results", str(tmp_path)]) == 2
    assert f"no results in {tmp_path}: write some with `python -m benchmarks --json" in capsys.readouterr().err


def test_a_file_that_the_readme_needs(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (results / f"{TRAINING}.json").unlink()
    assert readme.main(["--check", "--results", str(results)]) == 2
    assert f"{TRAINING}.json is not among the results; there are: {KERNELS}" in capsys.readouterr().err


def test_command_line(
    root: Path, results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check, an edit, check, write, check."""
    monkeypatch.setattr(readme, "ROOT", root)
    check = ["--check", "--results", str(results)]
    assert readme.main(check) == 0
    edit(root / "README.md", "| `left out` | 8 |", "| `left out` | 9 |")
    assert readme.main(check) == 1
    printed = capsys.readouterr().out
    assert "-| `left out` | 9 |" in printed
    assert printed.endswith("run `make report`\n")
    assert readme.main(["--results", str(results)]) == 0
    assert readme.main(check) == 0
