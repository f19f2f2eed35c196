"""HistogramObserver against torch.ao's: construction, and the ways it gets into a model."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.ao.quantization as stock

import qkernels
import qkernels.modules as ours
from tests.histogram_batches import Batch, stock_step
from tests.modules import support as s
from tests.modules.histogram_support import new_pair, step

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"bins": 100},
        {"dtype": torch.qint8, "qscheme": torch.per_tensor_symmetric},
        {"dtype": torch.quint8, "qscheme": torch.per_tensor_symmetric, "reduce_range": True},
        {"quant_min": 0, "quant_max": 15},
        {"dtype": torch.uint16},
        {"dtype": torch.qint32},
        {"eps": 1e-3},
        {"factory_kwargs": {"dtype": torch.float64}},
    ],
    ids=str,
)
def test_construction(kwargs: dict, device: torch.device) -> None:
    mine, theirs = new_pair(torch.device("cpu"), **kwargs)
    s.check_state(mine, theirs)
    assert repr(mine) == repr(theirs)
    for name in ("bins", "upsample_rate", "dst_nbins", "quant_min", "quant_max", "dtype", "qscheme", "reduce_range"):
        assert getattr(mine, name) == getattr(theirs, name), name
    assert isinstance(mine, stock.HistogramObserver)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"qscheme": torch.per_channel_affine},
        {"is_dynamic": True},
        {"dtype": torch.float8_e4m3fn},
        {"dtype": torch.float32},
        {"quant_min": 3, "quant_max": 200},
        {"quant_min": -5, "quant_max": -1},
    ],
    ids=str,
)
def test_what_torch_ao_refuses(kwargs: dict) -> None:
    with s.quiet(), pytest.raises(Exception) as theirs:
        stock.HistogramObserver(**kwargs)
    with s.quiet(), pytest.raises(type(theirs.value)) as mine:
        ours.HistogramObserver(**kwargs)
    assert str(mine.value) == str(theirs.value)


def test_with_args_and_positional_arguments() -> None:
    factory = ours.HistogramObserver.with_args(reduce_range=True)
    assert factory().reduce_range and factory() is not factory()
    assert ours.HistogramObserver(16, torch.qint8, torch.per_tensor_symmetric).bins == 16


def test_asked_before_the_first_batch(device: torch.device) -> None:
    mine, theirs = new_pair(device)
    with pytest.warns(UserWarning) as said:
        scale, zero_point = mine.calculate_qparams()
    with pytest.warns(UserWarning) as said_ref:
        scale_ref, zero_point_ref = theirs.calculate_qparams()
    assert [str(w.message) for w in said] == [str(w.message) for w in said_ref]
    s.check_same(scale, scale_ref, "scale")
    s.check_same(zero_point, zero_point_ref, "zero_point")


def test_another_number_of_bins_is_torch_aos_error(device: torch.device) -> None:
    mine, theirs = new_pair(device)
    for observer in (mine, theirs):
        observer(torch.linspace(-1, 1, 9).to(observer.histogram.device))
        observer.bins = 7
    with pytest.raises(AssertionError) as error_ref:
        theirs.calculate_qparams()
    with pytest.raises(AssertionError) as error:
        mine.calculate_qparams()
    assert str(error.value) == str(error_ref.value)


# ------------------------------------------------------------------------------------------ swap


def test_swap_keeps_state_and_numbers(device: torch.device) -> None:
    theirs = stock.HistogramObserver(bins=64)
    stock_step(theirs, Batch("normal", 300).tensor())
    mine = copy.deepcopy(theirs).to(device)
    (entry,) = qkernels.swap(mine).swapped
    assert entry.new.endswith("HistogramObserver") and type(mine) is ours.HistogramObserver
    s.check_state(mine, theirs)
    step(mine, theirs, Batch("normal", 300, 2.0, seed=1).tensor(), device)


def test_verify_and_freeze() -> None:
    model = torch.nn.Sequential(torch.nn.ReLU(), stock.HistogramObserver(bins=64), stock.FakeQuantize())
    report = qkernels.verify(model, [torch.randn(50, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    assert report, str(report)
    qkernels.freeze(model)
    before = s.snapshot(model)
    model(torch.randn(9) * 100)
    s.check_untouched(model, before)


def test_factories() -> None:
    observer, theirs = ours.default_histogram_observer(), stock.default_histogram_observer()
    assert type(observer) is ours.HistogramObserver
    assert repr(observer) == repr(theirs) and observer.quant_max == theirs.quant_max
    quantizer = ours.default_histogram_fake_quant()
    assert type(quantizer) is ours.FakeQuantize
    assert type(quantizer.activation_post_process) is ours.HistogramObserver
    assert type(ours.get_default_qconfig("x86").activation()) is ours.HistogramObserver


def test_inside_fake_quantizers(device: torch.device) -> None:
    """Ours in ours, ours in torch.ao's, eagerly."""
    theirs = stock.FakeQuantize(observer=stock.HistogramObserver, bins=64)
    quantizers = [
        library.FakeQuantize(observer=ours.HistogramObserver, bins=64).to(device) for library in (ours, stock)
    ]
    for seed in range(4):
        if seed == 3:
            for module in (theirs, *quantizers):
                module.disable_observer()
        x = Batch("normal", 200, 1.0 + seed % 2, seed=seed).tensor()
        expected = theirs(x)
        for module in quantizers:
            s.check_bits(module(x.to(device)), expected, "y")
            s.check_state(module, theirs)
