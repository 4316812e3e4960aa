"""The attention variants behind one interface.

`build(config, position, ...)` gives the module; calling it is the same for all:

    y, cache = module.apply({"params": params}, x, positions, segments=None, cache=None, inv_freq=None)

`x [B, T, D]`, `positions [B, T]`; training passes no cache, prefill and decoding pass one and get the new one back.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from mfa_jax.attention import gqa, mfa, mfa_kr, mla
from mfa_jax.cache import Cache
from mfa_jax.config import AttentionConfig, PositionConfig

_MODULES: dict[str, Any] = {"gqa": gqa.GQA, "mla": mla.MLA, "mfa": mfa.MFA, "mfa_kr": mfa_kr.MFAKR}
_CACHES: dict[str, Any] = {
    "gqa": gqa.init_cache, "mla": mla.init_cache, "mfa": mfa.init_cache, "mfa_kr": mfa_kr.init_cache,
}


def build(config: AttentionConfig, position: PositionConfig, **fields: Any) -> nn.Module:
    """The attention module of a config; `fields` are the others of the module (dtype, param_dtype, name, ...)."""
    return _MODULES[config.kind](config, position, **fields)


def init_cache(config: AttentionConfig, batch: int, capacity: int, dtype: Any = jnp.float32) -> Cache:
    """An empty cache of one layer for `batch` rows of up to `capacity` tokens."""
    return _CACHES[config.kind](config, batch, capacity, dtype)
