"""Queries that share a key head as the rows of one matrix, and back."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Num


def to_rows(x: Num[Array, "B T N W"], K: int, M: int) -> Num[Array, "B K M W"]:
    """Row `g T + t` of a key head is its query head g at drafted token t; zeros fill up to M rows."""
    B, T, N, W = x.shape
    x = x.swapaxes(1, 2).reshape(B, K, N // K * T, W)
    return jnp.pad(x, ((0, 0), (0, 0), (0, M - x.shape[2]), (0, 0)))


def from_rows(x: Float[Array, "R M W"], B: int, T: int, N: int, K: int) -> Float[Array, "B T N W"]:
    """What `to_rows` made of `[B, T, N, W]`, with `R = B K`."""
    x = x.reshape(B, K, -1, x.shape[-1])[:, :, : N // K * T]
    return x.reshape(B, N, T, -1).swapaxes(1, 2)
