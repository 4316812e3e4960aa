"""Decode attention over a mesh: what of the cache lies where, and what is exchanged for it.

Queries come with their rows over `data`, `fsdp` and `expert` and their heads over `tensor`, as the projections leave
them. The `context` axis splits the sequence. What `tensor` splits of a cache is the layout:

| layout | cache of a device, t devices of `tensor` | exchanged in a step |
| --- | --- | --- |
| `heads` | all of it if one key head serves all heads, else its K / t key heads | nothing |
| `batch` | B / t rows | queries and results, all-to-all |
| `sequence` | S / t positions | queries gathered, results merged by their log-sum-exp and scattered |

`choose` takes `heads` where the key heads divide over `tensor`: nothing is stored twice then. A shared key head would
be, so the rows are split where they divide, else the positions, else the cache is held whole. Merging moves float32
partial results, some ten times what `batch` exchanges, which is why rows come first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from mfa_jax.kernels.decode import averages

LAYOUTS = ("heads", "batch", "sequence")
ROW_AXES, TENSOR, CONTEXT = ("data", "fsdp", "expert"), "tensor", "context"


@dataclasses.dataclass(frozen=True)
class Layout:
    """Mesh axes of each axis of a cache and of the queries; an empty tuple: not split."""

    name: str
    rows: tuple[str, ...]
    """Of the batch of queries and results."""
    heads: tuple[str, ...]
    """Of the heads of queries and results."""
    cache_rows: tuple[str, ...]
    cache_heads: tuple[str, ...]
    sequence: tuple[str, ...]

    @property
    def queries(self) -> PartitionSpec:
        """Of `[B, T, N, H]`."""
        return PartitionSpec(self.rows, None, self.heads)

    def stream(self, has_heads: bool) -> PartitionSpec:
        """Of `[B, S, ...]`, or `[B, K, S, ...]` where there is an axis of key heads."""
        heads = (self.cache_heads,) if has_heads else ()
        return PartitionSpec(self.cache_rows, *heads, self.sequence)

    def new(self, has_heads: bool) -> PartitionSpec:
        """Of the new tokens of a stream: every device of a split sequence gets all of them."""
        return PartitionSpec(*self.stream(has_heads)[:-1])


def choose(sizes: Mapping[str, int], *, B: int, N: int, K: int, S: int, layout: str = "auto") -> Layout:
    """The layout of a cache of B rows, K key heads and S positions for N query heads on a mesh of such axis sizes.

    Axes that do not divide what they would split are left out of it, and their devices compute the same. A layout that
    was named splits by all of `tensor`, and `sequence` by all of `context` too; an axis of one device splits nothing.

    Raises:
      ValueError: an unknown layout, or a named one that can't split this cache.
    """
    if layout not in ("auto", *LAYOUTS):
        raise ValueError(f"layout={layout!r}: must be one of auto, {', '.join(LAYOUTS)}")
    rows: tuple[str, ...] = ()
    local_rows = B
    for axis in ROW_AXES:
        if local_rows % sizes.get(axis, 1) == 0 and axis in sizes:
            rows, local_rows = (*rows, axis), local_rows // sizes[axis]
    t, c = sizes.get(TENSOR, 1), sizes.get(CONTEXT, 1)
    tensor = (TENSOR,) if t > 1 else ()
    context = (CONTEXT,) if c > 1 and S % c == 0 else ()
    heads = tensor if N % t == 0 and (K == 1 or K % t == 0) else ()
    whole = Layout("heads", rows, heads, rows, heads if K > 1 else (), context)
    positions = t * (c if context or layout == "sequence" else 1)
    split = {
        "heads": whole,
        "batch": dataclasses.replace(whole, name="batch", cache_rows=rows + tensor),
        "sequence": dataclasses.replace(whole, name="sequence", sequence=context + tensor),
    }
    needs = {
        "heads": (heads == tensor,
                  f"needs heads N={N} that divide over {dict(sizes)}, and one key head or such that do, not K={K}"),
        "batch": (K == 1 and heads == tensor and local_rows % t == 0,
                  f"needs one key head, heads N={N} and rows B={B} that divide over {dict(sizes)}, not K={K}"),
        "sequence": (K == 1 and heads == tensor and S % positions == 0,
                     f"needs one key head, heads N={N} and positions S={S} that divide over {dict(sizes)}, not K={K}"),
    }
    if t == 1:
        if layout == "sequence" and S % positions:
            raise ValueError(f"layout={layout!r}: needs positions S={S} that divide over {dict(sizes)}; use auto")
        return whole  # nothing else to split, all layouts are the same
    if layout == "auto":
        order = () if K > 1 else ("batch", "sequence")
        return split[next((name for name in order if needs[name][0]), "heads")]
    able, need = needs[layout]
    if not able:
        raise ValueError(f"layout={layout!r}: {need}; use auto")
    return split[layout]


def whole_tiles(length: int) -> int:
    """At least so many positions, in whole tiles of the kernels (32 tokens of int8) on each device of the ambient mesh
    that may hold a part of a sequence."""
    sizes = mesh_sizes() or {}
    tile = 32 * sizes.get(CONTEXT, 1) * sizes.get(TENSOR, 1)
    return -(-length // tile) * tile


def first_position(layout: Layout, S: int) -> Int[Array, ""] | int:
    """Position of this device's first key, where S are those of a device; inside `shard_map`."""
    return lax.axis_index(layout.sequence) * S if layout.sequence else 0


def decode_shard(
    q: Float[Array, "B T N H"], k: Any, v: Any, lengths: Array, *, layout: Layout, start: Any,
    alibi_slopes: Any = None, rope: Any = None, **options: Any,
) -> Float[Array, "B T N h"]:
    """`kernels.decode_attention` inside `shard_map`, with local arrays as `layout` says; the same options.

    Args:
      lengths: of the rows of this device's cache, whole: not those of its shard.
      start: position of this device's first key.
    """
    dtype, tensor = q.dtype, TENSOR
    if layout.name == "batch":
        q = lax.all_to_all(q, tensor, 0, 2, tiled=True)
    elif layout.name == "sequence":
        q = lax.all_gather(q, tensor, axis=2, tiled=True)
    if alibi_slopes is not None and layout.name != "heads":
        alibi_slopes = lax.all_gather(alibi_slopes, tensor, tiled=True)
    if rope is not None and layout.sequence:
        # R(i) q . R(start + j) k = (R(-start) R(i) q) . R(j) k
        angle = -start * rope
        first, second = jnp.split(q.astype(jnp.float32), 2, axis=-1)
        q = jnp.concatenate([first * jnp.cos(angle) - second * jnp.sin(angle),
                             second * jnp.cos(angle) + first * jnp.sin(angle)], axis=-1).astype(dtype)
    # Partial results are merged before they are rounded.
    out, lse = averages(q, k, v, lengths - start, alibi_slopes=alibi_slopes, rope=rope,
                        dtype=jnp.float32 if layout.sequence else dtype, **options)
    if layout.sequence:
        top = lax.pmax(lse, layout.sequence)
        weight = jnp.exp(lse - jnp.where(jnp.isfinite(top), top, 0))
        total = lax.psum(weight, layout.sequence)
        out = out * (weight / jnp.where(total == 0, 1, total))[..., None]
        context = tuple(axis for axis in layout.sequence if axis != tensor)
        if layout.name == "sequence":
            out = lax.psum_scatter(out, tensor, scatter_dimension=2, tiled=True)
        if context:
            out = lax.psum(out, context)
    out = out.astype(dtype)
    return lax.all_to_all(out, tensor, 2, 0, tiled=True) if layout.name == "batch" else out


def mesh_sizes() -> dict[str, int] | None:
    """Sizes of the ambient mesh's axes; None where none is set, or where this runs inside `shard_map` already."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or jax.sharding.AxisType.Manual in mesh.axis_types:
        return None
    return dict(mesh.shape)
