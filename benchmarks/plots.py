"""Plots of saved results, `python -m benchmarks.plots`: speedup over each peer, and GB/s by bytes moved (roofline).

PNGs go to docs/images. Their size, resolution and metadata are fixed: the same matplotlib draws the same bytes.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import images
from benchmarks.peers import OURS
from benchmarks.readme import RESULTS, ROOT
from benchmarks.saved import Comparison, Results, ResultsError, load_all
from benchmarks.tables import METHODS
from benchmarks.tables import title as title_of

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

DPI = 120
WIDTH = 11.0  # inches
ROW = 0.22  # inches of one row of the speedup plot
OFFSET = 0.24  # rows between the dots of two peers
COLOURS = {"faster": "#1b6ca8", "even": "#8a8a8a", "slower": "#c8391e"}  # apart for the colour-blind too
MARKERS = ("o", "D", "s", "^", "v", "P", "X")  # by peer, in the order of the file
PALETTE = ("#1b6ca8", "#c8391e", "#2e8b57", "#7b4fa3", "#b8860b", "#4a4a4a", "#d16ba5", "#17a2b8")


def new_figure(width: float, height: float) -> Figure:
    """A figure without pyplot's global state; inches.

    Raises:
        ResultsError: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ResultsError("matplotlib is not installed; it comes with the extra `bench`") from error
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain_ticks(axis: Axis) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5 of every decade, written as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=30))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def subtitle(results: Results) -> str:
    """Where it was measured, short enough for a plot."""
    where = results.environment
    dirty = " with uncommitted changes" if where.get("dirty") else ""
    machine = where.get("gpu") or where.get("cpu") or where.get("machine") or "unknown machine"
    return f"{machine}, torch {where.get('torch', '?')}, commit {str(where.get('commit'))[:12]}{dirty}"


def title(results: Results, comparisons: Sequence[Comparison]) -> str:
    """What is shown, how it was timed, and where."""
    how = comparisons[0].how
    return f"{title_of(comparisons)}, {METHODS.get(how, how)}\n{subtitle(results)}"


def speedup_figure(results: Results, comparisons: Sequence[Comparison]) -> Figure:
    """One row for each case and input, one dot for each peer with its 20th to 80th percentile; losses left of 1."""
    rows = images.jobs(list(comparisons))
    peers = list(dict.fromkeys(one.peer for one in comparisons))
    figure = new_figure(WIDTH, 1.5 + ROW * len(rows) + 0.22 * ((len(peers) + 6) // 5))
    axes = figure.add_subplot()
    shown = Counter((one.case, one.input) for one in comparisons)  # peers that share a row stand one above the other
    placed: Counter[images.Job] = Counter()
    for one in comparisons:
        job = one.case, one.input
        offset = OFFSET * (placed[job] - (shown[job] - 1) / 2)
        placed[job] += 1
        low, middle, high = one.speedup.p20, one.speedup.median, one.speedup.p80
        axes.errorbar(
            middle,
            rows.index(job) + offset,
            xerr=[[max(0.0, middle - low)], [max(0.0, high - middle)]],
            marker=MARKERS[peers.index(one.peer) % len(MARKERS)],
            color=COLOURS[one.verdict],
            markersize=5,
            linewidth=1.2,
            linestyle="none",
        )
    left = min(0.5, *(one.speedup.p20 for one in comparisons)) / 1.15
    right = max(2.0, *(one.speedup.p80 for one in comparisons)) * 1.15
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.axvspan(left, 1.0, color=COLOURS["slower"], alpha=0.05, linewidth=0)
    axes.set_yticks(range(len(rows)), row_labels(rows), fontsize=7.5, family="monospace")
    axes.set_ylim(len(rows) - 0.5, -0.5)
    for border in (index for index in range(1, len(rows)) if rows[index][0] != rows[index - 1][0]):
        axes.axhline(border - 0.5, color="#999999", linewidth=0.6)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    plain_ticks(axes.xaxis)
    text = f"time of the peer / time of {OURS} (right of 1: {OURS} is faster; left of 1: a loss)"
    axes.set_xlabel(text, fontsize=9)
    axes.set_title(title(results, comparisons), fontsize=10)
    _key(figure, peers, {one.verdict for one in comparisons})
    return figure


def row_labels(rows: Sequence[images.Job]) -> list[str]:
    """Case and input in two columns; a case is named on its first row."""
    cases = [case for case, _ in rows]
    named = [case if index == 0 or case != cases[index - 1] else "" for index, case in enumerate(cases)]
    widths = max(map(len, cases)), max(len(put) for _, put in rows)
    return [f"{name:<{widths[0]}} {put:>{widths[1]}}" for name, (_, put) in zip(named, rows, strict=True)]


def _key(figure: Figure, peers: Sequence[str], verdicts: set[str]) -> None:
    """Shapes for the peers, colours for the verdicts, below the axes."""
    from matplotlib.lines import Line2D

    shapes = [
        Line2D([], [], linestyle="none", marker=MARKERS[index % len(MARKERS)], color="black", label=f"against {peer}")
        for index, peer in enumerate(peers)
    ]
    words = {"faster": "faster", "even": "even", "slower": "slower (a loss)"}
    colours = [
        Line2D([], [], linestyle="-", linewidth=3, color=COLOURS[verdict], label=word)
        for verdict, word in words.items()
        if verdict in verdicts
    ]
    figure.legend(handles=[*shapes, *colours], loc="outside lower center", ncols=5, fontsize=8, frameon=False)


def roofline_figure(results: Results) -> Figure:
    """Our GB/s over the bytes that a job moves, one colour and shape for each case, below the copy bandwidth."""
    comparisons = images.with_rates(results)
    by_case: dict[str, list[Comparison]] = {}
    for one in comparisons:
        by_case.setdefault(one.case, []).append(one)
    figure = new_figure(WIDTH, max(4.8, 1.2 + 0.2 * len(by_case)))
    from matplotlib.ticker import EngFormatter  # after the line that says so if there is no matplotlib

    axes = figure.add_subplot()
    for index, (case, group) in enumerate(by_case.items()):
        axes.plot(
            [one.bytes_moved for one in group],
            [one.gb_per_second or 0.0 for one in group],
            linestyle="none",
            marker=MARKERS[index // len(PALETTE) % len(MARKERS)],
            color=PALETTE[index % len(PALETTE)],
            markersize=6,
            alpha=0.85,
            label=case,
        )
    copy = results.environment.get("copy_gb_per_second")
    if copy:
        axes.axhline(copy, color="black", linewidth=1, linestyle="--", label=f"a plain copy, {copy:,.0f} GB/s")
    else:
        note = "no copy bandwidth was measured in this run, so no roof is drawn"
        axes.text(0.99, 0.02, note, transform=axes.transAxes, ha="right", fontsize=8, style="italic")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(EngFormatter("B"))
    plain_ticks(axes.yaxis)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("bytes that the job has to move, by its formula", fontsize=9)
    axes.set_ylabel(f"GB/s of {OURS}: those bytes over its median time", fontsize=9)
    axes.set_title(title(results, comparisons), fontsize=10)
    figure.legend(loc="outside right center", fontsize=7.5, frameon=False)
    return figure


def save(figure: Figure, path: Path, results: Results) -> None:
    """Write a PNG that says what it was drawn from, and neither when nor by which version."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=DPI, metadata={"Software": None, "Source": images.source(results)})


def draw(results: Results, folder: Path) -> list[Path]:
    """Every plot of one results file; the paths written."""
    figures = {name: speedup_figure(results, part) for name, part in images.parts(results).items()}
    roofline = images.roofline_name(results)
    if roofline:
        figures[roofline] = roofline_figure(results)
    for name, figure in figures.items():
        save(figure, folder / name, results)
    return [folder / name for name in figures]


def main(argv: list[str] | None = None) -> int:
    """Draw all plots; 0, or 2 without results or matplotlib."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    parser.add_argument("--out", type=Path, default=ROOT / images.IMAGES, metavar="DIR", help="default: docs/images")
    args = parser.parse_args(argv)
    try:
        for results in load_all(args.results).values():
            for path in draw(results, args.out):
                print(f"wrote {path}")
    except ResultsError as error:
        print(f"benchmarks.plots: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
