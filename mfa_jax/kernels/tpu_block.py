"""What the TPU kernel computes of a block that lies in VMEM: scores, softmax, average, and the turn of its keys.

Statistics are kept in base 2, repeated over the 128 lanes: to broadcast one lane costs a seventh of a step.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Num

from mfa_jax.kernels.tpu_plan import LANES, Plan

_HIDDEN, FLOOR = -1e30, -5e29
"""As in `xla`: 2^(_HIDDEN - FLOOR) is exactly 0."""
_QK = (((1,), (1,)), ((), ()))
_PV = (((1,), (0,)), ((), ()))


def attend(plan: Plan, refs: dict[str, Any], slot: Array, start: Array, length: Array) -> None:
    """Adds a block to the running softmax: whole, or only the parts that hold a valid key."""
    every_query_sees_all = start + plan.block <= jnp.minimum(length - plan.T + 1, plan.S)

    @pl.when(every_query_sees_all)
    def _() -> None:
        attend_whole(plan, refs, slot, start, length)

    @pl.when(~every_query_sees_all)
    def _() -> None:
        _attend_end(plan, refs, slot, start, length)


def attend_whole(plan: Plan, refs: dict[str, Any], slot: Any, start: Any, length: Any) -> None:
    """A block that every query sees all of: no masks, and a part's scores come before the softmax of the one before."""
    queries = _queries(plan, refs)
    state = refs["top"][...], refs["total"][...], refs["sum"][...]
    parts = plan.block // plan.part
    found = _scores(plan, refs, queries, slot, 0)
    for part in range(parts):
        now, found = found, _scores(plan, refs, queries, slot, part + 1) if part + 1 < parts else found
        state = _step(plan, refs, now, state, start + part * plan.part, length, masked=False)
    refs["top"][...], refs["total"][...], refs["sum"][...] = state


def _attend_end(plan: Plan, refs: dict[str, Any], slot: Array, start: Array, length: Array) -> None:
    queries = _queries(plan, refs)

    def step(part: Array, carry: None) -> None:
        state = refs["top"][...], refs["total"][...], refs["sum"][...]
        found = _scores(plan, refs, queries, slot, part)
        state = _step(plan, refs, found, state, start + part * plan.part, length, masked=True)
        refs["top"][...], refs["total"][...], refs["sum"][...] = state

    held = jnp.clip(length, 0, plan.S) - start
    lax.fori_loop(0, lax.div(jnp.minimum(held, plan.block) + plan.part - 1, plan.part), step, None)


def _queries(plan: Plan, refs: dict[str, Any]) -> Array:
    queries = refs["q"][...]
    if plan.rope:
        queries = _turn(queries, refs["origin_cos"][...], -refs["origin_sin"][...]).astype(plan.dtype)
    return queries


def _scores(plan: Plan, refs: dict[str, Any], queries: Array, slot: Any, part: Any) -> tuple[Array, Array, Any, Any]:
    """Scores of one part of a block, its values, and the scales of both where they are int8."""
    keys = pl.ds(part * plan.part, plan.part)
    stored = refs["k_slots"][slot, keys].astype(plan.dtype)
    turned = stored
    if plan.rope:
        turned = _turn(refs["k_slots"][slot, keys].astype(plan.turn), refs["cos"][keys], refs["sin"][keys])
        turned = turned.astype(plan.dtype)
    s = _product(queries, turned, _QK)
    values = stored[:, : plan.h] if plan.shared else refs["v_slots"][slot, keys].astype(plan.dtype)
    if not plan.quantized:
        return s, values, None, None
    k_scale = refs["k_scale_slots"][slot, :, keys]
    return s, values, k_scale, k_scale if plan.shared else refs["v_scale_slots"][slot, :, keys]


def _step(
    plan: Plan, refs: dict[str, Any], found: Any, state: Any, start: Array, length: Array, *, masked: bool
) -> Any:
    """One part of a block: `found` of its scores and values, into the running maximum, total and sum."""
    s, values, k_scale, v_scale = found
    top, total, out = state
    key = start + lax.broadcasted_iota(jnp.int32, (1, plan.part), 1)
    query = length - plan.T if plan.T == 1 else length - plan.T + _lanes(refs["draft"][...], plan.part)
    if k_scale is not None:
        s = s * k_scale
    if plan.alibi:
        s = s - _lanes(refs["slopes"][...], plan.part) * (query - key).astype(jnp.float32)
    if masked:
        seen = (key <= query) & (key < plan.S)
        s = jnp.where(seen, s, _HIDDEN)
        at = start + lax.broadcasted_iota(jnp.int32, values.shape, 0)
        values = jnp.where(at < jnp.minimum(length, plan.S), values.astype(jnp.float32), 0).astype(plan.dtype)
    above = jnp.maximum(top, jnp.broadcast_to(s.max(axis=1, keepdims=True), top.shape))
    kept, p = jnp.exp2(top - above), jnp.exp2(s - _lanes(above, plan.part))
    total = total * kept + functools.reduce(jnp.add, jnp.split(p, plan.part // LANES, axis=1))
    if v_scale is not None:
        p = p * v_scale
        if masked:
            p = jnp.where(seen, p, 0)
    return above, total, out * _lanes(kept, plan.h) + _product(p.astype(plan.dtype), values, _PV)


def _product(a: Array, b: Array, axes: Any) -> Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


def _lanes(x: Num[Array, "M L"], width: int) -> Num[Array, "M w"]:
    """A number that is repeated over 128 lanes, over `width` of them."""
    return jnp.concatenate([x] * -(-width // LANES), axis=1)[:, :width] if width != LANES else x


def _turn(x: Float[Array, "P H"], cos: Float[Array, "#P W"], sin: Float[Array, "#P W"]) -> Float[Array, "P H"]:
    first, second = x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1)


def fill_table(refs: dict[str, Any]) -> None:
    """`cos(a + d) = cos a cos d - sin a sin d`, and so the sine: offsets of a block from two short tables."""
    fine = refs["fine_cos"].shape[0]

    def fill(j: Array, carry: None) -> None:
        rows = pl.ds(pl.multiple_of(j * fine, fine), fine)
        cos, sin = refs["coarse_cos"][pl.ds(j, 1)], refs["coarse_sin"][pl.ds(j, 1)]
        turns = {"cos": cos * refs["fine_cos"][...] - sin * refs["fine_sin"][...],
                 "sin": sin * refs["fine_cos"][...] + cos * refs["fine_sin"][...]}
        for name, table in turns.items():
            refs[name][rows] = table.astype(refs[name].dtype)

    lax.fori_loop(0, refs["coarse_cos"].shape[0], fill, None)
