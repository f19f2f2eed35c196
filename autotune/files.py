"""JSON files that others may have damaged, that several processes write, and that no reader may see half-written."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SCHEMA = 1  # of user caches and shipped tables; raised when an older reader would misread them


class BadFileError(ValueError):
    """A file that is not what its name says: not JSON, another schema, another shape."""


def read_document(path: Path) -> dict[str, Any]:
    """The document in a cache or table file: an object with this `SCHEMA` and an object `entries`.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read.
        BadFileError: it holds something else.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise BadFileError(f"{path} is not JSON: {error}") from error
    except RecursionError as error:
        raise BadFileError(f"{path} is nested too deep") from error
    if not isinstance(document, dict) or "schema" not in document:
        raise BadFileError(f"{path} is not an object with a schema version")
    if document["schema"] != SCHEMA:
        raise BadFileError(f"{path} has schema version {document['schema']!r}, this qkernels reads {SCHEMA}")
    if not isinstance(document.get("entries"), dict):
        raise BadFileError(f"{path} has no object 'entries'")
    return document


def write_document(path: Path, document: Mapping[str, Any]) -> None:
    """Put `document` in the place of the file at once: a reader sees the old file or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1, sort_keys=True)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp's files are for their owner alone
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file that is read, changed and written back. Advisory, and let go when a process dies."""
    import fcntl  # POSIX only; reading needs no lock

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
