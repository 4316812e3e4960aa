"""Cross entropy of a language model without its `[B, T, V]` logits in memory."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mfa_jax.axes import constrain

CHUNK_ELEMENTS = 1 << 24
"""Logits held at a time, in elements: 64 MiB in float32."""


class LossSums(NamedTuple):
    """Sums over the targets that count, so that parts of a batch add up to the whole."""

    loss: Float[Array, ""]
    """Negative log-likelihood in nats, plus `z_loss` times the squared log-partitions."""
    nll: Float[Array, ""]
    """Negative log-likelihood in nats."""
    tokens: Float[Array, ""]
    """Targets that count."""


def cross_entropy(
    hidden: Float[Array, "B T D"], table: Float[Array, "V D"], targets: Int[Array, "B T"], mask: Bool[Array, "B T"],
    z_loss: float = 0.0, chunk_elements: int = CHUNK_ELEMENTS,
) -> LossSums:
    """`sum_t mask_t (logsumexp(l_t) - l_t[target_t] + z_loss logsumexp(l_t) ** 2)`, `l = hidden table^T` in float32.

    Logits are made for as many positions at a time as hold `chunk_elements`, and made again in the backward pass, so
    that memory does not grow with `T V`. The z term is PaLM's (Chowdhery et al., arXiv 2204.02311, section 5).
    """
    B, T, _ = hidden.shape
    table = table.astype(hidden.dtype)
    # Where the mesh splits the sequence, a part takes as many positions of each device.
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty or T % mesh.shape.get("context", 1) else mesh.shape.get("context", 1)
    t = T // shards
    chunk = max(1, min(t, chunk_elements // (B * table.shape[0] * shards)))
    if chunk == t:
        return _chunk_sums(hidden, table, targets, mask, z_loss)
    padding = -t % chunk

    def split(x: Array) -> Array:
        rest = x.shape[2:]
        padded = jnp.pad(x.reshape(B, shards, t, *rest), [(0, 0), (0, 0), (0, padding)] + [(0, 0)] * len(rest))
        return jnp.moveaxis(padded.reshape(B, shards, -1, chunk, *rest), 2, 0).reshape(-1, B, shards * chunk, *rest)

    @jax.checkpoint
    def step(sums: LossSums, part: tuple[Array, Array, Array]) -> tuple[LossSums, None]:
        hidden, targets, mask = part
        return jax.tree.map(jnp.add, sums, _chunk_sums(hidden, table, targets, mask, z_loss)), None

    zero = jnp.zeros((), jnp.float32)
    sums, _ = jax.lax.scan(step, LossSums(zero, zero, zero), (split(hidden), split(targets), split(mask)))
    return sums


def _chunk_sums(
    hidden: Float[Array, "B T D"], table: Float[Array, "V D"], targets: Int[Array, "B T"], mask: Bool[Array, "B T"],
    z_loss: float,
) -> LossSums:
    logits = jnp.einsum("BTD,VD->BTV", hidden, table, preferred_element_type=jnp.float32)
    logits = constrain(logits, "batch", "sequence", "vocab")
    log_partition = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nll = jnp.sum(jnp.where(mask, log_partition - chosen, 0.0))
    penalty = z_loss * jnp.sum(jnp.where(mask, log_partition**2, 0.0))
    return LossSums(nll + penalty, nll, jnp.sum(mask, dtype=jnp.float32))
