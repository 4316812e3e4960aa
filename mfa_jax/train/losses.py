"""What a step minimises: the cross entropy of the text, or the distance from another model, the teacher."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mfa_jax import axes
from mfa_jax.attention import context
from mfa_jax.config import ModelConfig, TrainConfig, require
from mfa_jax.model.divergence import divergence
from mfa_jax.model.loss import cross_entropy
from mfa_jax.model.moe import Routing
from mfa_jax.model.transformer import Transformer, unembedding
from mfa_jax.train import experts, integrity


class BatchSums(NamedTuple):
    """Sums over a batch or a part of it; those of the parts add up to those of the whole."""

    loss: Float[Array, ""]
    """What is minimised, in nats, with the balance loss a target."""
    nll: Float[Array, ""]
    """Negative log-likelihood in nats."""
    tokens: Float[Array, ""]
    """Targets that count."""
    routing: experts.RoutingSums | None
    """Of the layers that have experts; None for a dense model."""
    terms: dict[str, Float[Array, ""]]
    """Parts of the loss that metrics tell by name."""


class Loss(Protocol):
    """What a step minimises."""

    def __call__(self, params: Any, batch: Any, *given: Any) -> BatchSums:
        """Sums over the targets of a batch (`inputs`, `targets`, `positions`, `segments`, `mask`).

        Args:
          given: what the step is given beside its state and the batch; it is read and not trained.
        """


def batch_loss(config: TrainConfig, model: Transformer, params: Any, batch: Any) -> BatchSums:
    """Cross entropy and z term."""
    (model,), batch = _split_sequence((model,), batch)
    states = _states(config, model, params, batch)
    sums = cross_entropy(states.hidden, unembedding(params, config.model), batch["targets"], batch["mask"] > 0,
                         config.z_loss)
    return _with_balance(config, batch, states.routing, BatchSums(*sums, None, {}))


def _states(config: TrainConfig, model: Transformer, params: Any, batch: Any) -> Any:
    # A row of one document needs no segments, and kernels that know none (cuDNN) can serve it. What is padding then, at
    # the end of a held-out row or all of one, is seen by no token before it, and its own targets are masked out.
    segments = batch["segments"] if config.data.separate_documents else None
    inputs = batch["inputs"], batch["positions"], segments
    return model.apply({"params": params}, *inputs, method="states")


def _with_balance(config: TrainConfig, batch: Any, routing: Routing | None, sums: BatchSums) -> BatchSums:
    if routing is None:
        return sums
    assert config.model.moe is not None
    routed = experts.routing_sums(routing, jnp.sum(batch["mask"] > 0, axis=1))
    return sums._replace(loss=sums.loss + config.model.moe.balance_loss * jnp.sum(routed.balance), routing=routed)


def _split_sequence(models: tuple[Transformer, ...], batch: Any) -> tuple[tuple[Transformer, ...], Any]:
    """Where the mesh splits the sequence: the batch in zig-zag order, and the models that take it so.

    Nothing but attention asks where a token stands; its position and segment travel with it. All models have the
    attention implementation of the first.
    """
    if not context.splits_sequence() or models[0].config.attention_implementation not in ("auto", "context"):
        return models, batch
    order = context.zigzag(batch["inputs"].shape[1], jax.sharding.get_abstract_mesh().shape["context"])
    batch = {name: axes.constrain(x[:, order], "batch", "sequence") for name, x in batch.items()}
    return tuple(model.clone(config=dataclasses.replace(model.config, attention_implementation="context"))
                 for model in models), batch


# ---- a teacher -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Teacher:
    """The model that a run learns from, its parameters placed on the mesh of the run."""

    config: ModelConfig
    params: Any
    tokenizer: str
    """`encoding` of its tokenizer."""

    @functools.cached_property
    def digest(self) -> str:
        """Of its weights, as they are held here; all processes ask for it together."""
        return integrity.digest(integrity.describe(self.params))


def teacher_config(config: TrainConfig, teacher: ModelConfig) -> ModelConfig:
    """The teacher's config, computed as the run's model is, and without a backward pass.

    Raises:
      ValueError: a teacher that the run's model cannot learn from; the field, its value and what would be accepted.
    """
    assert config.distillation is not None
    model, name = config.model, config.distillation.teacher
    fields = ["vocab_size"] + (["num_layers", "model_dim"] if config.distillation.hidden else [])
    for field in fields:
        why = "" if field == "vocab_size" else f", or distillation.hidden=0 (now {config.distillation.hidden})"
        require(getattr(teacher, field) == getattr(model, field), f"teacher {name!r} {field}", getattr(teacher, field),
                f"must be the student's {getattr(model, field)}{why}")
    same = {field: getattr(model, field) for field in ("dtype", "attention_implementation", "expert_implementation",
                                                       "expert_exchange", "expert_exchange_tokens")}
    return dataclasses.replace(teacher, remat="none", **same)


def distillation_loss(
    config: TrainConfig, model: Transformer, teacher: Transformer, params: Any, batch: Any, teacher_params: Any
) -> BatchSums:
    """What `config.distillation` says; its terms are `kl`, the divergence times the square of the temperature,
    `teacher_loss`, the teacher's own negative log-likelihood, and with a weight of the hidden states `hidden`."""
    wanted = config.distillation
    assert wanted is not None
    (model, teacher), batch = _split_sequence((model, teacher), batch)
    if wanted.hidden:
        model, teacher = model.clone(keep_streams=True), teacher.clone(keep_streams=True)
    mask = batch["mask"] > 0
    theirs = jax.lax.stop_gradient(_states(config, teacher, teacher_params, batch))
    states = _states(config, model, params, batch)
    sums = divergence(states.hidden, unembedding(params, config.model), theirs.hidden,
                      unembedding(teacher_params, teacher.config), batch["targets"], mask,
                      temperature=wanted.temperature)
    loss = (1 - wanted.cross_entropy) * sums.divergence + wanted.cross_entropy * sums.nll
    terms = {"kl": sums.divergence, "teacher_loss": sums.teacher_nll}
    if wanted.hidden:
        terms["hidden"] = stream_distance(states.streams, theirs.streams, mask)
        loss += wanted.hidden * terms["hidden"]
    return _with_balance(config, batch, states.routing, BatchSums(loss, sums.nll, sums.tokens, None, terms))


def stream_distance(
    streams: Float[Array, "L B T D"], theirs: Float[Array, "L B T D"], mask: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """`sum_t mask_t mean_l |x_lt - y_lt|^2 / |y_lt|^2` in float32: each token by its own size, since a few, such as the
    first of a row, are larger than the others by orders."""
    streams, theirs = streams.astype(jnp.float32), theirs.astype(jnp.float32)
    apart = jnp.sum((streams - theirs) ** 2, axis=-1) / jnp.maximum(jnp.sum(theirs**2, axis=-1), 1e-12)
    return jnp.sum(jnp.where(mask, jnp.mean(apart, axis=0), 0.0))
