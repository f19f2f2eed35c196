"""Tables shipped with the package, one JSON file per GPU: what was tuned on a machine of ours, and where it comes from.

A table serves every version of torch and Triton, which a cache entry does not: it stands between that and the
heuristic. It is bound to the sources of the kernels it was measured with.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qkernels.autotune.cache import Tuned
from qkernels.autotune.config import LaunchConfig
from qkernels.autotune.decision import Decision
from qkernels.autotune.files import SCHEMA, BadFileError, read_document, write_document
from qkernels.autotune.machine import Machine, kernel_hash, slug_of

FOLDER = Path(__file__).resolve().parent / "tables"
PROVENANCE = ("gpu", "capability", "torch", "triton", "commit", "date", "how")


def table_path(gpu: str, folder: Path | None = None) -> Path:
    """Where the table of a GPU lies."""
    return (folder or FOLDER) / f"{slug_of(gpu)}.json"


def problems_of(path: Path) -> list[str]:
    """What is wrong with a table file, stale entries included; nothing for one that may be shipped."""
    try:
        document = read_document(path)
        provenance = _provenance(path, document)
    except (OSError, BadFileError) as error:
        return [str(error)]
    problems = []
    if path != table_path(provenance["gpu"], path.parent):
        problems.append(f"{path} must be called {table_path(provenance['gpu']).name}")
    for key, entry in document["entries"].items():
        try:
            decision, _, kernels = _entry(key, entry)
            if kernels != kernel_hash(decision.function):
                problems.append(f"{key}: measured with other kernels ({kernels})")
        except (TypeError, ValueError) as error:
            problems.append(f"{key}: {error}")
    return problems


def load(gpu: str, folder: Path | None = None) -> dict[Decision, LaunchConfig]:
    """What is shipped for a GPU and these kernels; one warning tells of what is there and cannot be used."""
    path = table_path(gpu, folder)
    if not path.is_file():
        return {}
    found: dict[Decision, LaunchConfig] = {}
    problems = []
    try:
        document = read_document(path)
        if _provenance(path, document)["gpu"] != gpu:
            raise BadFileError(f"{path} is for another GPU: {document['provenance']['gpu']}")
        for key, entry in document["entries"].items():
            try:
                decision, config, kernels = _entry(key, entry)
                if kernels == kernel_hash(decision.function):
                    found[decision] = config
            except (TypeError, ValueError) as error:
                problems.append(f"{path}: {key}: {error}")
    except (OSError, BadFileError) as error:
        problems.append(str(error))
    if problems:
        warnings.warn(
            f"qkernels: {len(problems)} problem(s) with a shipped table. The first: {problems[0]}",
            RuntimeWarning,
            stacklevel=2,
        )
    return found


def _provenance(path: Path, document: Mapping[str, Any]) -> dict[str, str]:
    provenance = document.get("provenance")
    if not isinstance(provenance, dict):
        raise BadFileError(f"{path} has no object 'provenance'")
    for name in PROVENANCE:
        if not isinstance(provenance.get(name), str) or not provenance[name]:
            raise BadFileError(f"{path}: provenance must say {name}; got {provenance.get(name)!r}")
    return provenance


def _entry(key: str, entry: Any) -> tuple[Decision, LaunchConfig, str]:
    if not isinstance(entry, dict) or not {"function", "arguments", "config", "kernels"} <= entry.keys():
        raise ValueError(f"an entry must be an object with function, arguments, config and kernels; got {entry!r}")
    decision = Decision.from_dict(entry["function"], entry["arguments"])
    if str(decision) != key:
        raise ValueError(f"the entry is for {str(decision)!r}")
    return decision, decision.config_from_dict(entry["config"]), str(entry["kernels"])


def export(path: Path, machine: Machine, tuned: Iterable[Tuned], *, commit: str, date: str, how: str) -> int:
    """Write a table file from results; returns the number of entries.

    Raises:
        ValueError: there is nothing to write, or a field of the provenance is empty.
        OSError: the file cannot be written.
    """
    entries = {}
    for result in tuned:
        entry = result.to_dict()
        entries[str(result.decision)] = {
            name: entry[name] for name in ("function", "arguments", "config", "kernels", "ratio", "date")
        }
    if not entries:
        raise ValueError("export: no tuned configuration to write; the heuristic was not beaten, or nothing was tuned")
    provenance = {
        "gpu": machine.gpu, "capability": machine.capability, "torch": machine.torch, "triton": machine.triton,
        "commit": commit, "date": date, "how": how,
    }  # fmt: skip
    document = {"schema": SCHEMA, "provenance": provenance, "entries": entries}
    _provenance(path, document)
    write_document(path, document)
    return len(entries)
