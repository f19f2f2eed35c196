"""The search and the choice, with a compiler and a timer that the tests play."""

from __future__ import annotations

import itertools

import pytest

from qkernels.autotune import cuda
from qkernels.autotune.config import FlatConfig, LaunchConfig
from qkernels.autotune.decision import FUNCTIONS, Decision
from qkernels.autotune.search import MOST, Limits, Resources, candidates, heuristic_for, prune_reason
from qkernels.autotune.tuner import Workload, group, tune_decision
from tests.autotune.support import CPU, FLAT, LIMITS, SMALL, TILED, FakeBench, workload

HEURISTIC = heuristic_for(FLAT, CPU)
ALL = candidates(FLAT, HEURISTIC, LIMITS)
BEST = ALL[7]

DECISIONS = [
    *(Decision("flat_reduction", (n,)) for n in (1, 1000, 5000, 1 << 20, 1 << 31)),
    *(Decision("flat_elementwise", (itemsize,)) for itemsize in (2, 4)),
    *(Decision("flat_accumulation", (n,)) for n in (1, 1025, 1 << 28)),
    *(
        Decision(function, (*extents, *((4,) if "itemsize" in FUNCTIONS[function].arguments else ())))
        for function in ("tiled_reduction", "tiled_accumulation", "tiled_elementwise")
        for extents in [
            (32, 3136, 256, False),
            (4096, 1, 14336, True),
            (1, 1, 3, True),
            (1, 9, 1, False),
            (7, 49, 64, False),
        ]
    ),
]


@pytest.mark.parametrize("decision", DECISIONS, ids=str)
def test_candidates_are_valid_unique_and_begin_with_the_heuristic(decision: Decision) -> None:
    heuristic = heuristic_for(decision, CPU)
    found = candidates(decision, heuristic, LIMITS)
    assert found[0] == heuristic
    assert len(set(found)) == len(found) <= MOST + 1
    for config in candidates(decision, heuristic, LIMITS, most=10_000):
        decision.check(config)


def test_the_nearest_candidates_come_first() -> None:
    found = candidates(TILED, heuristic_for(TILED, CPU), LIMITS)
    assert len(found) == MOST + 1
    assert candidates(TILED, heuristic_for(TILED, CPU), LIMITS, most=5) == found[:6]
    changed = [
        sum(a != b for a, b in zip(c.to_dict().values(), found[0].to_dict().values(), strict=True)) for c in found
    ]
    assert changed[1] == 1
    assert max(changed) > 1


def fast(*configs: LaunchConfig, microseconds: float = 5.0) -> FakeBench:
    return FakeBench(lambda config, workload: microseconds if config in configs else 10.0)


def test_the_fastest_wins() -> None:
    fake = fast(BEST)
    outcome = tune_decision(FLAT, [workload()], fake.bench())
    assert (outcome.best, outcome.improved, outcome.timed, outcome.left_out) == (BEST, True, len(ALL), {})
    assert outcome.ratio == pytest.approx(0.5, rel=1e-12)
    assert fake.timings == [ALL, [HEURISTIC, BEST]]


def test_of_equals_the_one_nearest_to_the_heuristic_wins() -> None:
    assert tune_decision(FLAT, [workload()], fast(ALL[9], ALL[5], ALL[20]).bench()).best == ALL[5]


@pytest.mark.parametrize("microseconds", [10.0, 9.71, 11.0])
def test_ties_and_small_gains_leave_the_heuristic(microseconds: float) -> None:
    fake = fast(BEST, microseconds=microseconds)
    outcome = tune_decision(FLAT, [workload()], fake.bench())
    assert (outcome.best, outcome.improved, outcome.ratio) == (HEURISTIC, False, 1.0)
    assert fake.timings == [ALL]


def test_the_margin_is_the_callers() -> None:
    fake = fast(BEST, microseconds=9.71)
    assert tune_decision(FLAT, [workload()], fake.bench(), margin=0.02).best == BEST


def test_a_margin_of_nothing_still_leaves_ties_to_the_heuristic() -> None:
    fake = FakeBench()
    assert tune_decision(FLAT, [workload()], fake.bench(), margin=0.0).best == HEURISTIC
    assert fake.timings == [ALL]


def test_luck_is_not_enough() -> None:
    """Fast in the first run, not in the second."""
    fake = FakeBench()
    fake.microseconds = lambda config, workload: 5.0 if config == BEST and len(fake.timings) == 1 else 10.0
    outcome = tune_decision(FLAT, [workload()], fake.bench())
    assert fake.timings == [ALL, [HEURISTIC, BEST]]
    assert (outcome.best, outcome.ratio) == (HEURISTIC, 1.0)


def test_a_winner_loses_on_no_workload() -> None:
    """ALL[3] is the fastest on average and slower in bfloat16."""
    times = {(ALL[3], "float32"): 2.0, (ALL[3], "bfloat16"): 10.5, (BEST, "float32"): 8.0, (BEST, "bfloat16"): 9.9}
    fake = FakeBench(lambda config, work: times.get((config, work.name.split()[1]), 10.0))
    both = [workload(f"aminmax {dtype} 1048576 axis=None") for dtype in ("float32", "bfloat16")]
    outcome = tune_decision(FLAT, both, fake.bench())
    assert outcome.best == BEST
    assert outcome.ratio == pytest.approx((0.8 * 0.99) ** 0.5, rel=1e-12)
    assert tune_decision(FLAT, both[:1], fake.bench()).best == ALL[3]


def test_candidates_that_fail_are_skipped() -> None:
    fake = fast(ALL[3], BEST)
    error = RuntimeError("out of resource: shared memory\nand a second line")
    fake.resources = lambda config: error if config == ALL[3] else SMALL
    outcome = tune_decision(FLAT, [workload()], fake.bench())
    assert outcome.best == BEST
    assert outcome.left_out == {ALL[3]: "failed: RuntimeError: out of resource: shared memory"}
    assert ALL[3] not in fake.timings[0]


def test_a_heuristic_that_fails_is_an_error() -> None:
    fake = FakeBench(resources=lambda config: MemoryError("no room"))
    with pytest.raises(MemoryError, match="no room"):
        tune_decision(FLAT, [workload()], fake.bench())


def test_candidates_whose_code_is_hopeless_are_not_timed() -> None:
    """The fastest one spills, the next fastest does not fit."""
    takes = {ALL[3]: Resources(64, 2, 0), ALL[4]: Resources(32, 0, 1 << 20)}
    fake = FakeBench(lambda config, workload: {ALL[3]: 1.0, ALL[4]: 2.0, BEST: 5.0}.get(config, 10.0))
    fake.resources = lambda config: takes.get(config, SMALL)
    outcome = tune_decision(FLAT, [workload()], fake.bench())
    assert outcome.best == BEST
    assert outcome.left_out == {
        ALL[3]: "spills 2 registers, the heuristic 0",
        ALL[4]: "does not fit: 32 registers, 1048576 bytes of shared memory",
    }
    assert not {ALL[3], ALL[4]} & set(itertools.chain(*fake.timings))


def test_where_nothing_is_left_nothing_is_timed() -> None:
    fake = FakeBench(resources=lambda config: SMALL if config == HEURISTIC else RuntimeError("no"))
    outcome = tune_decision(FLAT, [workload()], fake.bench())
    assert (outcome.best, outcome.timed, fake.timings) == (HEURISTIC, 1, [])


@pytest.mark.parametrize(
    ("config", "resources", "reason"),
    [
        (FlatConfig(4096, 8, 528, 1024), Resources(64, 0, 0), None),  # 4 programs of 16384 registers on each of 132
        (FlatConfig(4096, 8, 529, 1024), Resources(64, 0, 0),
         "529 programs in a grid meant to be resident; the device holds 528"),
        (FlatConfig(4096, 8, 529, 1024), Resources(32, 0, 0), None),
        (FlatConfig(4096, 8, 265, 1024), Resources(32, 0, 100_000),
         "265 programs in a grid meant to be resident; the device holds 264"),
        (FlatConfig(4096, 8, 256, 1024), Resources(64, 1, 0), None),  # no worse than the heuristic
        (FlatConfig(4096, 8, 256, 1024), Resources(64, 2, 0), "spills 2 registers, the heuristic 1"),
        (FlatConfig(4096, 32, 1, 1), Resources(65, 0, 0), "does not fit: 65 registers, 0 bytes of shared memory"),
    ],
)  # fmt: skip
def test_reasons_to_prune(config: FlatConfig, resources: Resources, reason: str | None) -> None:
    decision = Decision("flat_reduction", (1 << 28,))
    assert prune_reason(decision, config, resources, Resources(64, 1, 0), Limits(multiprocessors=132)) == reason


def test_workloads_are_grouped_by_what_they_decide() -> None:
    bench = FakeBench().bench()
    names = [
        "fake_quantize forward float32 64x64 axis=None",
        "aminmax float32 4096 axis=None",
        "fake_quantize backward float32 8x8 axis=None",
        "fake_quantize forward float16 64x64 axis=None",
    ]
    works = [workload(name) for name in names]
    assert group(works, bench) == {
        Decision("flat_elementwise", (4,)): [works[0], works[2]],
        Decision("flat_reduction", (4096,)): [works[1]],
        Decision("flat_elementwise", (2,)): [works[3]],
    }


@pytest.mark.parametrize("made", [[], [FLAT, TILED]], ids=["none", "two"])
def test_a_workload_makes_one_decision(made: list[Decision]) -> None:
    bench = FakeBench().bench()
    bench = type(bench)(bench.device, bench.machine, bench.limits, lambda work: made, bench.compile, bench.time)
    with pytest.raises(ValueError, match="a workload must make one decision; made"):
        group([workload()], bench)


def test_rounds_take_turns() -> None:
    ran: list[tuple[int, int]] = []
    passes = [lambda n=n: n for n in range(3)]

    def seconds_of(run, times: int) -> float:
        ran.append((run(), times))
        return times * (run() + 1) * 0.001

    samples = cuda.interleaved(passes, seconds_of, rounds=3, slice_seconds=0.004)
    warm_up, rounds = ran[:4], ran[4:]
    assert warm_up == [(0, 1), (1, 1), (2, 1), (0, 1)]
    assert rounds == [(n, 4) for n in (0, 1, 2, 1, 2, 0, 2, 0, 1)]
    assert samples == [[0.001] * 3, [0.002] * 3, [0.003] * 3]


@pytest.mark.parametrize(("nbytes", "copies"), [(1, 64), (4 << 20, 31), (60 << 20, 3), (1 << 30, 2), (0, 64)])
def test_inputs_exceed_twice_the_cache(nbytes: int, copies: int) -> None:
    assert cuda.copies_for(nbytes, 60 << 20) == copies


def test_tuning_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda.torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="it needs a CUDA device"):
        cuda.open_bench(cuda.torch.device("cuda"))
    with pytest.raises(RuntimeError, match="it needs a CUDA device"):
        cuda.open_bench(CPU)


@pytest.mark.cuda
def test_a_decision_is_tuned_on_a_gpu(device) -> None:
    """The real compiler and timer: a ratio comes out, and whatever wins is valid."""
    from qkernels.workloads import workloads_of

    bench = cuda.open_bench(device, rounds=3)
    works: list[Workload] = workloads_of("aminmax", (1 << 20,), "float32", None)
    ((decision, asking),) = group(works, bench).items()
    assert decision == FLAT
    outcome = tune_decision(decision, asking, bench, most=4)
    decision.check(outcome.best)
    assert 0.0 < outcome.ratio <= 1.0
    assert outcome.timed + len(outcome.left_out) == 5
