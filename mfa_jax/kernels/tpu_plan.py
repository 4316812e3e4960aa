"""What the TPU kernel decides before it starts: block sizes, and the list of work with its division over cores."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mfa_jax.kernels.calls import Call, Device

LANES = 128
TILE = 16
"""Rows of a tile of bfloat16, and twice those of float32."""


def grain(dtype: Any) -> int:
    """Keys that a copy is rounded up to: whole tiles."""
    return 2 * TILE if dtype == jnp.int8 else TILE


class Chip(NamedTuple):
    """What block sizes follow from."""

    cores: int
    """That share one HBM and are one device to JAX."""
    slot_bytes: int = 2**21
    """Keys and values of a block. A step is a chain of some thousand cycles whatever it computes, and has to end before
    the copy of the next block: 2 MiB take 4500 cycles of v5e, 2200 of v6e and 2600 of a core of v5p."""
    part: int = 2**16
    """Scores computed at once, queries x keys: a matrix of float32. Fewer do not fill the matrix unit between two
    softmaxes; v6e, whose units are four times as large, wants twice as many."""
    bfloat16_vectors: bool = False
    """Whether vector arithmetic can be bfloat16; else it is float32, and bfloat16 is converted for it."""
    vmem_bytes: int = 2**25
    """What a kernel may take. Two slots, the rope table and the accumulators are below 16 MiB but for many queries."""


_V5E, _V5P, _V6E = Chip(cores=1), Chip(cores=2), Chip(cores=1, part=2**17, bfloat16_vectors=True)
CHIPS = {"TPU v5 lite": _V5E, "TPU v5e": _V5E, "TPU v5": _V5P, "TPU v5p": _V5P, "TPU v6 lite": _V6E, "TPU v6e": _V6E}
"""By `device_kind`."""


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
    quantized: bool
    dtype: Any
    block: int
    """Keys fetched at once."""
    part: int
    """Keys whose scores are computed at once; divides a block."""
    cores: int
    turn: Any = jnp.float32
    """Type of the turn of keys that are stored before rope."""


def obstacle(call: Call, device: Device, interpret: bool = False) -> str | None:
    """Why the kernel can't serve a call on a device; None if it can."""
    if not interpret and device.platform != "tpu":
        return f"runs on TPUs, and this is {device.platform}; mosaic_tpu_interpret runs its program anywhere, slowly"
    if not interpret and device.kind not in CHIPS:
        return f"has no block sizes for {device.kind}; it has for {', '.join(CHIPS)}"
    if call.dtype not in (jnp.bfloat16, jnp.float32):
        return f"takes queries of bfloat16 or float32, not {call.dtype}"
    if call.cache_dtype not in (jnp.bfloat16, jnp.float32, jnp.int8):
        return f"reads caches of bfloat16, float32 or int8, not {call.cache_dtype}"
    if call.S % grain(call.cache_dtype):
        return (f"copies {grain(call.cache_dtype)} tokens of a {call.cache_dtype} cache at a time, and S={call.S} is "
                "not a multiple of it")
    return None


def slot_keys(chip: Chip, row_bytes: int) -> int:
    """Keys that fill a slot, a power of two."""
    return max(LANES, 2 ** round(math.log2(chip.slot_bytes / row_bytes)))


def part_keys(chip: Chip, M: int) -> int:
    """Keys that fill the matrix unit with M rows of queries, a power of two."""
    return max(LANES, chip.part // 2 ** math.ceil(math.log2(M)))


def short_block(S: int, most: int) -> tuple[int, int]:
    """Keys of the one block of a cache that is shorter than a slot, and of its parts of at most `most` keys.

    The fewest equal parts: each is a chain of some 500 cycles in a loop, and what reaches past the cache is masked as
    what is past a length is. Less than twice as many are taken where they end with the cache, since no other block can
    be computed without masks, as that of a full shard is.
    """
    fewest = -(-S // most)
    parts = next((n for n in range(fewest, 2 * fewest) if S % (n * LANES) == 0), fewest)
    part = -(-S // (parts * LANES)) * LANES
    return parts * part, part


def make_plan(
    q: Any, k: Any, v: Any, *, rope: bool, alibi: bool, value_width: int | None, chip: Chip, block: int | None = None
) -> Plan:
    """The numbers of a call with keys `[B, K, S, H]`; of the arrays only shapes and types are looked at."""
    B, T, N, H = q.shape
    K, S = k.shape[1:3]
    row_bytes = sum(-(-x.shape[-1] // LANES) * LANES * x.dtype.itemsize for x in (k, v) if x is not None)
    M = -(-T * N // K // TILE) * TILE
    most, fill = part_keys(chip, M), slot_keys(chip, row_bytes)
    if block is None and S < fill:
        block, part = short_block(S, most)
    else:
        block = block or fill
        part = math.gcd(block, most)
    h = v.shape[-1] if v is not None else value_width or H
    quantized = k.dtype == jnp.int8
    # Of a normal key of 256, int8 is off by 0.70 %, a turn in float32 (rounded once) by 0.16 %, one in bfloat16 by
    # 0.25 %: 0.74 % together instead of 0.72 %, and the vector unit no longer sets the pace.
    turn = jnp.bfloat16 if quantized and chip.bfloat16_vectors and q.dtype == jnp.bfloat16 else jnp.float32
    return Plan(B, K, T, M, S, H, h, v is None, rope, alibi, quantized, q.dtype, block, part, chip.cores, turn)


class Work(NamedTuple):
    """The list of one key head's blocks; those of the other key heads follow in the same order."""

    row: Int[Array, " L"]
    block: Int[Array, " L"]
    first: Int[Array, " B"]
    """Item that a row begins with."""
    length: Int[Array, " B"]
    size: Int[Array, "2"]
    """Items of a key head, and of a core."""


def work_list(lengths: Int[Array, " B"], plan: Plan) -> Work:
    """A row of no key has one block all the same, which writes its zeros."""
    lengths = lengths.astype(jnp.int32)
    blocks = jnp.maximum(1, -(-jnp.clip(lengths, 0, plan.S) // plan.block))
    ends = jnp.cumsum(blocks)
    item = jnp.arange(plan.B * -(-plan.S // plan.block), dtype=jnp.int32)
    # A search would be a loop on a TPU; a comparison with every row is one pass.
    row = jnp.minimum((item[None] >= ends[:, None]).sum(axis=0), plan.B - 1).astype(jnp.int32)
    first = ends - blocks
    size = jnp.stack([ends[-1], -(-ends[-1] * plan.K // plan.cores)])
    return Work(row, item - first[row], first, lengths, size.astype(jnp.int32))


class Item(NamedTuple):
    row: Array
    head: Array
    block: Array
    out: Array
    """Where its row of results goes: those of a row that another core began go past the end."""


def item_of(plan: Plan, core: Array, i: Array, work: Work) -> Item:
    """Item i of a core; its last one for i past the end."""
    total, share = work.size[0], work.size[1]
    w = jnp.minimum(core * share + i, total * plan.K - 1)
    head = lax.div(w, total)
    local = w - head * total
    row = work.row[local]
    out = row * plan.K + head
    if plan.cores > 1:
        out = jnp.where(head * total + work.first[row] < core * share, plan.B * plan.K + core - 1, out)
    return Item(row, head, work.block[local], out)



def merge(
    out: Float[Array, "R M h"], lse: Float[Array, "R M"], work: Work, plan: Plan
) -> tuple[Float[Array, "r M h"], Float[Array, "r M"]]:
    """Results of each row of each key head: what later cores found of a row that an earlier one began is added."""
    rows = plan.B * plan.K
    for core in range(1, plan.cores):
        began = core * work.size[1]
        w = jnp.minimum(began, work.size[0] * plan.K - 1)
        head, local = lax.div(w, work.size[0]), lax.rem(w, work.size[0])
        row = work.row[local]
        at, shared = row * plan.K + head, (w == began) & (head * work.size[0] + work.first[row] < began)
        here, there = lse[at], jnp.where(shared, lse[rows + core - 1], -jnp.inf)
        both = jnp.logaddexp(here, there)
        weight = [jnp.where(x == -jnp.inf, 0, jnp.exp(x - both))[:, None] for x in (here, there)]
        # What was not written may be nan.
        other = jnp.where(weight[1] == 0, 0, weight[1] * out[rows + core - 1])
        out = out.at[at].set(weight[0] * out[at] + other)
        lse = lse.at[at].set(both)
    return out[:rows], lse[:rows]
