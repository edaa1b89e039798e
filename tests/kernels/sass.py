"""Reads what ``cuobjdump -sass`` prints of a GPU's machine code: kernels, instructions, and in which order loads and
uses of what they load come on every path."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

_FUNCTION = re.compile(r"Function : (\S+)")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_REGISTER = re.compile(r"(?<![\w])R(\d+)(\.64)?")
#: Does not come to the next instruction.
_ENDS = ("EXIT", "RET", "BRA", "JMP")


class Instruction(NamedTuple):
    address: int
    guard: str | None  # the predicate under which it is executed
    opcode: str
    operands: str

    @property
    def width(self) -> int:
        """Bytes of one thread's access to global memory."""
        parts = self.opcode.split(".")
        return next(
            (size for name, size in {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1}.items() if name in parts), 4
        )

    @property
    def loads_array(self) -> bool:
        """Arrays are read with the hint that nobody needs the line again, tables and scalars without."""
        return self.opcode.startswith("LDG") and ".EF" in self.opcode

    @property
    def stores(self) -> bool:
        return self.opcode.startswith("STG")

    def _parts(self) -> tuple[str, str]:
        """The operand that is written, and the others."""
        first, _, rest = self.operands.partition(",")
        if self.opcode.startswith(("ST", "RED", "BRA", "EXIT")) or not re.fullmatch(r"R\d+(\.64)?", first.strip()):
            return "", self.operands
        return first, rest

    def written(self) -> set[int]:
        count = self.width // 4 if self.opcode.startswith("LDG") else 2 if ".WIDE" in self.opcode else 1
        return {int(n) + i for n, _ in _REGISTER.findall(self._parts()[0]) for i in range(max(count, 1))}

    def read(self) -> set[int]:
        return {int(n) + i for n, pair in _REGISTER.findall(self._parts()[1]) for i in range(2 if pair else 1)}


def cuobjdump() -> str | None:
    """The program, from the PATH or from Triton."""
    if found := shutil.which("cuobjdump"):
        return found
    try:
        import triton

        return str(triton.knobs.nvidia.cuobjdump.path)
    except (ImportError, AttributeError, RuntimeError):
        return None


def kernels(cubin: Path, tool: str) -> dict[str, list[Instruction]]:
    """The instructions of every kernel by its mangled name."""
    text = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        if function := _FUNCTION.search(line):
            current = found[function[1]] = []
        elif instruction := _INSTRUCTION.search(line):
            address, guard, opcode, operands = instruction.groups()
            current.append(Instruction(int(address, 16), guard, opcode, operands))
    return found


def resources(cubin: Path, tool: str) -> dict[str, dict[str, int]]:
    """Registers (``REG``) and bytes of ``STACK`` and ``LOCAL`` memory per thread of every kernel."""
    text = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    pattern = r"Function (\S+):\s*\n\s*(.*)"
    return {
        name: {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        for name, usage in re.findall(pattern, text)
    }


def late_loads(kernel: list[Instruction], width: int = 8) -> list[Instruction]:
    """Loads of an array, at least ``width`` bytes wide, that come on some path after a value has been used which such a
    load of the same round of the loop has brought: they wait for memory twice."""
    index = {instruction.address: i for i, instruction in enumerate(kernel)}
    late: dict[int, Instruction] = {}
    # What is known before each instruction: the registers that hold loaded values, and whether one has been used.
    before: dict[int, tuple[frozenset[int], bool]] = {0: (frozenset(), False)}
    for i, instruction in enumerate(kernel):
        if i not in before:  # only reached by going back: a loop's rounds are looked at one by one
            before[i] = (frozenset(), False)
        loaded, used = before[i]
        used = used or bool(instruction.read() & loaded)
        if instruction.loads_array and instruction.width >= width:
            if used:
                late[i] = instruction
            loaded = loaded | instruction.written()
        elif instruction.guard is None:
            loaded = loaded - instruction.written()
        following = []
        conditional = instruction.guard is not None or "," in instruction.operands
        if not instruction.opcode.startswith(_ENDS) or conditional:
            following.append(i + 1)
        target = re.search(r"(?<![\w+])0x([0-9a-f]+)$", instruction.operands)
        if instruction.opcode.startswith(("BRA", "BSSY")) and target:
            following.append(index.get(int(target[1], 16), i + 1))
        for j in following:
            if i < j < len(kernel):
                old, was = before.get(j, (frozenset(), False))
                before[j] = (old | loaded, was or used)
    return list(late.values())
