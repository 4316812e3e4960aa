"""Held-out loss."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mfa_jax.config import TrainConfig
from mfa_jax.data import Prepared, eval_batches
from mfa_jax.model.transformer import Transformer
from mfa_jax.train.feed import to_mesh
from mfa_jax.train.step import BatchSums, TrainState, batch_loss, data_shard


def make_evaluation(
    config: TrainConfig, model: Transformer, prepared: Prepared, mesh: Mesh
) -> Callable[[TrainState], dict[str, float]]:
    """A function of the state: loss in nats per token and bits per byte on the same held-out batches each time, of the
    weights (`eval_*`) and, where there is one, of their moving average (`eval_ema_*`). Empty where nothing is held out.
    """
    plain = dataclasses.replace(config, z_loss=0.0)
    jitted = jax.jit(lambda params, batch: batch_loss(plain, model, params, batch),
                     out_shardings=NamedSharding(mesh, PartitionSpec()))
    size = prepared.size("held_out")

    def loss(params: Any) -> float:
        every: list[BatchSums] = [
            jitted(params, to_mesh(batch, mesh)) for batch in eval_batches(
                prepared, config.data, config.eval_batches, *data_shard(mesh, config.data.batch_size))]
        return sum(float(sums.nll) for sums in every) / sum(float(sums.tokens) for sums in every)

    def evaluate(state: TrainState) -> dict[str, float]:
        found: dict[str, float] = {}
        for prefix, params in (("eval", state.params), ("eval_ema", state.ema)):
            if params and size.tokens > 1:
                nats = loss(params)
                found |= {f"{prefix}_loss": nats,
                          f"{prefix}_bits_per_byte": nats / math.log(2) / size.bytes_per_token}
        return found

    return evaluate
