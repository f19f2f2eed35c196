"""The registry: every case passes its own gate, names its peers, and has inputs that suit it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import qkernels.modules
import qkernels.ops
from benchmarks import calls, histograms, learnable, module_cases, operators, peers  # noqa: F401 (they register cases)
from benchmarks.cases import CASES, JUDGES, gather
from benchmarks.gate import against_contract, against_peers
from benchmarks.inputs import LLM_LINEAR, NAMES, Input
from benchmarks.peers import COMPILED, FLAGGEMS, MODELOPT, OURS, TORCH, TORCHAO, absence
from tests.benchmarks.support import CPU, EIGHT


def tiny(name: str, device: torch.device, dtype: str = "float32") -> torch.Tensor:
    return replace(Input(CASES[name].tiny), dtype=dtype).make(CPU, 1).to(device)


@pytest.mark.parametrize("name", CASES)
def test_case_passes_its_gate(name: str, device: torch.device) -> None:
    """On a CPU, the bits of torch and torchao; on a GPU, the bits that the CPU gives. Who is not there is named."""
    case, x = CASES[name], tiny(name, device)
    bench = case.build(device)
    assert list(bench.impls)[:2] == [OURS, TORCH]
    assert {*bench.impls, *bench.absent} == {OURS, *case.peers}
    judged = [peer for peer in bench.impls if peer in (OURS, *JUDGES)]
    if device.type == "cuda":
        assert against_contract(bench, case.build(CPU), x, judged).wrong == []
    else:
        assert against_peers(bench, x, judged).wrong == []


def test_the_gate_of_a_module_sees_its_state_after_two_batches() -> None:
    x = torch.tensor([[-2.0, 4.0]])
    first, second = module_cases.after_two_batches(qkernels.modules.MinMaxObserver(), module_cases.observe, x)
    assert [after[1]["max_val"].item() for after in (first, second)] == [4.0, 6.0]  # type: ignore[index]  # of an object


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", CASES)
def test_ours_takes_the_dtypes_that_the_case_names(name: str, dtype: str, device: torch.device) -> None:
    case = CASES[name]
    if dtype in case.dtypes:
        x = tiny(name, device, dtype)
        case.build(device).impls[OURS](x, x)
    else:
        with pytest.raises(RuntimeError):
            case.build(device).impls[OURS](tiny(name, device, dtype), tiny(name, device, dtype))


COMPILING = ["aminmax axis=1", "fake_quantize fwd+bwd", "learnable_fake_quantize fwd+bwd"]


@pytest.mark.parametrize("name", COMPILING)
def test_compiled_plain_pytorch_does_the_same_job(name: str, device: torch.device) -> None:
    """One value in fifty may fall to the other side of a tie; sums are as good as float32 sums are."""
    torch._dynamo.reset()
    impls, x = CASES[name].build(device).impls, tiny(name, device)
    ours: Any = impls[OURS](x, x)
    theirs: Any = impls[COMPILED](x, x)
    for a, b in zip(ours, theirs, strict=True):
        if a.shape == x.shape:
            assert int((a != b).sum()) <= x.numel() // 50
        else:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


ONCE = ("merge_histograms",)  # at the end of a calibration, on the host


@pytest.mark.parametrize("name", [name for name in qkernels.ops.__all__ if name not in ONCE])
def test_every_operator_is_in_a_case_and_in_the_overhead_suite(name: str) -> None:
    """Some are in a case of what calls them: a backward in that of its forward, histograms in those of the observer."""
    within = {
        "learnable_fake_quantize_backward": "learnable_fake_quantize fwd+bwd",
        "observe_histogram_": "HistogramObserver",
        "search_histogram_range": "HistogramObserver.calculate_qparams",
        "search_histogram_qparams": "HistogramObserver.calculate_qparams",
        "update_qparams_from_histogram_": "FakeQuantize HistogramObserver step",
    }
    assert within.get(name) in CASES or any(case.split(" ")[0].rstrip(",") == name for case in CASES)
    assert name in calls.CALLS


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in qkernels.modules.__all__
        if name.endswith(("Observer", "FakeQuantize")) and not name.startswith("_")
    ],
)
def test_every_module_is_in_the_overhead_suite_or_named_as_left_out(name: str) -> None:
    assert name in calls.CALLS or name in calls.NOT_TIMED


@pytest.mark.parametrize("name", CASES)
def test_every_case_has_inputs_on_a_gpu(name: str) -> None:
    """And those of an LLM's linear layer or more exceed the L2 cache of any GPU, in both dtypes."""
    case = CASES[name]
    puts = case.inputs(torch.device("cuda"), "default")
    assert puts
    large = [put for put in puts if torch.Size(put.shape).numel() >= torch.Size(LLM_LINEAR).numel()]
    assert large or case.passes == 0
    if not name.startswith("Fused") and large:
        assert {put.dtype for put in large} == {"float32", "bfloat16"}


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_every_input_has_the_name_of_what_it_is(device_type: str) -> None:
    device = torch.device(device_type)
    everything = {put for case in CASES.values() for put in case.inputs(device, "full")}
    assert {put.shape for put in everything} <= NAMES.keys()
    assert {put.dtype for put in everything} == {"float32", "bfloat16", "float16"}
    assert {put.layout for put in everything} == {"contiguous", "channels_last"}
    largest = max(torch.Size(put.shape).numel() * 4 for put in everything)
    assert (largest == 2**30) if device_type == "cuda" else (largest <= 2**26)


def test_quick_is_a_part_and_full_is_more() -> None:
    for case in CASES.values():
        quick, usual, full = (case.inputs(CPU, suite) for suite in ("quick", "default", "full"))
        assert set(quick) <= set(usual) <= set(full)
    sizes = [sum(len(case.inputs(CPU, suite)) for case in CASES.values()) for suite in ("quick", "default", "full")]
    assert sizes == sorted(set(sizes))


def test_channels_last_input() -> None:
    x = replace(EIGHT, shape=(2, 3, 4, 5), layout="channels_last", dtype="bfloat16").make(CPU, 0)
    assert x.dtype == torch.bfloat16
    assert x.is_contiguous(memory_format=torch.channels_last)


# --- peers ---------------------------------------------------------------------------------------------------------


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.PACKAGES, TORCHAO, peers.Package("no_such_module", "no-such-package"))
    assert absence(TORCHAO, CPU) == "not installed (package no-such-package)"
    bench = CASES["MinMaxObserver"].build(CPU)
    assert list(bench.impls) == [OURS, TORCH]
    assert bench.absent == {TORCHAO: "not installed (package no-such-package)"}
    assert absence(TORCH, CPU) is None


def test_a_package_with_another_interface_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.PACKAGES, MODELOPT, peers.Package("json", "json"))

    def make() -> object:
        return peers.load("json", "fake_tensor_quant")

    taking_part, absent = gather(CPU, {}, {MODELOPT: make})  # type: ignore[dict-item]  # typed as object
    assert taking_part == {}
    assert absent == {MODELOPT: "installed, but json has no fake_tensor_quant"}


def test_flaggems_wants_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.PACKAGES, FLAGGEMS, peers.Package("json", "json"))
    assert absence(FLAGGEMS, CPU) == "its Triton kernels need a GPU"
    assert absence(FLAGGEMS, torch.device("cuda")) is None


def test_adapters_pass_what_the_peers_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """amax second for ModelOpt; for FlagGems no dimension, or all but the channels'."""
    called = []

    def stand_in(*args: object) -> tuple[torch.Tensor, torch.Tensor]:
        called.append(args)
        return torch.zeros(1), torch.zeros(1)

    monkeypatch.setattr(peers, "load", lambda module, name: stand_in)
    x, amax = torch.zeros(2, 3, 4), torch.ones(1)
    peers.modelopt_fake_quantize(amax)(x)
    peers.flaggems_aminmax(None)(x)
    peers.flaggems_aminmax(-2)(x)
    assert called == [(x, amax), (x,), (x, [0, 2])]
