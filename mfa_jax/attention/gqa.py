"""Grouped-query attention (Ainslie et al., arXiv 2305.13245): MHA with `K = N`, MQA with `K = 1`."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from mfa_jax.attention.cached import Serving, cached_attention
from mfa_jax.attention.core import attend
from mfa_jax.attention.encoding import Encoding
from mfa_jax.axes import constrain
from mfa_jax.cache import KVCache, allocate
from mfa_jax.config import GQAConfig, PositionConfig
from mfa_jax.layers import RMSNorm, from_heads, partitioned, to_heads, weight


def init_cache(config: GQAConfig, batch: int, capacity: int, dtype: Any) -> KVCache:
    """An empty cache of one layer: `2 K H` elements a token."""
    shape = (config.num_kv_heads, capacity, config.head_dim)
    return allocate(KVCache, batch, shape, shape, dtype=dtype)


class GQA(nn.Module):
    """`y = sum_n softmax(q_n k_g^T / sqrt(H)) v_g W_O,n` with `q_n = x W_Q,n`, `k_g = x W_K,g`, `v_g = x W_V,g`.

    Head `n` reads key head `g = n // G`, `G = N / K`. Parameters: `W_Q [D, N, H]`, `W_K` and `W_V [D, K, H]`,
    `W_O [N, H, D]`. Every weight starts normal with variance 1 / fan-in, so that for inputs of unit variance scores
    and outputs have a variance that does not depend on N, K or H; `out_scale` multiplies `W_O` besides.
    """

    config: GQAConfig
    position: PositionConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    implementation: str = "auto"
    serving: Serving = Serving()
    out_scale: float = 1.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], segments: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None, inv_freq: Float[Array, " W"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        D, N, K, H = x.shape[-1], self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        kv_axis = "kv_heads" if K > 1 else None
        W_Q = weight(self, "W_Q", (D, N, H), ("embed", "heads", "head_dim"), fan_in=D, **types)
        W_K = weight(self, "W_K", (D, K, H), ("embed", kv_axis, "head_dim"), fan_in=D, **types)
        W_V = weight(self, "W_V", (D, K, H), ("embed", kv_axis, "head_dim"), fan_in=D, **types)
        W_O = weight(self, "W_O", (N, H, D), ("heads", "head_dim", "embed"), fan_in=N * H, scale=self.out_scale,
                     **types)

        q, k, v = to_heads(x, W_Q), to_heads(x, W_K), to_heads(x, W_V)
        if self.config.qkv_bias:
            q, k, v = (y + self._bias(name, y.shape[2:], axis)
                       for name, y, axis in (("b_Q", q, "heads"), ("b_K", k, kv_axis), ("b_V", v, kv_axis)))
        if self.config.qk_norm:
            q, k = (RMSNorm(self.config.norm_eps, axis="head_dim", name=name, **types)(y)
                    for name, y in (("q_norm", q), ("k_norm", k)))
        encoding = Encoding(self.position, H, N, inv_freq)
        q = constrain(encoding.rotate(q, positions, head_axis=2), "batch", "sequence", "heads", None)
        k, v = encoding.rotate(k.swapaxes(1, 2), positions, head_axis=1), v.swapaxes(1, 2)
        options: dict[str, Any] = {"scale": H**-0.5, "alibi_slopes": encoding.slopes, "segments": segments}
        if cache is None:
            o = attend(q, k, v, implementation=self.implementation, **options)
        else:
            o, cache = cached_attention(q, cache, (k, v), serving=self.serving, **options)
        return from_heads(o, W_O), cache

    def _bias(self, name: str, shape: tuple[int, ...], axis: str | None) -> Float[Array, "N H"]:
        zeros = partitioned(nn.initializers.zeros, (axis, "head_dim"))
        return self.param(name, zeros, shape, self.param_dtype).astype(self.dtype)
