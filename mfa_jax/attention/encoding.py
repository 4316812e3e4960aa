"""The position encoding of one attention layer, from its config: what the variants ask of `positions`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mfa_jax import positions as pos
from mfa_jax.config import PositionConfig


@dataclasses.dataclass(frozen=True)
class Encoding:
    """Rope, ALiBi or none, for a rotated width and a number of heads."""

    position: PositionConfig
    width: int
    """Width that rope rotates."""
    num_heads: int
    inv_freq: Any = None
    """[width / 2], this layer's own frequencies; None for those of the config."""

    @property
    def slopes(self) -> Float[Array, " N"] | None:
        """ALiBi's slopes; None for the other encodings."""
        return jnp.asarray(pos.alibi_slopes(self.num_heads)) if self.position.kind == "alibi" else None

    @property
    def frequencies(self) -> Float[Array, " W"] | None:
        """Rope's, [width / 2], in radians a token; None for the other encodings."""
        if self.position.kind != "rope":
            return None
        if self.inv_freq is not None:
            return self.inv_freq
        return jnp.asarray(pos.rope_frequencies(self.width, self.position.base, self.position.scaling))

    @property
    def magnitude(self) -> float:
        """What rope multiplies a query or a key by besides its turn; 1 but for yarn."""
        return pos.rope_magnitude(self.position.scaling)

    def rotate(
        self, x: Float[Array, "..."], positions: Int[Array, "*B T"], head_axis: int | None = None
    ) -> Float[Array, "..."]:
        """`x` turned to its positions by rope, untouched by the other encodings.

        Args:
          x: `[*B, T, width]`, with a head axis besides where `head_axis` says so.
          positions: of each token.
          head_axis: the axis of `x` that `positions` does not have.
        """
        if self.position.kind != "rope":
            return x
        assert self.frequencies is not None
        cos, sin = pos.rope_table(positions, self.frequencies, self.magnitude)
        if head_axis is not None:
            cos, sin = jnp.expand_dims(cos, head_axis), jnp.expand_dims(sin, head_axis)
        return pos.rotate(x, cos, sin)
