"""The operators under torch.compile: one graph, the same bits as eager, dynamic sizes, flags without recompiles, cache.

Bit-equality under Inductor holds for float32, and in every dtype for the operator alone: fused with low-precision
neighbours, Inductor drops the rounding between operators (documented torch behaviour), which is not tested here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

import qkernels.ops as qops
from tests.oracles import assert_bits_equal, torchao_qparams
from tests.strategies import KERNEL_DTYPES, QPARAMS, adversarial, cycle, dtype_id

BACKENDS = ("aot_eager", "inductor")


@pytest.fixture(autouse=True)
def _count_from_zero() -> None:
    torch._dynamo.reset()
    counters.clear()


ROOT = Path(__file__).resolve().parents[2]


def qparams_for(n: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    scale = (0.02 + 0.011 * torch.arange(n)).to(device)
    return scale, (torch.arange(n) * 3 % 11 - 5).to(torch.int32).to(device)


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return cycle(adversarial(QPARAMS[0], dtype), math.prod(shape), seed).reshape(shape)


def compiled(function: Callable[..., object], backend: str, **kwargs: object) -> Callable[..., object]:
    return torch.compile(function, fullgraph=True, backend=backend, **kwargs)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def check_forward_and_backward(
    function: Callable[[torch.Tensor], torch.Tensor], run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> None:
    """`run` (compiled) equals `function` (eager) bit for bit, forward and gradient."""
    eager, fast = x.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    want, got = function(eager), run(fast)
    assert_bits_equal(got, want, context="y")
    dy = torch.randn(want.shape).to(want.dtype).to(x.device)
    want.backward(dy)
    got.backward(dy)
    assert_bits_equal(fast.grad, eager.grad, context="dx")


# Inductor's C++ compiler takes seconds per graph: a few rich cases there, many under aot_eager (the same composition).
@pytest.mark.parametrize(("dtype", "axis"), [(torch.bfloat16, None), (torch.float16, 1)], ids=str)
def test_inductor_operator_alone_in_low_precision(dtype: torch.dtype, axis: int | None, device: torch.device) -> None:
    qparams = qparams_for(1 if axis is None else 37, device)

    def function(x: torch.Tensor) -> torch.Tensor:
        return qops.fake_quantize(x, *qparams, -128, 127, axis)

    x = values(24, 37, dtype=dtype).to(device)
    assert_bits_equal(compiled(function, "inductor")(x), function(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_between_neighbours_forward_and_backward(backend: str, device: torch.device) -> None:
    """relu -> fake_quantize -> mul -> per-channel fake_quantize on adversarial float32, NaN and infinities included."""
    t, c = qparams_for(1, device), qparams_for(37, device)
    off = torch.zeros(1, dtype=torch.uint8, device=device)

    def function(x: torch.Tensor) -> torch.Tensor:
        y = qops.fake_quantize(torch.relu(x), *t, -128, 127) * 3
        z = qops.fake_quantize(x.mT, *c, -128, 127, 0).mT
        # stacked, not added: one NaN must not hide another
        return torch.stack((y, z, qops.fake_quantize(x, *t, -8, 7, None, off) * 0.5))

    run = compiled(function, backend)
    check_forward_and_backward(function, run, values(24, 37).to(device))
    assert graphs() == 1


@pytest.mark.parametrize("dtype", (*KERNEL_DTYPES, torch.float64), ids=dtype_id)
@pytest.mark.parametrize("axis", [None, 0, -1], ids=str)
def test_aot_eager_every_dtype(axis: int | None, dtype: torch.dtype, device: torch.device) -> None:
    x = values(6, 37, dtype=dtype).to(device)
    for q in QPARAMS if dtype == torch.float32 and axis is None else QPARAMS[:3]:
        n = 1 if axis is None else x.shape[axis]
        scale = torch.full((n,), q.scale, device=device)
        zero_point = torch.full((n,), q.zero_point, dtype=torch.int32, device=device)

        def function(v, s=scale, z=zero_point, q=q):
            return qops.fake_quantize(v, s, z, q.quant_min, q.quant_max, axis)

        torch._dynamo.reset()  # or the recompile limit ends the loop
        check_forward_and_backward(function, compiled(function, "aot_eager"), x)


@pytest.mark.parametrize("fractional", [False, True])
@pytest.mark.parametrize("axis", [None, 1], ids=str)
def test_what_is_left_for_inductor(axis: int | None, fractional: bool, device: torch.device) -> None:
    """Forward and backward decompose into ATen, so that they fuse; only the per-channel fma keeps the operator."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    seen: list[list[str]] = []

    def record(graph: torch.fx.GraphModule, inputs: object) -> object:
        seen.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return make_boxed_func(graph.forward)

    scale, zero_point = qparams_for(1 if axis is None else 37, device)
    zero_point = zero_point + 0.25 if fractional else zero_point

    def function(x: torch.Tensor) -> torch.Tensor:
        return qops.fake_quantize(torch.relu(x), scale, zero_point, -128, 127, axis) * 3

    run = torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=record, bw_compiler=record))
    check_forward_and_backward(function, run, values(24, 37).to(device))
    forward, backward = ([t for t in targets if "qkernels" in t] for targets in seen)
    if fractional and axis is not None:
        assert forward == ["qkernels.fake_quantize.default"]
        assert backward == ["qkernels.fake_quantize_backward.default"]
    elif device.type == "cuda" and axis is not None:  # the reciprocals of C scales stay a kernel of their own
        assert set(forward + backward) == {"qkernels.reciprocal.default"}
    else:
        assert forward == backward == []
    assert not any("item" in t or "_local_scalar_dense" in t for targets in seen for t in targets), "a host read"


@pytest.mark.parametrize("backend", BACKENDS)
def test_float_zero_points(backend: str, device: torch.device) -> None:
    """Per tensor truncated, per channel fractional with a true fma: kept as an operator, since C++ code has none."""
    x = values(5, 41).to(device)
    scale = torch.full((5,), 0.0371, device=device)
    scale[4] = 2 / 3
    x[4, 0] = 6990507 * 2.0**-22  # x / scale = 2.5 + 2^-23: see test_fake_quant
    zero_point = torch.tensor([3.7, -3.7, 0.5, -0.25, 2.0**-60], device=device)

    def function(v: torch.Tensor) -> torch.Tensor:
        y = qops.fake_quantize(v, scale, zero_point, -128, 127, 0)
        return torch.stack((y, qops.fake_quantize(v, scale[:1], zero_point[:1], -128, 127)))

    check_forward_and_backward(function, compiled(function, backend), x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dynamic_shapes(backend: str, device: torch.device) -> None:
    """Several sizes, forward and backward, with at most two graphs (the first may be static)."""
    t, c = qparams_for(1, device), qparams_for(6, device)

    def function(x: torch.Tensor) -> torch.Tensor:
        y = qops.fake_quantize(torch.relu(x), *t, -128, 127) * 2
        return torch.stack((y, qops.fake_quantize(x, *c, -128, 127, -1)))

    run = compiled(function, backend, dynamic=True)
    for rows in (3, 7, 64, 1025):
        check_forward_and_backward(function, run, values(rows, 6, seed=rows).to(device))
    assert graphs() == 1
    torch._dynamo.reset()
    counters.clear()
    run = compiled(function, "aot_eager")
    for rows in (3, 7, 64, 1025):
        check_forward_and_backward(function, run, values(rows, 6, seed=rows).to(device))
    assert graphs() == 2


def test_dynamic_channel_count(device: torch.device) -> None:
    def function(x: torch.Tensor, s: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return qops.fake_quantize(x, s, z, -128, 127, 1)

    run = compiled(function, "aot_eager", dynamic=True)
    for channels in (3, 17, 64):
        s, z = qparams_for(channels, device)
        x = values(4, channels).to(device)
        assert_bits_equal(run(x, s, z), function(x, s, z))
    assert graphs() == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_flag_toggled_in_place_does_not_recompile(backend: str, device: torch.device) -> None:
    flag = torch.ones(1, dtype=torch.uint8, device=device)
    t = qparams_for(1, device)

    def function(x: torch.Tensor) -> torch.Tensor:
        return qops.fake_quantize(x * 2, *t, -128, 127, None, flag) * 3

    run = compiled(function, backend)
    x = values(200).to(device)
    for on in (1, 0, 1, 0):
        flag.fill_(on)
        check_forward_and_backward(function, run, x)
    assert graphs() == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_and_qparams_compile(backend: str, device: torch.device) -> None:
    """Observation, qparams and fake quantization in one graph, state equal to eager after every batch."""

    def fresh(n: int) -> list[torch.Tensor]:
        return [
            torch.full((n,), math.inf, device=device),
            torch.full((n,), -math.inf, device=device),
            torch.ones(n, device=device),
            torch.zeros(n, dtype=torch.int32, device=device),
        ]

    observing = torch.ones(1, dtype=torch.uint8, device=device)

    def step(x: torch.Tensor, t: list[torch.Tensor], c: list[torch.Tensor], o: list[torch.Tensor]) -> torch.Tensor:
        s, z = qops.update_qparams_(x, *t, 0, 255, averaging_constant=0.01, enabled=observing)
        y = qops.fake_quantize(x * 1.0, s, z, 0, 255)
        s, z = qops.update_qparams_(x, *c, -128, 127, rule="fused_symmetric", averaging_constant=0.25, axis=0)
        y = y + qops.fake_quantize(x, s, z, -128, 127, 0)
        qops.observe_minmax_(x, o[0], o[1], axis=1)
        low, high = qops.aminmax(x, -1)
        s, z = qops.choose_qparams(low, high, -8, 7, dtype=torch.qint8, qscheme=torch.per_channel_symmetric)
        return y * s.sum() + z.sum()

    run = compiled(step, backend)
    mine, theirs = ([fresh(1), fresh(5), fresh(33)] for _ in range(2))
    for batch in range(4):
        observing.fill_(int(batch != 2))
        x = (torch.randn(5, 33) * (batch + 1) + 0.2).to(device)
        got, want = run(x, *mine), step(x, *theirs)
        assert torch.allclose(got, want, rtol=1e-5), "the sum over s may be ordered differently; the state may not"
        for group, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            for name, p, q in zip(("min", "max", "scale", "zero_point"), a, b, strict=True):
                assert_bits_equal(p, q, context=f"batch {batch} group {group} {name}")
    assert graphs() == 1


def test_compiled_statistics_equal_torchao(device: torch.device) -> None:
    """Not only compiled == eager: the compiled numbers against the live observer."""
    scale, zero_point = torch.ones(1, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    state = torch.full((1,), math.inf, device=device), torch.full((1,), -math.inf, device=device)

    def step(x: torch.Tensor) -> torch.Tensor:
        return qops.fake_quantize(x, *qops.update_qparams_(x, *state, scale, zero_point, -128, 127), -128, 127)

    run = compiled(step, "inductor")
    low, high = math.inf, -math.inf
    for batch in range(3):
        x = torch.randn(777) * (batch + 0.7) + 0.1
        run(x.to(device))
        low, high = min(low, x.min().item()), max(high, x.max().item())
        want = torchao_qparams(torch.tensor([low]), torch.tensor([high]), None, None, torch.qint8)
        assert_bits_equal(scale, want[0])
        assert_bits_equal(zero_point, want[1])


@pytest.mark.parametrize("special", [math.nan, math.inf], ids=str)
def test_special_values_reach_compiled_statistics(special: float, device: torch.device) -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (*qops.aminmax(x), *qops.aminmax(x, 1))

    x = torch.randn(6, 40)
    x[2, 17] = special
    x = x.to(device)
    for got, want in zip(compiled(function, "inductor")(x), function(x), strict=True):
        assert_bits_equal(got, want)


def test_backward_after_toggling_the_flag_is_not_silently_wrong(device: torch.device) -> None:
    """Under compile too, a flag changed between forward and backward raises or uses the forward's value."""
    flag = torch.ones(1, dtype=torch.uint8, device=device)
    t = qparams_for(1, device)
    run = compiled(lambda x: qops.fake_quantize(x, *t, -8, 7, None, flag), "aot_eager")
    x = torch.tensor([0.01, 1e4], device=device, requires_grad=True)
    y = run(x)
    flag.zero_()
    try:
        y.sum().backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert x.grad.tolist() == [1.0, 0.0]


def test_compiled_function_in_a_checkpoint(device: torch.device) -> None:
    from torch.utils.checkpoint import checkpoint

    t = qparams_for(1, device)

    def block(x: torch.Tensor) -> torch.Tensor:
        return qops.fake_quantize(x * 2, *t, -128, 127).square()

    def model(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(block, x, use_reentrant=False)

    check_forward_and_backward(model, compiled(model, "aot_eager"), torch.randn(40).to(device))
