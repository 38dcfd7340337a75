"""Looks at a pickle program before it runs: refuses what could exhaust memory or time.

What a program may call is decided by `published_unpickler`; this part bounds the program itself. It follows
the stack without making any object.
"""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Iterator

MAX_PICKLE_BYTES = 64 * 2**20
MAX_OPCODES = 1_000_000  # some seconds; a checkpoint of a thousand tensors and its optimiser have 100,000
MAX_OPEN_MARKS = 1000
MAX_TUPLE_ELEMENTS = 1000
MAX_INTEGER_BITS = 8192
_MARK = -1
# Extension codes fetch objects from a registry of this process; buffers come from outside of the file.
_REFUSED = {"EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER", "PERSID"}
_TUPLES = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET"}


def check_program(program: bytes) -> None:
    """Check a pickle program.

    Hashing a tuple visits every element at every depth and recurses in C, so nested tuples are bounded.
    The memo is an array as long as its largest index, so an index may not exceed the instructions so far.

    Raises:
        pickle.UnpicklingError: too long, truncated, not a pickle, or over a bound.
    """
    if len(program) > MAX_PICKLE_BYTES:
        raise pickle.UnpicklingError(f"the pickle has {len(program)} bytes, at most {MAX_PICKLE_BYTES}")
    open_marks = 0
    stack: list[int] = []  # of every object: the elements that hashing it would visit; _MARK for a mark
    memo: dict[int, int] = {}
    try:
        for count, (opcode, argument) in enumerate(_instructions(program)):
            if opcode.name in _REFUSED:
                raise pickle.UnpicklingError(f"instruction {opcode.name} at {count} is refused")
            open_marks += (opcode.name == "MARK") - (pickletools.markobject in opcode.stack_before)
            if count >= MAX_OPCODES or open_marks > MAX_OPEN_MARKS:
                raise pickle.UnpicklingError(
                    f"more than {MAX_OPCODES} instructions, or {MAX_OPEN_MARKS} open marks"
                )
            if type(argument) is int and argument.bit_length() > MAX_INTEGER_BITS:
                raise pickle.UnpicklingError(f"an integer of {argument.bit_length()} bits")
            if opcode.name in {"PUT", "BINPUT", "LONG_BINPUT"}:
                if not isinstance(argument, int) or not 0 <= argument <= count:
                    raise pickle.UnpicklingError(f"memo index {argument} after {count} instructions")
                memo[argument] = stack[-1]
            elif opcode.name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif opcode.name in {"GET", "BINGET", "LONG_BINGET"}:
                assert isinstance(argument, int)
                stack.append(memo[argument])
            else:
                _step(opcode, stack)
    except (ValueError, KeyError, IndexError, RecursionError) as error:
        raise pickle.UnpicklingError(f"not a complete pickle ({str(error)[:100]})") from None


def _instructions(program: bytes) -> Iterator[tuple[pickletools.OpcodeInfo, object]]:
    for opcode, argument, _ in pickletools.genops(program):
        yield opcode, argument


def _step(opcode: pickletools.OpcodeInfo, stack: list[int]) -> None:
    """Apply the effect of one instruction on the stack."""
    if opcode.name == "DUP":
        stack.append(stack[-1])
        return
    before = opcode.stack_before
    taken = []
    if pickletools.markobject in before:
        while (element := stack.pop()) != _MARK:
            taken.append(element)
        before = before[: before.index(pickletools.markobject)]
    taken += [stack.pop() for _ in before]
    cost = 1
    if opcode.name in _TUPLES:
        cost += sum(taken)
        if cost > MAX_TUPLE_ELEMENTS:
            raise pickle.UnpicklingError(f"a tuple of more than {MAX_TUPLE_ELEMENTS} nested elements")
    is_mark = opcode.name == "MARK"
    stack.extend(_MARK if is_mark else cost for _ in opcode.stack_after)
