"""Attention over a cache: append, then a decode kernel for few new tokens or `core.attend` for many."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from mfa_jax.attention.core import attend
from mfa_jax.cache import Cache
from mfa_jax.kernels import MAX_QUERIES, kept_as_words, sharded
from mfa_jax.positions import rope_table, rotate

C = TypeVar("C", bound=Cache)


@dataclasses.dataclass(frozen=True)
class Serving:
    """What serves attention over a cache, by name."""

    decode: str = "auto"
    """For at most `kernels.MAX_QUERIES` tokens; `kernels.resolve` says what `auto` takes."""
    prefill: str = "auto"
    """For more; `core.resolve` says what `auto` takes."""
    layout: str = "auto"
    """Of the cache on a mesh; `kernels.sharded.choose` says what `auto` takes."""


def cached_attention(
    q: Float[Array, "B T N H"], cache: C, new: tuple[Float[Array, "..."], ...], *, scale: float, serving: Serving,
    inv_freq: Float[Array, " W"] | None = None, alibi_slopes: Float[Array, " N"] | None = None,
    value_width: int | None = None, segments: Any = None,
) -> tuple[Float[Array, "B T N h"], C]:
    """Appends the new tokens, then `o_n = sum_j softmax_j(scale q_n . R(j) k_j - slope_n (i - j)) v_j` over the keys j
    that query i sees: the result and the new cache.

    Query t of row b stands at `i = cache.length[b] + t` and sees `j <= i`. A row past the end of its cache sees all of
    it under `jit`; outside `jit`, where its length is known, it is refused. Where a mesh is set, the cache lies on it
    as `kernels.sharded.choose` says, before and after.

    Args:
      new: the tokens' entry of each stream, `[B, *K, T, W]`. Where the cache has one stream, keys serve as values: as
        they are stored, their first `value_width` elements.
      inv_freq: frequencies of keys that are stored before rope; the queries are rotated already. None where no turn is
        due.
      segments: must be None.

    Raises:
      ValueError: more tokens than the cache holds, or, of at most `MAX_QUERIES`, than a row has room for where its
        length is known; a layout that can't split this cache.
      NotImplementedError: segments; a named implementation that can't serve this call.
    """
    if segments is not None:
        raise NotImplementedError("segments with a cache: packed documents are not decoded from one cache row")
    _, T, N, _ = q.shape
    _require_room(cache, T)
    sizes, layout = sharded.mesh_sizes(), _layout(cache, N, serving)

    def append(cache: C, new: tuple[Array, ...]) -> C:
        return cache.append(*new, start=sharded.first_position(layout, cache.capacity), words=kept_as_words())

    def decode(q: Array, cache: C, new: tuple[Array, ...], slopes: Any, rope: Any) -> tuple[Array, C]:
        cache = append(cache, new)
        (k, v), (k_scale, v_scale) = ((*x, None)[:2] for x in (cache.streams, cache.scales))
        out = sharded.decode_shard(
            q, k, v, cache.length, layout=layout, start=sharded.first_position(layout, cache.capacity), scale=scale,
            rope=rope, alibi_slopes=slopes, k_scale=k_scale, v_scale=v_scale, value_width=value_width,
            implementation=serving.decode)
        return out, cache

    stored, tokens = _partition(layout, cache), layout.new(cache.has_heads)
    if T <= MAX_QUERIES:
        if sizes is not None:
            # Without the check of replication: what a kernel returns does not carry it.
            decode = jax.shard_map(
                decode, in_specs=(layout.queries, stored, tokens, PartitionSpec(layout.heads), PartitionSpec()),
                out_specs=(layout.queries, stored), check_vma=False)
        return decode(q, cache, new, alibi_slopes, inv_freq)

    if sizes is not None:
        append = jax.shard_map(append, in_specs=(stored, tokens), out_specs=stored, check_vma=False)
    offset, cache = cache.length, append(cache, new)
    k, *values = cache.read(q.dtype)
    turned = k if inv_freq is None else rotate(k, *rope_table(jnp.arange(cache.capacity), inv_freq))
    # Keys that serve as values are averaged whole: to slice them would copy the cache.
    out = attend(q, turned, values[0] if values else k, scale=scale, offset=offset, alibi_slopes=alibi_slopes,
                 implementation=serving.prefill)
    return out[..., :value_width], cache


def _require_room(cache: Cache, T: int) -> None:
    cache.check_room(T)
    if T <= MAX_QUERIES and not isinstance(cache.length, jax.core.Tracer):
        lengths = cache.length + T
        if bool(jnp.any(lengths > cache.capacity)):
            raise ValueError(f"lengths={lengths.tolist()}: must be in 0 .. {cache.capacity}, the keys allocated")


def placement(cache: C, num_heads: int, serving: Serving) -> C:
    """The partition of each array of a layer's cache on the ambient mesh, as `cached_attention` takes and leaves it."""
    return _partition(_layout(cache, num_heads, serving), cache)


def _layout(cache: Cache, num_heads: int, serving: Serving) -> sharded.Layout:
    B, K = cache.streams[0].shape[0], cache.streams[0].shape[1] if cache.has_heads else 1
    return sharded.choose(sharded.mesh_sizes() or {}, B=B, N=num_heads, K=K, S=cache.capacity, layout=serving.layout)


def _partition(layout: sharded.Layout, cache: C) -> C:
    streams = jax.tree.map(lambda _: layout.stream(cache.has_heads), cache)
    return dataclasses.replace(streams, length=PartitionSpec(layout.cache_rows))
