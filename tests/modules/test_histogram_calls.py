"""What runs in HistogramObserver: ATen calls on the CPU, graphs, operators."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qkernels.ops.registration import LIBRARY  # noqa: F401  (the operators)
from tests.histogram_batches import Batch, stock_step
from tests.modules import support as s
from tests.modules.histogram_support import new_pair, step

pytestmark = pytest.mark.interpreter


class _Calls(TorchDispatchMode):
    """Counts ATen's calls, those inside our operators too."""

    def __init__(self) -> None:
        super().__init__()
        self.aten = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "aten":
            self.aten += 1
            return func(*args, **(kwargs or {}))
        with self:
            return func._op_dk(torch._C.DispatchKey.CPU, *args, **(kwargs or {}))


@pytest.mark.skipif(s.INTERPRETER, reason="about the CPU's code alone")
@pytest.mark.parametrize("kind", ["normal", "relu", "heavy", "uniform", "constant", "sparse", "offset"])
def test_qparams_take_at_most_30_calls(kind: str) -> None:
    """torch.ao: 597 for a ReLU's output, 888 for normal values. A walk to its end is 10 chunks."""
    mine, theirs = new_pair(torch.device("cpu"))
    step(mine, theirs, Batch(kind, 20000).tensor(), torch.device("cpu"))
    with _Calls() as calls:
        mine.calculate_qparams()
    assert 5 <= calls.aten <= 30
    if kind in ("normal", "relu"):
        with _Calls() as calls:
            theirs.calculate_qparams()
        assert calls.aten > 300


@pytest.mark.skipif(s.INTERPRETER, reason="about the CPU's code alone")
def test_the_longest_search_takes_30_calls_too() -> None:
    """Values so small that every error is 0: the walk is taken to its end, 2047 candidates."""
    mine, _ = new_pair(torch.device("cpu"))
    mine(Batch("uniform", 20000, 1e-16).tensor())
    with _Calls() as calls:
        mine.calculate_qparams()
    assert calls.aten <= 30


@pytest.mark.skipif(s.INTERPRETER, reason="compiles")
def test_fullgraph_and_no_recompilation(device: torch.device) -> None:
    mine, theirs = new_pair(device, bins=64)
    compiled = torch.compile(mine, fullgraph=True)
    for seed in range(4):
        x = Batch("normal", 300, 1.0 + seed % 3, seed=seed).tensor()
        compiled(x.to(device))
        stock_step(theirs, x)
        s.check_state(mine, theirs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    qparams = torch.compile(lambda: mine.calculate_qparams(), fullgraph=True)
    scale, zero_point = qparams()
    scale_ref, zero_point_ref = theirs.calculate_qparams()
    s.check_same(scale, scale_ref, "scale")
    s.check_same(zero_point, zero_point_ref, "zero_point")


@pytest.mark.skipif(s.INTERPRETER, reason="exports")
def test_operators_pass_opcheck_and_export(device: torch.device) -> None:
    x, ends = torch.linspace(-1, 1, 99, device=device), [torch.tensor(v, device=device) for v in (-1.0, 1.0)]
    torch.library.opcheck(torch.ops.qkernels.histogram.default, (x, 8, *ends))
    histogram = torch.ops.qkernels.histogram.default(x, 8, *ends).float()
    torch.library.opcheck(torch.ops.qkernels.search_histogram_range.default, (histogram, *ends, 256))
    state = (histogram.clone(), *(end.clone() for end in ends), torch.zeros(8, device=device))
    torch.library.opcheck(torch.ops.qkernels.observe_histogram_.default, (x * 2, *state))
    program = torch.export.export(new_pair(device, bins=64)[0], (x,))
    assert "observe_histogram_" in program.graph_module.code
