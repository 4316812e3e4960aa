"""What decoding stores, one small pytree per layout.

| layout | arrays of a layer | used by |
| --- | --- | --- |
| `KVCache` | `k [B, K, S, H]`, `v [B, K, S, h]` | MHA, GQA, MQA |
| `SharedKVCache` | `k [B, S, C]`, `v [B, S, C]` | MFA |
| `KeyCache` | `k [B, S, W]`: keys that also hold the values | MFA-KR (W = C), MLA (W = C + R) |

The sequence axis comes after the heads, so that the products of a decode step read each array as it lies. `length
[B]` counts the tokens of each row. `append` past the end writes nothing there, goes on counting and so raises the
`overflowed` flag; where it is known at trace time that the tokens can't fit, it raises instead.

Streams of int8 hold `round(127 x / max|x|)` of each token (and key head), those of float8_e4m3fn `448 x / max|x|`, and
`max|x| / 127` or `/ 448` in a float32 array beside them, `k_scale` or `v_scale [B, *K, S]`: W + 4 bytes a token of
width W. Tokens are rounded as they are appended.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from mfa_jax.words import as_words, from_words

SCALED = {jnp.dtype(jnp.int8): 127, jnp.dtype(jnp.float8_e4m3fn): 448}
"""Types whose tokens have a scale, and the largest number they hold."""


@dataclasses.dataclass(frozen=True)
class Cache:
    """Common part of the layouts: how many tokens each row holds. Fields are arrays, or what a tree map put there."""

    length: Any
    """[B] int32, tokens of each row, those past the end counted in."""

    @property
    def streams(self) -> tuple[Any, ...]:
        """The arrays that hold tokens."""
        return tuple(getattr(self, name) for name in self._names)

    @property
    def scales(self) -> tuple[Any, ...]:
        """For each stream, what its tokens are multiplied by; None where the type needs none."""
        return tuple(getattr(self, f"{name}_scale") for name in self._names)

    @property
    def _names(self) -> tuple[str, ...]:
        return tuple(f.name for f in dataclasses.fields(self) if f.name in ("k", "v"))

    @property
    def has_heads(self) -> bool:
        """Whether the arrays of one layer have an axis of key heads."""
        return isinstance(self, KVCache)

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
        """Bytes of the token arrays as allocated, scales counted in."""
        arrays = [x for x in (*self.streams, *self.scales) if x is not None]
        return sum(x.size * x.dtype.itemsize for x in arrays)

    def with_length(self, length: Int[Array, "*B"]) -> Self:
        """The same arrays with other lengths: rows cut back to their prompts after a padded prefill."""
        return dataclasses.replace(self, length=length)

    def with_capacity(self, capacity: int) -> Self:
        """The same tokens in arrays of another allocated length, at least the present one.

        Raises:
          ValueError: a capacity below the present one.
        """
        more = capacity - self.capacity
        if more < 0:
            raise ValueError(f"capacity={capacity}: must be at least {self.capacity}, what is allocated")
        streams = {name: jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, more), (0, 0)])
                   for name, x in zip(self._names, self.streams, strict=True)}
        scales = {f"{name}_scale": jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)])
                  for name, x in zip(self._names, self.scales, strict=True) if x is not None}
        return dataclasses.replace(self, **streams, **scales)

    def check_room(self, tokens: int) -> None:
        """Raises `ValueError` for more tokens at once than a row can hold."""
        if tokens > self.capacity:
            raise ValueError(f"{tokens} tokens do not fit into a cache of {self.capacity}; allocate at least {tokens}")

    def append(self, *new: Float[Array, "B *K T W"], start: Any = 0, words: bool = False) -> Self:
        """The cache with T more tokens in each row, given for each stream.

        Args:
          start: position of the first token that these arrays have room for, where they are one shard of a sequence;
            tokens outside the shard are left out. An integer where they are no shard.
          words: write narrow floats as integers of their size, for CPUs; see `words`.

        Raises:
          ValueError: more tokens than a row holds.
        """
        if isinstance(start, int):
            self.check_room(new[0].shape[-2])
        rows, tokens = jnp.arange(self.length.shape[0])[:, None], new[0].shape[-2]
        columns = self.length[:, None] + jnp.arange(tokens) - start
        # An index below zero would count from the end.
        columns = jnp.where(columns < 0, self.capacity, columns)
        written: dict[str, Any] = {}
        for name, stream, scale, tokens_of in zip(self._names, self.streams, self.scales, new, strict=True):
            if scale is not None:
                tokens_of, scale_of = quantize(tokens_of, stream.dtype)
                written[f"{name}_scale"] = _write(scale, rows, columns, scale_of, self.has_heads)
            look = as_words if words else lambda x: x
            stored = _write(look(stream), rows, columns, look(tokens_of.astype(stream.dtype)), self.has_heads)
            written[name] = from_words(stored, stream.dtype)
        return dataclasses.replace(self, length=self.length + tokens, **written)

    def read(self, dtype: Any) -> tuple[Any, ...]:
        """The streams as arrays of `dtype`; those with scales multiplied by them, the others as they are."""
        return tuple(stream if scale is None else (stream.astype(jnp.float32) * scale[..., None]).astype(dtype)
                     for stream, scale in zip(self.streams, self.scales, strict=True))


def quantize(x: Float[Array, "*B W"], dtype: Any) -> tuple[Num[Array, "*B W"], Float[Array, "*B"]]:
    """A type of `SCALED`, and of each row the scale that gives `x` back: `max|x|` over the type's largest number."""
    x, dtype = x.astype(jnp.float32), jnp.dtype(dtype)
    scale = jnp.abs(x).max(axis=-1) / SCALED[dtype]
    x = x / jnp.where(scale == 0, 1, scale)[..., None]
    return (jnp.round(x) if dtype == jnp.int8 else x).astype(dtype), scale


def _write(x: Array, rows: Int[Array, "B 1"], columns: Int[Array, "B T"], new: Array, has_heads: bool) -> Array:
    if has_heads:
        # An index for each head too: of windows that reach over the heads, XLA for TPUs wants these next to the width,
        # and would copy the cache from and to the layout of the kernels in every step.
        heads = jnp.arange(x.shape[1])[:, None]
        return x.at[rows[:, None], heads, columns[:, None]].set(new, mode="drop")
    return x.at[rows, columns].set(new, mode="drop")


@dataclasses.dataclass(frozen=True)
class KVCache(Cache):
    """Keys and values of K heads."""

    k: Any
    """[B, K, S, H]"""
    v: Any
    """[B, K, S, h]"""
    k_scale: Any = None
    """[B, K, S] for a type of `SCALED`, else None."""
    v_scale: Any = None
    """[B, K, S] for a type of `SCALED`, else None."""


@dataclasses.dataclass(frozen=True)
class SharedKVCache(Cache):
    """One key and one value for all heads."""

    k: Any
    """[B, S, C]"""
    v: Any
    """[B, S, C]"""
    k_scale: Any = None
    """[B, S] for a type of `SCALED`, else None."""
    v_scale: Any = None
    """[B, S] for a type of `SCALED`, else None."""


@dataclasses.dataclass(frozen=True)
class KeyCache(Cache):
    """One stream that serves scores and values."""

    k: Any
    """[B, S, W]"""
    k_scale: Any = None
    """[B, S] for a type of `SCALED`, else None."""


for _layout in (KVCache, SharedKVCache, KeyCache):
    jax.tree_util.register_dataclass(_layout)


def allocate(layout: type[Cache], batch: int, *shapes: Sequence[int], dtype: Any) -> Any:
    """An empty cache: zeros of `[batch, *shape]` for each stream, lengths zero; types of `SCALED` get scales too.

    Raises:
      ValueError: a type that neither holds keys and values as they are nor has a scale.
    """
    dtype = jnp.dtype(dtype)
    if dtype not in SCALED and not (jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 1):
        raise ValueError(f"cache_dtype={dtype.name!r}: must be one of float32, bfloat16, float16, "
                         f"{', '.join(x.name for x in SCALED)}")
    arrays = [jnp.zeros((batch, *shape), dtype) for shape in shapes]
    scales = [jnp.zeros(x.shape[:-1], jnp.float32) for x in arrays if x.dtype in SCALED]
    return layout(jnp.zeros((batch,), jnp.int32), *arrays, *scales)
