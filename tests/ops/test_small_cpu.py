"""Small CPU tensors, eager: torch's fake-quantize operators serve where they are right, and only there."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch

import qkernels.modules as ours
import qkernels.ops as qops
from qkernels.ops import statistics_numpy
from qkernels.ops.small_cpu import SMALL, fake_quantize_by_torch, fused_fake_quantize_by_torch
from tests.oracles import INTERPRETER, assert_bits_equal

pytestmark = pytest.mark.skipif(INTERPRETER, reason="with the interpreter the kernels serve, whatever the size")

X = torch.linspace(-3, 3, 60).reshape(3, 4, 5)
SCALE, ZERO = torch.tensor([0.1]), torch.tensor([3], dtype=torch.int32)
SCALES, ZEROS = torch.tensor([0.1, 0.2, 0.05]), torch.tensor([3, -8, 7], dtype=torch.int32)


def flag(value: int) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.uint8)


def with_value(value: float) -> torch.Tensor:
    x = X.clone()
    x[1, 1, 1] = value
    return x


SERVED = {
    "per tensor": (X, SCALE, ZERO, -8, 7, None, None),
    "zero point out of the range": (X, SCALE, ZERO - 40, -8, 7, None, None),
    "flag": (X, SCALE, ZERO, -8, 7, None, flag(1)),
    "per channel": (X, SCALES, ZEROS, -8, 7, 0, None),
    "axis 1": (X, torch.full((4,), 0.1), torch.zeros(4, dtype=torch.int32), -8, 7, 1, None),
    "largest": (torch.linspace(-3, 3, SMALL), SCALE, ZERO, -8, 7, None, None),
}
NOT_SERVED = {
    "a NaN": (with_value(math.nan), SCALE, ZERO, -8, 7, None, None),
    "an infinity": (with_value(math.inf), SCALE, ZERO, -8, 7, None, None),
    "a code beyond int64": (with_value(-3e38), SCALE, ZERO, -8, 7, None, None),
    "a code beyond int64 of one channel": (
        with_value(1e30),
        SCALES * torch.tensor([1, 1, 1e-13]),
        ZEROS,
        -8,
        7,
        0,
        None,
    ),
    "off": (X, SCALE, ZERO, -8, 7, None, flag(0)),
    "int64": (X, SCALE, ZERO.long(), -8, 7, None, None),
    "float zero point": (X, SCALES, ZEROS.float(), -8, 7, 0, None),
    "a channel's zero point out of the range": (X, SCALES, ZEROS - 1, -8, 7, 0, None),
    "bfloat16": (X.bfloat16(), SCALE, ZERO, -8, 7, None, None),
    "bfloat16 scale": (X, SCALE.bfloat16(), ZERO, -8, 7, None, None),
    "subnormal scale": (X, SCALE * 1e-38, ZERO, -8, 7, None, None),
    "NaN scale": (X, SCALE * math.nan, ZERO, -8, 7, None, None),
    "wide range": (X, SCALE, ZERO, -(2**31), 2**31 - 1, None, None),
    "transposed": (X.transpose(0, 2), SCALE, ZERO, -8, 7, None, None),
    "negative axis": (X, SCALES, ZEROS, -8, 7, -3, None),
    "empty": (X[:0], SCALE, ZERO, -8, 7, None, None),
    "larger": (torch.linspace(-3, 3, SMALL + 1), SCALE, ZERO, -8, 7, None, None),
}


@pytest.mark.parametrize("name", SERVED)
def test_torch_serves_and_gives_what_the_operator_gives(name: str) -> None:
    arguments = SERVED[name]
    x = arguments[0].clone().requires_grad_()
    y = fake_quantize_by_torch(x, *arguments[1:])
    assert y is not None
    assert_bits_equal(y.detach(), torch.ops.qkernels.fake_quantize.default(*arguments))
    dy = torch.cos(arguments[0])
    y.backward(dy)
    assert_bits_equal(x.grad, torch.ops.qkernels.fake_quantize_backward.default(dy, *arguments))


@pytest.mark.parametrize("name", NOT_SERVED)
def test_torch_does_not_serve(name: str) -> None:
    assert fake_quantize_by_torch(*NOT_SERVED[name]) is None


@pytest.mark.parametrize("name", [*SERVED, *NOT_SERVED])
def test_the_function_equals_the_operator(name: str) -> None:
    """The function may go past the dispatcher, by two ways; the operator never does."""
    arguments = {**SERVED, **NOT_SERVED}[name]
    assert_bits_equal(qops.fake_quantize(*arguments), torch.ops.qkernels.fake_quantize.default(*arguments))


def fused(x: torch.Tensor = X, **changes: Any) -> torch.Tensor | None:
    """A call that torch serves, but for what `changes` says."""
    channels = 1 if changes.get("axis") is None else x.shape[changes["axis"]]
    given: dict[str, Any] = {
        "min_val": torch.full((channels,), -1.0),
        "max_val": torch.full((channels,), 1.0),
        "scale": torch.ones(channels),
        "zero_point": torch.zeros(channels, dtype=torch.int32),
        "observer_enabled": flag(1),
        "fake_quant_enabled": flag(1),
        "quant_min": -8,
        "axis": None,
        **changes,
    }
    state = tuple(given[name] for name in ("min_val", "max_val", "scale", "zero_point"))
    flags = given["observer_enabled"], given["fake_quant_enabled"]
    return fused_fake_quantize_by_torch(x, state, *flags, 0.1, given["quant_min"], 7, given["axis"], True)


FIRST_BATCH = {"min_val": torch.tensor([math.inf]), "max_val": torch.tensor([-math.inf])}


@pytest.mark.parametrize(
    "changes",
    [{}, {"axis": 0}, {"observer_enabled": flag(0)}, FIRST_BATCH],
    ids=["per tensor", "per channel", "observer off", "first batch"],
)
def test_torch_serves_the_fused_step(changes: dict[str, Any]) -> None:
    assert fused(**changes) is not None


FUSED_NOT_SERVED: dict[str, dict[str, Any]] = {
    "a NaN": {"x": with_value(math.nan)},
    "a large value": {"x": with_value(1e15)},
    "not quantizing": {"fake_quant_enabled": flag(0)},
    "NaN statistics": {"min_val": torch.tensor([math.nan])},
    "never observed, not observing": {"min_val": torch.tensor([math.inf]), "observer_enabled": flag(0)},
    "axis 1": {"axis": 1},
    "int64": {"zero_point": torch.zeros(1, dtype=torch.int64)},
    "other channels": {"scale": torch.ones(2)},
    "0 dimensions": {"x": torch.tensor(1.0)},
    "wide": {"quant_min": -(2**31)},
}


@pytest.mark.parametrize("name", FUSED_NOT_SERVED)
def test_torch_does_not_serve_the_fused_step(name: str) -> None:
    assert fused(**FUSED_NOT_SERVED[name]) is None


@pytest.mark.parametrize("per_channel", [False, True])
def test_fused_modules_of_either_size_agree(per_channel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches that torch's operator serves, and the same with it switched off: same state, outputs and gradients."""
    options: dict[str, Any] = {"quant_min": -128, "quant_max": 127, "dtype": torch.qint8}
    if per_channel:
        options |= {"observer": ours.MovingAveragePerChannelMinMaxObserver, "qscheme": torch.per_channel_symmetric}
    one, other = ours.FusedMovingAvgObsFakeQuantize(**options), ours.FusedMovingAvgObsFakeQuantize(**options)
    for seed in range(6):
        x = torch.randn(4, 50, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed - 2)
        results = []
        for module in (one, other):
            leaf = x.clone().requires_grad_()
            with monkeypatch.context() as patch:
                if module is other:
                    patch.setattr("qkernels.ops.small_cpu.SMALL", 0)
                    patch.setattr("qkernels.ops.small_cpu.FUSED", 0)
                y = module(leaf)
            y.backward(torch.cos(x))
            results.append((y.detach(), leaf.grad))
        for mine, theirs in zip(*results, strict=True):
            assert_bits_equal(mine, theirs)
        for name, value in one.state_dict().items():
            assert_bits_equal(value, other.state_dict()[name], context=name)


@pytest.mark.parametrize("values", [(-1e38, 1e38), (-3e38, 3e38), (1e-45, 2e-45), (0.0, 0.0), (-1e30, 5.0)], ids=str)
@pytest.mark.parametrize("rule", ["affine", "symmetric"])
@pytest.mark.parametrize("channels", [1, 3])
def test_numpy_gives_the_bits_of_aten_without_a_warning(
    channels: int, rule: str, values: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Overflow would be a RuntimeWarning in NumPy; where one is near, ATen serves."""
    axis = None if channels == 1 else 0
    states = []
    for by_numpy in (True, False):
        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("error")
            if not by_numpy:
                patch.setattr(statistics_numpy, "update", lambda *_: False)
            state = [torch.full((channels,), v) for v in (math.inf, -math.inf, 1.0)]
            state.append(torch.zeros(channels, dtype=torch.int32))
            for batch in (values, (-1.0, 2.0), values):
                x = torch.tensor([batch] * channels)
                qops.update_qparams_(x, *state, -128, 127, rule=rule, averaging_constant=0.3, axis=axis)
            states.append(state)
    for mine, theirs in zip(*states, strict=True):
        assert_bits_equal(mine, theirs)


def test_ordinary_statistics_go_through_numpy() -> None:
    """Else the test above would compare ATen with itself."""
    state = (torch.tensor([-1.0]), torch.tensor([1.0]), torch.ones(1), torch.zeros(1, dtype=torch.int32))
    batch = (torch.tensor(-2.0), torch.tensor(3.0))
    assert statistics_numpy.update(batch, state, -8, 7, "affine", 0, None, 0.5)
    assert [t.item() for t in state[:2]] == [-1.5, 2.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("learned", [False, True])
def test_large_cpu_tensors_are_cut_into_blocks(
    learned: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five blocks and a ragged one give what one pass over the whole gives."""
    x, dy = (torch.randn(5003, generator=torch.Generator().manual_seed(seed)).mul(5).to(dtype) for seed in (0, 1))
    x[::97] = math.nan
    zero_point = torch.tensor([3.0]) if learned else ZERO
    name = "learnable_fake_quantize" if learned else "fake_quantize"
    forward, backward = (getattr(torch.ops.qkernels, end).default for end in (name, f"{name}_backward"))
    arguments = (x, SCALE, zero_point, -8, 7)
    whole = forward(*arguments), backward(dy, *arguments)
    monkeypatch.setattr("qkernels.ops.fake_quant_cpu.BLOCK", 1000)
    cut = forward(*arguments), backward(dy, *arguments)
    assert_bits_equal(cut[0], whole[0])
    for one, other in zip(
        torch.utils._pytree.tree_leaves(cut[1]), torch.utils._pytree.tree_leaves(whole[1]), strict=True
    ):
        assert_bits_equal(one, other)
