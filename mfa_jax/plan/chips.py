"""Published figures of TPU chips, and the slices they come in: what a prediction is made from.

Source: cloud.google.com/tpu/docs, pages `v5e`, `v5p` and `v6e` (key specifications and supported topologies), read in
November 2026. A TPU link carries data both ways at once; the bandwidth of a chip that is published counts both
directions of all its links.
"""

from __future__ import annotations

import dataclasses
import math
import re

from mfa_jax.config import require


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, which is one device to JAX."""

    name: str
    hbm_bytes: int
    """Memory; the system keeps a little of it, and the compiler's limit is what counts."""
    hbm_bandwidth: float
    """Bytes a second."""
    peak_flops: float
    """Dense bfloat16 FLOPs a second."""
    ici_bandwidth: float
    """Of all links and both directions, bytes a second."""
    dimensions: int
    """Of the torus: a chip has two links for each."""
    slices: tuple[tuple[int, ...], ...]
    """Shapes to choose from, smallest first."""

    @property
    def link_bandwidth(self) -> float:
        """Bytes a second of one link in one direction."""
        return self.ici_bandwidth / (2 * self.dimensions) / 2


_PLANES = ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_CUBES = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8), (8, 8, 16),
          (8, 16, 16), (16, 16, 16))
CHIPS = {chip.name: chip for chip in (
    Chip("v5e", 16 * 2**30, 819e9, 197e12, 400e9, 2, _PLANES),
    Chip("v5p", 95 * 2**30, 2765e9, 459e12, 1200e9, 3, _CUBES),
    Chip("v6e", 32 * 2**30, 1640e9, 918e12, 800e9, 2, _PLANES),
)}
"""By name. Slices of one chip are left out: libtpu compiles for whole hosts."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of a pod: chips of one kind in a box."""

    chip: Chip
    shape: tuple[int, ...]
    """Chips along each physical dimension."""

    @property
    def name(self) -> str:
        """As libtpu and `gcloud` spell it, such as `v5p:4x4x4`."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def size(self) -> int:
        """Chips."""
        return math.prod(self.shape)

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Along which dimensions the links close to a ring: all of a v5p from 4x4x4 on, those of 16 of v5e and v6e."""
        if self.chip.dimensions == 3:
            return (all(size % 4 == 0 for size in self.shape),) * 3
        return tuple(size == 16 for size in self.shape)


def parse_topology(name: str) -> Topology:
    """The topology of a name such as `v5p:4x4x4`.

    Raises:
      ValueError: an unknown chip, or a shape that is not of its dimensions.
    """
    chip_name, _, shape = name.partition(":")
    known = ", ".join(f"{chip.name}:{'x'.join('A' * chip.dimensions)}" for chip in CHIPS.values())
    require(chip_name in CHIPS and bool(re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape)), "topology", name,
            f"must be one of {known} with numbers of chips for the letters, such as v5e:4x4 or v5p:4x4x4")
    chip = CHIPS[chip_name]
    sizes = tuple(int(size) for size in shape.split("x"))
    require(len(sizes) == chip.dimensions, "topology", name, f"must have {chip.dimensions} numbers, such as "
            f"{', '.join(Topology(chip, s).name for s in chip.slices)}")
    return Topology(chip, sizes)


# ---- time on the links -----------------------------------------------------------------------------------------


def collective_seconds(kind: str, size: int, extents: tuple[int, ...], topology: Topology) -> float:
    """The least time that a collective takes on the links of a torus, without latency.

    A group of n devices spans `extents` chips along each dimension. Every dimension that it spans from end to end of a
    ring has both directions of its links, the others one: a chip at the end of a line receives all through one link.
    With `W` the bandwidth of one direction of one link, `d` the links in use and `V` the bytes of the whole result:

      all-gather, reduce-scatter  `V (n - 1) / n / (d W)`
      all-reduce                  twice that: it is the one and then the other
      all-to-all                  each of n devices has V bytes, and the middle of the longest dimension, of m chips, is
                                  what holds it up: `V m / 8 / W` in a ring, `V m / 4 / W` in a line
      collective-permute          `V / W`, to a neighbour; those of both directions of a ring could overlap, which is
                                  not counted

    Args:
      size: `V` in bytes: of the gathered, unscattered or reduced array, or of what one device holds.
      extents: chips of the group along each physical dimension; a dimension of 1 is not crossed.

    Raises:
      ValueError: a kind that is none of these.
    """
    n, W = math.prod(extents), topology.chip.link_bandwidth
    if n == 1:
        return 0.0
    crossed = [(extent, wraps and extent == length) for extent, length, wraps in
               zip(extents, topology.shape, topology.wraps, strict=True) if extent > 1]
    share = (n - 1) / n / (W * sum(2 if ring else 1 for _, ring in crossed))
    if kind in ("all-gather", "reduce-scatter"):
        return size * share
    if kind == "all-reduce":
        return 2 * size * share
    if kind == "all-to-all":
        return size * max(extent / (8 if ring else 4) for extent, ring in crossed) / W
    require(kind == "collective-permute", "kind", kind, "is no collective that has a formula here")
    return size / W


def bytes_sent(kind: str, size: int, devices: int) -> float:
    """Bytes that each device sends, at least, in a group of `devices`; `size` as in `collective_seconds`."""
    share = (devices - 1) / devices
    return size * {"all-reduce": 2 * share, "collective-permute": 1.0 if devices > 1 else 0.0}.get(kind, share)
