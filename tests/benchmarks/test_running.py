"""The gate, the counts and a GPU's path: a wrong implementation is not timed, and what a row holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as program
from benchmarks import timer
from benchmarks.cases import CASES, Bench, of_functions
from benchmarks.counts import Counts, count, count_aten_calls
from benchmarks.gate import Difference, differences
from benchmarks.inputs import Input
from benchmarks.peers import COMPILED, MODELOPT, OURS, TORCH
from benchmarks.report import disagreement, summary, table_line, verdict
from benchmarks.running import Settings, measure
from benchmarks.timer import Spread, Timing
from tests.benchmarks.support import CPU, EIGHT, one_case, planted, row


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
    (found,) = json.loads(results.read_text())["rows"]
    assert found["refused"] == {TORCH: "TypeError: not today"}
    assert list(found["timings"]) == [OURS]


def test_a_peer_that_is_no_judge_may_differ(capsys: pytest.CaptureFixture[str]) -> None:
    """What Inductor rounds otherwise is said, and no failure of ours."""
    impls: dict[str, timer.Impl] = {OURS: lambda x, dy: x, TORCH: lambda x, dy: x, MODELOPT: lambda x, dy: x + 1}
    bench = Bench(impls, lambda name, x: impls[name](x, x))
    (found,) = measure(planted(bench), EIGHT, Settings(CPU, quick=True), None)
    assert found.wrong == []
    assert disagreement(found.peers_differ[MODELOPT]) == "8 elements"
    assert "ModelOpt differs: 8 elements" in table_line(found)
    assert list(found.timings) == [OURS, TORCH, MODELOPT]


def test_the_compiled_peer_takes_part_where_asked() -> None:
    case = CASES["aminmax"]
    (found,) = measure(case, EIGHT, Settings(CPU, quick=True), None)
    assert COMPILED not in found.timings
    assert found.absent[COMPILED] == "compiled only in the suites kernels, modules and full"
    (found,) = measure(case, EIGHT, Settings(CPU, quick=True, compiles=True), None)
    assert list(found.timings) == [OURS, TORCH, COMPILED]
    assert found.counts[COMPILED] == Counts()
    assert "FlagGems" in found.absent


def test_the_gate_compares_bits() -> None:
    assert differences(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0])) == [Difference("1 of 2 values differ", 1)]
    assert differences(torch.tensor(float("nan")), torch.tensor(float("nan"))) == []
    (apart,) = differences((torch.ones(2),), (torch.ones(3),))
    assert apart.elements is None


def test_aten_calls_are_counted_also_inside_our_operators() -> None:
    x = torch.randn(4, 4)
    assert count_aten_calls(lambda x, dy: x * 2 + 1, x) == 2
    assert count_aten_calls(CASES["aminmax axis=1"].build(CPU).impls[OURS], x) == 2  # amin, amax
    assert count(lambda x, dy: x + 1, x, compiled=True) == Counts()


def test_one_sample_is_its_own_spread() -> None:
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    assert timer.timings_of({"a": [2.0], "b": [5.0]}, "a")["b"].times_ours == Spread(2.5, 2.5, 2.5)


# --- a GPU's path, with its clock, its counts and its graphs replaced ------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings as for a GPU, where tensors stay on the CPU and a captured graph is a call of the function."""
    make = Input.make
    monkeypatch.setattr(Input, "make", lambda self, device, seed: make(self, CPU, seed))
    monkeypatch.setattr(timer, "capture", timer.calls)
    return Settings(torch.device("cuda", 0), quick=True)


def test_on_a_gpu_ours_must_keep_the_contract(gpu: Settings) -> None:
    right, wrong = of_functions(lambda x: x, lambda x: x), of_functions(lambda x: x + 1e-6, lambda x: x + 1e-6)
    (found,) = measure(planted(wrong, contract=right), EIGHT, gpu, 100.0)
    assert found.wrong == ["8 of 8 values differ"]
    assert found.timings == {}


def test_on_a_gpu_torch_may_differ_and_is_timed(gpu: Settings) -> None:
    bench = of_functions(lambda x: x, lambda x: torch.where(x > x.median(), x, x + 1e-3))
    rows = list(measure(planted(bench), EIGHT, gpu, 100.0))
    assert [found.how for found in rows] == ["events", "graph"]
    for found in rows:
        assert list(found.timings) == [OURS, TORCH]
        assert disagreement(found.peers_differ[TORCH]) == "4 elements"
        assert found.of_copy == pytest.approx(found.gb_per_second / 100)
        assert "torch differs: 4 elements" in table_line(found)
    assert "in 1 of 1 cases torch's result is not that of the CPU contract" in summary(rows)


def test_what_cannot_be_captured_is_called(gpu: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(impl: timer.Impl, inputs: timer.Inputs) -> Callable[[], None]:
        if impl is theirs:
            raise RuntimeError("called a synchronizing CUDA operation\nand more")
        return timer.calls(impl, inputs)

    bench = of_functions(lambda x: x, lambda x: x)
    theirs = bench.impls[TORCH]
    monkeypatch.setattr(timer, "capture", capture)
    events, graph = measure(planted(bench), EIGHT, gpu, None)
    assert events.not_captured == {}
    assert graph.not_captured == {TORCH: "called a synchronizing CUDA operation"}
    assert list(graph.timings) == [OURS, TORCH]
    assert "torch not captured, timed by calls: called a synchronizing" in table_line(graph)


@pytest.mark.cuda
def test_graphs_on_a_gpu(device: torch.device) -> None:
    """Ours is captured and replays; a function that reads a value on the host is not, and leaves no trace."""
    case = CASES["FakeQuantize step"]
    x = EIGHT.make(device, 0)
    inputs = timer.rotating_inputs(x)
    sums = torch.zeros(1, device=device)
    impls: dict[str, timer.Impl] = {
        OURS: case.build(device).impls[OURS],
        "adds": lambda x, dy: sums.add_(1),
        "reads": lambda x, dy: float(x.sum()),
    }
    stream = torch.cuda.current_stream()
    passes, not_captured = timer.capture_all(impls, inputs)
    assert list(not_captured) == ["reads"]
    assert "synchronizing" in not_captured["reads"]
    assert torch.cuda.current_stream() == stream
    sums.zero_()
    passes["adds"]()
    assert sums.item() == len(inputs)
    passes[OURS]()
    torch.cuda.synchronize()


@pytest.mark.cuda
def test_counts_on_a_gpu(device: torch.device) -> None:
    x = torch.randn(1024, device=device)
    assert count(lambda x, dy: x + 1, x) == Counts(launches=1, host_syncs=0, peak_bytes=4096)
    assert (count(lambda x, dy: float(x.sum()), x).host_syncs or 0) >= 1


# --- what is said about it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "word"), [((2.0, 1.9, 2.1), "faster"), ((0.5, 0.4, 0.6), "slower"), ((1.0, 0.9, 1.1), "even")]
)
def test_a_loss_is_called_one(ratio: tuple[float, float, float], word: str) -> None:
    assert verdict(Timing(Spread(1.0, 1.0, 1.0), Spread(*ratio))) == word


def test_the_summary_tells_losses_without_a_reason() -> None:
    text = summary([row(ours=10, theirs=5), row("fake_quantize", ours=10, theirs=40)])
    assert "geometric mean of the speedups 1.41 over 2 comparisons: 1 faster, 0 even, 1 slower" in text
    assert "- no explanation is known\n    aminmax 8 (to torch)" in text
    assert "below 1.0" not in summary([row(ours=10, theirs=40)])
