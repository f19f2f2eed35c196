"""The programs of `make gpu` that measure, on the CPU: torch keeps the contract there, and no graph is captured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from benchmarks import bandwidth, rounding, timer
from benchmarks.timer import Spread
from qkernels import ops
from qkernels.autotune import histogram_heuristics

CPU = torch.device("cpu")
FAKE_QUANTIZE = {kind.name: kind for kind in rounding.KINDS if not kind.name.startswith("learnable")}

# --- rounding --------------------------------------------------------------------------------------------------------


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", rounding.KINDS, ids=lambda kind: kind.name)
def test_torch_on_the_cpu_gives_our_values(kind: rounding.Kind, device: torch.device) -> None:
    """y is torch's, bit for bit, and so is dx where torch's operator is not one of those that learn."""
    row = rounding.compare(kind, torch.float32, device, scales=5, seed=0)
    assert row.refused is None
    assert row.ours_differ == 0
    if device.type == "cpu":
        assert (row.torch_y, row.torch_codes, row.examples) == (0, 0, [])
        assert row.torch_dx == 0 or kind.name not in FAKE_QUANTIZE


@pytest.mark.parametrize("name", FAKE_QUANTIZE)
def test_the_values_are_ties(name: str) -> None:
    """A division in place of the reciprocal, and one rounding in place of two, are both told from the contract."""
    kind = FAKE_QUANTIZE[name]

    def by_division(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        scale, zero_point = (value.reshape(-1, *[1] * (x.ndim - 1)) for value in (scale, zero_point))
        if not kind.fractional:
            zero_point = zero_point.trunc()
        code = torch.round(x / scale + zero_point) if kind.fractional else torch.round(x / scale) + zero_point
        y = (code.clamp(rounding.LOW, rounding.HIGH) - zero_point) * scale
        return x + (y - x).detach()

    row = rounding.compare(replace(kind, torchs=by_division), torch.float32, CPU, scales=5, seed=0)
    assert row.ours_differ == 0
    assert row.torch_y > 0
    assert row.torch_codes > 0
    assert row.torch_dx > 0  # a straight-through gradient is 1 beyond the bounds as well
    assert len(row.examples) == rounding.EXAMPLES
    assert all(example["ours"] != example["torch"] for example in row.examples)


def test_ours_alone_decides_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = replace(rounding.KINDS[0], name="planted", torchs=lambda x, s, z: x * 1.0)
    monkeypatch.setattr(rounding, "KINDS", (wrong,))
    results = tmp_path / "deep" / "rounding.json"
    assert rounding.main(["--scales", "2", "--json", str(results)]) == 0
    assert "torch differs in 3 of 3 rows" in capsys.readouterr().out
    assert json.loads(results.read_text())["rows"][0]["torch_y"] > 0

    answers = iter((1.0, 1.5) * 3)  # ours on the CPU, then ours "on the device"

    def changing(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return x * next(answers)

    monkeypatch.setattr(rounding, "KINDS", (replace(wrong, ours=changing, per_channel=True),))
    assert rounding.main(["--scales", "2"]) == 1
    assert "ours: 0 of" not in capsys.readouterr().out


def test_what_torch_refuses_is_said() -> None:
    def refuse(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        raise RuntimeError("Expected Float  (Could this error message be improved?)\nmore")

    row = rounding.compare(replace(rounding.KINDS[0], torchs=refuse), torch.float16, CPU, scales=1, seed=0)
    assert row.refused == "Expected Float"
    assert "torch refuses: Expected Float" in rounding.line(row)


# --- bandwidth -------------------------------------------------------------------------------------------------------


def quick(*arguments: str) -> int:
    return bandwidth.main(["--device", "cpu", "--elements", "512", "--rounds", "2", "--slice-ms", "0.01", *arguments])


def test_every_kernel_and_launch_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "deep" / "bandwidth.json"
    assert quick("--json", str(results)) == 0
    out = capsys.readouterr().out
    found = json.loads(results.read_text())
    rows = [(row["kernel"], row["elements"], row["dtype"]) for row in found["rows"]]
    assert rows == [(kernel.name, 512, dtype) for dtype in bandwidth.DTYPES for kernel in bandwidth.KERNELS]
    assert all(row["predicted"] is None for row in found["rows"])
    assert [row["call"] for row in found["launches"]] == [name for name, _ in bandwidth.one_element_calls(CPU)]
    assert "24 measured; 0 of 0 reach the share predicted\n" in out
    assert "BELOW" not in out


def test_what_time_left_out_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert quick("--seconds", "0") == 0
    assert "0 measured; 0 of 0 reach the share predicted; 24 not run, 0 seconds were over" in capsys.readouterr().out


def test_the_share_is_of_the_copy_in_the_same_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy moves 2 tensors. A kernel that moves 3 in twice the time reaches 75 % of it."""
    kernel = next(kernel for kernel in bandwidth.KERNELS if kernel.passes == 3)
    spread = Spread(10.0, 9.0, 11.0)
    timings = {"kernel": timer.Timing(spread, Spread(1, 1, 1)), "copy": timer.Timing(spread, Spread(0.5, 0.4, 0.6))}
    monkeypatch.setattr(timer, "time_interleaved", lambda *args, **kwargs: timings)
    row = bandwidth.measure(kernel, torch.zeros(1000), 2, 0.0)
    assert row.of_copy == Spread(*(pytest.approx(share) for share in (0.75, 0.6, 0.9)))
    assert row.gb_per_second == pytest.approx(3 * 4000 / 10e-6 / 1e9)
    for share, verdict in ((0.74, "as predicted"), (0.76, "BELOW")):
        assert verdict in bandwidth.line(replace(row, predicted=share))


def test_predictions_are_of_a_gpu_and_of_the_dtype() -> None:
    inline = next(kernel for kernel in bandwidth.KERNELS if kernel.name == "histogram, inline PTX")
    on_gpu = [SimpleNamespace(is_cuda=True, element_size=lambda size=size: size) for size in (4, 2)]
    assert [inline.prediction(x) for x in on_gpu] == [0.60, 0.40]  # type: ignore[arg-type]
    assert [bandwidth.KERNELS[0].prediction(x) for x in on_gpu] == [0.90, 0.90]  # type: ignore[arg-type]
    assert inline.prediction(torch.ones(1)) is None


def test_the_form_of_a_histogram_is_chosen_for_its_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(ops, "histogram", lambda *args: seen.append(histogram_heuristics.INLINE_PTX))
    before = histogram_heuristics.INLINE_PTX
    for kernel in bandwidth.KERNELS:
        if kernel.name.startswith("histogram"):
            kernel.make(CPU)(torch.ones(1), torch.ones(1))
            assert histogram_heuristics.INLINE_PTX == before
    assert seen == [False, False, True, True]


def test_the_inputs_have_their_channels() -> None:
    per_channel = next(kernel for kernel in bandwidth.KERNELS if kernel.per_channel)
    x = bandwidth.make_input(per_channel, 2 * bandwidth.CHANNELS * bandwidth.RUN, "bfloat16", CPU, 0)
    assert x.shape == (2, bandwidth.CHANNELS, bandwidth.RUN)
    assert x.dtype == torch.bfloat16


def test_backward_calls_are_the_operators() -> None:
    """The calls that are timed are the public operators, with the axis where they have one."""
    x, dy = torch.randn(2, bandwidth.CHANNELS, 3), torch.randn(2, bandwidth.CHANNELS, 3)
    calls = {kernel.name: kernel.make(CPU) for kernel in bandwidth.KERNELS}
    scale, zero_point = torch.full((bandwidth.CHANNELS,), 0.05), torch.full((bandwidth.CHANNELS,), 3)
    expected = ops.learnable_fake_quantize_backward(dy, x, scale, zero_point.int(), -128, 127, axis=1)
    got = calls["learnable_fake_quantize_backward axis=1"](x, dy)
    assert isinstance(got, tuple)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (bandwidth, ["--device", "cpu", "--elements", "1000"], "must be a positive multiple of 256; got 1000"),
        (bandwidth, ["--device", "cpu", "--rounds", "1"], "--rounds must be at least 2; got 1"),
        (rounding, ["--scales", "0"], "--scales must be at least 1; got 0"),
    ],
)
def test_wrong_arguments(
    program: object, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        program.main(arguments)  # type: ignore[attr-defined]
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a CUDA device")
@pytest.mark.parametrize("program", [bandwidth, rounding], ids=lambda program: program.__name__)
def test_no_gpu_is_said(program: object, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.main(["--device", "cuda"])  # type: ignore[attr-defined]
    assert "torch finds no CUDA device" in capsys.readouterr().err
