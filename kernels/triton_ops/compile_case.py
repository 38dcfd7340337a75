"""Compile kernels ahead of time for GPUs that are not here, and read what they use.

Triton compiles for a target that it is told (`ASTSource`, `GPUTarget`), with the assembler that its package carries,
and `cuobjdump -res-usage` from the same package reads registers and memory of the result. So a machine without a GPU
can tell whether a kernel compiles, spills registers or asks for more shared memory than a block may have.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Most shared memory of a block in bytes, by compute capability (CUDA C++ programming guide, table of limits)."""


@dataclass(frozen=True)
class CompileCase:
    """One specialisation of a kernel, as its launcher would ask for it.

    Attributes:
        name: what the table calls it.
        kernel: the `triton.jit` function.
        types: Triton type of each argument that is no constant, such as "*fp32", "i32", "*bf16:16"; ":16" says
            that the value, or the address, is a multiple of 16.
        constants: value of each constexpr argument.
        num_warps: warps of a program.
        num_stages: depth of software pipelining.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel uses.

    Attributes:
        name: of the case.
        capability: compute capability, such as 90.
        registers: of a thread.
        stack_bytes: of a thread's stack frame.
        local_bytes: of a thread's local memory: spilled registers.
        shared_bytes: of a block.
    """

    name: str
    capability: int
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int


def compile_for(case: CompileCase, capability: int) -> Usage:
    """Compile a case for a compute capability and read its resources.

    Raises:
        RuntimeError: if the kernel does not compile or cuobjdump does not understand the result.
    """
    names = case.kernel.arg_names
    signature = {
        name: "constexpr" if name in case.constants else case.types[name].split(":")[0] for name in names
    }
    divisible = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if case.types.get(name, "").endswith(":16")
    }
    source = ASTSource(case.kernel, signature, constexprs=dict(case.constants), attrs=divisible)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        done = subprocess.run(
            [_cuobjdump(), "-res-usage", cubin], capture_output=True, text=True, check=False
        )
    used = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", done.stdout)
    if used is None:
        raise RuntimeError(
            f"cuobjdump does not understand {case.name} for sm_{capability}: {done.stderr.strip()}"
        )
    registers, stack, static_shared, local = map(int, used.groups())
    # Triton's shared memory is dynamic: the launch asks for it, so the binary does not tell.
    shared = max(static_shared, compiled.metadata.shared)
    return Usage(case.name, capability, registers, stack, local, shared)


def _cuobjdump() -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        raise RuntimeError(f"this build of triton carries no cuobjdump ({tool})")
    return str(tool)
