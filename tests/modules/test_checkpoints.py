"""Checkpoints in every direction: torch.ao, torchao, ours on either's bases; old versions, files, whole models."""

from __future__ import annotations

import copy
import io
import itertools
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.ao.quantization as stock
from torch.ao.quantization import quantize_fx

import qkernels.modules as ours
from tests.modules import support as s
from tests.modules.test_simple_observers import copied

FIXED = {"scale": 1 / 256, "zero_point": 17}
CHANNEL = {**s.CHANNEL, "eps": 2**-12}
# Every module with state, built from the library whose classes it takes.
BUILDS: dict[str, Any] = {
    **{name: (lambda lib, n=name: getattr(lib, n)(eps=2**-12)) for name in s.OBSERVERS},
    "FixedQParamsObserver": lambda lib: lib.FixedQParamsObserver(**FIXED),
    "FixedQParamsFakeQuantize": lambda lib: lib.FixedQParamsFakeQuantize(lib.FixedQParamsObserver.with_args(**FIXED)),
    "FakeQuantize": lambda lib: lib.FakeQuantize(observer=lib.MinMaxObserver, eps=1e-3),
    "FakeQuantize per channel": lambda lib: lib.FakeQuantize(observer=lib.PerChannelMinMaxObserver, **CHANNEL),
    "FakeQuantize float qparams": lambda lib: lib.FakeQuantize(
        observer=lib.MovingAveragePerChannelMinMaxObserver, qscheme=torch.per_channel_affine_float_qparams
    ),
    "Fused": lambda lib: lib.FusedMovingAvgObsFakeQuantize(eps=2**-12),
    "Fused per channel": lambda lib: lib.FusedMovingAvgObsFakeQuantize(
        observer=lib.MovingAveragePerChannelMinMaxObserver, **CHANNEL
    ),
}
every_build = pytest.mark.parametrize("build", list(BUILDS))
LIBRARIES = ("torch.ao", "qkernels", "torchao", "qkernels pt2e")
OURS = ("qkernels", "qkernels pt2e")
DIRECTIONS = [d for d in itertools.product(LIBRARIES, LIBRARIES) if set(d) & set(OURS)]


def library(name: str) -> Any:
    """The classes of one of LIBRARIES; torchao's only where torchao is installed."""
    if name in ("torch.ao", "qkernels"):
        return {"torch.ao": stock, "qkernels": ours}[name]
    torchao = pytest.importorskip("torchao.quantization.pt2e", reason="torchao is not installed (extra: torchao)")
    if name == "torchao":
        return torchao
    import qkernels.modules.pt2e as pt2e

    return pt2e


def place(name: str, device: torch.device) -> torch.device:
    """Ours run on the device under test, the oracles on the CPU."""
    return device if name in OURS else torch.device("cpu")


def make(build: str, name: str, device: torch.device) -> torch.nn.Module:
    return BUILDS[build](library(name)).to(place(name, device))


def trained(build: str, name: str, device: torch.device, seeds: range = range(2)) -> torch.nn.Module:
    module = make(build, name, device)
    for seed in seeds:
        feed([module], [name], device, seed)
    return module


def feed(modules: list[torch.nn.Module], names: list[str], device: torch.device, seed: int) -> None:
    """The same batch for all; the outputs equal bit for bit."""
    x = s.Batch("shifted", (3, 8), seed=seed).tensor()
    outputs = [m(x.to(place(n, device))).cpu() for m, n in zip(modules, names, strict=True)]
    for y in outputs[1:]:
        s.check_bits(y, outputs[0], f"output of batch {seed}")


def check_equal(modules: list[torch.nn.Module]) -> None:
    for module in modules[1:]:
        s.check_state(module.cpu(), modules[0].cpu())
        s.check_qparams(module, modules[0])


@every_build
@pytest.mark.parametrize(("source", "target"), DIRECTIONS, ids=[f"{a} to {b}" for a, b in DIRECTIONS])
def test_every_direction(build: str, source: str, target: str, device: torch.device) -> None:
    """Strictly into a fresh module; qparams are equal at once and after training both on. Flags come with it."""
    old = trained(build, source, device)
    new = make(build, target, device)
    if hasattr(old, "disable_fake_quant"):
        old.disable_fake_quant()
    result = new.load_state_dict(copy.deepcopy(old.state_dict()), strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    check_equal([copy.deepcopy(old), copy.deepcopy(new)])
    for seed in (2, 3):
        if seed == 3 and hasattr(old, "enable_fake_quant"):
            old.enable_fake_quant()
            new.enable_fake_quant()
        feed([old, new], [source, target], device, seed)
    check_equal([old, new])


# ------------------------------------------------------------------------------------------ files


def through_torch_save(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


@every_build
@pytest.mark.parametrize("name", OURS)
def test_torch_save_and_weights_only(build: str, name: str, device: torch.device) -> None:
    """Plain tensors and nothing else: the safe loader takes it, versions included, so eps survives."""
    reference = {"qkernels": "torch.ao", "qkernels pt2e": "torchao"}[name]
    old = trained(build, name, device)
    state = through_torch_save(old.state_dict())
    assert all(type(value) is torch.Tensor for value in state.values())
    assert state._metadata == old.state_dict()._metadata
    for target in (name, reference):
        new = make(build, target, device)
        new.load_state_dict(copy.deepcopy(state), strict=True)
        check_equal([copy.deepcopy(old), new])


@every_build
@pytest.mark.parametrize("name", OURS)
def test_safetensors(build: str, name: str, device: torch.device, tmp_path: Any) -> None:
    """A file of tensors knows no versions, so eps becomes the default, for torch.ao's modules and ours alike.

    save_model and load_model, because FixedQParamsFakeQuantize shares its scale with its observer.
    """
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed (extra: test)")
    reference = {"qkernels": "torch.ao", "qkernels pt2e": "torchao"}[name]
    for source in (name, reference):
        old = trained(build, source, device)
        path = str(tmp_path / f"{source}.safetensors")
        safetensors.save_model(old, path)
        loaded = []
        for target in (reference, name):
            new = make(build, target, device)
            missing, unexpected = safetensors.load_model(new, path, strict=False)
            loaded.append(new)
            assert not unexpected and not missing, (missing, unexpected)
        feed(loaded, [reference, name], device, 4)
        check_equal(loaded)
        again = make(build, name, device)
        safetensors.load_model(again, path, strict=False)
        for key, value in old.state_dict().items():
            if not key.endswith("eps"):
                s.check_same(again.state_dict()[key], value.cpu(), key)


@every_build
@pytest.mark.parametrize("cast", [None, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_and_casts_of_pt2e(build: str, cast: Any, how: str, device: torch.device) -> None:
    """What test_state_dict.py asks of the classes on torch.ao's bases."""
    mine, theirs = trained(build, "qkernels pt2e", device), trained(build, "torchao", device)
    twin = copied(mine, how)
    assert type(twin) is type(mine)
    assert {b.data_ptr() for b in mine.buffers() if b.numel()}.isdisjoint({b.data_ptr() for b in twin.buffers()})
    if cast is not None:
        twin, theirs = twin.to(cast), theirs.to(cast)
        s.check_state(twin, theirs)
        twin, theirs = twin.float(), theirs.float()
    s.check_state(twin, theirs)
    feed([theirs, twin], ["torchao", "qkernels pt2e"], device, 5)
    s.check_state(twin, theirs)
    if device.type == "cpu":
        assert repr(twin) == repr(theirs)


# ------------------------------------------------------------------------------------------ old versions


def aged(state: Any, version: int | None) -> Any:
    """The checkpoint as an earlier torch wrote it: no eps before version 2, min_vals and max_vals per channel before 3.

    FakeQuantize has version 1 throughout; the versions are those of the observers.
    """
    old = OrderedDict()
    for key, value in state.items():
        name = key.rpartition(".")[2]
        if name == "eps" and version in (None, 1):
            continue
        if name in ("min_val", "max_val") and value.ndim and version is not None:
            key += "s"
        old[key] = value.clone()
    old._metadata = copy.deepcopy(state._metadata)
    for metadata in old._metadata.values():
        if metadata.get("version") == 3:
            metadata["version"] = version
    return old


def load_outcome(module: torch.nn.Module, state: Any, strict: bool) -> Any:
    try:
        result = module.load_state_dict(copy.deepcopy(state), strict=strict)
    except RuntimeError as error:
        return str(error)
    return sorted(result.missing_keys), sorted(result.unexpected_keys)


VERSIONED = [b for b in BUILDS if not b.startswith("Fixed")]


@pytest.mark.parametrize("version", [None, 1, 2])
@pytest.mark.parametrize("build", VERSIONED)
@pytest.mark.parametrize("name", OURS)
def test_checkpoints_of_old_versions(build: str, version: int | None, name: str, device: torch.device) -> None:
    """The statistics arrive and eps is the default where there was none; strictly, into fresh and seen modules.

    torch.ao resizes for min_vals and max_vals, and leaves in the buffers what was in memory. Ours loads them.
    """
    reference = {"qkernels": "torch.ao", "qkernels pt2e": "torchao"}[name]
    source = trained(build, reference, device)
    state = aged(source.state_dict(), version)
    expected = source.state_dict()
    if version in (None, 1):
        expected = {k: torch.full_like(v, s.EPS) if k.endswith("eps") else v for k, v in expected.items()}
    for new in (make(build, name, device), trained(build, name, device, range(5, 6))):
        assert load_outcome(new, state, True) == load_outcome(make(build, reference, device), state, True) == ([], [])
        got = new.state_dict()
        assert list(got) == list(expected)
        for key, value in expected.items():
            s.check_same(got[key], value, key)
    modern = make(build, reference, device)
    renewed = copy.deepcopy(source.state_dict())
    for key in renewed:
        renewed[key] = expected[key].clone()
    modern.load_state_dict(renewed)
    feed([modern, new], [reference, name], device, 6)
    check_equal([modern, new])


@pytest.mark.parametrize("version", [None, 1, 2, 3])
@pytest.mark.parametrize("build", VERSIONED)
def test_keys_missing_from_any_version(build: str, version: int | None, device: torch.device) -> None:
    """One key less, one too many: torch.ao's answer, strict or not."""
    state = trained(build, "torch.ao", device).state_dict()
    state = aged(state, version) if version != 3 else copy.deepcopy(state)
    for key in list(state):
        cut = copy.deepcopy(state)
        del cut[key]
        cut["stranger"] = torch.ones(1)
        for strict in (False, True):
            outcomes = [load_outcome(make(build, n, device), cut, strict) for n in ("qkernels", "torch.ao")]
            assert outcomes[0] == outcomes[1], (key, strict)


def test_loading_does_not_change_the_checkpoint_but_for_eps(device: torch.device) -> None:
    """The caller's tensors are copied from, never resized or written; torch.ao adds an eps to the dict itself."""
    for build in VERSIONED:
        for version in (1, 2):
            state = aged(trained(build, "torch.ao", device).state_dict(), version)
            before = {k: v.clone() for k, v in state.items()}
            new = make(build, "qkernels", device)
            new.load_state_dict(state)
            feed([new], ["qkernels"], device, 1)
            for key, value in before.items():
                s.check_same(state[key], value, f"{build}: {key}")


# ------------------------------------------------------------------------------------------ whole models


def float_model() -> torch.nn.Module:
    g = torch.Generator().manual_seed(3)
    model = torch.nn.Sequential(
        stock.QuantStub(), torch.nn.Linear(5, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3), stock.DeQuantStub()
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g))
    return model.train()


def eager(lib: Any, backend: str, version: int) -> torch.nn.Module:
    model = float_model()
    model.qconfig = lib.get_default_qat_qconfig(backend, version)
    return stock.prepare_qat(model)


def fx(lib: Any, backend: str, version: int) -> torch.nn.Module:
    mapping = lib.get_default_qat_qconfig_mapping(backend, version)
    return quantize_fx.prepare_qat_fx(float_model(), mapping, (torch.randn(2, 5),))


def train_step(model: torch.nn.Module, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    y = model(torch.randn(4, 5, generator=g))
    model.zero_grad()
    y.square().sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.01 * parameter.grad
    return y


@pytest.mark.parametrize(("backend", "version"), [("x86", 0), ("x86", 1), ("qnnpack", 0), ("qnnpack", 1)])
@pytest.mark.parametrize("prepare", [eager, fx])
def test_whole_prepared_models(prepare: Any, backend: str, version: int) -> None:
    """Trained with one library, saved to a file, loaded strictly into the other's model, trained on: bit for bit."""
    with s.quiet():
        models = {lib: prepare(lib, backend, version) for lib in (ours, stock)}
        fresh = {lib: prepare(lib, backend, version) for lib in (ours, stock)}
    for seed in range(2):
        outputs = [train_step(models[lib], seed) for lib in (ours, stock)]
        s.check_bits(outputs[0], outputs[1], f"y at step {seed}")
    for source, target in ((ours, stock), (stock, ours)):
        fresh[target].load_state_dict(through_torch_save(models[source].state_dict()), strict=True)
    for seed in range(2, 4):
        outputs = [train_step(m, seed) for m in (models[stock], models[ours], fresh[ours], fresh[stock])]
        for y in outputs[1:]:
            s.check_bits(y, outputs[0], f"y at step {seed}")
    for model in (models[ours], fresh[ours], fresh[stock]):
        s.check_state(model, models[stock])
    assert any(type(m).__module__.startswith("qkernels") for m in fresh[ours].modules())


def test_model_half_and_back() -> None:
    """.half() of a whole model casts what torch.ao's does; qparams go with it."""
    with s.quiet():
        mine, theirs = eager(ours, "x86", 0), eager(stock, "x86", 0)
    train_step(mine, 0)
    train_step(theirs, 0)
    s.check_state(mine.half(), theirs.half())
    s.check_state(mine.float(), theirs.float())
    s.check_bits(train_step(mine, 1), train_step(theirs, 1), "y")
    s.check_state(mine, theirs)
