"""The second kernel of the GPU backend: merges what several shares found of a row, always in the same order."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from mfa_jax.kernels.gpu_memory import load, store
from mfa_jax.kernels.gpu_plan import TILE, Plan, Work, continued, span
from mfa_jax.kernels.gpu_roles import FLOOR, LSE_COLUMNS, over_columns

_FEW = 32
"""Tiles of results up to which each goes to blocks of threads of `_NARROW` columns: a row may have as many parts as
there are shares then. Above, `_WIDE` columns: so many narrow blocks would queue for the SMs."""
_NARROW, _WIDE = (8, 16), (64, 4)
"""Columns of a block of threads, and parts that it reads at once: each read takes a microsecond."""


def merge(
    plan: Plan, work: Work, out: Float[Array, "P M h"], lse: Float[Array, "P M L"], dtype: Any, interpret: Any
) -> tuple[Float[Array, "R M h"], Float[Array, "R M L"]]:
    """Averages, in `dtype`, and log-sum-exps of each row of each key head."""
    rows, tiles = plan.B * plan.K, plan.M // TILE
    width, ahead = _NARROW if rows * tiles <= _FEW else _WIDE
    results = (jax.ShapeDtypeStruct((rows, *out.shape[1:]), dtype),
               jax.ShapeDtypeStruct((rows, *lse.shape[1:]), jnp.float32))
    options = {"interpret": interpret} if interpret else {}

    def body(*refs: Any) -> None:
        merge_block(plan, Work(*refs[:len(Work._fields)]), width, ahead, *refs[len(Work._fields):])

    program = plgpu.kernel(
        body, out_type=results, grid=(tiles, plan.h // width, rows),
        grid_names=("tile", "column", "segment"), num_threads=1, thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True), kernel_name="decode_attention_merge", **options)
    out, lse = program(*work, out, lse)
    return out, lse


def merge_block(
    plan: Plan, work: Work, width: int, ahead: int, out: Any, lse: Any, merged: Any, merged_lse: Any
) -> None:
    """A tile of queries and so many value columns."""
    s, tile, column = (lax.axis_index(name) for name in ("segment", "tile", "column"))
    row, head, start, stop = span(plan, work, s)
    rows, columns = pl.ds(tile * TILE, TILE), pl.ds(column * width, width)
    own = row * plan.K + head
    # Share c is at place `B K + c - 1`.
    first, last = continued(plan, work, start, stop)

    def read(place: Any) -> tuple[Any, Any]:
        tiles = lse.at[place, rows], out.at[place, rows, columns]
        found, sums = (load(x, layout=plgpu.Layout.WGMMA, optimized=False) for x in tiles)
        # The same number in every column.
        return found.max(axis=1), sums

    def add(carry: Any, found: Any, sums: Any) -> Any:
        top, total, merged_sums = carry
        above = jnp.maximum(top, found)
        kept, weight = jnp.exp(top - above), jnp.exp(found - above)
        return above, total * kept + weight, merged_sums * over_columns(kept, sums) + sums * over_columns(weight, sums)

    def step(j: Any, carry: Any) -> Any:
        at = first + j * ahead
        # A place past the last is not read, it may hold anything: the row's own, without weight.
        places = [jnp.where(at + n < last, plan.B * plan.K + at + n - 1, own) for n in range(ahead)]
        for n, (found, sums) in enumerate([read(place) for place in places]):
            carry = add(carry, found + jnp.where(at + n < last, 0.0, -jnp.inf), sums)
        return carry

    found, sums = read(own)
    carry = add((jnp.full_like(found, FLOOR), jnp.zeros_like(found), jnp.zeros_like(sums)), found, sums)
    steps = (jnp.maximum(last - first, 0) + (ahead - 1)) // ahead
    top, total, sums = lax.fori_loop(0, steps, step, carry)
    none = total == 0
    total = jnp.where(none, 1.0, total)
    store(merged.at[own, rows, columns], (sums * over_columns(1 / total, sums)).astype(merged.dtype))

    @pl.when(column == 0)
    def _() -> None:
        found = jnp.where(none, -jnp.inf, top + jnp.log(total))
        store(merged_lse.at[own, rows], lax.broadcast_in_dim(found, (TILE, LSE_COLUMNS), [0]))
