"""Markdown from saved results: `python -m benchmarks.tables FILE...` prints every table, losses marked."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.explanations import SMALL_ELEMENTS
from benchmarks.peers import OURS
from benchmarks.saved import STEPS, Comparison, Results, ResultsError, Steps, geometric_mean, load

METHODS = {
    "process time": "CPU time of one thread",
    "wall time": "wall time",
    "wall time, freed memory kept": "wall time, with glibc's allocator set to keep freed memory",
    "events": "CUDA events around calls from Python",
    "graph": "CUDA events around replays of a CUDA graph",
    "host time": "host time of the call",
    "fresh process": "wall time in fresh processes",
}
TITLES = {"kernels": "Operators", "modules": "Modules", STEPS: "Training steps", "overhead": "Overhead of a call"}
COUNTS = {"aten_calls": "ATen calls", "launches": "launches", "host_syncs": "host syncs", "peak_bytes": "peak bytes"}
ASIDES = {
    "wrong": "not timed, wrong:",
    "not compared": "not compared with",
    "not measured": "not measured:",
    "differs": "another result than the contract's from",
    "not captured": "timed by calls, as no graph could be captured, for",
}
ONCE = "fresh process"  # as overhead.py times imports, first calls and compilation
VERSIONS = {"python": "Python", "torch": "torch", "triton": "Triton"}
# Keys of the environment that its line tells in another form, or not at all.
TOLD = {*VERSIONS, *["cores", "threads", "commit", "dirty", "machine", "cpu", "gpu", "device", "suite", "schema"]}

Cells = Sequence[str]


def table(header: Cells, lines: Sequence[Cells], right: Sequence[int] = ()) -> str:
    """A Markdown table. `right` numbers the columns that are aligned to the right."""
    rule = ["---:" if column in right else "---" for column in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *map(_cells, lines)))


def _cells(cells: Cells) -> Cells:
    return [" ".join(cell.replace("|", "\\|").split()) for cell in cells]


def number(value: float) -> str:
    """Three significant digits at the least, and thousands apart."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def bullets(lines: Sequence[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"* {line}" for line in lines)


def speedup(comparison: Comparison) -> str:
    """The median with 20th and 80th percentile, and a word where it is not a gain."""
    ratio = comparison.speedup
    spread = f" ({ratio.p20:.2f}-{ratio.p80:.2f})" if ratio.p20 != ratio.p80 else ""
    word = {"faster": "", "even": ", even", "slower": ", a loss"}[comparison.verdict]
    return f"{ratio.median:.2f}{spread}{word}"


def environment_line(results: Results) -> str:
    """Machine, versions, commit and method in one line, as far as the file says."""
    where = results.environment
    machine = where.get("gpu") or where.get("cpu") or where.get("machine") or "unknown machine"
    tree = {None: "", False: ", clean tree", True: ", with uncommitted changes"}.get(where.get("dirty"), "")
    parts = [
        f"{machine} ({where.get('device', 'unknown device')})",
        *(
            f"{where[key]} {key.removesuffix('s' * (where[key] == 1))}"
            for key in ("cores", "threads")
            if where.get(key)
        ),
        *(f"{label} {where[key]}" for key, label in VERSIONS.items() if where.get(key) is not None),
        f"commit {where['commit'][:12]}{tree}" if where.get("commit") else "commit unknown",
    ]
    parts += [
        f"{key.replace('_', ' ')} {round(value, 1) if isinstance(value, float) else value}"
        for key, value in where.items()
        if key not in TOLD and isinstance(value, (str, int, float))
    ]
    ways = dict.fromkeys(one.how for one in results.comparisons)
    parts.append("method: " + " and ".join(METHODS.get(way, way) for way in ways))
    return "; ".join(parts) + "."


def means(comparisons: Sequence[Comparison]) -> list[str]:
    """One sentence for every suite, way of timing and peer: geometric mean, extremes and counts, small inputs apart.

    None for what a process pays once: imports and compilation have no common measure.
    """
    groups: dict[tuple[str, str, str], list[Comparison]] = {}
    for one in comparisons:
        if one.how != ONCE:
            groups.setdefault((one.suite, one.how, one.peer), []).append(one)
    suites, ways = {suite for suite, _, _ in groups}, {how for _, how, _ in groups}
    sentences = []
    for (suite, how, peer), chosen in groups.items():
        start = f"{TITLES.get(suite, suite)}: against" if len(suites) > 1 else "Against"
        timed = f", timed by {METHODS.get(how, how)}" if len(ways) > 1 else ""
        verdicts = [one.verdict for one in chosen]
        counts = ", ".join(f"{verdicts.count(word)} {word}" for word in ("faster", "even", "slower"))
        ratios = [one.speedup.median for one in chosen]
        sentence = (
            f"{start} {peer}{timed}, geometric mean of the speedups {geometric_mean(chosen):.2f} over "
            f"{len(chosen)} {'comparison' if len(chosen) == 1 else 'comparisons'}, "
            f"from {min(ratios):.2f} to {max(ratios):.2f}: {counts}."
        )
        small = [one for one in chosen if one.elements is not None and one.elements <= SMALL_ELEMENTS]
        large = [one for one in chosen if one.elements is not None and one.elements > SMALL_ELEMENTS]
        if small and large:
            sentence += (
                f" On inputs of up to {SMALL_ELEMENTS:,} elements it is {geometric_mean(small):.2f} ({len(small)}), "
                f"on larger ones {geometric_mean(large):.2f} ({len(large)})."
            )
        sentences.append(sentence)
    return sentences


def comparison_table(
    comparisons: Sequence[Comparison], reasons: Mapping[str, int] | None = None, *, brief: bool = False
) -> str:
    """One line for every comparison; columns that would say nothing are left out.

    Args:
        comparisons: the lines, in their order.
        reasons: the number of each reason for a loss, for a column of notes.
        brief: leave out rates and counts.
    """
    several_ways = len({one.how for one in comparisons}) > 1
    rates = not brief and any(one.bytes_moved for one in comparisons)
    copies = not brief and any(one.of_copy is not None for one in comparisons)
    counted = [] if brief else [name for name in COUNTS if any(name in one.counts for one in comparisons)]
    noted = bool(reasons) and any(one.why for one in comparisons)
    left = ["case", "input", *(["timed by"] if several_ways else []), "peer"]
    right = [
        "peer, us",
        f"{OURS}, us",
        "speedup (p20-p80)",
        *(["GB/s"] if rates else []),
        *(["of a copy"] if copies else []),
    ]
    right += [f"{COUNTS[name]}, peer / {OURS}" for name in counted]
    lines = []
    for one in comparisons:
        cells = [f"`{one.case}`", one.input, *([one.how] if several_ways else []), one.peer]
        cells += [number(one.theirs), number(one.ours), speedup(one)]
        if rates:
            cells.append("-" if one.gb_per_second is None else f"{one.gb_per_second:.1f}")
        if copies:
            cells.append("-" if one.of_copy is None else f"{one.of_copy:.0%}")
        cells += [" / ".join(f"{count:,}" for count in one.counts.get(name, ())) or "-" for name in counted]
        if reasons and noted:
            cells.append(f"[{reasons[one.why]}]" if one.why else "")
        lines.append(cells)
    header = [*left, *right, *(["note"] if noted else [])]
    return table(header, lines, right=range(len(left), len(left) + len(right)))


def numbered_reasons(comparisons: Sequence[Comparison]) -> dict[str, int]:
    """What the file says about losses, each text once, numbered from 1."""
    texts = dict.fromkeys(comparison.why for comparison in comparisons if comparison.why)
    return {text: index for index, text in enumerate(texts, 1)}


def remarks(results: Results) -> list[str]:
    """Reasons by their number, losses that have none, and what was refused, differed or was not timed."""
    lines = [f"[{index}] {text}" for text, index in numbered_reasons(results.comparisons).items()]
    losses = [comparison for comparison in results.comparisons if comparison.verdict == "slower"]
    silent = sum(comparison.why is None for comparison in losses)
    if silent:
        lines.append(f"Losses without a reason in the file: {silent} of {len(losses)}.")
    about: dict[tuple[str, str], list[str]] = {}
    for one in results.asides:
        about.setdefault((one.kind, one.text), []).append(one.row)
    for (kind, text), rows in about.items():
        named = dict.fromkeys(rows)
        lines.append(f"{', '.join(named) if len(named) <= 3 else f'{len(named)} rows'}: {ASIDES[kind]} {text}")
    if results.inputs:
        lines.append("Inputs: " + "; ".join(f"{put}, {name}" for put, name in results.inputs.items()))
    return lines


def steps_table(results: Results, reasons: Mapping[str, int] | None = None) -> str:
    """Milliseconds per training step. A loss is one against torch.ao run the same way; `reasons` has their numbers."""
    variants = list(dict.fromkeys(variant for step in results.steps for variant in step.milliseconds))
    marks = {}
    for one in results.comparisons:
        if one.suite == STEPS:
            note = f" [{reasons[one.why]}]" if reasons and one.why else ""
            marks[one.case, f"{OURS}, {one.input}"] = (", a loss" if one.verdict == "slower" else "") + note
    lines = []
    for step in results.steps:
        cells = [number(step.milliseconds[variant]) if variant in step.milliseconds else "-" for variant in variants]
        noted = (cell + marks.get((step.model, variant), "") for cell, variant in zip(cells, variants, strict=True))
        lines.append([step.model, *noted])
    return table(["ms per step", *variants], lines, right=range(1, len(variants) + 1))


def cost_over_float(steps: Sequence[Steps]) -> list[str]:
    """What quantization-aware training costs, both compiled, from the cheapest model to the dearest."""
    ours, plain = f"{OURS}, compiled", "float, compiled"
    both = [step.milliseconds for step in steps if ours in step.milliseconds and plain in step.milliseconds]
    if not both:
        return []
    costs = sorted(times[ours] / times[plain] - 1 for times in both)
    between = " to ".join(dict.fromkeys(f"{100 * cost:.0f}" for cost in (costs[0], costs[-1])))
    return [f"Compiled, a step of ours takes {between} % longer than one of the compiled float model."]


def title(comparisons: Sequence[Comparison]) -> str:
    """What they are about, as "Operators and modules"."""
    suites = dict.fromkeys(one.suite for one in comparisons)
    return " and ".join(TITLES.get(suite, suite) for suite in suites).capitalize()


def section(results: Results) -> str:
    """Heading, environment, and a table for each suite of one file with its means; then the remarks."""
    run = f", suite {results.run}" if results.run else ""
    parts = [f"### `{results.name}.json`{run}", environment_line(results)]
    reasons = numbered_reasons(results.comparisons)
    for suite in dict.fromkeys(one.suite for one in results.comparisons):
        chosen = [one for one in results.comparisons if one.suite == suite]
        of_steps = suite == STEPS and results.steps
        sentences = means(chosen) + (cost_over_float(results.steps) if of_steps else [])
        parts += [f"#### {TITLES.get(suite, suite)}", bullets(sentences)]
        parts.append(steps_table(results, reasons) if of_steps else comparison_table(chosen, reasons))
    return "\n\n".join(part for part in [*parts, bullets(remarks(results))] if part)


def main(argv: list[str] | None = None) -> int:
    """Print one section for each file; 0, or 2 if one cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=(__doc__ or "").strip())
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON of a run, written with --json")
    args = parser.parse_args(argv)
    try:
        print("\n\n".join(section(load(path)) for path in args.files))
    except ResultsError as error:
        print(f"benchmarks.tables: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
