"""torch.compile(fullgraph=True) of the learnable modules: one graph over every change of stage, eager's numbers.

The networks are elementwise after quantization, so that in float32 Inductor has nothing to reorder: outputs, dx and
state are compared bit for bit with eager ours, the sums of scale and zero point within 1e-6 of their terms. Where
nothing is learned eager gives no gradient, and a graph gives zeros.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from tests.modules import support as s
from tests.modules.learnable_support import EACH_CASE, EACH_FACE, NEEDS_TORCHAO, Case, dy_like, take_parameters
from tests.modules.test_compile import HOST_READS, Recorder
from tests.modules.test_learnable_gradients import reference
from tests.oracles_learnable import assert_sum_close

STAGES = {
    "torch.ao": (
        lambda m: m.enable_static_estimate(),
        lambda m: m.enable_param_learning(),
        lambda m: m.toggle_fake_quant(False),
        lambda m: m.enable_static_observation(),
        lambda m: m.enable_param_learning(),
        lambda m: m.toggle_observer_update(True),
        lambda m: m.static_enabled.zero_(),
        lambda m: m.enable_static_estimate(),
    ),
    "torchao": (
        lambda m: m.enable_observer(),
        lambda m: m.enable_range_learning(),
        lambda m: m.disable_fake_quant(),
        lambda m: m.disable_range_learning(),
        lambda m: m.enable_fake_quant(),
        lambda m: m.enable_range_learning(),
        lambda m: m.observer_enabled.fill_(1),
        lambda m: m.enable_observer(),
    ),
}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


class Block(torch.nn.Module):
    """An activation per tensor and a weight per channel, both learned, and an affine weight along axis 1."""

    def __init__(self, face: str, device: torch.device) -> None:
        super().__init__()
        self.act = Case(face, use_grad_scaling=True).mine(device)
        self.symmetric = Case(face, True, True, 4, channels=6, use_grad_scaling=True).mine(device, channel_len=6)
        self.affine = Case(face, True, axis=1).mine(device, channel_len=8)
        g = torch.Generator().manual_seed(1)
        self.w = torch.nn.Parameter(torch.randn(6, 8, generator=g).to(device))
        self.v = torch.nn.Parameter(torch.randn(6, 8, generator=g).to(device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(x) * self.symmetric(self.w) + torch.relu(self.affine(self.v))

    def quantizers(self) -> tuple[Any, ...]:
        return self.act, self.symmetric, self.affine


def blocks(face: str, device: torch.device) -> tuple[Block, Block]:
    block = Block(face, device)
    block(batch(50, device))
    return block, copy.deepcopy(block)


def batch(seed: int, device: torch.device) -> torch.Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(seed)).to(device) * (1 + seed % 3)


def step(call: Any, block: Block, seed: int, device: torch.device) -> list[torch.Tensor]:
    block.zero_grad()
    x = batch(seed, device).requires_grad_()
    y = call(x)
    y.backward(dy_like(y).to(device))
    return [y, x.grad, block.w.grad, block.v.grad]


def check_step(compiled: Any, block: Block, twin: Block, seed: int, device: torch.device) -> None:
    """One step of both; then an optimizer step of the eager one, and its parameters in both."""
    results = zip(step(compiled, block, seed, device), step(twin, twin, seed, device), strict=True)
    for name, (a, b) in zip(("y", "dx", "dw", "dv"), results, strict=True):
        s.check_same(a, b.cpu(), f"{name} at step {seed}")
    for (name, a), b in zip(block.named_buffers(), twin.buffers(), strict=True):
        s.check_same(a, b.cpu(), f"{name} at step {seed}")
    for q, q_ref in zip(block.quantizers(), twin.quantizers(), strict=True):
        for name in ("scale", "zero_point"):
            a, b = getattr(q, name), getattr(q_ref, name)
            s.check_bits(a, b.cpu(), f"{name} at step {seed}")
            if b.grad is None:
                assert a.grad is None or not a.grad.any(), f"{name} does not learn at step {seed}"
                continue
            magnitude = a.grad.abs().max().double() + 1.0  # terms are at most 255 * |dy|, 48 of them
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=2e-5 * float(magnitude))
            with torch.no_grad():
                b -= 0.01 * b.grad / (1 + b.grad.abs()) * (b.abs() if name == "scale" else 1)
        take_parameters(q, q_ref)


@pytest.mark.parametrize(
    ("face", "backend"),
    [
        ("torch.ao", "aot_eager"),
        ("torch.ao", "inductor"),
        pytest.param("torchao", "aot_eager", marks=NEEDS_TORCHAO),
    ],
)
def test_one_graph_over_all_stages(face: str, backend: str, device: torch.device) -> None:
    """Methods and flags written in place, of each quantizer at another time."""
    block, twin = blocks(face, device)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3 * len(STAGES[face])):
            for model in (block, twin):
                STAGES[face][seed // 3](model.quantizers()[seed % 3])
            check_step(compiled, block, twin, seed, device)
    assert counter.frame_count == 1
    assert not counters["graph_break"]


@EACH_CASE
def test_zeros_where_it_does_not_learn(case: Case, device: torch.device) -> None:
    """And the float64 reference's gradients where it does, by the same graph."""
    channels = {"channel_len": case.channels} if case.per_channel else {}
    mine = case.mine(device, **channels)
    mine(case.batch(0).to(device))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(mine, fullgraph=True, backend=counter)
    for learning in (True, False, True, False):
        mine.set_stage(observing=False, learning=learning)
        mine.zero_grad()
        x = case.batch(1, 1.5)
        y = compiled(x.to(device).requires_grad_())
        y.backward(dy_like(x).to(device))
        want = reference(mine, x)
        if learning:
            assert_sum_close(mine.scale.grad, want.dscale, want.dscale_terms)
            assert_sum_close(mine.zero_point.grad, want.dzero_point, want.dzero_point_terms)
        else:
            for parameter in mine.parameters():
                assert parameter.grad is not None and not parameter.grad.any()
    assert counter.frame_count == 1


@EACH_FACE
def test_the_graph_decides_its_stage(face: str, device: torch.device) -> None:
    """set_stage with tensors, inside the graph: observe two steps, then learn. No host read, one graph."""
    block, twin = blocks(face, device)
    recorder = Recorder()

    def scheduled(model: Block, x: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        for q in model.quantizers():
            q.set_stage(observing=number < 2, learning=number >= 2)
        return model(x)

    compiled = torch.compile(scheduled, fullgraph=True, backend=recorder)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(5):
            number = torch.tensor(seed, device=device)
            check_step(lambda x, n=number: compiled(block, x, n), block, twin_at(twin, seed), seed, device)
            assert all(bool(q.learning_enabled) == (seed >= 2) for q in block.quantizers())
    assert len(recorder.captured) == 3  # Dynamo's, forward, backward
    reads = [t for t in recorder.targets() if any(word == t or word in t.split(".") for word in HOST_READS)]
    assert not reads, reads


def twin_at(twin: Block, seed: int) -> Block:
    for q in twin.quantizers():
        q.set_stage(observing=seed < 2, learning=seed >= 2)
    return twin


@pytest.mark.skipif(
    torch.__version__ < "2.12",
    reason="torch 2.11's AOTAutograd gives a history to Parameters without requires_grad that a graph writes",
)
def test_toggle_qparam_learning_recompiles_once_each_way(device: torch.device) -> None:
    """Documented: it sets requires_grad, which a graph is specialized on. Both graphs are kept."""
    mine = Case().mine(device)
    mine(batch(0, device))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(mine, fullgraph=True, backend=counter)
    for learning in (True, False, True, False):
        mine.toggle_qparam_learning(learning)
        mine.zero_grad()
        compiled(batch(1, device).requires_grad_()).sum().backward()
        assert (mine.scale.grad is not None) == learning
    assert counter.frame_count == 2


@EACH_FACE
def test_unknown_channels_raise_the_documented_error(face: str, device: torch.device) -> None:
    """And the state is as it was; with channel_len, a first batch or a checkpoint it compiles."""
    case = Case(face, True, axis=1)
    mine = case.mine(device)
    before = s.snapshot(mine)
    x = case.batch(0).to(device)
    with pytest.raises(Exception, match="number of channels is unknown in a compiled forward; give channel_len"):
        torch.compile(mine, fullgraph=True, backend="aot_eager")(x)
    s.check_untouched(mine, before)
    assert mine.scale.shape == (1,)
    source = case.mine(device)
    source(x)
    loaded, given = case.mine(device), case.mine(device, channel_len=3)
    loaded.load_state_dict(source.state_dict())
    mine(x)
    for ready in (mine, loaded, given):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(ready, fullgraph=True, backend=counter)
        for seed in range(2):
            twin = copy.deepcopy(ready)
            s.check_bits(compiled(case.batch(seed).to(device)), twin(case.batch(seed).to(device)).cpu(), "y")
        assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("per_channel", "elements"), [(False, "tensor"), (False, "sample"), (True, "tensor"), (True, "channel")]
)
def test_dynamic_batch_size_with_grad_scaling(per_channel: bool, elements: str, device: torch.device) -> None:
    """The factor depends on the batch size. One recompilation at most: from a fixed size to a dynamic one."""
    case = Case(per_channel=per_channel, axis=1, channels=4, use_grad_scaling=True)
    extra = {"channel_len": 4} if per_channel else {}
    mine = case.mine(device, grad_scale_elements=elements, **extra)
    mine(torch.randn(3, 4, device=device))
    mine.enable_param_learning()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(mine, fullgraph=True, backend=counter)
    for rows in (5, 17, 3, 64, 33):
        x = torch.randn(rows, 4)
        mine.zero_grad()
        y = compiled(x.to(device))
        y.backward(dy_like(x).to(device))
        count = {"tensor": rows * 4, "channel": rows if per_channel else rows * 4, "sample": 4}[elements]
        want = reference(mine, x, 1.0 / (count * 255) ** 0.5)
        assert_sum_close(mine.scale.grad, want.dscale, want.dscale_terms, f"{rows} rows")
        assert_sum_close(mine.zero_point.grad, want.dzero_point, want.dzero_point_terms, f"{rows} rows")
    assert counter.frame_count <= 2


@EACH_FACE
def test_frozen_and_memoryless_compile(face: str, device: torch.device) -> None:
    for kind in ("frozen", "memoryless"):
        torch._dynamo.reset()
        case = Case(face, True, True, axis=1)
        mine = case.mine(device, channel_len=3, **({"memoryless": True} if kind == "memoryless" else {}))
        mine(case.batch(0).to(device))
        if kind == "frozen":
            mine.freeze()
        twin = copy.deepcopy(mine)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(mine, fullgraph=True, backend=counter)
        for seed in range(3):
            x = case.batch(seed, 3.0 - seed).to(device)
            s.check_bits(compiled(x), twin(x).cpu(), f"y, {kind}")
        for (name, a), b in zip(mine.named_buffers(), twin.buffers(), strict=True):
            s.check_same(a, b.cpu(), f"{name}, {kind}")
        assert counter.frame_count == 1


@EACH_FACE
def test_training_and_inference_compiled(face: str, device: torch.device) -> None:
    """An optimizer between the steps moves scales and zero points in place: the graph reads them, as eager does."""
    block, twin = blocks(face, device)
    losses = []
    for model, compiled in ((block, True), (twin, False)):
        for q in model.quantizers():
            q.enable_range_learning() if face == "torchao" else q.enable_param_learning()
        optim = torch.optim.Adam(model.parameters(), lr=1e-3)
        counter = CompileCounterWithBackend("aot_eager")
        call = torch.compile(model, fullgraph=True, backend=counter) if compiled else model
        values = []
        for seed in range(6):
            optim.zero_grad()
            loss = call(batch(seed, device)).square().mean()
            loss.backward()
            optim.step()
            values.append(loss.item())
        losses.append(values)
        assert counter.frame_count == int(compiled)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    with torch.no_grad():
        expected = twin(batch(9, device))
        block.load_state_dict(twin.state_dict())
        y = torch.compile(block, fullgraph=True, backend="aot_eager")(batch(9, device))
        s.check_bits(y, expected.cpu(), "y without gradients")


@pytest.mark.skipif(
    torch.__version__ < "2.12", reason="torch 2.11 copies written Parameters after the graph all the same"
)
@EACH_FACE
def test_qparams_are_written_in_the_graph(face: str, device: torch.device) -> None:
    """Not by copies that AOTAutograd makes after it, one per Parameter and step: a launch each on a GPU."""
    block, _ = blocks(face, device)
    compiled, x = torch.compile(block, fullgraph=True), batch(1, device)
    compiled(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        compiled(x)
    calls = [[event.name, *_callers(event)] for event in profile.events()]
    assert any("CompiledFxGraph" in name for call in calls for name in call)  # else there is nothing to look at
    assert [call for call in calls if call[0] == "aten::copy_" and "CompiledFxGraph" not in " ".join(call)] == []


def _callers(event: Any) -> Iterator[str]:
    while event.cpu_parent is not None:
        event = event.cpu_parent
        yield event.name


def test_export_shows_the_operators(device: torch.device) -> None:
    """At the top level, where those who look for them look: not in a submodule of what runs under no_grad."""
    module = Case("torch.ao").mine(device)
    program = torch.export.export(module, (batch(1, device),))
    names = [node.name for node in program.graph.nodes if node.op == "call_function"]
    assert {"update_qparams_", "learnable_fake_quantize"} <= set(names)
