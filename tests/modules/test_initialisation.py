"""Modules that begin without values: to_empty, the meta device, then reset_parameters, as FSDP initialises a model."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.quantization as stock

import qkernels
from tests.modules import support as s

CHANNEL = s.CHANNEL
FIXED = {"scale": 1 / 256, "zero_point": 17, "quant_min": 0, "quant_max": 255}
BUILDS: dict[str, Callable[[Any], torch.nn.Module]] = {
    **{name: (lambda lib, n=name: getattr(lib, n)(eps=2**-12)) for name in s.OBSERVERS},
    "MinMaxObserver memoryless": lambda lib: lib.MinMaxObserver(memoryless=True),
    "PerChannelMinMaxObserver memoryless": lambda lib: lib.PerChannelMinMaxObserver(memoryless=True),
    "PlaceholderObserver": lambda lib: lib.PlaceholderObserver(),
    "NoopObserver": lambda lib: lib.NoopObserver(),
    "RecordingObserver": lambda lib: lib.RecordingObserver(),
    "ReuseInputObserver": lambda lib: lib.ReuseInputObserver(),
    "FixedQParamsObserver": lambda lib: lib.FixedQParamsObserver(**FIXED),
    "FixedQParamsFakeQuantize": lambda lib: lib.FixedQParamsFakeQuantize(lib.FixedQParamsObserver.with_args(**FIXED)),
    "FakeQuantize": lambda lib: lib.FakeQuantize(eps=1e-3),
    "FakeQuantize minmax": lambda lib: lib.FakeQuantize(observer=lib.MinMaxObserver),
    "FakeQuantize per channel": lambda lib: lib.FakeQuantize(observer=lib.PerChannelMinMaxObserver, **CHANNEL),
    "FakeQuantize float qparams": lambda lib: lib.FakeQuantize(
        observer=lib.MovingAveragePerChannelMinMaxObserver, qscheme=torch.per_channel_affine_float_qparams
    ),
    "Fused": lambda lib: lib.FusedMovingAvgObsFakeQuantize(eps=2**-12),
    "Fused per channel": lambda lib: lib.FusedMovingAvgObsFakeQuantize(
        observer=lib.MovingAveragePerChannelMinMaxObserver, **CHANNEL
    ),
    "Fused consistent": lambda lib: lib.FusedMovingAvgObsFakeQuantize(consistent_qparams=True),
}
every_build = pytest.mark.parametrize("build", list(BUILDS))


@pytest.fixture(params=["qkernels.modules", "qkernels.modules.pt2e"])
def library(request: pytest.FixtureRequest) -> Any:
    if request.param.endswith("pt2e"):
        pytest.importorskip("torchao.quantization.pt2e", reason="torchao is not installed (extra: torchao)")
    return importlib.import_module(request.param)


def emptied(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """After to_empty, with the worst values that uninitialised memory can hold."""
    module = module.to_empty(device=device)
    for buffer in module.buffers():
        buffer.fill_(float("nan") if buffer.dtype.is_floating_point else 77)
    return module


def reset(module: torch.nn.Module) -> torch.nn.Module:
    """What FSDP does: each module that has reset_parameters initialises its own buffers."""
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    return module


def check_fresh(module: torch.nn.Module, fresh: torch.nn.Module) -> None:
    """Every buffer, the non-persistent ones too; shared ones under each of their names."""
    buffers, buffers_ref = (dict(m.named_buffers(remove_duplicate=False)) for m in (module, fresh))
    assert list(buffers) == list(buffers_ref)
    for name, buffer in buffers_ref.items():
        assert buffers[name].device.type == buffer.device.type, name
        s.check_same(buffers[name], buffer.cpu(), name)
    assert module.state_dict()._metadata == fresh.state_dict()._metadata
    assert set(module.state_dict()) == set(fresh.state_dict())
    for part, part_ref in zip(module.modules(), fresh.modules(), strict=True):
        assert part._non_persistent_buffers_set == part_ref._non_persistent_buffers_set
        assert part.training == part_ref.training


def check_trains_equally(module: torch.nn.Module, fresh: torch.nn.Module, device: torch.device, steps: int = 3) -> None:
    for seed in range(steps):
        a, b = (s.case_batch(seed, device, 2.0**seed).requires_grad_() for _ in range(2))
        y, y_ref = module(a * 1), fresh(b * 1)
        s.check_bits(y, y_ref.cpu(), f"y of batch {seed}")
        y.sum().backward()
        y_ref.sum().backward()
        s.check_same(a.grad, b.grad.cpu(), f"dx of batch {seed}")
        check_fresh(module, fresh)


@every_build
@pytest.mark.parametrize("trained", [False, True], ids=["virgin", "trained"])
def test_to_empty_then_reset(build: str, trained: bool, library: Any, device: torch.device) -> None:
    module, fresh = (BUILDS[build](library).to(device) for _ in range(2))
    if trained:
        module(s.case_batch(7, device))
        if hasattr(module, "disable_observer"):
            module.disable_observer()
            module.disable_fake_quant()
    reset(emptied(module, device))
    check_fresh(module, fresh)
    check_trains_equally(module, fresh, device)


@every_build
def test_construction_on_meta(build: str, library: Any, device: torch.device) -> None:
    """Under torch.device("meta") no value exists, eps and given qparams included; reset_parameters knows them all."""
    fresh = BUILDS[build](library).to(device)
    with torch.device("meta"):
        module = BUILDS[build](library)
    assert all(b.is_meta for b in module.buffers())
    reset(emptied(module, device))
    check_fresh(module, fresh)
    check_trains_equally(module, fresh, device)


@every_build
def test_moved_to_meta_and_back(build: str, library: Any, device: torch.device) -> None:
    fresh = BUILDS[build](library).to(device)
    module = BUILDS[build](library)
    module(s.case_batch(3, torch.device("cpu")))
    module = reset(emptied(module.to("meta"), device))
    check_fresh(module, fresh)
    check_trains_equally(module, fresh, device, steps=1)


@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("build", [b for b in BUILDS if "Observer" in b])
def test_casts_survive(build: str, cast: torch.dtype, library: Any, device: torch.device) -> None:
    """The dtype of the statistics is the user's choice: reset writes values, and leaves it."""
    module, fresh = (BUILDS[build](library).to(device).to(cast) for _ in range(2))
    module(s.case_batch(1, device))
    reset(emptied(module, device))
    check_fresh(module, fresh)


def test_reset_without_emptying_makes_a_fresh_module(library: Any, device: torch.device) -> None:
    """Also the way to calibrate anew; a second reset changes nothing; mode and attributes stay."""
    for build in BUILDS:
        module, fresh = (BUILDS[build](library).to(device).eval() for _ in range(2))
        module.note = "kept"
        for _ in range(2):
            module(s.case_batch(2, device))
            reset(reset(module))
            check_fresh(module, fresh)
        assert module.note == "kept"


def test_reset_is_the_factory_kwargs_dtype(library: Any, device: torch.device) -> None:
    kwargs = {"factory_kwargs": {"dtype": torch.float64}, "eps": 1e-3}
    for name in ("MinMaxObserver", "PerChannelMinMaxObserver"):
        module, fresh = (getattr(library, name)(**kwargs).to(device) for _ in range(2))
        module(s.case_batch(1, device))
        reset(emptied(module, device))
        check_fresh(module, fresh)


class Model(torch.nn.Module):
    def __init__(self, library: Any) -> None:
        super().__init__()
        self.quantizers = torch.nn.ModuleList(BUILDS[b](library) for b in BUILDS)
        self.linear = torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for quantizer in self.quantizers:
            x = quantizer(x * 1.25)
        return self.linear(x)


@pytest.mark.parametrize("order", ["outside in", "inside out"])
def test_whole_model_as_fsdp_does_it(order: str, library: Any, device: torch.device) -> None:
    """Every module that has reset_parameters gets a call, in whatever order."""
    with torch.device("meta"):
        model = Model(library)
    emptied(model, device)
    modules = list(model.modules())
    for module in modules if order == "outside in" else modules[::-1]:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    fresh = Model(library).to(device)
    fresh.linear.load_state_dict(model.linear.state_dict())
    for seed in range(2):
        x = s.case_batch(seed, device)
        s.check_bits(model(x), fresh(x).cpu(), "y")
    check_fresh(model.quantizers, fresh.quantizers)


def test_reset_then_checkpoint(library: Any, device: torch.device) -> None:
    """The other way to fill a model from the meta device: load_state_dict, assigning or copying."""
    for build in ("MinMaxObserver", "FakeQuantize per channel", "Fused", "FixedQParamsFakeQuantize"):
        source = BUILDS[build](library).to(device)
        source(s.case_batch(0, device))
        for assign in (False, True):
            with torch.device("meta"):
                module = BUILDS[build](library)
            reset(emptied(module, device))
            state = copy.deepcopy(source.state_dict())
            module.load_state_dict(state, strict=True, assign=assign)
            check_trains_equally(module, copy.deepcopy(source), device, steps=2)


@pytest.mark.parametrize("build", ["FakeQuantize", "Fused", "FixedQParamsFakeQuantize"])
def test_reset_around_a_stock_observer(build: str, library: Any, device: torch.device) -> None:
    """Our fake quantizers take the stock library's observers, which have no reset_parameters: ours reset their own."""
    mine = around_stock(library, build).to(device)
    mine.disable_observer()
    mine.disable_fake_quant()
    reset(mine)
    assert (int(mine.observer_enabled), int(mine.fake_quant_enabled)) == (1, 1)
    check_fresh(mine, around_stock(library, build).to(device))


def around_stock(library: Any, build: str) -> torch.nn.Module:
    """A virgin fake quantizer of ours around an observer of the library on whose bases ours stand."""
    name = "FixedQParamsObserver" if "Fixed" in build else "MovingAverageMinMaxObserver"
    observer = next(
        c for c in getattr(library, name).__mro__ if c.__name__ == name and not c.__module__.startswith("qkernels")
    )
    if "Fixed" in build:
        return library.FixedQParamsFakeQuantize(observer.with_args(**FIXED))
    cls = library.FakeQuantize if build == "FakeQuantize" else library.FusedMovingAvgObsFakeQuantize
    return cls(observer=observer)


@pytest.mark.parametrize("build", [b for b in BUILDS if "memoryless" not in b and "consistent" not in b])
def test_swapping_a_model_on_meta_then_loading(build: str, device: torch.device) -> None:
    """Nobody knows the values there, so swap must not ask for any; a checkpoint brings them."""
    source = torch.nn.Sequential(BUILDS[build](stock))
    source(s.case_batch(0, torch.device("cpu")))
    with torch.device("meta"):
        model = torch.nn.Sequential(BUILDS[build](stock))
    qkernels.swap(model)
    assert type(model[0]).__module__.startswith("qkernels")
    reset(emptied(model, device)).load_state_dict(source.state_dict(), strict=True)
    for seed in (1, 2):
        x = s.case_batch(seed, torch.device("cpu"))
        s.check_bits(model(x.to(device)), source(x), "y")
        s.check_state(model, source)


def test_copies_reset_to_their_own_configuration(library: Any, device: torch.device) -> None:
    """A deepcopy keeps what it needs to begin anew, here an eps that is not the default and given qparams."""
    for build in ("MinMaxObserver", "FixedQParamsObserver", "FixedQParamsFakeQuantize", "Fused"):
        module, fresh = copy.deepcopy(BUILDS[build](library)).to(device), BUILDS[build](library).to(device)
        reset(emptied(module, device))
        check_fresh(module, fresh)
