"""What scoring and generating ask of a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax

from mfa_jax.axes import RULES
from mfa_jax.config import require


def largest_batch(tokens_of_row: int, batch_tokens: int) -> int:
    """Rows of a batch of at most so many tokens: at least one, and a multiple of what the mesh splits it over."""
    shards = _shards()
    return max(1, batch_tokens // tokens_of_row // shards) * shards


def padded_batch(rows: int, largest: int) -> int:
    """Rows to compute for so many: at most twice as many or the largest batch, so that few shapes are compiled."""
    size = _shards()
    while size < rows:
        size *= 2
    return min(size, largest)


def _shards() -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape.get(axis, 1) for axis in RULES.batch or ())


def require_mesh() -> None:
    """Refuses what evaluation can't run on.

    Raises:
      NotImplementedError: a mesh that splits the sequence.
    """
    split = jax.sharding.get_abstract_mesh().shape.get("context", 1)
    if split > 1:
        raise NotImplementedError(f"mesh context={split}: evaluation does not split a sequence; use data, fsdp, expert "
                                  f"or tensor")


def require_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Refuses token ids outside the vocabulary."""
    wrong = [i for i in ids if not 0 <= i < vocab_size]
    require(not wrong, "tokens", wrong[:5], f"token ids must be in 0 .. {vocab_size - 1}")
