"""Held-out loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mfa_jax.config import TrainConfig
from mfa_jax.data import Prepared, eval_batches
from mfa_jax.train.feed import to_mesh
from mfa_jax.train.losses import BatchSums, Loss
from mfa_jax.train.step import TrainState, data_shard, in_parts


def make_evaluation(
    config: TrainConfig, loss: Loss, given: tuple[Any, ...], prepared: Prepared, mesh: Mesh
) -> Callable[[TrainState], dict[str, float]]:
    """A function of the state: loss in nats per token and bits per byte on the same held-out batches each time, and the
    loss's other terms, of the weights (`eval_*`) and, where there is one, of their moving average (`eval_ema_*`). Empty
    where nothing is held out.

    Args:
      given: what the loss is given beside the batch.
    """
    # In the parts of a training step: what fits into memory there does here.
    jitted = jax.jit(in_parts(config.accumulate, loss), out_shardings=NamedSharding(mesh, PartitionSpec()))
    size = prepared.size("held_out")

    def means(params: Any) -> dict[str, float]:
        """Over all targets.

        A batch is read while the one before it is computed, and no two are computed at once: of hundreds that are in
        flight, each with sums over devices, the threads of a CPU's devices may wait for each other, for ever.
        """
        every: list[BatchSums] = []
        for batch in eval_batches(prepared, config.data, config.eval_batches,
                                  *data_shard(mesh, config.data.batch_size)):
            placed = to_mesh(batch, mesh)
            jax.block_until_ready(every[-1:])
            every.append(jitted(params, placed, *given))
        totals = [{"loss": sums.nll, **sums.terms} for sums in every]
        count = sum(float(sums.tokens) for sums in every)
        return {name: sum(float(total[name]) for total in totals) / count for name in totals[0]}

    def evaluate(state: TrainState) -> dict[str, float]:
        found: dict[str, float] = {}
        for prefix, params in (("eval", state.params), ("eval_ema", state.ema)):
            if params and size.tokens > 1:
                values = means(params)
                values["bits_per_byte"] = values["loss"] / math.log(2) / size.bytes_per_token
                found |= {f"{prefix}_{name}": value for name, value in values.items()}
        return found

    return evaluate
