"""What training does with the routers of a mixture of experts: sums over a batch, metrics, biases."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mfa_jax.config import ModelConfig
from mfa_jax.layers import at_path, stacked_blocks
from mfa_jax.model.moe import Routing, updated_bias


class RoutingSums(NamedTuple):
    """Of each layer that has experts, in the order of `ModelConfig.moe_layers`; parts of a batch add up."""

    counts: Int[Array, "M E"]
    """Tokens of each expert."""
    dropped: Int[Array, " M"]
    """Choices that no expert served."""
    entropy: Float[Array, " M"]
    """Entropy of the router's scores in nats, summed over tokens."""
    tokens: Float[Array, " M"]
    """Tokens that were routed."""
    balance: Float[Array, " M"]
    """Balance loss before its weight, summed over the targets (each has that of its row)."""


def routing_sums(routing: Routing, targets: Int[Array, " B"]) -> RoutingSums:
    """The sums of a batch with so many targets in each row."""
    balance = jnp.einsum("MB,B->M", routing.balance, targets.astype(jnp.float32))
    return RoutingSums(routing.counts, routing.dropped, routing.entropy, routing.tokens, balance)


def metrics(model: ModelConfig, sums: RoutingSums | None, targets: Float[Array, ""]) -> dict[str, Array]:
    """Of the batch: drops and the mean balance loss; of each layer: counts, the largest over their mean, entropy."""
    if sums is None:
        return {}
    found: dict[str, Array] = {"dropped_tokens": jnp.sum(sums.dropped),
                               "balance_loss": jnp.mean(sums.balance) / targets}
    for row, layer in enumerate(model.moe_layers):
        counts = sums.counts[row]
        found[f"expert_counts/layer_{layer}"] = counts
        found[f"expert_max_load/layer_{layer}"] = jnp.max(counts) / jnp.maximum(jnp.mean(counts), 1)
        found[f"router_entropy/layer_{layer}"] = sums.entropy[row] / jnp.maximum(sums.tokens[row], 1)
    return found


def balance_biases(params: Any, model: ModelConfig, counts: Int[Array, "M E"]) -> Any:
    """The parameters with the routers' biases moved by what the batch did, as `moe.updated_bias` says."""
    assert model.moe is not None
    rate = model.moe.bias_update_rate
    if not rate:
        return params
    layers = params["layers"]
    for path, indices in stacked_blocks(layers):
        block = at_path(layers, path)
        if "moe" in block:
            rows = np.array([model.moe_layers.index(i) for i in indices])
            bias = updated_bias(block["moe"]["router_bias"], counts[rows], rate)
            layers = _with_leaf(layers, (*path, "moe", "router_bias"), bias)
    return {**params, "layers": layers}


def _with_leaf(tree: Any, path: tuple[str, ...], leaf: jax.Array) -> Any:
    """Nested dicts with one leaf replaced."""
    return leaf if not path else {**tree, path[0]: _with_leaf(tree[path[0]], path[1:], leaf)}
