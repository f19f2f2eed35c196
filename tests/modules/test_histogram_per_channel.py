"""PerChannelHistogramObserver: every channel is torch.ao's HistogramObserver of its own."""

from __future__ import annotations

import pytest
import torch
import torch.ao.quantization as stock

import qkernels.modules as ours
from tests.histogram_batches import Batch, stock_step
from tests.modules import support as s

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("qscheme", [torch.per_channel_affine, torch.per_channel_symmetric], ids=str)
def test_per_channel(axis: int, qscheme: torch.qscheme, device: torch.device) -> None:
    """Every channel is an observer of its own."""
    kwargs = {"bins": 50, "dtype": torch.qint8}
    mine = ours.PerChannelHistogramObserver(ch_axis=axis, qscheme=qscheme, **kwargs).to(device)
    scheme = torch.per_tensor_affine if qscheme == torch.per_channel_affine else torch.per_tensor_symmetric
    shape = (3, 4, 5)
    singles = [stock.HistogramObserver(qscheme=scheme, **kwargs) for _ in range(shape[axis])]
    for seed in range(3):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * (1 + seed)
        mine(x.to(device))
        for channel, single in enumerate(singles):
            stock_step(single, x.select(axis, channel).reshape(-1))
    scale, zero_point = mine.calculate_qparams()
    expected = [single.calculate_qparams() for single in singles]
    s.check_same(scale, torch.cat([pair[0] for pair in expected]), "scale")
    s.check_same(zero_point, torch.cat([pair[1] for pair in expected]), "zero_point")
    s.check_same(mine.histogram, torch.stack([single.histogram for single in singles]), "histogram")


def test_per_channel_state(device: torch.device) -> None:
    mine = ours.PerChannelHistogramObserver(bins=16, ch_axis=1).to(device)
    with pytest.warns(UserWarning, match="must run observer"):
        assert mine.calculate_qparams()[0].tolist() == [1.0]
    x = Batch("normal", 60).tensor().reshape(5, 3, 4).to(device)
    mine(x)
    fresh = ours.PerChannelHistogramObserver(bins=16, ch_axis=1).to(device)
    fresh.load_state_dict(mine.state_dict())
    mine(x * 2), fresh(x * 2)
    s.check_state(fresh.cpu(), mine.cpu())
    mine.reset_min_max_vals()
    assert mine.histogram.shape == (0, 16)
    mine(torch.ones(2, 7))
    assert mine.min_val.shape == (7,)
    with pytest.raises(ValueError, match=r"histogram must have shape \(C, bins\) with C = 3; got \(7, 16\)"):
        mine(torch.ones(2, 3))
    with pytest.raises(ValueError, match="PerChannelHistogramObserver: axis must be in"):
        mine(torch.ones(2))


def test_per_channel_arguments() -> None:
    with pytest.raises(NotImplementedError, match="qscheme must be per_channel_affine or per_channel_symmetric"):
        ours.PerChannelHistogramObserver(qscheme=torch.per_tensor_affine)
    with pytest.raises(NotImplementedError, match="is_dynamic must be False"):
        ours.PerChannelHistogramObserver(is_dynamic=True)


def test_per_channel_inside_a_fake_quantizer(device: torch.device) -> None:
    kwargs = {"dtype": torch.qint8, "quant_min": -128, "quant_max": 127, "qscheme": torch.per_channel_symmetric}
    module = ours.FakeQuantize(observer=ours.PerChannelHistogramObserver, bins=64, ch_axis=0, **kwargs).to(device)
    x = Batch("normal", 300).tensor().reshape(3, 100).to(device)
    y = module(x)
    assert module.scale.shape == (3,)
    assert (y - x).abs().max() <= x.abs().max()
    expected = torch.fake_quantize_per_channel_affine(
        x.cpu(), module.scale.cpu(), module.zero_point.cpu().to(torch.int32), 0, -128, 127
    )
    s.check_same(y, expected, "y")
