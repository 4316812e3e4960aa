"""The smallest slice that a program fits, and the remat policy that recomputes least on it.

Slices are those of `Chip.slices`. All mesh axes keep their sizes but one, `fsdp`, which takes the rest of the slice;
the batch stays what it is. Each try is a compilation, so there are few:

1. Slices whose chips can't hold even the arguments (training state and batch, or parameters and caches), or over which
   something does not divide, are left out without compiling.
2. The smallest slice that fits with the leanest policy, `full`, is found by bisection: more chips never hold less.
3. On it, `none` and then `dots` are tried; the first that fits is the answer. Decoding keeps nothing for a backward
   pass, and skips this.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from jax.sharding import Mesh

from mfa_jax import axes
from mfa_jax.config import MeshConfig
from mfa_jax.plan.chips import Chip, Topology
from mfa_jax.plan.compiler import mesh_of
from mfa_jax.plan.report import Plan

POLICIES = ("none", "dots", "full")
"""Of remat: from the fastest to the leanest."""


@dataclasses.dataclass(frozen=True)
class Try:
    """One slice and policy that was looked at."""

    topology: str
    remat: str
    fits: bool
    reason: str
    """Why it does not, or how many bytes of a device it takes."""
    compiled: bool


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """What fits, and what was tried for it; `topology` and `remat` are None where no slice of the list fits."""

    topology: str | None
    remat: str | None
    tries: tuple[Try, ...]


@dataclasses.dataclass(frozen=True)
class Program:
    """A program that a slice is looked for."""

    compile: Callable[[Topology, Mesh, Any], Plan]
    """The plan for a slice, a mesh on it and a remat policy."""
    arguments: Callable[[Mesh], int]
    """Bytes of a device that its arguments take, known without compiling; raises ValueError for what does not divide.
    """
    policies: Sequence[str] = POLICIES


def suggest(
    program: Program, chip: Chip, mesh: MeshConfig, known: Sequence[tuple[str, str, Plan]] = (),
    on_try: Callable[[str], Any] = lambda text: None,
) -> Suggestion:
    """Searches as the module's docstring says.

    Args:
      mesh: whose sizes, all but that of `fsdp`, are kept.
      known: plans that are there already, by topology and policy: these are not compiled again.
      on_try: told of each compilation before it begins.
    """
    search = _Search(program, dict(((topology, remat), plan) for topology, remat, plan in known), on_try)
    candidates = [(topology, laid) for shape in chip.slices
                  if (laid := search.lay(topology := Topology(chip, shape), mesh)) is not None]
    leanest = program.policies[-1]
    low, high = 0, len(candidates)
    while low < high:
        middle = (low + high) // 2
        if search.fits(*candidates[middle], leanest):
            high = middle
        else:
            low = middle + 1
    if low == len(candidates):
        return Suggestion(None, None, tuple(search.tries))
    chosen = next((remat for remat in program.policies[:-1] if search.fits(*candidates[low], remat)), leanest)
    return Suggestion(candidates[low][0].name, chosen, tuple(search.tries))


class _Search:
    def __init__(self, program: Program, known: dict[tuple[str, str], Plan], on_try: Callable[[str], Any]) -> None:
        self.program, self.known, self.on_try = program, known, on_try
        self.tries: list[Try] = []

    def lay(self, topology: Topology, sizes: MeshConfig) -> Mesh | None:
        """The mesh over a slice; None where the sizes do not divide it, or its arguments take more than a chip has."""
        kept = {axis: size for axis, size in dataclasses.asdict(sizes).items() if axis != "fsdp"}
        rest, left = divmod(topology.size, math.prod(kept.values()))
        reason = f"{topology.size} chips are no multiple of {kept}" if left else ""
        mesh = None
        if not left:
            try:
                mesh = mesh_of(topology, tuple({**kept, "fsdp": rest}[axis] for axis in axes.MESH_AXES))
                taken = self.program.arguments(mesh)
                if taken > topology.chip.hbm_bytes:
                    reason = f"arguments alone take {taken / 2**30:.2f} GiB of a device"
            except ValueError as error:
                reason = str(error)
        if reason:
            self.tries.append(Try(topology.name, self.program.policies[-1], False, reason, compiled=False))
            return None
        return mesh

    def fits(self, topology: Topology, mesh: Mesh, remat: str) -> bool:
        plan = self.known.get((topology.name, remat))
        if plan is None:
            self.on_try(f"compiling for {topology.name}, remat {remat}")
            plan = self.program.compile(topology, mesh, remat)
        if plan.memory is not None:
            reason = f"{plan.memory.peak / 2**30:.2f} GiB"
        else:
            needed = "more" if plan.bytes_needed is None else f"{plan.bytes_needed / 2**30:.2f} GiB"
            reason = f"asks for {needed}"
        self.tries.append(Try(topology.name, remat, plan.fits, reason, compiled=True))
        return plan.fits
