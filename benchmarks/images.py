"""The plots as files: which ones a results file has, and whose digest a PNG carries. Needs no matplotlib."""

from __future__ import annotations

from pathlib import Path

from benchmarks.saved import Comparison, Results

IMAGES = Path("docs/images")
ROWS_PER_PLOT = 60

Job = tuple[str, str]  # case and input: one row of a plot


def jobs(comparisons: list[Comparison]) -> list[Job]:
    """Case and input of the comparisons, each once, in their order."""
    return list(dict.fromkeys((comparison.case, comparison.input) for comparison in comparisons))


def parts(results: Results) -> dict[str, list[Comparison]]:
    """The comparisons of every speedup plot, by its file name: one plot for each way of timing, and at most 60 rows."""
    named: dict[str, list[Comparison]] = {}
    ways = list(dict.fromkeys(comparison.how for comparison in results.comparisons))
    for how in ways:
        timed = [comparison for comparison in results.comparisons if comparison.how == how]
        rows = jobs(timed)
        pages = [rows[start : start + ROWS_PER_PLOT] for start in range(0, len(rows), ROWS_PER_PLOT)]
        for number, page in enumerate(pages, 1):
            suffix = (f"-{how.replace(' ', '-')}" if len(ways) > 1 else "") + (f"-{number}" if len(pages) > 1 else "")
            chosen = set(page)
            named[f"{results.name}-speedup{suffix}.png"] = [one for one in timed if (one.case, one.input) in chosen]
    return named


def with_rates(results: Results) -> list[Comparison]:
    """What a roofline shows: jobs with a byte formula, each once, by graph replay where there was one."""
    ways = {comparison.how for comparison in results.comparisons}
    chosen = [one for one in results.comparisons if one.bytes_moved and (one.how == "graph" or "graph" not in ways)]
    return list({(one.case, one.input): one for one in reversed(chosen)}.values())[::-1]


def roofline_name(results: Results) -> str | None:
    """The file name of the roofline, or None where no row has a byte formula."""
    return f"{results.name}-roofline.png" if with_rates(results) else None


def image_names(results: Results) -> list[str]:
    """Every plot of a results file."""
    roofline = roofline_name(results)
    return [*parts(results), *([roofline] if roofline else [])]


def source(results: Results) -> str:
    """What a PNG says it was drawn from."""
    return f"{results.name}.json sha256:{results.digest}"


def is_of(path: Path, results: Results) -> bool:
    """Whether the PNG was drawn from exactly these results. Text chunks of a PNG are not compressed."""
    return path.is_file() and source(results).encode() in path.read_bytes()
