"""search_histogram_qparams and update_qparams_from_histogram_: the search, then choose_qparams, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qkernels.ops as ops
from qkernels.ops.qparams import choose_qparams_by_rule
from qkernels.ops.qparams_rules import RULES
from tests.lanes.interpreter_trace import trace
from tests.lanes.sync_counter import count_host_reads
from tests.oracles import INTERPRETER, assert_bits_equal

pytestmark = pytest.mark.interpreter

INF, NAN = float("inf"), float("nan")
BINS, QUANT_BINS = 32, 16
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# (min, max) of a channel each: two-sided, one-sided, of one value, never observed, NaN, tiny.
RANGES = [
    (-1.0, 2.0),
    (0.5, 3.0),
    (-3.0, -0.1),
    (1.5, 1.5),
    (0.0, 0.0),
    (INF, -INF),
    (NAN, NAN),
    (-1.0, NAN),
    (0.0, 1e-9),
]
State = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def state(device: torch.device, dtype: torch.dtype = torch.float32) -> State:
    """A channel per range: most of the mass at one end, so that the search narrows what it can."""
    histogram = torch.arange(BINS, dtype=torch.float32).sub(8).square().mul(-0.05).exp().mul(500).round()
    ends = torch.tensor(RANGES).to(device, dtype)
    return histogram.repeat(len(RANGES), 1).to(device), ends[:, 0].contiguous(), ends[:, 1].contiguous()


def one(channel: int, given: State, shape: tuple[int, ...] = ()) -> State:
    """One channel as a histogram of its own."""
    histogram, low, high = given
    return histogram[channel], low[channel].reshape(shape), high[channel].reshape(shape)


def in_two_calls(
    given: State, rule: str, eps: torch.Tensor | None = None, enabled: torch.Tensor | None = None, **bounds: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operators that this one is made of."""
    low, high = ops.search_histogram_range(*given, QUANT_BINS, enabled)
    if eps is None:
        eps = torch.full((1,), torch.finfo(torch.float32).eps, dtype=low.dtype, device=low.device)
    return choose_qparams_by_rule(
        low, high, bounds.get("quant_min", -8), bounds.get("quant_max", 7), rule, bounds.get("zero_point", 0), eps
    )


def check(actual: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor], context: str) -> None:
    for name, a, b in zip(("scale", "zero_point"), actual, expected, strict=True):
        assert_bits_equal(a, b.cpu(), context=f"{context} {name}")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_it_is_the_two_operators(rule: str, dtype: torch.dtype, device: torch.device):
    """All channels at once, and some for themselves: two-sided, never observed, NaN."""
    given = state(device, dtype)
    found = ops.search_histogram_qparams(*given, QUANT_BINS, -8, 7, rule=rule)
    check(found, in_two_calls(given, rule), rule)
    assert not torch.equal(found[0], choose_qparams_by_rule(*given[1:], -8, 7, rule, 0, found[0].new_ones(1) * 1e-7)[0])
    for channel, shape in ((0, ()), (5, (1,)), (6, ())):
        single = one(channel, given, shape)
        found = ops.search_histogram_qparams(*single, QUANT_BINS, -8, 7, rule=rule)
        check(found, in_two_calls(single, rule), f"{rule} {RANGES[channel]}")
        assert found[0].shape == found[1].shape == (1,)


def test_bounds_eps_and_the_symmetric_zero_point(device: torch.device):
    given = state(device)
    eps = torch.tensor([0.3], device=device)
    for rule in ("affine", "symmetric"):
        found = ops.search_histogram_qparams(*given, QUANT_BINS, 0, 200, rule=rule, symmetric_zero_point=100, eps=eps)
        check(found, in_two_calls(given, rule, eps, quant_min=0, quant_max=200, zero_point=100), rule)
        assert found[0].nan_to_num(1).min() == eps


@pytest.mark.parametrize("bounds", [(-(2**31), 2**31 - 1), (-(2**23), 2**23), (-(2**24) - 1, 2**24)], ids=str)
def test_bounds_that_float32_does_and_does_not_hold(bounds: tuple[int, int], device: torch.device):
    given = tuple(t[:5] for t in state(device))
    found = ops.search_histogram_qparams(*given, QUANT_BINS, *bounds)
    check(found, in_two_calls(given, "affine", quant_min=bounds[0], quant_max=bounds[1]), "")
    assert found[1][1] == bounds[0]  # one-sided: the smallest code stands for 0


@pytest.mark.parametrize("on", [0, 1])
def test_the_flag_of_the_search(on: int, device: torch.device):
    given, flag = state(device), torch.tensor([on], dtype=torch.int32, device=device)
    for rule in RULES:
        found = ops.search_histogram_qparams(*given, QUANT_BINS, -8, 7, rule=rule, enabled=flag)
        check(found, in_two_calls(given, rule, enabled=flag), rule)
    unsearched = ops.choose_qparams(*given[1:], -8, 7)
    found = ops.search_histogram_qparams(*given, QUANT_BINS, -8, 7, enabled=flag)
    assert torch.equal(found[0].nan_to_num(1), unsearched[0].nan_to_num(1)) is (on == 0)


def test_histograms_of_other_dtypes_and_layouts(device: torch.device):
    histogram, low, high = state(device)
    expected = in_two_calls((histogram, low, high), "affine")
    for other in (histogram.double(), histogram.half(), histogram.T.contiguous().T):
        check(ops.search_histogram_qparams(other, low, high, QUANT_BINS, -8, 7), expected, str(other.stride()))
    spread = [torch.stack([t, t], 1)[:, 0] for t in (low, high)]
    check(ops.search_histogram_qparams(histogram, *spread, QUANT_BINS, -8, 7), expected, "strided ends")


def test_no_channels(device: torch.device):
    given = torch.zeros(0, BINS, device=device), torch.zeros(0, device=device), torch.zeros(0, device=device)
    scale, zero_point = ops.search_histogram_qparams(*given, QUANT_BINS, -8, 7, rule="symmetric")
    assert scale.shape == zero_point.shape == (0,) and zero_point.dtype == torch.int64


# ------------------------------------------------------------------------------------------------------- in place


def renewed(
    device: torch.device, channels: int, scale: torch.dtype = torch.float32, zero_point: torch.dtype = torch.int32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point before."""
    return torch.full((channels,), 3.0, dtype=scale, device=device), torch.full((channels,), 5, device=device).to(
        zero_point
    )


@pytest.mark.parametrize(
    ("rule", "zero_point"),
    [
        *((rule, torch.int32) for rule in RULES),
        *(("affine", dtype) for dtype in (torch.int64, torch.float32, torch.float16)),
        ("fused_affine", torch.int64),
        ("symmetric", torch.int64),
        ("float_qparams", torch.float32),
    ],
    ids=str,
)
def test_renewing_in_place(rule: str, zero_point: torch.dtype, device: torch.device):
    given = state(device)
    mine = renewed(device, len(RANGES), zero_point=zero_point)
    addresses, versions = [t.data_ptr() for t in mine], [t._version for t in mine]
    copies = ops.update_qparams_from_histogram_(*given, *mine, QUANT_BINS, -8, 7, rule=rule)
    scale, chosen = in_two_calls(given, rule)
    expected = scale, chosen.to(zero_point)
    check(mine, expected, "in place")
    check(copies, expected, "copy")
    assert [t.data_ptr() for t in mine] == addresses
    assert all(t._version > version for t, version in zip(mine, versions, strict=True))
    assert not {t.data_ptr() for t in copies} & set(addresses)


@pytest.mark.parametrize(
    ("scale", "state_dtype", "quant_max"),
    [(torch.float16, torch.float32, 7), (torch.float64, torch.float64, 7), (torch.float32, torch.float32, 2**24)],
    ids=str,
)
@pytest.mark.parametrize("on", [0, 1])
def test_what_one_launch_does_not_do(
    on: int, scale: torch.dtype, state_dtype: torch.dtype, quant_max: int, device: torch.device
):
    """Other dtypes and wide bounds take more operations, with the same meaning."""
    given = tuple(t[:5] for t in state(device, state_dtype))
    mine, flag = renewed(device, 5, scale), torch.tensor([on], device=device)
    copies = ops.update_qparams_from_histogram_(*given, *mine, QUANT_BINS, -8, quant_max, enabled=flag)
    new = in_two_calls(given, "affine", quant_max=quant_max)
    expected = (new[0].to(scale), new[1]) if on else renewed(device, 5, scale)
    check(mine, expected, "in place")
    check(copies, expected, "copy")


@pytest.mark.parametrize("strided", [0, 1])
def test_every_second_element_is_renewed(strided: int, device: torch.device):
    """Views, of scale or of zero point."""
    given = tuple(t[:5] for t in state(device))
    mine, bases = list(renewed(device, 5)), renewed(device, 10)
    mine[strided] = bases[strided][::2]
    copies = ops.update_qparams_from_histogram_(*given, *mine, QUANT_BINS, -8, 7)
    check((mine[0], mine[1]), in_two_calls(given, "affine"), "in place")
    check(copies, in_two_calls(given, "affine"), "copy")
    assert_bits_equal(bases[strided][1::2], renewed(device, 5)[strided].cpu())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("on", [0, 1])
def test_the_flag_of_renewal(on: int, dtype: torch.dtype, device: torch.device):
    given, mine = one(0, state(device)), renewed(device, 1)
    flag = torch.tensor([on], device=device).to(dtype)
    copies = ops.update_qparams_from_histogram_(*given, *mine, QUANT_BINS, -8, 7, enabled=flag)
    expected = in_two_calls(given, "affine") if on else renewed(device, 1)
    check(mine, expected, "in place")
    check(copies, expected, "copy")


def test_only_scale_and_zero_point_are_written(device: torch.device):
    given, mine = state(device), renewed(device, len(RANGES))
    eps, flag = torch.tensor([1e-3], device=device), torch.tensor([1], device=device)
    read = (*given, eps, flag)
    kept, versions = [t.clone() for t in read], [t._version for t in read]
    ops.update_qparams_from_histogram_(*given, *mine, QUANT_BINS, -8, 7, eps=eps, enabled=flag)
    for tensor, before, version in zip(read, kept, versions, strict=True):
        assert_bits_equal(tensor, before.cpu())
        assert tensor._version == version


# ------------------------------------------------------------------------------------------------------- what runs


@pytest.mark.interpreter_only
def test_launches_and_host_reads():
    given, flag = state(torch.device("cpu")), torch.tensor([1])
    mine = renewed(torch.device("cpu"), len(RANGES))
    with trace() as recorded, count_host_reads() as reads:
        ops.search_histogram_qparams(*given, QUANT_BINS, -8, 7)
        ops.update_qparams_from_histogram_(*given, *mine, QUANT_BINS, -8, 7, enabled=flag)
        ops.search_histogram_qparams(*given, QUANT_BINS, -(2**31), 2**31 - 1)  # the rule in ATen operations
    assert recorded.launches == ["_search_kernel"] * 3
    assert reads == {} and recorded.faults == {}


@pytest.mark.skipif(INTERPRETER, reason="about registration alone")
def test_opcheck(device: torch.device):
    given = tuple(t[:6] for t in state(device))  # without NaN, which opcheck finds unequal to itself
    flag, eps = torch.tensor([1], device=device), torch.tensor([1e-3], device=device)
    library: Any = torch.ops.qkernels
    for how in ((), ("symmetric", 3, eps, flag)):
        torch.library.opcheck(library.search_histogram_qparams.default, (*given, QUANT_BINS, -8, 7, *how))
        mine = renewed(device, 6)
        update = library.update_qparams_from_histogram_.default
        torch.library.opcheck(update, (*given, *mine, QUANT_BINS, -8, 7, *how))
    single = one(0, given)
    torch.library.opcheck(library.search_histogram_qparams.default, (*single, QUANT_BINS, -8, 7, "float_qparams"))
    written = [a.name for a in update._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert written == ["scale", "zero_point"]


@pytest.mark.skipif(INTERPRETER, reason="compiles")
def test_one_graph(device: torch.device):
    """Renewed in place inside the graph, under a flag that is toggled outside it."""

    def step(given: State, mine: tuple[torch.Tensor, torch.Tensor], flag: torch.Tensor) -> torch.Tensor:
        copies = ops.update_qparams_from_histogram_(*given, *mine, QUANT_BINS, -8, 7, enabled=flag)
        return mine[0] + copies[0] + ops.search_histogram_qparams(*given, QUANT_BINS, -8, 7)[0]

    compiled: Any = torch.compile(step, fullgraph=True)
    given = tuple(t[:5] for t in state(device))
    eager, mine = renewed(device, 5), renewed(device, 5)
    for on in (0, 1, 0):
        flag = torch.tensor([on], device=device)
        assert_bits_equal(compiled(given, mine, flag), step(given, eager, flag).cpu(), context=f"flag {on}")
        check(mine, eager, f"flag {on}")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# ------------------------------------------------------------------------------------------------------- messages


def arguments(device: torch.device) -> dict[str, Any]:
    given, mine = one(0, state(device)), renewed(device, 1)
    names = ("histogram", "min_val", "max_val", "scale", "zero_point")
    bounds = {"quant_bins": QUANT_BINS, "quant_min": -8, "quant_max": 7}
    return {**dict(zip(names, (*given, *mine), strict=True)), **bounds}


ERRORS = [
    ({"histogram": torch.zeros(2, 2, 2)}, ValueError, r"histogram must have shape \(bins,\) or \(C, bins\)"),
    ({"histogram": torch.zeros(BINS, dtype=torch.int64)}, TypeError, "histogram must be float16"),
    ({"min_val": torch.zeros(2)}, ValueError, "min_val must have 1 element"),
    ({"min_val": torch.zeros(1)}, ValueError, r"one shape, \(\) or \(C,\); got \(1,\) and \(\)"),
    ({"max_val": torch.zeros((), dtype=torch.float64)}, TypeError, "one dtype; got torch.float32 and torch.float64"),
    ({"quant_bins": 1}, ValueError, "quant_bins must be at least 2; got 1"),
    ({"quant_min": 7}, ValueError, "quant_min must be less than quant_max; got 7 and 7"),
    ({"rule": "minmax"}, ValueError, "rule must be one of affine, symmetric, .*; got 'minmax'"),
    ({"eps": torch.zeros(2)}, ValueError, "eps must have 1 floating-point element"),
    ({"enabled": torch.zeros(1)}, TypeError, "enabled must be uint8"),
]


@pytest.mark.parametrize(("change", "error", "text"), ERRORS)
@pytest.mark.parametrize("op", ["search_histogram_qparams", "update_qparams_from_histogram_"])
def test_errors(op: str, change: dict[str, Any], error: type[Exception], text: str, device: torch.device):
    given = arguments(device)
    kept = given["scale"].clone(), given["zero_point"].clone()
    changed = {**given, **{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in change.items()}}
    if not op.endswith("_"):
        del changed["scale"], changed["zero_point"]
    with pytest.raises(error, match=f"^{op}: .*{text}"):
        getattr(ops, op)(**changed)
    check((given["scale"], given["zero_point"]), kept, "after an error")


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"scale": torch.ones(2)}, ValueError, "scale must have 1 element"),
        ({"scale": torch.ones(1, dtype=torch.int32)}, TypeError, "scale must have a floating-point dtype"),
        ({"zero_point": torch.ones(1, dtype=torch.int8)}, TypeError, "zero_point must be int32, int64 or"),
    ],
)
def test_errors_of_what_is_renewed(change: dict[str, Any], error: type[Exception], text: str, device: torch.device):
    given = arguments(device)
    changed = {**given, **{name: value.to(device) for name, value in change.items()}}
    kept = changed["scale"].clone(), changed["zero_point"].clone()
    with pytest.raises(error, match=f"^update_qparams_from_histogram_: {text}"):
        ops.update_qparams_from_histogram_(**changed)
    check((changed["scale"], changed["zero_point"]), kept, "after an error")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_more_bins_than_the_kernel_holds(dtype: torch.dtype, device: torch.device):
    given = torch.ones(8193, device=device), *(torch.tensor(v, device=device, dtype=dtype) for v in (-1.0, 1.0))
    mine = renewed(device, 1, dtype)
    calls = {
        "search_histogram_qparams": lambda: ops.search_histogram_qparams(*given, 256, -8, 7),
        "update_qparams_from_histogram_": lambda: ops.update_qparams_from_histogram_(*given, *mine, 256, -8, 7),
    }
    for op, call in calls.items():
        if device.type == "cpu" and not INTERPRETER:
            check(call(), in_two_calls(given, "affine"), op)
        else:
            with pytest.raises(NotImplementedError, match=f"^{op}: at most 8192 bins"):
                call()
            check(mine, renewed(device, 1, dtype), "after an error")
