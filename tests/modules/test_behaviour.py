"""What DDP, exporters and users with observers of their own rely on, beyond the numbers."""

from __future__ import annotations

import pytest
import torch
import torch.ao.quantization as stock

import qkernels.modules as ours
from tests.modules import support as s

every_case = pytest.mark.parametrize("case", list(s.CASES))
interpreter = pytest.mark.interpreter


@interpreter
@every_case
def test_buffers_are_updated_in_place(case: str, device: torch.device) -> None:
    """DDP broadcasts the storages it saw: once the channels are known every buffer keeps its address and identity."""
    mine, _ = s.make_case(case, device)
    mine(s.case_batch(0, device))
    before = dict(mine.named_buffers())
    pointers = {name: b.data_ptr() for name, b in before.items()}
    for seed in range(1, 4):
        mine(s.case_batch(seed, device, 2**seed).requires_grad_()).sum().backward()
        mine.disable_fake_quant() if seed == 2 else mine.enable_fake_quant()
    assert {name: b.data_ptr() for name, b in mine.named_buffers()} == pointers
    assert all(b is before[name] for name, b in mine.named_buffers())


@interpreter
@every_case
def test_input_is_not_written_and_output_is_another_tensor(case: str, device: torch.device) -> None:
    mine, _ = s.make_case(case, device)
    x = s.case_batch(0, device)
    kept = x.clone()
    y = mine(x)
    assert torch.equal(x, kept)
    assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    assert not y.requires_grad
    with torch.no_grad():
        assert not mine(x.requires_grad_()).requires_grad


@interpreter
@every_case
def test_memory_format_is_kept(case: str, device: torch.device) -> None:
    mine, _ = s.make_case(case, device)
    x = torch.randn(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last)
    assert mine(x).stride() == x.stride()
    x = torch.randn(2, 3, device=device).t().contiguous().t()
    mine, _ = s.make_case(case, device)
    assert mine(x).stride() == x.stride()


@interpreter
@pytest.mark.parametrize("which", [*s.OBSERVERS, *s.CASES])
def test_calibration_in_inference_mode_then_training(which: str, device: torch.device) -> None:
    """State shaped in inference mode stays ordinary, as torch.ao's does: autograd cannot save inference tensors."""
    mine = s.modules_that_run(device)[which]()
    twin = s.modules_that_run(device)[which]()
    with torch.inference_mode():
        mine(s.case_batch(0, device))
    twin(s.case_batch(0, device))
    x, ref = s.case_batch(1, device).requires_grad_(), s.case_batch(1, device).requires_grad_()
    (mine(x) * 2).sum().backward()
    (twin(ref) * 2).sum().backward()
    assert torch.equal(x.grad, ref.grad)
    assert not [name for name, b in mine.named_buffers() if b.is_inference()]
    s.check_state(mine.cpu(), twin.cpu())


class ClippedObserver(ours.MinMaxObserver):
    """A user's observer: looks at nine tenths of the range."""

    def forward(self, x_orig: torch.Tensor) -> torch.Tensor:
        super().forward(x_orig * 0.9)
        return x_orig


class PowerOfTwoObserver(ours.MovingAverageMinMaxObserver):
    """A user's observer: scales that are powers of two."""

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        scale, zero_point = super().calculate_qparams()
        return torch.exp2(torch.ceil(torch.log2(scale))), zero_point


@interpreter
@pytest.mark.parametrize("observer", [ClippedObserver, PowerOfTwoObserver])
def test_fake_quantize_honours_what_users_override(observer: type, device: torch.device) -> None:
    """torch.ao's FakeQuantize calls the observer's forward and calculate_qparams; a shortcut must not skip them."""
    mine, theirs = ours.FakeQuantize(observer=observer).to(device), stock.FakeQuantize(observer=observer)
    for seed in range(2):
        y, y_ref = mine(s.case_batch(seed, device)), theirs(s.case_batch(seed, torch.device("cpu")))
        s.check_state(mine, theirs)
        s.check_bits(y, y_ref, "y")


@pytest.mark.parametrize("which", [*s.OBSERVERS, *s.CASES])
def test_no_host_reads(which: str, device: torch.device) -> None:
    """They run on the meta device, where any read of a value raises; on a GPU also under sync debugging."""
    module = s.modules_that_run(torch.device("cpu"))[which]().to("meta")
    for _ in range(2):  # the first shapes per-channel state
        x = torch.empty(4, 16, device="meta", requires_grad=True)
        module(x * 1).sum().backward()
        assert x.grad.shape == x.shape
    if device.type == "cuda":
        module = s.modules_that_run(device)[which]()
        for step in range(3):
            x = torch.randn(4, 16, device=device, requires_grad=True)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error" if step else "default")
            try:
                module(x * 1).sum().backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")


@interpreter
def test_torchs_fused_op_and_its_observer_disagree_for_symmetric_schemes(device: torch.device) -> None:
    """pytorch #194816: training uses one scale, conversion another. Ours too by default; consistent_qparams ends it."""
    kwargs = {**s.SYMMETRIC, "qscheme": torch.per_tensor_symmetric}
    x = torch.tensor([-1.0, 0.5, 2.0])
    theirs = stock.FusedMovingAvgObsFakeQuantize(**kwargs)
    theirs(x)
    assert not torch.equal(theirs.scale, theirs.calculate_qparams()[0])
    default = ours.FusedMovingAvgObsFakeQuantize(**kwargs).to(device)
    default(x.to(device))
    s.check_same(default.scale, theirs.scale, "scale")
    consistent = ours.FusedMovingAvgObsFakeQuantize(consistent_qparams=True, **kwargs).to(device)
    consistent(x.to(device))
    s.check_same(consistent.scale, theirs.calculate_qparams()[0], "scale with consistent_qparams")
    s.check_same(consistent.calculate_qparams()[0], theirs.calculate_qparams()[0], "calculate_qparams")
    assert set(consistent.state_dict()) == set(theirs.state_dict())


@interpreter
@pytest.mark.parametrize("fill", [float("nan"), float("inf"), -float("inf")])
def test_special_values_in_frozen_modules(fill: float, device: torch.device) -> None:
    """Observer off: NaN propagates, infinities saturate, both with gradient 0; their neighbours do not notice."""
    for case in list(s.CASES)[:: 3 if s.INTERPRETER else 1]:
        mine, _ = s.make_case(case, device)
        mine(s.case_batch(0, device))
        mine.disable_observer()
        plain = s.case_batch(1, device, 0.25)
        expected = mine(plain)
        x = plain.clone()
        x[:, 3] = fill
        x.requires_grad_()
        y = mine(x)
        y.backward(torch.ones_like(y))
        others = [c for c in range(16) if c != 3]
        assert torch.equal(y[:, others], expected[:, others]), case
        assert torch.equal(x.grad[:, 3], torch.zeros(4, device=device)), case
        extreme = torch.full_like(plain, 1e6 if fill > 0 else -1e6)
        assert y[:, 3].isnan().all() if fill != fill else torch.equal(y[:, 3], mine(extreme)[:, 3]), case
