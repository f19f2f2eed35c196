"""The tuner's compiler under the null driver: real kernels, really compiled in the tuner's configurations, none run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qkernels.autotune import cuda, lookup
from qkernels.autotune.decision import FUNCTIONS
from qkernels.autotune.machine import Machine
from qkernels.autotune.search import Limits, Resources, candidates, heuristic_for
from qkernels.autotune.tuner import Bench, group, tune_decision
from qkernels.workloads import OPS, workloads_of
from tests.lanes.null_driver import LaunchLog, null_driver

CPU = torch.device("cpu")
LIMITS = Limits(multiprocessors=132)


@pytest.fixture
def log() -> Iterator[LaunchLog]:
    with null_driver() as log:
        yield log


def bench(times=None) -> Bench:
    return Bench(
        CPU,
        Machine("none", "sm_90", "2", "3"),
        LIMITS,
        lambda work: cuda.decisions_of(work, CPU),
        lambda work, decision, configs: cuda.compiled(work, decision, configs, CPU),
        times,
    )


SHAPES = [((64, 4096), None), ((64, 512), 0), ((512, 96), 1)]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_every_workload_makes_one_decision_and_obeys_it(op: str, shape, axis, log: LaunchLog) -> None:
    """Whatever the tuner answers reaches the launch: grid, tile, warps."""
    works = workloads_of(op, shape, "float32", axis)
    ((decision, asking),) = group(works, bench()).items()
    assert asking == works
    assert decision.function.startswith("flat" if axis is None else "tiled")
    heuristic = heuristic_for(decision, CPU)
    for config in candidates(decision, heuristic, LIMITS, most=3):
        for work in works:
            log.clear()
            (resources,) = cuda.compiled(work, decision, [config], CPU)
            assert isinstance(resources, Resources), resources
            launch = log.launches[0]
            assert launch.num_warps == config.num_warps
            if axis is None:
                assert launch.arguments["BLOCK"] == config.block
                programs = config.programs or -(-works[0].make(CPU)[0].numel() // config.block)
                assert launch.grid == (programs, 1, 1)
            else:
                assert (launch.arguments["BLOCK_R"], launch.arguments["BLOCK_K"]) == (
                    config.block_rows,
                    config.block_lanes,
                )
                assert launch.grid == (config.groups, config.parts, 1)
    assert lookup._overrides is None


def test_a_question_names_the_element_size_where_the_answer_depends_on_it(log: LaunchLog) -> None:
    asked = {
        dtype: [
            str(decision)
            for shape, axis in SHAPES[:2]
            for work in workloads_of("fake_quantize", shape, dtype, axis)
            for decision in cuda.decisions_of(work, CPU)
        ]
        for dtype in ("float32", "bfloat16")
    }
    tiled = "tiled_elementwise n_rows=1 run=512 channels=64 channel_innermost=False itemsize="
    assert asked == {
        "float32": ["flat_elementwise itemsize=4"] * 2 + [f"{tiled}4"] * 2,
        "bfloat16": ["flat_elementwise itemsize=2"] * 2 + [f"{tiled}2"] * 2,
    }


def test_every_function_has_a_workload(log: LaunchLog) -> None:
    decided = {
        decision.function
        for op in OPS
        for shape, axis in SHAPES
        for work in workloads_of(op, shape, "float32", axis)
        for decision in cuda.decisions_of(work, CPU)
    }
    assert decided == set(FUNCTIONS)


def test_a_whole_tuning_with_compiled_kernels(log: LaunchLog) -> None:
    """Everything but the clock is real; the clock likes one candidate."""
    works = workloads_of("fake_quantize", (64, 64), "float32", None)
    ((decision, _),) = group(works, bench()).items()
    wanted = candidates(decision, heuristic_for(decision, CPU), LIMITS)[2]
    timer = bench(lambda work, decision, configs: [[1.0 if c == wanted else 2.0] * 3 for c in configs])
    outcome = tune_decision(decision, works, timer, most=4)
    assert (outcome.best, outcome.ratio) == (wanted, 0.5)
    assert outcome.left_out == {}


def test_a_configuration_that_does_not_compile_is_reported(log: LaunchLog, monkeypatch: pytest.MonkeyPatch) -> None:
    (work,) = workloads_of("aminmax", (64, 64), "float32", None)
    (decision,) = cuda.decisions_of(work, CPU)
    config = heuristic_for(decision, CPU)

    def fail(*arguments: object) -> None:
        raise RuntimeError("out of resource")

    broken = type(work)(work.name, work.make, fail)
    good, bad = cuda.compiled(work, decision, [config], CPU), cuda.compiled(broken, decision, [config], CPU)
    assert isinstance(good[0], Resources)
    assert str(bad[0]) == "out of resource"
    silent = type(work)(work.name, work.make, lambda *arguments: None)
    assert "no Triton kernel was launched" in str(cuda.compiled(silent, decision, [config], CPU)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("histogram", (4,), "float32", None), "op must be one of .*got 'histogram'"),
        (("aminmax", (4,), "float64", None), "dtype must be one of .*got 'float64'"),
        (("aminmax", (4, 0), "float32", None), "shape must have positive dimensions; got"),
        (("aminmax", (), "float32", None), "shape must have positive dimensions; got"),
        (("aminmax", (4,), "float32", 1), "axis must lie within 1 dimensions; got 1"),
    ],
)
def test_what_is_no_workload(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        workloads_of(*arguments)
