"""Two runs side by side, `python -m benchmarks --compare A.json B.json`: what became faster, slower, new, gone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.peers import OURS

Key = tuple[str, str, str, str]  # case, input, how, implementation
PLACE = ("cpu", "gpu", "device", "machine", "threads")  # what makes two machines, or two uses of one, incomparable


class CannotCompare(Exception):
    """The files are not two results that can be set side by side."""


def read(path: Path) -> dict[str, Any]:
    """A file that `--json` wrote.

    Raises:
        CannotCompare: it cannot be read, or is something else.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CannotCompare(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("environment"), dict) or "rows" not in found:
        raise CannotCompare(f"{path} has no environment and rows: it is not a result of `python -m benchmarks --json`")
    return found


def differing_places(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """In what the two machines differ. What one of the files does not say is no difference."""
    pairs = ((name, before["environment"].get(name), after["environment"].get(name)) for name in PLACE)
    return [f"{name}: {a} and {b}" for name, a, b in pairs if a is not None and b is not None and a != b]


def _of_ours(found: dict[str, Any]) -> Iterator[tuple[Key, dict[str, Any]]]:
    """Our timings by key; the other fields of the row stay at hand."""
    for row in found["rows"]:
        for name in row.get("timings", {}):
            if name == OURS or name.startswith(OURS + ","):
                yield (row["case"], row["input"], row["how"], name), row


def _change(before: dict[str, float], after: dict[str, float]) -> str:
    """ "faster" and "slower" only where the spreads do not overlap."""
    if after["p80"] < before["p20"]:
        return "faster"
    return "slower" if after["p20"] > before["p80"] else "same"


def _spread(spread: dict[str, float]) -> str:
    return f"{spread['median']:.1f} ({spread['p20']:.1f}-{spread['p80']:.1f})"


def _speedups(row: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By peer, how many times faster we are, with its spread."""
    timings = row["timings"].items()
    return {peer: timing["times_ours"] for peer, timing in timings if peer.partition(",")[0] != OURS}


def _peers(before: dict[str, Any], after: dict[str, Any]) -> str:
    """How the ratio to each peer moved, which a change of the machine's speed does not move."""
    old, new = _speedups(before), _speedups(after)
    moved = []
    for peer in new:
        was = f"{old[peer]['median']:.2f} ({old[peer]['p20']:.2f}-{old[peer]['p80']:.2f})" if peer in old else "new"
        now = f"{new[peer]['median']:.2f} ({new[peer]['p20']:.2f}-{new[peer]['p80']:.2f})"
        moved.append(f"against {peer} {was} -> {now}")
    return "; ".join(moved)


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Lines: the rows in both, with the ratio of our times, then those in one alone, then the counts."""
    old, new = dict(_of_ours(before)), dict(_of_ours(after))
    lines, changes = [], []
    for key in (key for key in new if key in old):
        case, put, how, name = key
        was, now = (found[key]["timings"][name]["microseconds"] for found in (old, new))
        change = _change(was, now)
        changes.append(change)
        label = f"{case}, {put}, {how}" + ("" if name == OURS else f", {name}")
        ratio = was["median"] / now["median"]
        lines.append(
            f"{change:<7}{ratio:>6.2f}x  {label}: {_spread(was)} -> {_spread(now)} us  {_peers(old[key], new[key])}"
        )
    lines += [f"new     {', '.join(key)}" for key in new if key not in old]
    lines += [f"gone    {', '.join(key)}" for key in old if key not in new]
    counts = ", ".join(f"{changes.count(word)} {word}" for word in ("faster", "same", "slower"))
    only = f"{len(new.keys() - old.keys())} new, {len(old.keys() - new.keys())} gone"
    return [*lines, f"{len(changes)} rows in both: {counts}; {only}"]


def main(before_path: Path, after_path: Path, *, across_machines: bool = False) -> int:
    """Print the comparison; 0.

    Raises:
        CannotCompare: a file is none of ours, nothing is timed in both, or the machines differ and `across_machines`
            does not say that this is meant.
    """
    before, after = read(before_path), read(after_path)
    differing = differing_places(before, after)
    if differing and not across_machines:
        raise CannotCompare(
            f"the two were measured on different machines ({'; '.join(differing)}), so their ratio says nothing about "
            "the code; --across-machines compares them all the same"
        )
    warning = f"WARNING: DIFFERENT MACHINES, times are not comparable: {'; '.join(differing)}"
    for label, found in (("before", before), ("after", after)):
        where = found["environment"]
        dirty = ", with uncommitted changes" if where.get("dirty") else ""
        print(f"{label}: commit {where.get('commit')}{dirty}, {where.get('time')}, torch {where.get('torch')}")
    print(
        "ratio: our time before over our time after, above 1 it became faster; a change is one when spreads are apart"
    )
    lines = [*compare(before, after)]
    print("\n".join([warning, *lines, warning] if differing else lines))
    return 0
