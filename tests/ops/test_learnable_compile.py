"""learnable_fake_quantize compiled: one graph, eager's y and dx, sums within their bound, no recompiles; export."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

import qkernels.ops as qops
from tests.ops.learnable_checks import check_learnable
from tests.ops.test_compile import BACKENDS, compiled, graphs, values
from tests.ops.test_registration import targets
from tests.oracles import assert_bits_equal
from tests.oracles_learnable import assert_learnable, assert_sum_close, reference_learnable
from tests.strategies import KERNEL_DTYPES, dtype_id

MASKS = ("rounded", "lsq")
LIMITS = (-8, 7)


@pytest.fixture(autouse=True)
def _count_from_zero() -> None:
    torch._dynamo.reset()
    counters.clear()


def parameters(n: int, device: torch.device) -> list[torch.Tensor]:
    scale = (0.3 + 0.11 * torch.arange(n)).to(device)
    return [scale.requires_grad_(), (torch.arange(n) * 3 % 11 - 5.25).to(device).requires_grad_()]


def fresh(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]


Function = Callable[..., torch.Tensor]
Settings = tuple[int | None, str]


def check_compiled(
    function: Function, run: Function, x: torch.Tensor, settings: list[Settings], flags: tuple[torch.Tensor, ...] = ()
) -> None:
    """`function(x, *qparams)` stacks op(relu(x)) * 3 for every setting. y and dx equal eager's bit for bit."""
    qparams = [p for axis, _ in settings for p in parameters(1 if axis is None else x.shape[axis], x.device)]
    eager, fast = fresh([x.requires_grad_(), *qparams]), fresh([x, *qparams])
    want, got = function(*eager), run(*fast)
    assert_bits_equal(got, want, context="y")
    dy = torch.randn(want.shape).to(want.dtype).to(x.device)
    want.backward(dy)
    got.backward(dy)
    assert_bits_equal(fast[0].grad, eager[0].grad, context="dx")
    inner = torch.relu(x.detach())
    for i, (axis, grad_mask) in enumerate(settings):
        named = {"axis": axis, "grad_mask": grad_mask} | dict(zip(("enabled", "learning"), flags, strict=False))
        pair = fast[1 + 2 * i : 3 + 2 * i]
        ref = reference_learnable(dy[i] * 3, inner, *pair, *LIMITS, 0.5, **named)
        gradients = [t.grad.reshape(t.shape) for t in pair]
        assert_learnable(None, (ref.dx, *gradients), ref, tuple(pair), f"{named}")


def stacked(settings: list[Settings], flags: tuple[torch.Tensor, ...] = ()) -> Function:
    enabled, learning = flags or (None, None)

    def function(x: torch.Tensor, *qparams: torch.Tensor) -> torch.Tensor:
        x, results = torch.relu(x), []
        for i, (axis, grad_mask) in enumerate(settings):
            pair = qparams[2 * i : 2 * i + 2]
            results.append(qops.learnable_fake_quantize(x, *pair, *LIMITS, 0.5, axis, enabled, grad_mask, learning) * 3)
        return torch.stack(results)  # not added: one NaN must not hide another

    return function


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_backward(backend: str, device: torch.device) -> None:
    """Per tensor and per channel, both masks, between neighbours, on adversarial float32."""
    settings = list(itertools.product((None, 1, 0), MASKS))
    if backend == "inductor":  # whose C++ takes seconds for each; the flags' test has the other two
        settings = [(None, "lsq"), (0, "rounded")]
    function = stacked(settings)
    check_compiled(function, compiled(function, backend), values(24, 37).clamp(-1e4, 1e4).to(device), settings)
    assert graphs() == 1


@pytest.mark.parametrize("dtype", (*KERNEL_DTYPES[:2], torch.float64), ids=dtype_id)
@pytest.mark.parametrize("axis", [None, -1], ids=str)
def test_aot_eager_every_dtype(axis: int | None, dtype: torch.dtype, device: torch.device) -> None:
    settings = [(axis, mask) for mask in MASKS]
    function = stacked(settings)
    x = values(6, 37, dtype=dtype).clamp(-1e4, 1e4).to(device)
    check_compiled(function, compiled(function, "aot_eager"), x, settings)
    assert graphs() == 1


@pytest.mark.parametrize("dtype", KERNEL_DTYPES[:2], ids=dtype_id)
def test_inductor_operator_alone_in_low_precision(dtype: torch.dtype, device: torch.device) -> None:
    qparams = [p.detach() for p in parameters(37, device)]

    def function(x: torch.Tensor) -> torch.Tensor:
        return qops.learnable_fake_quantize(x, *qparams, *LIMITS, axis=1)

    x = values(24, 37, dtype=dtype).to(device)
    assert_bits_equal(compiled(function, "inductor")(x), function(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_flags_toggled_in_place_do_not_recompile(backend: str, device: torch.device) -> None:
    flags = tuple(torch.ones(1, dtype=torch.uint8, device=device) for _ in range(2))
    settings = [(None, "rounded"), (1, "lsq")]
    function = stacked(settings, flags)
    run = compiled(function, backend)
    x = values(12, 17).clamp(-1e4, 1e4).to(device)
    for on, learning in ((1, 1), (0, 1), (1, 0), (0, 0), (1, 1)):
        flags[0].fill_(on)
        flags[1].fill_(learning)
        check_compiled(function, run, x, settings, flags)
    assert graphs() == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_dynamic_shapes(backend: str, device: torch.device) -> None:
    settings = [(None, "lsq"), (-1, "rounded")]
    function = stacked(settings)
    run = compiled(function, backend, dynamic=True)
    # Inductor's C++ compiles every sum of more than 4096 elements once again (need_use_acc_helper), torch's own too.
    for rows in (3, 7, 64, 680 if backend == "inductor" else 1025):
        check_compiled(function, run, values(rows, 6, seed=rows).clamp(-1e4, 1e4).to(device), settings)
    assert graphs() == 1


def test_sizes_become_dynamic_by_themselves(device: torch.device) -> None:
    """Two graphs at most: a static one, then one for all sizes. The channel count may change as well."""
    settings = [(None, "rounded"), (1, "lsq")]
    function = stacked(settings)
    run = compiled(function, "aot_eager")
    for shape in ((3, 6), (7, 6), (64, 6), (1025, 6)):
        check_compiled(function, run, values(*shape, seed=shape[0]).clamp(-1e4, 1e4).to(device), settings)
    assert graphs() == 2
    torch._dynamo.reset()
    counters.clear()
    run = compiled(function, "aot_eager", dynamic=True)
    for channels in (3, 17, 64):
        check_compiled(function, run, values(4, channels).clamp(-1e4, 1e4).to(device), settings)
    assert graphs() == 1


@pytest.mark.parametrize(("axis", "value"), [(None, 0.0333), (1, 1e3)])
def test_long_sums_of_one_sign_under_inductor(axis: int | None, value: float, device: torch.device) -> None:
    """2^20 equal terms: generated code has to keep the bound too."""
    x = torch.full((4, 1 << 18) if axis == 0 else (1 << 18, 4), value, device=device)
    n = 1 if axis is None else 4
    scale, zero_point = torch.full((n,), 0.1, device=device), torch.zeros(n, device=device)
    leaves = fresh([x, scale.requires_grad_(), zero_point.requires_grad_()])
    run = compiled(lambda *t: qops.learnable_fake_quantize(*t, *LIMITS, axis=axis), "inductor")
    run(*leaves).backward(torch.full_like(x, 0.1))
    dy, s = float(np.float32(0.1)), float(np.float32(0.1))
    slope = 7.0 if value > 1 else -float(np.float32(value)) / s
    for leaf, term in zip(leaves[1:], (dy * slope, -s * dy if value > 1 else 0.0), strict=True):
        total = np.full(n, x.numel() // n * term)
        assert_sum_close(leaf.grad, total, abs(total), f"axis {axis}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
@pytest.mark.parametrize(("shape", "axis"), [((1 << 18, 4), None), ((1 << 18, 4), 1), ((1 << 10, 4, 1 << 8), 1)])
@pytest.mark.parametrize("value", [0.0333, 1e3], ids=["inside", "saturated"])
def test_long_sums_of_the_composition_in_eager_mode(
    value: float, shape: tuple[int, ...], axis: int | None, dtype: torch.dtype
) -> None:
    """The CPU path hands what it cannot do, a NaN or a float64 x, to the composition: the same bound."""
    x = torch.full(shape, value, dtype=dtype)
    x.view(-1)[5] = float("nan")
    n = 1 if axis is None else 4
    check_learnable(x, torch.full((n,), 0.1), torch.zeros(n), *LIMITS, dy=torch.full_like(x, 0.1), axis=axis)


@pytest.mark.parametrize("axis", [None, 1], ids=str)
def test_what_is_left_for_inductor(axis: int | None, device: torch.device) -> None:
    """Both directions decompose into ATen and fuse, except the per-channel backward on a GPU, which stays a kernel."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    seen: list[list[str]] = []

    def record(graph: torch.fx.GraphModule, inputs: object) -> object:
        seen.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return make_boxed_func(graph.forward)

    settings = [(axis, "rounded")]
    function = stacked(settings)
    run = torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=record, bw_compiler=record))
    check_compiled(function, run, values(24, 37).clamp(-1e4, 1e4).to(device), settings)
    forward, backward = ({t for t in targets if "qkernels" in t} for targets in seen)
    if device.type == "cuda" and axis is not None:
        assert forward <= {"qkernels.reciprocal.default"}
        assert "qkernels.learnable_fake_quantize_backward.default" in backward
    else:
        assert forward == backward == set()
    assert not any("item" in t or "_local_scalar_dense" in t for targets in seen for t in targets), "a host read"


@pytest.mark.parametrize("dtype", [torch.int32, torch.bfloat16], ids=dtype_id)
def test_other_zero_point_dtypes(dtype: torch.dtype, device: torch.device) -> None:
    """Integers get no gradient; gradients have the parameter's dtype."""
    zero_point = torch.tensor([2], device=device).to(dtype)
    scale = torch.tensor([0.25], dtype=torch.bfloat16, device=device)
    x = values(200).clamp(-1e4, 1e4).to(device)
    run = compiled(lambda *t: qops.learnable_fake_quantize(*t, *LIMITS, 0.01), "aot_eager")
    leaves = fresh([x.requires_grad_(), scale.requires_grad_(), zero_point])
    if dtype.is_floating_point:
        leaves[2].requires_grad_()
    dy = torch.randn(200).to(device)
    run(*leaves).backward(dy)
    want = reference_learnable(dy, x, scale, zero_point, *LIMITS, 0.01)
    assert_bits_equal(leaves[0].grad, want.dx)
    assert leaves[1].grad.dtype == torch.bfloat16
    assert_sum_close(leaves[1].grad, want.dscale, want.dscale_terms)
    assert (leaves[2].grad is None) == (not dtype.is_floating_point)


def test_subsets_and_two_outputs(device: torch.device) -> None:
    """Only the scale, or only x, wants a gradient: the same graph code gives it."""
    x, dy = values(40).clamp(-50, 50).to(device), torch.randn(40).to(device)
    pair = [t.detach() for t in parameters(1, device)]
    want = qops.learnable_fake_quantize_backward(dy, x, *pair, *LIMITS)
    for which in range(3):
        torch._dynamo.reset()
        leaves = [t.clone().requires_grad_(i == which) for i, t in enumerate((x, *pair))]
        compiled(lambda *t: qops.learnable_fake_quantize(*t, *LIMITS), "aot_eager")(*leaves).backward(dy)
        assert [t.grad is not None for t in leaves] == [i == which for i in range(3)]
        torch.testing.assert_close(
            leaves[which].grad, want[which], rtol=1e-6 if which else 0, atol=1e-5 if which else 0
        )


class _Learned(torch.nn.Module):
    def __init__(self, axis: int | None) -> None:
        super().__init__()
        self.axis = axis
        self.scale, self.zero_point = (torch.nn.Parameter(t) for t in parameters(6 if axis else 1, torch.device("cpu")))
        self.register_buffer("enabled", torch.ones(1, dtype=torch.uint8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(x)
        y = qops.learnable_fake_quantize(y, self.scale, self.zero_point, -8, 7, 0.1, self.axis, self.enabled, "lsq")
        return y * 3


@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
@pytest.mark.parametrize("axis", [None, 1], ids=str)
def test_export_keeps_one_node(axis: int | None, strict: bool, device: torch.device) -> None:
    module = _Learned(axis).to(device)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        module, (torch.randn(4, 6, device=device),), dynamic_shapes=({0: batch},), strict=strict
    )
    assert targets(program.graph).count("qkernels.learnable_fake_quantize.default") == 1
    assert len(targets(program.graph)) == 3
    for rows in (4, 9):
        x = torch.randn(rows, 6, device=device)
        assert_bits_equal(program.module()(x), module(x))
    assert_bits_equal(program.run_decompositions().module()(x), module(x))
