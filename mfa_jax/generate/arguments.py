"""What `generate` and `stream` are given: checked, and padded to sizes that few programs serve."""

from __future__ import annotations

from typing import Any

import numpy as np

from mfa_jax.config import require
from mfa_jax.kernels import sharded
from mfa_jax.model.transformer import Transformer

SMALLEST_BUCKET = 32


def bucket(size: int) -> int:
    """The size rounded up to the next of 32, 48, 64, 96, 128, ...: at most half more than was asked for."""
    power = SMALLEST_BUCKET
    while power < size:
        if size <= power * 3 // 2:
            return power * 3 // 2
        power *= 2
    return power


def cache_size(longest: int, max_new_tokens: int) -> int:
    """Tokens of a row that a cache is given where nothing else is asked for, on the ambient mesh."""
    return sharded.whole_tiles(bucket(longest + max_new_tokens))


def prepare(
    model: Transformer, prompts: Any, lengths: Any, max_new_tokens: int, stop_tokens: Any, capacity: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, int]:
    """Checked and padded arguments: prompts, lengths, stop tokens, size of the output, capacity of the cache."""
    prompts, lengths = integers("prompts", prompts), integers("lengths", lengths)
    require(prompts.ndim == 2 and prompts.size > 0, "prompts", prompts.shape, "must be token ids of shape [B, T]")
    require(lengths.shape == (len(prompts),), "lengths", lengths.shape, f"must have shape ({len(prompts)},)")
    require(bool(lengths.min() >= 1) and bool(lengths.max() <= prompts.shape[1]), "lengths", lengths.tolist(),
            f"must be in 1 .. {prompts.shape[1]}: a prompt has at least one token")
    require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "must be at least 1")
    vocab = model.config.vocab_size
    real = np.arange(prompts.shape[1]) < lengths[:, None]
    wrong = prompts[real & ((prompts < 0) | (prompts >= vocab))]
    require(wrong.size == 0, "prompts", wrong[:5].tolist(), f"token ids must be in 0 .. {vocab - 1}")
    longest = int(lengths.max())
    if capacity is not None:
        require(longest <= capacity, "prompts", longest,
                f"a prompt is longer than the cache, capacity={capacity} tokens")
        require(longest + max_new_tokens <= capacity, "max_new_tokens", max_new_tokens,
                f"must be at most {capacity - longest}: the prompt's {longest} tokens and the new ones share a cache "
                f"of capacity={capacity}")
    width = bucket(longest)
    if capacity is None:
        capacity = cache_size(longest, max_new_tokens)
    width = min(width, capacity)
    padded = np.zeros((len(prompts), width), np.int32)
    kept = min(width, prompts.shape[1])
    padded[:, :kept] = np.where(real, prompts, 0)[:, :kept]
    stops = integers("stop_tokens", stop_tokens)
    require(not np.any((stops < -1) | (stops >= vocab)), "stop_tokens", stops.tolist(), f"must be in -1 .. {vocab - 1}")
    stops = stops if stops.ndim >= 2 else np.broadcast_to(stops.reshape(1, -1), (len(prompts), stops.size))
    require(stops.shape[0] == len(prompts), "stop_tokens", stops.shape, f"must have {len(prompts)} rows")
    return padded, lengths.astype(np.int32), stops.astype(np.int32), bucket(max_new_tokens), capacity


def integers(name: str, given: Any) -> np.ndarray:
    """As they are: cast to int32 before they are checked, 2 ** 32 + 1 and 1.9 would be token 1."""
    found = np.asarray(given)
    require(found.size == 0 or np.issubdtype(found.dtype, np.integer), name, found.dtype.name, "must be integers")
    return found
