"""What every decode kernel must compute: float32 at highest precision, no blocks, no tricks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num


def decode_attention(
    q: Float[Array, "B T N H"], k: Num[Array, "B S H"], v: Num[Array, "B S h"] | None, lengths: Int[Array, " B"], *,
    scale: float, inv_freq: Float[Array, " W"] | None, alibi_slopes: Float[Array, " N"] | None,
    k_scale: Float[Array, "B S"] | None, v_scale: Float[Array, "B S"] | None, value_width: int | None,
) -> tuple[Float[Array, "B T N h"], Float[Array, "B T N"]]:
    """The averages and the log-sum-exp of the scores, as `kernels.decode_attention` defines them, both float32."""
    S = k.shape[1]
    key = jnp.arange(S)
    held = (key < lengths[:, None])[:, :, None]
    # Garbage past a length may be nan, and 0 * nan is nan.
    stored = jnp.where(held, k.astype(jnp.float32), 0)
    if k_scale is not None:
        stored = jnp.where(held, stored * k_scale[:, :, None], 0)
    turned = stored
    if inv_freq is not None:
        angle = key[:, None] * inv_freq
        first, second = jnp.split(stored, 2, axis=-1)
        turned = jnp.concatenate([first * jnp.cos(angle) - second * jnp.sin(angle),
                                  second * jnp.cos(angle) + first * jnp.sin(angle)], axis=-1)
    if v is None:
        values = stored[:, :, :value_width]
    else:
        values = jnp.where(held, v.astype(jnp.float32), 0)
        if v_scale is not None:
            values = jnp.where(held, values * v_scale[:, :, None], 0)

    query = lengths[:, None] - q.shape[1] + jnp.arange(q.shape[1])
    distance = query[:, :, None, None] - key
    scores = scale * jnp.einsum("BTNH,BSH->BTNS", q.astype(jnp.float32), turned, precision="highest")
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[:, None] * distance
    scores = jnp.where(distance >= 0, scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    p = jnp.where(distance >= 0, jnp.exp(scores - jnp.where(jnp.isfinite(lse), lse, 0)[..., None]), 0)
    return jnp.einsum("BTNS,BSh->BTNh", p, values, precision="highest"), lse
