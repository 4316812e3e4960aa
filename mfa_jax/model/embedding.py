"""The embedding table, read where it lies."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from mfa_jax.axes import splits


def look_up(table: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype: Any) -> Float[Array, "B T D"]:
    """`table[tokens]` in `dtype`.

    Where a mesh splits the vocabulary each device reads the rows that it has, and one sum puts the tokens' rows
    together: the table stays where it is, but for its width, which `fsdp` splits and which is gathered. Left to the
    compiler, the table would be made whole on every device, in decoding for every token.
    """
    spread, tables = splits(tokens.shape, "batch", "sequence"), splits(table.shape, "vocab", None)
    if spread is None or tables is None:
        return jnp.take(table, tokens, axis=0).astype(dtype)
    vocabulary = tables[0]

    def local(table: Array, tokens: Array) -> Array:
        if not vocabulary:
            return jnp.take(table, tokens, axis=0).astype(dtype)
        place = tokens - jax.lax.axis_index(vocabulary) * table.shape[0]
        here = (place >= 0) & (place < table.shape[0])
        rows = jnp.take(table, jnp.where(here, place, 0), axis=0).astype(dtype)
        # All terms but one are zero: the sum is exact in any type.
        return jax.lax.psum(jnp.where(here[..., None], rows, 0), vocabulary)

    by_token = PartitionSpec(*spread)
    return jax.shard_map(local, in_specs=(PartitionSpec(vocabulary), by_token), out_specs=by_token, check_vma=False)(
        table, tokens)
