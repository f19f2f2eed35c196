"""The short ways that modules take on the CPU, and what makes them go the long one: results never depend on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qkernels.modules as ours

X = torch.linspace(-1.5, 2.0, 48).reshape(6, 8)
QUANTIZED: dict[str, Any] = {"quant_min": 0, "quant_max": 255, "dtype": torch.quint8}


def learning(**options: Any) -> Any:
    return started(ours.LearnableFakeQuantize(ours.MovingAverageMinMaxObserver, **QUANTIZED, **options))


def started(module: Any) -> Any:
    module(X)
    module.enable_param_learning()
    return module


def idle(cls: type = ours.FakeQuantize) -> Any:
    module = cls(ours.MovingAverageMinMaxObserver, **QUANTIZED)
    module(X)
    module.disable_observer()
    return module


def fused() -> Any:
    return ours.FusedMovingAvgObsFakeQuantize(ours.MovingAverageMinMaxObserver, **QUANTIZED)


def as_attribute(module: Any, name: str) -> None:
    """The buffer as a plain attribute, which Module's registry does not know."""
    buffer = getattr(module, name)
    delattr(module, name)
    setattr(module, name, buffer)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (learning, ("fake_quant_enabled", "static_enabled", "gradient_enabled")),
        (idle, ("fake_quant_enabled", "observer_enabled", "scale", "zero_point")),
        (fused, ("fake_quant_enabled", "observer_enabled", "scale", "zero_point")),
    ],
)
def test_buffers_may_be_plain_attributes(make: Any, names: tuple[str, ...]) -> None:
    for name in names:
        module = make()
        expected = make()(X)
        as_attribute(module, name)
        torch.testing.assert_close(module(X), expected, rtol=0, atol=0)


def test_eps_may_be_a_number() -> None:
    module = learning()
    expected = module(X)
    del module.eps
    module.eps = 1e-6
    assert torch.equal(module(X), expected)


def test_bad_options_are_refused() -> None:
    module = learning(use_grad_scaling=True)
    module.grad_scale_elements = "bogus"
    with pytest.raises(ValueError, match=r"grad_elements must be None or one of .*; got 'bogus'"):
        module(X)


@pytest.mark.parametrize("flag", ["fake_quant_enabled", "gradient_enabled"])
def test_flags_of_another_dtype_are_refused(flag: str) -> None:
    module = learning()
    setattr(module, flag, torch.ones(1))
    with pytest.raises(TypeError, match=r"must be uint8, int32, int64 or bool; got torch.float32"):
        module(X)


def test_a_refused_x_leaves_the_scale_as_it_was() -> None:
    module = learning()
    module.scale.data.fill_(1e-12)
    with pytest.raises(TypeError):
        module(X.int())
    assert module.scale.item() == torch.tensor(1e-12).item()


class _KeepsValid(ours.LearnableFakeQuantize):
    def keep_valid(self) -> None:
        self.scale.data.fill_(0.5)


class _Observes(ours.LearnableFakeQuantize):
    @property
    def _observing(self) -> torch.Tensor:
        return torch.ones(1, dtype=torch.uint8)


class _HasQParams(ours.FakeQuantize):
    def _observed_qparams(self, X: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([0.5]), torch.tensor([0], dtype=torch.int32)


def test_a_subclass_with_steps_of_its_own_has_them_called() -> None:
    module = started(_KeepsValid(ours.MovingAverageMinMaxObserver, **QUANTIZED))
    module(X)
    assert module.scale.item() == 0.5
    module = started(_Observes(ours.MovingAverageMinMaxObserver, **QUANTIZED))
    module(10 * X)
    assert module.activation_post_process.max_val > 2.0
    assert set(idle(_HasQParams)(X).mul(2).tolist()[-1]) <= {0.0, 1.0, 2.0, 3.0, 4.0}


def test_a_plain_subclass_takes_the_short_ways() -> None:
    class Named(ours.LearnableFakeQuantize):
        """Nothing but a name."""

    assert Named.short_ways and not _KeepsValid.short_ways and not _HasQParams.short_ways


def test_an_observer_without_a_range_and_fake_quantization_off() -> None:
    """The short way must not ask such an observer for what is not needed."""
    module = ours.FakeQuantize(ours.MovingAverageMinMaxObserver, **QUANTIZED)
    module.disable_observer()
    module.disable_fake_quant()
    module.activation_post_process = torch.nn.Identity()
    assert module(X) is X
