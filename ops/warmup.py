"""warmup: compile and load kernels before the first step, so that no step waits for the compiler."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from qkernels.ops.fake_quant import fake_quantize
from qkernels.ops.lsq import learnable_fake_quantize
from qkernels.ops.minmax import aminmax, new_workspace, observe_minmax_
from qkernels.ops.qparams_rules import RULES
from qkernels.ops.update_qparams import update_qparams_

Tensor = torch.Tensor

QUANT_MIN, QUANT_MAX = -128, 127
OBSERVER_RULES = tuple(rule for rule in RULES if not rule.startswith("fused"))  # the fused ones only average


def warmup(
    model: torch.nn.Module | None = None,
    *inputs: Any,
    shapes: Sequence[Sequence[int]] = (),
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    axis: int | None = None,
    device: torch.device | str = "cuda",
) -> None:
    """Compile and load the kernels that a run will launch, and read the tuned configurations, before its first step.

    With a model, exactly the kernels that a forward on these inputs launches, and, if the model is in training mode, a
    backward. A copy of the model runs, so that no statistic, gradient, parameter or random state of yours moves.
    With shapes, the kernels of every operator on contiguous tensors of these shapes, with int8 bounds; memory layouts
    that a model uses beside that are compiled when they come.

    Args:
        model: holds quantization modules, in the mode (train or eval) in which it will run. Not a compiled one.
        *inputs: its example inputs, on its device; shapes, layouts and dtypes as in the run.
        shapes: shapes of x, instead of a model or besides.
        dtypes: dtypes of x for `shapes`; float16, bfloat16 or float32.
        axis: channel axis for `shapes`, negative allowed; None for per tensor.
        device: CUDA device for `shapes`.

    Raises:
        TypeError: model is no module, or inputs come without one.
        ValueError: nothing is given to warm up, or the model is the result of torch.compile: call it once instead.

    Note:
        On a machine without CUDA, or with a model and inputs on the CPU, there is nothing to compile: after the checks
        it returns. The copy takes the model's memory once more, and activations and gradients of one step, while it
        runs. Wrap the model in DistributedDataParallel or the like afterwards. Waits for the device.
    """
    if model is None and inputs:
        raise TypeError("warmup: inputs need a model")
    if model is not None and not isinstance(model, torch.nn.Module):
        raise TypeError(f"warmup: model must be a torch.nn.Module; got {type(model).__name__}")
    if model is None and not shapes:
        raise ValueError("warmup: give a model with example inputs, or shapes")
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "warmup: model is the result of torch.compile; call it once instead, or give what it was made of"
        )
    device = torch.device(device)
    if model is not None and any(
        tensor.is_cuda for tensor in _tensors((*model.parameters(), *model.buffers(), inputs))
    ):
        _run_a_copy(model, inputs)
    if device.type == "cuda" and torch.cuda.is_available():
        for shape in shapes:
            for dtype in dtypes:
                _run_operators(tuple(shape), dtype, axis, device)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _detached(value: Any) -> Any:
    """A copy of an input that shares no memory and no graph with it."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    return copy.deepcopy(value)


def _run_a_copy(model: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
    devices = sorted({tensor.device.index for tensor in _tensors((*model.parameters(), inputs)) if tensor.is_cuda})
    twin = copy.deepcopy(model)
    with torch.random.fork_rng(devices), torch.set_grad_enabled(model.training):
        result = twin(*(_detached(value) for value in inputs))
        outputs = [tensor for tensor in _tensors(result) if tensor.requires_grad]
        if outputs:
            # Dense gradients, as a loss would send them: an expanded one has another layout, and other kernels.
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])


def _run_operators(shape: tuple[int, ...], dtype: torch.dtype, axis: int | None, device: torch.device) -> None:
    x = torch.zeros(shape, dtype=dtype, device=device)
    low, high = aminmax(x, axis)
    low, high = low.float().reshape(-1), high.float().reshape(-1)
    position = None if axis is None else axis % x.ndim
    workspace = new_workspace(x.device, position)
    scale = torch.ones_like(low)
    zero_point = torch.zeros_like(low, dtype=torch.int32)
    for averaging_constant in (None, 0.01):
        observe_minmax_(x, low, high, averaging_constant, axis, None, workspace)
        for rule in RULES if averaging_constant else OBSERVER_RULES:
            renewed = zero_point if rule != "float_qparams" else zero_point.float()
            update_qparams_(
                x, low, high, scale, renewed, QUANT_MIN, QUANT_MAX,
                rule=rule, averaging_constant=averaging_constant, axis=axis, workspace=workspace,
            )  # fmt: skip
    x.requires_grad_()
    y = fake_quantize(x, scale, zero_point, QUANT_MIN, QUANT_MAX, axis)
    y.backward(torch.ones_like(y))
    learned = scale.clone().requires_grad_(), torch.zeros_like(scale).requires_grad_()
    y = learnable_fake_quantize(x, *learned, QUANT_MIN, QUANT_MAX, axis=axis)
    y.backward(torch.ones_like(y))
