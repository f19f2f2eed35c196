"""Learnable fake quantizers where training code is unusual: default dtypes, DDP, optimizers after freeze, odd loads."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

import qkernels.modules as ours
from qkernels.ops import learnable_fake_quantize_backward


def per_channel(**options: Any) -> ours.LearnableFakeQuantize:
    return ours.LearnableFakeQuantize(
        ours.MovingAveragePerChannelMinMaxObserver,
        quant_min=-8,
        quant_max=7,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
        **options,
    )


def per_tensor(**options: Any) -> ours.LearnableFakeQuantize:
    return ours.LearnableFakeQuantize(ours.MovingAverageMinMaxObserver, quant_min=0, quant_max=15, **options)


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.interpreter
def test_the_default_dtype_changes_nothing(dtype: torch.dtype, axis: int | None, device: torch.device) -> None:
    x = torch.linspace(-3, 2, 4000).reshape(4, 1000).to(device)
    channels = 1 if axis is None else 4
    scale, zero_point = torch.full((channels,), 0.013, device=device), torch.full((channels,), 60.0, device=device)
    arguments = (torch.cos(x), x, scale, zero_point, -128, 127, 1.0, axis)
    want = learnable_fake_quantize_backward(*arguments)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        got = learnable_fake_quantize_backward(*arguments)
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_an_optimizer_leaves_a_frozen_quantizer_alone() -> None:
    """Momentum and weight decay would go on moving a Parameter whose gradient is zero."""
    quantizer = per_tensor(scale=0.1, zero_point=3.0)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    quantizer(torch.randn(50))
    quantizer.enable_param_learning()
    x = torch.randn(50, requires_grad=True)
    for number in range(6):
        if number == 3:
            quantizer.freeze()
            kept = quantizer.scale.detach().clone(), quantizer.zero_point.detach().clone()
        optimizer.zero_grad(set_to_none=False)
        quantizer(x).square().sum().backward()
        optimizer.step()
    assert torch.equal(quantizer.scale, kept[0]) and torch.equal(quantizer.zero_point, kept[1])


def test_assigning_a_checkpoint_to_a_module_on_meta() -> None:
    trained = per_tensor()
    trained(torch.randn(50))
    empty = per_tensor().to("meta")
    empty.load_state_dict(copy.deepcopy(trained.state_dict()), assign=True)  # which shares tensors
    x = torch.randn(50)
    assert torch.equal(empty(x), trained(x))


@pytest.mark.parametrize("shape", [(4,), (2, 2)], ids=str)
def test_a_checkpoint_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    """And leaves the module as it was."""
    state = per_tensor().state_dict() | {"scale": torch.ones(shape), "zero_point": torch.zeros(shape)}
    module = per_tensor()
    with pytest.raises(RuntimeError, match="size mismatch for scale"):
        module.load_state_dict(state)
    assert module.scale.shape == (1,)
    if len(shape) == 2:
        channels = per_channel()
        observed = per_channel(channel_len=4).state_dict() | {
            "scale": torch.ones(shape),
            "zero_point": torch.zeros(shape),
        }
        with pytest.raises(RuntimeError, match="size mismatch for scale"):
            channels.load_state_dict(observed)
        assert channels.scale.shape == (1,)


def test_a_schedule_does_not_turn_on_what_was_turned_off() -> None:
    model = torch.nn.Sequential(per_tensor(), torch.nn.Linear(4, 4))
    model[0].zero_point.requires_grad_(False)  # scales alone
    schedule = ours.LearningSchedule(model, observe_steps=1)
    for _ in range(3):
        model(torch.randn(2, 4)).sum().backward()
        schedule.step()
    assert model[0].scale.requires_grad and not model[0].zero_point.requires_grad
    assert model[0].zero_point.grad is None and model[0].scale.grad is not None


@pytest.mark.parametrize("library", ["torch.ao", "torchao"])
def test_channel_len_is_checked(library: str) -> None:
    if library == "torch.ao":
        module: Any = ours
    else:
        pytest.importorskip("torchao", reason="the PT2E face needs torchao")
        from qkernels.modules import pt2e as module
    make = module.LearnableFakeQuantize
    for bad in (0, -5):
        with pytest.raises(AssertionError, match="positive integer"):
            make(module.MovingAverageMinMaxObserver, channel_len=bad)
    with pytest.raises(ValueError, match="channel_len needs a per-channel qscheme; got 4"):
        make(module.MovingAverageMinMaxObserver, channel_len=4)


@pytest.mark.parametrize("observing", [False, True])
def test_functional_gradients(observing: bool) -> None:
    """torch.func over the module's Parameters."""
    quantizer = per_tensor(scale=0.1, zero_point=3.0)
    quantizer.set_stage(observing=observing, learning=True)
    x = torch.linspace(-1, 2, 40)

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(quantizer, parameters, (x,)).square().sum()

    values = {name: parameter.detach().clone() for name, parameter in quantizer.named_parameters()}
    gradients = torch.func.grad(loss)(values)
    assert gradients["scale"].isfinite().all() and gradients["scale"].any()


def test_ddp_trains_through_the_stages() -> None:
    """Every Parameter takes part in every backward: DDP raises where one that requires a gradient gets none."""

    def no_reduction(_, bucket):  # DDP wants its own annotations or none
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    # torch's process group for tests: no threads and no network; a lone rank has nothing to reduce
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        model = torch.nn.Sequential(per_tensor(), torch.nn.Linear(4, 4), per_tensor())
        schedule = ours.LearningSchedule(model, observe_steps=2)
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        parallel.register_comm_hook(None, no_reduction)
        for _ in range(4):
            parallel(torch.randn(2, 4)).square().sum().backward()
            schedule.step()
        assert schedule.stage == "learn" and model[0].scale.grad.any()
    finally:
        torch.distributed.destroy_process_group()
