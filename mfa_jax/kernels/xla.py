"""The portable decode kernel: plain JAX, an online softmax over blocks, in a loop that ends at the longest length.

A step takes time for what is valid, not for what is allocated: rows of 512 tokens in a cache of 8192 cost what they
cost in a cache of 512. On CPUs narrow floats are read as integers for that (`words`). Where keys are stored before
rope, block `j0` uses `R(i) q . R(j) k = (R(-j0) R(i) q) . (R(j - j0) k)`: the query is turned back by the start of the
block, and keys by their offset in it, from one table.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Num

from mfa_jax.kernels.calls import kept_as_words
from mfa_jax.words import as_words, from_words

_HIDDEN = -1e30
"""Score of a key that is not seen; finite, since -inf - -inf is not a number."""
_FLOOR = -5e29
"""Where a running maximum starts: e^(_HIDDEN - _FLOOR) is exactly 0, so a block with no visible key adds nothing."""


class _Carry(NamedTuple):
    top: Float[Array, "B M"]
    total: Float[Array, "B M"]
    out: Float[Array, "B M h"]


def decode_attention(
    q: Float[Array, "B T N H"], k: Num[Array, "B S H"], v: Num[Array, "B S h"] | None, lengths: Int[Array, " B"], *,
    scale: float, inv_freq: Float[Array, " W"] | None, alibi_slopes: Float[Array, " N"] | None,
    k_scale: Float[Array, "B S"] | None, v_scale: Float[Array, "B S"] | None, value_width: int | None, block: int = 256,
) -> tuple[Float[Array, "B T N h"], Float[Array, "B T N"]]:
    """`kernels.decode_attention` on any platform; products take the type of `q`, sums and softmax are float32."""
    B, T, N, H = q.shape
    S, M = k.shape[1], T * N
    block = min(block, S)
    h = v.shape[-1] if v is not None else value_width or H
    query = (lengths[:, None] - T + jnp.arange(T)).repeat(N, axis=1)
    slopes = None if alibi_slopes is None else jnp.tile(alibi_slopes, T)
    rows = q.reshape(B, M, H)
    product = _product(q.dtype)
    dtype, look = k.dtype, as_words if kept_as_words() else lambda x: x
    k, v = look(k), None if v is None else look(v)
    rope = None if inv_freq is None else (inv_freq, _table(jnp.arange(block), inv_freq))

    def step(j: Array, carry: _Carry) -> _Carry:
        # The last block starts early enough to end at S; what the one before has seen counts once.
        start = jnp.minimum(j * block, S - block)
        key = start + jnp.arange(block)
        stored, k_scale_j = _block(k, start, block), _block(k_scale, start, block)
        held = (key < lengths[:, None])[:, :, None]
        stored = jnp.where(held, from_words(stored, dtype), jnp.zeros((), dtype)).astype(q.dtype)
        queries, turned = rows, stored
        if rope is not None:
            frequencies, table = rope
            queries = _rotate(rows, _table(-start[None], frequencies), q.dtype)
            turned = _rotate(stored, table, q.dtype)
        # k q^T reads the keys as they lie, where q k^T would rearrange them first.
        scores = scale * product("BSH,BMH->BSM", turned, queries).swapaxes(1, 2)
        if k_scale_j is not None:
            scores = scores * k_scale_j[:, None]
        if slopes is not None:
            scores = scores - slopes[:, None] * (query[:, :, None] - key)
        seen = (key <= query[:, :, None]) & (key >= j * block)
        scores = jnp.where(seen, scores, _HIDDEN)
        top = jnp.maximum(carry.top, scores.max(axis=2))
        kept, p = jnp.exp(carry.top - top), jnp.exp(scores - top[:, :, None])
        total = carry.total * kept + p.sum(axis=2)
        if v is None:
            values, value_scale = stored[:, :, :h], k_scale_j
        else:
            values = from_words(_block(v, start, block), dtype)
            values = jnp.where(held, values, jnp.zeros((), dtype)).astype(q.dtype)
            value_scale = _block(v_scale, start, block)
        if value_scale is not None:
            # What is not seen has weight zero, but its scale may be anything.
            p = jnp.where(seen, p * value_scale[:, None], 0)
        average = product("BMS,BSh->BMh", p.astype(q.dtype), values)
        return _Carry(top, total, carry.out * kept[:, :, None] + average)

    start = _Carry(jnp.full((B, M), _FLOOR), jnp.zeros((B, M)), jnp.zeros((B, M, h)))
    blocks = -(-jnp.minimum(lengths.max(), S) // block)
    top, total, out = lax.fori_loop(0, blocks, step, start)
    none = total == 0
    out = out / jnp.where(none, 1, total)[:, :, None]
    lse = jnp.where(none, -jnp.inf, top + jnp.log(jnp.where(none, 1, total)))
    return out.reshape(B, T, N, h), lse.reshape(B, T, N)


def _product(dtype: Any) -> Any:
    """Unasked, of float32 a Hopper GPU takes 10 bits, and a TPU those of bfloat16."""
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision=precision)


def _block(x: Any, start: Array, size: int) -> Any:
    return None if x is None else lax.dynamic_slice_in_dim(x, start, size, axis=1)


def _table(position: Int[Array, " P"], inv_freq: Float[Array, " W"]) -> tuple[Float[Array, "P W"], Float[Array, "P W"]]:
    angle = position[:, None].astype(jnp.float32) * inv_freq
    return jnp.cos(angle), jnp.sin(angle)


def _rotate(
    x: Float[Array, "B P H"], table: tuple[Float[Array, "R W"], Float[Array, "R W"]], dtype: Any
) -> Float[Array, "B P H"]:
    cos, sin = table
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(dtype)
