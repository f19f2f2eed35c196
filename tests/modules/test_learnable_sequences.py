"""Stages in every order, beside the stock module: outputs, gradients, state_dicts after every step.

y, dx and every entry of the state_dict are bit-equal; the gradients of scale and zero point are within 1e-6 of the sum
of their terms' magnitudes. Ours then takes stock's updated parameters over, so that errors do not accumulate.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.modules import support as s
from tests.modules.learnable_support import (
    BITS,
    EACH_CASE,
    FACES,
    Case,
    check_learned_state,
    sgd,
    step_both,
    take_parameters,
    torchao,
)

Action = tuple[str, Any]
# Methods by name, with the argument if any; and flags written in place.
TORCH_AO: tuple[Action, ...] = (
    ("enable_param_learning", None),
    ("enable_static_estimate", None),
    ("enable_static_observation", None),
    *((name, value) for name in (
        "toggle_observer_update", "toggle_qparam_learning", "toggle_fake_quant", "enable_observer", "enable_fake_quant"
    ) for value in (True, False)),
    ("disable_observer", None),
    ("disable_fake_quant", None),
    *((flag, value) for flag in ("static_enabled", "fake_quant_enabled", "learning_enabled") for value in (0, 1)),
)  # fmt: skip
TORCHAO: tuple[Action, ...] = (
    ("enable_range_learning", None),
    ("disable_range_learning", None),
    *((name, value) for name in ("enable_observer", "enable_fake_quant") for value in (True, False)),
    ("disable_observer", None),
    ("disable_fake_quant", None),
    *((flag, value) for flag in ("observer_enabled", "fake_quant_enabled", "learning_enabled") for value in (0, 1)),
)
ACTIONS = {"torch.ao": TORCH_AO, "torchao": TORCHAO}
STAGES = {
    "torch.ao": ("enable_static_observation", "enable_static_estimate", "enable_param_learning"),
    "torchao": ("enable_observer", "disable_observer", "enable_range_learning", "disable_range_learning"),
}


def act(module: Any, action: Action) -> None:
    name, value = action
    if name.endswith("_enabled"):
        getattr(module, name)[0] = value
    elif value is None:
        getattr(module, name)()
    else:
        getattr(module, name)(value)


def learn(mine: Any, theirs: Any) -> None:
    """An optimizer step of stock's parameters, and the same in ours."""
    sgd(theirs)
    take_parameters(mine, theirs)


def run(case: Case, steps: list[Any], device: torch.device) -> None:
    """Numbers are seeds of batches; the rest is done to both modules."""
    mine, theirs = case.pair(device)
    for step in steps:
        if isinstance(step, int):
            wants_dx = step % 5 != 4
            # An offset keeps some batches one-sided, so that zero points reach the ends of the range.
            x = case.batch(step, 0.5 + step % 4, (step % 3 - 1) * 1.0, 3 if step % 2 or case.axis > 1 else 2)
            step_both(mine, theirs, x, device, wants_dx)
            learn(mine, theirs)
        elif step == "exchange":
            mine, theirs = s.crossed(mine, theirs, partial(prepared, case, theirs, device))
            check_learned_state(mine, theirs)
        else:
            act(mine, step)
            act(theirs, step)


def prepared(case: Case, theirs: Any, device: torch.device) -> tuple[Any, Any]:
    """Fresh modules; torchao's stock one cannot load what it saved before it has seen a batch, so both get one."""
    fresh_mine, fresh_theirs = case.pair(device)
    if case.face == "torchao":
        fresh_theirs(case.batch(0))
        fresh_mine(case.batch(0).to(device))
    for fresh in (fresh_mine, fresh_theirs):  # requires_grad is no part of a state_dict
        learning = theirs.scale.requires_grad
        if case.face == "torchao":
            fresh.enable_range_learning() if learning else fresh.disable_range_learning()
        else:
            fresh.toggle_qparam_learning(learning)
    return fresh_mine, fresh_theirs


@pytest.mark.interpreter
@EACH_CASE
@pytest.mark.parametrize("bits", BITS)
def test_observe_estimate_learn_and_back(case: Case, bits: int, device: torch.device) -> None:
    first, second, third, *more = STAGES[case.face]
    steps: list[Any] = [0]
    for stage in (first, second, third, *more, third, first, third, second):
        steps += [(stage, None), *range(len(steps), len(steps) + 3)]
    if s.INTERPRETER:  # observe, estimate, learn, and one step of the last stage again
        steps = [0, *steps[1:3], *steps[5:7], *steps[9:11]]
        return run(case.other(bits=bits, use_grad_scaling=bits == 4), steps, device)
    for scaling in (False, True):
        run(case.other(bits=bits, use_grad_scaling=scaling), steps, device)


@EACH_CASE
def test_never_toggled(case: Case, device: torch.device) -> None:
    """As constructed: torch.ao's observes, and its parameters get gradients all the same; torchao's do not."""
    run(case, [0, 1, 2, 3], device)
    run(case.other(moving=True), [0, 1, 2, 3], device)


@EACH_CASE
def test_every_pair_of_stages(case: Case, device: torch.device) -> None:
    stages = [(name, None) for name in STAGES[case.face]]
    pairs = list(itertools.product(stages, repeat=2))
    for a, b in pairs:
        run(case.other(moving=True), [0, a, 1, 2, b, 3, 4], device)


@EACH_CASE
def test_every_action_after_learning(case: Case, device: torch.device) -> None:
    """Each switch alone, on a module that has learned, and each flag written in place."""
    actions = ACTIONS[case.face]
    for action in actions:
        run(case, [0, (STAGES[case.face][2], None), 1, action, 2, 3], device)


@pytest.mark.interpreter
@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
def test_every_axis(face: str, symmetric: bool, axis: int, device: torch.device) -> None:
    learning = STAGES[face][2]
    for channels in (4,) if s.INTERPRETER else (1, 2, 4):
        case = Case(face, True, symmetric, 4, axis, channels)
        run(case, [1, (learning, None), 3] if s.INTERPRETER else [1, (learning, None), 3, 5, 7], device)


@pytest.mark.parametrize("face", FACES)
def test_fake_quantization_off_gives_the_input_itself(face: str) -> None:
    """On the CPU in eager mode, as in stock; in every stage."""
    mine, theirs = Case(face).pair()
    for stage in STAGES[face]:
        act(mine, (stage, None)), act(theirs, (stage, None))
        mine.disable_fake_quant(), theirs.disable_fake_quant()
        x = torch.randn(3, 4)
        assert theirs(x) is x
        assert mine(x) is x
    mine.freeze()
    assert mine(x) is x


@st.composite
def sequences(draw: st.DrawFn) -> tuple[Case, list[Any]]:
    per_channel = draw(st.booleans())
    case = Case(
        face=draw(st.sampled_from(FACES)),
        per_channel=per_channel,
        symmetric=draw(st.booleans()),
        bits=draw(st.sampled_from(BITS)),
        axis=draw(st.sampled_from((0, 1, -1))) if per_channel else 0,
        channels=draw(st.integers(1, 4)),
        moving=draw(st.booleans()),
        use_grad_scaling=draw(st.booleans()),
    )
    if case.axis == -1:
        case = case.other(axis=1)  # test_every_axis has the negative ones; here ranks change
    step = st.one_of(st.integers(1, 99), st.integers(1, 99), st.sampled_from(ACTIONS[case.face]), st.just("exchange"))
    # The first batch is observed: before, stock has no statistics, or no parameters, to compare.
    return case, [0, *draw(st.lists(step, min_size=2, max_size=6 if s.INTERPRETER else 14))]


@pytest.mark.interpreter
@s.property_settings(150, 12)
@given(sequence=sequences())
def test_random_sequences(sequence: tuple[Case, list[Any]], device: torch.device) -> None:
    run(*sequence, device)


@pytest.mark.slow
@s.property_settings(2000, 100, derandomize=False)
@given(sequence=sequences())
def test_many_random_sequences(sequence: tuple[Case, list[Any]], device: torch.device) -> None:
    run(*sequence, device)


@EACH_CASE
def test_learning_before_any_observation(case: Case, device: torch.device) -> None:
    """From given values in torch.ao; torchao's first batch is observed whatever the flags say."""
    if case.face == "torch.ao":
        extra = {"channel_len": case.channels} if case.per_channel else {}
        mine = case.mine(device, scale=0.125, zero_point=0.0, **extra)
        theirs = case.theirs()
        with torch.no_grad():
            theirs.scale.fill_(0.125)
        act(mine, ("enable_param_learning", None)), act(theirs, ("enable_param_learning", None))
    else:
        mine, theirs = case.pair(device)
        act(mine, ("enable_range_learning", None)), act(theirs, ("enable_range_learning", None))
    for seed in range(3):
        x = case.batch(seed, 3.0)
        a, b = x.to(device).requires_grad_(), x.clone().requires_grad_()
        s.check_bits(mine(a), theirs(b), "y")
        learn(mine, theirs)
    if case.face == "torch.ao":  # then estimate, from statistics that have seen nothing yet
        act(mine, ("enable_static_estimate", None)), act(theirs, ("enable_static_estimate", None))
    for seed in range(3, 6):
        step_both(mine, theirs, case.batch(seed), device)
        learn(mine, theirs)


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("eps", [1e-12, 2**-12])
def test_scales_at_and_below_eps(face: str, eps: float, device: torch.device) -> None:
    """Observed, the observer's eps decides; learned, torch.ao's own. torchao's forward lets a scale go below it."""
    mine, theirs = Case(face).pair(device)
    for module in (mine, theirs):
        module.activation_post_process.eps.fill_(eps)
        act(module, (STAGES[face][0], None))
    x = Case(face).batch(0, 1e-9)
    mine(x.to(device)), theirs(x)
    s.check_bits(mine.scale, theirs.scale, "observed scale")
    if face == "torch.ao":
        for module in (mine, theirs):
            module.enable_param_learning()
            with torch.no_grad():
                module.scale.fill_(-0.5)
        step_both(mine, theirs, x, device)
        assert mine.scale.item() == mine.eps.item()


@pytest.mark.skipif(torchao is None, reason="torchao is not installed (extra: torchao)")
def test_torchaos_scale_is_raised_to_eps_in_forward(device: torch.device) -> None:
    """Documented: torchao's forward runs with the negative scale of an optimizer step, ours does not."""
    mine, theirs = Case("torchao").pair(device)
    x = Case("torchao").batch(0)
    for module, d in ((mine, device), (theirs, "cpu")):
        module(x.to(d))
        module.enable_range_learning()
        with torch.no_grad():
            module.scale.fill_(-0.5)
    mine(x.to(device)), theirs(x)
    assert theirs.scale.item() == -0.5
    assert mine.scale.item() == mine.eps.item() > 0
