"""What a compiled program does: FLOPs, bytes of memory, collectives, each as often as its loops run it.

The compiler's own count (`Compiled.cost_analysis`) takes the body of a loop once and does not look into kernels; this
one multiplies by the trip counts. What it counts:

- FLOPs of matrix products (`dot`, `convolution`) and of kernels (see `flops`), as `capacity` counts.
- Bytes that an instruction reads from and writes to HBM: its operands and its result, without what lies in the
  memories of the chip, and of a slice only the slice. Padding to tiles is not counted, nor what a kernel reads twice.
- Bytes of collectives. The TPU compiler spreads one over a chain of fusions that all hold it, and counts once; a
  fusion called `all-reduce-scatter` keeps a part of a sum, and is a reduce-scatter.

How many rows an expert gets only the data say. A router is taken to be balanced, so that each device of the axis
`expert` gets as many rows as it has: a ragged all-to-all, whose buffers have room for the worst case on one side or the
other, is an all-to-all of the smaller one, and of the rows of a grouped product those that are there count.

Of a conditional the branch with the most FLOPs counts, of equal ones that with the most bytes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence

from mfa_jax.plan.flops import instruction_flops, is_grouped, is_kernel
from mfa_jax.plan.groups import first_group
from mfa_jax.plan.hlo import Computation, Instruction, Module, Shape

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id",
         "iota", "opt-barrier", "add-dependency"}
_SLICES = ("dynamic-slice", "gather", "slice")
_RAGGED = "ragged-all-to-all"
_IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}
"""Instructions that write into their first operand, and which operand holds what is written."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices."""

    kind: str
    nbytes: int
    """Of the whole array: gathered, before it is scattered, reduced, or what a device holds of it."""
    group: tuple[int, ...]
    """Partitions of the first group; empty where the text is not understood."""
    op_name: str
    """Of the JAX operation it is for."""


@dataclasses.dataclass(frozen=True)
class Work:
    """One instruction, and how often it runs."""

    name: str
    times: int
    flops: float = 0
    nbytes: int = 0
    """Read from and written to HBM."""
    collective: Collective | None = None


@dataclasses.dataclass(frozen=True)
class Costs:
    """All that a program does."""

    work: tuple[Work, ...]
    unknown_loops: tuple[str, ...]
    """Loops whose trip count only the data say: their bodies count once."""
    unknown_kernels: tuple[str, ...]
    """Kernels whose FLOPs have no formula here: they count as none."""

    @property
    def flops(self) -> float:
        return sum(w.flops * w.times for w in self.work)

    @property
    def nbytes(self) -> int:
        return sum(w.nbytes * w.times for w in self.work)

    @property
    def collectives(self) -> list[tuple[Collective, int]]:
        """With how often each is run."""
        return [(w.collective, w.times) for w in self.work if w.collective is not None]


def count(module: Module, of: str | None = None, expert_shards: int = 1) -> Costs:
    """What a program does from its entry to its end, or in one run of the computation `of`.

    Args:
      expert_shards: devices of the axis `expert`: a balanced router fills one in so many of the rows that a grouped
        product has room for.
    """
    counter = _Counter(module, expert_shards)
    work = tuple(counter.of(module.computations[of or module.entry], 1))
    return Costs(work, tuple(dict.fromkeys(counter.loops)), tuple(dict.fromkeys(counter.kernels)))


def decode_loop(module: Module) -> str:
    """The body of the loop of a decoding program, which runs as long as the data say: one token for each row.

    Raises:
      ValueError: the program has no such loop, or several.
    """
    home = module.computations[module.entry]
    bodies = [i.attribute("body") for i in home.instructions.values()
              if i.opcode == "while" and module.trip_count(i, home) is None]
    if len(bodies) != 1 or bodies[0] is None:
        raise ValueError(f"the program has {len(bodies)} loops that the data end, expected one")
    return bodies[0]


class _Counter:
    def __init__(self, module: Module, expert_shards: int) -> None:
        self.module = module
        self.expert_shards = expert_shards
        self.loops: list[str] = []
        self.kernels: list[str] = []

    def of(self, home: Computation, times: int) -> Iterator[Work]:
        """The work of a computation that runs so often."""
        chains: set[str] = set()
        for instruction in home.instructions.values():
            if instruction.opcode == "while":
                trips = self.module.trip_count(instruction, home)
                if trips is None:
                    self.loops.append(instruction.name)
                body = self.module.computations[instruction.attribute("body") or ""]
                yield from self.of(body, times * (1 if trips is None else trips))
            elif instruction.opcode == "conditional":
                branches = [list(self.of(self.module.computations[name], times)) for name in instruction.called]
                yield from max(branches, key=_weight)
            elif instruction.opcode in ("call", "async-start"):
                for name in instruction.called:
                    yield from self.of(self.module.computations[name], times)
            elif instruction.opcode not in _FREE and not instruction.opcode.endswith(("-done", "-update")):
                yield from self.one(home, instruction, times, chains)

    def one(self, home: Computation, instruction: Instruction, times: int, chains: set[str]) -> Iterator[Work]:
        for chain, collective in self.collectives(home, instruction):
            if chain not in chains:
                chains.add(chain)
                yield Work(collective.kind, times, collective=collective)
        flops = sum(self.flops(home, instruction))
        yield Work(instruction.name, times, flops, self.traffic(home, instruction))

    def collectives(self, home: Computation, instruction: Instruction) -> Iterator[tuple[str, Collective]]:
        """Collectives of an instruction or in its fusion, each with the chain of fusions it belongs to."""
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES or kind == _RAGGED:
            chain = re.search(r'chain_id="(\d+)"', instruction.attributes)
            scattered = home.name.startswith("all-reduce-scatter")
            yield (f"chain {chain[1]}" if chain else f"{home.name} {instruction.name}",
                   _collective("reduce-scatter" if scattered else kind, home, instruction))
        elif instruction.opcode == "fusion":
            for name in instruction.called:
                inner = self.module.computations[name]
                for part in inner.instructions.values():
                    yield from self.collectives(inner, part)

    def flops(self, home: Computation, instruction: Instruction) -> Iterator[float]:
        """FLOPs of an instruction and of what is fused into it."""
        found = instruction_flops(home, instruction, self.expert_shards)
        if found is None and is_kernel(instruction):
            self.kernels.append(re.sub(r"\.\d+$", "", instruction.name))
        yield found or 0.0
        if instruction.opcode == "fusion":
            for name in instruction.called:
                inner = self.module.computations[name]
                for part in inner.instructions.values():
                    yield from self.flops(inner, part)

    def traffic(self, home: Computation, instruction: Instruction) -> int:
        """Bytes between HBM and the chip."""
        if instruction.opcode == "fusion" and instruction.called:
            inner = self.module.computations[instruction.called[0]]
            read = sum(_fusion_read(inner, i, shapes)
                       for i, shapes in enumerate(home.operand_shapes(instruction)))
            return read + _fusion_written(inner, instruction)
        operands = home.operand_shapes(instruction)
        # The result of what begins an asynchronous pair holds source and destination.
        if instruction.opcode == "slice-start":
            source, out = instruction.shapes[:2]
            return out.nbytes * ((source.space == 0) + (out.space == 0))
        if instruction.opcode.endswith("-start"):
            return _hbm(instruction.shapes)
        if instruction.opcode in _SLICES:
            return 2 * _hbm(instruction.shapes)
        if instruction.opcode in _IN_PLACE:
            return 2 * _hbm(operands[_IN_PLACE[instruction.opcode]])
        if instruction.opcode == _RAGGED:
            return _ragged_bytes(operands) * sum(_hbm(shapes) > 0 for shapes in (operands[0], instruction.shapes))
        whole = sum(_hbm(shapes) for shapes in operands) + _hbm(instruction.shapes)
        if is_grouped(instruction):
            rows = sum(_hbm(s for s in shapes if len(s.dims) == 2) for shapes in (*operands, instruction.shapes))
            return whole - rows + rows // self.expert_shards
        return whole


def _weight(work: Iterable[Work]) -> tuple[float, int]:
    items = list(work)
    return sum(w.flops * w.times for w in items), sum(w.nbytes * w.times for w in items)


def _hbm(shapes: Iterable[Shape]) -> int:
    return sum(shape.nbytes for shape in shapes if shape.space == 0)


# ---- fusions ---------------------------------------------------------------------------------------------------


def _fusion_read(inner: Computation, index: int, shapes: tuple[Shape, ...]) -> int:
    """Bytes that a fusion reads of an operand: of one that is only sliced the slices, of one updated in place none."""
    if index not in inner.parameters:
        return _hbm(shapes)
    parameter, read = inner.parameters[index], 0
    for user, operand in _readers(inner, parameter):
        if user.opcode in _SLICES and user.operands[0] == operand:
            read += sum(s.nbytes for s in user.shapes)
        elif not (user.opcode in _IN_PLACE and user.operands[0] == operand):
            return _hbm(shapes)
    return min(read, _hbm(shapes))


def _readers(inner: Computation, instruction: Instruction) -> Iterator[tuple[Instruction, str]]:
    """Who reads a value inside a fusion, looking through what only renames it, and under which name."""
    for user in inner.users[instruction.name]:
        if user.opcode == "bitcast":
            yield from _readers(inner, user)
        else:
            yield user, instruction.name


def _fusion_written(inner: Computation, fusion: Instruction) -> int:
    """Bytes that a fusion writes: of an array that it updates in place, the update."""
    root = inner.root
    results = [inner.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(results) != len(fusion.shapes):
        return _hbm(fusion.shapes)
    written = 0
    for result, shape in zip(results, fusion.shapes, strict=True):
        while result.opcode == "bitcast":
            result = inner.instructions[result.operands[0]]
        place = _IN_PLACE.get(result.opcode)
        update = (shape,) if place is None else inner.instructions[result.operands[place]].shapes
        written += sum(s.nbytes for s in update) if shape.space == 0 else 0
    return written


# ---- collectives -----------------------------------------------------------------------------------------------


def _ragged_bytes(operands: Sequence[tuple[Shape, ...]]) -> int:
    """Of the rows that a device has, in a ragged all-to-all of a balanced router.

    Its first two operands are these rows and the array that they are written into, one of which has room for the worst
    case; the others are offsets and sizes.
    """
    return min(sum(s.nbytes for s in shapes) for shapes in operands[:2])


def _collective(kind: str, home: Computation, instruction: Instruction) -> Collective:
    # The result of an asynchronous pair holds the source too; a reduction's source is as large as what is reduced.
    operands = home.operand_shapes(instruction)
    source = sum(s.nbytes for shapes in operands for s in shapes)
    if kind == _RAGGED:
        kind, source = "all-to-all", _ragged_bytes(operands)
    group = first_group(instruction.attributes)
    size = source * max(len(group), 1) if kind == "all-gather" else source
    name = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return Collective(kind, size, group, name[1] if name else "")
