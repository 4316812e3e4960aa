"""What every attention variant is tested with: small configs, inputs, and one jitted model for each."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from mfa_jax.config import (
    VARIANTS,
    AttentionConfig,
    GQAConfig,
    MFAConfig,
    MFAKRConfig,
    MLAConfig,
    ModelConfig,
    PositionConfig,
)
from mfa_jax.model.transformer import Transformer, init_cache, unstack_layers

# The variants, and GQA with all that public checkpoints add to it.
ATTENTION: dict[str, AttentionConfig] = {
    "mha": GQAConfig(num_heads=4, num_kv_heads=4, head_dim=8),
    "gqa": GQAConfig(num_heads=4, num_kv_heads=2, head_dim=8),
    "mqa": GQAConfig(num_heads=4, num_kv_heads=1, head_dim=8),
    "mla": MLAConfig(num_heads=4, nope_dim=8, rope_dim=4, value_dim=6, latent_dim=16, query_rank=12),
    "mfa": MFAConfig(num_heads=4, latent_dim=16, query_rank=12),
    "mfa_kr": MFAKRConfig(num_heads=4, latent_dim=16, query_rank=12, alpha_init=0.5),
    "gqa_bias_norm": GQAConfig(num_heads=4, num_kv_heads=2, head_dim=8, qkv_bias=True, qk_norm=True),
}
assert tuple(ATTENTION)[:-1] == VARIANTS
ENCODINGS = ("rope", "alibi", "none")
B, T, V, L = 3, 9, 32, 2
# Rounding cached keys and values to bfloat16, relative 2 ** -9, moves logits of unit variance by hundredths; int8
# rounds to 1 / 254 of a token's largest element, some 2.5 of its root mean square: at most five times as coarse.
CACHE_DTYPES = {"float32": 2e-5, "bfloat16": 0.06, "int8": 0.12}


def model_config(variant: str, encoding: str = "rope", **changes: object) -> ModelConfig:
    config = ModelConfig(vocab_size=V, num_layers=L, model_dim=24, ffn_dim=32, attention=ATTENTION[variant],
                         position=PositionConfig(kind=encoding, base=100.0))
    return dataclasses.replace(config, **changes)


def tokens(seed: int = 1, shape: tuple[int, ...] = (B, T)) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), shape, 0, V)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A model, its parameters, and its jitted forward with and without a cache."""

    config: ModelConfig
    model: Transformer
    params: dict
    full: object
    step: object

    def cache(self, batch: int, capacity: int, dtype: str | None = None) -> object:
        return init_cache(self.config, batch, capacity, dtype, self.model.scan_layers)


@functools.cache
def compiled(config: ModelConfig, scan_layers: bool = True) -> Compiled:
    """The same parameters for layers that are scanned over and for such that follow one another.

    What Pallas interprets needs the latter, the form that decoding uses: with JAX 0.12 its ordered callbacks do not
    pass through flax's scan.
    """
    scanned, model = Transformer(config), Transformer(config, scan_layers)
    params = nn.unbox(jax.jit(scanned.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))["params"]
    params = jax.tree_util.tree_map_with_path(_moved, params)
    if not scan_layers:
        params = unstack_layers(params, config.num_layers)

    @jax.jit
    def full(params, tokens, positions=None, segments=None):
        return model.apply({"params": params}, tokens, positions, segments)[0]

    @jax.jit
    def step(params, tokens, cache):
        return model.apply({"params": params}, tokens, cache=cache)

    return Compiled(config, model, params, full, step)


def layers_of(cache: object) -> tuple:
    """The caches of a model, one for all layers or one each."""
    return cache if isinstance(cache, tuple) else (cache,)


def cut_back(cache: object, lengths: jax.Array) -> object:
    """The cache with rows of such lengths: a padded prefill, cut back to the prompts."""
    if isinstance(cache, tuple):
        return tuple(layer.with_length(lengths) for layer in cache)
    return cache.with_length(jnp.broadcast_to(lengths, cache.length.shape))


def _moved(path: tuple, leaf: jax.Array) -> jax.Array:
    """Biases start at zero, where they do nothing: here they are of the size of what they are added to."""
    return jax.random.normal(jax.random.key(7), leaf.shape, leaf.dtype) if path[-1].key.startswith("b_") else leaf
