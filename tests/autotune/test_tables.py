"""Shipped tables: what is in the package may be shipped, and a file that may not be is refused or ignored."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qkernels.autotune import tables
from qkernels.autotune.config import TiledConfig
from tests.autotune.support import FLAT, MACHINE, TILED, tuned

PACKAGE_FOLDER = Path(tables.__file__).resolve().parent / "tables"  # the fixture points tables.FOLDER elsewhere
TILED_CONFIG = TiledConfig(groups=256, parts=2, block_rows=1, block_lanes=1024, num_warps=4, block_parts=128)


def export(*results, path: Path | None = None, **changes: str) -> Path:
    path = path or tables.table_path(MACHINE.gpu)
    provenance = {"commit": "abc", "date": "2026-01-02", "how": "a test"} | changes
    assert tables.export(path, MACHINE, results or (tuned(),), **provenance) == len(results or (1,))
    return path


def test_every_table_in_the_package_may_be_shipped() -> None:
    """None is there today; `test_what_may_not_be_shipped` shows that this can fail."""
    assert {path.name: tables.problems_of(path) for path in PACKAGE_FOLDER.glob("*.json")} == {
        path.name: [] for path in PACKAGE_FOLDER.glob("*")
    }


def test_what_is_exported_may_be_shipped_and_is_found() -> None:
    path = export(tuned(), tuned(TILED, TILED_CONFIG))
    assert path.name == "nvidia-h999-80gb.json"
    assert tables.problems_of(path) == []
    assert tables.load(MACHINE.gpu) == {FLAT: tuned().config, TILED: TILED_CONFIG}
    assert json.loads(path.read_text())["provenance"] == {
        "gpu": MACHINE.gpu, "capability": "sm_99", "torch": "2.99.0", "triton": "3.99.0",
        "commit": "abc", "date": "2026-01-02", "how": "a test",
    }  # fmt: skip


def test_a_table_serves_every_version_and_no_other_gpu(recwarn: pytest.WarningsRecorder) -> None:
    export(tuned(machine=replace(MACHINE, torch="2.11.0", triton="3.6.0")))
    assert set(tables.load(MACHINE.gpu)) == {FLAT}
    assert tables.load("NVIDIA H998") == {}
    assert len(recwarn) == 0


def test_other_kernels_make_an_entry_stale(recwarn: pytest.WarningsRecorder) -> None:
    path = export(tuned(kernels="0123456789abcdef"), tuned(TILED, TILED_CONFIG))
    assert set(tables.load(MACHINE.gpu)) == {TILED}
    assert len(recwarn) == 0
    assert tables.problems_of(path) == [f"{FLAT}: measured with other kernels (0123456789abcdef)"]


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


ENTRY = {**tuned().to_dict(), "config": {"block": 4096, "num_warps": 8, "programs": 9999, "block_parts": 1}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schema": 0}, "has schema version 0"),
        ({"provenance": None}, "has no object 'provenance'"),
        ({"provenance": {"gpu": MACHINE.gpu}}, "provenance must say capability; got None"),
        ({"entries": {str(FLAT): ENTRY}}, "programs must be at least 1 and at most the 256 tiles"),
        ({"entries": {str(FLAT): {"config": {}}}}, "an entry must be an object with function"),
        ({"entries": {str(TILED): ENTRY | {"config": tuned().config.to_dict()}}}, "the entry is for 'flat_reduction"),
        ({"entries": {str(FLAT): 7}}, "an entry must be an object"),
    ],
    ids=str,
)
def test_what_may_not_be_shipped(values: dict, message: str) -> None:
    path = export()
    change(path, **values)
    (problem,) = tables.problems_of(path)
    assert message in problem
    with pytest.warns(RuntimeWarning, match="problem.s. with a shipped table") as warned:
        assert tables.load(MACHINE.gpu) == {}
    assert len(warned) == 1
    assert message in str(warned[0].message)


def test_a_table_under_another_gpus_name(tmp_path: Path) -> None:
    path = export(path=tables.table_path("NVIDIA H998"))
    assert tables.problems_of(path) == [f"{path} must be called nvidia-h999-80gb.json"]
    with pytest.warns(RuntimeWarning, match="is for another GPU: NVIDIA H999 80GB"):
        assert tables.load("NVIDIA H998") == {}


def test_export_refuses_what_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    with pytest.raises(ValueError, match="export: no tuned configuration to write"):
        tables.export(path, MACHINE, [], commit="abc", date="today", how="a test")
    with pytest.raises(ValueError, match="provenance must say commit"):
        tables.export(path, MACHINE, [tuned()], commit="", date="today", how="a test")
    assert not path.exists()
