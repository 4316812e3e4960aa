"""Random calls of `decode_attention` made on the device, and how far an output is from the definition."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.kernel_cases import Case
from mfa_jax.cache import SCALED, quantize
from mfa_jax.kernels import decode_attention

SHARPNESS = 4.0
"""Standard deviation of scores: each query then attends to a handful of keys, and a key that is left out shows."""
TOLERANCE = 2**-5
"""Largest difference of outputs that is let pass, over the largest output. A score of up to 20 is the sum of products
that are rounded to bfloat16, 2^-9 each: errors of 0.01, and some of 0.03, in the exponent."""


def random_call(case: Case, S: int, seed: Any, lengths: Any, garbage: Any) -> dict[str, Any]:
    """Arrays of a call, a row at a time; past the lengths `garbage` is stored, of types with a scale as that.

    Args:
      seed: int32, may be traced.
      lengths: `[B]` int32.
      garbage: a number, such as nan.
    """
    names = ("k",) if case.value_width is not None else ("k", "v")
    heads = (case.K,) if case.K > 1 else ()

    def row(given: tuple[Any, Any]) -> dict[str, Any]:
        key, length = given
        made: dict[str, Any] = {}
        held = jnp.arange(S) < length
        for name, one in zip(names, jax.random.split(key, len(names)), strict=True):
            x = jax.random.normal(one, (*heads, S, case.H))
            if jnp.dtype(case.cache_dtype) in SCALED:
                made[name], scale = quantize(x, case.cache_dtype)
                made[f"{name}_scale"] = jnp.where(held, scale, garbage)
            else:
                made[name] = jnp.where(held[:, None], x, garbage).astype(case.cache_dtype)
        return made

    of_queries, of_rows = jax.random.split(jax.random.key(seed))
    B = lengths.shape[0]
    call = jax.lax.map(row, (jax.random.split(of_rows, B), lengths))
    call["q"] = (SHARPNESS * jax.random.normal(of_queries, (B, case.T, case.N, case.H))).astype(case.dtype)
    rope = 500000.0 ** (-jnp.arange(case.H // 2) / (case.H // 2)) if case.rope else None
    return {"v": None, "k_scale": None, "v_scale": None, **call, "lengths": lengths, "rope": rope,
            "alibi_slopes": 2.0 ** -jnp.arange(1, case.N + 1) if case.alibi else None}


def timed_lengths(length: int | None, lengths: tuple[int, ...], batch: int, seed: int) -> np.ndarray:
    """`batch` rows of one length; for None a mix from the shortest to the longest of `lengths`, log-uniform."""
    if length is not None:
        return np.full(batch, length, np.int32)
    low, high = math.log(min(lengths)), math.log(max(lengths))
    return np.exp(np.random.default_rng(seed).uniform(low, high, batch)).astype(np.int32)


def border_lengths(S: int, batch: int, seed: int) -> np.ndarray:
    """Lengths for a check: those at the ends of what a row may have, and random ones."""
    drawn = np.random.default_rng(seed).integers(0, S + 1, batch)
    ends = (S - 1, S, 0, 1, S // 2 + 1)[:batch]
    drawn[: len(ends)] = ends
    return drawn.astype(np.int32)


def reference(case: Case, call: dict[str, Any]) -> Any:
    """The definition in float32, a row at a time: all scores of one row are in memory, not those of all."""
    fixed = {name: call[name] for name in ("rope", "alibi_slopes")}
    rows = {name: x for name, x in call.items() if name not in fixed and x is not None}

    def one(row: dict[str, Any]) -> Any:
        arrays: dict[str, Any] = {"v": None, **{name: x[None] for name, x in row.items()}, **fixed}
        arrays["q"] = arrays["q"].astype(jnp.float32)
        return decode_attention(**arrays, scale=case.H**-0.5, value_width=case.value_width,
                                implementation="reference")[0]

    return jax.lax.map(one, rows)


def difference(out: Any, wanted: Any) -> Any:
    """Largest difference over the largest output wanted; nan where an output is not a number."""
    return jnp.abs(out.astype(jnp.float32) - wanted).max() / jnp.abs(wanted).max()
