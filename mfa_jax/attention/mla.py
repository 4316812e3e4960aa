"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): the cache holds latents."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from mfa_jax.attention.cached import Serving, cached_attention
from mfa_jax.attention.core import attend
from mfa_jax.attention.encoding import Encoding
from mfa_jax.axes import constrain, gather_sequence
from mfa_jax.cache import KeyCache, allocate
from mfa_jax.config import MLAConfig, PositionConfig
from mfa_jax.layers import RMSNorm, from_heads, linear, to_heads, weight


def init_cache(config: MLAConfig, batch: int, capacity: int, dtype: Any) -> KeyCache:
    """An empty cache of one layer: `C + R` elements a token."""
    return allocate(KeyCache, batch, (capacity, config.latent_dim + config.rope_dim), dtype=dtype)


class MLA(nn.Module):
    """`k_n = [c W_UK,n ; rope(x W_KR)]`, `v_n = c W_UV,n` with the latent `c = RMSNorm(x W_DKV)`.

    The query is `x W_Q,n`, or through its own normed latent `RMSNorm(x W_DQ) W_UQ,n`; its last R elements are rotated.
    Parameters: `W_DKV [D, C]`, `W_KR [D, R]`, `W_UK [C, N, H - R]`, `W_UV [C, N, h]`, `W_O [N, h, D]`, and
    `W_Q [D, N, H]`, or `W_DQ [D, Q]` with `W_UQ [Q, N, H]`. Scale `H ** -0.5`. Without rope the R elements stay in key
    and query, unrotated, so that the encodings are compared at equal size.

    With a cache, decoding is absorbed: the query goes into the latent, `[q_n W_UK,n^T ; q_rope]`, scores and averages
    are taken over the cached `[c ; k_rope]` itself, and `W_UV` follows the average.
    """

    config: MLAConfig
    position: PositionConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    implementation: str = "auto"
    serving: Serving = Serving()
    out_scale: float = 1.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], segments: Int[Array, "B T"] | None = None,
        cache: KeyCache | None = None, inv_freq: Float[Array, " W"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KeyCache | None]:
        c = self.config
        D, N, C, R, h, M = x.shape[-1], c.num_heads, c.latent_dim, c.rope_dim, c.value_dim, c.nope_dim
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        W_DKV = weight(self, "W_DKV", (D, C), ("embed", "latent"), fan_in=D, **types)
        W_KR = weight(self, "W_KR", (D, R), ("embed", "head_dim"), fan_in=D, **types)
        W_UK = weight(self, "W_UK", (C, N, M), ("inner_rank", "heads", "head_dim"), fan_in=C, **types)
        W_UV = weight(self, "W_UV", (C, N, h), ("inner_rank", "heads", "head_dim"), fan_in=C, **types)
        W_O = weight(self, "W_O", (N, h, D), ("heads", "head_dim", "embed"), fan_in=N * h, scale=self.out_scale,
                     **types)

        encoding = Encoding(self.position, R, N, inv_freq)
        q = constrain(self._queries(x, types), "batch", "sequence", "heads", None)
        q_nope, q_rope = q[..., :M], encoding.rotate(q[..., M:], positions, head_axis=2)
        latent = RMSNorm(c.norm_eps, axis="latent", name="kv_norm", **types)(linear(x, W_DKV))
        k_rope = encoding.rotate(linear(x, W_KR), positions)
        options: dict[str, Any] = {"scale": (M + R) ** -0.5, "alibi_slopes": encoding.slopes, "segments": segments}
        if cache is None:
            if self.implementation == "context":
                # The whole sequence's latent on every device, and not its keys and values.
                latent, k_rope = gather_sequence(latent), gather_sequence(k_rope)
            k_nope = to_heads(latent, W_UK).swapaxes(1, 2)
            k = jnp.concatenate([k_nope, jnp.broadcast_to(k_rope[:, None], (*k_nope.shape[:3], R))], axis=-1)
            v = to_heads(latent, W_UV).swapaxes(1, 2)
            o = attend(jnp.concatenate([q_nope, q_rope], axis=-1), k, v, implementation=self.implementation,
                       **options)
        else:
            absorbed = jnp.concatenate([jnp.einsum("BTNM,CNM->BTNC", q_nope, W_UK), q_rope], axis=-1)
            average, cache = cached_attention(absorbed, cache, (jnp.concatenate([latent, k_rope], axis=-1),),
                                              serving=self.serving, value_width=C, **options)
            o = jnp.einsum("BTNC,CNh->BTNh", average, W_UV)
        return from_heads(o, W_O), cache

    def _queries(self, x: Float[Array, "B T D"], types: dict[str, Any]) -> Float[Array, "B T N H"]:
        c, D = self.config, x.shape[-1]
        N, H = c.num_heads, c.nope_dim + c.rope_dim
        if c.query_rank is None:
            W_Q = weight(self, "W_Q", (D, N, H), ("embed", "heads", "head_dim"), fan_in=D, **types)
            return to_heads(x, W_Q)
        W_DQ = weight(self, "W_DQ", (D, c.query_rank), ("embed", "query_rank"), fan_in=D, **types)
        W_UQ = weight(self, "W_UQ", (c.query_rank, N, H), ("inner_rank", "heads", "head_dim"), fan_in=c.query_rank,
                      **types)
        c_q = RMSNorm(c.norm_eps, axis="query_rank", name="q_norm", **types)(linear(x, W_DQ))
        return to_heads(c_q, W_UQ)
