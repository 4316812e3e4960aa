"""The programs that a plan compiles: a training step as the loop runs it, the loop that decodes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mfa_jax.config import GQAConfig, ModelConfig, TrainConfig
from mfa_jax.generate import SamplingConfig, lower_decode
from mfa_jax.generate.loop import abstract_state
from mfa_jax.kernels import sharded
from mfa_jax.model.transformer import Transformer
from mfa_jax.train import run
from mfa_jax.train.optimizer import make_optimizer, make_schedule
from mfa_jax.train.step import (
    TrainState,
    abstract_batch,
    jit_step,
    make_train_step,
    require_divisible_batch,
    state_layout,
)


def training_state(config: TrainConfig, mesh: Mesh) -> TrainState:
    """The abstract state of a run, each leaf with its place on the mesh.

    Raises:
      ValueError: a size of the model that does not divide over its mesh axes.
    """
    model = Transformer(config.model)
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(config.optimizer, config.steps, run.abstract_params(model, mesh))
        return state_layout(config, model, optimizer, mesh)


def training_arguments(config: TrainConfig, mesh: Mesh) -> int:
    """Bytes of the state and the batch on one device.

    Raises:
      ValueError: a batch or a size of the model that does not divide over its mesh axes.
    """
    require_divisible_batch(config, mesh)
    return bytes_per_device((training_state(config, mesh), abstract_batch(config, mesh)))


def lower_training(config: TrainConfig, mesh: Mesh) -> jax.stages.Lowered:
    """One update of the run, state donated.

    Raises:
      ValueError: a batch or a size of the model that does not divide over its mesh axes.
    """
    require_divisible_batch(config, mesh)
    model, layout = Transformer(config.model), training_state(config, mesh)
    optimizer = make_optimizer(config.optimizer, config.steps, layout.params)
    step = make_train_step(config, model, optimizer, make_schedule(config.optimizer, config.steps))
    with jax.set_mesh(mesh):
        return jit_step(step, layout).lower(layout, abstract_batch(config, mesh))


@dataclasses.dataclass(frozen=True)
class Decoding:
    """What is decoded: `rows` sequences, a token each at a time, each with room for `capacity` tokens."""

    model: ModelConfig
    rows: int
    capacity: int
    cache_dtype: str | None = None
    """None for the model's compute type."""


def lower_decoding(decoding: Decoding, mesh: Mesh) -> jax.stages.Lowered:
    """The loop that decodes greedily, caches donated.

    Raises:
      ValueError: a size of the model that does not divide over its mesh axes.
    """
    model = Transformer(decoding.model)
    with jax.set_mesh(mesh):
        return lower_decode(model, run.abstract_params(model, mesh), **_options(decoding))


def decoding_arguments(decoding: Decoding, mesh: Mesh) -> int:
    """Bytes of the parameters, the caches and what each row got, on one device.

    Raises:
      ValueError: a size of the model that does not divide over its mesh axes.
    """
    model = Transformer(decoding.model)
    with jax.set_mesh(mesh):
        params = run.abstract_params(model, mesh)
        return bytes_per_device((params, abstract_state(model, params, **_options(decoding))))


def cache_place(decoding: Decoding, mesh: Mesh) -> str:
    """What the mesh splits of each layer's cache, as `kernels.sharded.choose` has it, and over which axes it is held
    more than once, because they divide neither its rows nor what else they could split."""
    attention = decoding.model.attention
    layout = sharded.choose(
        mesh.shape, B=decoding.rows, N=attention.num_heads, S=decoding.capacity, layout=decoding.model.decode_layout,
        K=attention.num_kv_heads if isinstance(attention, GQAConfig) else 1)
    wide = [axis for axis, size in mesh.shape.items() if size > 1]
    split = {what: [axis for axis in axes if axis in wide] for what, axes in (
        ("rows", layout.cache_rows), ("key heads", layout.cache_heads), ("positions", layout.sequence))}
    parts = [f"{what} over {' x '.join(axes)}" for what, axes in split.items() if axes]
    idle = [axis for axis in wide if not any(axis in axes for axes in split.values())]
    return "; ".join([", ".join(parts) or "not split",
                      *(f"the same on all chips of {axis}={mesh.shape[axis]}" for axis in idle)])


def _options(decoding: Decoding) -> dict[str, Any]:
    return {"batch_size": decoding.rows, "capacity": decoding.capacity, "cache_dtype": decoding.cache_dtype,
            "sampling": SamplingConfig(temperature=0)}


def bytes_per_device(tree: Any) -> int:
    """Bytes that one device holds of abstract arrays, without padding to tiles."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize
               for leaf in jax.tree.leaves(tree) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))
