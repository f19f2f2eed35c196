"""Let Inductor generate and compile CUDA code on a machine without a GPU, and report what came out.

A program of its own (`python -m tests.lanes.inductor_cuda NAME...`, JSON on the last line): it makes torch believe in
an H200, and no process that does so may go on to do anything else. Graphs go through AOTAutograd, the operators'
decompositions and Inductor's passes as in torch.compile; generated Triton kernels are compiled to PTX under the null
driver; nothing runs.

The autograd engine refuses CUDA tensors in a build without CUDA. So the backward graph is recorded on the CPU first,
from real autograd and with the operators still whole, and then compiled for CUDA as a graph of its own. What the
partitioner saves and recomputes is therefore not looked at here; the CPU lane does.

Private interfaces used (torch 2.11 and 2.13): `torch._inductor.compile_fx.compile_fx`, `make_fx`, `FakeTensorMode`,
`GraphLowering.save_output_code`, `torch._dynamo.device_interface`, and what `pretend_cuda` patches.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch._inductor.config
import torch._inductor.graph
import triton
from torch._dynamo import device_interface
from torch._inductor.compile_fx import compile_fx
from torch._inductor.fx_passes import joint_graph, post_grad
from torch._inductor.runtime import triton_helpers
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tests.lanes.inductor_graphs import GRAPHS, PLANTED, InductorGraph, define_planted_operator
from tests.lanes.null_driver import null_driver

_H200 = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=141 << 30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=60 << 20,
    clock_rate=1980000,
    memory_clock_rate=3201000,
    memory_bus_width=6144,
    gcnArchName="",
    uuid="null",
)


class _NullCuda(device_interface.CudaInterface):
    """Dynamo's and Inductor's view of CUDA, answered from `_H200`."""

    class Worker(device_interface.CudaInterface.Worker):
        set_device = staticmethod(lambda device: None)
        current_device = staticmethod(lambda: 0)
        get_device_properties = staticmethod(lambda device=None: _H200)

    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    set_device = staticmethod(lambda device: None)
    exchange_device = staticmethod(lambda device: 0)
    maybe_exchange_device = staticmethod(lambda device: 0)
    get_raw_stream = staticmethod(lambda device=0: 0)
    synchronize = staticmethod(lambda device=None: None)
    get_device_properties = staticmethod(lambda device=None: _H200)
    get_compute_capability = staticmethod(lambda device=None: 90)
    is_bf16_supported = staticmethod(lambda including_emulation=False: True)
    is_triton_capable = staticmethod(lambda device=None: True)
    raise_if_triton_unavailable = staticmethod(lambda device=None: None)


def pretend_cuda() -> None:
    """Patch this process for good: torch sees one H200."""
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_properties = lambda device=None: _H200
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.get_device_name = lambda device=None: _H200.name
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.get_rng_state = lambda device="cuda": torch.zeros(16, dtype=torch.uint8)
    torch.cuda.set_rng_state = lambda state, device="cuda": None
    torch.cuda._lazy_init = lambda: None
    torch.cuda._exchange_device = torch.cuda._maybe_exchange_device = lambda device: 0
    fake_tensor.init_gpu_context = lambda device: None  # a build with CUDA allocates there, to start the driver
    torch.Tensor.__invert__ = torch.Tensor.bitwise_not  # the operator `~` asks for a device guard in C++
    torch._C._cuda_getCurrentRawStream = lambda device: 0  # imported by generated code
    list(device_interface.get_registered_device_interfaces())  # registers the real ones, once; replaced here
    for device in ("cuda", "cuda:0"):
        device_interface.register_interface_for_device(device, _NullCuda)
    # The pattern tables are built with real tensors of the device; those for the CPU hold the same rewrites.
    for passes in (joint_graph, post_grad):
        passes.lazy_init = lambda device=None, build=passes.lazy_init: build(torch.device("cpu"))
    torch._inductor.config.joint_graph_constant_folding = False  # evaluates constants on the device
    for name in ("use_static_triton_launcher", "use_static_cuda_launcher"):  # 2.13's and 2.11's: needs libcuda
        if hasattr(torch._inductor.config, name):
            setattr(torch._inductor.config, name, False)
    triton_helpers.set_driver_to_gpu = lambda: None
    torch._inductor.config.compile_threads = 1  # compile in this process, where the null driver is
    torch._inductor.config.fx_graph_cache = False
    torch._functorch.config.enable_autograd_cache = False


@dataclass
class GraphReport:
    """What Inductor made of one forward or backward graph.

    Attributes:
        kernels: names of the generated Triton kernels, one per launch.
        calls: opaque operators called from the generated code, without `torch.ops.` and the overload.
        ptx: PTX of the generated kernels.
        code: the generated Python.
    """

    kernels: list[str]
    calls: list[str]
    ptx: list[str] = field(default_factory=list)
    code: str = ""


def generate(graph: InductorGraph) -> dict[str, GraphReport]:
    """Reports of a graph by phase: "forward" and, if it has one, "backward"."""
    reports = {"forward": _compile(torch.fx.symbolic_trace(graph.function), graph.arguments)}
    if graph.backward_kernels is not None:
        reports["backward"] = _compile(_backward(graph), (graph.arguments[0], *graph.arguments))
    return reports


def _backward(graph: InductorGraph) -> torch.fx.GraphModule:
    """(dy, *arguments) -> gradients, as a graph of ATen's and our operators. y has the shape of the first argument."""

    def vector_jacobian(dy: torch.Tensor, *arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = list(arguments)
        for position in graph.differentiated:
            leaves[position] = arguments[position].detach().requires_grad_()
        wanted = [leaves[position] for position in graph.differentiated]
        return torch.autograd.grad(graph.function(*leaves), wanted, dy)

    arguments = [torch.ones(shape, dtype=dtype) for shape, dtype in graph.arguments]
    module = make_fx(vector_jacobian)(torch.ones_like(arguments[0]), *arguments)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _compile(module: torch.fx.GraphModule, arguments: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> GraphReport:
    sources: list[str] = []
    compiled: list[Any] = []
    compile_kernel = triton.compile

    def remember(*positional: Any, **options: Any) -> Any:
        compiled.append(compile_kernel(*positional, **options))
        return compiled[-1]

    with FakeTensorMode():
        inputs = [torch.empty(shape, dtype=dtype, device="cuda") for shape, dtype in arguments]
    triton.compile = remember
    torch._inductor.graph.GraphLowering.save_output_code = sources.append
    try:
        with null_driver(), torch.no_grad():
            compile_fx(module, inputs)
    finally:
        triton.compile = compile_kernel
        torch._inductor.graph.GraphLowering.save_output_code = None
    code = "\n".join(sources)
    return GraphReport(
        kernels=re.findall(r"\b(triton_\w+)\.run\(", code),
        calls=re.findall(r"= torch\.ops\.(qkernels\w*\.\w+)", code),
        ptx=[kernel.asm["ptx"] for kernel in compiled],
        code=code,
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.lanes.inductor_cuda", description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="+", metavar="NAME", choices=[*GRAPHS, *PLANTED], help="graphs to compile")
    names = parser.parse_args(argv).names
    import qkernels.ops  # noqa: F401  defines the operators that the graphs call

    pretend_cuda()
    library = define_planted_operator()
    graphs = {**GRAPHS, **PLANTED}
    reports = {name: generate(graphs[name]) for name in names}
    print(json.dumps({name: {phase: asdict(r) for phase, r in phases.items()} for name, phases in reports.items()}))
    del library


if __name__ == "__main__":
    main()
