"""QAT helpers for learned step sizes: qconfigs, preparation by both flows, parameter groups, the schedule."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.ao.quantization as stock
from torch import nn
from torch.ao.quantization.quantize_fx import convert_fx

import qkernels.modules as ours
from qkernels.modules import initializers as init
from qkernels.modules import learning
from qkernels.modules.learnable_core import SYMMETRIC
from tests.modules import support as s


class BasicBlock(nn.Module):
    """conv-bn-relu-conv-bn and a residual connection, as in ResNet."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(x + y)


class TransformerBlock(nn.Module):
    """Attention written by hand and an MLP, both behind layer norms and with residual connections."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.quant = stock.QuantStub()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.softmax = nn.Softmax(-1)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.quant(x)
        h = self.norm1(x)
        q, k, v = (
            layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        attention = self.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5) @ v
        x = x + self.out(attention.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norm2(x))


def conv_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5))


def eager_conv_net() -> nn.Sequential:
    """As the eager flow wants it: stubs, and batch norm fused by hand."""
    net = nn.Sequential(stock.QuantStub(), *conv_net(), stock.DeQuantStub())
    return stock.fuse_modules_qat(net, [["1", "2", "3"]])


def random(*shape: int, seed: int = 0, device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


MODELS: dict[str, tuple[Any, tuple[int, ...], bool]] = {
    "convolutions, FX": (conv_net, (6, 3, 5, 5), True),
    "convolutions, eager": (eager_conv_net, (6, 3, 5, 5), False),
    "one layer, FX": (lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU()), (6, 8), True),
    "residual block, FX": (BasicBlock, (6, 4, 5, 5), True),
    "transformer, eager": (TransformerBlock, (6, 5, 8), False),
}


def prepare(name: str, device: torch.device, bits: int = 4, **kwargs: Any) -> tuple[nn.Module, torch.Tensor]:
    """A prepared model, from the same state every time, and inputs for it."""
    make, shape, traced = MODELS[name]
    torch.manual_seed(1)
    x = random(*shape, device=device)
    with s.quiet():
        mapping = learning.learnable_qconfig_mapping(bits, 8)
        return learning.prepare_learnable(make().to(device), mapping, x if traced else None, **kwargs), x


def quantizers(model: nn.Module) -> dict[str, ours.LearnableFakeQuantize]:
    return {name: m for name, m in model.named_modules() if isinstance(m, ours.LearnableFakeQuantize)}


# ------------------------------------------------------------------------------------------ qconfigs


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_qconfig(bits: int, per_channel: bool, symmetric: bool) -> None:
    qconfig = learning.learnable_qconfig(bits, bits, per_channel=per_channel, activation_symmetric=symmetric)
    weight, activation = qconfig.weight(), qconfig.activation()
    assert type(weight) is type(activation) is ours.LearnableFakeQuantize
    half = 2 ** (bits - 1)
    assert (weight.quant_min, weight.quant_max, weight.dtype) == (-half, half - 1, torch.qint8)
    assert weight.qscheme == (torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric)
    assert (weight.ch_axis == 0) == per_channel
    codes = (-half, half - 1, torch.qint8) if symmetric else (0, 2 * half - 1, torch.quint8)
    assert (activation.quant_min, activation.quant_max, activation.dtype) == codes
    assert activation.qscheme == (torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine)
    assert (weight.grad_scale_elements, activation.grad_scale_elements) == ("channel", "sample")
    assert weight.use_grad_scaling and activation.use_grad_scaling
    assert isinstance(weight.activation_post_process, ours.MovingAveragePerChannelMinMaxObserver) == per_channel


def test_qconfig_passes_options_on() -> None:
    qconfig = learning.learnable_qconfig(grad_scale_elements="tensor", grad_mask="lsq", use_grad_scaling=False)
    for quantizer in (qconfig.weight(), qconfig.activation()):
        assert (quantizer.grad_scale_elements, quantizer.grad_mask) == ("tensor", "lsq")
        assert not quantizer.use_grad_scaling


def test_errors_of_qconfig() -> None:
    with pytest.raises(ValueError, match="learnable_qconfig: weight_bits must be from 2 to 8; got 1"):
        learning.learnable_qconfig(1)
    with pytest.raises(ValueError, match="learnable_qconfig: activation_bits must be from 1 to 8; got 9"):
        learning.learnable_qconfig(8, 9)
    with pytest.raises(ValueError, match="learnable_qconfig: activation_bits must be from 2 to 8; got 1"):
        learning.learnable_qconfig(8, 1, activation_symmetric=True)
    with pytest.raises(TypeError, match="learnable_qconfig: weight_bits must be an int; got float"):
        learning.learnable_qconfig(4.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"grad_mask must be one of .* got 'strict'"):
        learning.learnable_qconfig(grad_mask="strict")


def test_mapping_covers_what_torch_ao_s_does() -> None:
    mapping, theirs = learning.learnable_qconfig_mapping(4), stock.get_default_qat_qconfig_mapping()
    assert mapping.global_qconfig.weight().quant_max == 7
    assert set(theirs.object_type_qconfigs) < set(mapping.object_type_qconfigs)
    assert mapping.object_type_qconfigs[nn.Embedding] is None
    transposed = mapping.object_type_qconfigs[nn.ConvTranspose2d].weight()
    assert (transposed.quant_max, transposed.qscheme) == (7, torch.per_tensor_symmetric)
    assert isinstance(mapping.object_type_qconfigs[nn.LayerNorm].activation(), ours.LearnableFakeQuantize)
    assert isinstance(mapping.object_type_qconfigs[nn.Softmax].activation(), ours.FixedQParamsFakeQuantize)


# ------------------------------------------------------------------------------------------ preparation


@pytest.mark.parametrize("name", MODELS)
def test_prepare(name: str, device: torch.device) -> None:
    """The argument is untouched; weights are initialised and learn, activations observe; the hooks are ours."""
    make, _, traced = MODELS[name]
    torch.manual_seed(1)
    model = make().to(device).eval() if traced else make().to(device)
    before, classes = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    mode, x = model.training, prepare(name, device)[1]
    with s.quiet():
        mapping = learning.learnable_qconfig_mapping(4)
        prepared = learning.prepare_learnable(model, mapping, (x,) if traced else None)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [type(m) for m in model.modules()] == classes and model.training is mode and prepared.training
    assert not any(hasattr(m, "qconfig") for m in model.modules())

    weights = dict(init.quantized_weights(prepared))
    assert len(weights) == sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules())
    for quantizer, weight in weights.items():
        torch.testing.assert_close(quantizer.scale.detach(), init.lsq_scale(weight, 7, 0), rtol=0, atol=0)
        assert quantizer.activation_post_process.min_val.shape == quantizer.scale.shape
        assert (quantizer.static_enabled.item(), quantizer.gradient_enabled.item()) == (0, 1)
    activations = [q for q in quantizers(prepared).values() if q not in weights]
    assert activations and all(q.static_enabled.item() for q in activations)
    assert all(p.device == x.device for p in prepared.parameters())
    report = ours.swap(prepared)
    assert not (report.swapped or report.left or report.hooks)  # it was swapped already
    prepared(x).sum().backward()
    for quantizer, weight in weights.items():
        assert torch.equal(quantizer.scale.detach(), init.lsq_scale(weight, 7, 0))  # not observed over
        assert quantizer.scale.grad.abs().sum() > 0


def test_prepare_without_initialisation_leaves_weights_observing(device: torch.device) -> None:
    model, _ = prepare("convolutions, FX", device, weight_init=None)
    assert all(q.static_enabled.item() and q.scale.eq(1).all() for q in quantizers(model).values())
    assert sorted(q.scale.numel() for q, _ in init.quantized_weights(model)) == [4, 5]
    mse, _ = prepare("convolutions, FX", device, weight_init="mse")
    for quantizer, weight in init.quantized_weights(mse):
        assert torch.equal(quantizer.scale, init.mse_qparams(weight, -8, 7, 0, True)[0])


def test_names_and_types_of_the_mapping_count_in_the_eager_flow(device: torch.device) -> None:
    mapping = stock.QConfigMapping().set_global(learning.learnable_qconfig(8)).set_module_name("mlp", None)
    mapping.set_object_type(nn.LayerNorm, None).set_module_name("query", learning.learnable_qconfig(2))
    with s.quiet():
        model = learning.prepare_learnable(TransformerBlock().to(device), mapping)
    found = {
        name.rsplit(".", 1)[0]: q.quant_max for name, q in quantizers(model).items() if name.endswith("fake_quant")
    }
    assert found == {"query": 1, "key": 127, "value": 127, "out": 127}
    assert not any(name.startswith("norm") for name in quantizers(model))


def test_functional_weights_of_a_traced_model(device: torch.device) -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ParameterDict({"kernel": nn.Parameter(random(4, 6))})
            self.kernel = nn.Parameter(random(6, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.kernel)

    x = random(2, 3, device=device)
    with s.quiet():
        model = learning.prepare_learnable(Functional().to(device), learning.learnable_qconfig_mapping(4), x)
    ((quantizer, weight),) = init.quantized_weights(model)
    assert weight.shape == (6, 3) and quantizer.scale.shape == (6,)
    assert torch.equal(quantizer.scale, init.lsq_scale(weight, 7, 0))
    torch.compile(model, fullgraph=True, backend="aot_eager")(x)


def test_errors_of_prepare() -> None:
    mapping = learning.learnable_qconfig_mapping()
    with pytest.raises(TypeError, match=r"prepare_learnable: model must be a torch\.nn\.Module; got str"):
        learning.prepare_learnable("model", mapping)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="prepare_learnable: qconfig_mapping must be a QConfigMapping; got QConfig"):
        learning.prepare_learnable(conv_net(), learning.learnable_qconfig())  # type: ignore[arg-type]
    with s.quiet(), pytest.raises(ValueError, match="put no learnable quantizer on the model"):
        learning.prepare_learnable(conv_net(), stock.QConfigMapping())
    with pytest.raises(ValueError, match=r"initialize: weights must be one of .* got 'max'"), s.quiet():
        learning.prepare_learnable(conv_net(), mapping, random(1, 3, 5, 5), weight_init="max")
    regex = learning.learnable_qconfig_mapping().set_module_name_regex("mlp.*", None)
    with pytest.raises(NotImplementedError, match="prepare_learnable: module_name_regex_qconfigs need example_inputs"):
        learning.prepare_learnable(conv_net(), regex)


@pytest.mark.parametrize("name", ["convolutions, FX", "convolutions, eager"])
def test_conversion_keeps_what_was_learned(name: str) -> None:
    """torch.ao's int8 model has the learned scales and gives the fake quantized model's output, but for rare ties."""
    model, x = prepare(name, torch.device("cpu"), bits=8)
    schedule = learning.LearningSchedule(model, 2)
    optimizer = torch.optim.SGD(learning.parameter_groups(model, qparam_lr=1e-3), lr=0.01, momentum=0.9)
    for _ in range(6):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    ours.freeze(model.eval())
    expected = model(x)
    activations = [q for q in quantizers(model).values() if q.dtype == torch.quint8]
    with s.quiet():
        converted = convert_fx(model) if "FX" in name else stock.convert(model)
    step = activations[-1].scale.item()
    linear = converted.get_submodule("4" if "FX" in name else "5")
    assert linear.scale == step and linear.zero_point == activations[-1].zero_point.round().item()
    steps = (converted(x) - expected).div(step).abs()
    assert steps.max() < 1.01 and (steps > 0.01).float().mean() < 0.1


# ------------------------------------------------------------------------------------------ parameter groups


@pytest.mark.parametrize("name", MODELS)
def test_groups_partition_the_parameters(name: str, device: torch.device) -> None:
    model, _ = prepare(name, device)
    groups = learning.parameter_groups(model, lr=0.1, weight_decay=1e-4, qparam_lr=0.01)
    assert [{key: value for key, value in group.items() if key != "params"} for group in groups] == [
        {"lr": 0.1, "weight_decay": 1e-4},
        {"lr": 0.01, "weight_decay": 0.0},
    ]
    others, learned = ([id(p) for p in group["params"]] for group in groups)
    symmetric = {id(q.zero_point) for q in quantizers(model).values() if q.qscheme in SYMMETRIC}
    everything = {id(p) for p in model.parameters()}
    assert len(others) + len(learned) == len({*others, *learned})  # each once
    assert {*others, *learned} == everything - symmetric and symmetric
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[i].split(".")[-1] for i in learned} == {"scale", "zero_point"}
    assert {names[i].split(".")[-1] for i in others} == {"weight", "bias"}
    torch.optim.AdamW(groups)


def test_groups_of_shared_quantizers_and_defaults() -> None:
    shared = ours.LearnableFakeQuantize(ours.MinMaxObserver)
    tied = ours.LearnableFakeQuantize(ours.MinMaxObserver)
    tied.scale = shared.scale
    model = nn.Sequential(shared, nn.Linear(2, 2), shared, tied)
    others, learned = learning.parameter_groups(model)
    assert set(others) == {"params"} and learned["weight_decay"] == 0.0 and "lr" not in learned
    assert len(others["params"]) == 2
    assert [id(p) for p in learned["params"]] == [id(p) for p in (shared.scale, shared.zero_point, tied.zero_point)]
    optimizer = torch.optim.AdamW(learning.parameter_groups(model, qparam_weight_decay=None), weight_decay=0.5)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.5]
    assert [len(g["params"]) for g in learning.parameter_groups(nn.Linear(2, 2))] == [2, 0]
    with pytest.raises(TypeError, match=r"parameter_groups: model must be a torch\.nn\.Module; got list"):
        learning.parameter_groups([])  # type: ignore[arg-type]
