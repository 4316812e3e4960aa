"""What a model does on calibration text, one layer at a time: the streams, what attention reads, what it yields."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mfa_jax.attention.core import attend
from mfa_jax.attention.encoding import Encoding
from mfa_jax.config import GQAConfig, ModelConfig
from mfa_jax.convert.directions import Moments, Reduced
from mfa_jax.layers import RMSNorm
from mfa_jax.model.layers import SwiGLU

ROWS = 2
"""Rows of calibration text that are in flight at a time."""


def batches(x: np.ndarray) -> Iterator[slice]:
    """The rows of an array, `ROWS` at a time."""
    return (slice(start, start + ROWS) for start in range(0, len(x), ROWS))


@functools.partial(jax.jit, static_argnames="eps")
def normed(x: Float[Array, "B T D"], eps: float) -> Float[Array, "B T D"]:
    """RMSNorm without its scale."""
    y: Any = RMSNorm(eps).apply({"params": {"scale": jnp.ones(x.shape[-1])}}, x)
    return y


@functools.partial(jax.jit, static_argnames="config")
def _original(
    config: ModelConfig, layer: dict[str, Array], inv_freq: Float[Array, " W"], x: Float[Array, "B T D"]
) -> tuple[Float[Array, "B T N D"], Float[Array, "B T D"]]:
    """Of normed tokens: what each head's attention averages them to, and the layer's output."""
    a = config.attention
    assert isinstance(a, GQAConfig)
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    encoding = Encoding(config.position, a.head_dim, a.num_heads, inv_freq)
    q = encoding.rotate(jnp.einsum("BTD,DNH->BTNH", x, layer["W_Q"]), positions, head_axis=2)
    k = encoding.rotate(jnp.einsum("BTD,DKH->BKTH", x, layer["W_K"]), positions, head_axis=1)
    values = jnp.broadcast_to(x[:, None], (x.shape[0], a.num_kv_heads, *x.shape[1:]))
    read = attend(q, k, values, scale=a.head_dim**-0.5)
    W_V = jnp.repeat(layer["W_V"], a.num_heads // a.num_kv_heads, axis=1)
    return read, jnp.einsum("BTND,DNH,NHE->BTE", read, W_V, layer["W_O"], optimize=[(0, 1), (0, 1)])


@functools.partial(jax.jit, static_argnames="config")
def heads(
    config: ModelConfig, W: Float[Array, "D N C"], S_k: Float[Array, "D C"], values: Float[Array, "D M"],
    inv_freq: Float[Array, " W"], x: Float[Array, "B T D"],
) -> Float[Array, "B T N M"]:
    """What the heads of an MFA layer average values `x values` of any width to, of normed tokens.

    Args:
      config: of the model, for its encoding.
      W: each head's query projection, `S_q Q_n`.
    """
    C, N = S_k.shape[1], W.shape[1]
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    encoding = Encoding(config.position, C, N, inv_freq)
    q = encoding.rotate(jnp.einsum("BTD,DNC->BTNC", x, W), positions, head_axis=2)
    k = encoding.rotate(jnp.einsum("BTD,DC->BTC", x, S_k), positions)
    return attend(q, k, jnp.einsum("BTD,DM->BTM", x, values), scale=C**-0.5)


@functools.partial(jax.jit, static_argnames="config")
def feed_forward(config: ModelConfig, params: Any, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """`x + ffn(norm(x))` of one layer."""
    y: Any = RMSNorm(config.norm_eps).apply({"params": params["ffn_norm"]}, x)
    added: Any = SwiGLU(config.ffn_dim).apply({"params": params["ffn"]}, y)
    return x + added


def observe(
    config: ModelConfig, layer: dict[str, np.ndarray], inv_freq: np.ndarray, stream: np.ndarray
) -> tuple[Moments, np.ndarray]:
    """The moments of a layer and what its attention adds to the stream, `[B, T, D]` both ways.

    Args:
      layer: `W_Q`, `W_K`, `W_V`, `W_O`, with the norm's scale folded in.
    """
    D, N = stream.shape[-1], config.attention.num_heads
    single = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in layer.items()}
    count = stream.shape[0] * stream.shape[1]
    found = Moments(np.zeros((D, D)), np.zeros(D), np.zeros((D, D)))
    outputs = np.empty_like(stream)
    for rows in batches(stream):
        x = normed(stream[rows], config.norm_eps)
        read, outputs[rows] = _original(config, single, jnp.asarray(inv_freq), x)
        flat = np.asarray(x).reshape(-1, D)
        found.tokens += flat.T @ flat / count
        found.mean += flat.sum(0, dtype=np.float64) / count
        averaged = np.asarray(read).reshape(-1, D)
        found.read += averaged.T @ averaged / (count * N)
    return found, outputs


def features(config: ModelConfig, reduced: Reduced, stream: np.ndarray) -> np.ndarray:
    """What the heads of a reduced layer yield, `[B T, N C]`, float32, of a stream before its norm."""
    keys = reduced.keys
    given = [jnp.asarray(x, jnp.float32) for x in (keys.W * keys.S_k.shape[1]**0.5, keys.S_k, reduced.averaged,
                                                   keys.inv_freq)]
    found = [np.asarray(heads(config, *given, normed(stream[batch], config.norm_eps))) for batch in batches(stream)]
    return np.concatenate(found).reshape(stream.shape[0] * stream.shape[1], -1)


def output_of(config: ModelConfig, reduced: Reduced, stream: np.ndarray) -> np.ndarray:
    """What the attention of a reduced layer adds to a stream, `[B, T, D]` both ways."""
    O = reduced.O.reshape(-1, stream.shape[-1]).astype(np.float32)
    return (features(config, reduced, stream) @ O).reshape(stream.shape)


def misses(found: np.ndarray, wanted: np.ndarray) -> float:
    """Mean square of what an output lacks to be the wanted one, over that of the wanted."""
    return float(np.mean(np.square(found - wanted), dtype=np.float64) / np.mean(np.square(wanted), dtype=np.float64))
