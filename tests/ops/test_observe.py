"""observe_minmax_: the state rules of torch.ao's observers, in place, in every layout, axis and dtype."""

from __future__ import annotations

import math

import pytest
import torch

import qkernels.ops as qops
from tests.oracles import INTERPRETER, assert_bits_equal, reference_observe
from tests.strategies import EMPTY_LAYOUTS, KERNEL_DTYPES, LAYOUTS, QPARAMS, Layout, adversarial, cycle, dtype_id

pytestmark = pytest.mark.interpreter

DTYPES = (*KERNEL_DTYPES, torch.float64)
FLAG_DTYPES = (torch.uint8, torch.int64, torch.int32, torch.bool)
VIRGIN = (math.inf, -math.inf)
COLUMNS = 40 if INTERPRETER else 700


def fresh_state(
    channels: int | None, device: torch.device, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = shape if shape is not None else (() if channels is None else (channels,))
    return torch.full(shape, VIRGIN[0], dtype=dtype, device=device), torch.full(
        shape, VIRGIN[1], dtype=dtype, device=device
    )


def observe_and_check(
    x: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor], context: str = "", **kwargs: object
) -> None:
    """One step of the operator on `state`, against the reference; storage and versions included."""
    reference_kwargs = {k: kwargs.get(k) for k in ("averaging_constant", "axis", "enabled")}
    want = reference_observe(x, *state, **reference_kwargs)
    pointers = [t.data_ptr() for t in state]
    before = x.clone()
    assert qops.observe_minmax_(x, *state, **kwargs) is None
    for name, got, expected in zip(("min_val", "max_val"), state, want, strict=True):
        assert_bits_equal(got, expected, context=f"{context} {name} {reference_kwargs}")
    assert [t.data_ptr() for t in state] == pointers
    assert_bits_equal(x, before, signed_zero=True, context=f"{context}: x was modified")


@pytest.mark.parametrize("averaging_constant", [None, 0.3], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_observe_every_layout(layout: Layout, averaging_constant: float | None, device: torch.device) -> None:
    for axis in layout.some_axes():
        state = fresh_state(None if axis is None else layout.shape[axis], device)
        for seed in range(2):
            x = layout.fill(torch.randn(61, generator=torch.Generator().manual_seed(seed)) * (seed + 1), device, seed)
            observe_and_check(x, state, str(layout), averaging_constant=averaging_constant, axis=axis)


@pytest.mark.parametrize("averaging_constant", [None, 0.01] if INTERPRETER else [None, 0.01, 0.25, 1.0], ids=str)
@pytest.mark.parametrize("axis", [None, 0, 1, -1], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_observe_sequence_equals_torchao(
    dtype: torch.dtype, axis: int | None, averaging_constant: float | None, device: torch.device
) -> None:
    """Against the live observers of torch.ao, batch by batch (x of any dtype, float32 state)."""
    from torch.ao.quantization import observer as ao

    if axis is None:
        cls, kwargs = (ao.MinMaxObserver, {})
        if averaging_constant is not None:
            cls, kwargs = (ao.MovingAverageMinMaxObserver, {"averaging_constant": averaging_constant})
    else:
        cls, kwargs = (ao.PerChannelMinMaxObserver, {"ch_axis": axis})
        if averaging_constant is not None:
            cls = ao.MovingAveragePerChannelMinMaxObserver
            kwargs["averaging_constant"] = averaging_constant
    stock = cls(**kwargs)
    state = fresh_state(None if axis is None else (6, 4, 3)[axis], device)
    g = torch.Generator().manual_seed(3)
    for step in range(5):
        x = (torch.randn(6, 4, 3, generator=g) * 3 ** (step - 2) + step * 0.3).to(dtype)
        stock(x)
        qops.observe_minmax_(x.to(device), *state, averaging_constant=averaging_constant, axis=axis)
        assert_bits_equal(state[0].reshape(stock.min_val.shape), stock.min_val, context=f"min step {step}")
        assert_bits_equal(state[1].reshape(stock.max_val.shape), stock.max_val, context=f"max step {step}")


@pytest.mark.parametrize("averaging_constant", [None, 0.01], ids=str)
def test_observe_adversarial_values(averaging_constant: float | None, device: torch.device) -> None:
    for axis in (None, 0):
        state = fresh_state(None if axis is None else 4, device)
        for seed in range(4):
            x = cycle(adversarial(QPARAMS[seed], finite=True), 4 * 100, seed).reshape(4, 100).to(device)
            observe_and_check(x, state, f"seed {seed}", averaging_constant=averaging_constant, axis=axis)


@pytest.mark.parametrize("averaging_constant", [None, 0.5], ids=str)
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf], ids=str)
def test_observe_special_values(special: float, averaging_constant: float | None, device: torch.device) -> None:
    for axis in (None, 1):
        state = fresh_state(None if axis is None else 3, device)
        for step in range(3):
            x = torch.arange(12.0).reshape(4, 3) - step
            if step == 1:
                x[2, 1] = special
            observe_and_check(x.to(device), state, f"step {step}", averaging_constant=averaging_constant, axis=axis)


# Only (+inf, -inf) is the state before the first batch. The others come from batches with infinities.
HALF_INFINITE = (
    (math.inf, 3.0),
    (-2.0, -math.inf),
    (math.inf, math.inf),
    (-math.inf, -math.inf),
    (-math.inf, math.inf),
)


@pytest.mark.parametrize("averaging_constant", [None, 0.5], ids=str)
def test_observe_one_infinity_is_not_virgin(averaging_constant: float | None, device: torch.device) -> None:
    """torch.ao averages into it (and so gets NaN or an infinity); only the virgin state is replaced."""
    low, high = (torch.tensor(v, device=device) for v in zip(*HALF_INFINITE, VIRGIN, strict=True))
    x = torch.randn(len(low), 7).to(device)
    for i in range(len(low)):
        observe_and_check(x[i], (low[i].clone(), high[i].clone()), f"{i}", averaging_constant=averaging_constant)
    observe_and_check(x, (low, high), "per channel", averaging_constant=averaging_constant, axis=0)


@pytest.mark.parametrize("averaging_constant", [None, 0.5], ids=str)
@pytest.mark.parametrize("flag_dtype", FLAG_DTYPES, ids=dtype_id)
def test_observe_flag_gates_the_update(
    flag_dtype: torch.dtype, averaging_constant: float | None, device: torch.device
) -> None:
    for axis in (None, 0, 1):
        state = fresh_state(None if axis is None else (5, 7)[axis], device)
        flag = torch.ones(1, dtype=flag_dtype, device=device)
        for step, on in enumerate((0, 1, 0, 1)):
            flag.fill_(on)  # in place, as users toggle it
            x = torch.randn(5, 7).to(device) * (step + 1)
            observe_and_check(x, state, f"step {step}", averaging_constant=averaging_constant, axis=axis, enabled=flag)
        zero_dim_flag = flag.reshape(()).zero_()
        observe_and_check(
            x * 9, state, "0-dim flag", averaging_constant=averaging_constant, axis=axis, enabled=zero_dim_flag
        )


@pytest.mark.parametrize("layout", EMPTY_LAYOUTS, ids=str)
def test_observe_empty_input_leaves_state(layout: Layout, device: torch.device) -> None:
    x = layout.fill(torch.zeros(0), device)
    assert x.numel() == 0
    for axis in layout.some_axes():
        for averaging_constant in (None, 0.1):
            state = fresh_state(None if axis is None else layout.shape[axis], device)
            observe_and_check(x, state, str(layout), averaging_constant=averaging_constant, axis=axis)
            if axis is None:
                state = (torch.tensor(-1.0, device=device), torch.tensor(2.0, device=device))
                observe_and_check(x, state, str(layout), averaging_constant=averaging_constant)
                assert (state[0].item(), state[1].item()) == (-1.0, 2.0)


def test_observe_accepts_zero_dim_and_one_element_state(device: torch.device) -> None:
    for shape in ((), (1,)):
        state = fresh_state(None, device, shape=shape)
        observe_and_check(torch.randn(3, 5, device=device), state, f"state shape {shape}")
        assert state[0].shape == shape


@pytest.mark.parametrize("state_dtype", [torch.float16, torch.bfloat16], ids=dtype_id)
def test_observe_state_of_a_halved_module(state_dtype: torch.dtype, device: torch.device) -> None:
    """`.half()` casts the statistics too; torch.ao casts x to their dtype and goes on in it."""
    for averaging_constant in (None, 1.0):
        for axis in (None, 0):
            state = fresh_state(None if axis is None else 4, device, state_dtype)
            for step in range(3):
                # Multiples of 1/8 are exact in both dtypes: the interpreter truncates inexact bfloat16 stores.
                x = torch.randint(-64, 64, (4, 9), generator=torch.Generator().manual_seed(step)).to(state_dtype) / 8
                observe_and_check(x.to(device), state, f"step {step}", averaging_constant=averaging_constant, axis=axis)


def test_observe_workspace_is_left_at_zero(device: torch.device) -> None:
    """The counter that finds the last block is reset by the kernel itself, so one buffer serves every call."""
    workspace = torch.zeros(1, dtype=torch.int32, device=device)
    for axis in (None, 0, 1):
        state = fresh_state(None if axis is None else (13, COLUMNS)[axis], device)
        for step in range(3):
            x = torch.randn(13, COLUMNS).to(device) * (step + 1)
            observe_and_check(x, state, f"step {step}", axis=axis, workspace=workspace)
            assert workspace.tolist() == [0]


def test_observe_state_may_be_a_view(device: torch.device) -> None:
    """Statistics that are slices of a bigger buffer: only their own elements change."""
    buffer = torch.full((3, 4), 5.0, device=device)
    buffer[0], buffer[2] = VIRGIN
    x = torch.randn(6, 4, device=device)
    observe_and_check(x, (buffer[0], buffer[2]), "rows of a buffer", axis=1)
    assert buffer[1].tolist() == [5.0] * 4


def test_observe_bumps_versions(device: torch.device) -> None:
    state = fresh_state(None, device)
    x = torch.randn(9).to(device)
    versions = [t._version for t in (*state, x)]
    qops.observe_minmax_(x, *state)
    assert state[0]._version > versions[0] and state[1]._version > versions[1]
    assert x._version == versions[2]
