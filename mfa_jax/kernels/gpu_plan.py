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
        """There are no registers for more warpgroups."""
        return self.prepares and len(self.parts) > 1

    @property
    def prepared_rows(self) -> tuple[tuple[int, int], ...]:
        """First row and number of the rows of a block that each preparing warpgroup turns or widens."""
        if not self.prepares:
            return ()
        return ((0, BLOCK),) if self.scorer_prepares else ((0, BLOCK // 2), (BLOCK // 2, BLOCK // 2))

    @property
    def roles(self) -> int:
        """Warpgroups: one scores, some average, two may prepare, one fetches."""
        return 2 + len(self.parts) + (0 if self.scorer_prepares else len(self.prepared_rows))


def make_plan(call: Call, B: int = 1, K: int = 1, cores: int = 1, scale: float = 1.0) -> Plan:
    """The numbers of a call on a GPU of so many SMs; `gpu_memory.with_stages` settles those of its memory."""
    M = -(-call.T * call.N // TILE) * TILE
    return Plan(B, K, call.T, M, call.S, call.H, call.h, call.shared, call.rope, call.alibi,
                jnp.dtype(call.cache_dtype), scale, max(1, cores // (M // TILE)))


class Work(NamedTuple):
    """How the blocks of all rows, one list, are cut: by key heads, then rows, then blocks."""

    length: Int[Array, " B"]
    first: Int[Array, " B"]
    """Item of the list of one key head that a row begins with."""
    size: Int[Array, "2"]
    """Items of a key head, and of a share."""
    begin: Int[Array, " G"]
    """Segment (a row of a key head, `head B + row`) that a share begins in."""
    end: Int[Array, " G"]
    """Segment past the last of a share."""


def divide(lengths: Int[Array, " B"], plan: Plan) -> Work:
    """The list of work for such lengths. A row of no key has one block all the same, which writes its zeros."""
    lengths = lengths.astype(jnp.int32)
    ends = jnp.cumsum(blocks_of(lengths, plan.S)).astype(jnp.int32)
    total = ends[-1]
    share = -(-total * plan.K // plan.shares)

    def segment(item: Array) -> Array:
        head, local = item // total, item % total
        return (head * plan.B + (local[:, None] >= ends).sum(axis=1)).astype(jnp.int32)

    begins = jnp.arange(plan.shares, dtype=jnp.int32) * share
    last = jnp.minimum(begins + share, total * plan.K) - 1
    begin = segment(begins)
    end = jnp.where(last >= begins, segment(last) + 1, begin)
    first = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    return Work(lengths, first, jnp.stack([total, share]), begin, end)


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
    size = work.size[1]
    row, head, start, stop = span(plan, work, s)
    begin, end = lax.max(start, share * size), lax.min(stop, (share + 1) * size)
    out = lax.select(begin > start, plan.B * plan.K + share - 1, row * plan.K + head)
    return Segment(tile, row, head, work.length[row], begin - start, end - begin, out)


def span(plan: Plan, work: Work, s: Any) -> tuple[Any, Any, Any, Any]:
    """Row and head of segment s, and its first item in the list and the one past its last."""
    head = lax.div(s, jnp.int32(plan.B))
    row = s - head * plan.B
    start = head * work.size[0] + work.first[row]
    return row, head, start, start + blocks_of(work.length[row], plan.S)


def blocks_of(length: Any, S: int) -> Any:
    """Blocks of a row: one at least."""
    held = jnp.minimum(jnp.maximum(length, 0), S)
    return jnp.maximum((held + (BLOCK - 1)) // BLOCK, 1)


def start_of(plan: Plan, block: Any) -> Any:
    """First key that is fetched of a block: the last block of a cache ends with it, and may overlap the one before."""
    return jnp.minimum(block * BLOCK, plan.S - BLOCK)
