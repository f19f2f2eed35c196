"""torch.compile(fullgraph=True): one graph, no recompilation when flags are toggled, no host reads, eager's numbers.

The networks here are elementwise after quantization (no matrix product, no broadcast weight), so that in float32
Inductor has nothing to reorder: outputs, gradients and state are compared bit for bit with eager ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.ao.quantization as stock
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

import qkernels.modules as ours
from tests.modules import support as s

SHAPE = (6, 8)
WEIGHT = {"quant_min": -128, "quant_max": 127, "dtype": torch.qint8, "qscheme": torch.per_channel_symmetric}
HOST_READS = ("_local_scalar_dense", "item", "is_nonzero", "tolist", "_to_copy_to_cpu", "nonzero", "equal.default")
Backend = str | Callable[..., Any]


class Net(torch.nn.Module):
    """Two quantized layers: activations per tensor, weights per channel, observers of every kind in between."""

    def __init__(self, library: Any) -> None:
        super().__init__()
        self.input = library.FakeQuantize()
        self.weight = library.FakeQuantize(observer=library.PerChannelMinMaxObserver, **WEIGHT)
        self.seen = torch.nn.Sequential(
            library.MinMaxObserver(),
            library.MovingAverageMinMaxObserver(),
            library.PerChannelMinMaxObserver(ch_axis=1),
            library.MovingAveragePerChannelMinMaxObserver(ch_axis=-1),
        )
        self.hidden = library.FusedMovingAvgObsFakeQuantize()
        self.weight2 = library.FusedMovingAvgObsFakeQuantize(
            observer=library.MovingAveragePerChannelMinMaxObserver, **WEIGHT
        )
        g = torch.Generator().manual_seed(1)
        self.w = torch.nn.Parameter(torch.randn(SHAPE, generator=g))
        self.w2 = torch.nn.Parameter(torch.randn(SHAPE, generator=g))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.input(x) * self.weight(self.w))
        h = self.hidden(self.seen(h) * 0.5)
        return h * self.weight2(self.w2)

    def quantizers(self) -> list[torch.nn.Module]:
        return [self.input, self.weight, self.hidden, self.weight2]


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


def nets(device: torch.device, shaped: bool = True) -> tuple[Net, Net]:
    """Two equal networks; `shaped`: per-channel state has its shape already, as after loading a checkpoint."""
    net = Net(ours).to(device)
    if shaped:
        net(batch(99, device))
    return net, copy.deepcopy(net)


def batch(seed: int, device: torch.device, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * (1 + seed)
    return x.to(device)


def toggle(net: Net, step: int) -> None:
    """Every way users toggle flags in place: methods, apply, and writes into the buffers."""
    if step == 1:
        net.input.disable_fake_quant()
    elif step == 2:
        net.apply(stock.enable_fake_quant)
        net.apply(stock.disable_observer)
    elif step == 3:
        net.hidden.fake_quant_enabled.zero_()
        net.weight.observer_enabled[0] = 1
    elif step == 4:
        for quantizer in net.quantizers():
            quantizer.fake_quant_enabled.fill_(0)
            quantizer.observer_enabled.copy_(torch.ones(1))
    elif step == 5:
        net.apply(stock.enable_fake_quant)


def step_of(
    call: Callable[[torch.Tensor], torch.Tensor], net: Net, seed: int, device: torch.device
) -> list[torch.Tensor]:
    net.zero_grad()
    x = batch(seed, device).requires_grad_()
    y = call(x)
    y.backward(torch.linspace(-1, 1, y.numel(), device=device).reshape(y.shape))
    return [y, x.grad, net.w.grad, net.w2.grad]


def check_steps(compiled: Any, net: Net, twin: Net, device: torch.device, steps: range) -> None:
    for step in steps:
        toggle(net, step)
        toggle(twin, step)
        results = step_of(compiled, net, step, device)
        for name, a, b in zip(("y", "dx", "dw", "dw2"), results, step_of(twin, twin, step, device), strict=True):
            s.check_bits(a, b.cpu(), f"{name} at step {step}")
        for (name, a), b in zip(net.named_buffers(), twin.buffers(), strict=True):
            s.check_same(a, b.cpu(), f"{name} at step {step}")


def graphs() -> int:
    assert not counters["graph_break"], dict(counters["graph_break"])
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_training_is_one_graph_whatever_the_flags(backend: str, device: torch.device) -> None:
    net, twin = nets(device)
    with torch._dynamo.config.patch(error_on_recompile=True):
        check_steps(torch.compile(net, fullgraph=True, backend=backend), net, twin, device, range(7))
    assert graphs() == 1


@pytest.mark.parametrize("mode", ["eval", "no_grad"])
def test_without_training_is_one_graph_too(mode: str, device: torch.device) -> None:
    """As in torch.ao, eval() changes nothing: flags decide. Without gradients the graph is another, once."""
    net, twin = nets(device)
    net.train(mode != "eval")
    twin.train(mode != "eval")
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True), torch.set_grad_enabled(mode == "eval"):
        for step in range(6):
            toggle(net, step)
            toggle(twin, step)
            s.check_bits(compiled(batch(step, device)), twin(batch(step, device)).cpu(), f"y at step {step}")
    for (name, a), b in zip(net.named_buffers(), twin.buffers(), strict=True):
        s.check_same(a, b.cpu(), name)
    assert graphs() == 1


def test_per_channel_state_is_shaped_by_the_first_compiled_batch(device: torch.device) -> None:
    """From shape (0,) under fullgraph: a second graph, for the shaped state, is all it costs."""
    net, twin = nets(device, shaped=False)
    assert net.weight.activation_post_process.min_val.numel() == 0
    check_steps(torch.compile(net, fullgraph=True, backend="aot_eager"), net, twin, device, range(7))
    assert net.weight.activation_post_process.min_val.shape == net.weight.scale.shape == (6,)
    assert graphs() <= 2
    reference = Net(stock)
    reference.load_state_dict(net.cpu().state_dict(), strict=True)


class Recorder:
    """A backend that keeps Dynamo's graph and AOTAutograd's forward and backward graphs."""

    def __init__(self) -> None:
        self.captured: list[torch.fx.GraphModule] = []

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        self.captured.append(gm)

        def keep(inner: torch.fx.GraphModule, inputs: list[Any]) -> Any:
            self.captured.append(inner)
            return make_boxed_func(inner.forward)

        return aot_autograd(fw_compiler=keep, bw_compiler=keep)(gm, example_inputs)

    def targets(self) -> list[str]:
        return [str(n.target) for g in self.captured for n in g.graph.nodes if n.op.startswith("call")]


def test_graphs_hold_no_host_reads(device: torch.device) -> None:
    """fullgraph alone does not say so: Dynamo captures `item` into the graph."""
    net, twin = nets(device)
    recorder = Recorder()
    check_steps(torch.compile(net, fullgraph=True, backend=recorder), net, twin, device, range(2))
    assert len(recorder.captured) == 3  # Dynamo's, forward, backward
    reads = [t for t in recorder.targets() if any(word == t or word in t.split(".") for word in HOST_READS)]
    assert not reads, reads


def test_the_search_for_host_reads_finds_one(device: torch.device) -> None:
    recorder = Recorder()

    @torch.compile(fullgraph=True, backend=recorder)
    def reads(x: torch.Tensor) -> torch.Tensor:
        return x * x.sum().item()

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        reads(torch.ones(3, device=device))
    assert any(word in t.split(".") for t in recorder.targets() for word in HOST_READS)


def test_batch_size_is_dynamic(device: torch.device) -> None:
    """Activations of any batch size go through one graph."""
    act = torch.nn.Sequential(ours.FakeQuantize(), ours.MinMaxObserver(), ours.FusedMovingAvgObsFakeQuantize()).to(
        device
    )
    twin = copy.deepcopy(act)
    compiled = torch.compile(act, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (5, 17, 3, 64):
        x = batch(n, device, (n, 4))
        s.check_bits(compiled(x), twin(x).cpu(), f"y of {n} rows")
    assert graphs() == 1


@pytest.mark.parametrize("name", s.OBSERVERS)
def test_calculate_qparams_in_a_compiled_function(name: str, device: torch.device) -> None:
    schemes = s.PER_CHANNEL_SCHEMES if s.is_per_channel(name) else s.PER_TENSOR_SCHEMES
    for qscheme in schemes:
        torch._dynamo.reset()
        counters.clear()
        mine, theirs = s.pair(name, device, qscheme=qscheme, dtype=torch.qint8)
        mine(batch(0, device))
        theirs(batch(0, torch.device("cpu")))

        @torch.compile(fullgraph=True, backend="aot_eager")
        def observe_and_ask(x: torch.Tensor, observer: torch.nn.Module = mine) -> tuple[torch.Tensor, torch.Tensor]:
            observer(x)
            return observer.calculate_qparams()

        scale, zero_point = observe_and_ask(batch(1, device))
        theirs(batch(1, torch.device("cpu")))
        scale_ref, zero_point_ref = theirs.calculate_qparams()
        s.check_same(scale, scale_ref, "scale")
        s.check_same(zero_point, zero_point_ref, "zero_point")
        s.check_state(mine, theirs)
        assert graphs() == 1


@pytest.mark.parametrize("name", s.FAKE_QUANTIZERS)
def test_fake_quantizers_calculate_qparams_in_a_compiled_function(name: str, device: torch.device) -> None:
    mine, theirs = s.fq_pair(name, "MovingAverageMinMaxObserver", device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def quantize_and_ask(x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        return mine(x), mine.calculate_qparams()

    y, (scale, zero_point) = quantize_and_ask(batch(1, device))
    s.check_bits(y, theirs(batch(1, torch.device("cpu"))), "y")
    scale_ref, zero_point_ref = theirs.calculate_qparams()
    s.check_same(scale, scale_ref, "scale")
    s.check_same(zero_point, zero_point_ref, "zero_point")


def test_consistent_qparams_compiles(device: torch.device) -> None:
    net = torch.nn.Sequential(
        ours.FusedMovingAvgObsFakeQuantize(
            consistent_qparams=True,
            quant_min=-128,
            quant_max=127,
            dtype=torch.qint8,
            qscheme=torch.per_tensor_symmetric,
        ),
        ours.FusedMovingAvgObsFakeQuantize(
            observer=ours.MovingAveragePerChannelMinMaxObserver, consistent_qparams=True, ch_axis=1, **WEIGHT
        ),
    ).to(device)
    twin = copy.deepcopy(net)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        s.check_bits(compiled(batch(seed, device)), twin(batch(seed, device)).cpu(), "y")
    assert torch.equal(net[1].scale, net[1].calculate_qparams()[0])
    assert graphs() <= 2


@pytest.mark.parametrize("name", [*s.OBSERVERS, *s.FAKE_QUANTIZERS])
def test_torch_aos_own_modules_break_the_graph(name: str) -> None:
    """What this project is for; when this fails, torch.ao compiles and the documentation is out of date."""
    compiled = torch.compile(getattr(stock, name)(), fullgraph=True, backend="eager")
    with pytest.raises((torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError)):
        compiled(torch.randn(3, 4))
