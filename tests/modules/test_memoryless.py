"""memoryless=True of torch.ao 1.12: every batch forgets the earlier ones. The reference is that code, written out."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
from typing import Any

import pytest
import torch
import torch.ao.quantization as stock
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.utils import counters

import qkernels.modules as ours
from tests.modules import support as s

NAMES = ("MinMaxObserver", "PerChannelMinMaxObserver")


class MinMax112(stock.MinMaxObserver):
    """forward of torch.ao 1.12's MinMaxObserver(memoryless=True)."""

    def forward(self, x_orig: torch.Tensor) -> torch.Tensor:
        if x_orig.numel() == 0:
            return x_orig
        self.reset_min_max_vals()
        x = x_orig.detach().to(self.min_val.dtype)
        low, high = torch.aminmax(x)
        self.min_val.copy_(torch.min(low, self.min_val))
        self.max_val.copy_(torch.max(high, self.max_val))
        return x_orig


class PerChannel112(stock.PerChannelMinMaxObserver):
    """The same per channel: the reset forgets the number of channels too."""

    def forward(self, x_orig: torch.Tensor) -> torch.Tensor:
        if x_orig.numel() == 0:
            return x_orig
        self.reset_min_max_vals()
        x = x_orig.detach().transpose(0, self.ch_axis).to(self.min_val.dtype).flatten(1)
        low, high = torch.aminmax(x, dim=1)
        self.min_val.resize_(low.shape)
        self.max_val.resize_(high.shape)
        self.min_val.copy_(low)
        self.max_val.copy_(high)
        return x_orig


REFERENCE = {"MinMaxObserver": MinMax112, "PerChannelMinMaxObserver": PerChannel112}


@pytest.fixture(params=["qkernels.modules", "qkernels.modules.pt2e"])
def library(request: pytest.FixtureRequest) -> Any:
    if request.param.endswith("pt2e"):
        pytest.importorskip("torchao.quantization.pt2e", reason="torchao is not installed (extra: torchao)")
    return importlib.import_module(request.param)


@pytest.mark.parametrize("name", NAMES)
def test_keyword_after_the_stock_arguments(name: str, library: Any) -> None:
    found = list(inspect.signature(getattr(library, name)).parameters.values())
    names = [p.name for p in found if p.kind is not p.VAR_KEYWORD]
    assert names == [*list(inspect.signature(getattr(stock, name)).parameters)[:-1], "memoryless"]
    assert next(p for p in found if p.name == "memoryless").default is False
    assert getattr(library, name)().memoryless is False
    assert getattr(library, name)(memoryless=True).memoryless is True
    assert getattr(library, name).with_args(memoryless=True)().memoryless is True


@pytest.mark.parametrize("name", ["MovingAverageMinMaxObserver", "MovingAveragePerChannelMinMaxObserver"])
def test_moving_averages_refuse_it(name: str, library: Any) -> None:
    """There a weight of 1 says the same; an argument that is taken and ignored would be a trap."""
    with pytest.raises(TypeError, match="memoryless"):
        getattr(library, name)(memoryless=True)


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, dict[str, Any], list[Any]]:
    name = draw(st.sampled_from(NAMES))
    kwargs = draw(s.observer_kwargs(name))
    axis = 0
    if s.is_per_channel(name):
        axis = kwargs["ch_axis"] = draw(st.sampled_from((0, 1, -1)))
    steps = []
    for _ in range(draw(st.integers(2, 3 if s.INTERPRETER else 6))):
        channels = draw(st.integers(1, 4)) if s.is_per_channel(name) else None
        steps.append(draw(s.batches(channels, axis, tuple(s.KINDS), (*s.FLOATS, torch.int32))))
        if draw(st.integers(0, 5)) == 0:
            steps.append(draw(st.sampled_from(("reset", "copy", "pickle"))))
    return name, kwargs, steps


@pytest.mark.interpreter
@s.property_settings(150, 8)
@given(case=cases())
def test_observers_equal_the_reference(case: tuple[str, dict[str, Any], list[Any]], device: torch.device) -> None:
    """Any values, any channel count from batch to batch; an empty batch forgets nothing."""
    name, kwargs, steps = case
    with s.quiet():
        mine = getattr(ours, name)(memoryless=True, **kwargs).to(device)
        theirs = REFERENCE[name](**kwargs)
    s.check_state(mine, theirs)
    for step in steps:
        if isinstance(step, s.Batch):
            x = step.tensor()
            given_x = x.to(device)
            assert mine(given_x) is given_x
            theirs(x)
        elif step == "reset":
            mine.reset_min_max_vals()
            theirs.reset_min_max_vals()
        else:
            mine = copy.deepcopy(mine) if step == "copy" else pickle.loads(pickle.dumps(mine))
        s.check_state(mine, theirs)
        s.check_qparams(mine, theirs)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", NAMES)
def test_the_second_batch_forgets_the_first(name: str, library: Any, device: torch.device) -> None:
    """The point of it, with numbers by hand; without the argument the range keeps growing."""
    wide, narrow = torch.tensor([[-8.0, 8.0], [-4.0, 2.0]]), torch.tensor([[-1.0, 0.5], [0.0, 0.25]])
    for memoryless in (False, True):
        observer = getattr(library, name)(memoryless=memoryless).to(device)
        observer(wide.to(device))
        observer(narrow.to(device))
        lows = {"MinMaxObserver": (-8.0, -1.0), "PerChannelMinMaxObserver": ([-8.0, -4.0], [-1.0, 0.0])}
        assert observer.min_val.tolist() == lows[name][memoryless]
        observer(torch.empty(0, 2, device=device))
        assert observer.min_val.tolist() == lows[name][memoryless]


FAKE = {"quant_min": -128, "quant_max": 127, "dtype": torch.qint8}
SCHEMES = {"MinMaxObserver": torch.per_tensor_affine, "PerChannelMinMaxObserver": torch.per_channel_symmetric}


def fakes(name: str, device: torch.device) -> tuple[torch.nn.Module, torch.nn.Module]:
    kwargs = {**FAKE, "qscheme": SCHEMES[name]}
    mine = ours.FakeQuantize(observer=getattr(ours, name), memoryless=True, **kwargs).to(device)
    return mine, stock.FakeQuantize(observer=REFERENCE[name], **kwargs)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", NAMES)
def test_in_fake_quantize_with_flags(name: str, device: torch.device) -> None:
    """With the observer flag off nothing is forgotten: statistics and qparams are kept, and used."""
    mine, theirs = fakes(name, device)
    for step, (observing, quantizing) in enumerate([(1, 1), (1, 1), (0, 1), (0, 1), (0, 0), (1, 0), (0, 1), (1, 1)]):
        for module in (mine, theirs):
            module.enable_observer(bool(observing))
            module.enable_fake_quant(bool(quantizing))
        before = s.snapshot(mine)
        x = s.Batch("normal", (3, 8), seed=step).tensor() * 2.0 ** ((-1) ** step * step)
        a, b = (x.to(d, copy=True).requires_grad_() for d in (device, "cpu"))
        y, y_ref = mine(a), theirs(b)
        s.check_bits(y, y_ref, f"y at step {step}")
        y.sum().backward()
        y_ref.sum().backward()
        s.check_same(a.grad, b.grad, f"dx at step {step}")
        s.check_state(mine, theirs)
        if not observing:
            s.check_untouched(mine, before)


@pytest.mark.parametrize("how", ["zero_", "disable_observer"])
@pytest.mark.parametrize("name", NAMES)
def test_flags_off_in_one_graph(name: str, how: str, device: torch.device) -> None:
    """Compiled, the flag is read by the device: forgetting must be gated there as well. Toggling does not recompile."""
    mine, _ = fakes(name, device)
    mine(s.case_batch(9, device))
    twin = copy.deepcopy(mine)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
    for step, observing in enumerate((1, 1, 0, 0, 1)):
        for module in (mine, twin):
            if observing:
                module.enable_observer()
            elif how == "zero_":
                module.observer_enabled.zero_()
            else:
                module.disable_observer()
        x = s.case_batch(step, device, 2.0**-step)
        s.check_bits(compiled(x), twin(x).cpu(), f"y at step {step}")
        for (key, a), b in zip(mine.named_buffers(), twin.buffers(), strict=True):
            s.check_same(a, b.cpu(), f"{key} at step {step}")
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", NAMES)
def test_observer_in_one_graph(name: str, device: torch.device) -> None:
    mine, twin = (getattr(ours, name)(memoryless=True).to(device) for _ in range(2))
    mine(s.case_batch(9, device))
    twin(s.case_batch(9, device))
    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
    for step in range(3):
        x = s.case_batch(step, device, 2.0**-step)
        compiled(x)
        twin(x)
        s.check_state(mine, copy.deepcopy(twin).cpu())


@pytest.mark.parametrize("name", NAMES)
def test_channel_count_may_change_inside_fake_quantize(name: str, device: torch.device) -> None:
    """As in 1.12, where the reset forgets the channels and FakeQuantize resizes its scale."""
    mine, theirs = fakes(name, device)
    for seed, channels in enumerate((3, 5, 2, 2)):
        x = s.Batch("normal", (channels, 6), seed=seed).tensor()
        s.check_bits(mine(x.to(device)), theirs(x), f"y with {channels} channels")
        s.check_state(mine, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_buffers_keep_their_address_while_the_shape_stays(name: str, library: Any, device: torch.device) -> None:
    """Forgetting is a write, not a new buffer: DDP and CUDA graphs hold the storage."""
    observer = getattr(library, name)(memoryless=True).to(device)
    observer(s.case_batch(0, device))
    before = {n: (b, b.data_ptr()) for n, b in observer.named_buffers()}
    for seed in (1, 2):
        observer(s.case_batch(seed, device))
    assert all(b is before[n][0] and b.data_ptr() == before[n][1] for n, b in observer.named_buffers())


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_go_to_torch_ao_and_back(name: str, device: torch.device) -> None:
    """The argument is configuration, as in 1.12: nothing of it is in the state_dict or the repr."""
    mine = getattr(ours, name)(memoryless=True).to(device)
    plain = getattr(stock, name)()
    mine(s.case_batch(0, device))
    plain(s.case_batch(0, torch.device("cpu")))
    s.check_state(mine, plain)
    if device.type == "cpu":
        assert repr(mine) == repr(plain)
    fresh = getattr(ours, name)(memoryless=True).to(device)
    fresh.load_state_dict(plain.state_dict(), strict=True)
    reference = REFERENCE[name]()
    for seed in (1, 2):
        fresh(s.case_batch(seed, device))
        reference(s.case_batch(seed, torch.device("cpu")))
        s.check_state(fresh, reference)
