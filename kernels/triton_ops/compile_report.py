"""Compile every Triton kernel for sm_80, sm_90 and sm_100, without a GPU.

    python -m kernels.triton_ops.compile_report

Prints registers, stack, spilled (local) and shared memory as a table, or with `--json` as JSON. Ends with status 1 if
a kernel spills or asks for more shared memory than a block may have.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from importlib import import_module
from multiprocessing import get_context
from pkgutil import iter_modules

import kernels.triton_ops
from kernels.triton_ops.compile_case import SHARED_LIMITS, CompileCase, Usage, compile_for


def all_cases() -> list[CompileCase]:
    """Return the COMPILE_CASES of every module of this package."""
    modules = sorted(module.name for module in iter_modules(kernels.triton_ops.__path__))
    return [
        case
        for name in modules
        if name != "compile_report"
        for case in getattr(import_module(f"kernels.triton_ops.{name}"), "COMPILE_CASES", [])
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Compile all cases and print what they use; 1 if one is over its limits."""
    parser = argparse.ArgumentParser(description="Compile every kernel ahead of time and print what it uses.")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    as_json = parser.parse_args(argv).json
    usages = compile_all()
    print(json.dumps([asdict(usage) for usage in usages], indent=1) if as_json else table(usages))
    return 1 if any(over_limit(usage) for usage in usages) else 0


def compile_all() -> list[Usage]:
    """Compile every case for every target, on as many processes as there are cores: a case takes about a second."""
    work = [(number, capability) for number in range(len(all_cases())) for capability in SHARED_LIMITS]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        return list(pool.map(_compile, *zip(*work, strict=True)))


def _compile(number: int, capability: int) -> Usage:
    """Compile one case; by its number, since kernels do not travel between processes."""
    return compile_for(all_cases()[number], capability)


def over_limit(usage: Usage) -> bool:
    """Whether a kernel spills registers or asks for too much shared memory."""
    return (
        usage.local_bytes > 0 or usage.stack_bytes > 0 or usage.shared_bytes > SHARED_LIMITS[usage.capability]
    )


def table(usages: Sequence[Usage]) -> str:
    """Return the figures as text, a line each."""
    width = max((len(usage.name) for usage in usages), default=6)
    head = f"{'kernel':<{width}}  target  registers  stack B  local B  shared B"
    return "\n".join(
        [head]
        + [
            f"{u.name:<{width}}  sm_{u.capability:<4}{u.registers:>9}{u.stack_bytes:>9}{u.local_bytes:>9}"
            f"{u.shared_bytes:>10}{'  OVER ITS LIMIT' if over_limit(u) else ''}"
            for u in usages
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
