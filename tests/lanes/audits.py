"""The lanes as functions: run a case one way and return what is wrong with it, in words. No finding, no problem."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from triton.backends.compiler import GPUTarget

from tests.lanes import inspect_binary
from tests.lanes.cases import STREAMED, Arguments, KernelCase, misaligned
from tests.lanes.interpreter_trace import trace
from tests.lanes.null_driver import CUDA_90, Launch, null_driver
from tests.lanes.sync_counter import count_host_reads

CPU = torch.device("cpu")


def _named_tensors(arguments: Arguments, outputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    both = {**arguments, **outputs}
    return {name: value for name, value in both.items() if isinstance(value, torch.Tensor)}


# ----------------------------------------------------------------------------------------------- ahead of time


@dataclass(frozen=True)
class BinaryReport:
    """One compiled kernel in numbers: registers, and the widest load and store (bytes) of each named tensor."""

    kernel: str
    registers: int
    widths: Mapping[str, int]


def audit_binaries(
    case: KernelCase, dtype: torch.dtype, target: GPUTarget, *, unaligned: bool = False
) -> tuple[list[str], list[BinaryReport]]:
    """Compile a case for a target through its own launcher and read the binaries.

    Args:
        case: the case; its large arguments are used.
        dtype: dtype of the inputs.
        target: what to compile for. On AMD compiling is all that is asked.
        unaligned: move every tensor that `case.reads` names off its 16-byte boundary; then no access to it may be wider
            than one element.
    """
    with null_driver(target) as log:
        arguments = case.make(CPU, dtype, True)
        if unaligned:
            arguments.update({name: misaligned(arguments[name]) for name in case.reads})
        outputs = case.run(**arguments)
        binaries = log.binaries()
    problems = [] if binaries else [f"{case}: nothing was launched"]
    if target.backend != "cuda":
        empty = [launch.kernel for launch in binaries if not launch.compiled.asm.get("hsaco")]
        return problems + [f"{kernel}: no code for {target.arch}" for kernel in empty], []
    reports = []
    tensors = _named_tensors(arguments, outputs)
    for launch in binaries:
        found, report = _audit_binary(case, launch, tensors)
        problems += [f"{launch.kernel}: {problem}" for problem in found]
        reports.append(report)
    accesses = [(launch, _accesses(launch)) for launch in binaries]
    if unaligned:
        problems += _wide_accesses_to_unaligned(case, tensors, accesses)
    else:
        problems += _narrow_accesses(case, tensors, accesses)
    return problems, reports


def _accesses(launch: Launch) -> list[inspect_binary.Access]:
    return inspect_binary.memory_accesses(launch.compiled.asm["ptx"], launch.parameters)


def _audit_binary(
    case: KernelCase, launch: Launch, tensors: Mapping[str, torch.Tensor]
) -> tuple[list[str], BinaryReport]:
    ptx = launch.compiled.asm["ptx"]
    used = inspect_binary.resources(launch.compiled.asm["cubin"])
    problems = []
    if used.hot_spills:
        problems.append(f"spills in an innermost loop: {used.hot_spills} local loads and stores")
    if used.stack > case.cold_stack:
        problems.append(f"spills: {used.stack} bytes of stack, more than {case.cold_stack}; {used.spills} accesses")
    if used.registers > case.max_registers:
        problems.append(f"{used.registers} registers, more than {case.max_registers}")
    problems += [f"contains {text}" for text in case.forbidden_ptx if text in ptx]
    fused = inspect_binary.contractions(ptx, launch.compiled.metadata.enable_fp_fusion)
    if fused and not case.fused_multiply_adds:
        problems.append(f"depends on contraction in {len(fused)} places, first: {fused[0]}")
    widths: dict[str, int] = {}
    for access in _accesses(launch):
        for name in _names(launch, access, tensors):
            key = f"{name} {'store' if access.store else 'load'}"
            widths[key] = max(widths.get(key, 0), access.width)
    return problems, BinaryReport(launch.kernel, used.registers, widths)


def _names(launch: Launch, access: inspect_binary.Access, tensors: Mapping[str, torch.Tensor]) -> Iterable[str]:
    """Names, in the case, of the tensors an access may touch."""
    given = launch.tensors()
    addresses = {given[parameter].data_ptr() for parameter in access.parameters if parameter in given}
    return [name for name, tensor in tensors.items() if tensor.data_ptr() in addresses]


def _narrow_accesses(
    case: KernelCase, tensors: Mapping[str, torch.Tensor], binaries: list[tuple[Launch, list[inspect_binary.Access]]]
) -> list[str]:
    """Streamed tensors accessed in smaller pieces than the layout allows where the bulk of the work is done."""
    wanted = [(name, store) for names, store in ((case.reads, False), (case.writes, True)) for name in names]
    problems = []
    for name, store in wanted:
        if tensors[name].numel() <= STREAMED:
            continue
        kind = "store" if store else "load"
        width = min(16, case.vector * tensors[name].element_size())
        seen = 0
        for launch, accesses in binaries:
            mine = [a for a in accesses if a.store == store and name in _names(launch, a, tensors)]
            bulk = [a for a in mine if a.in_loop] or mine
            seen += len(bulk)
            widest = max((a.width for a in bulk), default=width)
            if widest < width:
                problems.append(f"{launch.kernel}: {kind}s of {name} are at most {widest} bytes wide, not {width}")
        if not seen:
            problems.append(f"no {kind} of {name} was found in the PTX")
    return problems


def _wide_accesses_to_unaligned(
    case: KernelCase, tensors: Mapping[str, torch.Tensor], binaries: list[tuple[Launch, list[inspect_binary.Access]]]
) -> list[str]:
    """Accesses wider than an element to a tensor that is aligned to no more than an element: they would fault."""
    problems = []
    for launch, accesses in binaries:
        for name in case.reads:
            size = tensors[name].element_size()
            wide = [a for a in accesses if a.width > size and name in _names(launch, a, tensors)]
            if wide:
                problems.append(f"{launch.kernel}: {wide[0].width}-byte access to unaligned {name}")
    return problems


# ----------------------------------------------------------------------------------------------- launches and syncs


def audit_launches(case: KernelCase, dtype: torch.dtype) -> list[str]:
    """Launches of one call, and reads of values by the host while it is made."""
    problems = []
    with null_driver(CUDA_90) as log:
        arguments = case.make(CPU, dtype, True)
        with count_host_reads() as reads:
            case.run(**arguments)
        if len(log.launches) != case.launches:
            problems.append(f"{len(log.launches)} launches ({', '.join(log.kernels)}), expected {case.launches}")
    problems += [f"host read: {name}, {count} times" for name, count in reads.items()]
    return problems


_SPECIALIZATIONS = 3  # Triton compiles for an integer that is 1, a multiple of 16, or neither


def audit_variants(case: KernelCase, dtype: torch.dtype, sizes: Iterable[int]) -> tuple[list[str], dict[str, int]]:
    """Compiled variants of each kernel over many sizes that nothing explains; and the number of all of them."""
    assert case.sweep is not None
    with null_driver(CUDA_90) as log:
        for n in sizes:
            case.run(**case.sweep(dtype, n))
        variants = log.variants()
    problems = []
    for kernel, launches in variants.items():
        configurations = Counter(launch.configuration for launch in launches)
        if len(configurations) > case.max_configurations:
            listed = "; ".join(str(dict(configuration)) for configuration in configurations)
            problems.append(
                f"{kernel}: {len(configurations)} configurations, more than {case.max_configurations}: {listed}"
            )
        for configuration, count in configurations.items():
            if count > _SPECIALIZATIONS:
                problems.append(f"{kernel}: {count} compiled variants of {dict(configuration)}")
    return problems, {kernel: len(launches) for kernel, launches in variants.items()}


# ----------------------------------------------------------------------------------------------- memory trace


def audit_memory(case: KernelCase, dtype: torch.dtype, orders: Iterable[int] = (1, 2)) -> list[str]:
    """Run the small, finite input in the interpreter: access counts, bounds, races, the same bits in every order."""
    problems, expected = _audit_order(case, dtype, None)
    if case.order_independent:
        for order in orders:
            more, results = _audit_order(case, dtype, order)
            problems += more
            different = [name for name in expected if not same_bits(expected[name], results[name])]
            problems += [f"program order changes {name}" for name in different]
    return sorted(set(problems))


def _audit_order(case: KernelCase, dtype: torch.dtype, order: int | None) -> tuple[list[str], dict[str, torch.Tensor]]:
    arguments = case.make(CPU, dtype, False)
    with trace(order) as recorded:
        outputs = case.run(**arguments)
    tensors = _named_tensors(arguments, outputs)
    problems = [] if recorded.programs else [f"{case}: nothing was launched"]
    problems += [fault if count == 1 else f"{fault} ({count} times)" for fault, count in recorded.faults.items()]
    for name in dict.fromkeys([*case.reads, *case.writes]):
        loads, stores, multiplicity = recorded.counts(tensors[name])
        times = case.reads.get(name, 0)
        if (loads < times).any() or (loads > times * multiplicity).any():
            problems.append(f"elements of {name} are loaded {loads.min()} to {loads.max()} times, not {times}")
        times = case.writes.get(name, 0)
        if times and (multiplicity > 1).any():
            problems.append(f"{name} is written and has several elements in one place")
        if (stores != times).any():
            problems.append(f"elements of {name} are stored {stores.min()} to {stores.max()} times, not {times}")
    for name, tensor in outputs.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            problems.append(f"{name} is not finite though every input is")
    scratch = recorded.traffic_outside([tensors[name] for name in (*case.reads, *case.writes)])
    if scratch > case.scratch_bytes:
        problems.append(f"{scratch} bytes of scratch traffic, more than {case.scratch_bytes}")
    return problems, {name: tensor.clone() for name, tensor in tensors.items()}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit-identical, NaN included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
