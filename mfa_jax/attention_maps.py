"""Where a trained model attends: the weights `softmax_j(...)` of every head of a layer, for given text.

Attention itself never hands these out: its fast forms do not make them. They are computed anew, from the layer's own
input and weights, with the norms and the position encoding that `circuits` leave out.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from mfa_jax.attention.encoding import Encoding
from mfa_jax.config import GQAConfig, MLAConfig, require
from mfa_jax.layers import RMSNorm, to_heads
from mfa_jax.model.transformer import Transformer, layer_frequencies, unstack_layers


def attention_maps(
    model: Transformer, params: Any, tokens: Int[Array, "B T"], layer: int
) -> Float[Array, "B N T T"]:
    """`a[b, n, i, j]`, how much query i of head n attends to token j of row b: rows sum to 1, float32.

    `a[i, j] = softmax_{j <= i}(scale q_i . k_j - slope_n (i - j))`, with queries and keys as the layer's module makes
    them. For inspection: all `B N T T` weights are in memory.

    Args:
      model: the model that `params` belong to (layers stacked, as training keeps them).
      tokens: rows of one document each.

    Raises:
      ValueError: no such layer.
    """
    c = model.config
    require(0 <= layer < c.num_layers, "layer", layer, f"must be in 0 .. {c.num_layers - 1}")
    variables = {"params": unstack_layers(nn.unbox(params), c.num_layers)}
    # Every norm's output: the layer's input is one, and so are the latents inside the attention.
    _, state = Transformer(c, scan_layers=False).apply(
        variables, tokens, capture_intermediates=lambda module, _: isinstance(module, RMSNorm), mutable="intermediates")
    norms = state["intermediates"][f"layers_{layer}"]
    normed = {name: found["__call__"][0] for name, found in norms.get("attention", {}).items()}
    weights = jax.tree.map(lambda leaf: leaf.astype(c.dtype), variables["params"][f"layers_{layer}"]["attention"])
    inv_freq = layer_frequencies(c)
    encoding = Encoding(c.position, c.attention.rotated_dim, c.attention.num_heads,
                        None if inv_freq is None else inv_freq[layer])
    q, k = _queries_and_keys(c.attention, weights, norms["attention_norm"]["__call__"][0], normed)
    q, k = _turned(encoding, q), _turned(encoding, k)
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    distance = jnp.arange(q.shape[1])[:, None] - jnp.arange(q.shape[1])
    if encoding.slopes is not None:
        scores = scores - encoding.slopes[:, None, None] * distance
    return jax.nn.softmax(jnp.where(distance >= 0, scores, -jnp.inf), axis=-1)


def _queries_and_keys(
    config: Any, p: dict[str, Any], x: Float[Array, "B T D"], normed: dict[str, Any]
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N H"]]:
    """Before the position encoding, keys repeated for every query head; the class of each variant has the formulas.

    Args:
      normed: what the layer's inner norms gave, by name.
    """
    N = config.num_heads
    if isinstance(config, GQAConfig):
        q, k = (to_heads(x, p[f"W_{name}"]) + p.get(f"b_{name}", 0) for name in "QK")
        return normed.get("q_norm", q), jnp.repeat(normed.get("k_norm", k), N // config.num_kv_heads, axis=2)
    if isinstance(config, MLAConfig):
        q = to_heads(x, p["W_Q"]) if config.query_rank is None else to_heads(normed["q_norm"], p["W_UQ"])
        k_rope = jnp.broadcast_to((x @ p["W_KR"])[:, :, None], (*q.shape[:3], config.rope_dim))
        return q, jnp.concatenate([to_heads(normed["kv_norm"], p["W_UK"]), k_rope], axis=-1)
    q = to_heads(normed["q_norm"] if config.query_norm else x @ p["S_q"], p["Q"])
    return q, jnp.broadcast_to((x @ p["S_k"])[:, :, None], q.shape)


def _turned(encoding: Encoding, x: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    """The last elements, as many as rope rotates, turned to their positions."""
    plain, rotated = x[..., : -encoding.width], x[..., -encoding.width :]
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    return jnp.concatenate([plain, encoding.rotate(rotated, positions, head_axis=2)], axis=-1)
