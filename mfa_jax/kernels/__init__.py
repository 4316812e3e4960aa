"""Decode attention: a few new tokens of every row over one stream of cached keys, by the backend that was named.

| implementation | where | what it is |
| --- | --- | --- |
| `reference` | anywhere | the definition, float32, all scores at once; the oracle of the tests |
| `xla` | anywhere | online softmax over blocks, ends at the longest length |

One stream of keys serves all query heads: MFA, MFA-KR, MQA, and MLA with its queries absorbed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mfa_jax.kernels import reference, xla

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "reference": reference.decode_attention, "xla": xla.decode_attention,
}
MAX_QUERIES = 8
"""Largest T: tokens drafted at once."""


def decode_attention(
    q: Float[Array, "B T N H"], k: Array, v: Array | None, lengths: Int[Array, " B"], *, scale: float,
    rope: Array | None = None, alibi_slopes: Array | None = None, k_scale: Array | None = None,
    v_scale: Array | None = None, value_width: int | None = None, return_lse: bool = False,
    implementation: str = "auto",
) -> Any:
    """`o_n = sum_j softmax_j(scale q_n . R(j) k_j - slope_n (i - j)) v_j` over the keys j that query i sees.

    The keys include those of the T new tokens: query t of row b stands at `i = lengths[b] - T + t` and sees `j <= i`.
    What lies past a length may be anything, nan included, and does not show. A query before the row's start (a row of
    length 0, or T past the length) gives zeros and a log-sum-exp of -inf.

    Args:
      q: queries, already rotated to their positions where rope is used.
      k: `[B, S, H]` cached keys; int8 with `k_scale`.
      v: `[B, S, h]` cached values; None where the keys serve as values: as they are stored, their first `value_width`
        elements.
      lengths: valid keys of each row, 0 .. S.
      scale: what scores are multiplied by, usually `H ** -0.5`.
      rope: `[H / 2]` frequencies of keys that are stored before rope, in radians a token; None where no turn is due.
      alibi_slopes: `[N]`, a slope a head.
      k_scale, v_scale: `[B, S]`, what a token's stored elements are multiplied by, for int8.
      value_width: only with `v=None`; None for H.
      return_lse: also the natural log-sum-exp of each query's scores, `[B, T, N]` float32.
      implementation: a name of `IMPLEMENTATIONS`, or `auto`; see `resolve`.

    Returns:
      `[B, T, N, h]` in the type of `q`; with `return_lse` a pair.

    Raises:
      ValueError: shapes that do not fit together, lengths beyond S (where known), int8 without its scale or a scale
        without int8, an unknown implementation.
      NotImplementedError: T past `MAX_QUERIES`.
    """
    _check(q, k, v, lengths, rope, alibi_slopes, k_scale, v_scale, value_width)
    out, lse = IMPLEMENTATIONS[resolve(implementation)](
        q, k, v, lengths, scale=scale, inv_freq=rope, alibi_slopes=alibi_slopes, k_scale=k_scale, v_scale=v_scale,
        value_width=value_width)
    out = out.astype(q.dtype)
    return (out, lse) if return_lse else out


def resolve(implementation: str) -> str:
    """The implementation that serves; `auto` is `xla`, since `reference` holds all scores and is there to compare with.

    Raises:
      ValueError: an unknown name.
    """
    if implementation == "auto":
        return "xla"
    _require(implementation in IMPLEMENTATIONS, "implementation", implementation,
             f"must be one of auto, {', '.join(IMPLEMENTATIONS)}")
    return implementation


def _check(
    q: Array, k: Array, v: Any, lengths: Array, rope: Any, slopes: Any, k_scale: Any, v_scale: Any,
    value_width: int | None,
) -> None:
    _require(q.ndim == 4, "q.shape", q.shape, "must be [B, T, N, H]")
    B, T, N, H = q.shape
    if not 1 <= T <= MAX_QUERIES:
        raise NotImplementedError(f"T={T}: decodes 1 to {MAX_QUERIES} tokens at once; prefill is attention.core.attend")
    _require(k.ndim == 3 and k.shape[0] == B and k.shape[2] == H, "k.shape", k.shape, f"must be [{B}, S, {H}]")
    S = k.shape[1]
    _require(lengths.shape == (B,), "lengths.shape", lengths.shape, f"must be ({B},)")
    if not isinstance(lengths, jax.core.Tracer):
        _require(bool((lengths >= 0).all()) and bool((lengths <= S).all()), "lengths", lengths.tolist(),
                 f"must be in 0 .. {S}, the keys allocated")
    _require(v is None or v.shape[:2] == (B, S), "v.shape", getattr(v, "shape", None), f"must be [{B}, {S}, h]")
    _require(v is None or rope is None, "rope", getattr(rope, "shape", None),
             "only with v=None: keys that are stored before rope are the values too")
    _require(value_width is None or (v is None and 1 <= value_width <= H), "value_width", value_width,
             f"must be in 1 .. {H}, and only with v=None")
    _require(rope is None or (H % 2 == 0 and rope.shape == (H // 2,)), "rope.shape", getattr(rope, "shape", None),
             f"must be ({H / 2:g},), half the width of the keys")
    _require(slopes is None or slopes.shape == (N,), "alibi_slopes.shape", getattr(slopes, "shape", None),
             f"must be ({N},)")
    for name, array, scales in (("k_scale", k, k_scale), ("v_scale", v, v_scale)):
        quantized = array is not None and array.dtype == jnp.int8
        shape = getattr(scales, "shape", None)
        _require(shape == ((B, S) if quantized else None), f"{name}.shape", shape,
                 f"must be ({B}, {S}): int8 has a scale a token" if quantized else "must be None: only int8 has scales")


def _require(condition: bool, field: str, value: object, accepted: str) -> None:
    if not condition:
        raise ValueError(f"{field}={value!r}: {accepted}")
