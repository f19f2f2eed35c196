"""Inductor lane: kernels, opaque calls and division in the code that torch.compile generates, for CUDA and the CPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._inductor.utils import run_and_get_code

import qkernels.ops  # noqa: F401  defines the operators that the graphs call
from tests.lanes.inductor_graphs import GRAPHS, PLANTED, InductorGraph, audit_generated

ROOT = Path(__file__).parents[2]


def _generate_cuda(names: list[str], cache: Path) -> dict[str, dict[str, dict[str, list[str]]]]:
    """Reports by graph and phase, from a process of its own: it patches torch beyond repair."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.lanes.inductor_cuda", *names],
        cwd=ROOT,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def _audit(graph: InductorGraph, phases: dict[str, dict[str, list[str]]]) -> list[str]:
    wanted = ["forward"] + ["backward"] * (graph.backward_kernels is not None)
    assert list(phases) == wanted
    return [
        problem
        for phase, report in phases.items()
        for problem in audit_generated(graph, report["kernels"], report["calls"], report["ptx"], phase)
    ]


def test_cuda_code_and_planted_faults(tmp_path: Path):
    """One process for both, because starting one and importing Inductor takes longer than all graphs together."""
    reports = _generate_cuda([*GRAPHS, *PLANTED], tmp_path)
    found = {name: _audit({**GRAPHS, **PLANTED}[name], phases) for name, phases in reports.items()}
    assert {name: found[name] for name in GRAPHS} == {name: [] for name in GRAPHS}
    assert found["divides"] == ["forward: contains div.full"]
    assert any("2 kernels" in problem for problem in found["opaque"])
    assert any("calls ['qkernels_planted.opaque']" in problem for problem in found["opaque"])


def _cpu_arguments(graph: InductorGraph) -> list[torch.Tensor]:
    """Values with codes inside and outside the range: x of a few hundred steps, positive scales, small zero points."""
    generator = torch.Generator().manual_seed(0)
    arguments = []
    for number, (shape, dtype) in enumerate(graph.arguments):
        if dtype.is_floating_point:
            values = torch.randn(shape, generator=generator) * 2 if number == 0 else torch.full(shape, 0.013)
        else:
            values = torch.ones(shape)
        arguments.append(values.to(dtype))
    for position in graph.differentiated:
        arguments[position].requires_grad_(graph.backward_kernels is not None)
    return arguments


@pytest.mark.parametrize("name", GRAPHS)
def test_cpu_code(name: str):
    """The same graphs through torch.compile as a user calls it, partitioner included; and the same numbers as eager."""
    graph = GRAPHS[name]

    def step(function, arguments):
        y = function(*arguments)
        wanted = [arguments[position] for position in graph.differentiated]
        return y.detach(), torch.autograd.grad(y, wanted, torch.ones_like(y)) if y.requires_grad else ()

    arguments = _cpu_arguments(graph)
    compiled = torch.compile(graph.function, fullgraph=True)
    (y, gradients), codes = run_and_get_code(step, compiled, arguments)
    kernels = [len(re.findall(r"^cpp_fused\w* = async_compile", code, re.MULTILINE)) for code in codes]
    expected = [graph.forward_kernels] + ([graph.backward_kernels] if graph.backward_kernels is not None else [])
    assert kernels == expected
    assert not [call for code in codes for call in re.findall(r"= torch\.ops\.qkernels\.\w+", code)]
    eager_y, eager_gradients = step(graph.function, arguments)
    torch.testing.assert_close(y, eager_y, rtol=0, atol=0)
    for number, (gradient, eager) in enumerate(zip(gradients, eager_gradients, strict=True)):
        rtol = 1e-5 if number else 0  # the first is dx; the others are sums, which tests/ops bounds
        torch.testing.assert_close(gradient, eager, rtol=rtol, atol=0)


def test_cpu_code_of_a_learned_activation_has_one_loop():
    """Between two convolutions: the relu's backward, dx and both sums, in one pass, without a division."""
    scale, zero_point = (torch.tensor([value], requires_grad=True) for value in (0.03, 3.0))
    enabled = torch.ones(1, dtype=torch.uint8)
    before, after = (torch.nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))

    @torch.compile(fullgraph=True)
    def forward(x):
        x = torch.relu(before(x))
        return after(
            torch.ops.qkernels.learnable_fake_quantize(
                x, scale, zero_point, 0, 255, 1.0, None, enabled, "rounded", enabled
            )
        )

    def step(x):
        y = forward(x)
        y.backward(torch.ones_like(y))

    x = torch.randn(2, 8, 20, 20)
    _, (_, code) = run_and_get_code(step, x)
    (loop,) = re.finditer(rf"for\(.*<static_cast<int64_t>\({x.numel()}L\)", code)
    body = code[loop.end() : code.index("''')", loop.end())]
    assert ".store(" in body
    assert not re.search(r"tmp\d+ / tmp\d+", body)  # 1 / scale is computed before
