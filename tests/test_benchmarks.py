"""The benchmarks: every case passes its own gate, a wrong implementation is not timed, and a GPU's path is walked."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as program
from benchmarks import timer
from benchmarks.cases import CASES, OURS, TORCH, Bench, Case, of_functions
from benchmarks.gate import Difference, against_contract, against_peers, differences
from benchmarks.inputs import LLM_LINEAR, Input
from benchmarks.report import disagreement, summary, table_line, verdict
from benchmarks.timer import Spread, Timing

CPU = torch.device("cpu")
EIGHT = Input((8,))


@pytest.mark.parametrize("name", CASES)
def test_case_passes_its_gate(name: str, device: torch.device) -> None:
    """On a CPU, torch's bits; on a GPU, the bits that the CPU gives."""
    x = torch.randn(6, 5, 4, 3, generator=torch.Generator().manual_seed(1)).to(device)
    case = CASES[name]
    bench = case.build(device)
    assert list(bench.impls) == [OURS, TORCH]
    if device.type == "cuda":
        assert against_contract(bench, case.build(CPU), x, [OURS, TORCH]).wrong == []
    else:
        assert against_peers(bench, x, [OURS, TORCH]).wrong == []


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """The program sets the number of threads for its process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def planted(bench: Bench, contract: Bench | None = None) -> Case:
    """A case of `bench`, with another one on the CPU where a contract is given."""
    build: Callable[[torch.device], Bench] = lambda device: contract or bench if device == CPU else bench  # noqa: E731
    return Case("planted", build, passes=1, cpu=(EIGHT,), cpu_quick=(EIGHT,), cuda=(EIGHT,))


def one_case(monkeypatch: pytest.MonkeyPatch, bench: Bench) -> None:
    monkeypatch.setattr(program, "CASES", {"planted": planted(bench)})


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


def test_the_gate_compares_bits() -> None:
    assert differences(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0])) == [Difference("1 of 2 values differ", 1)]
    assert differences(torch.tensor(float("nan")), torch.tensor(float("nan"))) == []
    (apart,) = differences((torch.ones(2),), (torch.ones(3),))
    assert apart.elements is None


# --- a GPU's path, with its clock and its graphs replaced ------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """Arguments as for a GPU, where tensors stay on the CPU and a captured graph is a call of the function."""
    make = Input.make
    monkeypatch.setattr(Input, "make", lambda self, device, seed: make(self, CPU, seed))
    monkeypatch.setattr(timer, "capture", timer.calls)
    return argparse.Namespace(device=torch.device("cuda", 0), seed=0, quick=True, dtype=None)


def test_on_a_gpu_ours_must_keep_the_contract(gpu: argparse.Namespace) -> None:
    right, wrong = of_functions(lambda x: x, lambda x: x), of_functions(lambda x: x + 1e-6, lambda x: x + 1e-6)
    (row,) = program.measure(planted(wrong, contract=right), EIGHT, gpu, 100.0)
    assert row.wrong == ["8 of 8 values differ"]
    assert row.timings == {}


def test_on_a_gpu_torch_may_differ_and_is_timed(gpu: argparse.Namespace) -> None:
    bench = of_functions(lambda x: x, lambda x: torch.where(x > x.median(), x, x + 1e-3))
    rows = list(program.measure(planted(bench), EIGHT, gpu, 100.0))
    assert [row.how for row in rows] == ["events", "graph"]
    for row in rows:
        assert list(row.timings) == [OURS, TORCH]
        assert disagreement(row.peers_differ[TORCH]) == "4 elements"
        assert row.of_copy == pytest.approx(row.gb_per_second / 100)
        assert "torch differs: 4 elements" in table_line(row)
    assert "in 1 of 1 cases torch's result on the GPU is not that of the CPU contract" in summary(rows)


def test_what_cannot_be_captured_is_called(gpu: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(impl: timer.Impl, inputs: timer.Inputs) -> Callable[[], None]:
        if impl is theirs:
            raise RuntimeError("called a synchronizing CUDA operation\nand more")
        return timer.calls(impl, inputs)

    bench = of_functions(lambda x: x, lambda x: x)
    theirs = bench.impls[TORCH]
    monkeypatch.setattr(timer, "capture", capture)
    events, graph = program.measure(planted(bench), EIGHT, gpu, None)
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


@pytest.mark.parametrize("name", CASES)
def test_every_case_has_inputs_on_a_gpu(name: str) -> None:
    """And those of 64 Mi elements or an LLM's linear layer exceed the L2 cache of any GPU, in both dtypes."""
    inputs = CASES[name].inputs(torch.device("cuda"), quick=False)
    assert inputs
    large = [put for put in inputs if torch.Size(put.shape).numel() >= torch.Size(LLM_LINEAR).numel()]
    assert large or CASES[name].passes == 0
    if not name.startswith("Fused") and large:
        assert {put.dtype for put in large} == {"float32", "bfloat16"}


def test_channels_last_input() -> None:
    x = replace(EIGHT, shape=(2, 3, 4, 5), layout="channels_last", dtype="bfloat16").make(CPU, 0)
    assert x.dtype == torch.bfloat16
    assert x.is_contiguous(memory_format=torch.channels_last)


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "word"), [((2.0, 1.9, 2.1), "faster"), ((0.5, 0.4, 0.6), "slower"), ((1.0, 0.9, 1.1), "even")]
)
def test_a_loss_is_called_one(ratio: tuple[float, float, float], word: str) -> None:
    assert verdict(Timing(Spread(1.0, 1.0, 1.0), Spread(*ratio))) == word


def test_unknown_case_is_an_error() -> None:
    with pytest.raises(SystemExit):
        program.main(["--op", "no such case"])


def test_case_without_input_on_the_cpu_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.main(["--op", "aminmax axis=0"])
    assert "inputs for CUDA alone" in capsys.readouterr().err


def test_where_time_may_run_out_every_case_has_its_turn() -> None:
    args = program.parse_args(["--seconds", "100"])
    order = [(case.name, put.shape) for case, put in args.jobs]
    assert sorted(order) == sorted((case.name, put.shape) for case, put in program.parse_args([]).jobs)
    with_inputs = [case for case in CASES.values() if case.cpu]
    assert order[: len(with_inputs)] == [(case.name, case.cpu[-1].shape) for case in with_inputs]


def test_what_time_left_out_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    one_case(monkeypatch, of_functions(lambda x: x, lambda x: x))
    assert program.main(["--quick", "--seconds", "0"]) == 0
    assert "1 of 1 inputs were not run: 0 seconds were over" in capsys.readouterr().out
