"""Pickles: what one would do and take, found from its opcodes without running it.

A pickle is a program for a small stack machine. A short one can ask for gigabytes, or nest tuples whose hash takes
forever. `scan_pickle` runs the machine on sizes instead of values.
"""

import io
import pickletools
from pathlib import Path
from typing import IO, Any

PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt")  # usual extensions of pickles
MOST_OPCODES = 2_000_000
MOST_NESTED_VALUES = 1_000_000  # in one tuple, counted as often as they are in it
LOOKS_AT_BYTES = 1 << 20  # to find out whether a file is a pickle
STACK_MARK = -1  # on the stack, which otherwise contains the number of values in a value
TUPLES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET")


def scan_pickle(file: IO[bytes] | Any) -> int:
    """Check what the first pickle of a file would take.

    Args:
        file: an open file or memory map, which is read up to the end of the pickle.

    Returns:
        The number of its instructions.

    Raises:
        ValueError: the file is not a pickle, or takes more than a snapshot needs.
    """
    machine, count = _Machine(), 0
    for opcode, argument, _ in pickletools.genops(file):
        count += 1
        if count > MOST_OPCODES:
            raise ValueError(f"it has more than {MOST_OPCODES:,} instructions")
        machine.run(opcode, argument, count)
    return count


class _Machine:
    """The stack and the memo of a pickle, with the number of nested values in place of each value."""

    def __init__(self) -> None:
        self.stack: list[int] = []
        self.memo: dict[int, int] = {}

    def run(self, opcode: Any, argument: Any, count: int) -> None:
        """Run one instruction; raises ValueError if it takes too much or something that is not there."""
        name = opcode.name
        if name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self._known(int(argument)))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            place = len(self.memo) if argument is None else int(argument)
            if not 0 <= place <= count:  # a list as long as the largest number
                raise ValueError(f"it has memo number {place:,} after {count:,} instructions")
            self.memo[place] = self._top()
        elif name == "DUP":
            self.stack.append(self._top())
        elif name == "MARK":
            self.stack.append(STACK_MARK)
        else:
            self._change(opcode, name in TUPLES)

    def _change(self, opcode: Any, is_tuple: bool) -> None:
        """Take the operands from the stack, and put the results on it."""
        if pickletools.stackslice in opcode.stack_before:
            taken = 0
            while (value := self._pop()) != STACK_MARK:
                taken += value
            if opcode.stack_before[0] is not pickletools.markobject:  # a list, dictionary or set that gets the values
                self._value()
        elif opcode.name == "POP":
            taken = self._pop()
        else:
            taken = sum(self._value() for _ in opcode.stack_before)
        weight = 1 + taken if is_tuple else 1
        if weight > MOST_NESTED_VALUES:
            raise ValueError(f"it has a tuple of more than {MOST_NESTED_VALUES:,} values")
        self.stack += [weight] * len(opcode.stack_after)

    def _value(self) -> int:
        if self._top() == STACK_MARK:
            raise ValueError("it takes a mark for a value")
        return self._pop()

    def _known(self, place: int) -> int:
        if place not in self.memo:
            raise ValueError(f"it uses memo number {place:,} before it is set")
        return self.memo[place]

    def _top(self) -> int:
        if not self.stack or self.stack[-1] == STACK_MARK:
            raise ValueError("it takes a value from an empty stack")
        return self.stack[-1]

    def _pop(self) -> int:
        if not self.stack:
            raise ValueError("it takes a value from an empty stack")
        return self.stack.pop()


def looks_like_pickle(content: bytes) -> bool:
    """Whether the first bytes of a file are those of a pickle of any protocol."""
    if len(content) >= 2 and content[0] == 0x80 and 2 <= content[1] <= 5:
        return True
    machine, position = _Machine(), 0
    try:
        for count, (opcode, argument, at) in enumerate(pickletools.genops(io.BytesIO(content)), 1):
            machine.run(opcode, argument, count)
            position = at or 0
            if opcode.name == "STOP":
                return count > 2  # a shorter one holds one number or nothing
    except Exception:  # of what is no pickle, and of one that goes on after these bytes
        return len(content) >= LOOKS_AT_BYTES and position > len(content) // 2
    return False


def is_pickle(path: Path) -> bool:
    """Whether a file is a pickle, by its name or its first bytes. Loading a pickle can run any code."""
    if path.suffix.lower() in PICKLES:
        return True
    if path.suffix == ".safetensors":  # starts with a length, which can look like a pickle
        return False
    with path.open("rb") as file:
        return looks_like_pickle(file.read(LOOKS_AT_BYTES))
