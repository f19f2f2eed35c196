"""Eager calls that go past the dispatcher: what a caller, autograd and torch's modes see is what the operator shows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import qkernels.modules as ours
import qkernels.ops as qops
from qkernels.ops.small_cpu import SMALL
from tests.oracles import INTERPRETER, assert_bits_equal

SCALE, ZERO = torch.tensor([0.1]), torch.tensor([3], dtype=torch.int32)
LARGE = torch.linspace(-1, 1, SMALL + 4)
SMALL_X = torch.linspace(-1, 1, 64)
cpu_path = pytest.mark.skipif(INTERPRETER, reason="about the CPU path")


def state() -> list[torch.Tensor]:
    return [torch.tensor([math.inf]), torch.tensor([-math.inf]), torch.ones(1), torch.zeros(1, dtype=torch.int32)]


@cpu_path
@pytest.mark.parametrize("rule", ["fused_affine", "affine"])
def test_the_default_device_is_not_ours(rule: str) -> None:
    """A mode redirects factory calls; none of ours may follow, least of all into a cache."""
    qops.update_qparams_.__globals__["_always_on"].cache_clear()
    given, other = state(), state()
    arguments = {"rule": rule, "averaging_constant": 0.1}
    x, scale, zero_point = LARGE, torch.tensor([0.01]), torch.tensor([3.0])
    with torch.device("meta"):
        qops.update_qparams_(x, *given, -8, 7, **arguments)
        chosen = qops.choose_qparams(torch.tensor([-1.0], device="cpu"), torch.tensor([2.0], device="cpu"), -8, 7)
        gradients = qops.learnable_fake_quantize_backward(x, x, scale, zero_point, -8, 7)
        observer = ours.HistogramObserver().to_empty(device="cpu")
        observer.reset_parameters()
        observer(x), observer(x * 2)
    qops.update_qparams_(x, *other, -8, 7, **arguments)
    for one, two in zip(given, other, strict=True):
        assert_bits_equal(one, two)
    assert given[0].item() == -1.0
    assert {t.device.type for t in (*chosen, *gradients)} == {"cpu"} and observer.max_val.item() == 2.0


@pytest.mark.parametrize("x", [SMALL_X, LARGE, LARGE.bfloat16()], ids=["small", "large", "bfloat16"])
@pytest.mark.parametrize("axis", [None, 0])
def test_a_scale_that_requires_a_gradient_gets_none(axis: int | None, x: torch.Tensor) -> None:
    x = x.reshape(4, -1) if axis == 0 else x
    channels = 1 if axis is None else 4
    scale, zero_point = torch.full((channels,), 0.1), torch.zeros(channels, dtype=torch.int32)
    want = torch.ops.qkernels.fake_quantize.default(x, scale, zero_point, -8, 7, axis)
    y = qops.fake_quantize(x, scale.requires_grad_(), zero_point, -8, 7, axis)
    assert_bits_equal(y, want)
    assert not y.requires_grad
    assert not qops.fake_quantize_backward(x, x, scale, zero_point, -8, 7, axis).requires_grad
    leaf = x.clone().requires_grad_()
    qops.fake_quantize(leaf, scale, zero_point, -8, 7, axis).sum().backward()
    assert scale.grad is None and leaf.grad is not None


@pytest.mark.parametrize("learned", [False, True])
def test_batched_gradients(learned: bool) -> None:
    x = LARGE.clone().requires_grad_()
    if learned:
        y = qops.learnable_fake_quantize(x, SCALE.clone().requires_grad_(), -ZERO.float(), -8, 7)
    else:
        y = qops.fake_quantize(x, SCALE, ZERO, -8, 7)
    rows = torch.randn(3, x.numel(), generator=torch.Generator().manual_seed(0))
    (batched,) = torch.autograd.grad(y, x, rows, is_grads_batched=True, retain_graph=True)
    for row, dx in zip(rows, batched, strict=True):
        assert_bits_equal(dx, torch.autograd.grad(y, x, row, retain_graph=True)[0])


def test_a_mode_sees_the_operator_in_the_backward() -> None:
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function.name())
            return function(*args, **(kwargs or {}))

    seen: list[str] = []
    y = qops.fake_quantize(LARGE.clone().requires_grad_(), SCALE, ZERO, -8, 7)
    with Names():
        y.sum().backward()
    assert "qkernels::fake_quantize_backward" in seen


@cpu_path
def test_a_checkpoint_saves_the_same_tensors_twice() -> None:
    """The recomputation observes again, so zero points change sign, and another way may serve."""
    for seed in range(30):
        module = ours.LearnableFakeQuantize(
            ours.MovingAverageMinMaxObserver, -8, 7, dtype=torch.qint8, averaging_constant=0.5
        )
        generator = torch.Generator().manual_seed(seed)
        for _ in range(4):
            x = torch.randn(64, generator=generator).add_(torch.randn(1, generator=generator) * 2).requires_grad_()
            checkpoint(module, x, use_reentrant=False).sum().backward()


def test_tracing_before_dispatch() -> None:
    graph = make_fx(lambda x: qops.fake_quantize(x, SCALE, ZERO, -8, 7), pre_dispatch=True)(SMALL_X)
    assert any("fake_quantize" in str(node.target) for node in graph.graph.nodes)


@cpu_path
def test_fused_modules_refuse_nothing_that_passes_without_torchs_operator() -> None:
    """One dimension per channel; statistics that are every other element of a larger tensor."""
    options: dict[str, Any] = {"quant_min": -128, "quant_max": 127, "dtype": torch.qint8}
    per_channel = ours.FusedMovingAvgObsFakeQuantize(
        ours.MovingAveragePerChannelMinMaxObserver, qscheme=torch.per_channel_symmetric, **options
    )
    for _ in range(3):
        assert per_channel(torch.randn(5)).shape == (5,)
    module = ours.FusedMovingAvgObsFakeQuantize(**options)
    around = torch.full((6,), 9.0)
    for name in ("min_val", "max_val"):
        setattr(module.activation_post_process, name, around[::2][:1] if name == "min_val" else around[1::2][:1])
    module(SMALL_X)
    assert around[2:].tolist() == [9.0] * 4


@cpu_path
@pytest.mark.parametrize("channels", [1, 2])
def test_eps_of_zero_and_strict_numpy(channels: int) -> None:
    axis = None if channels == 1 else 0
    given, want = ([torch.full((channels,), v) for v in (math.inf, -math.inf, 1.0)] for _ in range(2))
    for tensors in (given, want):
        tensors.append(torch.zeros(channels, dtype=torch.int32))
    before = np.seterr(all="raise")
    try:
        for batch in ([-0.5, 0.0], [0.0, 1e-38], [0.0, 1e-45]):
            x = torch.tensor([batch] * channels)
            qops.update_qparams_(x, *given, -128, 127, averaging_constant=0.9, axis=axis)
        zeros = torch.zeros(channels, 2)
        eps = torch.zeros(1)
        qops.update_qparams_(zeros, *want, -128, 127, axis=axis, eps=eps)
    finally:
        np.seterr(**before)
    assert all(t.isfinite().all() for t in given)
    assert -128 <= want[3].min() and want[3].max() <= 127


@cpu_path
def test_a_zero_point_that_float32_does_not_hold() -> None:
    low, high = torch.tensor([-1.0]), torch.tensor([1.0])
    got = qops.choose_qparams(low, high, -8, 7, qscheme=torch.per_tensor_symmetric, symmetric_zero_point=2**24 + 1)
    assert got[1].item() == 2**24 + 1


@pytest.mark.parametrize("x", [SMALL_X, LARGE], ids=["small", "large"])
@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("quant_min", {"quant_min": -8.5}),
        ("quant_max", {"quant_max": None}),
        ("axis", {"axis": "0"}),
        ("enabled", {"enabled": True}),
    ],
)
@pytest.mark.parametrize("name", ["fake_quantize", "learnable_fake_quantize"])
def test_arguments_of_other_types_are_named(name: str, argument: str, changes: dict[str, Any], x: torch.Tensor) -> None:
    zero_point = ZERO if name == "fake_quantize" else ZERO.float()
    given: dict[str, Any] = {"scale": SCALE, "zero_point": zero_point, "quant_min": -8, "quant_max": 7, **changes}
    with pytest.raises((TypeError, RuntimeError), match=argument):
        getattr(qops, name)(x, **given)


def test_the_other_operators_name_them_too() -> None:
    with pytest.raises((TypeError, RuntimeError), match="axis"):
        qops.aminmax(SMALL_X, 0.5)
    with pytest.raises((TypeError, RuntimeError), match="eps"):
        qops.update_qparams_(SMALL_X, *state(), -8, 7, eps=1e-3)
    with pytest.raises((TypeError, RuntimeError), match="grad_factor"):
        qops.learnable_fake_quantize(SMALL_X, SCALE, ZERO.float(), -8, 7, None)
    with pytest.raises((TypeError, RuntimeError), match="averaging_constant"):
        qops.observe_minmax_(SMALL_X, torch.tensor([1.0]), torch.tensor([1.0]), "0.1")
