"""What happens once per process, timed in a fresh one: `python -m benchmarks.probe QUESTION LIBRARY` prints JSON.

Nothing is imported before the clock runs. Used by overhead.py.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
import warnings
from typing import Any

LIBRARIES = {
    "import": ("qkernels", "qkernels.ops", "qkernels.modules"),
    "first-call": ("qkernels", "torch"),
    "compile": ("qkernels", "torch.compile"),
}


def import_seconds(name: str) -> dict[str, float]:
    """Seconds of `import torch`, and of importing `name` after it."""
    start = time.perf_counter()
    importlib.import_module("torch")
    middle = time.perf_counter()
    importlib.import_module(name)
    return {"torch": middle - start, name: time.perf_counter() - middle}


def first_call_seconds(library: str, device: str) -> dict[str, float]:
    """Seconds of the first fake_quantize of one element, after the imports; the device is set up before."""
    import torch

    import qkernels.ops

    scale, zero_point = torch.tensor([0.05], device=device), torch.tensor([3], dtype=torch.int32, device=device)
    x = torch.ones(1, device=device)
    ours = qkernels.ops.fake_quantize
    function: Any = ours if library == "qkernels" else torch.fake_quantize_per_tensor_affine
    start = time.perf_counter()
    function(x, scale, zero_point, -128, 127)
    if device != "cpu":
        torch.cuda.synchronize()
    return {library: time.perf_counter() - start}


def compile_seconds(library: str, device: str) -> dict[str, float]:
    """Seconds of the first forward and backward of a compiled fake quantizer, with empty caches.

    "qkernels" is FakeQuantize, which also observes; "torch.compile" fake quantization in plain PyTorch, which does not.
    """
    import torch

    import qkernels.modules
    from benchmarks import plain

    scale, zero_point = torch.tensor([0.05], device=device), torch.tensor([3], dtype=torch.int32, device=device)
    ours: Any = qkernels.modules.FakeQuantize().to(device)
    function: Any = ours if library == "qkernels" else lambda x: plain.fake_quantize(x, scale, zero_point, 0, 255)
    compiled = torch.compile(function, fullgraph=True)
    x = torch.linspace(-3, 3, 4096, device=device).requires_grad_()
    start = time.perf_counter()
    compiled(x).sum().backward()
    if device != "cpu":
        torch.cuda.synchronize()
    return {library: time.perf_counter() - start}


def main(argv: list[str] | None = None) -> int:
    """Print the seconds by name; 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probe", description=__doc__.splitlines()[0])
    parser.add_argument("question", choices=LIBRARIES)
    parser.add_argument("library", help="; ".join(f"{name}: {', '.join(of)}" for name, of in LIBRARIES.items()))
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    if args.library not in LIBRARIES[args.question]:
        parser.error(f"{args.question} is of {', '.join(LIBRARIES[args.question])}; got {args.library!r}")
    warnings.filterwarnings("ignore")
    if args.question == "import":
        seconds = import_seconds(args.library)
    else:
        answer = first_call_seconds if args.question == "first-call" else compile_seconds
        seconds = answer(args.library, args.device)
    print(json.dumps(seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
