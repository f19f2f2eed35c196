"""Bad input is refused with a text that names what came, and leaves every buffer as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.ao.quantization as stock

import qkernels.modules as ours
from qkernels.ops.small_cpu import SMALL
from tests.modules import support as s

pytestmark = pytest.mark.interpreter

# TypeError for a dtype, ValueError for a shape (SEMANTICS decision 9); torch.ao raises RuntimeError and IndexError.
REFUSALS = (TypeError, ValueError, RuntimeError, IndexError)
SYMMETRIC = {"dtype": torch.qint8, "quant_min": -128, "quant_max": 127, "qscheme": torch.per_channel_symmetric}
PER_CHANNEL = {
    "PerChannelMinMaxObserver": lambda lib, **kw: lib.PerChannelMinMaxObserver(**kw),
    "MovingAveragePerChannelMinMaxObserver": lambda lib, **kw: lib.MovingAveragePerChannelMinMaxObserver(**kw),
    "FakeQuantize": lambda lib, **kw: lib.FakeQuantize(observer=lib.PerChannelMinMaxObserver, **SYMMETRIC, **kw),
    "FakeQuantize moving": lambda lib, **kw: lib.FakeQuantize(
        observer=lib.MovingAveragePerChannelMinMaxObserver, qscheme=torch.per_channel_affine, **kw
    ),
    "Fused": lambda lib, **kw: lib.FusedMovingAvgObsFakeQuantize(
        observer=lib.MovingAveragePerChannelMinMaxObserver, **SYMMETRIC, **kw
    ),
}
PER_TENSOR = {
    "MinMaxObserver": lambda lib: lib.MinMaxObserver(),
    "MovingAverageMinMaxObserver": lambda lib: lib.MovingAverageMinMaxObserver(),
    "FakeQuantize": lambda lib: lib.FakeQuantize(),
    "Fused": lambda lib: lib.FusedMovingAvgObsFakeQuantize(),
}
ALL = {
    **{f"{k} per tensor": v for k, v in PER_TENSOR.items()},
    **{f"{k} per channel": v for k, v in PER_CHANNEL.items()},
}


def refused(module: torch.nn.Module, x: torch.Tensor, *words: str) -> None:
    before = s.snapshot(module)
    with pytest.raises(REFUSALS) as caught:
        module(x)
    s.check_untouched(module, before)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


def still_works(mine: torch.nn.Module, theirs: torch.nn.Module, device: torch.device) -> None:
    x = s.Batch("normal", (3, 8), seed=7).tensor()
    s.check_same(mine(x.to(device)), theirs(x), "output after an error")
    s.check_state(mine, theirs)


@pytest.mark.parametrize("seen", [False, True], ids=["virgin", "seen"])
@pytest.mark.parametrize("which", list(ALL))
def test_complex_input(which: str, seen: bool, device: torch.device) -> None:
    """torch.ao drops the imaginary part with a warning; a quantizer of half the data is refused here."""
    mine, theirs = ALL[which](ours).to(device), ALL[which](stock)
    if seen:
        still_works(mine, theirs, device)
    refused(mine, torch.ones(3, 8, dtype=torch.complex64, device=device), "complex64")
    still_works(mine, theirs, device)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("which", [w for w in ALL if not w.endswith("Observer per tensor") and "Observer" not in w])
def test_integers_cannot_be_fake_quantized(which: str, dtype: torch.dtype, device: torch.device) -> None:
    """torch.ao refuses too, but only after it has written the statistics."""
    mine, theirs = ALL[which](ours).to(device), ALL[which](stock)
    refused(mine, torch.ones(3, 8, dtype=dtype, device=device), str(dtype).removeprefix("torch."))
    still_works(mine, theirs, device)
    refused(mine, torch.ones(3, 8, dtype=dtype, device=device), str(dtype).removeprefix("torch."))
    still_works(mine, theirs, device)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("name", s.OBSERVERS)
def test_observers_take_integers_as_torch_ao_does(name: str, dtype: torch.dtype, device: torch.device) -> None:
    mine, theirs = s.pair(name, device)
    for seed in range(2):
        x = s.Batch("large", (3, 8), dtype, seed=seed).tensor()
        given_x = x.to(device)
        assert mine(given_x) is given_x
        theirs(x)
        s.check_state(mine, theirs)
    s.check_qparams(mine, theirs)


@pytest.mark.parametrize("which", list(PER_CHANNEL))
def test_wrong_channel_count(which: str, device: torch.device) -> None:
    mine, theirs = PER_CHANNEL[which](ours).to(device), PER_CHANNEL[which](stock)
    still_works(mine, theirs, device)
    refused(mine, torch.randn(5, 8, device=device), "5", "3")
    refused(mine, torch.randn(2, 8, device=device), "2", "3")
    still_works(mine, theirs, device)


@pytest.mark.parametrize("which", ["FakeQuantize", "FakeQuantize moving", "Fused"])
@pytest.mark.parametrize("flag", ["observer_enabled", "fake_quant_enabled"])
def test_wrong_channel_count_with_a_flag_off(which: str, flag: str, device: torch.device) -> None:
    """Flags are read by the device, so shapes are refused whatever they say."""
    mine, theirs = PER_CHANNEL[which](ours).to(device), PER_CHANNEL[which](stock)
    still_works(mine, theirs, device)
    getattr(mine, flag)[0] = 0
    refused(mine, torch.randn(5, 8, device=device), "5", "3")


@pytest.mark.parametrize("which", list(PER_CHANNEL))
def test_axis_that_the_input_does_not_have(which: str, device: torch.device) -> None:
    mine, theirs = PER_CHANNEL[which](ours).to(device), PER_CHANNEL[which](stock)
    refused(mine, torch.tensor(1.0, device=device))
    still_works(mine, theirs, device)
    refused(mine, torch.tensor(1.0, device=device))
    for axis in (2, -3):
        refused(PER_CHANNEL[which](ours, ch_axis=axis).to(device), torch.randn(3, 8, device=device), str(axis))


@pytest.mark.parametrize("bad", [None, 1.5, [1.0, 2.0]], ids=str)
@pytest.mark.parametrize("which", list(ALL))
def test_not_a_tensor(which: str, bad: Any, device: torch.device) -> None:
    module = ALL[which](ours).to(device)
    before = s.snapshot(module)
    with pytest.raises((TypeError, AttributeError, RuntimeError)):
        module(bad)
    s.check_untouched(module, before)


@pytest.mark.parametrize("which", list(ALL))
def test_double_backward_is_refused(which: str, device: torch.device) -> None:
    """Fake quantization has no second derivative here, and says so; an observer is the identity."""
    module = ALL[which](ours).to(device)
    x = torch.randn(3, SMALL, device=device, requires_grad=True)  # more than torch's operators serve
    y = (module(x) * x).sum()
    (dx,) = torch.autograd.grad(y, x, create_graph=True)
    if "Observer" in which:
        dx.sum().backward()
        return
    with pytest.raises(
        (NotImplementedError, RuntimeError), match=r"(?i)double backward|second derivative|differentiable"
    ):
        dx.sum().backward()


@pytest.mark.parametrize("which", ["FakeQuantize", "FusedMovingAvgObsFakeQuantize"])
def test_float_zero_points_of_float64_inputs_are_not_implemented(which: str, device: torch.device) -> None:
    """rint(fma(x, 1/scale, zero_point)) of float64 would need a wider type than there is."""
    mine, theirs = s.fq_pair(
        which, "MovingAveragePerChannelMinMaxObserver", device, qscheme=torch.per_channel_affine_float_qparams
    )
    refused(mine, torch.randn(3, 8, dtype=torch.float64, device=device), "float64")
    still_works(mine, theirs, device)
    refused(mine, torch.randn(3, 8, dtype=torch.float64, device=device), "float64")
    still_works(mine, theirs, device)
