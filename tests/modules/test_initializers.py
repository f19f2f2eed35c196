"""First values of scales and zero points: the formulas against NumPy in float64, and `initialize` on whole models."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.ao.quantization as stock
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qkernels.modules as ours
from qkernels.modules import initializers as init
from qkernels.modules.learning import learnable_qconfig, learnable_qconfig_mapping, prepare_learnable
from qkernels.ops import fake_quantize
from tests.modules import support as s

EPS = float(torch.finfo(torch.float32).eps)
CLOSE = {"rtol": 2e-7, "atol": 0}  # one rounding to float32 of what float64 gives
CODES = {"8 bits": (-128, 127), "narrow": (-127, 127), "4 bits": (-8, 7), "2 bits": (-2, 1), "unsigned": (0, 15)}
CHECKS: dict[str, Any] = {
    "lsq_scale": lambda x, n, p, axis: init.lsq_scale(x, p, axis),
    "lsq_plus_weight_scale": init.lsq_plus_weight_scale,
    "lsq_plus_activation_qparams": init.lsq_plus_activation_qparams,
    "mse_qparams": lambda x, n, p, axis: init.mse_qparams(x, n, p, axis, steps=5),
}


def rows(x: torch.Tensor, axis: int | None) -> np.ndarray:
    """What shares a scale, one row per scale, float64."""
    values = x.double().cpu().numpy()
    return values.reshape(1, -1) if axis is None else np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)


def sample(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, shift: float = 0.3) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 2 + shift).to(device, dtype)


SHAPES = [((4, 3, 5), None), ((4, 3, 5), 0), ((4, 3, 5), -2), ((7,), 0), ((1,), None), ((), None), ((3, 1), 0)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_formulas(shape: Any, axis: int | None, codes: str, dtype: torch.dtype, device: torch.device) -> None:
    n, p = CODES[codes]
    x = sample(shape, dtype, device)
    v = rows(x, axis)
    results = {"lsq": (init.lsq_scale(x, p, axis), 2 * np.abs(v).mean(1) / np.sqrt(p))}
    bits = {"8 bits": 8, "narrow": 8, "4 bits": 4, "2 bits": 2, "unsigned": 4}[codes]
    mean, sd = v.mean(1), v.std(1)  # NumPy's is the population's
    expected = np.maximum(np.abs(mean - 3 * sd), np.abs(mean + 3 * sd)) / 2 ** (bits - 1)
    results["lsq+ weight"] = init.lsq_plus_weight_scale(x, n, p, axis), expected
    if v.shape[1] > 1:
        scale, zero_point = init.lsq_plus_activation_qparams(x, n, p, axis)
        expected = (v.max(1) - v.min(1)) / (p - n)
        results["lsq+ activation"] = scale, expected
        results["lsq+ zero point"] = zero_point, n - v.min(1) / expected
    scale, zero_point = init.lsq_plus_activation_qparams(x, n, p, axis, include_zero=True)
    low, high = np.minimum(v.min(1), 0), np.maximum(v.max(1), 0)
    results["widened"] = scale, (high - low) / (p - n)
    assert ((zero_point >= n) & (zero_point <= p + 1e-4)).all()
    for name, (actual, wanted) in results.items():
        assert actual.dtype == torch.float32 and actual.shape == (len(v),), name
        np.testing.assert_allclose(actual.cpu().numpy(), np.float32(wanted), err_msg=name, **CLOSE)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("axis", [None, 1])
def test_degenerate_input(name: str, axis: int | None, device: torch.device) -> None:
    """Zeros give eps and a zero point that stands for 0; NaN gives NaN, in its own channel only."""
    x = torch.zeros(4, 3, device=device)
    result = CHECKS[name](x, 0, 15, axis)
    scale, zero_point = result if isinstance(result, tuple) else (result, torch.zeros(1))
    assert (scale == EPS).all() and (zero_point == 0).all()
    x += torch.arange(12, device=device).reshape(4, 3)
    x[0, 1] = float("nan")
    result = CHECKS[name](x, 0, 15, axis)
    scale = result[0] if isinstance(result, tuple) else result
    assert scale.isnan().tolist() == ([True] if axis is None else [False, True, False])


def squared_error(x: torch.Tensor, scale: Any, zero_point: Any, n: int, p: int, axis: int | None) -> np.ndarray:
    y = fake_quantize(x, scale, zero_point.to(torch.int32), n, p, axis)
    return ((rows(y, axis) - rows(x, axis)) ** 2).sum(1)


def test_mse_finds_the_best_candidate(device: torch.device) -> None:
    """Against a search in NumPy over the same candidates, per channel, with tails that pay for a smaller range."""
    x = sample((3, 400), torch.float32, device, 0.0)
    x[1] = x[1] ** 3
    x[2] = x[2].abs()
    for symmetric in (False, True):
        scale, zero_point = init.mse_qparams(x, -8, 7, 0, symmetric, steps=20)
        v = rows(x, 0)
        low, high = np.minimum(v.min(1), 0), np.maximum(v.max(1), 0)
        best = np.full(3, np.inf)
        for k in range(20, 0, -1):
            if symmetric:
                step, offset = 2 * np.maximum(-low, high) * k / 20 / 15, np.zeros(3)
            else:
                step = (high - low) * k / 20 / 15
                offset = np.clip(-8 - np.rint(low * k / 20 / step), -8, 7)
            q = np.clip(np.rint(v / step[:, None]) + offset[:, None], -8, 7) - offset[:, None]
            best = np.minimum(best, ((q * step[:, None] - v) ** 2).sum(1))
        np.testing.assert_allclose(squared_error(x, scale, zero_point, -8, 7, 0), best, rtol=1e-5)
        assert (zero_point == 0).all() or not symmetric
        assert scale[1] * 15 < 0.95 * float(high[1] - low[1])  # cubed normal values have tails to cut off


@s.property_settings(60, 6)
@given(
    batch=s.batches(channels=3, axis=1, empty=False, dtypes=(torch.float32, torch.float16)),
    codes=st.sampled_from(sorted(CODES)),
    axis=st.sampled_from([None, 1]),
    symmetric=st.booleans(),
)
def test_mse_is_never_worse_than_min_and_max(
    batch: s.Batch, codes: str, axis: int | None, symmetric: bool, device: torch.device
) -> None:
    x = batch.tensor().to(device).float()
    n, p = CODES[codes]
    scale, zero_point = init.mse_qparams(x, n, p, axis, symmetric, steps=9)
    low, high = init._range(x, axis, include_zero=True)
    rule = "symmetric" if symmetric else "affine"
    eps = torch.tensor([EPS], device=device)
    plain = init.choose_qparams_by_rule(low.float(), high.float(), n, p, rule, 0, eps)
    mine = squared_error(x, scale, zero_point, n, p, axis)
    theirs = squared_error(x, *plain, n, p, axis)
    assert not (mine > theirs * (1 + 1e-12)).any()


@pytest.mark.parametrize("name", CHECKS)
def test_errors_of_formulas(name: str) -> None:
    call = CHECKS[name]
    with pytest.raises(TypeError, match=f"{name}: x must be float16, bfloat16, float32 or float64; got torch.int64"):
        call(torch.arange(3), 0, 15, None)
    with pytest.raises(ValueError, match=rf"{name}: x must not be empty; got shape \(0, 3\)"):
        call(torch.zeros(0, 3), 0, 15, None)
    with pytest.raises(ValueError, match=rf"{name}: axis must be in \[-2, 1\] for a 2-dimensional x; got 2"):
        call(torch.zeros(3, 3), 0, 15, 2)
    rule = "quant_max must be at least 1; got 0" if name == "lsq_scale" else "quant_min must be below quant_max; got 0"
    with pytest.raises(ValueError, match=f"{name}: {rule}"):
        call(torch.zeros(3), 0, 0, None)
    with pytest.raises(ValueError, match="mse_qparams: steps must be at least 1; got 0"):
        init.mse_qparams(torch.ones(3), 0, 15, steps=0)


# ------------------------------------------------------------------------------------------ whole models


def make_net() -> nn.Sequential:
    """Batch norm with statistics and weights of its own, so that its factor shows in the weights."""
    net = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(45, 4))
    with torch.no_grad():
        net[1].running_var.copy_(torch.tensor([0.1, 1.0, 4.0, 9.0, 0.5]))
        net[1].weight.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0, 0.1]))
    return net


def quantizers(model: nn.Module) -> dict[str, ours.LearnableFakeQuantize]:
    return {name: m for name, m in model.named_modules() if isinstance(m, ours.LearnableFakeQuantize)}


@pytest.fixture
def prepared(device: torch.device) -> tuple[nn.Module, torch.Tensor]:
    x = sample((4, 3, 5, 5), torch.float32, device)
    with s.quiet():
        return prepare_learnable(make_net().to(device), learnable_qconfig_mapping(4, 8), x, weight_init=None), x


def test_initialize_changes_scales_and_zero_points_only(prepared: Any) -> None:
    """Not the flags, statistics, batch norm or hooks, though the forward runs in training mode."""
    model, x = prepared
    model.apply(ours.enable_static_observation)
    before = {name: value.clone() for name, value in [*model.named_buffers(), *model.named_parameters()]}
    assert init.initialize(model, x) is model
    after = dict([*model.named_buffers(), *model.named_parameters()])
    changed = {name.split(".")[-1] for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {"scale", "zero_point"}
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_weights_are_what_reaches_the_quantizer(prepared: Any) -> None:
    """Of a convolution fused with its batch norm that is the folded weight; without inputs only weights are set."""
    model, x = prepared
    init.initialize(model)
    found = quantizers(model)
    reached: dict[str, torch.Tensor] = {}
    for name, quantizer in found.items():
        quantizer.register_forward_pre_hook(lambda module, args, name=name: reached.setdefault(name, args[0].detach()))
    folded = {name: q.scale.detach().clone() for name, q in found.items() if name.endswith("weight_fake_quant")}
    model.eval()(x)
    assert len(folded) == 2
    for name, scale in folded.items():
        torch.testing.assert_close(scale, init.lsq_scale(reached[name], 7, 0), rtol=1e-6, atol=0)
        assert found[name].zero_point.eq(0).all()
    assert all(q.activation_post_process.min_val.isfinite().all() for q in found.values())  # they observed: flags stay


@pytest.mark.parametrize("activations", init.METHODS)
@pytest.mark.parametrize("weights", init.METHODS)
def test_activations_are_set_in_order(weights: str, activations: str, prepared: Any) -> None:
    """Every quantizer is set from what it is given when all before it are set and fake quantize."""
    model, x = prepared
    init.initialize(model, x, weights=weights, activations=activations)
    twin = copy.deepcopy(model)
    for quantizer in quantizers(twin).values():
        quantizer.set_stage(observing=False, learning=False)
    seen: dict[str, torch.Tensor] = {}
    for name, quantizer in quantizers(twin).items():
        quantizer.register_forward_pre_hook(lambda module, args, name=name: seen.setdefault(name, args[0].detach()))
    twin(x)
    for name, quantizer in quantizers(model).items():
        reached, (n, p) = seen[name], (quantizer.quant_min, quantizer.quant_max)
        is_weight = name.endswith("weight_fake_quant")
        axis = 0 if is_weight else None
        method = weights if is_weight else activations
        zero_point = torch.zeros_like(quantizer.scale)
        if method == "observer":
            observer = type(quantizer.activation_post_process)
            keywords = {"quant_min": n, "quant_max": p, "dtype": quantizer.dtype, "qscheme": quantizer.qscheme}
            fresh = observer(**keywords).to(x.device)
            fresh(reached)
            scale, zero_point = fresh.calculate_qparams()
        elif method == "lsq":
            scale = init.lsq_scale(reached, p, axis)
        elif method == "mse":
            scale, zero_point = init.mse_qparams(reached, n, p, axis, is_weight)
        elif is_weight:
            scale = init.lsq_plus_weight_scale(reached, n, p, axis)
        else:
            scale, zero_point = init.lsq_plus_activation_qparams(reached, n, p, include_zero=True)
        tolerance = {"rtol": 1e-6, "atol": 0} if is_weight else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(quantizer.scale.detach(), scale, **tolerance)
        torch.testing.assert_close(quantizer.zero_point.detach(), zero_point.float(), rtol=0, atol=0)


@pytest.mark.interpreter
def test_special_quantizers(device: torch.device) -> None:
    """Symmetric unsigned codes keep zero point 0, shared quantizers take the first, frozen ones stay."""
    kwargs = {"quant_min": 0, "quant_max": 255, "dtype": torch.quint8, "qscheme": torch.per_tensor_symmetric}
    shared = ours.LearnableFakeQuantize(ours.MovingAverageMinMaxObserver, **kwargs)
    channels = ours.LearnableFakeQuantize(ours.PerChannelMinMaxObserver, ch_axis=1)
    frozen = ours.LearnableFakeQuantize(ours.MinMaxObserver, scale=3.0)
    frozen.freeze()
    model = nn.Sequential(shared, nn.ReLU(), shared, channels, frozen).to(device)
    x = sample((6, 3), torch.float32, device)
    init.initialize(model, x)
    amax = x.abs().max()
    torch.testing.assert_close(shared.scale.detach(), (amax / 127.5).reshape(1), rtol=1e-6, atol=0)
    assert shared.zero_point.item() == 0 and frozen.scale.item() == 3.0
    assert channels.scale.shape == (3,) and channels.activation_post_process.min_val.isinf().all()


def test_foreign_observer_and_scale_floor(device: torch.device) -> None:
    x = sample((8, 8), torch.float32, device)
    with s.quiet():
        quantizer = ours.LearnableFakeQuantize(stock.HistogramObserver).to(device)
        init.initialize(quantizer, x)
        fresh = stock.HistogramObserver(quant_min=0, quant_max=255).to(device)
        fresh(x)
    torch.testing.assert_close(quantizer.scale.detach(), fresh.calculate_qparams()[0], rtol=0, atol=0)
    init.initialize(quantizer, torch.zeros(4, device=device), activations="lsq")
    assert quantizer.scale.item() == EPS
    init.initialize(quantizer, torch.zeros(0, device=device), activations="lsq+")
    assert quantizer.scale.item() == EPS  # an empty tensor says nothing


def test_torchao_face_keeps_what_it_was_given(device: torch.device) -> None:
    """torchao's class observes its first batch whatever the flags say; one that was initialised does not."""
    pt2e = pytest.importorskip("qkernels.modules.pt2e")
    quantizer = pt2e.LearnableFakeQuantize(pt2e.MinMaxObserver).to(device)
    init.initialize(quantizer, sample((8, 8), torch.float32, device), activations="mse")
    scale = quantizer.scale.detach().clone()
    quantizer.enable_range_learning()
    quantizer(sample((8, 8), torch.float32, device) * 100)
    assert torch.equal(quantizer.scale, scale)


def test_a_parameter_is_a_weight(device: torch.device) -> None:
    """Also where nothing is called weight_fake_quant: a functional layer."""
    kernel = nn.Parameter(sample((4, 6), torch.float32, device))
    quantizer = learnable_qconfig(4).weight().to(device)
    init.initialize(nn.Sequential(quantizer), kernel, weights="lsq", activations="observer")
    torch.testing.assert_close(quantizer.scale.detach(), init.lsq_scale(kernel, 7, 0), rtol=0, atol=0)


def test_errors_of_initialize(prepared: Any) -> None:
    model, x = prepared
    with pytest.raises(TypeError, match=r"initialize: model must be a torch\.nn\.Module; got int"):
        init.initialize(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"initialize: weights must be one of \('observer', .*\); got 'max'"):
        init.initialize(model, weights="max")
    with pytest.raises(ValueError, match=r"initialize: activations must be one of .*; got 'max'"):
        init.initialize(model, x, activations="max")
    before = [q.scale.clone() for name, q in quantizers(model).items() if "post_process" in name]
    with pytest.raises(RuntimeError):
        init.initialize(model, x[..., :1])  # the forward fails half way: no activation is touched
    after = [q.scale for name, q in quantizers(model).items() if "post_process" in name]
    assert all(map(torch.equal, before, after))
