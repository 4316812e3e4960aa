"""The attention variants behind one interface.

`build(config, position, ...)` gives the module; calling it is the same for all:

    y, cache = module.apply({"params": params}, x, positions, segments=None, cache=None, inv_freq=None)

`x [B, T, D]`, `positions [B, T]`; training passes no cache, prefill and decoding pass one and get the new one back.
Positions may be any but for MFA-KR with a cache of keys before rope, where a token stands at its row's index.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from mfa_jax.attention import core, gqa, mfa, mfa_kr, mla
from mfa_jax.attention.cached import Serving
from mfa_jax.attention.context import splits_sequence
from mfa_jax.cache import Cache
from mfa_jax.config import AttentionConfig, GQAConfig, MFAKRConfig, MLAConfig, ModelConfig, PositionConfig
from mfa_jax.kernels import Call
from mfa_jax.kernels.calls import default_device

__all__ = ["ANY_CALL", "Serving", "build", "decode_call", "init_cache", "serving", "training_implementation"]

ANY_CALL = ("auto", "dense", "blockwise")
"""Implementations of `core.attend` that serve any call on any device; the others can't read a cache."""

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


def serving(model: ModelConfig) -> Serving:
    """What a model attends over its caches with: a kernel that is named for training alone leaves prefill to `auto`."""
    prefill = model.attention_implementation
    return Serving(model.decode_implementation, prefill if prefill in ANY_CALL else "auto", model.decode_layout)


def decode_call(
    config: AttentionConfig, position: PositionConfig, *, capacity: int, dtype: Any, cache_dtype: Any, T: int = 1
) -> Call:
    """What a layer of this config asks of a decode kernel for T new tokens a row: the argument of `kernels.resolve`."""
    heads, width, turned = config.num_heads, config.rotated_dim, False
    h = width
    if isinstance(config, GQAConfig):
        heads //= config.num_kv_heads
    elif isinstance(config, MLAConfig):
        width, h = config.latent_dim + config.rope_dim, config.latent_dim
    elif isinstance(config, MFAKRConfig):
        turned = position.kind == "rope" and config.reuse == "pre_rope"
    return Call(T=T, N=heads, S=capacity, H=width, h=h, dtype=jnp.dtype(dtype), cache_dtype=jnp.dtype(cache_dtype),
                shared=config.kind in ("mla", "mfa_kr"), rope=turned, alibi=position.kind == "alibi")


def training_implementation(
    config: AttentionConfig, position: PositionConfig, *, T: int, dtype: Any, segments: bool,
    implementation: str = "auto",
) -> str:
    """The name in `core.IMPLEMENTATIONS` of what serves a layer in a training step, on this device and ambient mesh.

    Raises:
      ValueError: an unknown name.
      NotImplementedError: a named implementation can't serve it; says why, and what can.
    """
    if implementation == "auto" and splits_sequence():
        implementation = "context"
    N, K, H = config.num_heads, 1, config.rotated_dim
    h = H
    if isinstance(config, GQAConfig):
        K = config.num_kv_heads
    elif isinstance(config, MLAConfig):
        K, H, h = N, config.nope_dim + config.rope_dim, config.value_dim
    device = default_device()
    return core.resolve(
        implementation, device.platform, T=T, S=T, N=N, K=K, H=H, h=h, dtype=dtype, offset=False, segments=segments,
        alibi=position.kind == "alibi", compute_capability=device.compute_capability)
