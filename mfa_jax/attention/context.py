"""Attention of a sequence that the mesh axis `context` splits: keys are gathered, queries stay.

Causal attention of a late token costs more than that of an early one, so each of X devices holds an early and a late
part: the sequence is cut into 2X chunks, and device r has chunks r and 2X - 1 - r (the zig-zag order of Llama 3, arXiv
2407.21783, section 3.3.2). All devices then meet 2X + 1 pairs of chunks. What is gathered is one layer's keys and
values of the whole sequence: for MFA, with one head of each, `2 C` a token, for MFA-KR only the key, `C`, for MLA its
latent, `C + R`, for GQA `2 K H`; `capacity.sequence_exchange_bytes` counts it. Back come the gradients of the keys and
values that attention was given: for MFA and GQA as much as was gathered, for MFA-KR those of key and value, and for MLA
those of all heads, since both are made of what was gathered before attention meets them.

On a TPU each device attends with splash, which is given the order as data; elsewhere, and with ALiBi, in blocks.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from mfa_jax.attention.blockwise import blockwise_attention
from mfa_jax.attention.library import run_splash, splash_kernel

AXIS = "context"


def zigzag(length: int, shards: int) -> np.ndarray:
    """Token at each place of a sequence in zig-zag order; equal parts of it are the chunks of each device.

    Raises:
      ValueError: a length that 2 `shards` chunks do not divide.
    """
    if length % (2 * shards):
        raise ValueError(f"sequence_length={length}: must be a multiple of {2 * shards}, two chunks for each of the "
                         f"{shards} shards of mesh axis {AXIS}")
    return np.arange(length).reshape(2 * shards, -1)[_chunks(shards)].reshape(-1)


def _chunks(shards: int) -> np.ndarray:
    """Chunks in the order of places: 0, 2X - 1, 1, 2X - 2, and so on."""
    first = np.arange(shards)
    return np.stack([first, 2 * shards - 1 - first], axis=1).reshape(-1)


def splits_sequence() -> bool:
    """Whether there is a mesh whose axis `context` is more than one device, and we are not inside a `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.shape.get(AXIS, 1) > 1 and AxisType.Manual not in mesh.axis_types


def local_implementation(platform: str, length: int, *, alibi: bool) -> str:
    """What each device attends with: `splash` on a TPU, where it can serve (no ALiBi, chunks of whole tiles of 128
    tokens), else `blockwise`."""
    shards = jax.sharding.get_abstract_mesh().shape[AXIS]
    return "splash" if platform == "tpu" and not alibi and length % (2 * shards * 128) == 0 else "blockwise"


def context_attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B K T H"], v: Float[Array, "B K T h"], *, scale: float,
    segments: Int[Array, "B T"] | None, alibi_slopes: Float[Array, " N"] | None, rows: tuple[str, ...] | None,
    heads: tuple[str, ...] | None, local: str, interpret: bool = False,
) -> Float[Array, "B T N h"]:
    """`core.attend` of a whole sequence in zig-zag order, in and out.

    Args:
      rows, heads: mesh axes that split the batch and the heads.
      local: what each device attends with, `blockwise` or `splash`; `local_implementation` chooses.
      interpret: run `splash` without a TPU, for tests.

    Raises:
      ValueError: as `zigzag`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    (N, K), shards = (q.shape[2], k.shape[1]), mesh.shape[AXIS]
    order = zigzag(q.shape[1], shards)
    keys = P(rows, None if K == 1 else heads)
    queries = P(rows, AXIS, heads)
    if local == "splash":
        split = math.prod(mesh.shape[axis] for axis in heads or ()) if K == 1 else K
        kernel = splash_kernel(order, N // split, shards, interpret=interpret)
        kernel_at = kernel.manual_sharding_spec(NamedSharding(mesh, P(None, AXIS)))
    else:
        kernel, kernel_at = None, None
    # Without the check of replication, which custom gradients do not carry.
    return jax.shard_map(
        partial(_local, scale=scale, shards=shards),
        in_specs=(queries, keys, keys, P(rows, AXIS), P(rows), P(heads), kernel_at), out_specs=queries,
        check_vma=False)(q, k, v, segments, segments, alibi_slopes, kernel)


def _local(
    q: Float[Array, "B t N H"], k: Float[Array, "B K T H"], v: Float[Array, "B K T h"],
    query_segments: Int[Array, "B t"] | None, key_segments: Int[Array, "B T"] | None,
    slopes: Float[Array, " N"] | None, kernel: Any, *, scale: float, shards: int,
) -> Float[Array, "B t N h"]:
    """One device's two chunks of queries against all keys, put back in order first."""
    back = np.argsort(_chunks(shards))

    def in_order(x: Array, axis: int) -> Array:
        chunked = x.reshape(*x.shape[:axis], 2 * shards, -1, *x.shape[axis + 1 :])
        return jnp.take(chunked, back, axis=axis).reshape(x.shape)

    k, v = in_order(k, 2), in_order(v, 2)
    key_segments = None if key_segments is None else in_order(key_segments, 1)
    if kernel is not None:
        segments = None if query_segments is None or key_segments is None else (query_segments, key_segments)
        return run_splash(kernel, q, k, v, scale=scale, segments=segments)
    me, chunk = lax.axis_index(AXIS), q.shape[1] // 2
    outputs = []
    for half, place in ((slice(chunk), me), (slice(chunk, None), 2 * shards - 1 - me)):
        outputs.append(blockwise_attention(
            q[:, half], k, v, scale=scale, offset=jnp.full((len(q),), place * chunk, jnp.int32),
            segments=None if query_segments is None else query_segments[:, half], key_segments=key_segments,
            alibi_slopes=slopes))
    return jnp.concatenate(outputs, axis=1)
