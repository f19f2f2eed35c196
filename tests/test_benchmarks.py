"""The benchmarks: every case passes its own gate, and a wrong implementation does not get timed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as program
from benchmarks.cases import CASES, OURS, TORCH, Bench, Case, of_functions
from benchmarks.report import verdict
from benchmarks.timer import Spread, Timing


@pytest.mark.parametrize("name", CASES)
def test_case_computes_what_its_peer_does(name: str, device: torch.device) -> None:
    x = torch.randn(6, 5, 4, 3, generator=torch.Generator().manual_seed(1)).to(device)
    bench = CASES[name].build(device)
    assert next(iter(bench.impls)) == OURS
    assert bench.check(x) == []


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """The program sets the number of threads for its process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def one_case(monkeypatch: pytest.MonkeyPatch, bench: Bench) -> None:
    case = Case("planted", lambda device: bench, passes=1, shapes=((8,),), quick_shapes=((8,),))
    monkeypatch.setattr(program, "CASES", {"planted": case})


def test_wrong_result_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    one_case(monkeypatch, of_functions(lambda x: x + 1e-6, lambda x: x))
    assert program.main(["--quick"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_our_error_is_a_failure_and_a_peers_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(x: torch.Tensor) -> torch.Tensor:
        raise TypeError("not today")

    results = tmp_path / "deep" / "results.json"
    one_case(monkeypatch, of_functions(refuse, lambda x: x))
    assert program.main(["--quick", "--json", str(results)]) == 1
    assert json.loads(results.read_text())["rows"][0]["wrong"] == ["TypeError: not today"]

    one_case(monkeypatch, of_functions(lambda x: x, refuse))
    assert program.main(["--quick", "--json", str(results)]) == 0
    (row,) = json.loads(results.read_text())["rows"]
    assert row["refused"] == {TORCH: "TypeError: not today"}
    assert list(row["timings"]) == [OURS]


@pytest.mark.parametrize(
    ("ratio", "word"), [((2.0, 1.9, 2.1), "faster"), ((0.5, 0.4, 0.6), "slower"), ((1.0, 0.9, 1.1), "even")]
)
def test_a_loss_is_called_one(ratio: tuple[float, float, float], word: str) -> None:
    assert verdict(Timing(Spread(1.0, 1.0, 1.0), Spread(*ratio))) == word


def test_unknown_case_is_an_error() -> None:
    with pytest.raises(SystemExit):
        program.main(["--op", "no such case"])
