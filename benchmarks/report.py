"""What a run says: a table for people, losses included, and JSON rows that carry all it takes to repeat them."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import OURS
from benchmarks.gate import Difference
from benchmarks.timer import Timing

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Row:
    """One case on one input, timed in one way.

    Attributes:
        case: its name.
        input: shape, dtype and layout, for people.
        shape: the input's shape.
        dtype: the input's dtype.
        layout: "contiguous" or "channels_last".
        how: "process time" or "wall time" on a CPU, "events" (calls from Python) or "graph" (replays) on a GPU.
        bytes_moved: the least the job reads and writes.
        timings: by implementation.
        wrong: what the correctness gate found, and then nothing was timed.
        refused: peers that cannot do it, with their answer.
        peers_differ: on a GPU, in how many elements a peer does not keep the contract.
        not_captured: of a "graph" row, implementations timed by calls from Python after all, with the reason.
        of_copy: on a GPU, the share that our bytes over our time have of the copy bandwidth of the same run.
    """

    case: str
    input: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    how: str
    bytes_moved: int
    timings: dict[str, Timing]
    wrong: list[str]
    refused: dict[str, str]
    peers_differ: dict[str, list[Difference]]
    not_captured: dict[str, str]
    of_copy: float | None = None

    @property
    def gb_per_second(self) -> float:
        """Our rate by the byte formula."""
        return self.bytes_moved / self.timings[OURS].microseconds.median / 1e3


def git(*arguments: str) -> str | None:
    """What git says, or None outside a repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def environment(device: torch.device, seed: int) -> dict[str, Any]:
    """Where and when a result was measured."""
    try:
        import triton

        triton_version: str | None = triton.__version__
    except ImportError:
        triton_version = None
    status = git("status", "--porcelain")
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "machine": platform.machine(),
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "seed": seed,
    }


def verdict(timing: Timing) -> str:
    """Whether the peer took longer than we did; "even" where the middle rounds fall on both sides."""
    if timing.times_ours.p80 < 1:
        return "slower"
    return "faster" if timing.times_ours.p20 > 1 else "even"


def disagreement(found: list[Difference]) -> str:
    """ "N elements", or what keeps the two from being compared."""
    apart = [difference.text for difference in found if difference.elements is None]
    return "; ".join(apart) or f"{sum(difference.elements or 0 for difference in found)} elements"


def table_line(row: Row) -> str:
    """One line: ours, the peers, how many times faster, GB/s, share of a copy. A loss is called one."""
    name = f"{row.case:<46}{row.input:>24} {row.how:<13}"
    if row.wrong:
        return f"{name}   WRONG: {'; '.join(row.wrong[:3])}"
    cells = f"{row.timings[OURS].microseconds.median:>11.1f}"
    for peer, timing in row.timings.items():
        if peer != OURS:
            ratio = timing.times_ours
            cells += f"{timing.microseconds.median:>11.1f}{ratio.median:>8.2f} ({ratio.p20:.2f}-{ratio.p80:.2f})"
            cells += f" {verdict(timing):<6}"
    cells += f"{row.gb_per_second:>8.1f}" if row.bytes_moved else f"{'-':>8}"
    cells += f"{row.of_copy:>11.0%}" if row.of_copy is not None else ""
    notes = [f"{peer} refuses: {answer}" for peer, answer in row.refused.items()]
    notes += [f"{peer} differs: {disagreement(found)}" for peer, found in row.peers_differ.items()]
    notes += [f"{name} not captured, timed by calls: {reason}" for name, reason in row.not_captured.items()]
    return "   ".join([name + cells, *notes])


HEADER = (
    f"{'case':<46}{'input':>24} {'timed by':<13}{'ours us':>11}{'torch us':>11}{'speedup (p20-p80)':>20}"
    f"{'':>7}{'GB/s':>8}  of a copy"
)


def summary(rows: list[Row]) -> str:
    """Geometric mean of the speedups by way of timing, how many are losses, and what was not timed or differs."""
    lines = []
    for how in dict.fromkeys(row.how for row in rows):
        timed = [row for row in rows if row.how == how]
        peers = [timing for row in timed for peer, timing in row.timings.items() if peer != OURS]
        if peers:
            mean = statistics.geometric_mean(timing.times_ours.median for timing in peers)
            verdicts = [verdict(timing) for timing in peers]
            counts = ", ".join(f"{verdicts.count(name)} {name}" for name in ("faster", "even", "slower"))
            lines.append(f"{how}: geometric mean of the speedups {mean:.2f} over {len(peers)} comparisons: {counts}")
        called = sum(bool(row.not_captured) for row in timed)
        if called:
            lines.append(f"{how}: in {called} of them an implementation could not be captured and was called instead")
    first = {(row.case, row.input): row for row in rows}.values()
    differing = sum(bool(row.peers_differ) for row in first)
    if differing:
        lines.append(f"in {differing} of {len(first)} cases torch's result on the GPU is not that of the CPU contract")
    refused = sum(bool(row.wrong) for row in first)
    if refused:
        lines.append(f"{refused} of {len(first)} cases failed or computed something wrong, and were not timed")
    return "\n".join(lines)


def write_json(path: Path, rows: list[Row], where: dict[str, Any]) -> None:
    """All rows, and the environment once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": where, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
