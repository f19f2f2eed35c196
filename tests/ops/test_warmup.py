"""qkernels.warmup: nothing of the caller's moves, every kernel is launched, and without a GPU nothing happens."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

import qkernels
from qkernels.launch import INTERPRETED
from qkernels.ops import warmup as module

ROOT = Path(__file__).resolve().parent.parent.parent


class Noted(nn.Module):
    """Notes what ran, the gradients that came back too, in a list that copies share."""

    ran: ClassVar[list[str]] = []

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        self.ran.append("forward")
        y = torch.nn.functional.dropout(x * 2, 0.5, self.training)
        if y.requires_grad:
            y.register_hook(lambda dy: self.ran.append(f"backward {tuple(dy.stride())}"))
        return {"y": y}


def model() -> nn.Module:
    from qkernels.modules import FakeQuantize

    Noted.ran = []
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), FakeQuantize(), Noted())


def test_on_the_cpu_nothing_runs() -> None:
    assert qkernels.warmup(model(), torch.randn(4, 6)) is None
    assert Noted.ran == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is something to warm up")
def test_shapes_without_a_gpu_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_run_operators", lambda *arguments: pytest.fail("ran"))
    assert qkernels.warmup(shapes=[(64, 64)], dtypes=[torch.float16], axis=0) is None


@pytest.mark.parametrize("training", [True, False])
def test_a_copy_runs_and_the_model_stays(training: bool) -> None:
    mine = model().train(training)
    x = torch.randn(4, 6, requires_grad=True)
    state = {name: value.clone() for name, value in mine.state_dict().items()}
    random = torch.get_rng_state()
    module._run_a_copy(mine, (x,))
    assert Noted.ran == (["forward", "backward (5, 1)"] if training else ["forward"])
    assert all(torch.equal(value, state[name]) for name, value in mine.state_dict().items())
    assert [p.grad for p in (*mine.parameters(), x)] == [None] * 5
    assert torch.equal(torch.get_rng_state(), random)
    assert mine.training is training


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((), {}, ValueError, "warmup: give a model with example inputs, or shapes"),
        ((None, torch.ones(1)), {}, TypeError, "warmup: inputs need a model"),
        ((torch.ones(1),), {}, TypeError, "warmup: model must be a torch.nn.Module; got Tensor"),
        ((torch.compile(nn.Linear(1, 1)),), {}, ValueError, "is the result of torch.compile; call it once instead"),
    ],
    ids=["nothing", "inputs", "tensor", "compiled"],
)
def test_errors(arguments: tuple, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        qkernels.warmup(*arguments, **options)


@pytest.mark.interpreter
@pytest.mark.parametrize(("axis", "kind"), [(None, "flat"), (1, "tiled"), (-1, "tiled")])
def test_every_operator_is_launched(axis: int | None, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: set[str] = set()
    if INTERPRETED:
        from qkernels import fake_quant, lsq, minmax

        for family in (fake_quant, lsq, minmax):

            def note(kernel, *arguments, launch=family.launch, **options):
                launched.add(kernel.__name__)
                launch(kernel, *arguments, **options)

            monkeypatch.setattr(family, "launch", note)
    module._run_operators((4, 6, 5), torch.float16, axis, torch.device("cpu"))
    kernels = {f"_{name}_{kind}_kernel" for name in ("minmax", "fake_quant", "learnable_backward")}
    assert launched - {"_sum_partials_kernel"} == (kernels if INTERPRETED else set())


def test_it_loads_without_torch_ao() -> None:
    code = "import sys, qkernels; print(qkernels.warmup.__module__, 'qkernels.modules' in sys.modules)"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "qkernels.ops.warmup False"


@pytest.mark.cuda
def test_after_it_no_step_compiles(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    from qkernels.modules import FakeQuantize

    compiled: list[str] = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **options: compiled.append(options["repr"])
    )
    mine = nn.Sequential(nn.Linear(48, 80), FakeQuantize()).to(device)
    x = torch.randn(112, 48, device=device)
    qkernels.warmup(mine, x)
    compiled.clear()
    nn.functional.mse_loss(mine(x), torch.zeros(112, 80, device=device)).backward()
    assert compiled == []
