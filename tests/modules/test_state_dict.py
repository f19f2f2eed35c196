"""Checkpoints, copies and casts: what torch.ao saves ours loads, and the other way round; training goes on equal."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.ao.quantization as stock

import qkernels.modules as ours
from tests.modules import support as s

pytestmark = pytest.mark.interpreter

SYMMETRIC = {"dtype": torch.qint8, "quant_min": -128, "quant_max": 127}
# Every module, built as (class name, observer or None, arguments).
BUILDS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    **{name: (name, None, {"eps": 2**-12}) for name in s.OBSERVERS},
    "FakeQuantize": ("FakeQuantize", "MinMaxObserver", {"dtype": torch.quint8, "qscheme": torch.per_tensor_affine}),
    "FakeQuantize per channel": (
        "FakeQuantize", "PerChannelMinMaxObserver", {**SYMMETRIC, "qscheme": torch.per_channel_symmetric}
    ),
    "FakeQuantize float qparams": (
        "FakeQuantize", "MovingAveragePerChannelMinMaxObserver", {"qscheme": torch.per_channel_affine_float_qparams}
    ),
    "Fused": ("FusedMovingAvgObsFakeQuantize", "MovingAverageMinMaxObserver", {"reduce_range": True}),
    "Fused per channel": (
        "FusedMovingAvgObsFakeQuantize",
        "MovingAveragePerChannelMinMaxObserver",
        {**SYMMETRIC, "qscheme": torch.per_channel_symmetric},
    ),
}  # fmt: skip
every_build = pytest.mark.parametrize("build", list(BUILDS))


def make(build: str, device: torch.device) -> tuple[torch.nn.Module, torch.nn.Module]:
    name, observer, kwargs = BUILDS[build]
    return s.pair(name, device, **kwargs) if observer is None else s.fq_pair(name, observer, device, **kwargs)


def feed(mine: torch.nn.Module, theirs: torch.nn.Module, device: torch.device, seed: int, channels: int = 3) -> None:
    x = s.Batch("shifted", (channels, 8), seed=seed).tensor()
    s.check_same(mine(x.to(device)), theirs(x), "output")


@every_build
def test_keys_dtypes_shapes_and_versions(build: str, device: torch.device) -> None:
    mine, theirs = make(build, device)
    s.check_state(mine, theirs)
    feed(mine, theirs, device, 0)
    s.check_state(mine, theirs)
    assert type(mine)._version == type(theirs)._version
    inner = getattr(mine, "activation_post_process", mine)
    assert inner._version == 3
    assert not list(mine.parameters())


@every_build
def test_checkpoints_go_both_ways_and_training_goes_on(build: str, device: torch.device) -> None:
    """Into fresh modules (per channel: of shape (0,) and (1,), resized by the load), strictly."""
    mine, theirs = make(build, device)
    for seed in range(2):
        feed(mine, theirs, device, seed)
    mine, theirs = s.crossed(mine, theirs, lambda: make(build, device))
    s.check_state(mine, theirs)
    s.check_qparams(mine, theirs)
    for seed in range(2, 4):
        feed(mine, theirs, device, seed)
        s.check_state(mine, theirs)


@every_build
def test_fresh_checkpoint_into_a_trained_module(build: str, device: torch.device) -> None:
    """Never-observed statistics load too, and the next batch is a first batch again, of any channel count."""
    mine, theirs = make(build, device)
    feed(mine, theirs, device, 0)
    fresh_mine, fresh_theirs = make(build, device)
    mine.load_state_dict(fresh_theirs.state_dict(), strict=True)
    theirs.load_state_dict(fresh_theirs.state_dict(), strict=True)
    s.check_state(mine, fresh_theirs)
    feed(mine, theirs, device, 1, channels=5)
    s.check_state(mine, theirs)
    del fresh_mine


@pytest.mark.parametrize("build", [b for b in BUILDS if BUILDS[b][1] is not None])
def test_flags_and_statistics_off_are_saved(build: str, device: torch.device) -> None:
    mine, theirs = make(build, device)
    feed(mine, theirs, device, 0)
    mine.disable_observer()
    theirs.disable_observer()
    mine, theirs = s.crossed(mine, theirs, lambda: make(build, device))
    before = mine.activation_post_process.min_val.clone()
    feed(mine, theirs, device, 1)
    assert torch.equal(before, mine.activation_post_process.min_val)
    s.check_state(mine, theirs)


@every_build
def test_missing_and_unexpected_keys_as_torch_ao(build: str, device: torch.device) -> None:
    mine, theirs = make(build, device)
    for key in list(theirs.state_dict()):
        state = theirs.state_dict()
        del state[key]
        state["stranger"] = torch.ones(1)
        for strict in (False, True):
            outcomes = [load_outcome(m, state, strict) for m in (mine, theirs)]
            assert outcomes[0] == outcomes[1], key


def load_outcome(module: torch.nn.Module, state: dict[str, torch.Tensor], strict: bool) -> Any:
    try:
        result = module.load_state_dict(copy.deepcopy(state), strict=strict)
    except RuntimeError as error:
        return str(error)
    return sorted(result.missing_keys), sorted(result.unexpected_keys)


@every_build
def test_checkpoints_of_older_versions_as_torch_ao(build: str, device: torch.device) -> None:
    """Version 1 and none at all: eps is filled in with float32's; version 2 per channel: keys min_vals and max_vals."""
    for version in (None, 1, 2):
        mine, theirs = make(build, device)
        source = make(build, device)[1]
        source(s.Batch("normal", (3, 8)).tensor())
        state = source.state_dict()
        for metadata in state._metadata.values():
            if metadata["version"] == 3:
                metadata["version"] = version
        outcomes = [load_outcome(m, state, False) for m in (mine, theirs)]
        assert outcomes[0] == outcomes[1], version
        s.check_state(mine, theirs)


@every_build
def test_missing_scale_is_filled_from_no_metadata(build: str, device: torch.device) -> None:
    """A plain dict has no versions: torch.ao then replaces eps, and so must ours."""
    mine, theirs = make(build, device)
    state = dict(theirs.state_dict())
    mine.load_state_dict(dict(state))
    theirs.load_state_dict(dict(state))
    s.check_state(mine, theirs)


@every_build
def test_load_by_assignment(build: str, device: torch.device) -> None:
    """load_state_dict(assign=True), as for models built on the meta device."""
    mine, theirs = make(build, device)
    feed(mine, theirs, device, 0)
    fresh_mine, fresh_theirs = make(build, device)
    fresh_mine.load_state_dict({k: v.clone() for k, v in mine.state_dict().items()}, assign=True)
    fresh_theirs.load_state_dict({k: v.clone() for k, v in theirs.state_dict().items()}, assign=True)
    feed(fresh_mine, fresh_theirs, device, 1)
    s.check_state(fresh_mine, fresh_theirs)


@pytest.mark.parametrize(
    ("build", "how"), [*((build, "load") for build in BUILDS), *((name, "reset") for name in s.OBSERVERS)]
)
def test_what_a_killed_kernel_left_is_healed(build: str, how: str, device: torch.device) -> None:
    """Extra buffers hold kernels' counters. Garbage in them (a killed launch, to_empty) ends with a load or a reset."""
    mine, theirs = make(build, device)
    for seed in range(2):  # virgin, then seen
        for name, buffer in mine.named_buffers():
            if name not in mine.state_dict():
                buffer.fill_(3)
        if how == "load":
            mine.load_state_dict(theirs.state_dict(), strict=True)
        else:
            mine.reset_min_max_vals()
            theirs.reset_min_max_vals()
        feed(mine, theirs, device, seed)
        s.check_state(mine, theirs)


def pickled(module: torch.nn.Module) -> torch.nn.Module:
    return pickle.loads(pickle.dumps(module))


def saved(module: torch.nn.Module) -> torch.nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@every_build
@pytest.mark.parametrize("how", [copy.deepcopy, pickled, saved], ids=["deepcopy", "pickle", "torch.save"])
def test_copies_are_equal_independent_and_train_on(build: str, how: Any, device: torch.device) -> None:
    mine, theirs = make(build, device)
    fresh = how(mine)
    s.check_state(fresh, theirs)
    feed(mine, theirs, device, 0)
    twin = how(mine)
    assert type(twin) is type(mine)
    s.check_state(twin, theirs)
    pointers = {b.data_ptr() for b in mine.buffers() if b.numel()}
    assert pointers.isdisjoint({b.data_ptr() for b in twin.buffers() if b.numel()})
    before = s.snapshot(mine)
    feed(twin, theirs, device, 1)
    s.check_state(twin, theirs)
    s.check_untouched(mine, before)


@every_build
@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_casts_change_the_same_buffers(build: str, cast: torch.dtype, device: torch.device) -> None:
    mine, theirs = make(build, device)
    s.check_state(mine.to(cast), theirs.to(cast))
    mine, theirs = make(build, device)
    feed(mine, theirs, device, 0)
    s.check_state(mine.to(cast), theirs.to(cast))
    s.check_state(mine.float(), theirs.float())  # and back, with what the cast has lost
    feed(mine, theirs, device, 1)
    s.check_state(mine, theirs)


@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_fake_quantize_with_cast_qparams(cast: torch.dtype, device: torch.device) -> None:
    """A model's `.half()` casts scale too; torch's per-tensor op takes that, so ours does, with the same numbers."""
    for qscheme in s.PER_TENSOR_SCHEMES:
        mine, theirs = s.fq_pair("FakeQuantize", "MovingAverageMinMaxObserver", device, qscheme=qscheme)
        mine, theirs = mine.to(cast), theirs.to(cast)
        for seed in range(2):
            x = s.Batch("normal", (5, 9), seed=seed).tensor()
            s.check_bits(mine(x.to(device)), theirs(x), "y")
            s.check_state(mine, theirs)


@every_build
def test_repr_is_torch_aos(build: str, device: torch.device) -> None:
    """The texts of extra_repr and of the child; tensors print their device when it is not the CPU."""
    mine, theirs = make(build, device)
    if device.type == "cpu":
        assert repr(mine) == repr(theirs)
        feed(mine, theirs, device, 0)
        assert repr(mine) == repr(theirs)
        assert mine.extra_repr() == theirs.extra_repr()
    else:
        mine, theirs = mine.cpu(), theirs
        assert repr(mine) == repr(theirs)


@pytest.mark.parametrize("name", [*s.OBSERVERS, *s.FAKE_QUANTIZERS])
def test_isinstance_and_public_functions_of_torch_ao(name: str, device: torch.device) -> None:
    mine = getattr(ours, name)().to(device)
    assert isinstance(mine, getattr(stock, name))
    base = stock.FakeQuantizeBase if name in s.FAKE_QUANTIZERS else stock.ObserverBase
    assert isinstance(mine, base)
    model = torch.nn.Sequential(mine)
    if name in s.FAKE_QUANTIZERS:
        for function, flags in (
            (stock.disable_observer, (0, 1)),
            (stock.disable_fake_quant, (0, 0)),
            (stock.enable_observer, (1, 0)),
            (stock.enable_fake_quant, (1, 1)),
        ):
            model.apply(function)
            assert (int(mine.observer_enabled), int(mine.fake_quant_enabled)) == flags
