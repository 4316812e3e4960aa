"""What the GPU kernel decides before it starts: its tiles, and how the list of work is cut into equal shares."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from mfa_jax.kernels.calls import SCALED, Call

TILE = 64
"""Query rows of a block of threads: the height of a Hopper matrix instruction."""
BLOCK = 64
"""Keys fetched at once. A tile of 64 x 256 bfloat16 is 32 KiB, about what an SM must have on its way to keep the memory
busy: 3.35 TB/s x 1 us / 132 SMs = 25 KB."""
OFFSETS = BLOCK // 2
"""Keys that are turned from the same origin: a table of angles for all of a block would leave no room for two blocks of
prepared keys."""
PART = 256
"""Most value columns of a warpgroup: 64 x 256 sums in float32 are 128 registers a thread."""


class Plan(NamedTuple):
    """Static numbers of a call, with the letters of `decode_attention`; M: padded rows of queries of a key head."""

    B: int
    K: int
    T: int
    M: int
    S: int
    H: int
    h: int
    shared: bool
    rope: bool
    alibi: bool
    cache_dtype: Any
    scale: float
    shares: int
    """Blocks of threads that divide the work of a tile of queries."""
    stages: int = 2
    """Blocks of keys that are fetched or on their way."""
    key_slots: int = 1
    """Blocks of prepared keys; with two the next is prepared while one is scored."""

    @property
    def narrow(self) -> bool:
        """Stored elements are widened to bfloat16 before they are multiplied, and have a scale a token."""
        return self.cache_dtype in SCALED

    @property
    def prepares(self) -> bool:
        """Keys are not multiplied as they are stored: they are turned or widened first."""
        return self.rope or self.narrow

    @property
    def widens_values(self) -> bool:
        """Widened values are another tile than prepared keys."""
        return self.narrow and (self.rope or not self.shared)

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """First column and width of the values of each averaging warpgroup."""
        return tuple((at, min(PART, self.h - at)) for at in range(0, self.h, PART))

    @property
    def scorer_prepares(self) -> bool:
        """There are no registers for a fifth warpgroup."""
        return self.prepares and len(self.parts) > 1

    @property
    def cluster(self) -> int:
        """Blocks of threads, each with a tile of the queries of a key head, that fetch keys and values together."""
        return 1 if self.M // TILE % 2 else 2

    @property
    def roles(self) -> int:
        """Warpgroups: one scores, some average, one may prepare, one fetches."""
        return 2 + len(self.parts) + (self.prepares and not self.scorer_prepares)


def make_plan(call: Call, B: int = 1, K: int = 1, cores: int = 1, scale: float = 1.0) -> Plan:
    """The numbers of a call on a GPU of so many SMs; `gpu_memory.with_stages` settles those of its memory."""
    M = -(-call.T * call.N // TILE) * TILE
    return Plan(B, K, call.T, M, call.S, call.H, call.h, call.shared, call.rope, call.alibi,
                jnp.dtype(call.cache_dtype), scale, max(1, cores // (M // TILE)))


class Work(NamedTuple):
    """How the blocks of all rows, one list, are cut: by key heads, then rows, then blocks."""

    length: Int[Array, " B"]
    stop: Int[Array, " B"]
    """Item of the list of one key head past the last of a row."""
    first_row: Int[Array, " G"]
    """Row in which a share begins."""
    last_row: Int[Array, " G"]
    """Row in which a share ends, where it has any items."""


def divide(lengths: Int[Array, " B"], plan: Plan) -> Work:
    """The list of work for such lengths. A row of no key has one block all the same, which writes its zeros.

    Two reductions and nothing else: on a GPU each is a kernel, which takes as long as reading 5 MB. What can be
    computed of a number or two is left to those who need it.
    """
    lengths = lengths.astype(jnp.int32)
    row = jnp.arange(plan.B)
    stops = jnp.where(row <= row[:, None], blocks_of(lengths, plan.S), 0).sum(axis=1).astype(jnp.int32)
    total = stops[-1]
    begin, end = _items(plan, total, jnp.arange(plan.shares, dtype=jnp.int32))

    def row_of(item: Array) -> Array:
        return (lax.rem(item, total)[:, None] >= stops).sum(axis=1).astype(jnp.int32)

    return Work(lengths, stops, row_of(begin), row_of(end - 1))


def _items(plan: Plan, total: Any, share: Any) -> tuple[Any, Any]:
    """First item of a share and the one past its last, in the list of all key heads."""
    size = _size(plan, total)
    return share * size, jnp.minimum((share + 1) * size, total * plan.K)


def _size(plan: Plan, total: Any) -> Any:
    """Items of a share, where the list of one key head has `total`."""
    return (total * plan.K + (plan.shares - 1)) // plan.shares


def segments_of(plan: Plan, work: Work, share: Any) -> tuple[Any, Any]:
    """First segment of a share (a row of a key head, `head B + row`) and the one past its last."""
    total = work.stop[plan.B - 1]
    begin, end = _items(plan, total, share)
    first = lax.div(begin, total) * plan.B + work.first_row[share]
    return first, jnp.where(begin < end, lax.div(end - 1, total) * plan.B + work.last_row[share] + 1, first)


class Segment(NamedTuple):
    """What a share does of one row of one key head, for one tile of its queries; scalars."""

    tile: Any
    row: Any
    head: Any
    length: Any
    block: Any
    """First block."""
    count: Any
    """Blocks."""
    out: Any
    """Where its results go: those of a row that another share began go past the end, a place a share."""


def segment_of(plan: Plan, work: Work, share: Any, tile: Any, s: Any) -> Segment:
    """Segment s as a share sees it."""
    row, head, start, stop = span(plan, work, s)
    first, last = _items(plan, work.stop[plan.B - 1], share)
    begin, end = lax.max(start, first), lax.min(stop, last)
    out = lax.select(begin > start, plan.B * plan.K + share - 1, row * plan.K + head)
    return Segment(tile, row, head, work.length[row], begin - start, end - begin, out)


def span(plan: Plan, work: Work, s: Any) -> tuple[Any, Any, Any, Any]:
    """Row and head of segment s, and its first item in the list and the one past its last."""
    head = lax.div(s, jnp.int32(plan.B))
    row = s - head * plan.B
    stop = head * work.stop[plan.B - 1] + work.stop[row]
    return row, head, stop - blocks_of(work.length[row], plan.S), stop


def continued(plan: Plan, work: Work, start: Any, stop: Any) -> tuple[Any, Any]:
    """The shares that go on with a row of such items, which another began: the first, and the one past the last."""
    size = _size(plan, work.stop[plan.B - 1])
    return start // size + 1, (stop + (size - 1)) // size


def blocks_of(length: Any, S: int) -> Any:
    """Blocks of a row: one at least."""
    held = jnp.minimum(jnp.maximum(length, 0), S)
    return jnp.maximum((held + (BLOCK - 1)) // BLOCK, 1)


def start_of(plan: Plan, block: Any) -> Any:
    """First key that is fetched of a block: the last block of a cache ends with it, and may overlap the one before."""
    return jnp.minimum(block * BLOCK, plan.S - BLOCK)
