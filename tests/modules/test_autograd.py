"""What autograd keeps and needs: saved tensors, version counters, hooks, several forwards before a backward."""

from __future__ import annotations

import pytest
import torch

from qkernels.ops.small_cpu import SMALL
from tests.modules import support as s

every_case = pytest.mark.parametrize("case", list(s.CASES))
interpreter = pytest.mark.interpreter


@interpreter
@every_case
@pytest.mark.parametrize("frozen", [False, True], ids=["observing", "frozen"])
def test_second_forward_before_backward(case: str, frozen: bool, device: torch.device) -> None:
    """A later in-place observe must neither invalidate nor change what the first forward saved.

    Observing: the second batch narrows the range, so the second qparams would clip the first batch's extremes. Frozen:
    the first batch is clipped by old qparams, and the second batch widens them.
    """

    def gradients(module: torch.nn.Module, on: torch.device, alone: bool = False) -> list[torch.Tensor]:
        module(s.case_batch(5, on, 0.3 if frozen else 1))
        first, second = (
            s.case_batch(5, on).requires_grad_(),
            s.case_batch(6, on, 30 if frozen else 1e-3).requires_grad_(),
        )
        if frozen:
            module.disable_observer()
        y = module(first)
        module.enable_observer()
        if not alone:
            (y.square().sum() + module(second).sum()).backward()
            return [first.grad, second.grad]
        y.square().sum().backward()
        return [first.grad]

    mine, theirs = s.make_case(case, device)
    got = gradients(mine, device)
    assert torch.equal(got[0], gradients(s.make_case(case, device)[0], device, alone=True)[0])
    assert (got[0] == 0).any() or not frozen, "nothing was clipped: this shows nothing"
    if s.torch_ao_has(case):
        for dx, dx_ref in zip(got, gradients(theirs, torch.device("cpu")), strict=True):
            s.check_same(dx, dx_ref, "dx")


@interpreter
@every_case
def test_version_counters_tell_autograd_of_the_update(case: str, device: torch.device) -> None:
    """Updates are honest: who saved a statistic and needs it later gets autograd's error, not a wrong number."""
    mine, _ = s.make_case(case, device)
    mine(s.case_batch(0, device))
    watched = [mine.scale, mine.activation_post_process.min_val, mine.activation_post_process.max_val]
    versions = [b._version for b in watched]
    mine(s.case_batch(1, device, 3))
    assert all(b._version > v for b, v in zip(watched, versions, strict=True))
    weight = torch.ones_like(mine.scale, requires_grad=True)
    product = (weight * mine.scale).sum()
    mine(s.case_batch(2, device, 5))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@every_case
def test_only_x_and_qparams_are_saved_for_backward(case: str, device: torch.device) -> None:
    """No mask: torch.ao keeps one byte per element beside x; here nothing as large as x but x itself."""
    mine, _ = s.make_case(case, device)
    leaf = torch.randn(8, SMALL // 4, device=device, requires_grad=True)  # more than torch's operators serve
    x = leaf * 1  # not a leaf, so that saving it shows
    mine(x.detach())
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = mine(x)
    small = [t for t in saved if t.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()]
    assert len(saved) > len(small), "x is not saved: how does backward know the mask?"
    assert sum(t.untyped_storage().nbytes() for t in small) <= 256, [(t.dtype, tuple(t.shape)) for t in small]
    y.sum().backward()


@interpreter
@every_case
def test_hooks_run(case: str, device: torch.device) -> None:
    """Pre-forward, forward and full backward hooks see and change what they would around torch.ao's module."""

    def with_hooks(module: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        events: list[str] = []
        module.register_forward_pre_hook(lambda m, args: (events.append("pre"), (args[0] * 2,))[1])
        module.register_forward_hook(lambda m, args, out: (events.append("post"), out + 1)[1])
        module.register_full_backward_hook(lambda m, gi, go: (events.append("backward"), (gi[0] * 3,))[1])
        x = x.requires_grad_()
        y = module(x)
        y.sum().backward()
        return y, x.grad, events

    mine, theirs = s.make_case(case, device)
    y, dx, events = with_hooks(mine, s.case_batch(0, device))
    assert events == ["pre", "post", "backward"]
    if s.torch_ao_has(case):
        y_ref, dx_ref, events_ref = with_hooks(theirs, s.case_batch(0, torch.device("cpu")))
        assert events == events_ref
        s.check_bits(y, y_ref, "y")
        s.check_same(dx, dx_ref, "dx")


@interpreter
@every_case
def test_one_instance_at_two_places(case: str, device: torch.device) -> None:
    mine, theirs = s.make_case(case, device)

    def loss(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return module(module(x) * 3 + 0.1).square().sum()

    x = s.case_batch(0, device).requires_grad_()
    loss(mine, x).backward()
    if s.torch_ao_has(case):
        ref = s.case_batch(0, torch.device("cpu")).requires_grad_()
        loss(theirs, ref).backward()
        s.check_same(x.grad, ref.grad, "dx")
        s.check_state(mine, theirs)
    assert x.grad.isfinite().all()


@every_case
def test_autocast_leaves_the_type_and_the_numbers_alone(case: str, device: torch.device) -> None:
    mine, twin = s.make_case(case, device)[0], s.make_case(case, device)[0]
    x = s.case_batch(0, device)
    with torch.autocast(device.type, torch.bfloat16):
        y = mine(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, twin(x))
    s.check_state(mine.cpu(), twin.cpu())
