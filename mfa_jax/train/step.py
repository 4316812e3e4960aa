"""State of a training run and the step that advances it."""

from __future__ import annotations

import functools
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
from mfa_jax.config import TrainConfig, require
from mfa_jax.layers import at_path, stacked_blocks
from mfa_jax.model.transformer import Transformer, init_params
from mfa_jax.train import experts
from mfa_jax.train.losses import BatchSums, Loss, batch_loss
from mfa_jax.train.optimizer import group_rates, state_shardings

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
    config: TrainConfig, model: Transformer, optimizer: optax.GradientTransformation, layout: Any, params: Any = None
) -> TrainState:
    """The state at step 0, made where it belongs: only what is replicated is ever whole on one device or host.

    Args:
      params: those it starts with; None for new ones.
    """
    where = jax.tree.map(lambda leaf: leaf.sharding, layout)
    create = jax.jit(_state_from_key(config, model, optimizer), out_shardings=where)
    return create(jax.random.key(config.seed), params)


def _state_from_key(config: TrainConfig, model: Transformer, optimizer: optax.GradientTransformation) -> Callable:
    def create(key: Key[Array, ""], params: Any = None) -> TrainState:
        params = nn.unbox(init_params(model, key)) if params is None else params
        ema = jax.tree.map(jnp.copy, params) if config.ema_decay is not None else {}
        # Moments are float32 whatever the parameters are: in bfloat16 an average of squares stops moving.
        moments = optimizer.init(_wide(params))
        return TrainState(jnp.zeros((), jnp.int32), params, moments, ema, jax.random.fold_in(key, 1))

    return create


def make_train_step(
    config: TrainConfig, model: Transformer, optimizer: optax.GradientTransformation, schedule: optax.Schedule,
    loss: Loss | None = None,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """One update: `step(state, batch, *given) -> state, metrics`, to be jitted with the state donated.

    The gradient is that of the mean over all targets of the batch, whatever `accumulate` is (but for a balance loss
    over the batch, which is over a part of it then). After the update the selection biases of routers move. Of numbers
    that are not finite the metrics tell: `bad_leaf` is the index in `watched_leaves` of the first gradient or update
    with one, or -1. The state has them too, and is to be thrown away; to keep the one before, every write would have
    to wait for all updates (on an H100 6 % of the bytes that a step moves, `experiments/results/gpu`).

    Args:
      loss: is handed `given`; None for `batch_loss`, which takes nothing.

    Raises:
      ValueError: a config with a teacher, and no loss that asks it.
    """
    require(loss is not None or config.distillation is None, "distillation", config.distillation,
            "needs a loss that asks the teacher")
    gradient = _accumulated(config, functools.partial(batch_loss, config, model) if loss is None else loss)

    def step(state: TrainState, batch: Any, *given: Any) -> tuple[TrainState, dict[str, Array]]:
        sums, grads = gradient(state.params, batch, *given)
        count = jnp.maximum(sums.tokens, 1)
        grads = jax.tree.map(lambda g: g / count, grads)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        if sums.routing is not None and config.optimizer.rates.feed_forward > 0:
            params = experts.balance_biases(params, config.model, sums.routing.counts)
        ema = state.ema
        if config.ema_decay is not None:
            ema = optax.incremental_update(params, state.ema, 1 - config.ema_decay)
        bad_leaf = _first_bad([*jax.tree.leaves(grads), *jax.tree.leaves(updates)])
        metrics = {
            "loss": sums.nll / count, "grad_norm": optax.tree.norm(grads), "update_norm": optax.tree.norm(updates),
            "param_norm": optax.tree.norm(_wide(params)), "learning_rate": schedule(state.step), "targets": sums.tokens,
            "bad_leaf": bad_leaf, **{name: total / count for name, total in sums.terms.items()},
            **_alpha_norms(params), **experts.metrics(config.model, sums.routing, count),
        }
        return TrainState(state.step + 1, params, optimizer_state, ema, state.rng), metrics

    return step


def _accumulated(config: TrainConfig, loss: Loss) -> Callable[..., tuple[BatchSums, Any]]:
    """`gradient(params, batch, *given)`: the sums of a batch and their gradient, made in `config.accumulate` parts.

    That of a frozen parameter is zero; no backward pass is made for it.
    """
    def one(params: Any, batch: Any, *given: Any) -> tuple[BatchSums, Any]:
        rates = group_rates(config.optimizer, params)

        def value(params: Any) -> tuple[Float[Array, ""], BatchSums]:
            trained = jax.tree.map(lambda x, rate: x if rate else jax.lax.stop_gradient(x), params, rates)
            sums = loss(trained, batch, *given)
            return sums.loss, sums

        (_, sums), grads = jax.value_and_grad(value, has_aux=True)(params)
        return sums, _wide(grads)

    return in_parts(config.accumulate, one)


def in_parts(count: int, one: Callable[..., Any]) -> Callable[..., Any]:
    """`one(params, batch, *given)`, whose results are sums over rows, of a batch in so many parts, one by one."""
    def many(params: Any, batch: Any, *given: Any) -> Any:
        # Part i takes every count-th row: each device's rows stay on it.
        parts = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)

        def add(total: Any, part: Any) -> tuple[Any, None]:
            part = jax.tree.map(lambda x: axes.constrain(x, "batch", None), part)
            return jax.tree.map(jnp.add, total, one(params, part, *given)), None

        first = jax.tree.map(lambda x: x[0], parts)
        start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, params, first, *given))
        return jax.lax.scan(add, start, parts)[0]

    return one if count == 1 else many


def _wide(tree: Any) -> Any:
    """Its arrays in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def abstract_batch(config: TrainConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """What a step is given beside the state: shapes, types and places of a batch."""
    shape, at = (config.data.batch_size, config.data.sequence_length), NamedSharding(mesh, BATCH_SPEC)
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32 if name == "mask" else jnp.int32, sharding=at)
            for name in ("inputs", "targets", "positions", "segments", "mask")}


def jit_step(step: Callable[..., Any], layout: TrainState) -> Any:
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
