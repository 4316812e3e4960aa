"""MFA with key reuse (Hu et al., arXiv 2412.19255, section 3): the cache holds one key and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from mfa_jax.attention.cached import Serving, cached_attention
from mfa_jax.attention.core import attend
from mfa_jax.attention.encoding import Encoding
from mfa_jax.attention.mfa import factored_queries
from mfa_jax.axes import gather_sequence
from mfa_jax.cache import KeyCache, allocate
from mfa_jax.config import MFAKRConfig, PositionConfig
from mfa_jax.layers import from_heads, linear, partitioned, weight


def init_cache(config: MFAKRConfig, batch: int, capacity: int, dtype: Any) -> KeyCache:
    """An empty cache of one layer: `C` elements a token."""
    return allocate(KeyCache, batch, (capacity, config.latent_dim), dtype=dtype)


def around(center: Float[Array, "*shape"] | float, deviation: float) -> Callable[..., Array]:
    """An initializer: normal with this standard deviation, around `center`."""
    return lambda key, shape, dtype: (center + deviation * jax.random.normal(key, shape)).astype(dtype)


class MFAKR(nn.Module):
    """MFA with `v = k + alpha * (N_kr k)`, `k = x S_k` before rope (`reuse="pre_rope"`) or after it (`"post_rope"`).

    Names are the paper's: `S_q`, `Q`, `S_k`, `O` as in MFA, `alpha [C]` and `N_kr [C, C]`. Alpha starts at
    `alpha_init` (zero: values start as the keys, and the gradient of `N_kr` is zero until alpha has moved); `N_kr`
    starts normal with standard deviation `n_kr_init_scale / sqrt(C)`; the rest as in MFA. With both at zero neither
    ever gets a gradient, and values stay the keys. Other starts: `alpha_init_scale`, `n_kr_init_diagonal`.

    With a cache no value is ever formed: attention averages the cached keys, `u = sum_j a_j k_j`, and since the value
    is a linear map of the key, `o = u + alpha * (N_kr u)`. Keys that are cached before rope stand at their row index,
    and with them the queries: `positions` are not read then.
    """

    config: MFAKRConfig
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
        D, N, C = x.shape[-1], c.num_heads, c.latent_dim
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        S_k = weight(self, "S_k", (D, C), ("embed", "latent"), fan_in=D, **types)
        mapping = around(c.n_kr_init_diagonal * jnp.eye(C), c.n_kr_init_scale / C**0.5)
        gate = around(c.alpha_init, c.alpha_init_scale)
        N_kr = self.param("N_kr", partitioned(mapping, ("latent", None)), (C, C), self.param_dtype).astype(self.dtype)
        alpha = self.param("alpha", partitioned(gate, ("latent",)), (C,), self.param_dtype).astype(self.dtype)
        O = weight(self, "O", (N, C, D), ("heads", "latent", "embed"), fan_in=N * C, scale=self.out_scale, **types)

        def values(key: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
            return key + alpha * jnp.einsum("...C,cC->...c", key, N_kr)

        encoding = Encoding(self.position, C, N, inv_freq)
        if cache is not None and c.reuse == "pre_rope":
            positions = cache.length[:, None] + jnp.arange(x.shape[1])
        q = encoding.rotate(factored_queries(self, c, x, types), positions, head_axis=2)
        key = linear(x, S_k)
        if c.reuse == "post_rope":
            key = encoding.rotate(key, positions)
        options: dict[str, Any] = {"alibi_slopes": encoding.slopes, "segments": segments}
        if cache is None:
            if self.implementation == "context":
                # The whole sequence's key on every device, turned and made into values there: nothing else is gathered.
                key, positions = gather_sequence(key), gather_sequence(positions)
            k = key if c.reuse == "post_rope" else encoding.rotate(key, positions)
            o = attend(q, k, values(key), scale=C**-0.5, implementation=self.implementation, **options)
        else:
            # Keys are cached before rope: each is turned to its row index as it is read, and yarn's factor, which the
            # turn does not bring, goes into the scale.
            turned = c.reuse == "post_rope"
            u, cache = cached_attention(
                q, cache, (key,), scale=C**-0.5 * (1 if turned else encoding.magnitude),
                inv_freq=None if turned else encoding.frequencies, serving=self.serving, **options)
            o = values(u)
        return from_heads(o, O), cache
