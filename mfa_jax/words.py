"""Narrow floats as integers of their size, which XLA for CPUs writes and reads in place.

It has no scatter and no slice of bfloat16, float16 and float8 there: to write one token, or to read one block, it
converts the whole array to float32 and back. Of integers it does both where they lie. To look at an array so and back
costs nothing inside a program, where the two looks meet; where a program begins or ends with one, a copy.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

_WORDS = {1: jnp.uint8, 2: jnp.uint16}


def as_words(x: Any) -> Any:
    """The bits of narrow floats; other arrays as they are."""
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize in _WORDS
    return lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize]) if narrow else x


def from_words(x: Any, dtype: Any) -> Any:
    """What `as_words` was given, of its type."""
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)
