"""update_qparams_: observer and calculate_qparams in one step, bit-equal to torch.ao and to torch's fused op."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import qkernels.ops as qops
from tests.oracles import INTERPRETER, assert_bits_equal, reference_observe, torch_fused_step, torchao_qparams
from tests.strategies import EMPTY_LAYOUTS, LAYOUTS, Layout, dtype_id

pytestmark = pytest.mark.interpreter

EPS = float(torch.finfo(torch.float32).eps)
COLUMNS = 33 if INTERPRETER else 130

AO_RULES = {
    "affine": (torch.per_tensor_affine, torch.per_channel_affine),
    "symmetric": (torch.per_tensor_symmetric, torch.per_channel_symmetric),
    "float_qparams": (None, torch.per_channel_affine_float_qparams),
}


class State:
    """The buffers of a fake quantizer on one device."""

    def __init__(self, channels: int | None, device: torch.device, zero_point_dtype: torch.dtype = torch.int32) -> None:
        n = 1 if channels is None else channels
        self.min_val = torch.full((n,), math.inf, device=device)
        self.max_val = torch.full((n,), -math.inf, device=device)
        self.scale = torch.ones(n, device=device)
        self.zero_point = torch.zeros(n, dtype=zero_point_dtype, device=device)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.min_val, self.max_val, self.scale, self.zero_point

    def copies(self) -> list[torch.Tensor]:
        return [t.detach().cpu().clone() for t in self.tensors()]


def check_state(state: State, want: list[torch.Tensor], context: str) -> None:
    for name, got, expected in zip(("min_val", "max_val", "scale", "zero_point"), state.tensors(), want, strict=True):
        assert_bits_equal(got, expected, context=f"{context} {name}")


def check_copies(returned: tuple[torch.Tensor, torch.Tensor], state: State) -> None:
    scale, zero_point = returned
    assert_bits_equal(scale, state.scale, context="returned scale")
    assert_bits_equal(zero_point, state.zero_point, context="returned zero_point")
    assert scale.data_ptr() != state.scale.data_ptr() and zero_point.data_ptr() != state.zero_point.data_ptr()


def ao_step(
    x: torch.Tensor,
    state: list[torch.Tensor],
    rule: str,
    limits: tuple[int, int],
    eps: float,
    averaging_constant: float | None,
    axis: int | None,
) -> list[torch.Tensor]:
    """What torch.ao's FakeQuantize would hold after this batch."""
    low, high = reference_observe(x, state[0], state[1], averaging_constant, axis)
    qscheme = AO_RULES[rule][axis is not None]
    scale, zero_point = torchao_qparams(low, high, *limits, torch.qint8, qscheme, eps)
    return [low, high, scale, zero_point.to(state[3].dtype)]


@pytest.mark.parametrize("averaging_constant", [None, 0.01, 0.4], ids=str)
@pytest.mark.parametrize(
    ("rule", "axis"),
    [(rule, axis) for rule, schemes in AO_RULES.items() for axis in (None, 0, -1) if schemes[axis is not None]],
    ids=str,
)
def test_update_qparams_equals_observer_and_calculate_qparams(
    rule: str, axis: int | None, averaging_constant: float | None, device: torch.device
) -> None:
    for limits, eps in (((-128, 127), None), ((-8, 7), 2.0**-12)):
        state = State(
            None if axis is None else (5, 6)[axis], device, torch.float32 if rule == "float_qparams" else torch.int32
        )
        eps_tensor = None if eps is None else torch.tensor([eps], device=device)
        g = torch.Generator().manual_seed(5)
        for step in range(3):
            x = torch.randn(5, 6, generator=g) * 4.0 ** (step - 3) + 0.1 * step
            want = ao_step(x, state.copies(), rule, limits, eps or EPS, averaging_constant, axis)
            returned = qops.update_qparams_(
                x.to(device), *state.tensors(), *limits, rule=rule, eps=eps_tensor,
                averaging_constant=averaging_constant, axis=axis,
            )  # fmt: skip
            check_state(state, want, f"{rule} {limits} step {step}")
            check_copies(returned, state)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_update_qparams_every_layout(layout: Layout, device: torch.device) -> None:
    for axis in layout.some_axes():
        state = State(None if axis is None else layout.shape[axis], device)
        x = layout.fill(torch.randn(61) * 3, device)
        before = x.clone()
        want = ao_step(x, state.copies(), "affine", (-128, 127), EPS, None, axis)
        check_copies(qops.update_qparams_(x, *state.tensors(), -128, 127, axis=axis), state)
        check_state(state, want, f"{layout} axis {axis}")
        assert_bits_equal(x, before, signed_zero=True, context="x was modified")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=dtype_id)
def test_update_qparams_input_dtypes(dtype: torch.dtype, device: torch.device) -> None:
    for axis in (None, 0, 1):
        state = State(None if axis is None else (7, 3)[axis], device)
        x = (torch.randn(7, 3) * 5).to(dtype)
        want = ao_step(x, state.copies(), "symmetric", (-128, 127), EPS, None, axis)
        qops.update_qparams_(x.to(device), *state.tensors(), -128, 127, rule="symmetric", axis=axis)
        check_state(state, want, f"{dtype} axis {axis}")


@pytest.mark.parametrize("value", [0, 7, 128])
def test_update_qparams_symmetric_zero_point(value: int, device: torch.device) -> None:
    for axis in (None, 0):
        state = State(None if axis is None else 3, device)
        x = torch.randn(3, 4, device=device)
        _, zero_point = qops.update_qparams_(
            x, *state.tensors(), 0, 255, rule="symmetric", symmetric_zero_point=value, axis=axis
        )
        assert zero_point.tolist() == [value] * zero_point.numel()


# Fewer in the interpreter, where a case of 36 steps takes seconds.
FUSED_LIMITS = ((0, 255), (-127, 127), (0, 15)) + (() if INTERPRETER else ((-128, 127), (0, 127), (-8, 7)))
FUSED_BATCHES = ("normal", "positive", "negative", "zeros", "huge", "small", "tiny", "subnormal", "shifted")


def fused_batch(kind: str, step: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(step * 17 + FUSED_BATCHES.index(kind))
    x = torch.randn(4, 23, generator=g) * (step + 1)
    return {
        "normal": x,
        "positive": x.abs() + 0.5,
        "negative": -x.abs(),
        "zeros": torch.zeros_like(x),
        "huge": x * 1e36,
        "small": x * 1e-3,  # scales around torch's threshold of 6.1e-5, below which it widens the range
        "tiny": x * 1e-30,
        "subnormal": x * 1e-40,
        "shifted": x * 0.1 + 3,
    }[kind]


@pytest.mark.parametrize("symmetric", [False, True], ids=["fused_affine", "fused_symmetric"])
@pytest.mark.parametrize("limits", FUSED_LIMITS, ids=str)
def test_update_qparams_fused_rules_equal_torchs_fused_op(
    limits: tuple[int, int], symmetric: bool, device: torch.device
) -> None:
    rule = "fused_symmetric" if symmetric else "fused_affine"
    for axis, kind in itertools.product((None, 0), FUSED_BATCHES):
        mine = State(None if axis is None else 4, device)
        theirs = State(None if axis is None else 4, torch.device("cpu"))
        for step in range(2 if INTERPRETER else 3):
            x = fused_batch(kind, step)
            y = torch_fused_step(x, *theirs.tensors(), 0.01, *limits, per_channel=axis is not None, symmetric=symmetric)
            returned = qops.update_qparams_(
                x.to(device), *mine.tensors(), *limits, rule=rule, averaging_constant=0.01, axis=axis
            )
            check_state(mine, theirs.copies(), f"{rule} {limits} axis {axis} {kind} step {step}")
            check_copies(returned, mine)
            mine_y = qops.fake_quantize(x.to(device), *returned, *limits, axis=axis)
            assert_bits_equal(mine_y, y, context=f"{rule} {limits} axis {axis} {kind} step {step} y")


@pytest.mark.parametrize("rule", ["fused_affine", "fused_symmetric"])
def test_update_qparams_fused_from_mixed_sequences(rule: str, device: torch.device) -> None:
    """Batches of different kinds one after the other: the running statistics mix signs and magnitudes."""
    for axis in (None, 0):
        mine = State(None if axis is None else 4, device)
        theirs = State(None if axis is None else 4, torch.device("cpu"))
        for step, kind in enumerate(FUSED_BATCHES[::-1]):
            x = fused_batch(kind, step)
            torch_fused_step(
                x, *theirs.tensors(), 0.25, -128, 127, per_channel=axis is not None, symmetric=rule == "fused_symmetric"
            )
            qops.update_qparams_(
                x.to(device), *mine.tensors(), -128, 127, rule=rule, averaging_constant=0.25, axis=axis
            )
            check_state(mine, theirs.copies(), f"{rule} axis {axis} {kind}")


@pytest.mark.parametrize("symmetric", [False, True], ids=["fused_affine", "fused_symmetric"])
def test_update_qparams_fused_replaces_any_infinity(symmetric: bool, device: torch.device) -> None:
    """torch's fused operator takes the batch's value wherever the running one is infinite, unlike the observers."""
    rule = "fused_symmetric" if symmetric else "fused_affine"
    starts = ((math.inf, 3.0), (-2.0, -math.inf), (-math.inf, math.inf), (math.inf, math.inf))
    for axis in (None, 0):
        for low, high in starts:
            mine = State(None if axis is None else 4, device)
            theirs = State(None if axis is None else 4, torch.device("cpu"))
            for state in (mine, theirs):
                state.min_val.fill_(low)
                state.max_val.fill_(high)
            x = fused_batch("normal", 1)
            torch_fused_step(x, *theirs.tensors(), 0.25, -128, 127, per_channel=axis is not None, symmetric=symmetric)
            qops.update_qparams_(
                x.to(device), *mine.tensors(), -128, 127, rule=rule, averaging_constant=0.25, axis=axis
            )
            check_state(mine, theirs.copies(), f"{rule} axis {axis} from {low}, {high}")


@pytest.mark.parametrize("symmetric", [False, True], ids=["fused_affine", "fused_symmetric"])
def test_update_qparams_fused_observer_off(symmetric: bool, device: torch.device) -> None:
    """observer off, fake quantization on: torch writes qparams from the statistics it has (0.1 from virgin ones)."""
    rule = "fused_symmetric" if symmetric else "fused_affine"
    off, on = (torch.tensor([v], device=device) for v in (0, 1))
    for axis in (None, 0):
        for virgin in (True, False):
            mine = State(None if axis is None else 4, device)
            theirs = State(None if axis is None else 4, torch.device("cpu"))
            if not virgin:
                for s in (mine, theirs):
                    s.min_val.fill_(-1.5)
                    s.max_val.fill_(0.75)
            x = fused_batch("normal", 1)
            torch_fused_step(
                x, *theirs.tensors(), 0.01, 0, 255, per_channel=axis is not None, symmetric=symmetric, observe=False
            )
            qops.update_qparams_(
                x.to(device), *mine.tensors(), 0, 255, rule=rule, averaging_constant=0.01, axis=axis,
                enabled=off, qparams_enabled=on,
            )  # fmt: skip
            check_state(mine, theirs.copies(), f"{rule} axis {axis} virgin {virgin}")


@pytest.mark.parametrize("rule", ["affine", "symmetric", "fused_affine"])
@pytest.mark.parametrize("flag_dtype", [torch.uint8, torch.int64, torch.int32, torch.bool], ids=dtype_id)
def test_update_qparams_flags(flag_dtype: torch.dtype, rule: str, device: torch.device) -> None:
    """enabled gates observation; qparams are written where qparams_enabled, or enabled when that is None, is set."""
    for axis in (None, 0):
        for enabled, qparams_enabled in itertools.product((None, 0, 1), repeat=2):
            state = State(None if axis is None else 4, device)
            state.min_val.fill_(-0.5)
            state.max_val.fill_(0.25)
            state.scale.fill_(77)
            state.zero_point.fill_(5)
            before = state.copies()
            flags = [
                None if v is None else torch.tensor([v], device=device).to(flag_dtype)
                for v in (enabled, qparams_enabled)
            ]
            x = torch.randn(4, 9, device=device) * 3
            returned = qops.update_qparams_(
                x, *state.tensors(), -128, 127, rule=rule, averaging_constant=0.01, axis=axis,
                enabled=flags[0], qparams_enabled=flags[1],
            )  # fmt: skip
            observed = enabled != 0
            written = observed if qparams_enabled is None else qparams_enabled == 1
            context = f"enabled {enabled} qparams_enabled {qparams_enabled} axis {axis}"
            low, high = reference_observe(x, before[0], before[1], 0.01, axis) if observed else before[:2]
            assert_bits_equal(state.min_val, low, context=context)
            assert_bits_equal(state.max_val, high, context=context)
            if not written:
                assert_bits_equal(state.scale, before[2], context=context)
                assert_bits_equal(state.zero_point, before[3], context=context)
            elif rule != "fused_affine":
                qscheme = AO_RULES[rule][axis is not None]
                want = torchao_qparams(low, high, -128, 127, torch.qint8, qscheme)
                assert_bits_equal(state.scale, want[0], context=context)
                assert_bits_equal(state.zero_point, want[1].to(torch.int32), context=context)
            else:
                assert (state.scale != 77).all(), context
            check_copies(returned, state)


@pytest.mark.parametrize("rule", ["affine", "fused_affine"])
@pytest.mark.parametrize("layout", EMPTY_LAYOUTS, ids=str)
def test_update_qparams_empty_input_leaves_the_state(layout: Layout, rule: str, device: torch.device) -> None:
    """Statistics and qparams stay as they are, as in torch's fused operator; the copies are still returned."""
    x = layout.fill(torch.zeros(1), device)
    for virgin in (True, False):
        state = State(None, device)
        if not virgin:
            state.min_val.fill_(-1.0)
            state.max_val.fill_(3.0)
        state.scale.fill_(7)
        before = state.copies()
        check_copies(qops.update_qparams_(x, *state.tensors(), 0, 255, rule=rule, averaging_constant=0.01), state)
        check_state(state, before, f"{layout}")
        if rule == "fused_affine" and x.dim() == 2:
            theirs = State(None, torch.device("cpu"))
            for mine, other in zip(before, theirs.tensors(), strict=True):
                other.copy_(mine)
            torch_fused_step(torch.empty(0, 5), *theirs.tensors(), 0.01, 0, 255)
            check_state(state, theirs.copies(), "torch's fused operator")


def test_update_qparams_keeps_storage_and_workspace(device: torch.device) -> None:
    workspace = torch.zeros(1, dtype=torch.int32, device=device)
    for axis, rule in itertools.product((None, 0, 1), ("affine", "symmetric", "fused_affine", "fused_symmetric")):
        state = State(None if axis is None else (9, COLUMNS)[axis], device)
        pointers = [t.data_ptr() for t in state.tensors()]
        versions = [t._version for t in state.tensors()]
        for _ in range(2):
            x = torch.randn(9, COLUMNS).to(device)
            qops.update_qparams_(
                x, *state.tensors(), -128, 127, rule=rule, averaging_constant=0.1, axis=axis, workspace=workspace
            )
            assert workspace.tolist() == [0]
        assert [t.data_ptr() for t in state.tensors()] == pointers
        assert all(t._version > v for t, v in zip(state.tensors(), versions, strict=True))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32], ids=dtype_id)
def test_update_qparams_writes_the_zero_point_buffers_dtype(dtype: torch.dtype, device: torch.device) -> None:
    for axis in (None, 0):
        state = State(None if axis is None else 3, device, dtype)
        x = torch.tensor([[-1.0, 2.0], [0.5, 3.0], [-4.0, 0.1]], device=device)
        want = ao_step(x, state.copies(), "affine", (-128, 127), EPS, None, axis)
        _, zero_point = qops.update_qparams_(x, *state.tensors(), -128, 127, axis=axis)
        assert zero_point.dtype == dtype
        check_state(state, want, f"{dtype} axis {axis}")


def test_update_qparams_returned_copies_outlive_the_next_observation(device: torch.device) -> None:
    """The reason for the copies: what autograd saved must not change under it."""
    state = State(None, device)
    scale, zero_point = qops.update_qparams_(torch.randn(50, device=device), *state.tensors(), -128, 127)
    kept = scale.clone(), zero_point.clone()
    qops.update_qparams_(torch.randn(50, device=device) * 100, *state.tensors(), -128, 127)
    assert_bits_equal(scale, kept[0])
    assert_bits_equal(zero_point, kept[1])
    assert (state.scale != scale).all()
