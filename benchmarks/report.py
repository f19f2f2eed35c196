"""What a run says: a table for people, losses included, and JSON rows that carry all it takes to repeat them."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.counts import Counts
from benchmarks.gate import Difference
from benchmarks.peers import OURS, PACKAGES, version
from benchmarks.timer import Timing

ROOT = Path(__file__).resolve().parent.parent
FRESH_PROCESS = "fresh process"
SCHEMA = 2  # of the JSON; 1 had neither this number nor suites. A new number where a field changes its meaning.


@dataclass(frozen=True)
class Row:
    """One case on one input, timed in one way.

    Attributes:
        case: its name.
        input: shape, dtype and layout, for people.
        shape: the input's shape.
        dtype: the input's dtype.
        layout: "contiguous" or "channels_last".
        how: "process time" or "wall time" on a CPU, "events" (calls from Python) or "graph" (replays) on a GPU; of the
            suite overhead also "host time" (calls on a GPU, not waited for) and "fresh process" (what happens once).
        bytes_moved: the least the job reads and writes.
        timings: by implementation.
        wrong: what the correctness gate found, and then nothing was timed.
        refused: peers that cannot do it, with their answer.
        peers_differ: in how many elements a peer does not keep the contract: any peer on a GPU; on a CPU, those that
            need not give torch's bits.
        not_captured: of a "graph" row, implementations timed by calls from Python after all, with the reason.
        of_copy: on a GPU, the share that our bytes over our time have of the copy bandwidth of the same run.
        suite: the one the case belongs to.
        input_name: what such an input is in a real network.
        absent: peers of the case that did not take part, with the reason.
        counts: by implementation, what one call does besides taking time.
        why: where we are slower, the reason.
    """

    case: str
    input: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    how: str
    bytes_moved: int
    timings: dict[str, Timing]
    wrong: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    peers_differ: dict[str, list[Difference]] = field(default_factory=dict)
    not_captured: dict[str, str] = field(default_factory=dict)
    of_copy: float | None = None
    suite: str = "kernels"
    input_name: str = ""
    absent: dict[str, str] = field(default_factory=dict)
    counts: dict[str, Counts] = field(default_factory=dict)
    why: str | None = None

    @property
    def gb_per_second(self) -> float:
        """Our rate by the byte formula."""
        return self.bytes_moved / self.timings[OURS].microseconds.median / 1e3

    @property
    def lost_to(self) -> list[str]:
        """Peers whose median is below ours, in the same job."""
        if self.how == FRESH_PROCESS:
            return []
        return [peer for peer, timing in self.timings.items() if peer != OURS and timing.times_ours.median < 1]

    @property
    def clearly_lost_to(self) -> list[str]:
        """Those of them that are faster in the middle rounds too."""
        return [peer for peer in self.lost_to if verdict(self.timings[peer]) == "slower"]


def said_by(*command: str) -> str | None:
    """What a command prints, or None where it cannot be run."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def cpu_model() -> str:
    """The CPU's name, as Linux has it; else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def driver_version(device: torch.device) -> str | None:
    """The NVIDIA driver's, or None."""
    if device.type != "cuda":
        return None
    lines = said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return lines.splitlines()[0].strip() if lines else None


def environment(device: torch.device, seed: int, suite: str = "default") -> dict[str, Any]:
    """Where and when a result was measured."""
    on_gpu = device.type == "cuda"
    status = said_by("git", "status", "--porcelain")
    return {
        "schema": SCHEMA,
        "suite": suite,
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": said_by("git", "rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "numpy": version("numpy"),
        **{package.module: version(package.distribution) for package in PACKAGES.values()},
        "machine": platform.machine(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "driver": driver_version(device),
        "cuda": torch.version.cuda if on_gpu else None,
        "threads": torch.get_num_threads(),
        "seed": seed,
    }


def heading(where: dict[str, Any]) -> str:
    """The environment in one line, and which packages are missing in another."""
    modules = [package.module for package in PACKAGES.values()]
    line = ", ".join(f"{key} {value}" for key, value in where.items() if value is not None)
    missing = [f"{peer} ({PACKAGES[peer].distribution})" for peer in PACKAGES if where[PACKAGES[peer].module] is None]
    assert set(modules) <= where.keys()
    return line + (f"\nnot installed, so not compared: {', '.join(missing)}" if missing else "")


def verdict(timing: Timing) -> str:
    """Whether the peer took longer than we did; "even" where the middle rounds fall on both sides."""
    if timing.times_ours.p80 < 1:
        return "slower"
    return "faster" if timing.times_ours.p20 > 1 else "even"


def disagreement(found: list[Difference]) -> str:
    """ "N elements", or what keeps the two from being compared."""
    apart = [difference.text for difference in found if difference.elements is None]
    return "; ".join(apart) or f"{sum(difference.elements or 0 for difference in found)} elements"


def _count_cells(counts: dict[str, Counts]) -> str:
    """ "ATen calls 3, torch 7", and the like for each count that was taken."""
    cells = []
    for name, words in (
        ("aten_calls", "ATen calls"),
        ("launches", "launches"),
        ("host_syncs", "host syncs"),
        ("peak_bytes", "peak bytes"),
    ):
        taken = {impl: getattr(count, name) for impl, count in counts.items() if getattr(count, name) is not None}
        if taken:
            cells.append(f"{words}: " + ", ".join(f"{impl} {value}" for impl, value in taken.items()))
    return "; ".join(cells)


def table_line(row: Row) -> str:
    """One line: ours, then each peer with how many times faster we are, GB/s, share of a copy. A loss is called one."""
    name = f"{row.case:<58}{row.input:>24} {row.how:<13}"
    if row.wrong:
        return f"{name}   WRONG: {'; '.join(row.wrong[:3])}"
    cells = f"{row.timings[OURS].microseconds.median:>12.1f}"
    cells += f"{row.gb_per_second:>8.1f}" if row.bytes_moved else f"{'-':>8}"
    cells += f"{row.of_copy:>9.0%}" if row.of_copy is not None else f"{'-':>9}"
    for peer, timing in row.timings.items():
        if peer == OURS:
            continue
        ratio = timing.times_ours
        cells += f"  {peer}{timing.microseconds.median:>12.1f}"
        if row.how != FRESH_PROCESS:  # what stands beside ours there may be another job
            cells += f"{ratio.median:>7.2f} ({ratio.p20:.2f}-{ratio.p80:.2f}) {verdict(timing):<6}"
    notes = [f"{peer} refuses: {answer}" for peer, answer in row.refused.items()]
    notes += [f"{peer} differs: {disagreement(found)}" for peer, found in row.peers_differ.items()]
    notes += [f"{name} not captured, timed by calls: {reason}" for name, reason in row.not_captured.items()]
    counted = _count_cells(row.counts)
    return "   ".join([name + cells, *([counted] if counted else []), *notes])


HEADER = (
    f"{'case':<58}{'input':>24} {'timed by':<13}{'ours us':>12}{'GB/s':>8}{'of copy':>9}"
    "  peer, its us, speedup (p20-p80)"
)


def _losses(rows: Sequence[Row]) -> list[str]:
    """Each reason once, with the rows that lost for it; and rows that lost without a known reason."""
    by_reason: dict[str, list[str]] = {}
    for row in rows:
        if row.lost_to:
            reason = row.why or "no explanation is known"
            by_reason.setdefault(reason, []).append(f"{row.case} {row.input} (to {', '.join(row.lost_to)})")
    if not by_reason:
        return []
    lines = ["", "below 1.0:"]
    for reason, lost in by_reason.items():
        lines.append(f"- {reason}")
        lines += [f"    {name}" for name in lost]
    return lines


def summary(rows: Sequence[Row]) -> str:
    """Geometric mean of the speedups by way of timing and peer, how many are losses and why, and what was not timed."""
    lines = []
    for how in dict.fromkeys(row.how for row in rows if row.how != FRESH_PROCESS):
        timed = [row for row in rows if row.how == how]
        for peer in dict.fromkeys(peer for row in timed for peer in row.timings if peer != OURS):
            timings = [row.timings[peer] for row in timed if peer in row.timings]
            mean = statistics.geometric_mean(timing.times_ours.median for timing in timings)
            verdicts = [verdict(timing) for timing in timings]
            counts = ", ".join(f"{verdicts.count(name)} {name}" for name in ("faster", "even", "slower"))
            lines.append(
                f"{how}, against {peer}: geometric mean of the speedups {mean:.2f} over {len(timings)} "
                f"comparisons: {counts}"
            )
        called = sum(bool(row.not_captured) for row in timed)
        if called:
            lines.append(f"{how}: in {called} of them an implementation could not be captured and was called instead")
    first = {(row.case, row.input): row for row in rows}.values()
    for peer in dict.fromkeys(peer for row in first for peer in row.peers_differ):
        differing = sum(peer in row.peers_differ for row in first)
        lines.append(f"in {differing} of {len(first)} cases {peer}'s result is not that of the CPU contract")
    wrong = sum(bool(row.wrong) for row in first)
    if wrong:
        lines.append(f"{wrong} of {len(first)} cases failed or computed something wrong, and were not timed")
    for peer, reason in dict.fromkeys((peer, reason) for row in first for peer, reason in row.absent.items()):
        cases = len({row.case for row in first if row.absent.get(peer) == reason})
        lines.append(f"{peer} was not compared in {cases} cases: {reason}")
    return "\n".join(lines + _losses(rows))


def write_json(path: Path, rows: Sequence[Any], where: dict[str, Any]) -> None:
    """All rows, and the environment once. A reader never sees half a file.

    Args:
        path: the file; its folder is made.
        rows: dataclasses, as `Row`.
        where: what `environment` gives.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(json.dumps({"environment": where, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    scratch.replace(path)
