"""Where a token stands, as attention sees it: rope and ALiBi, pure functions.

Rope (Su et al., arXiv 2104.09864) is half-split: element `j` of the first half turns with element `j` of the second,
by `position * inv_freq[j]`. Angles are computed in float32 whatever the input's type.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def rope_frequencies(width: int, base: float, scaling: Any = None) -> np.ndarray:
    """`inv_freq[j] = base ** (-2 j / width)`, radians per position, float32 [width / 2], stretched as `scaling` says.

    Args:
      width: how many elements are rotated; even.
      base: wavelength of the slowest pair is about `2 pi base`.
      scaling: None, or an object with the fields of `config.RopeScaling`: `linear` divides every frequency by
        `factor` (Chen et al., arXiv 2306.15595); `llama3` only the slow ones, with a smooth passage; `yarn` (Peng et
        al., arXiv 2309.00071, section 3.2) by how often a pair turns over the original context.
    """
    if width % 2:
        raise ValueError(f"width={width}: rope rotates pairs, the width must be even")
    inv_freq = base ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    if scaling is None:
        return inv_freq.astype(np.float32)
    stretched = inv_freq / scaling.factor
    if scaling.kind == "linear":
        return stretched.astype(np.float32)
    turns = scaling.original_max_positions * inv_freq / (2 * np.pi)
    if scaling.kind == "llama3":
        keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    elif scaling.kind == "yarn":
        def pair_that_turns(times: float) -> float:
            return width * math.log(scaling.original_max_positions / (times * 2 * math.pi)) / (2 * math.log(base))

        low = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
        high = min(math.ceil(pair_that_turns(scaling.beta_slow)), width - 1)
        keep = 1 - (np.arange(width // 2) - low) / max(high - low, 1e-3)
    else:
        raise ValueError(f"scaling.kind={scaling.kind!r}: must be one of linear, llama3, yarn")
    keep = np.clip(keep, 0, 1)
    return (keep * inv_freq + (1 - keep) * stretched).astype(np.float32)


def rope_magnitude(scaling: Any) -> float:
    """What rotated queries and keys are multiplied by: 1, or yarn's `0.1 ln(factor) + 1` unless it is given."""
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    return 0.1 * math.log(scaling.factor) + 1 if scaling.attention_factor is None else scaling.attention_factor


def rope_table(
    positions: Int[Array, "*P"], inv_freq: Float[Array, " W"], magnitude: float = 1.0
) -> tuple[Float[Array, "*P W"], Float[Array, "*P W"]]:
    """Cosine and sine of every position's angles, times `magnitude`; `W` is half the rotated width."""
    angles = positions[..., None].astype(jnp.float32) * inv_freq.astype(jnp.float32)
    return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude


def rotate(x: Float[Array, "..."], cos: Float[Array, "..."], sin: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x` turned by the angles of a `rope_table` that broadcasts against the halves of its last axis; type of `x`."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """Slopes `m_n` of the bias `-m_n (i - j)`, float32 [N] (Press et al., arXiv 2108.12409, section 3).

    For N a power of two `m_n = 2 ** (-8 n / N)`, n = 1 .. N; otherwise those of the power below, then every other one
    of the power above.
    """
    def powers(count: int) -> list[float]:
        return [2.0 ** (-8.0 * (n + 1) / count) for n in range(count)]

    below = 2 ** math.floor(math.log2(num_heads))
    return np.asarray(powers(below) + powers(2 * below)[0::2][: num_heads - below], np.float32)
