"""Memory trace in the interpreter: bytes as the formula says, nothing out of bounds, no race, no order dependence."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from qkernels.modules import fake_quant_core
from tests.lanes import interpreter_speed
from tests.lanes.audits import audit_memory
from tests.lanes.cases import KernelCase
from tests.lanes.interpreter_trace import trace
from tests.lanes.kernel_cases import CASES
from tests.lanes.module_cases import MODULES

pytestmark = pytest.mark.interpreter_only


@pytest.mark.parametrize("case", CASES, ids=str)
def test_memory(case: KernelCase):
    assert audit_memory(case, case.dtypes[0]) == []


@pytest.mark.parametrize("name", MODULES)
def test_module_steps_are_one_or_two_launches(name: str, monkeypatch: pytest.MonkeyPatch):
    """An observer is one launch and one read of x, a fake quantizer two of each; its backward is one more launch."""
    monkeypatch.setattr(fake_quant_core, "known_off", lambda flag: False)  # a shortcut that only the CPU takes
    from qkernels.modules import learnable_core

    monkeypatch.setattr(learnable_core, "known_off", lambda flag: False)
    module = MODULES[name]()
    x = torch.linspace(-2.0, 2.0, 3 * 4 * 5).reshape(3, 4, 5).requires_grad_()
    expected = 2 if "FakeQuantize" in name else 1
    for _ in range(2):  # the first batch gives per-channel state its shape
        with trace() as forward:
            y = module(x)
        assert len(forward.launches) == expected
        loads, stores, _ = forward.counts(x)
        assert (loads == expected).all() and (stores == 0).all()
        assert forward.faults == {}
    with trace() as backward:
        y.backward(torch.ones_like(y))
    assert len(backward.launches) == expected - 1


def _first(a, b):
    return a


def _largest(a, i, b, j):
    """The larger of a and b with its position, the first of equals: associative, not commutative."""
    later = b.handle.data > a.handle.data
    pairs = ((a, b), (i, j))
    return tuple(
        tl.tensor(interpreter.TensorHandle(np.where(later, y.handle.data, x.handle.data), x.handle.dtype), x.type)
        for x, y in pairs
    )


# Without an axis the interpreter's own reduction takes one input only and drops dimensions it should keep.
@pytest.mark.parametrize(
    ("combine", "axis", "keep_dims"),
    [
        *((combine, axis, keep) for combine in (_largest, _first) for axis in (0, 1) for keep in (False, True)),
        (_first, None, False),
    ],
)
def test_tree_reduction_equals_the_interpreters_own(combine, axis: int | None, keep_dims: bool):
    """`interpreter_speed` replaces a reduction of Triton's; these combine functions tell left from right."""
    assert interpreter.ReduceOps.generic_reduce is interpreter_speed.tree_reduce
    values = np.random.default_rng(0).integers(0, 5, (8, 16)).astype(np.float32)
    positions = np.arange(8 * 16, dtype=np.int32).reshape(8, 16)
    arrays = ((values, tl.float32), (positions, tl.int32)) if combine is _largest else ((values, tl.float32),)
    inputs = tuple(
        tl.tensor(interpreter.TensorHandle(data, dtype), tl.block_type(dtype, [8, 16])) for data, dtype in arrays
    )
    reduction = interpreter.ReduceOps(axis, SimpleNamespace(fn=combine), keep_dims)
    tree = interpreter_speed.tree_reduce(reduction, inputs)
    own = interpreter_speed.ORIGINAL(reduction, inputs)
    for ours, theirs in zip(tree, own, strict=True):
        np.testing.assert_array_equal(ours.handle.data, theirs.handle.data)
        assert ours.handle.data.shape == theirs.handle.data.shape
