"""The correctness gate: nothing is timed that computes something else.

On the CPU, ours must give torch's bits, and those of torchao's modules; what compiled or third-party code gives is
reported, since it may round differently. On a GPU the contract is what ours gives on the CPU, and ours must give its
bits there: torch's CUDA kernels may contract a product and a sum into one rounding, so where they disagree with the
contract that is a finding about them, reported and timed all the same.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import JUDGES, Bench
from benchmarks.peers import OURS


class Difference(NamedTuple):
    """What differs, in words, and in how many elements; None where the two do not even compare."""

    text: str
    elements: int | None = None


class WithinBound(NamedTuple):
    """A float tensor that may differ by `bound`, elementwise: a sum, whose terms may be added in any order."""

    value: Tensor
    bound: Tensor


class Verdict(NamedTuple):
    """`wrong`: what keeps the case from being timed. `peers_differ`: peers that do not keep the contract, reported."""

    wrong: list[str]
    peers_differ: dict[str, list[Difference]]


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def differences(ours: object, theirs: object) -> list[Difference]:
    """What is not equal bit for bit. Tensors, on any device, and tuples and dicts of them."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        if ours.keys() != theirs.keys():
            return [Difference(f"keys {sorted(ours)} and {sorted(theirs)}")]
        return [Difference(f"{key}: {d.text}", d.elements) for key in ours for d in differences(ours[key], theirs[key])]
    if isinstance(ours, WithinBound) and isinstance(theirs, WithinBound):
        off = (ours.value.double() - theirs.value.to(ours.value.device).double()).abs()
        rounding = 2 * torch.finfo(ours.value.dtype).eps * ours.value.double().abs()
        wrong = int((~(off <= ours.bound + rounding)).sum())
        return [Difference(f"{wrong} of {off.numel()} sums differ by more than their bound", wrong)] if wrong else []
    if isinstance(ours, tuple) and isinstance(theirs, tuple) and len(ours) == len(theirs):
        return [found for pair in zip(ours, theirs, strict=True) for found in differences(*pair)]
    if not (isinstance(ours, Tensor) and isinstance(theirs, Tensor)):
        return [Difference(f"{type(ours).__name__} and {type(theirs).__name__} do not compare")]
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return [Difference(f"{ours.dtype} {tuple(ours.shape)} and {theirs.dtype} {tuple(theirs.shape)}")]
    bits = _BITS[ours.element_size()]
    wrong = int((ours.view(bits) != theirs.to(ours.device).view(bits)).sum())
    return [Difference(f"{wrong} of {ours.numel()} values differ", wrong)] if wrong else []


def against_peers(bench: Bench, x: Tensor, names: list[str]) -> Verdict:
    """The gate of the CPU: ours against every peer among `names`. Those that are no judges may differ."""
    peers = [name for name in names if name != OURS]
    ours = bench.results(OURS, x) if peers else None
    found = {name: differences(ours, bench.results(name, x)) for name in peers}
    wrong = [difference.text for name in peers if name in JUDGES for difference in found[name]]
    return Verdict(wrong, {name: found[name] for name in peers if found[name] and name not in JUDGES})


def against_contract(bench: Bench, contract: Bench, x: Tensor, names: list[str]) -> Verdict:
    """The gate of a GPU: ours there against ours on the CPU, which `contract` is. Peers are compared, not judged."""
    expected = contract.results(OURS, x.cpu())
    wrong = [d.text for d in differences(bench.results(OURS, x), expected)]
    found = {name: differences(bench.results(name, x), expected) for name in names if name != OURS and not wrong}
    return Verdict(wrong, {name: lines for name, lines in found.items() if lines})
