"""The user cache: written whole, merged between processes, and never trusted."""

from __future__ import annotations

import json
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import pytest

from qkernels.autotune import cache, files
from qkernels.autotune.config import TiledConfig
from qkernels.autotune.decision import Decision
from qkernels.autotune.machine import kernel_folder, kernel_hash, slug_of
from tests.autotune.support import FLAT, MACHINE, TILED, tuned, write_entries

TILED_CONFIG = TiledConfig(groups=256, parts=2, block_rows=1, block_lanes=1024, num_warps=4, block_parts=128)


@pytest.fixture
def path(cache_dir: Path) -> Path:
    return cache.cache_path(cache_dir, MACHINE)


def test_what_is_saved_is_loaded(path: Path) -> None:
    one, two = tuned(), tuned(TILED, TILED_CONFIG)
    cache.save(path, [one])
    cache.save(path, [two])
    assert cache.load(path, MACHINE) == {FLAT: one, TILED: two}
    assert path.name == "tuning-nvidia-h999-80gb.json"
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, path.with_suffix(".lock").name]


def test_a_later_result_replaces_an_earlier_one(path: Path) -> None:
    cache.save(path, [tuned()])
    cache.save(path, [tuned(ratio=0.5)])
    assert cache.load(path, MACHINE)[FLAT].ratio == 0.5


def test_no_file_is_no_warning(path: Path, recwarn: pytest.WarningsRecorder) -> None:
    assert cache.load(path, MACHINE) == {}
    assert len(recwarn) == 0


@pytest.mark.parametrize(
    "change", [{"gpu": "NVIDIA H999 80gb"}, {"capability": "sm_98"}, {"torch": "2.98.0"}, {"triton": "3.98.0"}], ids=str
)
def test_an_entry_holds_for_its_machine_alone(
    path: Path, change: dict[str, str], recwarn: pytest.WarningsRecorder
) -> None:
    cache.save(path, [tuned()])
    other = replace(MACHINE, **change)
    assert cache.load(path, other) == {}
    cache.save(path, [tuned(machine=other, ratio=0.5)])
    assert cache.load(path, MACHINE)[FLAT].ratio == 0.9
    assert cache.load(path, other)[FLAT].ratio == 0.5
    assert len(recwarn) == 0


def test_other_kernels_make_an_entry_stale(path: Path, recwarn: pytest.WarningsRecorder) -> None:
    cache.save(path, [tuned(), tuned(TILED, TILED_CONFIG, kernels="0123456789abcdef")])
    assert set(cache.load(path, MACHINE)) == {FLAT}
    assert len(recwarn) == 0


def test_the_hash_is_of_the_sources(tmp_path: Path) -> None:
    for source in kernel_folder().glob("*.py"):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    functions = ("flat_reduction", "flat_elementwise", "flat_accumulation")

    def hashes() -> list[str]:
        kernel_hash.cache_clear()
        return [kernel_hash(function, tmp_path) for function in functions]

    before = hashes()
    assert before == [kernel_hash(function) for function in functions]
    for name, changed in [
        ("minmax.py", (0,)),
        ("fake_quant.py", (1,)),
        ("lsq.py", (2,)),
        ("device_math.py", (0, 1, 2)),
    ]:
        source = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(source + b"\n")
        after = hashes()
        assert [index for index in range(3) if after[index] != before[index]] == list(changed)
        (tmp_path / name).write_bytes(source)
    assert hashes() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("", "is not JSON"),
        ("[" * 100_000, "nested too deep|is not JSON"),
        ("[]", "is not an object with a schema version"),
        ('{"entries": {}}', "is not an object with a schema version"),
        ('{"schema": 2, "entries": {}}', "has schema version 2, this qkernels reads 1"),
        ('{"schema": 1}', "has no object 'entries'"),
        ('{"schema": 1, "entries": []}', "has no object 'entries'"),
        (b"\xff\xfe{}", "is not JSON"),
    ],
)
def test_a_damaged_file_is_one_warning_and_kept_aside_by_a_writer(path: Path, text: str | bytes, message: str) -> None:
    path.parent.mkdir(parents=True)
    raw = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(raw)
    with pytest.warns(RuntimeWarning, match=message) as warned:
        assert cache.load(path, MACHINE) == {}
    assert len(warned) == 1
    assert path.read_bytes() == raw  # a reader changes nothing
    with pytest.warns(RuntimeWarning, match="moved to"):
        cache.save(path, [tuned()])
    assert set(cache.load(path, MACHINE)) == {FLAT}
    assert path.with_suffix(".bad").read_bytes() == raw


def damage(path: Path, **changes: object) -> None:
    document = json.loads(path.read_text())
    for entry in document["entries"].values():
        entry.update(changes)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"block": 2048, "num_warps": 4, "programs": 2000, "block_parts": 1024}}, "at most the 512 tiles"),
        ({"config": {"block": 2000, "num_warps": 4, "programs": 1, "block_parts": 1}}, "block must be a power of two"),
        ({"config": None}, "expected an object"),
        ({"function": "flat_sum"}, "no function 'flat_sum'"),
        ({"arguments": {"n": 1 << 21}}, "the entry is for 'flat_reduction n=2097152"),
        ({"machine": {"gpu": "x"}}, "machine|argument"),
        ({"machine": "x"}, "machine must be an object"),
        ({"kernels": "beef"}, "the entry is for"),
    ],
    ids=str,
)
def test_a_bad_entry_is_a_warning_and_the_others_stay(path: Path, changes: dict, message: str) -> None:
    cache.save(path, [tuned()])
    damage(path, **changes)
    cache.save(path, [tuned(TILED, TILED_CONFIG)])
    with pytest.warns(RuntimeWarning, match=message) as warned:
        assert set(cache.load(path, MACHINE)) == {TILED}
    assert len(warned) == 1
    assert "1 tuned launch configuration(s)" in str(warned[0].message)


def test_a_writer_that_dies_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.save(path, [tuned()])
    before = path.read_bytes()

    def die(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "fsync", die)
    with pytest.raises(OSError, match="disk full"):
        cache.save(path, [tuned(TILED, TILED_CONFIG)])
    assert path.read_bytes() == before
    assert not list(path.parent.glob("*.tmp")) + list(path.parent.glob(".*.tmp"))


def test_concurrent_writers_lose_nothing(path: Path) -> None:
    writers, count = 2, 40
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(writers)
    processes = [context.Process(target=write_entries, args=(path, barrier, n, count)) for n in range(writers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [0] * writers
    expected = {Decision("flat_reduction", (10_000_000 + 1000 * n + i,)) for n in range(writers) for i in range(count)}
    assert set(cache.load(path, MACHINE)) == expected


def test_clear_deletes_what_is_ours(path: Path) -> None:
    cache.save(path, [tuned()])
    path.with_suffix(".bad").write_text("{")
    stranger = path.parent / "someone-elses.json"
    stranger.write_text("{}")
    assert cache.clear(path.parent) == sorted([path, path.with_suffix(".lock"), path.with_suffix(".bad")])
    assert list(path.parent.iterdir()) == [stranger]
    assert cache.clear(path.parent / "not-there") == []


def test_an_unreadable_file_is_a_warning(path: Path) -> None:
    path.mkdir(parents=True)  # a folder of that name
    with pytest.warns(RuntimeWarning, match="tuned launch configurations are not used"):
        assert cache.load(path, MACHINE) == {}


def test_names_of_files() -> None:
    assert slug_of("AMD Instinct MI300X (gfx942)") == "amd-instinct-mi300x-gfx942"


def test_files_can_be_read_by_others(path: Path) -> None:
    cache.save(path, [tuned()])
    assert os.stat(path).st_mode & 0o777 == 0o644
