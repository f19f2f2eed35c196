"""What a user changes of HistogramObserver counts: a search or rule of their own, bounds set by hand, torchao's check.

Ours search and choose in one operator; where either step is somebody else's, each is called.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.ao.quantization as stock

import qkernels.modules as ours
from tests.histogram_batches import Batch, stock_step
from tests.lanes.interpreter_trace import trace
from tests.modules import support as s
from tests.modules.histogram_support import new_pair

pytestmark = pytest.mark.interpreter

STEPS = ["_search_kernel", "_choose_qparams_kernel"]
INT8 = {"bins": 64, "dtype": torch.qint8, "quant_min": -128, "quant_max": 127}


def narrower(search: Any) -> Any:
    """The range that was found, pulled in."""

    def pulled_in(self: Any) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = search(self)
        return low * 0.5, high * 0.75

    return pulled_in


def power_of_two(choose: Any) -> Any:
    """The scale rounded up to a power of two."""

    def rounded(self: Any, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale, zero_point = choose(self, low, high)
        return scale.log2().ceil().exp2(), zero_point

    return rounded


OVERRIDES = {"_non_linear_param_search": narrower, "_calculate_qparams": power_of_two}


def subclass(base: type, name: str) -> type:
    return type("Mine", (base,), {name: OVERRIDES[name](getattr(base, name))})


def see(mine: torch.nn.Module, theirs: torch.nn.Module, device: torch.device, seeds: int = 2) -> None:
    for seed in range(seeds):
        x = Batch("normal", 300, 1.0 + seed, seed=seed).tensor()
        mine(x.to(device))
        stock_step(theirs, x)


@pytest.mark.parametrize("name", OVERRIDES)
def test_a_subclass(name: str, device: torch.device) -> None:
    plain, _ = new_pair(device, bins=64)
    mine = subclass(ours.HistogramObserver, name)(bins=64).to(device)
    theirs = subclass(stock.HistogramObserver, name)(bins=64)
    see(mine, theirs, device)
    s.check_qparams(mine, theirs)
    see(plain, theirs, device)
    assert mine.calculate_qparams()[0] != plain.calculate_qparams()[0]


@pytest.mark.parametrize("name", OVERRIDES)
def test_a_subclass_in_a_fake_quantizer(name: str, device: torch.device) -> None:
    mine = ours.FakeQuantize(observer=subclass(ours.HistogramObserver, name), **INT8).to(device)
    theirs = stock.FakeQuantize(observer=subclass(stock.HistogramObserver, name), **INT8)
    for seed in range(4):
        for module in (mine, theirs):
            module.enable_observer(seed != 2)
        x = Batch("normal", 300, 1.0 + seed, seed=seed).tensor()
        s.check_bits(mine(x.to(device)), theirs(x), "y")
        s.check_state(mine, theirs)


@pytest.mark.parametrize("on", [0, 1])
def test_the_device_flag_of_a_renewal(on: int, device: torch.device) -> None:
    """In eager mode on the CPU a fake quantizer looks at the flag itself, and does not come here."""
    observer: Any = subclass(ours.HistogramObserver, "_calculate_qparams")(bins=64).to(device)
    scale, zero_point = torch.tensor([3.0], device=device), torch.tensor([5], dtype=torch.int32, device=device)
    flag = torch.tensor([on], dtype=torch.uint8, device=device)
    with s.quiet():  # the stock rule warns of a range that nothing was observed in
        copies = observer.renew_qparams_(Batch("normal", 300).tensor().to(device), scale, zero_point, flag)
    expected = tuple(t.cpu() for t in observer.calculate_qparams()) if on else (torch.tensor([3.0]), torch.tensor([5]))
    for name, found in (("in place", (scale, zero_point)), ("copy", copies)):
        s.check_same(found[0], expected[0], f"{name} scale")
        s.check_same(found[1], expected[1].int(), f"{name} zero_point")


def test_an_instance(device: torch.device) -> None:
    mine, theirs = new_pair(device, bins=64)
    see(mine, theirs, device)
    low, high = torch.tensor(-0.5), torch.tensor(0.25)
    mine._non_linear_param_search = lambda: (low.to(device), high.to(device))
    theirs._non_linear_param_search = lambda: (low, high)
    s.check_qparams(mine, theirs)


def test_bounds_set_by_hand(device: torch.device) -> None:
    """quant_min and quant_max for the rule, dst_nbins for the search."""
    mine, theirs = new_pair(device, bins=64)
    see(mine, theirs, device)
    found = []
    for bounds in ((0, 255, 256), (1, 14, 256), (1, 14, 4)):
        for observer in (mine, theirs):
            observer.quant_min, observer.quant_max, observer.dst_nbins = bounds
        s.check_qparams(mine, theirs)
        found.append(mine.calculate_qparams()[0].item())
    assert len(set(found)) == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_buffers_of_other_dtypes(dtype: torch.dtype, device: torch.device) -> None:
    """The range is rounded to the buffers' dtype, the rule computed in it."""
    mine, _ = new_pair(device, bins=64)
    see(mine, new_pair(device, bins=64)[1], device)
    mine.to(dtype)
    low, high = mine._non_linear_param_search()
    scale, zero_point = stock.HistogramObserver(factory_kwargs={"dtype": dtype})._calculate_qparams(
        low.cpu(), high.cpu()
    )
    found = mine.calculate_qparams()
    s.check_same(found[0], scale, "scale")
    s.check_same(found[1], zero_point, "zero_point")


# ------------------------------------------------------------------------------------------ torchao's check


def infinitely_wide(device: torch.device) -> Any:
    """torchao's face over a range whose width overflows: what the search finds of it is NaN."""
    pytest.importorskip("torchao")
    from qkernels.modules import pt2e

    observer = pt2e.HistogramObserver(bins=8).to(device)
    observer.histogram.fill_(1.0)
    observer.min_val.fill_(-3e38)
    observer.max_val.fill_(3e38)
    return observer


def test_torchaos_face_refuses_what_is_not_a_range(device: torch.device) -> None:
    with pytest.raises(AssertionError, match="min nan should be less than max"):
        infinitely_wide(device).calculate_qparams()


@pytest.mark.skipif(s.INTERPRETER, reason="compiles")
def test_a_graph_does_not_ask(device: torch.device) -> None:
    """And so needs no range."""
    observer, called = infinitely_wide(device), []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    scale, _ = torch.compile(lambda: observer.calculate_qparams(), fullgraph=True, backend=backend)()
    assert scale.isnan()
    assert [name for name in called if "qkernels" in name] == ["qkernels.search_histogram_qparams.default"]


# ------------------------------------------------------------------------------------------ launches


@pytest.mark.interpreter_only
def test_launches() -> None:
    """One; two where something stands between the range and its qparams."""
    cpu = torch.device("cpu")
    pytest.importorskip("torchao")
    from qkernels.modules import pt2e

    expected = {
        ours.HistogramObserver: STEPS[:1],
        subclass(ours.HistogramObserver, "_non_linear_param_search"): STEPS,
        subclass(ours.HistogramObserver, "_calculate_qparams"): STEPS[:1],  # the rule is the user's, in ATen
        pt2e.HistogramObserver: STEPS,
        ours.PerChannelHistogramObserver: STEPS[:1],
    }
    for cls, launches in expected.items():
        observer = cls(bins=64)
        observer(Batch("normal", 300).tensor().reshape(3, 100).to(cpu))
        with trace() as recorded:
            observer.calculate_qparams()
        assert recorded.launches == launches, cls
