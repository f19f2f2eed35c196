"""Gradient factors and masks of the learnable modules, and the zero points where torch is wrong."""

from __future__ import annotations

import pytest
import torch

import qkernels.modules as ours
from tests.modules import support as s
from tests.modules.learnable_support import Case
from tests.modules.test_learnable_gradients import EACH_AFFINE, backward, grads, learn, reference
from tests.oracles_learnable import assert_learnable


@pytest.mark.parametrize("elements", ["tensor", "channel", "sample"])
@EACH_AFFINE
@pytest.mark.interpreter
def test_grad_scale_elements(per_channel: bool, elements: str, device: torch.device) -> None:
    """1 / sqrt(count * quant_max), the count exactly: numel; numel / C; numel / batch."""
    case = Case(per_channel=per_channel, axis=1, bits=4, symmetric=True, use_grad_scaling=True)
    mine = learn(case.mine(device, grad_scale_elements=elements))
    for ndim in (2, 3):
        x = case.batch(ndim, ndim=ndim)
        mine(x.to(device))
        count = {"tensor": x.numel(), "channel": x.numel() // (3 if per_channel else 1)}
        factor = 1.0 / ((count | {"sample": x.numel() // x.shape[0]})[elements] * 7) ** 0.5
        mine.zero_grad()
        dx = backward(mine, x, device)
        want = reference(mine, x, factor)
        assert_learnable(None, (dx, *grads(mine)), want, (mine.scale, mine.zero_point), elements)


@pytest.mark.interpreter
def test_grad_factor_takes_the_place_of_grad_scaling(device: torch.device) -> None:
    for options, factor in (({"grad_factor": 0.5}, 0.5), ({}, 1 / (30 * 255) ** 0.5)):
        mine = learn(Case(use_grad_scaling=True).mine(device, **options))
        x = torch.linspace(-2, 3, 30).reshape(2, 3, 5)
        mine(x.to(device))
        mine.zero_grad()
        dx = backward(mine, x, device)
        want = reference(mine, x, factor)
        assert_learnable(None, (dx, *grads(mine)), want, (mine.scale, mine.zero_point), str(options))


@pytest.mark.parametrize("elements", ["tensor", "channel", "sample"])
def test_grad_scale_elements_of_a_scalar(elements: str) -> None:
    mine = learn(Case(use_grad_scaling=True).mine(grad_scale_elements=elements))
    mine(torch.tensor(1.0)).backward()
    assert grads(mine)[0].isfinite().all()


@pytest.mark.parametrize("bits", [2, 4])
@EACH_AFFINE
@pytest.mark.interpreter
def test_grad_mask_lsq_differs_where_it_must(per_channel: bool, bits: int, device: torch.device) -> None:
    """Half a step on either side of each bound, and there alone; both are what float64 says."""
    case = Case(per_channel=per_channel, bits=bits, axis=1)
    top = case.quant_range[1]
    scale, zero = 0.5, 1.0
    # In steps from the zero point: inside, within half a step of a bound on either side, and far outside.
    steps = torch.tensor([0.0, top - 1.2, top - 0.7, top - 1.6, -0.8, -1.3, -1.7, top + 3.0, -9.0])
    between = (steps + zero >= top) & (steps + zero < top + 0.5) | (steps + zero <= 0) & (steps + zero > -0.5)
    assert 2 <= int(between.sum()) < len(steps)
    x = (steps * scale).reshape(3, 1, 3).expand(3, 3, 3).contiguous()
    between = between.reshape(3, 1, 3).expand(3, 3, 3)
    results = {}
    for mask in ("rounded", "lsq"):
        mine = learn(case.mine(device, grad_mask=mask))
        mine.set_stage(observing=False, learning=True)
        mine(x.to(device))
        with torch.no_grad():
            mine.scale.fill_(scale), mine.zero_point.fill_(zero)
        mine.zero_grad()
        results[mask] = (backward(mine, x, device), *grads(mine))
        assert_learnable(None, results[mask], reference(mine, x, 1.0, mask), (mine.scale, mine.zero_point), mask)
    s.check_bits((results["rounded"][0] != results["lsq"][0]).cpu().float(), between.float(), "where dx differs")
    assert not torch.isclose(results["rounded"][1], results["lsq"][1], rtol=1e-3).any()
    assert not torch.isclose(results["rounded"][2], results["lsq"][2], rtol=1e-3).any()


@EACH_AFFINE
@pytest.mark.interpreter
def test_negative_zero_points_are_right(per_channel: bool, device: torch.device) -> None:
    """Where torch's per-tensor operator is one code off: LSQ on signed codes with a learned zero point."""
    kwargs = {"qscheme": torch.per_channel_affine if per_channel else torch.per_tensor_affine, "dtype": torch.qint8}
    observer = ours.PerChannelMinMaxObserver if per_channel else ours.MinMaxObserver
    mine = ours.LearnableFakeQuantize(observer, -128, 127, **kwargs).to(device)
    x = Case(per_channel=per_channel).batch(0, 1.0, 0.75)
    mine(x.to(device))
    assert (mine.zero_point < -20).any()
    dx = backward(learn(mine), x * 1.5, device)
    want = reference(mine, x * 1.5)
    assert_learnable(None, (dx, *grads(mine)), want, (mine.scale, mine.zero_point))
