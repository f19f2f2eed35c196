"""Read what ptxas made of a kernel: registers, stack, spills, SASS from the cubin; accesses and rounding from PTX.

The numbers come from the very cubin that would be loaded (running a ptxas by hand can pick another version). Uses
Triton's bundled `cuobjdump` and `nvdisasm`.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Resources:
    """What a kernel takes.

    Attributes:
        registers: per thread.
        stack: bytes of stack or local memory per thread; spilled registers live there.
        spills: local-memory loads and stores.
        hot_spills: those of them that lie in an innermost loop.
    """

    registers: int
    stack: int
    spills: int = 0
    hot_spills: int = 0


@dataclass(frozen=True)
class Access:
    """One global memory instruction of the PTX.

    Attributes:
        parameters: names of the pointer parameters that the address may come from.
        store: True for a store, False for a load.
        width: bytes moved per thread by the one instruction.
        in_loop: True if it lies inside a loop.
    """

    parameters: frozenset[str]
    store: bool
    width: int
    in_loop: bool


def resources(cubin: bytes) -> Resources:
    """Resource usage of the kernel in a cubin. Raises RuntimeError when the tools do not report any."""
    with _file(cubin) as path:
        usage = _run("cuobjdump", "-res-usage", path)
        counts = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
        if not {"REG", "STACK", "LOCAL"} <= counts.keys():
            raise RuntimeError(f"no resource usage in the cubin: {usage[:300]!r}")
        # Spills live in a stack frame or in local memory. Disassembling takes 0.3 s, so it is done only to count them.
        framed = counts["STACK"] or counts["LOCAL"]
        sass = _run("nvdisasm", "-c", path) if framed else ""
        lines = sass.splitlines()
    spills = [number for number, line in enumerate(lines) if re.search(r"\b(?:LDL|STL)\b", line)]
    loops = _loops(lines, r"(\.L_x_\d+):", r"\bBRA\b.*`\((\.L_x_\d+)\)")
    innermost = [(a, b) for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]
    return Resources(
        registers=counts["REG"],
        stack=max(counts["STACK"], counts["LOCAL"]),
        spills=len(spills),
        hot_spills=sum(any(first < number < last for first, last in innermost) for number in spills),
    )


def opcodes(cubin: bytes) -> Counter[str]:
    """How often each SASS instruction stands in a cubin, by its name with modifiers: "LDG.E.128.CONSTANT"."""
    with _file(cubin) as path:
        sass = _run("nvdisasm", "-c", path)
    # "        /*0120*/   @!P0 LDG.E R2, desc[UR4][R2.64] ;"
    return Counter(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE))


@contextmanager
def _file(cubin: bytes) -> Iterator[str]:
    """Path of a temporary file that holds the cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        yield str(path)


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([str(_TOOLS / tool), *arguments], capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{tool} failed: {done.stderr[:300]}")
    return done.stdout + done.stderr


_REGISTER = re.compile(r"%[a-z]+\d+")
_ACCESS = re.compile(r"\b(ld|st)\.global((?:\.[\w:]+)*?)(?:\.v(\d))?\.[a-z](\d+)\b")
_ADDRESS = re.compile(r"\[\s*(%\w+)")
_ADDRESS_ARITHMETIC = re.compile(r"\b(?:mov|add|sub|cvta|mad|selp|or)\b")


def memory_accesses(ptx: str, parameters: Sequence[str]) -> list[Access]:
    """Global loads and stores of a kernel, each traced back to the pointer parameters its address is made from.

    Args:
        ptx: the kernel's PTX.
        parameters: names of the kernel's parameters in order.

    The trace ignores control flow: a register belongs to every parameter that any instruction lets flow into it. Values
    read from memory carry nothing on.
    """
    lines = [line.split("//")[0].strip() for line in ptx.splitlines()]
    origins: dict[str, set[str]] = {}
    flows: list[tuple[str, list[str]]] = []
    for line in lines:
        loaded = re.search(r"\bld\.param\S*\s+(%\w+),\s*\[\w+_param_(\d+)\]", line)
        if loaded:
            index = int(loaded[2])
            if index < len(parameters):  # what follows is scratch that Triton adds
                origins.setdefault(loaded[1], set()).add(parameters[index])
            continue
        if _ADDRESS_ARITHMETIC.search(line) and "[" not in line:
            registers = _REGISTER.findall(line)
            if len(registers) > 1 and registers[0].startswith("%rd"):
                flows.append((registers[0], registers[1:]))
    changed = True
    while changed:
        changed = False
        for target, sources in flows:
            known = origins.setdefault(target, set())
            before = len(known)
            for source in sources:
                known |= origins.get(source, set())
            changed |= len(known) != before
    loops = _loops(lines, r"(\$\w+):", r"\bbra\S*\s+(\$\w+)")
    accesses = []
    for number, line in enumerate(lines):
        found = _ACCESS.search(line)
        address = _ADDRESS.search(line)
        if found and address:
            kind, _, vector, bits = found.groups()
            accesses.append(
                Access(
                    parameters=frozenset(origins.get(address[1], ())),
                    store=kind == "st",
                    width=int(vector or 1) * int(bits) // 8,
                    in_loop=any(first <= number <= last for first, last in loops),
                )
            )
    return accesses


def atomic_additions(ptx: str, space: str) -> int:
    """Atomic additions to a state space ("shared", "global") in the PTX, with or without a result."""
    return len(re.findall(rf"\b(?:red|atom)\.(?:\w+\.)*?{space}(?:::\w+)?\.(?:\w+\.)*?add\b", ptx))


def _loops(lines: Sequence[str], label: str, branch: str) -> list[tuple[int, int]]:
    """Line ranges from a label to a branch back to it, given patterns for both with the label's name as group 1."""
    labels = {found[1]: number for number, line in enumerate(lines) if (found := re.match(label, line))}
    branches = [(number, found[1]) for number, line in enumerate(lines) if (found := re.search(branch, line))]
    return [(labels[target], number) for number, target in branches if labels.get(target, number) < number]


def contractions(ptx: str, fusion_allowed: bool) -> list[str]:
    """Instructions whose result depends on contracting a * b + c into one rounding.

    Explicit `fma`, and, where ptxas may fuse (`fusion_allowed`), an unrounded `mul` whose product goes into an
    unrounded `add` or `sub`. Integer and address arithmetic is `mad`, never `fma`.
    """
    found = re.findall(r"^\s*(fma\.rn\.f(?:32|64)\s[^;]*)", ptx, re.MULTILINE)
    if fusion_allowed:
        products = set(re.findall(r"^\s*mul\.f(?:32|64)\s+(%\w+),", ptx, re.MULTILINE))
        for line in re.findall(r"^\s*((?:add|sub)\.f(?:32|64)\s[^;]*)", ptx, re.MULTILINE):
            if products & set(_REGISTER.findall(line)[1:]):
                found.append(line)
    return found
