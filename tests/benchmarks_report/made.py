"""Results files made by hand, in the form that the benchmarks write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.readme import KERNELS, README_ROWS, TRAINING

Json = dict[str, Any]

ENVIRONMENT: Json = {
    "suite": "full",
    "time": "2026-01-02T03:04:05+00:00",
    "commit": "0123456789abcdef",
    "dirty": True,
    "python": "3.11.7",
    "torch": "2.13.0+cpu",
    "triton": None,
    "machine": "x86_64",
    "cpu": "Some CPU",
    "cores": 2,
    "device": "cpu",
    "gpu": None,
    "threads": 1,
    "copy_gb_per_second": None,
}


def spread(median: float, width: float = 0.0) -> Json:
    return {"median": median, "p20": median - width, "p80": median + width}


def row(case: str, put: str, ours: float, /, width: float = 0.0, **peers: float) -> Json:
    """One row; peers by name and microseconds. `width` is that of the speedup's spread."""
    timings = {"qkernels": {"microseconds": spread(ours), "times_ours": spread(1.0)}}
    for peer, theirs in peers.items():
        timings[peer] = {"microseconds": spread(theirs), "times_ours": spread(theirs / ours, width)}
    shape = [] if put == "-" else [int(length) for length in put.split()[0].split("x")]
    return {"case": case, "input": put, "shape": shape, "dtype": "float32", "layout": "contiguous",
            "how": "process time", "bytes_moved": 4000, "timings": timings, "wrong": [], "refused": {},
            "peers_differ": {}, "not_captured": {}, "of_copy": None}  # fmt: skip


def step(model: str, **milliseconds: float) -> Json:
    """One row of `benchmarks.qat`; ours_eager=2.0 is "qkernels, eager"."""
    names = {"ours": "qkernels", "stock": "torch.ao", "float": "float"}
    keys = {key: key.split("_") for key in milliseconds}
    return {
        "model": model,
        "milliseconds": {f"{names[name]}, {way}": milliseconds[key] for key, (name, way) in keys.items()},
    }


def write(path: Path, rows: list[Json], **environment: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": {**ENVIRONMENT, **environment}, "rows": rows}))
    return path


def folder(path: Path) -> Path:
    """A folder with what the README needs, and two losses that README_ROWS does not name."""
    chosen = [row(case, put, 10.0, torch=20.0 + index) for index, (case, put) in enumerate(README_ROWS)]
    others = [row("left out", "8", 10.0, torch=1.0), row("left out too", "8", 10.0, torch=9.0, other=11.0)]
    write(path / f"{KERNELS}.json", chosen + others)
    write(path / f"{TRAINING}.json", [step("net", float_compiled=10, stock_eager=30, ours_eager=40, ours_compiled=12)])
    return path
