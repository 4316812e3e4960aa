"""The feed-forward layer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from mfa_jax.axes import constrain
from mfa_jax.layers import linear, weight


class SwiGLU(nn.Module):
    """`y = (silu(x W_gate) * (x W_up)) W_down` (Shazeer, arXiv 2002.05202); `W_gate`, `W_up [D, F]`, `W_down [F, D]`.

    Weights start normal with variance 1 / fan-in; `out_scale` multiplies `W_down` besides.
    """

    hidden_dim: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    out_scale: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        D, F = x.shape[-1], self.hidden_dim
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        W_gate = weight(self, "W_gate", (D, F), ("embed", "ffn"), fan_in=D, **types)
        W_up = weight(self, "W_up", (D, F), ("embed", "ffn"), fan_in=D, **types)
        W_down = weight(self, "W_down", (F, D), ("ffn", "embed"), fan_in=F, scale=self.out_scale, **types)
        hidden = jax.nn.silu(linear(x, W_gate)) * linear(x, W_up)
        return linear(constrain(hidden, "batch", "sequence", "ffn"), W_down)
