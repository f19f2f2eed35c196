"""README and docs/benchmarks.md from committed results: `python -m benchmarks.readme` writes, `--check` compares.

Generated parts stand between `<!-- benchmarks:begin NAME -->` and `<!-- benchmarks:end NAME -->`; all else is written
by hand and left alone. The plots are drawn by `benchmarks.plots`; each carries the digest of its results, so that
`--check` knows an old one without drawing it.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks import tables
from benchmarks.images import IMAGES, image_names, is_of
from benchmarks.saved import Comparison, Results, ResultsError, load_all, worst_first

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
KERNELS, TRAINING = "cpu-kernels", "cpu-qat"

# The README's rows against torch. The worst losses of the file, against any peer, join them whatever stands here.
README_ROWS = (
    ("PerChannelMinMaxObserver ch_axis=1", "4096x1024"),
    ("PerChannelMinMaxObserver ch_axis=1", "16x64x32x32"),
    ("fake_quantize", "16x64x32x32"),
    ("FakeQuantize per channel step", "256x128x3x3"),
    ("FakeQuantize step", "16x64x32x32"),
    ("FusedMovingAvgObsFakeQuantize step", "16x64x32x32"),
    ("LearnableFakeQuantize learning step", "16x64x32x32"),
    ("LearnableFakeQuantize per channel learning step", "256x128x3x3"),
    ("MinMaxObserver", "16x64x32x32"),
    ("LearnableFakeQuantize learning step", "64x16"),
    ("FakeQuantize step", "64x16"),
    ("FusedMovingAvgObsFakeQuantize step", "64x16"),
)
README_PEER = "torch"
WORST = 3


def readme_rows(results: Results) -> list[Comparison]:
    """The chosen rows, and the worst losses that are not among them.

    Raises:
        ResultsError: if a chosen row is not in the file.
    """
    rows = []
    for case, put in README_ROWS:
        found = [one for one in results.comparisons if (one.case, one.input, one.peer) == (case, put, README_PEER)]
        if not found:
            inputs = ", ".join(dict.fromkeys(one.input for one in results.comparisons if one.case == case))
            raise ResultsError(
                f"README_ROWS of benchmarks/readme.py names {case!r} on {put} against {README_PEER}, which "
                f"{results.name}.json does not have; of that case it has: {inputs or 'nothing'}"
            )
        rows += found
    losses = [one for one in worst_first(results.comparisons) if one.speedup.median < 1]
    return rows + [one for one in losses[:WORST] if one not in rows]


def kernels_block(all_results: Mapping[str, Results]) -> str:
    """The README's table of operators and modules, and what all of the file come to."""
    results = _named(all_results, KERNELS)
    told = tables.bullets(tables.means(results.comparisons))
    return "\n\n".join([tables.comparison_table(readme_rows(results), brief=True), told, _measured(results)])


def steps_block(all_results: Mapping[str, Results]) -> str:
    """The README's table of training steps."""
    results = _named(all_results, TRAINING)
    told = tables.bullets([*tables.means(results.comparisons), *tables.cost_over_float(results.steps)])
    table = tables.steps_table(results) if results.steps else tables.comparison_table(results.comparisons)
    return "\n\n".join([table, told, _measured(results)])


def all_tables(all_results: Mapping[str, Results]) -> str:
    """Every file of the folder in full, with its plots."""
    sections = []
    for results in all_results.values():
        plots = [f"![{name}]({IMAGES.name}/{name})" for name in image_names(results)]
        sections.append("\n\n".join([tables.section(results), *plots]))
    return "\n\n".join(sections)


Block = Callable[[Mapping[str, Results]], str]
BLOCKS: dict[Path, dict[str, Block]] = {
    Path("README.md"): {KERNELS: kernels_block, TRAINING: steps_block},
    Path("docs/benchmarks.md"): {"results": all_tables},
}


def _named(all_results: Mapping[str, Results], name: str) -> Results:
    if name not in all_results:
        raise ResultsError(f"{name}.json is not among the results; there are: {', '.join(all_results)}")
    return all_results[name]


def _measured(results: Results) -> str:
    return f"Measured ({results.name}.json): {tables.environment_line(results)}"


def replace_block(text: str, name: str, body: str, where: str) -> str:
    """The text with what stands between the markers of `name` replaced.

    Raises:
        ResultsError: if the pair of markers is not there exactly once, in this order.
    """
    begin, end = f"<!-- benchmarks:begin {name} -->", f"<!-- benchmarks:end {name} -->"
    found = list(re.finditer(f"{re.escape(begin)}.*?{re.escape(end)}", text, re.DOTALL))
    if len(found) != 1 or text.count(begin) != 1 or text.count(end) != 1:
        raise ResultsError(f"{where}: needs {begin} and, after it, {end}, each once")
    return text[: found[0].start()] + f"{begin}\n{body}\n{end}" + text[found[0].end() :]


def generate(root: Path, all_results: Mapping[str, Results]) -> dict[Path, str]:
    """What the documents below `root` should hold, by their path below it.

    Raises:
        ResultsError: if results, a chosen row or a marker is missing.
    """
    texts = {}
    for path, blocks in BLOCKS.items():
        text = (root / path).read_text(encoding="utf-8")
        for name, block in blocks.items():
            text = replace_block(text, name, block(all_results), str(path))
        texts[path] = text
    return texts


def drift(root: Path, all_results: Mapping[str, Results]) -> list[str]:
    """What differs from the results: a diff for each document, a line for each plot. Empty if nothing does."""
    found = []
    for path, wanted in generate(root, all_results).items():
        present = (root / path).read_text(encoding="utf-8")
        lines = (present.splitlines(), wanted.splitlines())
        diff = list(difflib.unified_diff(*lines, f"{path} as it is", f"{path} from the results", lineterm="", n=0))
        found += ["\n".join(diff)] if present != wanted else []
    for results in all_results.values():
        for name in image_names(results):
            if not is_of(root / IMAGES / name, results):
                found.append(f"{IMAGES / name} is missing or was not drawn from this {results.name}.json")
    return found


def main(argv: list[str] | None = None) -> int:
    """Write the documents, or with --check compare; 0, 1 if something drifted, 2 if it cannot be told."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; print what drifted and exit with 1")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    args = parser.parse_args(argv)
    try:
        all_results = load_all(args.results)
        if args.check:
            found = drift(ROOT, all_results)
            print(
                "\n".join([*found, "run `make report`"]) if found else "README, docs and plots agree with the results"
            )
            return 1 if found else 0
        for path, text in generate(ROOT, all_results).items():
            (ROOT / path).write_text(text, encoding="utf-8")
            print(f"wrote {path}")
    except ResultsError as error:
        print(f"benchmarks.readme: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
