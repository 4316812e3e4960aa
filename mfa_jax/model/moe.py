"""The mixture of experts: a router in float32, dropless dispatch, a grouped matrix product, a shared expert."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from mfa_jax.axes import constrain
from mfa_jax.config import MoEConfig
from mfa_jax.layers import partitioned, weight
from mfa_jax.model.dispatch import experts_over_mesh
from mfa_jax.model.layers import SwiGLU


class Routing(NamedTuple):
    """What a router did with a batch; padding (segment 0) is routed too, but counts for nothing here."""

    counts: Int[Array, " E"]
    """Tokens that each expert got; they add up to A times `tokens`."""
    dropped: Int[Array, ""]
    """Choices, of all tokens, that no expert served: zero, by design."""
    entropy: Float[Array, ""]
    """Entropy of the scores as shares of their sum, in nats, summed over the tokens; at most ln E a token."""
    tokens: Float[Array, ""]
    """Tokens that counted."""
    balance: Float[Array, " B"]
    """The balance loss of each row, before its weight; all the same with `balance_over="batch"`."""


class MoE(nn.Module):
    """`y = sum_{e in top A} w_e expert_e(x) + shared(x)`, each expert a SwiGLU (as in DeepSeekMoE, arXiv 2401.06066).

    The router works in float32: `s = softmax(x router)` or `sigmoid(x router)`; the A experts with the largest
    `s + router_bias` are chosen, of equal ones the first; their weights are `w = s` (never the bias), divided by their
    sum with `renormalize`, times `output_scale`. No token is dropped and no expert has a capacity: tokens are sorted
    by expert and meet their expert's weights in one grouped product.

    Parameters: `router [D, E]`; `experts_gate`, `experts_up [E, D, F]`, `experts_down [E, F, D]`; `shared` with a
    SwiGLU's; and with `bias_update_rate` `router_bias [E]`, float32, zero at the start, which has no gradient:
    `updated_bias` moves it. Matrices start normal with variance 1 / fan-in, `out_scale` multiplies `experts_down`.

    On a mesh `expert` splits the experts and, beside `data` and `fsdp`, the rows; see `dispatch`.
    """

    config: MoEConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    out_scale: float = 1.0
    implementation: str = "auto"
    exchange: str = "auto"
    at_once: int | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], segments: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], Routing]:
        c, D = self.config, x.shape[-1]
        E, F = c.num_experts, c.expert_dim
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        router = weight(self, "router", (D, E), ("embed", None), fan_in=D, dtype=jnp.float32,
                        param_dtype=self.param_dtype)
        bias = None
        if c.bias_update_rate is not None:
            # Float32 whatever param_dtype is: a step of 0.001 is lost beside 1 in bfloat16.
            bias = self.param("router_bias", partitioned(nn.initializers.zeros, (None,)), (E,), jnp.float32)
        widen, narrow = ("experts", "embed", "ffn"), ("experts", "ffn", "embed")
        experts = (
            weight(self, "experts_gate", (E, D, F), widen, fan_in=D, **types),
            weight(self, "experts_up", (E, D, F), widen, fan_in=D, **types),
            weight(self, "experts_down", (E, F, D), narrow, fan_in=F, scale=self.out_scale, **types),
        )
        with jax.named_scope("router"):
            logits = jnp.einsum("BTD,DE->BTE", x.astype(jnp.float32), router, precision=jax.lax.Precision.HIGHEST)
            chosen, weights, scores = route(constrain(logits, "batch", "sequence", None), bias, c)
        with jax.named_scope("experts"):
            y, served = experts_over_mesh(x, chosen, weights.astype(self.dtype), experts, self.implementation,
                                          self.exchange, self.at_once)
        if c.shared_dim:
            y = y + SwiGLU(c.shared_dim, out_scale=self.out_scale, name="shared", **types)(x)
        counted = jnp.ones(x.shape[:2], bool) if segments is None else segments != 0
        return y, measure(chosen, scores, counted, served, c)


def route(
    logits: Float[Array, "*B E"], bias: Float[Array, " E"] | None, config: MoEConfig
) -> tuple[Int[Array, "*B A"], Float[Array, "*B A"], Float[Array, "*B E"]]:
    """Experts of each token, their weights, and the scores of all, from float32 logits; see `MoE`."""
    scores = jax.nn.softmax(logits, axis=-1) if config.scores == "softmax" else jax.nn.sigmoid(logits)
    ranked = scores if bias is None else scores + bias
    chosen = jax.lax.top_k(jax.lax.stop_gradient(ranked), config.experts_per_token)[1]
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if config.renormalize:
        # Sigmoids may all be zero in float32.
        weights = weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    return chosen, config.output_scale * weights, scores


def measure(
    chosen: Int[Array, "B T A"], scores: Float[Array, "B T E"], counted: Bool[Array, "B T"], served: Int[Array, ""],
    config: MoEConfig,
) -> Routing:
    """The measures of `Routing`, the balance loss among them.

    `loss = E / (A n) sum_e c_e P_e`, with `c_e` the tokens of expert e among n tokens and `P_e` their mean share of the
    score of e; 1 when the load is even (Fedus et al., arXiv 2101.03961, section 2.2, for A = 1; DeepSeek-V3, arXiv
    2412.19437, equations 17 to 20, for a row). The gradient flows through `P_e`.
    """
    E, A = config.num_experts, config.experts_per_token
    shares = scores / jnp.maximum(jnp.sum(scores, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    per_row = jnp.sum(jax.nn.one_hot(chosen, E, dtype=jnp.int32) * counted[..., None, None], axis=(1, 2))
    tokens = jnp.sum(counted, axis=1).astype(jnp.float32)
    share_sums = jnp.sum(jnp.where(counted[..., None], shares, 0), axis=1)
    counts, sums, n = per_row, share_sums, tokens
    if config.balance_over == "batch":
        counts, sums, n = (jnp.broadcast_to(jnp.sum(v, axis=0, keepdims=True), v.shape) for v in (counts, sums, n))
    balance = E / A * jnp.einsum("BE,BE->B", counts.astype(jnp.float32), sums) / jnp.maximum(n, 1) ** 2
    entropy = -jnp.sum(jnp.where(counted[..., None], jax.scipy.special.xlogy(shares, shares), 0))
    return Routing(jnp.sum(per_row, axis=0), jnp.int32(chosen.size) - served, entropy, jnp.sum(tokens), balance)


def updated_bias(bias: Float[Array, "*L E"], counts: Int[Array, "*L E"], rate: float) -> Float[Array, "*L E"]:
    """`b_e + rate sign(mean(c) - c_e)`: experts with less than the mean load are chosen more easily from now on.

    Source: Wang et al., arXiv 2408.15664, algorithm 1; DeepSeek-V3, arXiv 2412.19437, section 2.1.2.
    """
    load = counts.astype(jnp.float32)
    return bias + rate * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)
