"""Saved results read back: the JSON of `python -m benchmarks` or `python -m benchmarks.qat` as typed rows.

Fields that are not known here are passed over, and those that older files lack are empty: a report of an old file is
still a report. What a report cannot do without raises `ResultsError`, with the file and the row.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers import OURS
from benchmarks.report import verdict
from benchmarks.timer import Spread, Timing

STEPS = "qat"  # the suite of training steps
PEER_OF_STEPS = "torch.ao"
ASIDE_OF = {
    "refused": "not compared",
    "absent": "not compared",
    "peers_differ": "differs",
    "not_captured": "not captured",
}


class ResultsError(ValueError):
    """A results file that is missing, is not JSON or lacks what a report needs."""


@dataclass(frozen=True)
class Comparison:
    """One peer against ours on one job: what a table line and a bar of a plot show.

    Attributes:
        suite: the case's, as "kernels" or "modules"; "qat" for a training step.
        case: name of the case, or of the model of a training step.
        input: shape, dtype and layout; "eager" or "compiled" of a training step.
        how: how it was timed, as in the JSON.
        peer: whom ours is compared with.
        ours: microseconds of one call.
        theirs: microseconds of one call of the peer.
        speedup: the peer's time over ours. Without p20 and p80 in the file, both are the median.
        verdict: "faster", "even" or "slower".
        elements: of the input, where it is one tensor.
        bytes_moved: the least that the job reads and writes, 0 where there is no formula.
        of_copy: share of the copy bandwidth of the same run, where one was measured.
        counts: what one call does besides taking time, as "aten_calls": of the peer and of ours, if both were counted.
        why: what the file says about a speedup below 1.
    """

    suite: str
    case: str
    input: str
    how: str
    peer: str
    ours: float
    theirs: float
    speedup: Spread
    verdict: str
    elements: int | None = None
    bytes_moved: int = 0
    of_copy: float | None = None
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)
    why: str | None = None

    @property
    def gb_per_second(self) -> float | None:
        """Our rate by the byte formula, in 10^9 bytes per second."""
        return self.bytes_moved / self.ours / 1e3 if self.bytes_moved else None


@dataclass(frozen=True)
class Aside:
    """What a file says of a row beside its times: `kind` is a key of `tables.ASIDES`."""

    kind: str
    case: str
    input: str
    how: str
    text: str

    @property
    def row(self) -> str:
        """The row it is about, for people."""
        return f"`{self.case}` {self.input}"


@dataclass(frozen=True)
class Steps:
    """A QAT training step of one model: milliseconds by variant, as "torch.ao, eager"."""

    model: str
    milliseconds: dict[str, float]


@dataclass(frozen=True)
class Results:
    """One file.

    Attributes:
        name: the file's name without ".json".
        digest: SHA-256 of the file, in hexadecimal digits.
        environment: where and when it was measured, as in the file.
        run: "full", "quick" and so on, where the file says what was run.
        comparisons: in the order of the file.
        asides: rows that were not timed, and remarks on those that were.
        steps: of training steps.
        inputs: what an input is in a real network, where the file says so.
    """

    name: str
    digest: str
    environment: dict[str, Any]
    run: str | None
    comparisons: list[Comparison]
    asides: list[Aside]
    steps: list[Steps]
    inputs: dict[str, str]


def _spread(values: dict[str, float]) -> Spread:
    return Spread(values["median"], values["p20"], values["p80"])


def _text(value: object) -> str:
    """A remark of the file as one line: a string as it is, differences by their text."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "; ".join(_text(item) for item in value)
    if isinstance(value, dict) and "text" in value:
        return str(value["text"])
    return json.dumps(value)


def _why(why: object, peer: str) -> str | None:
    """The explanation of a row, which may be one for all peers or one for each."""
    chosen = why.get(peer) if isinstance(why, dict) else why
    return _text(chosen) if chosen else None


def _counts(counts: dict[str, dict[str, int | None]], peer: str) -> dict[str, tuple[int, int]]:
    """Those that were taken of the peer and of ours."""
    ours, theirs = counts.get(OURS, {}), counts.get(peer, {})
    taken = ((name, theirs.get(name), own) for name, own in ours.items())
    return {name: (their, own) for name, their, own in taken if their is not None and own is not None}


def _of_case(row: dict[str, Any]) -> tuple[list[Comparison], list[Aside]]:
    """Comparisons and remarks of one row of `python -m benchmarks`."""
    case, put, how = row["case"], row["input"], row["how"]
    asides = [Aside("wrong", case, put, how, _text(row["wrong"]))] if row.get("wrong") else []
    for key, kind in ASIDE_OF.items():
        asides += [Aside(kind, case, put, how, f"{peer}: {_text(what)}") for peer, what in row.get(key, {}).items()]
    comparisons = []
    for peer, timing in row["timings"].items():
        if peer == OURS:
            continue
        timed = Timing(_spread(timing["microseconds"]), _spread(timing["times_ours"]))
        comparisons.append(
            Comparison(
                suite=row.get("suite", "kernels"),
                case=case,
                input=put,
                how=how,
                peer=peer,
                ours=row["timings"][OURS]["microseconds"]["median"],
                theirs=timed.microseconds.median,
                speedup=timed.times_ours,
                verdict=verdict(timed),
                elements=math.prod(row["shape"]) if row.get("shape") else None,
                bytes_moved=row.get("bytes_moved", 0),
                of_copy=row.get("of_copy"),
                counts=_counts(row.get("counts", {}), peer),
                why=_why(row.get("why"), peer) if timed.times_ours.median < 1 else None,
            )
        )
    return comparisons, asides


def _of_model(row: dict[str, Any]) -> tuple[Steps, list[Comparison], list[Aside]]:
    """Times, comparisons and remarks of one training step: ours against torch.ao run the same way.

    The file has ratios by rounds to one way of ours alone, so the others are ratios of medians.
    """
    times = {str(key): float(value) for key, value in row["milliseconds"].items()}
    by_rounds = row.get("timings", {})
    comparisons = []
    for variant, milliseconds in times.items():
        name, _, way = variant.partition(", ")
        peer = f"{PEER_OF_STEPS}, {way}"
        if name != OURS or peer not in times:
            continue
        ours, theirs = 1e3 * milliseconds, 1e3 * times[peer]
        speedup = Spread(theirs / ours, theirs / ours, theirs / ours)
        if by_rounds.get(variant, {}).get("times_ours") == {"median": 1.0, "p20": 1.0, "p80": 1.0}:
            speedup = _spread(by_rounds[peer]["times_ours"])
        comparisons.append(
            Comparison(
                suite=STEPS,
                case=row["model"],
                input=way,
                how=row.get("how", "wall time"),
                peer=peer,
                ours=ours,
                theirs=theirs,
                speedup=speedup,
                verdict=verdict(Timing(speedup, speedup)),
                why=_why(row.get("why"), peer) if speedup.median < 1 else None,
            )
        )
    asides = [
        Aside("not measured", row["model"], "step", row.get("how", "wall time"), f"{way}: {_text(reason)}")
        for way, reason in row.get("absent", {}).items()
    ]
    return Steps(row["model"], times), comparisons, asides


def load(path: Path) -> Results:
    """Read one results file.

    Raises:
        ResultsError: if it cannot be read, is not JSON, has no environment, no rows, or a row without what tables need.
    """
    try:
        raw = path.read_bytes()
        saved = json.loads(raw)
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(saved, dict) or not isinstance(saved.get("environment"), dict) or not saved.get("rows"):
        raise ResultsError(f"{path}: needs an object with `environment` and a non-empty list `rows`")
    comparisons: list[Comparison] = []
    asides: list[Aside] = []
    steps: list[Steps] = []
    inputs: dict[str, str] = {}
    for index, row in enumerate(saved["rows"]):
        try:
            if "milliseconds" in row:
                step, found, remarks = _of_model(row)
                steps.append(step)
            else:
                found, remarks = _of_case(row)
                if row.get("input_name"):
                    inputs[row["input"]] = row["input_name"]
            comparisons += found
            asides += remarks
        except (KeyError, TypeError, AttributeError) as error:
            what = f"has no {error}" if isinstance(error, KeyError) else f"is not such a row: {error}"
            raise ResultsError(f"{path}: rows[{index}] {what}") from error
    run = saved["environment"].get("suite")
    digest = hashlib.sha256(raw).hexdigest()
    return Results(path.stem, digest, saved["environment"], run, comparisons, asides, steps, inputs)


def load_all(folder: Path) -> dict[str, Results]:
    """Every results file of a folder, by name.

    Raises:
        ResultsError: if there is none, or one cannot be read.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise ResultsError(
            f"no results in {folder}: write some with `python -m benchmarks --json {folder}/cpu-kernels.json` and "
            f"`python -m benchmarks.qat --json {folder}/cpu-qat.json`"
        )
    return {path.stem: load(path) for path in paths}


def geometric_mean(comparisons: list[Comparison]) -> float:
    """Of the median speedups of at least one comparison."""
    return statistics.geometric_mean(comparison.speedup.median for comparison in comparisons)


def worst_first(comparisons: list[Comparison]) -> list[Comparison]:
    """From the largest loss to the largest gain."""
    return sorted(comparisons, key=lambda comparison: comparison.speedup.median)
