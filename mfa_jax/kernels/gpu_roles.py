"""What each warpgroup of the GPU kernel does with a segment: fetch, prepare, score, average.

Each counts items over all segments with the same i, and they meet at the rings of `gpu_memory`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mfa_jax.kernels.gpu_memory import COLUMNS, Ring, key_ring, load, store, swizzle, value_ring
from mfa_jax.kernels.gpu_plan import BLOCK, OFFSETS, PART, TILE, Plan, Segment, start_of

LOG2E = math.log2(math.e)
_HIDDEN = -1e30
"""Score of a key that is not seen; finite, since -inf - -inf is not a number."""
FLOOR = -5e29
"""Where a running maximum starts: 2^(_HIDDEN - FLOOR) is exactly 0, so a block with no visible key adds nothing."""
_LAYOUT = plgpu.Layout.WGMMA
LSE_COLUMNS = 8
"""A number a row is stored so often: the narrowest matrix that registers hold."""


def fetch(plan: Plan, refs: dict[str, Any], rings: dict[str, Ring], segment: Segment, i: Any) -> Any:
    """Copies a segment's blocks into the rings as places come free."""
    def step(j: Any, i: Any) -> Any:
        block = segment.block + j
        keys = (segment.row, segment.head, pl.ds(start_of(plan, block), BLOCK))
        for name, sources in (("k", ("k",)), ("v", ("v",)), ("scales", ("k_scale", "v_scale"))):
            if name not in rings:
                continue
            rings[name].claim(i)
            for source in sources:
                if source in refs:
                    rings[name].copy(refs[source].at[keys], refs[f"{source}_ring"], i)
            if name == "k" and plan.rope:
                for source in ("origin_cos", "origin_sin"):
                    rings[name].copy(refs[source].at[block], refs[f"{source}_ring"], i)
        return i + 1

    return lax.fori_loop(0, segment.count, step, i)


def prepare(plan: Plan, refs: dict[str, Any], rings: dict[str, Ring], segment: Segment, i: Any) -> Any:
    """Turns and widens a segment's blocks."""
    def step(_: Any, i: Any) -> Any:
        prepare_block(plan, refs, rings, i)
        return i + 1

    return lax.fori_loop(0, segment.count, step, i)


def prepare_block(plan: Plan, refs: dict[str, Any], rings: dict[str, Ring], i: Any) -> None:
    """Turns the keys of item i by their positions, and widens keys and values that are narrow."""
    stored, keys = rings["k"], rings["keys"]
    slot = stored.wait(i)
    tile = stored.tiles.at[slot]
    _write(keys, i, _turned(plan, refs, tile, slot) if plan.rope else _widened(tile))
    if "values" in rings:
        source = stored if plan.shared else rings["v"]
        _write(rings["values"], i, _widened(tile if plan.shared else source.tiles.at[source.wait(i)]))
        if not plan.shared:
            source.release(i)
    stored.release(i)


def _write(ring: Ring, i: Any, pieces: Iterator[tuple[int, int, Any]]) -> None:
    """Writes pieces (first row and column, elements) as they are computed; the first is, before the place is waited
    for."""
    first = next(pieces)
    tile = ring.tiles.at[ring.claim(i)]
    for row, column, x in itertools.chain([first], pieces):
        tile[pl.ds(row, x.shape[0]), pl.ds(column, x.shape[1])] = x
    ring.put(i)


def _by_rows(rows: int, width: int) -> Any:
    """Each thread has 8 columns of a row: 16 bytes of bfloat16, and 8 of what is stored in 8 bits, in one access."""
    return plgpu.Layout.SMEM_GMEM_COPY((rows, width), jnp.bfloat16, swizzle(width, jnp.bfloat16))


def _wide(tile: Any, at: int, width: int) -> Any:
    """Columns of a tile; 8 bits become bfloat16, exactly: all of int8 and float8_e4m3fn are among its numbers."""
    x = load(tile.at[:, pl.ds(at, width)], layout=_by_rows(tile.shape[0], width))
    if x.dtype == jnp.float8_e4m3fn:
        x = x.astype(jnp.float16).astype(jnp.float32)  # the only way that Hopper has
    return x.astype(jnp.bfloat16) if x.dtype != jnp.float16 else x


def _float32(tile: Any, at: int, width: int) -> Any:
    return _wide(tile, at, width).astype(jnp.float32)


def _widened(tile: Any) -> Iterator[tuple[int, int, Any]]:
    """In as few pieces as fit the registers: all four warps wait for each other before and after each is written."""
    width = tile.shape[1]
    step = max(w for w in range(COLUMNS, PART + 1, COLUMNS) if width % w == 0)
    for at in range(0, width, step):
        yield 0, at, _wide(tile, at, step)


def _turned(plan: Plan, refs: dict[str, Any], tile: Any, slot: Any) -> Iterator[tuple[int, int, Any]]:
    """By R(origin) R(offset): the first is a row for some keys of a block, the second a table that stays."""
    half = plan.H // 2
    for part in range(BLOCK // OFFSETS):
        keys = tile.at[pl.ds(part * OFFSETS, OFFSETS)]
        cos, sin = (_float32(refs[f"offset_{x}_tile"], 0, half) for x in ("cos", "sin"))
        cos_0, sin_0 = (_origins(refs[f"origin_{x}_ring"].at[slot, part], cos) for x in ("cos", "sin"))
        cos, sin = cos * cos_0 - sin * sin_0, sin * cos_0 + cos * sin_0
        first, second = _float32(keys, 0, half), _float32(keys, half, half)
        yield part * OFFSETS, 0, (first * cos - second * sin).astype(jnp.bfloat16)
        yield part * OFFSETS, half, (second * cos + first * sin).astype(jnp.bfloat16)


def score(plan: Plan, refs: dict[str, Any], rings: dict[str, Ring], segment: Segment, i: Any) -> Any:
    """Scores and softmax of a tile of queries: weights of each block for those who average, and the log-sum-exp."""
    rows = pl.ds(segment.tile * TILE, TILE)
    plgpu.copy_gmem_to_smem(refs["q"].at[segment.row, segment.head, rows], refs["q_tile"], refs["q_full"])
    slopes = None
    if plan.alibi:
        plgpu.copy_gmem_to_smem(refs["slopes"].at[segment.head, rows], refs["slopes_tile"], refs["slopes_full"])
        plgpu.barrier_wait(refs["slopes_full"])
        slopes = load(refs["slopes_tile"], layout=_LAYOUT.reduce(1))
    plgpu.barrier_wait(refs["q_full"])
    weights = rings["weights"]

    def step(j: Any, carry: Any) -> Any:
        top, total, i = carry
        s, seen, v_scale = _scores(plan, refs, rings, segment, j, i, slopes)
        above = jnp.maximum(top, s.max(axis=1))
        kept, p = jnp.exp2(top - above), jnp.exp2(s - over_columns(above, s))
        total = total * kept + p.sum(axis=1)
        if v_scale is not None:
            # What is not seen has weight zero, but its scale may be anything.
            p = jnp.where(seen, p * v_scale, 0.0)
        weights.claim(i)
        refs["weights_tile"][...] = p.astype(jnp.bfloat16)
        refs["kept"][...] = kept
        weights.put(i)
        return above, total, i + 1

    start = tuple(plgpu.layout_cast(jnp.full((TILE,), x, jnp.float32), _LAYOUT.reduce(1)) for x in (FLOOR, 0.0))
    top, total, i = lax.fori_loop(0, segment.count, step, (*start, i))
    none = total == 0
    total = jnp.where(none, 1.0, total)
    # Once more, without weights: what the sums are divided by.
    weights.claim(i)
    refs["kept"][...] = 1 / total
    weights.put(i)
    lse = jnp.where(none, -jnp.inf, (top + jnp.log2(total)) / LOG2E)
    store(refs["lse"].at[segment.out, rows], lax.broadcast_in_dim(lse, (TILE, LSE_COLUMNS), [0]))
    return i


def _scores(
    plan: Plan, refs: dict[str, Any], rings: dict[str, Ring], segment: Segment, j: Any, i: Any, slopes: Any
) -> tuple[Any, Any, Any]:
    """Scores of a block, in powers of two; what of it is seen; and the scales of its values."""
    keys, values = key_ring(plan, rings), value_ring(plan, rings)
    if plan.scorer_prepares:
        prepare_block(plan, refs, rings, i)
    slot = keys.wait(i)
    s = _products(plan, refs["q_tile"], keys.tiles.at[slot]) * (plan.scale * LOG2E)
    block = segment.block + j
    start = start_of(plan, block)
    if values is not keys:
        keys.release(i)
        slot = values.wait(i)
    if plan.cache_dtype != jnp.int8:
        _clear_garbage(values.tiles.at[slot, :, pl.ds(0, plan.h)], segment.length - start)
    if values is keys:
        keys.release(i)
    v_scale = None
    if plan.narrow:
        at = rings["scales"].wait(i)
        k_scale = _columns(refs["k_scale_ring"].at[at], s)
        v_scale = k_scale if plan.shared else _columns(refs["v_scale_ring"].at[at], s)
        rings["scales"].release(i)
        s = s * k_scale
    key = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=_LAYOUT) + start
    query = segment.length - plan.T + _draft(plan, segment.tile)
    if slopes is not None:
        s = s - over_columns(slopes, s) * (query - key).astype(jnp.float32)
    seen = (key <= query) & (key >= block * BLOCK)
    return jnp.where(seen, s, _HIDDEN), seen, v_scale


def _products(plan: Plan, queries: Any, keys: Any) -> Any:
    """`queries keys^T`, in parts where keys are wide: the addresses of all parts would not fit the registers."""
    width = max(w for w in range(COLUMNS, PART + 1, COLUMNS) if plan.H % w == 0)

    def product(sums: Any) -> Any:
        @pl.loop(0, plan.H // width)
        def _(c: Any) -> None:
            columns = pl.ds(pl.multiple_of(c * width, width), width)
            plgpu.wgmma(sums, queries.at[:, columns], keys.at[:, columns].transpose((1, 0)))

        return sums[...]

    return pl.run_scoped(product, plgpu.ACC((TILE, BLOCK), jnp.float32))


def average(
    plan: Plan, refs: dict[str, Any], rings: dict[str, Ring], segment: Segment, i: Any, *, part: tuple[int, int],
    accumulate: Callable[[Any, Any, Any], Any],
) -> Any:
    """Averages of one part of the value columns; `accumulate` gives `sums + weights values`."""
    values, weights = value_ring(plan, rings), rings["weights"]
    # Two products of 128 columns: one of 256 needs more registers than ptxas grants a kernel of four warpgroups.
    widths = [(at, min(128, sum(part) - at)) for at in range(part[0], sum(part), 128)]
    columns = [pl.ds(*x) for x in widths]

    def scaled(sums: tuple[Any, ...]) -> tuple[Any, ...]:
        kept = load(refs["kept"], layout=_LAYOUT.reduce(1))
        return tuple(x * over_columns(kept, x) for x in sums)

    def step(j: Any, carry: Any) -> Any:
        sums, i = carry
        stored = values.tiles.at[values.wait(i)]
        weights.wait(i)
        sums = accumulate(scaled(sums), refs["weights_tile"], [stored.at[:, at] for at in columns])
        weights.release(i)
        values.release(i)
        return sums, i + 1

    start = tuple(plgpu.layout_cast(jnp.full((TILE, width), 0, jnp.float32), _LAYOUT) for _, width in widths)
    sums, i = lax.fori_loop(0, segment.count, step, (start, i))
    weights.wait(i)
    sums = scaled(sums)
    weights.release(i)
    for x, at in zip(sums, columns, strict=True):
        store(refs["out"].at[segment.out, pl.ds(segment.tile * TILE, TILE), at], x)
    return i


def _clear_garbage(columns: Any, held: Any) -> None:
    """Zeros past the `held` first rows of a tile: what is not valid may be nan, and 0 * nan is nan."""
    @pl.when(held < BLOCK)
    def _() -> None:
        for at in range(0, columns.shape[1], COLUMNS):
            chunk = columns.at[:, pl.ds(at, COLUMNS)]
            x = load(chunk, layout=_LAYOUT)
            row = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=_LAYOUT)
            chunk[...] = jnp.where(row < held, x, jnp.zeros_like(x))
        plgpu.commit_smem()


def _draft(plan: Plan, tile: Any) -> Any:
    """Which of the drafted tokens a row of the tile is, `[TILE, BLOCK]`; 0 where there is one."""
    if plan.T == 1:
        return 0
    row = plgpu.broadcasted_iota(jnp.int32, (TILE, BLOCK), 0, layout=_LAYOUT) + tile * TILE
    return lax.rem(row, jnp.full_like(row, plan.T))


def over_columns(x: Any, like: Any) -> Any:
    """A number a row, over the columns of `like`."""
    return lax.broadcast_in_dim(x, like.shape, [0])


def _origins(ref: Any, like: Any) -> Any:
    """A number a column, over the rows of `like`; eight for a thread, so it can't be one access."""
    layout = _by_rows(*like.shape)
    x = load(ref, layout=layout.reduce(0), optimized=False)
    return plgpu.layout_cast(lax.broadcast_in_dim(x, like.shape, [1]), layout)


def _columns(ref: Any, like: Any) -> Any:
    """A number a column, over the rows of `like`."""
    return lax.broadcast_in_dim(load(ref, layout=_LAYOUT.reduce(0)), like.shape, [1])
