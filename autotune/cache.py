"""The user cache: what was tuned on this machine, one JSON file per kind of GPU.

An entry's key is its decision, machine and kernel hash, so that entries of several versions live side by side and a
changed kernel or another torch simply finds none.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qkernels.autotune.config import LaunchConfig
from qkernels.autotune.decision import Decision
from qkernels.autotune.files import SCHEMA, BadFileError, locked, read_document, write_document
from qkernels.autotune.machine import Machine, kernel_hash

PREFIX = "tuning-"  # of every file of ours, so that `clear` in a shared folder finds no other's


@dataclass(frozen=True)
class Tuned:
    """A configuration that beat the heuristic.

    Attributes:
        decision: what it answers.
        config: the answer.
        machine: where it was measured.
        kernels: hash of the kernels it was measured with.
        ratio: its time over the heuristic's, geometric mean over the workloads.
        date: UTC, ISO 8601.
    """

    decision: Decision
    config: LaunchConfig
    machine: Machine
    kernels: str
    ratio: float
    date: str

    @property
    def key(self) -> str:
        """Its name in a cache file."""
        return f"{self.decision} | {self.machine} | kernels {self.kernels}"

    def to_dict(self) -> dict[str, Any]:
        """The entry in a cache file."""
        return {
            "function": self.decision.function,
            "arguments": self.decision.named(),
            "config": self.config.to_dict(),
            "machine": asdict(self.machine),
            "kernels": self.kernels,
            "ratio": self.ratio,
            "date": self.date,
        }

    @classmethod
    def from_dict(cls, entry: Any) -> Tuned:
        """The entry of a cache file, checked.

        Raises:
            ValueError: something is missing or breaks a rule, which the message names.
            TypeError: something is of the wrong kind.
        """
        fields = ("function", "arguments", "config", "machine", "kernels", "ratio", "date")
        if not isinstance(entry, dict) or any(name not in entry for name in fields):
            raise ValueError(f"an entry must be an object with {fields}; got {entry!r}")
        decision = Decision.from_dict(entry["function"], entry["arguments"])
        config = decision.config_from_dict(entry["config"])
        if not isinstance(entry["machine"], dict):
            raise TypeError(f"machine must be an object; got {entry['machine']!r}")
        return cls(decision, config, Machine(**entry["machine"]), entry["kernels"], entry["ratio"], entry["date"])


def cache_path(folder: Path, machine: Machine) -> Path:
    """The cache file of a kind of GPU."""
    return folder / f"{PREFIX}{machine.slug}.json"


def load(path: Path, machine: Machine) -> dict[Decision, Tuned]:
    """What the cache has for this machine and these kernels; nothing, after a warning, if the file is damaged.

    One warning tells of all entries that cannot be used.
    """
    try:
        entries = read_document(path)["entries"]
    except FileNotFoundError:
        return {}
    except (OSError, BadFileError) as error:
        warnings.warn(f"qkernels: tuned launch configurations are not used: {error}", RuntimeWarning, stacklevel=2)
        return {}
    found: dict[Decision, Tuned] = {}
    problems = []
    for key, entry in entries.items():
        if f" | {machine} | " not in key:
            continue  # of another version or another GPU of this name
        try:
            tuned = Tuned.from_dict(entry)
            if tuned.key != key:
                raise ValueError(f"the entry is for {tuned.key!r}")
            if tuned.kernels == kernel_hash(tuned.decision.function):
                found[tuned.decision] = tuned
        except (TypeError, ValueError) as error:
            problems.append(f"{key}: {error}")
    if problems:
        warnings.warn(
            f"qkernels: {len(problems)} tuned launch configuration(s) in {path} are not used. The first: {problems[0]}",
            RuntimeWarning,
            stacklevel=2,
        )
    return found


def save(path: Path, tuned: Iterable[Tuned], drop: Iterable[str] = ()) -> None:
    """Merge results into a cache file, without the keys in `drop`; other processes may do so at the same time.

    A file that is no cache of this schema is kept beside it, with the suffix .bad, and a warning says so.

    Raises:
        OSError: the folder cannot be written.
    """
    with locked(path):
        try:
            entries = read_document(path)["entries"]
        except FileNotFoundError:
            entries = {}
        except BadFileError as error:
            aside = path.with_suffix(".bad")
            path.replace(aside)
            warnings.warn(f"qkernels: moved to {aside}: {error}", RuntimeWarning, stacklevel=2)
            entries = {}
        entries = {key: entry for key, entry in entries.items() if key not in set(drop)}
        entries |= {result.key: result.to_dict() for result in tuned}
        write_document(path, {"schema": SCHEMA, "entries": entries})


def clear(folder: Path) -> list[Path]:
    """Delete every cache file in a folder, locks and files set aside included; returns what was deleted."""
    found = sorted(path for end in (".json", ".lock", ".bad") for path in folder.glob(f"{PREFIX}*{end}"))
    for path in found:
        path.unlink()
    return found
