"""What decoding stores, one small pytree per layout.

| layout | arrays of a layer | used by |
| --- | --- | --- |
| `KVCache` | `k [B, K, S, H]`, `v [B, K, S, h]` | MHA, GQA, MQA |
| `SharedKVCache` | `k [B, S, C]`, `v [B, S, C]` | MFA |
| `KeyCache` | `k [B, S, W]`: keys that also hold the values | MFA-KR (W = C), MLA (W = C + R) |

The sequence axis comes after the heads, so that the products of a decode step read each array as it lies. `length
[B]` counts the tokens of each row. `append` past the end writes nothing there, goes on counting and so raises the
`overflowed` flag; where it is known at trace time that the tokens can't fit, it raises instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class Cache:
    """Common part of the layouts: how many tokens each row holds. Fields are arrays, or what a tree map put there."""

    length: Any
    """[B] int32, tokens of each row, those past the end counted in."""

    @property
    def streams(self) -> tuple[Any, ...]:
        """The arrays that hold tokens."""
        return tuple(getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "length")

    @property
    def capacity(self) -> int:
        """S, tokens that a row can hold."""
        return self.streams[0].shape[-2]

    @property
    def overflowed(self) -> Bool[Array, "*B"]:
        """Which rows were given more tokens than they can hold: what such a row computes is wrong from there on."""
        return self.length > self.capacity

    @property
    def nbytes(self) -> int:
        """Bytes of the token arrays as allocated."""
        return sum(stream.size * stream.dtype.itemsize for stream in self.streams)

    def with_length(self, length: Int[Array, "*B"]) -> Self:
        """The same arrays with other lengths: rows cut back to their prompts after a padded prefill."""
        return dataclasses.replace(self, length=length)

    def _append(self, *new: Float[Array, "B *K T W"]) -> Self:
        tokens = new[0].shape[-2]
        if tokens > self.capacity:
            raise ValueError(f"{tokens} tokens do not fit into a cache of {self.capacity}; allocate at least {tokens}")
        rows = jnp.arange(self.length.shape[0])[:, None]
        columns = self.length[:, None] + jnp.arange(tokens)
        names = [f.name for f in dataclasses.fields(self) if f.name != "length"]
        written = {
            name: _write(stream, rows, columns, tokens_of)
            for name, stream, tokens_of in zip(names, self.streams, new, strict=True)
        }
        return dataclasses.replace(self, length=self.length + tokens, **written)


def _write(
    stream: Float[Array, "B *K S W"], rows: Int[Array, "B 1"], columns: Int[Array, "B T"], new: Float[Array, "B *K T W"]
) -> Float[Array, "B *K S W"]:
    new = new.astype(stream.dtype)
    if stream.ndim == 4:
        return stream.at[rows, :, columns].set(new.swapaxes(1, 2), mode="drop")
    return stream.at[rows, columns].set(new, mode="drop")


@dataclasses.dataclass(frozen=True)
class KVCache(Cache):
    """Keys and values of K heads."""

    k: Any
    """[B, K, S, H]"""
    v: Any
    """[B, K, S, h]"""

    def append(self, k: Float[Array, "B K T H"], v: Float[Array, "B K T h"]) -> KVCache:
        """The cache with T more tokens in each row."""
        return self._append(k, v)


@dataclasses.dataclass(frozen=True)
class SharedKVCache(Cache):
    """One key and one value for all heads."""

    k: Any
    """[B, S, C]"""
    v: Any
    """[B, S, C]"""

    def append(self, k: Float[Array, "B T C"], v: Float[Array, "B T C"]) -> SharedKVCache:
        """The cache with T more tokens in each row."""
        return self._append(k, v)


@dataclasses.dataclass(frozen=True)
class KeyCache(Cache):
    """One stream that serves scores and values."""

    k: Any
    """[B, S, W]"""

    def append(self, k: Float[Array, "B T W"]) -> KeyCache:
        """The cache with T more tokens in each row."""
        return self._append(k)


for _layout in (KVCache, SharedKVCache, KeyCache):
    jax.tree_util.register_dataclass(_layout)


def allocate(layout: type[Cache], batch: int, *shapes: Sequence[int], dtype: Any) -> Any:
    """An empty cache: zeros of `[batch, *shape]` for each stream, lengths zero."""
    arrays = [jnp.zeros((batch, *shape), dtype) for shape in shapes]
    return layout(jnp.zeros((batch,), jnp.int32), *arrays)
