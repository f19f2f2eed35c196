"""What a profiler sees: NVTX ranges around launches when they are switched on, operators by name in torch.profiler."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import qkernels
from qkernels import ops, profiling
from qkernels.launch import launch

ROOT = Path(__file__).resolve().parent.parent


class Recorder:
    """An NVTX domain that notes what is pushed and popped."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def get_event_attributes(self, message: str) -> str:
        return message

    def push_range(self, attributes: str) -> None:
        self.events.append(attributes)

    def pop_range(self) -> None:
        self.events.append("pop")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    recorder = Recorder()
    monkeypatch.setattr(profiling, "_open_domain", lambda: recorder)
    yield recorder
    assert profiling.domain is None  # every test leaves the switch as it found it


class Kernel(dict):  # type: ignore[type-arg]
    """Stands for a Triton kernel of one program that runs `body`."""

    __name__ = "_some_kernel"

    def __init__(self, body: Callable[[], None]) -> None:
        super().__init__({(1,): lambda *args, **options: body()})


def run(body: Callable[[], None] = lambda: None) -> None:
    launch(Kernel(body), (1,), SimpleNamespace(device=torch.device("cpu")))


def test_a_launch_is_a_range_only_inside_the_block(recorder: Recorder) -> None:
    run()
    with qkernels.nvtx_ranges():
        run(lambda: recorder.events.append("runs"))
        with qkernels.nvtx_ranges(False):
            run()
        run()
    run()
    assert recorder.events == ["_some_kernel", "runs", "pop", "_some_kernel", "pop"]


def test_a_failing_launch_closes_its_range_and_a_failing_block_the_switch(recorder: Recorder) -> None:
    def fail() -> None:
        raise RuntimeError("out of resources")

    with pytest.raises(RuntimeError, match="out of resources"), qkernels.nvtx_ranges():
        run(fail)
    run()
    assert recorder.events == ["_some_kernel", "pop"]


def test_a_range_is_closed_in_the_domain_it_was_opened_in(recorder: Recorder) -> None:
    """Another thread may turn the switch while a launch is under way."""
    with qkernels.nvtx_ranges():
        run(lambda: setattr(profiling, "domain", None))
    assert recorder.events == ["_some_kernel", "pop"]


@pytest.mark.interpreter_only
def test_every_launch_of_an_operator_is_a_range_of_its_kernel(recorder: Recorder) -> None:
    x = torch.randn(8, 64, requires_grad=True)
    scale, zero_point = torch.ones(1, requires_grad=True), torch.zeros(1)
    with qkernels.nvtx_ranges():
        ops.aminmax(x)
        y = ops.learnable_fake_quantize(x, scale, zero_point, -8, 7)
        y.backward(torch.ones_like(y))  # autograd calls from a thread of its own on a GPU
    kernels = ["_minmax_flat_kernel", "_fake_quant_flat_kernel", "_learnable_backward_flat_kernel"]
    assert recorder.events == [event for kernel in kernels for event in (kernel, "pop")]


def in_a_fresh_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != profiling.SWITCH}
    env |= {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize(("value", "on"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_the_environment_switches_a_process(value: str | None, on: bool) -> None:
    """Off, nvtx is not even imported. On, the real package: without a profiler its ranges go nowhere."""
    code = (
        "import sys, qkernels\n"
        "print(qkernels.profiling.domain is not None, 'nvtx' in sys.modules)\n"
        "with qkernels.nvtx_ranges():\n"
        "    qkernels.profiling.domain.push_range(qkernels.profiling.attributes(qkernels.profiling.domain, 'a'))\n"
        "    qkernels.profiling.domain.pop_range()\n"
    )
    done = in_a_fresh_process(code, **({} if value is None else {profiling.SWITCH: value}))
    assert (done.returncode, done.stdout) == (0, f"{on} {on}\n"), done.stderr


@pytest.mark.parametrize(
    ("before", "value", "error"),
    [
        ("", "yes", "ValueError: QKERNELS_NVTX must be 0 or 1; got 'yes'"),
        (
            "import sys; sys.modules['nvtx'] = None; ",
            "1",
            "ImportError: nvtx_ranges: the package nvtx must be installed for QKERNELS_NVTX=1",
        ),
    ],
)
def test_what_cannot_be_switched_on_is_an_error(before: str, value: str, error: str) -> None:
    done = in_a_fresh_process(f"{before}import qkernels", **{profiling.SWITCH: value})
    assert done.returncode == 1
    assert error in done.stderr


# --- torch.profiler --------------------------------------------------------------------------------------------------


def _state(device: torch.device) -> dict[str, torch.Tensor]:
    return {
        "x": torch.linspace(-2.0, 2.0, 64, device=device),
        "scale": torch.full((1,), 0.1, device=device),
        "zero_point": torch.zeros(1, dtype=torch.int32, device=device),
        "min_val": torch.full((1,), -1.0, device=device),
        "max_val": torch.full((1,), 1.0, device=device),
        "counts": torch.ones(16, device=device),
    }


# Every public operator, called in eager mode with these tensors.
CALLS: dict[str, Callable[[Any], object]] = {
    "aminmax": lambda s: ops.aminmax(s.x),
    "choose_qparams": lambda s: ops.choose_qparams(
        s.min_val, s.max_val, -128, 127, dtype=torch.qint8, qscheme=torch.per_tensor_affine
    ),
    "fake_quantize": lambda s: ops.fake_quantize(s.x, s.scale, s.zero_point, -128, 127),
    "fake_quantize_backward": lambda s: ops.fake_quantize_backward(s.x, s.x, s.scale, s.zero_point, -128, 127),
    "histogram": lambda s: ops.histogram(s.x, 16, s.min_val, s.max_val),
    "learnable_fake_quantize": lambda s: ops.learnable_fake_quantize(s.x, s.scale, s.zero_point, -128, 127),
    "learnable_fake_quantize_backward": lambda s: ops.learnable_fake_quantize_backward(
        s.x, s.x, s.scale, s.zero_point, -128, 127
    ),
    "observe_histogram_": lambda s: ops.observe_histogram_(s.x, s.counts, s.min_val, s.max_val),
    "observe_minmax_": lambda s: ops.observe_minmax_(s.x, s.min_val, s.max_val, 0.01),
    "search_histogram_qparams": lambda s: ops.search_histogram_qparams(s.counts, s.min_val, s.max_val, 256, -128, 127),
    "search_histogram_range": lambda s: ops.search_histogram_range(s.counts, s.min_val, s.max_val, 256),
    "update_qparams_": lambda s: ops.update_qparams_(
        s.x, s.min_val, s.max_val, s.scale, s.zero_point, -128, 127, rule="affine"
    ),
    "update_qparams_from_histogram_": lambda s: ops.update_qparams_from_histogram_(
        s.counts, s.min_val, s.max_val, s.scale, s.zero_point, 256, -128, 127
    ),
}


def names_in_profile(call: Callable[[], object]) -> set[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return {event.key for event in profile.key_averages() if event.key.startswith("qkernels::")}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", [name for name in ops.__all__ if name != "merge_histograms"])  # a plain function
def test_torch_profiler_shows_the_operator(name: str, device: torch.device) -> None:
    """Some eager calls go past the dispatcher, which is what records names; not while a profiler is on."""
    state = SimpleNamespace(**_state(device))
    assert names_in_profile(lambda: CALLS[name](state)) == {f"qkernels::{name}"}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["fake_quantize", "learnable_fake_quantize"])
def test_torch_profiler_shows_the_backward(name: str, device: torch.device) -> None:
    state = SimpleNamespace(**_state(device))
    state.x.requires_grad_()
    state.scale.requires_grad_()  # with x alone the learnable operator needs no more than the other one's backward
    seen = names_in_profile(lambda: CALLS[name](state).sum().backward())
    assert seen == {f"qkernels::{name}", f"qkernels::{name}_backward"}
