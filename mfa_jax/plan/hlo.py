"""Reads the text of a compiled program: its computations, the instructions in them, how often each is run.

The text is what `jax.stages.Compiled.as_text` gives. It is not a documented format: what is read here is checked, by
the tests, on programs whose content is known, and what is not understood is reported and not guessed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128, "bf16": 16}


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array."""

    dtype: str
    dims: tuple[int, ...]
    space: int
    """Memory space: 0 is HBM, others are on the chip."""

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def nbytes(self) -> int:
        """Without padding to tiles."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            found = re.match(r"[a-z]+(\d+)", self.dtype)
            bits = int(found[1]) if found else 0
        return -(-self.size * bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shapes: tuple[Shape, ...]
    """The arrays of its result, a tuple laid flat."""
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    """What stands between the parentheses."""
    attributes: str
    """What follows them."""
    is_root: bool

    def attribute(self, name: str) -> str | None:
        """Of `name=value`, a value without blanks."""
        found = re.search(rf"\b{name}=%?([^\s,]+)", self.attributes)
        return found[1] if found else None

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations of a fusion, a call, an asynchronous pair or a conditional."""
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if branches:
            return tuple(name.strip().lstrip("%") for name in branches[1].split(","))
        keys = ("true_computation", "false_computation") if self.opcode == "conditional" else ("calls", "to_apply")
        found = [self.attribute(key) for key in keys]
        return tuple(name for name in found if name is not None)


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order they stand."""

    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.is_root)

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(i.arguments): i for i in self.instructions.values() if i.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Who reads the result of an instruction."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                if operand in found:
                    found[operand].append(instruction)
        return found

    def operand_shapes(self, instruction: Instruction) -> tuple[tuple[Shape, ...], ...]:
        """The arrays of each operand."""
        return tuple(self.instructions[name].shapes if name in self.instructions else ()
                     for name in instruction.operands)


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: str

    def trip_count(self, loop: Instruction, home: Computation) -> int | None:
        """How often the body of a `while` runs; None where only the data say.

        As the compiler noted it; else from the condition `counter < constant` and the constant that the counter starts
        with, for a counter that steps by one, which is what a scan becomes.
        """
        noted = re.search(r'known_trip_count\\?":\{\\?"n\\?":\\?"(\d+)', loop.attributes)
        if noted:
            return int(noted[1])
        condition = self.computations[loop.attribute("condition") or ""]
        test = condition.root
        if test.opcode != "compare" or "direction=LT" not in test.attributes:
            return None
        counter, limit = (condition.instructions[name] for name in test.operands)
        index = counter.attribute("index")
        if limit.opcode != "constant" or counter.opcode != "get-tuple-element" or index is None:
            return None
        start = _constant(home, home.instructions[loop.operands[0]].operands[int(index)])
        return None if start is None else int(limit.arguments) - start


def _constant(home: Computation, name: str) -> int | None:
    instruction = home.instructions[name]
    while instruction.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        instruction = home.instructions[instruction.operands[0]]
    return int(instruction.arguments) if instruction.opcode == "constant" else None


# ---- parsing ---------------------------------------------------------------------------------------------------

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*-> .*\{$")
_FOOTER = re.compile(r"^\}(, .*)?$")
_START = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\](?:\{([^}]*)\})?")
_KERNEL = re.compile(r'"body":"[^"]*"')


def parse(text: str) -> Module:
    """The module of a compiled program's text.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, current = None, None
    for name, is_entry, lines in _blocks(text):
        current = Computation(name, {i.name: i for i in map(_instruction, lines)})
        computations[name] = current
        entry = name if is_entry else entry
    if entry is None:
        raise ValueError("the text of the program has no ENTRY computation")
    return Module(computations, entry)


def _blocks(text: str) -> Iterator[tuple[str, bool, list[str]]]:
    """Name, whether it is the entry, and the instructions of each computation; an instruction may span lines."""
    name, is_entry, lines = "", False, list[str]()
    for line in _KERNEL.sub("", text).splitlines():
        header = _HEADER.match(line)
        if header and not name:
            name, is_entry, lines = header[2], bool(header[1]), []
        elif _FOOTER.match(line):
            yield name, is_entry, lines
            name = ""
        elif name and _START.match(line):
            lines.append(line)
        elif name and lines:
            lines[-1] += line


def _instruction(line: str) -> Instruction:
    start = _START.match(line)
    assert start is not None
    rest = line[start.end():]
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    result, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = opening + _closing(rest[opening:])
    arguments = rest[opening + 1:closing]
    return Instruction(
        name=start[2], shapes=tuple(_shapes(result)), opcode=rest[:opening],
        operands=tuple(re.findall(r"%([\w.\-]+)", arguments)), arguments=arguments, attributes=rest[closing + 1:],
        is_root=bool(start[1]))


def _shapes(text: str) -> Iterator[Shape]:
    for dtype, dims, layout in _SHAPE.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        yield Shape(dtype, tuple(int(d) for d in dims.split(",") if d), int(space[1]) if space else 0)


def _closing(text: str) -> int:
    """Index of the parenthesis that closes the first one."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return i
    raise ValueError(f"no closing parenthesis in {text[:80]!r}")
