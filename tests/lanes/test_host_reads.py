"""No forward or backward reads a value on the host: counted on real tensors, and run on tensors that have no values.

Counting needs the interpreter, where the operators run their Triton implementations on CPU tensors. A read that ATen
hides in its own C++ is invisible to the counter, but raises on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import qkernels.ops as ops
from qkernels.modules import fake_quant_core
from qkernels.ops import compositions, minmax, update_qparams
from tests.lanes.module_cases import MODULES
from tests.lanes.sync_counter import count_host_reads, meta_copy

AXES = (None, 1)
Call = Callable[..., object]


def _state(axis: int | None) -> dict[str, torch.Tensor]:
    shape = () if axis is None else (4,)
    return {
        "x": torch.linspace(-2.0, 2.0, 3 * 4 * 5).reshape(3, 4, 5),
        "scale": torch.full(shape or (1,), 0.1),
        "zero_point": torch.zeros(shape or (1,), dtype=torch.int32),
        "min_val": torch.full(shape, -1.0),
        "max_val": torch.full(shape, 1.0),
        "enabled": torch.ones(1, dtype=torch.uint8),
    }


def _fake_quantize(function: Call, s: dict[str, torch.Tensor], axis: int | None) -> object:
    return function(s["x"], s["scale"], s["zero_point"], -128, 127, axis, s["enabled"])


def _fake_quantize_with_gradient(s: dict[str, torch.Tensor], axis: int | None) -> None:
    x = s["x"].clone().requires_grad_()
    y = ops.fake_quantize(x, s["scale"], s["zero_point"], -128, 127, axis, s["enabled"])
    y.backward(torch.ones_like(y))


def _backward(function: Call, s: dict[str, torch.Tensor], axis: int | None) -> object:
    return function(s["x"], s["x"], s["scale"], s["zero_point"], -128, 127, axis, s["enabled"])


def _observe(function: Call, s: dict[str, torch.Tensor], axis: int | None, constant: float | None) -> object:
    return function(s["x"], s["min_val"], s["max_val"], constant, axis, s["enabled"])


def _update(function: Call, s: dict[str, torch.Tensor], axis: int | None, rule: str) -> object:
    one = [s[name].reshape(s["scale"].shape) for name in ("min_val", "max_val")]
    arguments = (s["x"], *one, s["scale"], s["zero_point"], -128, 127)
    return function(*arguments, rule=rule, averaging_constant=0.01, axis=axis, enabled=s["enabled"])


def _choose(s: dict[str, torch.Tensor], axis: int | None, qscheme: torch.qscheme) -> object:
    return ops.choose_qparams(s["min_val"], s["max_val"], -128, 127, dtype=torch.qint8, qscheme=qscheme)


PUBLIC: dict[str, Call] = {
    "fake_quantize": partial(_fake_quantize, ops.fake_quantize),
    "fake_quantize with gradient": _fake_quantize_with_gradient,
    "fake_quantize_backward": partial(_backward, ops.fake_quantize_backward),
    "aminmax": lambda s, axis: ops.aminmax(s["x"], axis),
    "observe_minmax_ extremes": partial(_observe, ops.observe_minmax_, constant=None),
    "observe_minmax_ average": partial(_observe, ops.observe_minmax_, constant=0.01),
    **{
        f"update_qparams_ {rule}": partial(_update, ops.update_qparams_, rule=rule)
        for rule in ("affine", "symmetric", "float_qparams", "fused_affine", "fused_symmetric")
    },
    **{
        f"choose_qparams {scheme}": partial(_choose, qscheme=scheme)
        for scheme in (torch.per_tensor_affine, torch.per_tensor_symmetric)
    },
}

# What torch.compile gets in their place. ATen's implementations are for CPU tensors, where a read waits for nothing.
COMPOSED: dict[str, Call] = {
    "fake_quantize": partial(_fake_quantize, compositions.fake_quantize_composition),
    "fake_quantize_backward": partial(_backward, compositions.fake_quantize_backward_composition),
    "observe_minmax_": partial(_observe, minmax._observe_composition, constant=0.01),
    **{
        f"update_qparams_ {rule}": lambda s, axis, rule=rule: _update(
            lambda *a, **k: update_qparams._composition(*a, **k), s, axis, rule
        )
        for rule in ("affine", "symmetric", "float_qparams", "fused_affine", "fused_symmetric")
    },
}


@pytest.mark.interpreter_only
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("name", PUBLIC)
def test_operators_read_nothing(name: str, axis: int | None):
    state = _state(axis)
    with count_host_reads() as reads:
        PUBLIC[name](state, axis)
    assert reads == {}


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("name", PUBLIC)
def test_operators_run_without_values(name: str, axis: int | None):
    PUBLIC[name](meta_copy(_state(axis)), axis)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("name", COMPOSED)
def test_compositions_run_without_values(name: str, axis: int | None):
    COMPOSED[name](meta_copy(_state(axis)), axis)


def _train_twice(module: torch.nn.Module, x: torch.Tensor) -> None:
    """Two batches (the first one shapes per-channel state), forward and backward, then one in eval mode."""
    for _ in range(2):
        batch = x.detach().clone().requires_grad_()
        y = module(batch)
        y.backward(torch.ones_like(y))
    module.eval()
    module(x)


@pytest.mark.interpreter_only
@pytest.mark.parametrize("name", MODULES)
def test_modules_read_nothing(name: str, monkeypatch: pytest.MonkeyPatch):
    """With the shortcut for flags on the CPU taken out, which no other device takes."""
    monkeypatch.setattr(fake_quant_core, "known_off", lambda flag: False)
    from qkernels.modules import learnable_core

    monkeypatch.setattr(learnable_core, "known_off", lambda flag: False)
    module, x = MODULES[name](), _state(None)["x"]
    with count_host_reads() as reads:
        _train_twice(module, x)
    assert reads == {}


@pytest.mark.parametrize("name", MODULES)
def test_modules_run_without_values(name: str):
    _train_twice(MODULES[name]().to("meta"), meta_copy(_state(None)["x"]))


@pytest.mark.parametrize("name", MODULES)
def test_modules_run_on_cuda_tensors_without_values(name: str):
    """Fake CUDA tensors: what branches on the device type takes CUDA's branch.

    The forward only: in a build without CUDA the autograd engine refuses such tensors.
    """
    module, x = MODULES[name](), _state(None)["x"]
    with FakeTensorMode(), torch.no_grad():
        tensors = {
            id(t): torch.empty(t.shape, dtype=t.dtype, device="cuda")
            for t in [x, *module.buffers(), *module.parameters()]
        }
        for part in module.modules():
            for key, buffer in part._buffers.items():
                part._buffers[key] = tensors[id(buffer)]
            for key, parameter in part._parameters.items():
                part._parameters[key] = torch.nn.Parameter(tensors[id(parameter)])
        module(tensors[id(x)])
        module(tensors[id(x)])
