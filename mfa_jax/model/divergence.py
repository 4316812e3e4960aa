"""How far a model's predictions are from another's, without the `[B, T, V]` logits of either in memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from mfa_jax.axes import splits
from mfa_jax.model.loss import CHUNK_ELEMENTS, chunk_size, read_logits, split


class DivergenceSums(NamedTuple):
    """Sums over the targets that count, so that parts of a batch add up to the whole."""

    divergence: Float[Array, ""]
    """`KL(teacher || model)` of the predictions at the temperature, in nats, times its square."""
    nll: Float[Array, ""]
    """Negative log-likelihood of the targets in nats, at temperature 1."""
    teacher_nll: Float[Array, ""]
    """That of the teacher."""
    tokens: Float[Array, ""]
    """Targets that count."""


def divergence(
    hidden: Float[Array, "B T D"], table: Float[Array, "V D"], teacher_hidden: Float[Array, "B T E"],
    teacher_table: Float[Array, "V E"], targets: Int[Array, "B T"], mask: Bool[Array, "B T"], *,
    temperature: float = 1.0, chunk_elements: int = CHUNK_ELEMENTS,
) -> DivergenceSums:
    """`sum_t mask_t tau^2 sum_v p_tv (log p_tv - log q_tv)` and the cross entropy, from one pass over the logits.

    `p = softmax(teacher_hidden teacher_table^T / tau)`, `q = softmax(hidden table^T / tau)`, logits in float32. The
    square keeps gradients of one size at all temperatures (Hinton et al., arXiv 1503.02531, section 2). Where both
    models are the same, value and gradient are zero, at temperature 1 to the last bit.

    Logits are made for as many positions at a time as hold `chunk_elements` on a device, those of both models counted,
    and split over a mesh as `loss.cross_entropy` does it.
    """
    table, teacher_table = table.astype(hidden.dtype), teacher_table.astype(teacher_hidden.dtype)
    given = hidden, table, teacher_hidden, teacher_table, targets, mask
    options: dict[str, Any] = {"temperature": temperature, "chunk_elements": chunk_elements}
    tokens, tables = splits(targets.shape, "batch", "sequence"), splits(table.shape, "vocab", None)
    if tokens is None or tables is None:
        return _local_sums(*given, **options, vocabulary=())
    vocabulary = tables[0]
    over = tuple(axis for entry in tokens for axis in entry)

    def local(*given: Array) -> DivergenceSums:
        sums = _local_sums(*given, **options, vocabulary=vocabulary)
        return jax.tree.map(lambda x: jax.lax.psum(x, over), sums)

    by_token, by_vocabulary = PartitionSpec(*tokens), PartitionSpec(vocabulary)
    return jax.shard_map(local, in_specs=(by_token, by_vocabulary, by_token, by_vocabulary, by_token, by_token),
                         out_specs=PartitionSpec(), check_vma=False)(*given)


def _local_sums(
    hidden: Float[Array, "B T D"], table: Float[Array, "V D"], teacher_hidden: Float[Array, "B T E"],
    teacher_table: Float[Array, "V E"], targets: Int[Array, "B T"], mask: Bool[Array, "B T"], *,
    temperature: float, chunk_elements: int, vocabulary: tuple[str, ...],
) -> DivergenceSums:
    """The sums of one device; `vocabulary` are the mesh axes that split the tables."""
    B, T, _ = hidden.shape

    def of_chunk(hidden: Array, teacher_hidden: Array, targets: Array, mask: Array) -> DivergenceSums:
        ours, theirs = (jnp.einsum("BTD,VD->BTV", x, w, preferred_element_type=jnp.float32)
                        for x, w in ((hidden, table), (teacher_hidden, teacher_table)))
        return _chunk_sums(ours, theirs, targets, mask, temperature, vocabulary)

    chunk = chunk_size(B, T, 2 * table.shape[0], chunk_elements)
    if chunk == T:
        return of_chunk(hidden, teacher_hidden, targets, mask)

    @jax.checkpoint
    def step(sums: DivergenceSums, part: tuple[Array, Array, Array, Array]) -> tuple[DivergenceSums, None]:
        return jax.tree.map(jnp.add, sums, of_chunk(*part)), None

    zero = jnp.zeros((), jnp.float32)
    parts = tuple(split(x, chunk) for x in (hidden, teacher_hidden, targets, mask))
    return jax.lax.scan(step, DivergenceSums(zero, zero, zero, zero), parts)[0]


def _chunk_sums(
    ours: Float[Array, "B T V"], theirs: Float[Array, "B T V"], targets: Int[Array, "B T"], mask: Bool[Array, "B T"],
    temperature: float, vocabulary: tuple[str, ...],
) -> DivergenceSums:
    def total(x: Array) -> Array:
        return jax.lax.psum(x, vocabulary) if vocabulary else x

    def weights(logits: Array) -> tuple[Array, Array, Array]:
        """Largest logit of each position, `exp(logits - largest)`, and the sum of these."""
        top = jax.lax.stop_gradient(logits.max(axis=-1))
        top = jax.lax.pmax(top, vocabulary) if vocabulary else top
        exponentials = jnp.exp(logits - top[..., None])
        return top, exponentials, total(exponentials.sum(axis=-1))

    theirs = jax.lax.stop_gradient(theirs)
    top, _, norm = weights(ours / temperature)
    their_top, exponentials, their_norm = weights(theirs / temperature)
    # Multiplied as the gradient of log(norm) is: where both models are the same, the two cancel to the last bit.
    p = exponentials * (1 / their_norm)[..., None]
    apart = total(jnp.sum(p * (theirs - ours), axis=-1)) / temperature
    apart += (top + jnp.log(norm)) - (their_top + jnp.log(their_norm))
    terms = [temperature**2 * apart]
    for logits in (ours, theirs):
        _, log_partition, chosen = read_logits(logits, targets, vocabulary)
        terms.append(log_partition - chosen)
    kl, nll, teacher_nll = (jnp.sum(jnp.where(mask, term, 0.0)) for term in terms)
    return DivergenceSums(kl, nll, teacher_nll, jnp.sum(mask, dtype=jnp.float32))
