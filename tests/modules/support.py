"""Pairs of modules (ours and torch.ao's) and comparisons shared by the module tests.

The oracle is always torch.ao on the CPU, whatever device ours runs on: on a GPU its fused op is another program.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.ao.quantization as stock
from hypothesis import HealthCheck, settings

import qkernels.modules as ours
from tests.modules.inputs import EPS as EPS
from tests.modules.inputs import FAKE_QUANTIZERS as FAKE_QUANTIZERS
from tests.modules.inputs import FINITE_KINDS as FINITE_KINDS
from tests.modules.inputs import FLOATS as FLOATS
from tests.modules.inputs import INTERPRETER as INTERPRETER
from tests.modules.inputs import KINDS as KINDS
from tests.modules.inputs import OBSERVERS as OBSERVERS
from tests.modules.inputs import PER_CHANNEL_SCHEMES as PER_CHANNEL_SCHEMES
from tests.modules.inputs import PER_TENSOR_SCHEMES as PER_TENSOR_SCHEMES
from tests.modules.inputs import QUANT_DTYPES as QUANT_DTYPES
from tests.modules.inputs import SPECIAL_KINDS as SPECIAL_KINDS
from tests.modules.inputs import Batch as Batch
from tests.modules.inputs import batches as batches
from tests.modules.inputs import is_per_channel as is_per_channel
from tests.modules.inputs import observer_kwargs as observer_kwargs
from tests.modules.inputs import quant_ranges as quant_ranges

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

# Fake quantizers as (class, observer, arguments, arguments of ours alone), for tests of behaviour.
SYMMETRIC = {"dtype": torch.qint8, "quant_min": -128, "quant_max": 127}
CHANNEL = {**SYMMETRIC, "qscheme": torch.per_channel_symmetric}
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "FakeQuantize": ("FakeQuantize", "MovingAverageMinMaxObserver", {}, {}),
    "FakeQuantize minmax": ("FakeQuantize", "MinMaxObserver", {}, {}),
    "FakeQuantize per channel": ("FakeQuantize", "PerChannelMinMaxObserver", CHANNEL, {}),
    "FakeQuantize float qparams": (
        "FakeQuantize",
        "MovingAveragePerChannelMinMaxObserver",
        {"qscheme": torch.per_channel_affine_float_qparams},
        {},
    ),
    "Fused": ("FusedMovingAvgObsFakeQuantize", "MovingAverageMinMaxObserver", {}, {}),
    "Fused per channel": ("FusedMovingAvgObsFakeQuantize", "MovingAveragePerChannelMinMaxObserver", CHANNEL, {}),
    "Fused consistent": (
        "FusedMovingAvgObsFakeQuantize",
        "MovingAverageMinMaxObserver",
        {**SYMMETRIC, "qscheme": torch.per_tensor_symmetric},
        {"consistent_qparams": True},
    ),
}


def property_settings(ordinary: int, interpreted: int = 8, **kwargs: Any) -> settings:
    """Reproducible runs: a failure found here is found by the next person too. `slow` tests draw at random."""
    kwargs.setdefault("derandomize", True)
    return settings(
        max_examples=interpreted if INTERPRETER else ordinary,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=[
            HealthCheck.function_scoped_fixture,
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
            HealthCheck.filter_too_much,
        ],
        **kwargs,
    )


def pair(name: str, device: torch.device, **kwargs: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(ours on the device, torch.ao's on the CPU), built from the same arguments."""
    with quiet():
        return getattr(ours, name)(**kwargs).to(device), getattr(stock, name)(**kwargs)


def fq_pair(
    name: str, observer: str, device: torch.device, extra: dict[str, Any] | None = None, **kwargs: Any
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same for a fake quantizer, each with the observer of its own library; `extra` goes to ours only."""
    with quiet():
        mine = getattr(ours, name)(observer=getattr(ours, observer), **kwargs, **(extra or {})).to(device)
        return mine, getattr(stock, name)(observer=getattr(stock, observer), **kwargs)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """torch.ao warns about reduce_range and about observers that saw nothing; test_constructors.py checks the texts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make_case(case: str, device: torch.device) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A pair of CASES."""
    name, observer, kwargs, extra = CASES[case]
    return fq_pair(name, observer, device, extra, **kwargs)


def torch_ao_has(case: str) -> bool:
    """Whether torch.ao's module of a pair has the same numbers; consistent_qparams is ours alone."""
    return "consistent" not in case


def case_batch(seed: int, device: torch.device, factor: float = 1.0) -> torch.Tensor:
    return (Batch("normal", (4, 16), seed=seed).tensor() * factor).to(device)


def modules_that_run(device: torch.device) -> dict[str, Callable[[], torch.nn.Module]]:
    """Every observer, and every fake quantizer of CASES."""
    observers = {n: (lambda n=n: getattr(ours, n)().to(device)) for n in OBSERVERS}
    return {**observers, **{c: (lambda c=c: make_case(c, device)[0]) for c in CASES}}


# ------------------------------------------------------------------------------------------ comparisons


def check_same(actual: torch.Tensor, expected: torch.Tensor, what: str, where: torch.Tensor | None = None) -> None:
    """Same dtype, shape and values wherever `where` holds; NaN equals NaN, +0 equals -0.

    The sign of a zero carries no meaning in statistics (SEMANTICS decision 6) nor in a masked gradient.
    """
    actual, expected = actual.detach().cpu(), expected.detach()
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype} instead of {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    _report((actual != expected) & ~(actual.isnan() & expected.isnan()), actual, expected, what, where)


def check_bits(actual: torch.Tensor, expected: torch.Tensor, what: str, where: torch.Tensor | None = None) -> None:
    """Same dtype, shape and bit patterns (so +0 is not -0) wherever `where` holds; any NaN equals any NaN."""
    actual, expected = actual.detach().cpu(), expected.detach()
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype} instead of {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    bits = _BITS[actual.element_size()]
    differ = actual.contiguous().view(bits) != expected.contiguous().view(bits)
    _report(differ & ~(actual.isnan() & expected.isnan()), actual, expected, what, where)


def _report(
    differ: torch.Tensor, actual: torch.Tensor, expected: torch.Tensor, what: str, where: torch.Tensor | None
) -> None:
    if where is not None:
        differ = differ & where
    if differ.any():
        index = tuple(differ.nonzero()[0].tolist())
        got, want = actual[index].item(), expected[index].item()
        raise AssertionError(
            f"{what}: {int(differ.sum())} of {differ.numel()} differ, first at {index}: {got!r} instead of {want!r}"
        )


def check_state(mine: torch.nn.Module, theirs: torch.nn.Module, skip: tuple[str, ...] = ()) -> None:
    """state_dict with the same keys in the same order, the same tensors and the same version metadata."""
    a, b = mine.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    assert a._metadata == b._metadata
    for key in b:
        if key.split(".")[-1] not in skip:
            check_same(a[key], b[key], key)


def check_qparams(mine: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """calculate_qparams() equal, but for integer zero points of non-finite scales: int(NaN) is undefined in C."""
    with quiet():
        (scale, zero_point), (scale_ref, zero_point_ref) = mine.calculate_qparams(), theirs.calculate_qparams()
    check_same(scale, scale_ref, "scale")
    if scale_ref.isfinite().all():
        check_same(zero_point, zero_point_ref, "zero_point")


def ordered(observer: torch.nn.Module) -> bool:
    """Statistics that torch.ao turns into qparams: seen, and min <= max.

    Moving averages of one-valued batches may cross by a rounding; torch.ao then raises, ours has scale 1.
    """
    return observer.min_val.numel() > 0 and not bool((observer.min_val > observer.max_val).any())


def snapshot(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every buffer, the non-persistent ones too."""
    return {name: buffer.detach().clone() for name, buffer in module.named_buffers()}


def check_untouched(module: torch.nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = dict(module.named_buffers())
    assert list(after) == list(before)
    for name, buffer in after.items():
        check_same(buffer, before[name].cpu(), f"buffer {name} after an error")


def crossed(mine: torch.nn.Module, theirs: torch.nn.Module, fresh: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
    """Fresh modules with the other library's checkpoint each: what is saved by one must be all the other needs."""
    new_mine, new_theirs = fresh()
    new_mine.load_state_dict(copy.deepcopy(theirs.state_dict()), strict=True)
    saved = mine.state_dict()  # kept as it is: the version metadata hang on it
    for key in saved:
        saved[key] = saved[key].cpu()
    new_theirs.load_state_dict(saved, strict=True)
    return new_mine, new_theirs
