"""State of a training run and the step that advances it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from mfa_jax import axes
from mfa_jax.attention import context
from mfa_jax.config import TrainConfig, require
from mfa_jax.layers import at_path, stacked_blocks
from mfa_jax.model.loss import cross_entropy
from mfa_jax.model.transformer import Transformer, init_params, unembedding
from mfa_jax.train import experts
from mfa_jax.train.optimizer import state_shardings

BATCH_SPEC = axes.RULES.spec("batch")


class TrainState(NamedTuple):
    """All that a run carries from step to step; a checkpoint holds every leaf."""

    step: Int[Array, ""]
    """Updates done."""
    params: Any
    optimizer: Any
    ema: Any
    """Moving average of the parameters; an empty dict without one."""
    rng: Key[Array, ""]
    """Key of the run, for whatever is random in a step."""


def state_layout(config: TrainConfig, model: Transformer, optimizer: optax.GradientTransformation, mesh: Mesh) -> Any:
    """The abstract state, every leaf with its sharding: what a restore needs, and where `create_state` puts things."""
    params_at = axes.shardings(jax.eval_shape(lambda: init_params(model, jax.random.key(0))), mesh)
    abstract = jax.eval_shape(lambda: _state_from_key(config, model, optimizer)(jax.random.key(0)))
    everywhere = NamedSharding(mesh, PartitionSpec())
    at = abstract._replace(
        step=everywhere, params=params_at, rng=everywhere,
        optimizer=state_shardings(abstract.optimizer, abstract.params, params_at),
        ema=params_at if config.ema_decay is not None else {},
    )
    return jax.tree.map(lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), abstract, at)


def create_state(
    config: TrainConfig, model: Transformer, optimizer: optax.GradientTransformation, layout: Any
) -> TrainState:
    """The state at step 0, made where it belongs: only what is replicated is ever whole on one device or host."""
    where = jax.tree.map(lambda leaf: leaf.sharding, layout)
    return jax.jit(_state_from_key(config, model, optimizer), out_shardings=where)(jax.random.key(config.seed))


def _state_from_key(config: TrainConfig, model: Transformer, optimizer: optax.GradientTransformation) -> Callable:
    def create(key: Key[Array, ""]) -> TrainState:
        params = nn.unbox(init_params(model, key))
        ema = jax.tree.map(jnp.copy, params) if config.ema_decay is not None else {}
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema, jax.random.fold_in(key, 1))

    return create


class BatchSums(NamedTuple):
    """Sums over a batch or a part of it; those of the parts add up to those of the whole."""

    loss: Float[Array, ""]
    """What is minimised, in nats: `nll`, the z term, and the balance loss a target."""
    nll: Float[Array, ""]
    """Negative log-likelihood in nats."""
    tokens: Float[Array, ""]
    """Targets that count."""
    routing: experts.RoutingSums | None
    """Of the layers that have experts; None for a dense model."""


def batch_loss(config: TrainConfig, model: Transformer, params: Any, batch: Any) -> BatchSums:
    """Sums of the loss over the targets of a batch (`inputs`, `targets`, `positions`, `segments`, `mask`)."""
    model, batch = _split_sequence(model, batch)
    # A row of one document needs no segments, and kernels that know none (cuDNN) can serve it. Rows are whole: what is
    # padding then are rows of nothing else, whose mask is zero.
    segments = batch["segments"] if config.data.separate_documents else None
    inputs = batch["inputs"], batch["positions"], segments
    output: Any = model.apply({"params": params}, *inputs, method="hidden_and_routing")
    hidden, _, routing = output
    table = unembedding(params, config.model)
    sums = cross_entropy(hidden, table, batch["targets"], batch["mask"] > 0, config.z_loss)
    if routing is None:
        return BatchSums(*sums, None)
    assert config.model.moe is not None
    routed = experts.routing_sums(routing, jnp.sum(batch["mask"] > 0, axis=1))
    return BatchSums(sums.loss + config.model.moe.balance_loss * jnp.sum(routed.balance), sums.nll, sums.tokens, routed)


def _split_sequence(model: Transformer, batch: Any) -> tuple[Transformer, Any]:
    """Where the mesh splits the sequence: the batch in zig-zag order, and the model that takes it so.

    Nothing but attention asks where a token stands; its position and segment travel with it.
    """
    if not context.splits_sequence() or model.config.attention_implementation not in ("auto", "context"):
        return model, batch
    order = context.zigzag(batch["inputs"].shape[1], jax.sharding.get_abstract_mesh().shape["context"])
    batch = {name: axes.constrain(x[:, order], "batch", "sequence") for name, x in batch.items()}
    return Transformer(dataclasses.replace(model.config, attention_implementation="context")), batch


def make_train_step(
    config: TrainConfig, model: Transformer, optimizer: optax.GradientTransformation, schedule: optax.Schedule
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]:
    """One update: `step(state, batch) -> state, metrics`, to be jitted with the state donated.

    The gradient is that of the mean over all targets of the batch, whatever `accumulate` is (but for a balance loss
    over the batch, which is over a part of it then). After the update the selection biases of routers move. A step
    that meets a number that is not finite leaves the state as it was and says so: `bad_leaf` is the index in
    `watched_leaves` of the first gradient or update with such a number, or -1.
    """
    def gradient(params: Any, batch: Any) -> tuple[BatchSums, Any]:
        def loss(params: Any) -> tuple[Float[Array, ""], BatchSums]:
            sums = batch_loss(config, model, params, batch)
            return sums.loss, sums

        (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return sums, grads

    def accumulated(params: Any, batch: Any) -> tuple[BatchSums, Any]:
        if config.accumulate == 1:
            return gradient(params, batch)
        # Part i takes every accumulate-th row: each device's rows stay on it.
        parts = jax.tree.map(lambda x: x.reshape(-1, config.accumulate, *x.shape[1:]).swapaxes(0, 1), batch)

        def add(total: Any, part: Any) -> tuple[Any, None]:
            part = jax.tree.map(lambda x: axes.constrain(x, "batch", None), part)
            return jax.tree.map(jnp.add, total, gradient(params, part)), None

        one = jax.tree.map(lambda x: x[0], parts)
        start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, params, one))
        return jax.lax.scan(add, start, parts)[0]

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        sums, grads = accumulated(state.params, batch)
        count = jnp.maximum(sums.tokens, 1)
        grads = jax.tree.map(lambda g: g / count, grads)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        if sums.routing is not None:
            params = experts.balance_biases(params, config.model, sums.routing.counts)
        ema = state.ema
        if config.ema_decay is not None:
            ema = optax.incremental_update(params, state.ema, 1 - config.ema_decay)
        bad_leaf = _first_bad([*jax.tree.leaves(grads), *jax.tree.leaves(updates)])
        moved = state._replace(step=state.step + 1, params=params, optimizer=optimizer_state, ema=ema)
        metrics = {
            "loss": sums.nll / count, "grad_norm": optax.tree.norm(grads), "update_norm": optax.tree.norm(updates),
            "param_norm": optax.tree.norm(params), "learning_rate": schedule(state.step), "targets": sums.tokens,
            "bad_leaf": bad_leaf, **_alpha_norms(params), **experts.metrics(config.model, sums.routing, count),
        }
        return _where(bad_leaf < 0, moved, state), metrics

    return step


def abstract_batch(config: TrainConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """What a step is given beside the state: shapes, types and places of a batch."""
    shape, at = (config.data.batch_size, config.data.sequence_length), NamedSharding(mesh, BATCH_SPEC)
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32 if name == "mask" else jnp.int32, sharding=at)
            for name in ("inputs", "targets", "positions", "segments", "mask")}


def jit_step(step: Callable[[TrainState, Any], Any], layout: TrainState) -> Any:
    """A step compiled for states of that layout, which it takes over; every process has all of its metrics."""
    where = jax.tree.map(lambda leaf: leaf.sharding, layout)
    return jax.jit(step, donate_argnums=0, out_shardings=(where, layout.step.sharding))


def data_shard(mesh: Mesh, rows: int) -> tuple[int, int]:
    """Which part of a batch of so many rows this process reads, and how many parts there are.

    Processes whose devices hold the same rows (those that `tensor` or `context` spans) read the same part.

    Raises:
      ValueError: the mesh gives processes rows that overlap and are not the same.
    """
    held: dict[int, set[int]] = {}
    device: Any
    for device, (part,) in NamedSharding(mesh, BATCH_SPEC).devices_indices_map((rows,)).items():
        held.setdefault(device.process_index, set()).add(part.indices(rows)[0])
    parts = sorted({tuple(sorted(starts)) for starts in held.values()})
    require(sum(map(len, parts)) == len(set().union(*held.values())), "mesh", dict(mesh.shape),
            f"some of the {len(held)} processes would hold some rows of others; each must hold rows of its own, or the "
            f"same as another: make data x fsdp x expert a multiple of the processes, or the reverse")
    return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)


def require_divisible_batch(config: TrainConfig, mesh: Mesh) -> None:
    """Refuses a batch whose rows or tokens do not divide over the mesh.

    Raises:
      ValueError: with the rows or the tokens, and the shards.
    """
    split = {axis: mesh.shape[axis] for axis in axes.RULES.batch or ()}
    shards = math.prod(split.values())
    part = config.data.batch_size // config.accumulate
    require(part % shards == 0, "data.batch_size", config.data.batch_size,
            f"each of accumulate={config.accumulate} parts has {part} rows; must be a multiple of the "
            f"{shards} shards of mesh {', '.join(f'{axis}={size}' for axis, size in split.items())}")
    chunks, T = 2 * mesh.shape["context"], config.data.sequence_length
    require(chunks == 2 or T % chunks == 0, "data.sequence_length", T,
            f"must be a multiple of {chunks}, two chunks for each shard of mesh context={mesh.shape['context']}")


def _where(condition: Array, moved: TrainState, state: TrainState) -> TrainState:
    """`moved` where the condition holds, else `state`; the key, which no step changes, as it is."""
    chosen = jax.tree.map(lambda new, old: jnp.where(condition, new, old), moved[:-1], state[:-1])
    return TrainState._make((*chosen, state.rng))


def watched_leaves(params: Any) -> list[str]:
    """Names of what `bad_leaf` counts: the gradient of each parameter, then its update."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return [f"gradient of {path}" for path in paths] + [f"update of {path}" for path in paths]


def _first_bad(leaves: list[Array]) -> Int[Array, ""]:
    bad = jnp.stack([~jnp.all(jnp.isfinite(leaf)) for leaf in leaves])
    return jnp.where(jnp.any(bad), jnp.argmax(bad), -1).astype(jnp.int32)


def _alpha_norms(params: Any) -> dict[str, Float[Array, ""]]:
    """Norm of MFA-KR's alpha in each layer: how far values have moved away from keys."""
    found: dict[str, Array] = {}
    for path, indices in stacked_blocks(params["layers"]):
        alpha = at_path(params["layers"], path)["attention"].get("alpha")
        rows = [] if alpha is None else zip(indices, alpha, strict=True)
        found |= {f"alpha_norm/layer_{i}": jnp.linalg.norm(row.astype(jnp.float32)) for i, row in rows}
    return found
