"""The operators as torch sees them: opcheck, fakes, strides, declared mutation, version counters, torch.export."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import qkernels.ops as qops
from tests.oracles import INTERPRETER, assert_bits_equal
from tests.strategies import EMPTY_LAYOUTS, KERNEL_DTYPES, LAYOUTS, Layout, dtype_id

ROOT = Path(__file__).resolve().parents[2]

OPERATORS = (
    "aminmax",
    "observe_minmax_",
    "choose_qparams",
    "update_qparams_",
    "fake_quantize",
    "fake_quantize_backward",
)

ALL_LAYOUTS = (*LAYOUTS, *EMPTY_LAYOUTS)


def overload(name: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.qkernels, name).default


def flag(value: int, device: torch.device, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.tensor([value], dtype=dtype, device=device)


class Arguments:
    """Arguments by name for one x and axis."""

    def __init__(self, x: torch.Tensor, axis: int | None, **overrides: object) -> None:
        n = 1 if axis is None else x.shape[axis]
        d = x.device
        self.values: dict[str, object] = {
            "x": x,
            "dy": torch.ones_like(x),
            "axis": axis,
            "min_val": torch.full((n,), -1.0, device=d),
            "max_val": torch.full((n,), 2.0, device=d),
            "scale": torch.full((n,), 0.05, device=d),
            "zero_point": torch.full((n,), 3, dtype=torch.int32, device=d),
            "quant_min": -128,
            "quant_max": 127,
            **overrides,
        }


def recorded_calls(function: Callable[[], object], name: str) -> list[tuple[tuple[object, ...], dict[str, object]]]:
    """How the public function calls its operator: opcheck has to see real argument sets, also of private arguments."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is overload(name):
                calls.append((args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    with Recorder():
        function()
    return calls


def clone_tree(value: object) -> object:
    """Copies that keep strides and requires_grad."""
    return torch.utils._pytree.tree_map(
        lambda t: t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t, value
    )


def sample_calls(device: torch.device) -> dict[str, list[Callable[[], object]]]:
    """Public calls that together use every argument of every operator."""
    x = torch.randn(4, 6, 3).to(device)
    strided = torch.randn(4, 12, 3).to(device)[:, ::2]
    on, off = flag(1, device), flag(0, device, torch.int64)
    workspace = torch.zeros(1, dtype=torch.int32, device=device)

    def stats(n: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((n,), math.inf, device=device), torch.full((n,), -math.inf, device=device)

    def qp(n: int = 1, dtype: torch.dtype = torch.int32) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((n,), 0.1, device=device), torch.full((n,), 2, dtype=dtype, device=device)

    return {
        "aminmax": [
            lambda: qops.aminmax(x),
            lambda: qops.aminmax(strided, 1),
            lambda: qops.aminmax(x.half(), axis=-1),
            lambda: qops.aminmax(x.double(), axis=0),
        ],
        "observe_minmax_": [
            lambda: qops.observe_minmax_(x, *stats()),
            lambda: qops.observe_minmax_(x, *stats(), 0.01, None, on),
            lambda: qops.observe_minmax_(strided, *stats(6), None, 1, off, workspace),
            lambda: qops.observe_minmax_(x.bfloat16(), *stats(3), averaging_constant=0.5, axis=-1),
            lambda: qops.observe_minmax_(x[:0], *stats()),
        ],
        "choose_qparams": [
            lambda: qops.choose_qparams(*(t[0] for t in stats()), 0, 255),
            lambda: qops.choose_qparams(
                *stats(4), -128, 127, dtype=torch.qint8, qscheme=torch.per_channel_symmetric, eps=2.0**-12
            ),
            lambda: qops.choose_qparams(*stats(4), 0, 15, qscheme=torch.per_channel_affine_float_qparams),
        ],
        "update_qparams_": [
            lambda: qops.update_qparams_(x, *stats(), *qp(), -128, 127),
            lambda: qops.update_qparams_(
                strided, *stats(6), *qp(6), 0, 255, rule="symmetric", symmetric_zero_point=128, axis=1,
                eps=torch.tensor([1e-3], device=device), enabled=on, qparams_enabled=off, workspace=workspace,
            ),
            lambda: qops.update_qparams_(
                x, *stats(4), *qp(4, torch.float32), 0, 255, rule="float_qparams", averaging_constant=0.01, axis=0
            ),
            lambda: qops.update_qparams_(x, *stats(), *qp(), 0, 255, rule="fused_symmetric", averaging_constant=0.01),
        ],
        "fake_quantize": [
            lambda: qops.fake_quantize(x, *qp(), -128, 127),
            lambda: qops.fake_quantize(x.clone().requires_grad_(), *qp(), -128, 127, None, on),
            lambda: qops.fake_quantize(strided.requires_grad_(), *qp(6), -128, 127, 1),
            lambda: qops.fake_quantize(x.half().requires_grad_(), *qp(3), -8, 7, -1, off),
            lambda: qops.fake_quantize(x.double(), *qp(dtype=torch.int64), -8, 7),
            lambda: qops.fake_quantize(x, *qp(4, torch.float32), -8, 7, 0),
            lambda: qops.fake_quantize(x[:0], *qp(), -8, 7),
        ],
        "fake_quantize_backward": [
            lambda: qops.fake_quantize_backward(x * 2, x, *qp(), -128, 127),
            lambda: qops.fake_quantize_backward(strided * 2, strided, *qp(6), -128, 127, 1, off),
            lambda: qops.fake_quantize_backward(x.mT.contiguous().mT, x, *qp(3), -8, 7, -1),
        ],
    }  # fmt: skip


@pytest.mark.interpreter
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str, device: torch.device) -> None:
    """Schema (mutation, aliasing), autograd registration, fake against real, AOT dispatch with dynamic shapes."""
    # double backward is not supported, so the backward is checked as the leaf it is
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
    assert torch.Tag.pt2_compliant_tag in op.tags
    mutated = [a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert mutated == {
        "observe_minmax_": ["min_val", "max_val", "workspace"],
        "update_qparams_": ["min_val", "max_val", "scale", "zero_point", "workspace"],
    }.get(name, [])
    for r in op._schema.returns:
        assert r.alias_info is None, "results are fresh tensors"


def is_off(enabled: torch.Tensor | None) -> bool:
    return enabled is not None and not enabled.item()


@pytest.mark.interpreter
@pytest.mark.parametrize("name", OPERATORS)
def test_only_declared_arguments_change(name: str, device: torch.device) -> None:
    """Every tensor argument the schema calls read-only keeps its bits and its version; the declared ones bump."""
    schema_arguments = overload(name)._schema.arguments
    written = {a.name for a in schema_arguments if a.alias_info is not None and a.alias_info.is_write}
    for call in sample_calls(device)[name]:
        for args, kwargs in recorded_calls(call, name):
            args, kwargs = clone_tree(args), clone_tree(kwargs)
            named = {schema_arguments[i].name: a for i, a in enumerate(args)} | kwargs
            tensors = {k: v for k, v in named.items() if isinstance(v, torch.Tensor)}
            before = {k: (v.detach().clone(), v._version) for k, v in tensors.items()}
            with torch.no_grad():
                results = overload(name)(*args, **kwargs)
            results = () if results is None else (results if isinstance(results, tuple) else (results,))
            for key, tensor in tensors.items():
                if key not in written:
                    assert_bits_equal(tensor, before[key][0], signed_zero=True, context=f"{name}: {key} was modified")
                    assert tensor._version == before[key][1], f"{name}: version of {key}"
                elif tensors["x"].numel() > 0 and key != "workspace" and not is_off(tensors.get("enabled")):
                    assert tensor._version > before[key][1], f"{name}: version of {key} did not move"
            for result, tensor in itertools.product(results, tensors.values()):
                if result.numel() and tensor.numel():
                    assert result.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr(), (
                        f"{name}: aliases"
                    )


def signature(results: object) -> list[tuple[object, ...]]:
    flat = torch.utils._pytree.tree_leaves(results)
    return [(tuple(t.shape), used_strides(t), t.dtype, t.device.type) for t in flat if isinstance(t, torch.Tensor)]


def used_strides(t: torch.Tensor) -> list[int]:
    """Strides that address something. The others torch.empty_like itself chooses differently on meta and on the CPU."""
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1 and t.numel()]


def public_calls(x: torch.Tensor, axis: int | None) -> dict[str, Callable[[], object]]:
    a = Arguments(x, axis).values
    calls: dict[str, Callable[[], object]] = {
        "choose_qparams": lambda: qops.choose_qparams(a["min_val"], a["max_val"], -128, 127, dtype=torch.qint8),
        "choose_qparams_0d": lambda: (
            qops.choose_qparams(torch.tensor(1.0), torch.tensor(1.0), 0, 255)
            if x.device.type == "cpu"
            else qops.choose_qparams(a["min_val"].new_empty(()), a["max_val"].new_empty(()), 0, 255)
        ),
        "observe_minmax_": lambda: qops.observe_minmax_(x, a["min_val"], a["max_val"], axis=axis),
        "update_qparams_": lambda: qops.update_qparams_(
            x, a["min_val"], a["max_val"], a["scale"], a["zero_point"], -128, 127, axis=axis
        ),
        "fake_quantize": lambda: qops.fake_quantize(x, a["scale"], a["zero_point"], -128, 127, axis),
        "fake_quantize_flag": lambda: qops.fake_quantize(
            x, a["scale"], a["zero_point"], -128, 127, axis, torch.zeros(1, dtype=torch.uint8, device=x.device)
        ),
        "fake_quantize_backward": lambda: qops.fake_quantize_backward(
            a["dy"].contiguous(), x, a["scale"], a["zero_point"], -128, 127, axis
        ),
        "fake_quantize_float_zero_point": lambda: qops.fake_quantize(
            x, a["scale"], a["zero_point"].float(), -128, 127, axis
        ),
    }
    if x.numel():
        calls["aminmax"] = lambda: qops.aminmax(x, axis)
    return calls


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", KERNEL_DTYPES[-1:] if INTERPRETER else KERNEL_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", ALL_LAYOUTS, ids=str)
def test_meta_and_fake_tensors_describe_the_real_result(
    layout: Layout, dtype: torch.dtype, device: torch.device
) -> None:
    """Shape, strides and dtype over every layout and axis. On meta any host read of a value would raise."""
    real = layout.view(torch.zeros(layout.storage_size, dtype=dtype, device=device))
    meta = layout.view(torch.empty(layout.storage_size, dtype=dtype, device="meta"))
    for axis in layout.some_axes():
        want = {k: signature(call()) for k, call in public_calls(real, axis).items()}
        for name, call in public_calls(meta, axis).items():
            if name == "choose_qparams_0d":
                continue
            got = signature(call())
            assert [g[:3] for g in got] == [w[:3] for w in want[name]], f"{name} on meta, axis {axis}"
            assert all(g[3] == "meta" for g in got)
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fake = mode.from_tensor(real)
            for name, call in public_calls(fake, axis).items():
                assert signature(call()) == want[name], f"{name} on fake tensors, axis {axis}"


def test_backward_runs_on_meta_tensors() -> None:
    x = torch.empty(4, 6, device="meta", requires_grad=True)
    a = Arguments(x, 1).values
    y = qops.fake_quantize(x, a["scale"], a["zero_point"], -8, 7, 1, flag(1, torch.device("meta")))
    y.sum().backward()
    assert x.grad.shape == (4, 6) and x.grad.device.type == "meta"


class _Quantize(torch.nn.Module):
    """relu -> fake_quantize -> mul with the qparams as buffers."""

    def __init__(self, axis: int | None) -> None:
        super().__init__()
        n = 1 if axis is None else 6
        self.axis = axis
        self.register_buffer("scale", torch.full((n,), 0.1))
        self.register_buffer("zero_point", torch.zeros(n, dtype=torch.int32))
        self.register_buffer("enabled", torch.ones(1, dtype=torch.uint8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = qops.fake_quantize(torch.relu(x), self.scale, self.zero_point, -128, 127, self.axis, self.enabled)
        return y * 3


def targets(graph: torch.fx.Graph) -> list[str]:
    return [str(n.target) for n in graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
@pytest.mark.parametrize("axis", [None, 1], ids=str)
def test_export_keeps_one_node(axis: int | None, strict: bool, device: torch.device) -> None:
    module = _Quantize(axis).to(device)
    x = torch.randn(4, 6, device=device)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: batch},), strict=strict)
    assert targets(program.graph).count("qkernels.fake_quantize.default") == 1
    assert len(targets(program.graph)) == 3
    for rows in (4, 9):
        x = torch.randn(rows, 6, device=device)
        assert_bits_equal(program.module()(x), module(x))
    decomposed = program.run_decompositions()
    assert_bits_equal(decomposed.module()(x), module(x))


def test_export_keeps_the_observers_mutation(device: torch.device) -> None:
    """The statistics are buffers that the exported program updates, one node per operator."""

    class Observe(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("low", torch.tensor(math.inf))
            self.register_buffer("high", torch.tensor(-math.inf))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            qops.observe_minmax_(x, self.low, self.high)
            return x + 1

    program = torch.export.export(Observe().to(device), (torch.randn(4, device=device),))
    assert targets(program.graph).count("qkernels.observe_minmax_.default") == 1
    module = program.module()
    x = torch.tensor([-3.0, 5.0, 1.0, 0.0], device=device)
    module(x)
    assert (module.low.item(), module.high.item()) == (-3.0, 5.0)


def test_plain_functions_and_operators_are_the_same(device: torch.device) -> None:
    x = torch.randn(3, 4, device=device)
    scale, zero_point = torch.full((1,), 0.1, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    assert_bits_equal(
        torch.ops.qkernels.fake_quantize(x, scale, zero_point, -8, 7), qops.fake_quantize(x, scale, zero_point, -8, 7)
    )
    for a, b in zip(torch.ops.qkernels.aminmax(x, 1), qops.aminmax(x, 1), strict=True):
        assert_bits_equal(a, b)


_FAKE_THEN_REAL = """
    import torch
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    import qkernels.ops as qops

    with FakeTensorMode():
        low = torch.empty(3)
        for call in (
            lambda: qops.choose_qparams(low, low, 0, 255, qscheme=torch.per_channel_affine),
            lambda: qops.update_qparams_(low, low[:1], low[:1], low[:1], low[:1].int(), 0, 255),
            lambda: qops.fake_quantize(low, low[:1], low[:1].int(), 0, 255),
        ):
            call()
    real = torch.tensor([-1.0]), torch.tensor([1.0]), torch.ones(1), torch.zeros(1, dtype=torch.int32)
    results = (
        *qops.choose_qparams(real[0], real[1], 0, 255, qscheme=torch.per_channel_affine),
        *qops.update_qparams_(torch.randn(4), *real, 0, 255),
        qops.fake_quantize(torch.randn(4), real[2], real[3], 0, 255),
    )
    assert not any(isinstance(t, FakeTensor) for t in results), results
    print("fine")
"""


def test_tracing_first_does_not_poison_eager_calls(tmp_path: Path) -> None:
    """A tensor made under a FakeTensorMode and kept (a cached constant) would break every real call after it.

    A process of its own: what is cached at the first call has been cached long before this test runs.
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_FAKE_THEN_REAL)],
        env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert child.returncode == 0 and child.stdout.strip() == "fine", child.stderr[-2000:]
