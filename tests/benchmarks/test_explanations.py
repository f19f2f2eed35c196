"""Losses are explained: which cases have a reason, where none is claimed, and what bears the reasons out."""

from __future__ import annotations

import pytest
import torch

from benchmarks import histograms, learnable, module_cases, operators  # noqa: F401 (they register the cases)
from benchmarks.cases import CASES
from benchmarks.counts import count_aten_calls
from benchmarks.explanations import (
    NO_DIFFERENCE,
    ONE_LOOP,
    SAME_REDUCTION,
    SMALL_ELEMENTS,
    explanation,
    explanations,
)
from benchmarks.peers import COMPILED, OURS, TORCH
from tests.benchmarks.support import CPU

# Larger tensors on a CPU, against eager peers: these cases are measured faster throughout and have no text. A case that
# loses after all is reported as a loss without a known reason.
FASTER = {
    "HistogramObserver",
    "aminmax axis=1",
    "aminmax axis=0",
    "aminmax axis=-1",
    "fake_quantize",
    "fake_quantize fwd+bwd",
    "fake_quantize symmetric fwd+bwd",
    "fake_quantize axis=1 fwd+bwd",
    "fake_quantize axis=0 fwd+bwd",
    "fake_quantize axis=-1 fwd+bwd",
    "learnable_fake_quantize fwd+bwd",
    "learnable_fake_quantize axis=0 fwd+bwd",
    "learnable_fake_quantize axis=1 fwd+bwd",
    "LearnableFakeQuantize learning step",
    "LearnableFakeQuantize per channel learning step",
    "PerChannelMinMaxObserver ch_axis=1",
    "MovingAveragePerChannelMinMaxObserver",
    "FakeQuantize step",
    "FakeQuantize per channel step",
    "FusedMovingAvgObsFakeQuantize step",
    "FixedQParamsFakeQuantize step",
    "FakeQuantize HistogramObserver step",
}


@pytest.mark.parametrize("name", CASES)
def test_a_case_that_may_lose_has_a_reason(name: str) -> None:
    assert explanation(name, SMALL_ELEMENTS, TORCH, "cpu")
    if any(torch.Size(put.shape).numel() > SMALL_ELEMENTS for put in CASES[name].inputs(CPU, "full")):
        assert (explanation(name, SMALL_ELEMENTS + 1, TORCH, "cpu") is None) == (name in FASTER)
    if COMPILED in CASES[name].peers:
        assert explanation(name, 1 << 20, COMPILED, "cpu") == ONE_LOOP


def test_no_reason_is_claimed_on_a_gpu_or_for_an_unknown_case() -> None:
    assert explanation("aminmax", 8, TORCH, "cuda") is None
    assert explanation("nonesuch", 8, TORCH, "cpu") is None
    assert explanations("aminmax", 8, [TORCH], [TORCH], "cuda") is None


def test_a_row_has_the_reason_of_every_peer_it_lost_to() -> None:
    assert explanations("aminmax", 1 << 20, [], [], "cpu") is None
    assert explanations("aminmax", 1 << 20, [TORCH], [], "cpu") == NO_DIFFERENCE
    both = [TORCH, COMPILED]
    assert explanations("aminmax", 1 << 20, both, both, "cpu") == f"{SAME_REDUCTION}; {ONE_LOOP}"
    assert explanations("fake_quantize", 1 << 20, both, both, "cpu") is None, "one of the two is not explained"


def test_the_same_reduction_is_one_aten_call_on_both_sides() -> None:
    """What SAME_REDUCTION says: one operation reads x, the same one."""
    impls = CASES["aminmax"].build(CPU).impls
    x = torch.randn(1 << 15)
    assert count_aten_calls(impls[OURS], x) == count_aten_calls(impls[TORCH], x) == 1


def test_the_stored_mask_is_one_pass() -> None:
    """What STORED_MASK says: torch's backward is one operation, ours several."""
    impls = CASES["fake_quantize_backward"].build(CPU).impls
    x = torch.randn(1 << 15)
    impls[TORCH](x, x)  # its forward, once
    assert count_aten_calls(impls[TORCH], x) == 1 < count_aten_calls(impls[OURS], x)
