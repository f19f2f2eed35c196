"""fake_quantize under autograd: gradients of torch's operator, transforms, the flag, and what must raise."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import qkernels.ops as qops
from qkernels.ops.small_cpu import SMALL
from tests.oracles import (
    INTERPRETER,
    assert_bits_equal,
    reference_fake_quantize_backward,
    torch_fake_quantize,
    torch_is_sane,
)
from tests.strategies import KERNEL_DTYPES, LAYOUTS, QPARAMS, Layout, QParams, adversarial, dtype_id

pytestmark = pytest.mark.interpreter

LARGE = SMALL + 4  # elements for which torch's operator, which saves a mask, does not serve


def qparams_for(x: torch.Tensor, axis: int | None, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    n = 1 if axis is None else x.shape[axis]
    scale = (0.02 + 0.011 * torch.arange(n)).to(device)
    return scale, (torch.arange(n) * 3 % 11 - 5).to(torch.int32).to(device)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("q", QPARAMS, ids=str)
@pytest.mark.parametrize("axis", [None, 0], ids=str)
def test_gradient_equals_torchs(axis: int | None, q: QParams, dtype: torch.dtype, device: torch.device) -> None:
    """On finite x (torch multiplies dy by the mask, so a masked -1 gives -0.0 there: zeros compare equal)."""
    values = adversarial(q, dtype, finite=True).view(1, -1)
    scale, zero_point = q.tensors()
    dy = torch.randn(values.shape).to(dtype)
    theirs = values.clone().requires_grad_()
    torch_fake_quantize(theirs, scale, zero_point, q.quant_min, q.quant_max, axis).backward(dy)
    mine = values.to(device).requires_grad_()
    y = qops.fake_quantize(mine, scale.to(device), zero_point.to(device), q.quant_min, q.quant_max, axis)
    y.backward(dy.to(device))
    sane = torch_is_sane(values, scale, zero_point, axis)
    assert_bits_equal(mine.grad, theirs.grad, where=sane, context=f"{q}")
    assert sane.any() and (q.scale < 1e-39 or sane.float().mean() > 0.5), "nothing left to compare"


@pytest.mark.parametrize("axis", [None, 0, 1], ids=str)
def test_nan_and_infinities_get_no_gradient(axis: int | None, device: torch.device) -> None:
    x = torch.tensor([[math.nan, math.inf, -math.inf], [0.1, -0.1, math.nan]], device=device, requires_grad=True)
    scale, zero_point = qparams_for(x, axis, device)
    y = qops.fake_quantize(x, scale, zero_point, -128, 127, axis)
    y.backward(torch.full_like(y, -3.0))
    assert_bits_equal(x.grad, torch.tensor([[0.0, 0.0, 0.0], [-3.0, -3.0, 0.0]]))


def test_only_x_gets_a_gradient(device: torch.device) -> None:
    """scale and zero_point are data: a Parameter passed as scale gets None, not zeros."""
    x = torch.randn(5, device=device, requires_grad=True)
    scale = torch.tensor([0.1], device=device, requires_grad=True)
    zero_point = torch.tensor([1.0], device=device, requires_grad=True)
    y = qops.fake_quantize(x, scale, zero_point, -128, 127)
    y.sum().backward()
    assert x.grad is not None and scale.grad is None and zero_point.grad is None
    y = qops.fake_quantize(x.detach(), scale.detach(), zero_point.detach(), -128, 127)
    assert not y.requires_grad
    with torch.no_grad():
        assert not qops.fake_quantize(x, scale, zero_point, -128, 127).requires_grad


@pytest.mark.parametrize("enabled_value", [0, 1])
@pytest.mark.parametrize("axis", [None, 1], ids=str)
def test_flag_is_honoured_in_backward(axis: int | None, enabled_value: int, device: torch.device) -> None:
    x = torch.tensor([[100.0, -100.0], [0.1, math.nan]], device=device, requires_grad=True)
    scale, zero_point = qparams_for(x, axis, device)
    flag = torch.tensor([enabled_value], dtype=torch.uint8, device=device)
    y = qops.fake_quantize(x, scale, zero_point, -128, 127, axis, flag)
    y.backward(torch.full_like(y, 2.0))
    want = [[0.0, 0.0], [2.0, 0.0]] if enabled_value else [[2.0, 2.0], [2.0, 2.0]]
    assert x.grad.tolist() == want


def test_flag_toggled_before_backward_raises(device: torch.device) -> None:
    """The flag is an input of the backward. Changing it in between is an error, never a silently wrong gradient."""
    x = torch.randn(LARGE, device=device, requires_grad=True)
    flag = torch.ones(1, dtype=torch.uint8, device=device)
    y = qops.fake_quantize(x, *QPARAMS[0].tensors(device), -128, 127, None, flag)
    flag.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("which", ["scale", "zero_point"])
def test_qparams_changed_before_backward_raise(which: str, device: torch.device) -> None:
    x = torch.randn(LARGE, device=device, requires_grad=True)
    scale, zero_point = QPARAMS[0].tensors(device)
    y = qops.fake_quantize(x, scale, zero_point, -128, 127)
    {"scale": scale, "zero_point": zero_point}[which].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.skipif(INTERPRETER, reason="with the interpreter the kernels serve, whatever the size")
def test_of_small_cpu_tensors_a_mask_is_saved() -> None:
    """The gradient is that of the forward, whatever changes after."""
    x = torch.tensor([-9.0, 0.2, 9.0], requires_grad=True)
    scale, zero_point, flag = torch.tensor([0.05]), torch.tensor([3], dtype=torch.int32), torch.ones(1).byte()
    y = qops.fake_quantize(x, scale, zero_point, -128, 127, None, flag)
    for tensor in (scale, zero_point, flag):
        tensor.zero_()
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.tolist() == [0.0, 1.0, 0.0]


def test_observing_between_forward_and_backward_is_safe(device: torch.device) -> None:
    """What update_qparams_ returns is a copy, so the next batch's observation cannot invalidate this graph."""
    low, high = torch.tensor([math.inf], device=device), torch.tensor([-math.inf], device=device)
    scale, zero_point = torch.ones(1, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    x = torch.randn(20, device=device, requires_grad=True)
    qparams = qops.update_qparams_(x.detach(), low, high, scale, zero_point, -8, 7)
    y = qops.fake_quantize(x, *qparams, -8, 7)
    kept = [t.clone() for t in qparams]
    qops.update_qparams_(x.detach() * 100, low, high, scale, zero_point, -8, 7)
    y.sum().backward()
    assert_bits_equal(x.grad, reference_fake_quantize_backward(torch.ones(20), x, *kept, -8, 7))


@pytest.mark.parametrize("axis", [None, 0], ids=str)
def test_double_backward_raises(axis: int | None, device: torch.device) -> None:
    x = torch.randn(4, LARGE // 4, device=device, requires_grad=True)
    y = qops.fake_quantize(x, *qparams_for(x, axis, device), -128, 127, axis)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match="fake_quantize_backward"):
        torch.autograd.grad(dx.sum(), x)
    # and from the operator used directly
    dy = torch.ones_like(x, requires_grad=True)
    dx = qops.fake_quantize_backward(dy, x.detach(), *qparams_for(x, axis, device), -128, 127, axis)
    with pytest.raises((NotImplementedError, RuntimeError), match="fake_quantize_backward"):
        dx.sum().backward()


def test_create_graph_without_second_derivative_works(device: torch.device) -> None:
    """create_graph=True alone must not raise: gradient penalties on other parts of a model use it."""
    x = torch.randn(6, device=device, requires_grad=True)
    scale, zero_point = QPARAMS[0].tensors(device)
    (dx,) = torch.autograd.grad(qops.fake_quantize(x, scale, zero_point, -128, 127).sum(), x, create_graph=True)
    assert_bits_equal(dx, reference_fake_quantize_backward(torch.ones(6), x, scale, zero_point, -128, 127))


@pytest.mark.parametrize("layout", LAYOUTS[:: 2 if INTERPRETER else 1], ids=str)
def test_strides_of_dx_and_odd_dys(layout: Layout, device: torch.device) -> None:
    """Autograd hands over whatever dy the next layer produced: expanded from sum(), transposed, strided."""
    base = layout.fill(adversarial(QPARAMS[0]), device)
    for axis in (None, *range(base.dim())):
        scale, zero_point = qparams_for(base, axis, device)
        order = list(range(base.dim()))[::-1]
        dys = [torch.tensor(2.5, device=device).expand(base.shape)]
        dys.append(torch.randn(base.permute(order).shape).to(device).permute(order))
        for dy in dys:
            x = base.detach().requires_grad_()
            y = qops.fake_quantize(x, scale, zero_point, -128, 127, axis)
            assert y.stride() == torch.empty_like(x).stride()
            # autograd.grad gives dx as it is; .backward would re-lay it out while accumulating
            (dx,) = torch.autograd.grad(y, x, dy)
            want = reference_fake_quantize_backward(dy, x, scale, zero_point, -128, 127, axis)
            assert_bits_equal(dx, want, context=f"{layout} axis {axis}")
            assert dx.stride() == torch.empty_like(x).stride(), f"{layout} axis {axis}"


def test_gradient_through_sum(device: torch.device) -> None:
    x = torch.randn(4, 5, device=device, requires_grad=True)
    qops.fake_quantize(x, *QPARAMS[0].tensors(device), -128, 127).sum().backward()
    assert x.grad.tolist() == torch.ones(4, 5).tolist()


@pytest.mark.parametrize("in_dim", [0, 1, -1])
@pytest.mark.parametrize("axis", [None, 0, -1], ids=str)
def test_vmap_equals_a_loop(axis: int | None, in_dim: int, device: torch.device) -> None:
    x = (torch.randn(3, 4, 5) * 3).to(device)
    first = x.movedim(in_dim, 0)[0]
    scale, zero_point = qparams_for(first, axis, device)

    def one(v: torch.Tensor) -> torch.Tensor:
        return qops.fake_quantize(v, scale, zero_point, -32, 31, axis)

    got = torch.vmap(one, in_dims=in_dim)(x)
    want = torch.stack([one(v) for v in x.movedim(in_dim, 0)])
    assert_bits_equal(got, want)


def test_vmap_over_qparams_equals_a_loop(device: torch.device) -> None:
    """A batch of quantizers, and of both: what an ensemble or a per-sample sweep over scales does."""
    x = (torch.randn(3, 4, 5) * 3).to(device)
    scale = torch.tensor([[0.1], [0.2], [0.05]], device=device)
    zero_point = torch.tensor([[1], [-2], [3]], dtype=torch.int32, device=device)

    def one(v: torch.Tensor, s: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return qops.fake_quantize(v, s, z, -32, 31)

    got = torch.vmap(one)(x, scale, zero_point)
    assert_bits_equal(got, torch.stack([one(v, s, z) for v, s, z in zip(x, scale, zero_point, strict=True)]))
    got = torch.vmap(one, in_dims=(None, 0, 0))(x[0], scale, zero_point)
    assert_bits_equal(got, torch.stack([one(x[0], s, z) for s, z in zip(scale, zero_point, strict=True)]))


def test_vmap_of_a_gradient_equals_a_loop(device: torch.device) -> None:
    x = (torch.randn(3, 4) * 3).to(device)
    scale, zero_point = QPARAMS[0].tensors(device)

    def loss(v: torch.Tensor) -> torch.Tensor:
        return qops.fake_quantize(v, scale, zero_point, -32, 31).square().sum()

    def loop_gradient(v: torch.Tensor) -> torch.Tensor:
        leaf = v.clone().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)[0]

    got = torch.vmap(torch.func.grad(loss))(x)
    assert_bits_equal(got, torch.stack([loop_gradient(v) for v in x]))


def test_functional_grad(device: torch.device) -> None:
    x = (torch.randn(7) * 5).to(device)
    scale, zero_point = QPARAMS[0].tensors(device)
    got = torch.func.grad(lambda v: qops.fake_quantize(v, scale, zero_point, -32, 31).sum())(x)
    assert_bits_equal(got, reference_fake_quantize_backward(torch.ones(7), x, scale, zero_point, -32, 31))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool, device: torch.device) -> None:
    scale, zero_point = QPARAMS[0].tensors(device)

    def block(v: torch.Tensor) -> torch.Tensor:
        return qops.fake_quantize(v * 2, scale, zero_point, -32, 31).square()

    x = torch.randn(4, 5).to(device)
    plain, saved = x.clone().requires_grad_(), x.clone().requires_grad_()
    block(plain).sum().backward()
    checkpoint(block, saved, use_reentrant=use_reentrant).sum().backward()
    assert_bits_equal(saved.grad, plain.grad)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=dtype_id)
def test_autocast_leaves_the_dtype_alone(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(5).to(dtype).to(device).requires_grad_()
    scale, zero_point = QPARAMS[0].tensors(device)
    want = qops.fake_quantize(x, scale, zero_point, -32, 31)
    for target in (torch.bfloat16, torch.float16):
        with torch.autocast(device.type, target):
            y = qops.fake_quantize(x, scale, zero_point, -32, 31)
            low, _ = qops.aminmax(x)
        assert y.dtype == dtype and low.dtype == dtype
        assert_bits_equal(y, want)
        y.sum().backward()
        assert x.grad.dtype == dtype


def test_inference_mode(device: torch.device) -> None:
    """The operators run on inference tensors, and inference inputs (scale made there) work outside without grad."""
    scale, zero_point = QPARAMS[0].tensors(device)
    x = torch.randn(6, 3, device=device)
    want = qops.fake_quantize(x, scale, zero_point, -32, 31)
    with torch.inference_mode():
        y = qops.fake_quantize(x, scale, zero_point, -32, 31)
        assert y.is_inference()
        state = torch.tensor(math.inf, device=device), torch.tensor(-math.inf, device=device)
        qops.observe_minmax_(x, *state)
        assert (state[0].item(), state[1].item()) == (x.min().item(), x.max().item())
        low, high = qops.aminmax(x, 0)
        qops.choose_qparams(low, high, -8, 7, dtype=torch.qint8, qscheme=torch.per_channel_affine)
    assert_bits_equal(y, want)


def test_observing_needs_no_detach_and_builds_no_graph(device: torch.device) -> None:
    """Statistics are not differentiable: x with requires_grad neither raises nor drags the graph into the buffers."""
    x = torch.randn(4, 3, device=device, requires_grad=True)
    state = [torch.tensor([value], device=device) for value in (math.inf, -math.inf, 1.0)]
    zero_point = torch.zeros(1, dtype=torch.int32, device=device)
    for factor in (1, 2):  # the second batch meets what the first one wrote
        y = x * factor
        qops.observe_minmax_(y, *state[:2], 0.1)
        results = (
            *qops.aminmax(y),
            *qops.choose_qparams(*state[:2], -8, 7),
            *qops.update_qparams_(y, *state, zero_point, -8, 7, averaging_constant=0.1),
        )
        assert not [t for t in (*state, *results) if t.requires_grad]


def test_gradient_accumulates_and_flows_through_neighbours(device: torch.device) -> None:
    x = torch.tensor([0.3, 50.0, -50.0, -0.2], device=device, requires_grad=True)
    scale, zero_point = QPARAMS[1].tensors(device)
    for _ in range(2):
        (torch.relu(qops.fake_quantize(x * 2, scale, zero_point, -128, 127)) * 3).sum().backward()
    assert x.grad.tolist() == [12.0, 0.0, 0.0, 0.0]
