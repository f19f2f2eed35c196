"""A tuned configuration changes speed, not numbers: equal bits, and LSQ's sums within their bound."""

from __future__ import annotations

import pytest
import torch

from qkernels.autotune import cuda, lookup
from qkernels.autotune.config import LaunchConfig
from qkernels.autotune.search import Limits, candidates, heuristic_for
from qkernels.workloads import OPS, workloads_of
from tests.autotune.support import CPU

pytestmark = pytest.mark.interpreter_only

SHAPES = [((5003,), None), ((6, 5, 49), 1), ((70, 37), 1)]  # flat, channel outside, channel innermost; ragged ends
# Where a workload's arguments hold results: dx and y first, running min and max behind x, the sums at 5 and 6.
EXACT = {"aminmax": (1, 2), "fake_quantize": (0,), "learnable_fake_quantize": (0,)}
SUMS = {"learnable_fake_quantize": (5, 6)}


def _programs(config: LaunchConfig) -> int:
    values = config.to_dict()
    return values.get("parts", values.get("programs", 0))


@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_numbers_do_not_depend_on_the_configuration(op: str, shape: tuple[int, ...], axis: int | None) -> None:
    for work in workloads_of(op, shape, "float32", axis):
        (decision,) = cuda.decisions_of(work, CPU)
        heuristic = heuristic_for(decision, CPU)
        around = candidates(decision, heuristic, Limits(multiprocessors=3), most=1000)
        results = []
        chosen = (heuristic, around[1], around[-1], min(around, key=_programs), max(around, key=_programs))
        for config in dict.fromkeys(chosen):
            torch.manual_seed(1)
            arguments = work.make(CPU)
            with lookup.override(decision, config):
                work.run(*arguments)
            results.append(arguments)
        first, *others = results
        for other in others:
            for index in EXACT[op]:
                assert torch.equal(other[index], first[index])
            for index in SUMS.get(op, ()):
                terms = first[2].abs().sum() * 128  # no term of dscale is larger than |dy| * 128
                torch.testing.assert_close(other[index], first[index], rtol=0, atol=1e-6 * terms.item())
        assert first[EXACT[op][0]].isfinite().all()
