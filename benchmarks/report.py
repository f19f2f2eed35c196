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
from benchmarks.timer import Timing

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Row:
    """One case on one shape: its timings by implementation.

    `wrong` is what the correctness gate found, and then nothing was timed; `refused` names the peers that cannot do it.
    """

    case: str
    shape: tuple[int, ...]
    dtype: str
    bytes_moved: int
    timings: dict[str, Timing]
    wrong: list[str]
    refused: dict[str, str]


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


def table_line(row: Row) -> str:
    """One line: ours, the peers, how many times faster, GB/s. A loss is called one."""
    name = f"{row.case:<46}{'x'.join(map(str, row.shape)):>15}"
    if row.wrong:
        return f"{name}   WRONG: {'; '.join(row.wrong[:3])}"
    ours = row.timings[OURS].microseconds
    cells = f"{ours.median:>11.1f}"
    for peer, timing in row.timings.items():
        if peer != OURS:
            ratio = timing.times_ours
            cells += f"{timing.microseconds.median:>11.1f}{ratio.median:>8.2f} ({ratio.p20:.2f}-{ratio.p80:.2f})"
            cells += f" {verdict(timing):<6}"
    for peer, answer in row.refused.items():
        cells += f"  {peer} refuses: {answer}"
    rate = f"{row.bytes_moved / ours.median / 1e3:>8.1f}" if row.bytes_moved else f"{'-':>8}"
    return name + cells + rate


HEADER = f"{'case':<46}{'shape':>15}{'ours us':>11}{'torch us':>11}{'speedup (p20-p80)':>20}{'':>7}{'GB/s':>8}"


def summary(rows: list[Row]) -> str:
    """Geometric mean of the speedups, and how many are losses, or were refused and not timed."""
    peers = [timing for row in rows for peer, timing in row.timings.items() if peer != OURS]
    lines = []
    if peers:
        mean = statistics.geometric_mean(timing.times_ours.median for timing in peers)
        verdicts = [verdict(timing) for timing in peers]
        counts = ", ".join(f"{verdicts.count(name)} {name}" for name in ("faster", "even", "slower"))
        lines.append(f"geometric mean of the speedups {mean:.2f} over {len(peers)} comparisons: {counts}")
    refused = sum(bool(row.wrong) for row in rows)
    if refused:
        lines.append(f"{refused} of {len(rows)} cases failed or computed something else than torch, and were not timed")
    return "\n".join(lines)


def write_json(path: Path, rows: list[Row], where: dict[str, Any]) -> None:
    """All rows, and the environment once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": where, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
