"""Cross entropy of a language model, and the scores of given tokens, without its `[B, T, V]` logits in memory."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from mfa_jax.axes import splits

CHUNK_ELEMENTS = 1 << 24
"""Logits that a device holds at a time, in elements: 64 MiB in float32."""


class LossSums(NamedTuple):
    """Sums over the targets that count, so that parts of a batch add up to the whole."""

    loss: Float[Array, ""]
    """Negative log-likelihood in nats, plus `z_loss` times the squared log-partitions."""
    nll: Float[Array, ""]
    """Negative log-likelihood in nats."""
    tokens: Float[Array, ""]
    """Targets that count."""


class TokenScores(NamedTuple):
    """What a model says of given tokens, one at each position."""

    logprob: Float[Array, "B T"]
    """`l_t[target_t] - logsumexp(l_t)`, in nats."""
    best: Bool[Array, "B T"]
    """Whether no token of the vocabulary has a larger logit."""


def cross_entropy(
    hidden: Float[Array, "B T D"], table: Float[Array, "V D"], targets: Int[Array, "B T"], mask: Bool[Array, "B T"],
    z_loss: float = 0.0, chunk_elements: int = CHUNK_ELEMENTS,
) -> LossSums:
    """`sum_t mask_t (logsumexp(l_t) - l_t[target_t] + z_loss logsumexp(l_t) ** 2)`, `l = hidden table^T` in float32.

    Logits are made for as many positions at a time as hold `chunk_elements` on a device, and made again in the backward
    pass, so that memory does not grow with `T V`. The z term is PaLM's (Chowdhery et al., arXiv 2204.02311, section 5).

    Where a mesh is set, each device takes its own tokens and its own part of the vocabulary through all chunks, so that
    the table is gathered once and its gradient summed once: left to the compiler, both would happen in every chunk.
    """
    table = table.astype(hidden.dtype)
    tokens, tables = splits(targets.shape, "batch", "sequence"), splits(table.shape, "vocab", None)
    if tokens is None or tables is None:
        return _local_sums(hidden, table, targets, mask, z_loss, chunk_elements, ())
    vocabulary = tables[0]
    over = tuple(axis for entry in tokens for axis in entry)

    def local(hidden: Array, table: Array, targets: Array, mask: Array) -> LossSums:
        sums = _local_sums(hidden, table, targets, mask, z_loss, chunk_elements, vocabulary)
        return jax.tree.map(lambda x: jax.lax.psum(x, over), sums)

    by_token = PartitionSpec(*tokens)
    # Without the check of replication: what a scan carries would have to be marked as different on each device.
    return jax.shard_map(local, in_specs=(by_token, PartitionSpec(vocabulary), by_token, by_token),
                         out_specs=PartitionSpec(), check_vma=False)(hidden, table, targets, mask)


def token_scores(
    hidden: Float[Array, "B T D"], table: Float[Array, "V D"], targets: Int[Array, "B T"],
    chunk_elements: int = CHUNK_ELEMENTS,
) -> TokenScores:
    """The score of each target, with `l = hidden table^T` in float32, made and split as in `cross_entropy`."""
    table = table.astype(hidden.dtype)
    tokens, tables = splits(targets.shape, "batch", "sequence"), splits(table.shape, "vocab", None)
    if tokens is None or tables is None:
        return _local_scores(hidden, table, targets, chunk_elements, ())
    vocabulary, by_token = tables[0], PartitionSpec(*tokens)

    def local(hidden: Array, table: Array, targets: Array) -> TokenScores:
        return _local_scores(hidden, table, targets, chunk_elements, vocabulary)

    return jax.shard_map(local, in_specs=(by_token, PartitionSpec(vocabulary), by_token), out_specs=by_token,
                         check_vma=False)(hidden, table, targets)


def _local_scores(
    hidden: Float[Array, "B T D"], table: Float[Array, "V D"], targets: Int[Array, "B T"], chunk_elements: int,
    vocabulary: tuple[str, ...],
) -> TokenScores:
    B, T, _ = hidden.shape

    def one(part: tuple[Array, Array]) -> TokenScores:
        top, log_partition, chosen = _chunk_logits(part[0], table, part[1], vocabulary)
        return TokenScores(chosen - log_partition, chosen >= top)

    chunk = chunk_size(B, T, table.shape[0], chunk_elements)
    if chunk == T:
        return one((hidden, targets))
    scores = jax.lax.map(one, (split(hidden, chunk), split(targets, chunk)))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(B, -1)[:, :T], scores)


def chunk_size(B: int, T: int, V: int, chunk_elements: int) -> int:
    """Positions whose logits are at most so many elements, at least one and at most T."""
    return max(1, min(T, chunk_elements // (B * V)))


def split(x: Array, chunk: int) -> Array:
    """`[B, T, ...]` as `[chunks, B, chunk, ...]`, padded with zeros."""
    padded = jnp.pad(x, [(0, 0), (0, -x.shape[1] % chunk)] + [(0, 0)] * (x.ndim - 2))
    return padded.reshape(len(x), -1, chunk, *x.shape[2:]).swapaxes(0, 1)


def _local_sums(
    hidden: Float[Array, "B T D"], table: Float[Array, "V D"], targets: Int[Array, "B T"], mask: Bool[Array, "B T"],
    z_loss: float, chunk_elements: int, vocabulary: tuple[str, ...],
) -> LossSums:
    """The sums of one device; `vocabulary` are the mesh axes that split the table."""
    B, T, _ = hidden.shape
    chunk = chunk_size(B, T, table.shape[0], chunk_elements)
    if chunk == T:
        return _chunk_sums(hidden, table, targets, mask, z_loss, vocabulary)

    @jax.checkpoint
    def step(sums: LossSums, part: tuple[Array, Array, Array]) -> tuple[LossSums, None]:
        hidden, targets, mask = part
        return jax.tree.map(jnp.add, sums, _chunk_sums(hidden, table, targets, mask, z_loss, vocabulary)), None

    zero = jnp.zeros((), jnp.float32)
    parts = (split(hidden, chunk), split(targets, chunk), split(mask, chunk))
    sums, _ = jax.lax.scan(step, LossSums(zero, zero, zero), parts)
    return sums


def _chunk_sums(
    hidden: Float[Array, "B T D"], table: Float[Array, "V D"], targets: Int[Array, "B T"], mask: Bool[Array, "B T"],
    z_loss: float, vocabulary: tuple[str, ...],
) -> LossSums:
    _, log_partition, chosen = _chunk_logits(hidden, table, targets, vocabulary)
    nll = jnp.sum(jnp.where(mask, log_partition - chosen, 0.0))
    penalty = z_loss * jnp.sum(jnp.where(mask, log_partition**2, 0.0))
    return LossSums(nll + penalty, nll, jnp.sum(mask, dtype=jnp.float32))


def _chunk_logits(
    hidden: Float[Array, "B T D"], table: Float[Array, "V D"], targets: Int[Array, "B T"], vocabulary: tuple[str, ...]
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Float[Array, "B T"]]:
    """As `read_logits`, of logits that are made here."""
    logits = jnp.einsum("BTD,VD->BTV", hidden, table, preferred_element_type=jnp.float32)
    return read_logits(logits, targets, vocabulary)


def read_logits(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"], vocabulary: tuple[str, ...]
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Float[Array, "B T"]]:
    """Of the logits at each position the largest, the log of the sum of their exponentials, and the target's;
    `vocabulary` are the mesh axes that split them, from within a `shard_map`."""
    top = jax.lax.stop_gradient(logits.max(axis=-1))
    if not vocabulary:
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return top, jax.nn.logsumexp(logits, axis=-1), chosen
    top = jax.lax.pmax(top, vocabulary)
    log_partition = top + jnp.log(jax.lax.psum(jnp.exp(logits - top[..., None]).sum(axis=-1), vocabulary))
    place = targets - jax.lax.axis_index(vocabulary) * logits.shape[-1]
    here = (place >= 0) & (place < logits.shape[-1])
    found = jnp.take_along_axis(logits, jnp.where(here, place, 0)[..., None], axis=-1)[..., 0]
    return top, log_partition, jax.lax.psum(jnp.where(here, found, 0), vocabulary)
