"""Multi-matrix factorization attention (Hu et al., arXiv 2412.19255, section 3; Step-3, arXiv 2507.19427)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from mfa_jax.attention.cached import Serving, cached_attention
from mfa_jax.attention.core import attend
from mfa_jax.attention.encoding import Encoding
from mfa_jax.axes import constrain
from mfa_jax.cache import SharedKVCache, allocate
from mfa_jax.config import MFAConfig, MFAKRConfig, PositionConfig
from mfa_jax.layers import RMSNorm, from_heads, linear, to_heads, weight


def init_cache(config: MFAConfig, batch: int, capacity: int, dtype: Any) -> SharedKVCache:
    """An empty cache of one layer: `2 C` elements a token."""
    shape = (capacity, config.latent_dim)
    return allocate(SharedKVCache, batch, shape, shape, dtype=dtype)


def factored_queries(
    module: nn.Module, config: MFAConfig | MFAKRConfig, x: Float[Array, "B T D"], types: dict[str, Any]
) -> Float[Array, "B T N C"]:
    """`q_n = RMSNorm(x S_q) Q_n`: the factorization that MFA and MFA-KR share; parameters land in `module`."""
    D, N, C = x.shape[-1], config.num_heads, config.latent_dim
    S_q = weight(module, "S_q", (D, config.query_rank), ("embed", "query_rank"), fan_in=D, **types)
    Q = weight(module, "Q", (config.query_rank, N, C), ("inner_rank", "heads", "latent"), fan_in=config.query_rank,
               **types)
    c_q = linear(x, S_q)
    if config.query_norm:
        c_q = RMSNorm(config.norm_eps, axis="query_rank", name="q_norm", **types)(c_q)
    return constrain(to_heads(c_q, Q), "batch", "sequence", "heads", None)


class MFA(nn.Module):
    """`y = sum_n softmax(q_n k^T / sqrt(C)) v O_n` with `q_n = RMSNorm(x S_q) Q_n`, `k = x S_k`, `v = x S_v`.

    One key and one value head of width C serve all N query heads. Names are the paper's: `S_q [D, Q]` (shared down
    projection of queries), `Q [Q, N, C]` (each head's own matrix), `S_k` and `S_v [D, C]` (shared key and value),
    `O [N, C, D]`. The norm on the query latent is Step-3's; `query_norm=False` is the paper's plain form. Every weight
    starts normal with variance 1 / fan-in, so that for inputs of unit variance scores and outputs have a variance that
    does not depend on N, C or Q; `out_scale` multiplies `O` besides.
    """

    config: MFAConfig
    position: PositionConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    implementation: str = "auto"
    serving: Serving = Serving()
    out_scale: float = 1.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], segments: Int[Array, "B T"] | None = None,
        cache: SharedKVCache | None = None, inv_freq: Float[Array, " W"] | None = None,
    ) -> tuple[Float[Array, "B T D"], SharedKVCache | None]:
        D, N, C = x.shape[-1], self.config.num_heads, self.config.latent_dim
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        S_k = weight(self, "S_k", (D, C), ("embed", "latent"), fan_in=D, **types)
        S_v = weight(self, "S_v", (D, C), ("embed", "latent"), fan_in=D, **types)
        O = weight(self, "O", (N, C, D), ("heads", "latent", "embed"), fan_in=N * C, scale=self.out_scale, **types)

        encoding = Encoding(self.position, C, N, inv_freq)
        q = encoding.rotate(factored_queries(self, self.config, x, types), positions, head_axis=2)
        k = encoding.rotate(linear(x, S_k), positions)
        v = linear(x, S_v)
        options: dict[str, Any] = {"scale": C**-0.5, "alibi_slopes": encoding.slopes, "segments": segments}
        if cache is None:
            o = attend(q, k, v, implementation=self.implementation, **options)
        else:
            o, cache = cached_attention(q, cache, (k, v), serving=self.serving, **options)
        return from_heads(o, O), cache
