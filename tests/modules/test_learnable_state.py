"""state_dicts of the learnable modules, and Parameters that an optimizer holds on to from the beginning."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

import qkernels
import qkernels.modules as ours
from tests.modules import support as s
from tests.modules.learnable_support import (
    EACH_CASE,
    EACH_FACE,
    NEEDS_TORCHAO,
    Case,
    check_learned_state,
    dy_like,
    sgd,
    step_both,
    take_parameters,
)
from tests.modules.test_learnable_gradients import estimate, learn

PER_CHANNEL = pytest.mark.parametrize("symmetric", [False, True], ids=["affine", "symmetric"])


def trained(case: Case, device: torch.device) -> tuple[Any, Any]:
    """Both, observed, learned and estimated again, from stock's parameters."""
    mine, theirs = case.pair(device)
    for seed, stage in enumerate((None, learn, None, estimate, learn)):
        if stage is not None:
            stage(mine), stage(theirs)
        step_both(mine, theirs, case.batch(seed), device)
        sgd(theirs)
        take_parameters(mine, theirs)
    return mine, theirs


def through_a_file(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()))


# ------------------------------------------------------------------------------------------ both directions


@EACH_CASE
def test_checkpoints_go_both_ways(case: Case, device: torch.device) -> None:
    """Strictly, into modules that have seen a batch; training goes on equal from there."""
    mine, theirs = trained(case, device)
    check_learned_state(mine, theirs)
    fresh_mine, fresh_theirs = case.pair(device)
    fresh_mine(case.batch(8, 5.0).to(device))
    fresh_theirs(case.batch(8, 5.0))
    learn(fresh_mine), learn(fresh_theirs)
    fresh_mine.load_state_dict(through_a_file(theirs.state_dict()), strict=True)
    saved = copy.deepcopy(mine).cpu().state_dict()
    fresh_theirs.load_state_dict(saved, strict=True)
    check_learned_state(fresh_mine, fresh_theirs)
    for seed in (10, 11):
        step_both(fresh_mine, fresh_theirs, case.batch(seed), device)
        sgd(fresh_theirs)
        take_parameters(fresh_mine, fresh_theirs)


@EACH_CASE
@pytest.mark.parametrize("assign", [False, True])
def test_checkpoints_load_into_fresh_modules(case: Case, assign: bool, device: torch.device) -> None:
    """Of unknown channel count too. Stock: torch.ao's needs channel_len, torchao's refuses any trained checkpoint."""
    mine, theirs = trained(case, device)
    for source in (theirs.state_dict(), mine.state_dict()):
        fresh = case.mine(device)
        state = {k: v.clone().to(device) for k, v in source.items()}
        fresh.load_state_dict(state, strict=True, assign=assign)
        s.check_state(fresh, theirs)
        for name, parameter in mine.named_parameters():
            s.check_bits(getattr(fresh, name), parameter.cpu(), name)
            assert isinstance(getattr(fresh, name), torch.nn.Parameter)
        x = case.batch(9).to(device)
        s.check_bits(learn(fresh)(x), learn(copy.deepcopy(mine))(x).cpu(), "y after loading")


@EACH_CASE
def test_stock_needs_what_ours_does_not(case: Case) -> None:
    """When this fails, stock has learned to load; say so in the documentation."""
    mine, theirs = trained(case, torch.device("cpu"))
    if case.face == "torchao":
        fresh = case.theirs()
        with pytest.raises(RuntimeError, match="Unexpected key"):
            fresh.load_state_dict(mine.state_dict())
    elif case.per_channel:
        fresh = type(theirs)(type(theirs.activation_post_process), **case.kwargs())
        with pytest.raises(RuntimeError, match="size mismatch"):
            fresh.load_state_dict(theirs.state_dict())


@EACH_CASE
def test_a_wrong_number_of_channels_is_refused(case: Case) -> None:
    if not case.per_channel:
        return
    mine, wide = case.mine(channel_len=3), case.other(channels=4).mine(channel_len=4)
    before = [p.detach().clone() for p in wide.parameters()]
    with pytest.raises(RuntimeError, match="size mismatch"):
        wide.load_state_dict(mine.state_dict())
    for p, value in zip(wide.parameters(), before, strict=True):
        s.check_bits(p, value, "after a refused load")
    with pytest.raises(ValueError, match="3 channels already; got 4"):
        mine.give_channels(4)
    mine.give_channels(3)


@EACH_CASE
def test_a_missing_key_is_named_as_in_stock(case: Case) -> None:
    """One key missing. (Neither scale nor zero point is another thing: torchao saves that before the first batch.)"""
    mine, theirs = case.pair()
    mine(case.batch(0)), theirs(case.batch(0))
    for key in theirs.state_dict():
        outcomes = []
        for module in (mine, theirs):
            state = module.state_dict()
            del state[key]
            try:
                module.load_state_dict(state, strict=True)
                outcomes.append("loaded")
            except RuntimeError as error:
                assert "Missing key" in str(error) and key in str(error)
                outcomes.append("refused")
        assert outcomes[0] == outcomes[1], key


@NEEDS_TORCHAO
@PER_CHANNEL
@pytest.mark.parametrize("per_channel", [False, True])
def test_torchaos_virgin_checkpoint(per_channel: bool, symmetric: bool, device: torch.device) -> None:
    """Saved before the first batch: no scale in it. Ours then is virgin too: the next batch is observed, whatever the
    flags, into a trained module as well.
    """
    case = Case("torchao", per_channel, symmetric)
    for seen in (False, True):
        mine, theirs = case.pair(device)
        if seen:
            mine(case.batch(0).to(device))
        state = theirs.state_dict()
        keys = list(state)
        mine.load_state_dict(state, strict=True)
        assert list(state) == keys, "the caller's dict stays as it is"
        for seed in range(1, 5):
            if seed == 3:
                learn(mine), learn(theirs)
            step_both(mine, theirs, case.batch(seed), device)
            take_parameters(mine, theirs)


@NEEDS_TORCHAO
def test_a_torchao_checkpoint_of_the_learning_stage_goes_on_learning() -> None:
    """In a fresh module, from the flag in the checkpoint. So does stock's, saved before its first batch."""
    mine, theirs = Case("torchao").pair()
    learn(theirs)
    fresh_theirs = Case("torchao").theirs()
    fresh_theirs.load_state_dict(theirs.state_dict())
    mine.load_state_dict(theirs.state_dict())
    x = Case().batch(0).requires_grad_()
    for module in (fresh_theirs, mine):
        module(x).sum().backward()
        assert module.scale.grad is not None, type(module)
    source = learn(Case("torchao").mine())
    source(x)
    fresh = Case("torchao").mine()
    fresh.load_state_dict(source.state_dict())
    fresh(x).sum().backward()
    assert fresh.scale.grad is not None


@EACH_CASE
@pytest.mark.parametrize("moving", [False, True])
def test_a_fresh_state_with_known_channels_is_stocks(case: Case, moving: bool) -> None:
    """Saved before the first batch, loaded into stock, estimating from there: finite, and equal to a fresh stock."""
    case = case.other(moving=moving)
    mine = case.mine(channel_len=case.channels) if case.per_channel else case.mine()
    if case.face == "torch.ao":
        theirs = case.theirs()
        s.check_state(mine, theirs)
        theirs.load_state_dict(mine.state_dict(), strict=True)
        reference = case.theirs()
        s.check_same(theirs(case.batch(0)), reference(case.batch(0)), "y of stock")
        s.check_state(theirs, reference)
    report = qkernels.verify(mine, [case.batch(seed) for seed in range(2)])
    assert report, str(report)


# ------------------------------------------------------------------------------------------ optimizers


@EACH_CASE
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_an_optimizer_built_before_the_first_batch(case: Case, optimizer: str, device: torch.device) -> None:
    """It owns the Parameters then, also after they got their number of channels, and moves them."""
    mine = case.mine(device)
    parameters = dict(mine.named_parameters())
    assert list(parameters) == ["scale", "zero_point"]
    adam = getattr(torch.optim, optimizer)(mine.parameters(), lr=1e-2)
    mine(case.batch(0).to(device))
    for name, parameter in mine.named_parameters():
        assert parameter is parameters[name]
        assert any(parameter is p for group in adam.param_groups for p in group["params"])
        assert parameter.shape == ((case.channels,) if case.per_channel else (1,))
    learn(mine)
    for seed in range(1, 4):
        before = mine.scale.detach().clone()
        adam.zero_grad()
        x = case.batch(seed).to(device)
        (mine(x) * dy_like(x).to(device)).sum().backward()
        adam.step()
        assert (mine.scale != before).all()


@EACH_CASE
def test_the_state_of_an_optimizer_built_after_the_batches_resumes(case: Case, device: torch.device) -> None:
    """Checkpoint of model and optimizer into fresh ones, the usual order: model, load, optimizer, load; and the other
    order, where the optimizer saw the Parameters without channels.
    """
    mine = learn(case.mine(device))
    adam = torch.optim.Adam(mine.parameters(), lr=1e-2)

    def step(module: Any, opt: torch.optim.Optimizer, seed: int) -> None:
        opt.zero_grad()
        x = case.batch(seed).to(device)
        (module(x) * dy_like(x).to(device)).sum().backward()
        opt.step()

    for seed in range(3):
        step(mine, adam, seed)
    saved = copy.deepcopy((mine.state_dict(), adam.state_dict()))
    step(mine, adam, 3)
    for early in (False, True):
        fresh = learn(case.mine(device))
        optimizer = torch.optim.Adam(fresh.parameters(), lr=1e-2) if early else None
        fresh.load_state_dict(saved[0])
        optimizer = optimizer or torch.optim.Adam(fresh.parameters(), lr=1e-2)
        optimizer.load_state_dict(copy.deepcopy(saved[1]))
        step(fresh, optimizer, 3)
        for (name, a), b in zip(fresh.named_parameters(), mine.parameters(), strict=True):
            s.check_bits(a, b.cpu(), name)


@EACH_FACE
@pytest.mark.parametrize("how", ["batch", "load", "give_channels", "inference mode"])
def test_parameters_stay_the_same_objects(face: str, how: str, device: torch.device) -> None:
    case = Case(face, True, axis=1)
    mine = case.mine(device)
    before = mine.scale, mine.zero_point
    mine.scale.grad = torch.ones_like(mine.scale)  # of another shape afterwards: dropped, or backward would fail
    if how == "load":
        source = case.mine(device)
        source(case.batch(0).to(device))
        mine.load_state_dict(source.state_dict())
    elif how == "give_channels":
        mine.give_channels(case.channels)
    elif how == "inference mode":
        with torch.inference_mode():
            mine(case.batch(0).to(device))
    else:
        mine(case.batch(0).to(device))
    assert mine.scale is before[0] and mine.zero_point is before[1]
    assert mine.scale.shape == mine.zero_point.shape == (3,) and mine.scale.grad is None
    learn(mine)
    x = case.batch(1).to(device).requires_grad_()
    mine(x).backward(dy_like(x).to(device))
    assert mine.scale.grad.shape == (3,)


def test_channel_len_is_there_before_the_first_batch() -> None:
    for channels in (1, 5):
        mine = ours.LearnableFakeQuantize(
            ours.PerChannelMinMaxObserver, scale=0.25, zero_point=2, channel_len=channels,
            qscheme=torch.per_channel_affine, ch_axis=1,
        )  # fmt: skip
        assert mine.scale.tolist() == [0.25] * channels and mine.zero_point.tolist() == [2.0] * channels
        mine(torch.randn(3, channels))
        assert mine.scale.shape == (channels,)
    with pytest.raises(ValueError, match="shape"):
        mine(torch.randn(3, 4))
