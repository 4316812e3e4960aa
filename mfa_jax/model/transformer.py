"""The language model: `tokens -> embed -> L x (norm, attention, +; norm, ffn, +) -> norm -> logits`."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from mfa_jax import attention
from mfa_jax.axes import constrain
from mfa_jax.cache import Cache
from mfa_jax.config import ModelConfig
from mfa_jax.layers import RMSNorm, at_path, partitioned, stacked_blocks
from mfa_jax.model.embedding import look_up
from mfa_jax.model.moe import Routing
from mfa_jax.model.stack import Block, Stack, joined, layer_kinds, scanned
from mfa_jax.positions import rope_frequencies


class States(NamedTuple):
    """What a forward pass leaves."""

    hidden: Float[Array, "B T D"]
    """The normed state that logits are read from."""
    cache: Any
    """The cache with these tokens in it; None without one."""
    routing: Routing | None
    """What the routers did: a row for each of `config.moe_layers`; None for a dense model."""
    streams: Float[Array, "L B T D"] | None
    """The residual stream after each layer; None unless the model keeps them."""


class Transformer(nn.Module):
    """The decoder-only model of a `ModelConfig`.

    With `scan_layers` the blocks are one scanned block whose parameters and caches carry a leading layer axis: one
    compilation of a block, whatever L is; training and checkpoints use this form. Where some layers have experts and
    some have not, `layers` holds segments, each scanned (`layers.stacked_blocks` says which layer lies where); caches
    are stacked over all layers all the same. Without it the blocks stand one after the other (`unstack_layers` makes
    their parameters) and the caches are a tuple: decoding uses that form, since a scan copies every layer's cache in
    each step.

    Parameters: `embed [V, D]` and, unless tied, `unembed [V, D]` (normal, standard deviation D ** -0.5, so that logits
    of a normed state start with unit variance), `layers`, `final_norm`.
    """

    config: ModelConfig
    scan_layers: bool = True
    keep_streams: bool = False
    """Whether `states` has the streams."""

    def setup(self) -> None:
        c = self.config
        table = partitioned(nn.initializers.normal(c.model_dim**-0.5), ("vocab", "embed"))
        param_dtype = jnp.dtype(c.param_dtype)
        self.embed = self.param("embed", table, (c.vocab_size, c.model_dim), param_dtype)
        if not c.tie_embeddings:
            self.unembed = self.param("unembed", table, (c.vocab_size, c.model_dim), param_dtype)
        self.final_norm = RMSNorm(c.norm_eps, jnp.dtype(c.dtype), param_dtype)
        kinds = layer_kinds(c)
        if not self.scan_layers:
            self.layers: Any = [Block(c, has_experts, self.keep_streams) for has_experts in kinds]
        elif len(set(kinds)) == 1:
            self.layers = scanned(Block, c.num_layers, c, has_experts=kinds[0],
                                  keep_stream=self.keep_streams)
        else:
            self.layers = Stack(c, self.keep_streams)

    def __call__(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"] | None = None,
        segments: Int[Array, "B T"] | None = None, cache: Any = None,
    ) -> tuple[Float[Array, "B T V"], Any]:
        """Float32 logits of the token after each position, and the cache with these tokens in it (None without one)."""
        x, cache = self.hidden(tokens, positions, segments, cache)
        return self.logits(x), cache

    def hidden(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"] | None = None,
        segments: Int[Array, "B T"] | None = None, cache: Any = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """The normed state that logits are read from.

        Args:
          tokens: ids, 0 .. V - 1.
          positions: of each token; None for 0 .. T - 1, or with a cache for what follows each row's tokens.
          segments: documents packed in a row, from 1; 0 is padding. None for one document.
          cache: as `init_cache` made it, for the same `scan_layers`; None in training.
        """
        return self.states(tokens, positions, segments, cache)[:2]

    def states(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"] | None = None,
        segments: Int[Array, "B T"] | None = None, cache: Any = None,
    ) -> States:
        """As `hidden`, with what else the layers left."""
        c = self.config
        if positions is None:
            start = 0 if cache is None else cache_length(cache)[:, None]
            positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
        x = look_up(self.embed, tokens, c.dtype)
        inv_freq = layer_frequencies(c)
        if self.scan_layers:
            x, (cache, routing, streams) = self.layers(x, positions, segments, cache, inv_freq)
        else:
            outputs = []
            for i, block in enumerate(self.layers):
                x, out = block.compute(x, positions, segments, None if cache is None else cache[i],
                                       None if inv_freq is None else inv_freq[i])
                outputs.append(out)
            cache = None if cache is None else tuple(layer_cache for layer_cache, _, _ in outputs)
            _, routing, streams = joined([(None, *rest) for _, *rest in outputs], jnp.stack)
        x = self.final_norm(constrain(x, "batch", "sequence", "act_embed"))
        return States(x, cache, routing, streams)

    def logits(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Float32 logits of normed states."""
        table = self.embed if self.config.tie_embeddings else self.unembed
        return jnp.einsum("...D,VD->...V", x, table.astype(x.dtype), preferred_element_type=jnp.float32)


def init_params(model: Transformer, key: Key[Array, ""]) -> Any:
    """Parameters at their initial values, each with the logical names of its axes; whatever kernels compute the model,
    and whether they can serve here."""
    model = model.clone(config=dataclasses.replace(
        model.config, attention_implementation="auto", expert_implementation="auto", expert_exchange="auto"))
    return model.init(key, jnp.zeros((1, 2), jnp.int32))["params"]


def layer_frequencies(config: ModelConfig) -> Float[Array, "L W"] | None:
    """Rope frequencies of each layer: the config's own table, or the same for all; None without rope."""
    if config.position.kind != "rope":
        return None
    if config.inv_freq is not None:
        return jnp.asarray(config.inv_freq, jnp.float32)
    row = rope_frequencies(config.attention.rotated_dim, config.position.base, config.position.scaling)
    return jnp.broadcast_to(jnp.asarray(row), (config.num_layers, len(row)))


def unembedding(params: Any, config: ModelConfig) -> Float[Array, "V D"]:
    """The table that logits are read out with."""
    return params["embed" if config.tie_embeddings else "unembed"]


def unstack_layers(params: Any, num_layers: int) -> Any:
    """Parameters of `scan_layers=True` as those of `scan_layers=False`."""
    rest = {name: leaf for name, leaf in params.items() if name != "layers"}
    layers = {}
    for path, indices in stacked_blocks(params["layers"]):
        block = at_path(params["layers"], path)
        for row, i in enumerate(indices):
            layers[f"layers_{i}"] = jax.tree.map(lambda leaf: leaf[row], block)  # noqa: B023
    return {**rest, **{name: layers[name] for name in (f"layers_{i}" for i in range(num_layers))}}


def init_cache(
    config: ModelConfig, batch: int, capacity: int, dtype: Any = None, scan_layers: bool = True
) -> Any:
    """Empty caches of all layers: stacked on a leading axis for `scan_layers`, else a tuple.

    Args:
      dtype: of the cached arrays; None for the config's compute type.
    """
    def one() -> Cache:
        return attention.init_cache(config.attention, batch, capacity, jnp.dtype(dtype or config.dtype))

    if not scan_layers:
        return tuple(one() for _ in range(config.num_layers))
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (config.num_layers, *leaf.shape)), one())


def cache_length(cache: Any) -> Int[Array, " B"]:
    """Tokens of each row of a model's caches, stacked or a tuple."""
    return cache[0].length if isinstance(cache, tuple) else cache.length[0]
