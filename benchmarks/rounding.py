"""Ties on a device: ours against our own CPU path, bit for bit; torch's operators there counted, not judged.

    python -m benchmarks.rounding --device cuda --json rounding.json

The values lie half-way between two codes, and one and two units in the last place beside that, where one rounding more
or less decides. torch's CUDA operators may contract `x * inv + zero_point` into one rounding, some versions do: this
says in which operators, how often and where. The exit status is about ours alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import environment
from qkernels import ops

LOW, HIGH = -128, 127
INTEGERS = (0, 3, -7, 10, -1)
FRACTIONS = (0.5, 2.25, -7.75, 3.0, -0.4)
EXAMPLES = 5

Function = Callable[[Tensor, Tensor, Tensor], Tensor]  # x, scale, zero point -> y


@dataclass(frozen=True)
class Kind:
    """One operator, with ours and torch's form. Per channel, dimension 0 of x has the channels.

    `fractional`: the zero point is not rounded before it is added, so that it moves the ties.
    """

    name: str
    ours: Function
    torchs: Function
    zero_points: tuple[float, ...] = INTEGERS
    zero_point_dtype: torch.dtype = torch.int32
    per_channel: bool = False
    fractional: bool = False


def _fake_quantize(axis: int | None) -> Function:
    return lambda x, scale, zero_point: ops.fake_quantize(x, scale, zero_point, LOW, HIGH, axis)


def _learnable(axis: int | None) -> Function:
    return lambda x, scale, zero_point: ops.learnable_fake_quantize(x, scale, zero_point, LOW, HIGH, 1.0, axis)


KINDS = (
    Kind(
        "per tensor, integer zero point",
        _fake_quantize(None),
        lambda x, s, z: torch.fake_quantize_per_tensor_affine(x, s, z, LOW, HIGH),
    ),
    Kind(
        "per tensor, float zero point",
        _fake_quantize(None),
        lambda x, s, z: torch.fake_quantize_per_tensor_affine(x, s, z, LOW, HIGH),
        FRACTIONS,
        torch.float32,
    ),
    Kind(
        "per channel, integer zero points",
        _fake_quantize(0),
        lambda x, s, z: torch.fake_quantize_per_channel_affine(x, s, z, 0, LOW, HIGH),
        per_channel=True,
    ),
    Kind(
        "per channel, float zero points",
        _fake_quantize(0),
        lambda x, s, z: torch.fake_quantize_per_channel_affine(x, s, z, 0, LOW, HIGH),
        FRACTIONS,
        torch.float32,
        per_channel=True,
        fractional=True,
    ),
    Kind(
        "learnable, per tensor",
        _learnable(None),
        lambda x, s, z: torch._fake_quantize_learnable_per_tensor_affine(x, s, z, LOW, HIGH, 1.0),
        FRACTIONS,
        torch.float32,
    ),
    Kind(
        "learnable, per channel",
        _learnable(0),
        lambda x, s, z: torch._fake_quantize_learnable_per_channel_affine(x, s, z, 0, LOW, HIGH, 1.0),
        FRACTIONS,
        torch.float32,
        per_channel=True,
    ),
)


@dataclass
class Row:
    """What was found for one operator and dtype; `torch_` counts are elements in which torch leaves our CPU path.

    Attributes:
        ours_differ: elements of y or dx in which ours on the device is not ours on the CPU.
        torch_y: any bit of y.
        torch_codes: y by half a step and more, that is, another code.
        torch_dx: dx, that is, another answer to whether the code is within the bounds.
        examples: of y, the first few: scale, zero point, x, ours and theirs.
        refused: torch's answer where it does not take such arguments.
    """

    kind: str
    dtype: str
    elements: int
    ours_differ: int = 0
    torch_y: int = 0
    torch_codes: int = 0
    torch_dx: int = 0
    examples: list[dict[str, float]] = field(default_factory=list)
    refused: str | None = None


def ties(kind: Kind, dtype: torch.dtype, scales: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(x, scale, zero point): row c of x has the ties of scale c, which is not a power of two. On the CPU."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(scales, generator=generator) * 0.05 + 0.001
    zero_point = torch.tensor([kind.zero_points[c % len(kind.zero_points)] for c in range(scales)])
    half = torch.arange(LOW - 20, HIGH + 20, dtype=torch.float64) + 0.5
    fraction = (zero_point - zero_point.trunc()).double() * kind.fractional
    tie = ((half - fraction[:, None]) * scale.double()[:, None]).float()
    up, down = torch.tensor(float("inf")), torch.tensor(float("-inf"))
    above, below = torch.nextafter(tie, up), torch.nextafter(tie, down)
    x = torch.cat([tie, above, torch.nextafter(above, up), below, torch.nextafter(below, down)], 1)
    return x.to(dtype), scale, zero_point.to(kind.zero_point_dtype)


def results(function: Function, kind: Kind, x: Tensor, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
    """y and dx for a dy of ones; per tensor, row by row."""
    rows = [slice(None)] if kind.per_channel else [slice(c, c + 1) for c in range(len(scale))]
    ys, dxs = [], []
    for row in rows:
        leaf = x[row].detach().requires_grad_()
        y = function(leaf, scale[row], zero_point[row])
        ys.append(y.detach())
        dxs.append(torch.autograd.grad(y, leaf, torch.ones_like(y))[0])
    return torch.cat(ys).cpu(), torch.cat(dxs).cpu()


def compare(kind: Kind, dtype: torch.dtype, device: torch.device, scales: int, seed: int) -> Row:
    x, scale, zero_point = ties(kind, dtype, scales, seed)
    there = tuple(tensor.to(device) for tensor in (x, scale, zero_point))
    y, dx = results(kind.ours, kind, x, scale, zero_point)
    row = Row(kind.name, str(dtype).removeprefix("torch."), x.numel())
    ours = results(kind.ours, kind, *there)
    row.ours_differ = int(((ours[0] != y) | (ours[1] != dx)).sum())
    try:
        torch_y, torch_dx = results(kind.torchs, kind, *there)
    except RuntimeError as error:
        row.refused = str(error).splitlines()[0].split("  (")[0]
        return row
    apart = torch_y != y
    row.torch_y, row.torch_dx = int(apart.sum()), int((torch_dx != dx).sum())
    row.torch_codes = int(((torch_y.double() - y.double()).abs() > scale.double()[:, None] / 2).sum())
    for c, i in apart.nonzero()[:EXAMPLES].tolist():
        values = {"scale": scale[c], "zero_point": zero_point[c], "x": x[c, i], "ours": y[c, i], "torch": torch_y[c, i]}
        row.examples.append({name: value.item() for name, value in values.items()})
    return row


def line(row: Row) -> str:
    """One row for the screen."""
    text = f"{row.kind:<34}{row.dtype:<10}{row.elements:>8}{row.ours_differ:>7}"
    if row.refused is not None:
        return f"{text}   torch refuses: {row.refused}"
    return f"{text}{row.torch_y:>9}{row.torch_codes:>13}{row.torch_dx:>10}"


HEADER = f"{'operator':<34}{'dtype':<10}{'values':>8}{'ours':>7}{'torch y':>9}{'torch codes':>13}{'torch dx':>10}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rounding", description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--scales", type=int, default=40, metavar="N", help="scales per operator (default: 40)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the counts there, with examples")
    args = parser.parse_args(argv)
    if args.scales < 1:
        parser.error(f"--scales must be at least 1; got {args.scales}")
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device")
    print(f"torch {torch.__version__} on {args.device}: elements that are not what our CPU path gives\n\n{HEADER}")
    rows = []
    for kind in KINDS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            rows.append(compare(kind, dtype, args.device, args.scales, args.seed))
            print(line(rows[-1]), flush=True)
    if args.json:
        found: dict[str, Any] = {**environment(args.device, args.seed), "rows": [asdict(row) for row in rows]}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    wrong = sum(row.ours_differ for row in rows)
    others = sum(row.torch_y > 0 or row.torch_dx > 0 for row in rows)
    print(
        f"\nours: {wrong} of {sum(row.elements for row in rows)} differ; torch differs in {others} of {len(rows)} rows"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
