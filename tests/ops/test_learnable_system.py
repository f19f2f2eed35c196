"""learnable_fake_quantize as torch sees it: opcheck, fakes, autograd and its subsets, autocast, torch.func."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import qkernels.ops as qops
from qkernels.ops.small_cpu import SMALL
from tests.ops.learnable_checks import gradient_for
from tests.ops.test_registration import ALL_LAYOUTS, clone_tree, overload, recorded_calls, signature
from tests.oracles import INTERPRETER, assert_bits_equal
from tests.strategies import KERNEL_DTYPES, QPARAMS, Layout, adversarial, cycle, dtype_id

OPERATORS = ("learnable_fake_quantize", "learnable_fake_quantize_backward")
REFUSED = "learnable_fake_quantize_backward: double backward is not supported"
AXES = pytest.mark.parametrize("axis", [None, 1], ids=str)


def parameters(n: int, device: torch.device, learned: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    scale = (0.02 + 0.011 * torch.arange(n)).to(device).requires_grad_(learned)
    return scale, (torch.arange(n) * 3 % 11 - 5.25).to(device).requires_grad_(learned)


def flag(value: int, device: torch.device) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.uint8, device=device)


def values(device: torch.device) -> torch.Tensor:
    """(4, 6), half of it outside of -8..7 steps, no two alike."""
    return torch.linspace(-0.6, 0.7, 24, device=device).view(4, 6)


# --------------------------------------------------------------------------------------------------------------------
# Registration
# --------------------------------------------------------------------------------------------------------------------


def sample_calls(device: torch.device) -> dict[str, list[Callable[[], object]]]:
    """Public calls that together use every argument of both operators."""
    x, strided = torch.randn(4, 6, 3).to(device), torch.randn(4, 12, 3).to(device)[:, ::2]
    on, off = flag(1, device), torch.zeros(1, dtype=torch.int64, device=device)
    integers = torch.full((1,), 2, dtype=torch.int32, device=device)

    def forward(v: torch.Tensor, n: int, *rest: object, **named: object) -> Callable[[], object]:
        return lambda: qops.learnable_fake_quantize(v.requires_grad_(), *parameters(n, device), *rest, **named)

    def backward(v: torch.Tensor, n: int, *rest: object, **named: object) -> Callable[[], object]:
        return lambda: qops.learnable_fake_quantize_backward(
            v * 2, v, *parameters(n, device, learned=False), *rest, **named
        )

    return {
        "learnable_fake_quantize": [
            forward(x.clone(), 1, -128, 127),
            forward(strided.clone(), 6, -8, 7, 0.5, 1, on, "lsq", off),
            forward(x.half(), 3, -8, 7, axis=-1, learning=on),
            forward(x[:0].clone(), 6, -8, 7, 1.0, 1),
            lambda: qops.learnable_fake_quantize(x.double(), torch.ones(1, device=device), integers, -8, 7),
            lambda: qops.learnable_fake_quantize(x, parameters(1, device)[0], integers, -8, 7, enabled=off),
        ],
        "learnable_fake_quantize_backward": [
            backward(x, 1, -128, 127),
            backward(strided, 6, -8, 7, 0.5, 1, on, "lsq", off),
            backward(x.mT.contiguous().mT, 6, -8, 7, axis=1),
            backward(x[:0], 6, -8, 7, 1.0, 1),
        ],
    }


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str, device: torch.device) -> None:
    checked = 0
    for call in sample_calls(device)[name]:
        for args, kwargs in recorded_calls(call, name):
            results = torch.library.opcheck(overload(name), clone_tree(args), clone_tree(kwargs))
            assert set(results.values()) == {"SUCCESS"}
            checked += 1
    assert checked >= len(sample_calls(device)[name])


@pytest.mark.parametrize("name", OPERATORS)
def test_tags_and_schema(name: str) -> None:
    op = overload(name)
    assert {torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout} <= set(op.tags)
    arguments = (
        "Tensor x, Tensor scale, Tensor zero_point, SymInt quant_min, SymInt quant_max, float grad_factor=1., "
        'SymInt? axis=None, Tensor? enabled=None, str grad_mask="rounded", Tensor? learning=None, '
        "str? grad_elements=None"
    ).replace("SymInt", "int")
    want = f"({arguments}) -> Tensor"
    if name.endswith("backward"):
        want = f"(Tensor dy, {arguments}) -> (Tensor dx, Tensor dscale, Tensor dzero_point)"
    assert str(op._schema) == f"qkernels::{name}{want}"


def both_calls(x: torch.Tensor, axis: int | None, zero_point_dtype: torch.dtype) -> list[object]:
    n = 1 if axis is None else x.shape[axis]
    scale = torch.full((n,), 0.05, device=x.device, dtype=torch.bfloat16)
    zero_point = torch.full((n,), 3, device=x.device).to(zero_point_dtype)
    arguments = (x, scale, zero_point, -128, 127, 1.0, axis)
    return [qops.learnable_fake_quantize(*arguments), *qops.learnable_fake_quantize_backward(x.clone(), *arguments)]


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", ALL_LAYOUTS[:: 8 if INTERPRETER else 1], ids=str)
def test_fakes_describe_the_real_results(layout: Layout, device: torch.device) -> None:
    """Shape, strides and dtype of y and the three gradients. On meta a host read would raise."""
    dtypes = KERNEL_DTYPES[-1:] if INTERPRETER else (*KERNEL_DTYPES, torch.float64)
    for dtype, z in zip(dtypes, (torch.float32, torch.float16, torch.int32, torch.int64), strict=False):
        real, meta = (layout.view(torch.zeros(layout.storage_size, dtype=dtype, device=d)) for d in (device, "meta"))
        for axis in layout.some_axes():
            want = signature(both_calls(real, axis, z))
            assert [g[:3] for g in signature(both_calls(meta, axis, z))] == [w[:3] for w in want]
            with FakeTensorMode(allow_non_fake_inputs=False) as mode:
                assert signature(both_calls(mode.from_tensor(real), axis, z)) == want


# --------------------------------------------------------------------------------------------------------------------
# Autograd
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.interpreter
@pytest.mark.parametrize("wanted", [w for w in itertools.product((0, 1), repeat=3) if any(w)], ids=str)
@pytest.mark.parametrize("grad_mask", ["rounded", "lsq"])
@AXES
def test_autograd_equals_the_backward_operator(
    axis: int | None, grad_mask: str, wanted: tuple[int, int, int], device: torch.device
) -> None:
    """Bit for bit, for every subset of inputs that require a gradient; the others get None."""
    x = torch.cat([values(device), cycle(adversarial(QPARAMS[1], finite=True), 60).view(10, 6).to(device)])
    leaves = [t.detach() for t in (x, *parameters(6 if axis else 1, device))]
    for leaf, w in zip(leaves, wanted, strict=True):
        leaf.requires_grad_(bool(w))
    arguments = (*leaves, -8, 7, 0.3, axis, flag(1, device), grad_mask, flag(1, device))
    y = qops.learnable_fake_quantize(*arguments)
    dy = gradient_for(x)
    y.backward(dy)
    with torch.no_grad():
        want = qops.learnable_fake_quantize_backward(dy, *arguments)
    for leaf, gradient, w in zip(leaves, want, wanted, strict=True):
        assert (leaf.grad is not None) == bool(w)
        if w:
            assert_bits_equal(leaf.grad, gradient, context=f"{wanted}")


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=dtype_id)
def test_integer_zero_point_gets_no_gradient(dtype: torch.dtype, device: torch.device) -> None:
    x, scale = values(device).requires_grad_(), parameters(1, device)[0]
    zero_point = torch.tensor([-2], dtype=dtype, device=device)
    y = qops.learnable_fake_quantize(x, scale, zero_point, -8, 7)
    y.backward(torch.ones_like(y))
    assert zero_point.grad is None and not zero_point.requires_grad
    want = qops.learnable_fake_quantize_backward(
        torch.ones_like(y), x.detach(), scale.detach(), zero_point.float(), -8, 7
    )
    assert_bits_equal(x.grad, want[0])
    assert_bits_equal(scale.grad, want[1])


@AXES
def test_only_the_inputs_are_saved(axis: int | None, device: torch.device) -> None:
    """x, scale, zero point and flags as they came: no mask, no codes, no copy."""
    x = values(device).requires_grad_()
    inputs = (x, *parameters(6 if axis else 1, device), flag(1, device), flag(1, device))
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = qops.learnable_fake_quantize(*inputs[:3], -8, 7, 1.0, axis, inputs[3], "lsq", inputs[4])
    assert sorted(t.data_ptr() for t in saved) == sorted(t.data_ptr() for t in inputs)
    assert y.grad_fn is not None and not any(t.data_ptr() == y.data_ptr() for t in saved)


@pytest.mark.interpreter
@pytest.mark.parametrize("which", [0, 1, 2], ids=["x", "scale", "zero_point"])
@pytest.mark.parametrize("grad_mask", ["rounded", "lsq"])
def test_double_backward_raises(grad_mask: str, which: int, device: torch.device) -> None:
    x = torch.linspace(-2, 2, SMALL + 4, device=device).reshape(4, -1)  # more than torch's operators serve
    leaves = (x.requires_grad_(), *parameters(1, device))
    y = qops.learnable_fake_quantize(*leaves, -8, 7, grad_mask=grad_mask)
    gradients = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)  # alone it does not raise
    with pytest.raises(NotImplementedError, match=REFUSED):
        torch.autograd.grad(gradients[which].sum(), leaves[0])
    dy = torch.ones_like(x, requires_grad=True)
    gradients = qops.learnable_fake_quantize_backward(dy, *(t.detach() for t in leaves), -8, 7, grad_mask=grad_mask)
    with pytest.raises(NotImplementedError, match=REFUSED):
        gradients[which].sum().backward()


@pytest.mark.parametrize("which", range(4), ids=["scale", "zero_point", "enabled", "learning"])
def test_what_was_saved_must_not_change_before_backward(which: int, device: torch.device) -> None:
    """An error, never a silently wrong gradient."""
    x, inputs = values(device).requires_grad_(), [*parameters(1, device, False), flag(1, device), flag(1, device)]
    y = qops.learnable_fake_quantize(x, *inputs[:2], -8, 7, enabled=inputs[2], grad_mask="lsq", learning=inputs[3])
    inputs[which].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_and_accumulation(use_reentrant: bool, device: torch.device) -> None:
    results = []
    for checkpointed in (False, True):
        leaves = (values(device).requires_grad_(), *parameters(1, device))

        def block(*tensors: torch.Tensor) -> torch.Tensor:
            return qops.learnable_fake_quantize(*tensors, -8, 7).square()

        for _ in range(2):
            y = checkpoint(block, *leaves, use_reentrant=use_reentrant) if checkpointed else block(*leaves)
            y.sum().backward()
        results.append([t.grad for t in leaves])
    for plain, saved in zip(*results, strict=True):
        assert_bits_equal(saved, plain)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=dtype_id)
def test_autocast_leaves_the_dtype_alone(dtype: torch.dtype, device: torch.device) -> None:
    x = values(device).to(dtype).requires_grad_()
    leaves = (x, *parameters(1, device))
    want = qops.learnable_fake_quantize(*leaves, -8, 7)
    gradients = torch.autograd.grad(want.sum(), leaves)
    for target in (torch.bfloat16, torch.float16):
        with torch.autocast(device.type, target):
            y = qops.learnable_fake_quantize(*leaves, -8, 7)
        assert_bits_equal(y, want)
        for a, b in zip(torch.autograd.grad(y.sum(), leaves), gradients, strict=True):
            assert_bits_equal(a, b)


def test_inference_mode_and_no_grad(device: torch.device) -> None:
    leaves = (values(device).requires_grad_(), *parameters(1, device))
    want = qops.learnable_fake_quantize(*leaves, -8, 7)
    with torch.inference_mode():
        y = qops.learnable_fake_quantize(*leaves, -8, 7)
        assert y.is_inference()
    assert_bits_equal(y, want)
    with torch.no_grad():
        assert not qops.learnable_fake_quantize(*leaves, -8, 7).requires_grad


def test_plain_functions_and_operators_are_the_same(device: torch.device) -> None:
    arguments = (values(device), *parameters(1, device, learned=False), -8, 7)
    assert_bits_equal(torch.ops.qkernels.learnable_fake_quantize(*arguments), qops.learnable_fake_quantize(*arguments))
    named = torch.ops.qkernels.learnable_fake_quantize(*arguments, learning=None, grad_mask="lsq", enabled=None)
    assert_bits_equal(named, qops.learnable_fake_quantize(*arguments, 1.0, None, None, "lsq"))


# --------------------------------------------------------------------------------------------------------------------
# torch.func
# --------------------------------------------------------------------------------------------------------------------


def loss(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int | None = None) -> torch.Tensor:
    return qops.learnable_fake_quantize(x, scale, zero_point, -8, 7, 0.5, axis, grad_mask="lsq").square().sum()


def loop_gradients(*tensors: torch.Tensor, **named: object) -> tuple[torch.Tensor, ...]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    return torch.autograd.grad(loss(*leaves, **named), leaves)


@pytest.mark.interpreter
@AXES
def test_functional_grad(axis: int | None, device: torch.device) -> None:
    tensors = (values(device), *parameters(6 if axis else 1, device, learned=False))
    got = torch.func.grad(lambda *t: loss(*t, axis), argnums=(0, 1, 2))(*tensors)
    for a, b in zip(got, loop_gradients(*tensors, axis=axis), strict=True):
        assert_bits_equal(a, b)


@pytest.mark.parametrize("in_dims", [(0, None, None), (0, 0, 0), (None, 0, 0), (1, 0, None)], ids=str)
@AXES
def test_vmap_equals_a_loop(axis: int | None, in_dims: tuple[int | None, ...], device: torch.device) -> None:
    """Forward and gradients, over inputs, quantizers or both; y and dx exact, sums to their rounding."""
    n = 6 if axis else 1
    stacked = [torch.randn(3, 4, 6), 0.03 + torch.rand(3, n) / 10, torch.randn(3, n) * 3]
    tensors = [
        t[0].to(device) if d is None else t.to(device).movedim(0, d) for t, d in zip(stacked, in_dims, strict=True)
    ]
    each = [[t if d is None else t.select(d, i) for t, d in zip(tensors, in_dims, strict=True)] for i in range(3)]
    y = torch.vmap(lambda *t: qops.learnable_fake_quantize(*t, -8, 7, 1.0, axis), in_dims)(*tensors)
    assert_bits_equal(y, torch.stack([qops.learnable_fake_quantize(*t, -8, 7, 1.0, axis) for t in each]))
    got = torch.vmap(torch.func.grad(lambda *t: loss(*t, axis), argnums=(0, 1, 2)), in_dims)(*tensors)
    want = [torch.stack(g) for g in zip(*(loop_gradients(*t, axis=axis) for t in each), strict=True)]
    assert_bits_equal(got[0], want[0])
    for a, b in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
