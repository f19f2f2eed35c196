"""LearnableFakeQuantize of both faces: copies, casts, meta initialisation."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch

from tests.modules import support as s
from tests.modules.learnable_support import EACH_CASE, Case, check_learned_state, dy_like, step_both


def pickled(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))


def saved(module: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@EACH_CASE
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved], ids=["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("when", ["fresh", "observed", "learning", "off", "frozen"])
def test_copies_are_equal_independent_and_go_on(case: Case, copied: Any, when: str, device: torch.device) -> None:
    mine = case.mine(device)
    if when != "fresh":
        mine(case.batch(0).to(device))
    if when == "learning":
        (mine.enable_range_learning if case.face == "torchao" else mine.enable_param_learning)()
        mine.grad_mask, mine.grad_factor = "lsq", 0.5
    elif when == "off":
        mine.disable_fake_quant()
    elif when == "frozen":
        mine.freeze()
    twin = copied(mine)
    assert type(twin) is type(mine)
    assert [n for n, _ in twin.named_parameters()] == [n for n, _ in mine.named_parameters()] == ["scale", "zero_point"]
    results = []
    for module in (mine, twin):
        x = case.batch(1, 1.5).to(device).requires_grad_()
        y = module(x)
        y.backward(dy_like(x).to(device))
        results.append([y, x.grad, module.scale.grad, module.zero_point.grad, *s.snapshot(module).values()])
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            s.check_bits(a.float(), b.cpu().float(), "after copying")
    tensors = [{t.data_ptr() for t in (*m.parameters(), *m.buffers()) if t.numel()} for m in (mine, twin)]
    assert tensors[0].isdisjoint(tensors[1])


@pytest.mark.interpreter
@EACH_CASE
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seen", [False, True])
def test_half_casts_what_stock_casts_and_learns(
    case: Case, dtype: torch.dtype, seen: bool, device: torch.device
) -> None:
    """`.half()` and `.bfloat16()`: the same state as stock, whose own backward refuses float16; gradients are right."""
    mine, theirs = case.pair(device)
    if seen:
        for module, d in ((mine, device), (theirs, "cpu")):
            module(case.batch(0).to(d))
    mine, theirs = mine.to(dtype), theirs.to(dtype)
    if seen:
        check_learned_state(mine, theirs)
    else:
        mine(case.batch(0).to(device, dtype))
    (mine.enable_range_learning if case.face == "torchao" else mine.enable_param_learning)()
    assert mine.scale.dtype == mine.zero_point.dtype == mine.eps.dtype == dtype
    x = case.batch(1).to(device, dtype).requires_grad_()
    y = mine(x)
    assert y.dtype == dtype
    y.backward(dy_like(x).to(device, dtype))
    assert x.grad.dtype == mine.scale.grad.dtype == mine.zero_point.grad.dtype == dtype
    assert mine.scale.grad.isfinite().all() and mine.scale.grad.abs().max() > 0


@EACH_CASE
def test_bfloat16_data_with_float32_parameters(case: Case, device: torch.device) -> None:
    """Autocast's combination. y is stock's where stock's operators take it."""
    mine = case.mine(device)
    x = case.batch(0).to(device, torch.bfloat16).requires_grad_()
    mine(x).backward(dy_like(x).to(device, torch.bfloat16))
    assert mine.scale.dtype == torch.float32
    reference = case.mine(device)
    reference(x.detach().float())
    s.check_bits(mine.scale, reference.scale.cpu(), "scale")


@EACH_CASE
def test_float64_data_with_float32_parameters(case: Case, device: torch.device) -> None:
    mine, theirs = case.pair(device)
    x = case.batch(0).double()
    y_ref = theirs(x)
    s.check_same(mine(x.to(device)), y_ref, "y")


@EACH_CASE
def test_double_models_run_or_are_refused_by_name(case: Case, device: torch.device) -> None:
    """`model.double()` casts scale, zero point and eps too. Stock runs its forward then, and fails in the backward."""
    mine, theirs = case.pair(device)
    mine, theirs = mine.double(), theirs.double()
    x = case.batch(0).double()
    try:
        y = mine(x.to(device))
    except NotImplementedError as error:
        assert "LearnableFakeQuantize" in str(error) and "float64" in str(error)
    else:
        s.check_same(y, theirs(x), "y")


@pytest.mark.interpreter
@EACH_CASE
@pytest.mark.parametrize("how", ["to_empty", "meta"])
def test_reset_parameters_gives_a_fresh_module(case: Case, how: str, device: torch.device) -> None:
    """After to_empty with the worst that memory can hold; then it trains as a fresh one does."""
    extra = {"scale": 0.5, "zero_point": 3.0} if case.face == "torch.ao" else {}
    channels = {"channel_len": case.channels} if case.per_channel else {}
    with torch.device("meta" if how == "meta" and case.face == "torchao" else "cpu"):  # torch.ao's constructor reads
        mine = case.mine("meta" if how == "meta" else device, **extra, **channels)
    mine = mine.to_empty(device=device)
    with torch.no_grad():
        for tensor in (*mine.parameters(), *mine.buffers()):
            tensor.fill_(float("nan") if tensor.dtype.is_floating_point else 77)
    for part in mine.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    fresh = case.mine(device, **extra, **channels)
    for (name, a), b in zip(mine.named_parameters(), fresh.parameters(), strict=True):
        s.check_bits(a, b.cpu(), name)
    before = s.snapshot(fresh)
    for name, buffer in s.snapshot(mine).items():
        if not name.endswith(("min_val", "max_val")):  # which forget the number of channels too, as torch.ao's do
            s.check_same(buffer, before[name].cpu(), name)
    theirs = case.theirs()
    for seed in range(2):
        step_both(mine, theirs, case.batch(seed), device)
