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
from mfa_jax.kernels.gpu_roles import FLOOR, LSE_COLUMNS

_AHEAD = 16
"""Results that are read at once: a row may have as many as there are shares, and each read takes a microsecond."""


def merge(
    plan: Plan, work: Work, out: Float[Array, "P M h"], lse: Float[Array, "P M L"], interpret: Any
) -> tuple[Float[Array, "R M h"], Float[Array, "R M L"]]:
    """Averages and log-sum-exps of each row of each key head."""
    rows = plan.B * plan.K
    results = tuple(jax.ShapeDtypeStruct((rows, *x.shape[1:]), jnp.float32) for x in (out, lse))
    options = {"interpret": interpret} if interpret else {}

    def body(*refs: Any) -> None:
        merge_block(plan, Work(*refs[:len(Work._fields)]), *refs[len(Work._fields):])

    program = plgpu.kernel(
        body, out_type=results, grid=(plan.M // TILE, plan.h // LSE_COLUMNS, rows),
        grid_names=("tile", "column", "segment"), num_threads=1, thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True), kernel_name="decode_attention_merge", **options)
    out, lse = program(*work, out, lse)
    return out, lse


def merge_block(plan: Plan, work: Work, out: Any, lse: Any, merged: Any, merged_lse: Any) -> None:
    """A tile of queries and as many value columns as the log-sum-exp is stored in."""
    s, tile, column = (lax.axis_index(name) for name in ("segment", "tile", "column"))
    row, head, start, stop = span(plan, work, s)
    rows, columns = pl.ds(tile * TILE, TILE), pl.ds(column * LSE_COLUMNS, LSE_COLUMNS)
    own = row * plan.K + head
    # Share c is at place `B K + c - 1`.
    first, last = continued(plan, work, start, stop)

    def read(place: Any) -> tuple[Any, Any]:
        tiles = lse.at[place, rows], out.at[place, rows, columns]
        found, sums = (load(x, layout=plgpu.Layout.WGMMA, optimized=False) for x in tiles)
        return found, sums

    def add(carry: Any, found: Any, sums: Any) -> Any:
        top, total, merged_sums = carry
        above = jnp.maximum(top, found)
        kept, weight = jnp.exp(top - above), jnp.exp(found - above)
        return above, total * kept + weight, merged_sums * kept + sums * weight

    def step(j: Any, carry: Any) -> Any:
        at = first + j * _AHEAD
        # A place past the last is not read, it may hold anything: the row's own, without weight.
        places = [jnp.where(at + n < last, plan.B * plan.K + at + n - 1, own) for n in range(_AHEAD)]
        for n, (found, sums) in enumerate([read(place) for place in places]):
            carry = add(carry, found + jnp.where(at + n < last, 0.0, -jnp.inf), sums)
        return carry

    found, sums = read(own)
    zeros = jnp.zeros_like(sums)
    carry = add((jnp.full_like(found, FLOOR), zeros, zeros), found, sums)
    steps = (jnp.maximum(last - first, 0) + (_AHEAD - 1)) // _AHEAD
    top, total, sums = lax.fori_loop(0, steps, step, carry)
    none = total == 0
    total = jnp.where(none, 1.0, total)
    store(merged.at[own, rows, columns], sums / total)

    @pl.when(column == 0)
    def _() -> None:
        store(merged_lse.at[own, rows], jnp.where(none, -jnp.inf, top + jnp.log(total)))
