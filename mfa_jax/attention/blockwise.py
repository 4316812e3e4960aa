"""Causal attention in memory linear in the length: blocks of scores, online softmax, a backward pass that recomputes.

The method is FlashAttention's (Dao et al., arXiv 2205.14135, section 3.1; arXiv 2307.08691) in plain JAX. For a block
of queries, over the blocks of keys up to the causal bound, with scores `s`:

  m' = max(m, max s) · l' = l e^(m - m') + sum e^(s - m') · o' = o e^(m - m') + sum e^(s - m') v

and the result is `o / l`, its log-sum-exp `m + log l`. Only these two are kept. Backward, with `p = e^(s - lse)` and
`delta = do . o`:  dv = p^T do · ds = p (do v^T - delta) · dq = scale ds k · dk = scale ds^T q.

Scores stand transposed here, keys by queries `[s, M]` where `M` runs over the `G` heads of a key head and the `t`
queries of a block: so each large operand of a product already lies as the product reads it, and sums over the heads
that share a key are part of the product. Between the products they are `[s, G, t]`: who sees whom does not depend on
the head, and to find the query of one of `M` XLA's CPU compiler would divide, and take exponentials one by one.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

_HIDDEN = -1e30
"""Score of a key that is not seen; finite, since -inf - -inf is not a number."""
_FLOOR = -5e29
"""Where a running maximum starts: e^(_HIDDEN - _FLOOR) is exactly 0, so a block with no visible key adds nothing."""


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static: the scale, the true lengths T and S, the blocks t and s."""

    scale: float
    queries: int
    keys: int
    query_block: int
    key_block: int


class _Tokens(NamedTuple):
    """What decides who sees whom, None where it is not used; no gradient flows into any of it."""

    offset: Any
    """[B] int32"""
    query_segments: Any
    """[B, T] int32, padded like the queries"""
    key_segments: Any
    """[B, S] int32, padded like the keys"""
    slopes: Any
    """[K, G] float32"""


def blockwise_attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B K S H"], v: Float[Array, "B K S h"], *, scale: float,
    offset: Int[Array, " B"] | None = None, segments: Int[Array, "B T"] | None = None,
    key_segments: Int[Array, "B S"] | None = None, alibi_slopes: Float[Array, " N"] | None = None,
    query_block: int = 128, key_block: int = 128,
) -> Float[Array, "B T N h"]:
    """Attention as `core.attend` defines it, never holding more than a block of scores.

    Peak memory beside the arrays given and returned is `B N (query_block key_block)` scores in float32 a few times
    over, and for the gradient float32 copies of `k` and `v`. Lengths need not be multiples of the blocks. Slopes are
    not differentiated, and there is no second derivative. Where there are more keys than queries, `key_segments` are
    theirs.
    """
    B, T, N, H = q.shape
    K, S = k.shape[1:3]
    plan = _Plan(scale, T, S, min(query_block, T), min(key_block, S))
    tokens = _Tokens(
        jnp.zeros((B,), jnp.int32) if offset is None else offset,
        None if segments is None else _pad(segments, 1, plan.query_block),
        None if segments is None else _pad(segments if key_segments is None else key_segments, 1, plan.key_block),
        None if alibi_slopes is None else alibi_slopes.reshape(K, N // K),
    )
    grouped = _pad(q, 1, plan.query_block).reshape(B, -1, K, N // K, H)
    out = _attention(plan, grouped, _pad(k, 2, plan.key_block), _pad(v, 2, plan.key_block), tokens)
    return out[:, :T].reshape(B, T, N, v.shape[-1])


def _pad(x: Array, axis: int, multiple: int) -> Array:
    missing = -x.shape[axis] % multiple
    if not missing:
        return x
    return jnp.pad(x, [(0, missing if a == axis else 0) for a in range(x.ndim)])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    plan: _Plan, q: Float[Array, "B T K G H"], k: Float[Array, "B K S H"], v: Float[Array, "B K S h"], tokens: _Tokens
) -> Float[Array, "B T K G h"]:
    return _forward(plan, q, k, v, tokens)[0]


def _forward(plan: _Plan, q: Any, k: Any, v: Any, tokens: _Tokens) -> tuple[Array, tuple[Any, ...]]:
    B, _, K, G, _ = q.shape
    t, h = plan.query_block, v.shape[-1]

    def query_block(i: Array) -> tuple[Array, Array]:
        q_i = _queries(plan, q, i).swapaxes(2, 3)

        def key_step(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, out = carry
            k_j, v_j = _keys(plan, k, tokens, j), _keys(plan, v, tokens, j)
            scores = _scores(plan, q_i, k_j, tokens, i, j)
            new_top = jnp.maximum(top, scores.max(axis=2))
            kept = jnp.exp(top - new_top)
            p = jnp.exp(scores - new_top[:, :, None])
            product = jnp.einsum("BKsh,BKsM->BKhM", v_j, _flat(p.astype(v.dtype)), preferred_element_type=jnp.float32)
            return new_top, total * kept + p.sum(axis=2), out * kept[:, :, None] + product.reshape(out.shape)

        start = (jnp.full((B, K, G, t), _FLOOR), jnp.zeros((B, K, G, t)), jnp.zeros((B, K, h, G, t)))
        top, total, out = lax.fori_loop(0, _num_key_blocks(plan, tokens, i), key_step, start)
        total = jnp.where(total == 0, 1.0, total)  # Only queries that pad the last block see no key at all.
        out = (out / total[:, :, None]).transpose(0, 4, 1, 3, 2)
        return out.astype(q.dtype), _flat(top + jnp.log(total))

    out, lse = lax.map(query_block, jnp.arange(q.shape[1] // plan.query_block))
    # What has a name is kept by a layer that recomputes what is cheap: without it, it would keep parts of the loop.
    out, lse = checkpoint_name(_join(out), "attention"), checkpoint_name(lse, "attention")
    return out, (q, k, v, tokens, out, lse)


def _backward(plan: _Plan, saved: tuple[Any, ...], d_out: Array) -> tuple[Any, ...]:
    q, k, v, tokens, out, lse = saved
    B, _, K, G, H = q.shape

    def query_block(sums: tuple[Array, Array], block: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
        i, lse_i = block[0], block[1].reshape(B, K, G, -1)
        q_i, d_out_i, out_i = (_queries(plan, x, i) for x in (q, d_out, out))
        delta = jnp.einsum("BKMh,BKMh->BKM", d_out_i, out_i, preferred_element_type=jnp.float32).reshape(lse_i.shape)
        q_columns, d_out_columns = q_i.swapaxes(2, 3), d_out_i.swapaxes(2, 3)

        def key_step(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq, dk, dv = carry
            k_j, v_j = _keys(plan, k, tokens, j), _keys(plan, v, tokens, j)
            p = jnp.exp(_scores(plan, q_columns, k_j, tokens, i, j) - lse_i[:, :, None])
            dp = jnp.einsum("BKsh,BKhM->BKsM", v_j, d_out_columns, preferred_element_type=jnp.float32)
            ds = _flat((plan.scale * p * (dp.reshape(p.shape) - delta[:, :, None])).astype(k.dtype))
            dv = _add(dv, j, plan, jnp.einsum("BKsM,BKMh->BKsh", _flat(p.astype(d_out.dtype)), d_out_i,
                                              preferred_element_type=jnp.float32))
            dk = _add(dk, j, plan, jnp.einsum("BKsM,BKMH->BKsH", ds, q_i, preferred_element_type=jnp.float32))
            dq = dq + jnp.einsum("BKsH,BKsM->BKHM", k_j, ds, preferred_element_type=jnp.float32)
            return dq, dk, dv

        dq = jnp.zeros((B, K, H, G * plan.query_block))
        dq, dk, dv = lax.fori_loop(0, _num_key_blocks(plan, tokens, i), key_step, (dq, *sums))
        dq = dq.reshape(B, K, H, G, -1).transpose(0, 4, 1, 3, 2)
        return (dk, dv), dq.astype(q.dtype)

    zeros = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    (dk, dv), dq = lax.scan(query_block, zeros, (jnp.arange(lse.shape[0]), lse))
    return _join(dq), dk.astype(k.dtype), dv.astype(v.dtype), None


_attention.defvjp(_forward, _backward)


def _flat(x: Float[Array, "*rest G t"]) -> Float[Array, "*rest M"]:
    return x.reshape(*x.shape[:-2], -1)


def _queries(plan: _Plan, x: Float[Array, "B T K G H"], i: Array) -> Float[Array, "B K M H"]:
    """Block `i` of an array of queries, heads beside their key head."""
    block = lax.dynamic_slice_in_dim(x, i * plan.query_block, plan.query_block, axis=1)
    B, t, K, G, H = block.shape
    return block.transpose(0, 2, 3, 1, 4).reshape(B, K, G * t, H)


def _keys(plan: _Plan, x: Float[Array, "B K S H"], tokens: _Tokens, j: Array) -> Float[Array, "B K s H"]:
    """Block `j` of keys or values, zero past the last token: a cache may hold anything there, and 0 * nan is nan."""
    block = lax.dynamic_slice_in_dim(x, j * plan.key_block, plan.key_block, axis=2)
    index = j * plan.key_block + jnp.arange(plan.key_block)
    held = index < tokens.offset[:, None] + plan.queries
    return jnp.where(held[:, None, :, None], block, 0)


def _scores(
    plan: _Plan, q_i: Float[Array, "B K H M"], k_j: Float[Array, "B K s H"], tokens: _Tokens, i: Array, j: Array
) -> Float[Array, "B K s G t"]:
    """Scaled, biased scores of block `j` of keys under block `i` of queries, `_HIDDEN` where a key is not seen."""
    scores = plan.scale * jnp.einsum("BKsH,BKHM->BKsM", k_j, q_i, preferred_element_type=jnp.float32)
    B, K, s, M = scores.shape
    t = plan.query_block
    scores = scores.reshape(B, K, s, M // t, t)
    key = j * s + jnp.arange(s)
    query = tokens.offset[:, None] + i * t + jnp.arange(t)
    distance = query[:, None, :] - key[:, None]
    if tokens.slopes is not None:
        scores = scores - tokens.slopes[:, None, :, None] * distance[:, None, :, None, :]
    seen = (distance >= 0) & (key < plan.keys)[:, None]
    if tokens.query_segments is not None:
        query_ids = lax.dynamic_slice_in_dim(tokens.query_segments, i * t, t, axis=1)
        key_ids = lax.dynamic_slice_in_dim(tokens.key_segments, j * s, s, axis=1)
        seen &= key_ids[:, :, None] == query_ids[:, None, :]
    return jnp.where(seen[:, None, :, None, :], scores, _HIDDEN)


def _num_key_blocks(plan: _Plan, tokens: _Tokens, i: Array) -> Array:
    """How many blocks of keys some query of block `i` can see."""
    end = tokens.offset.max() + jnp.minimum((i + 1) * plan.query_block, plan.queries)
    return -(-jnp.minimum(end, plan.keys) // plan.key_block)


def _join(blocks: Float[Array, "n B t K G H"]) -> Float[Array, "B T K G H"]:
    n, B, t, *rest = blocks.shape
    return blocks.swapaxes(0, 1).reshape(B, n * t, *rest)


def _add(total: Float[Array, "B K S H"], j: Array, plan: _Plan, block: Float[Array, "B K s H"]) -> Array:
    start = j * plan.key_block
    old = lax.dynamic_slice_in_dim(total, start, plan.key_block, axis=2)
    return lax.dynamic_update_slice_in_dim(total, old + block, start, axis=2)
