"""Host overhead: every call is gated and timed, and what happens once is asked of a fresh process."""

from __future__ import annotations

import pytest
import torch

from benchmarks import calls, overhead, probe
from benchmarks.explanations import NO_DIFFERENCE
from benchmarks.peers import COMPILED, OURS, TORCH
from benchmarks.report import FRESH_PROCESS, summary, table_line
from benchmarks.timer import Spread, Timing
from tests.benchmarks.support import CPU, row


@pytest.mark.parametrize("name", calls.CALLS)
def test_a_call_is_gated_and_timed(name: str, device: torch.device) -> None:
    for grad in overhead.modes(name):
        found = overhead.call_row(name, grad, device, rounds=1, slice_seconds=1e-5)
        assert found.wrong == []
        assert list(found.timings) == [OURS, TORCH]
        assert found.suite == "overhead"
        assert found.case in overhead.names()
        assert bool(found.why) == bool(found.lost_to and device.type == "cpu")


def test_a_wrong_call_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(calls.CALLS, "planted", lambda device: {OURS: lambda x: x + 1, TORCH: lambda x: x})
    found = overhead.call_row("planted", False, CPU, rounds=1, slice_seconds=1e-5)
    assert found.wrong == ["1 of 1 values differ"]
    assert found.timings == {}


def test_reasons_of_one_element() -> None:
    """A clear loss has one; for what passes its input through it is another; none is claimed where it is even."""
    even, lost = row(ours=10, theirs=9.5), row(ours=10, theirs=5)
    assert overhead._why("aminmax", even) == NO_DIFFERENCE
    assert overhead._why("aminmax", lost) == overhead.IN_PYTHON
    assert overhead._why("NoopObserver", lost) == overhead.ONE_CALL


def test_what_happens_once_is_asked_of_each_library() -> None:
    asked = []

    def ask(question: str, library: str, device: torch.device) -> dict[str, float]:
        asked.append((question, library))
        return {library: 2e-6, "torch": 5e-6} if question == "import" else {library: 3e-6}

    rows = list(overhead.once_rows(CPU, repetitions=1, ask=ask))
    assert [found.case for found in rows] == list(overhead.ONCE)
    assert asked == [
        ("import", "qkernels"),
        ("import", "qkernels.ops"),
        ("import", "qkernels.modules"),
        ("first-call", OURS),
        ("first-call", TORCH),
        ("compile", OURS),
        ("compile", COMPILED),
    ]
    imports = rows[1]
    assert imports.timings["import torch"] == Timing(Spread(5.0, 5.0, 5.0), Spread(2.5, 2.5, 2.5))
    assert imports.timings[OURS].microseconds.median == pytest.approx(2.0)
    for found in rows:
        assert found.how == FRESH_PROCESS
        assert found.lost_to == []
        assert "faster" not in table_line(found)
    assert "geometric mean" not in summary(rows)


def test_the_process_answers() -> None:
    seconds = overhead.ask("import", "qkernels", CPU)
    assert seconds.keys() == {"torch", "qkernels"}
    assert 0 < seconds["qkernels"] < seconds["torch"]


def test_a_process_that_fails_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"compile is of qkernels, torch\.compile; got 'nonesuch'"):
        overhead.ask("compile", "nonesuch", CPU)


@pytest.mark.parametrize("library", probe.LIBRARIES["first-call"])
def test_first_call(library: str) -> None:
    assert probe.first_call_seconds(library, "cpu")[library] > 0


@pytest.mark.parametrize("library", probe.LIBRARIES["compile"])
def test_compilation(library: str) -> None:
    assert probe.compile_seconds(library, "cpu")[library] > 0
