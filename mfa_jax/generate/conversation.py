"""A text that grows turn by turn: what was read stays in the cache and is not read again."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from mfa_jax.config import require
from mfa_jax.generate.arguments import bucket
from mfa_jax.generate.loop import Generated, decode, read
from mfa_jax.generate.sampling import SamplingConfig
from mfa_jax.model.transformer import Transformer, init_cache


class Conversation:
    """One row of a cache, and the tokens that it holds.

    Each turn is given all tokens of the conversation so far, as a chat template writes it anew: the cache is cut back
    to where they first differ from what it holds, and the rest is read. A template that leaves earlier turns as they
    were costs the new tokens alone.
    """

    def __init__(
        self, model: Transformer, params: Any, sampling: SamplingConfig, key: Key[Array, ""], *, capacity: int,
        cache_dtype: str | None = None,
    ) -> None:
        """Args:
          model: the model that `params` belong to, layers stacked.
          key: turn i draws from `fold_in(key, i)`.
          capacity: tokens that the cache can hold, answers included; allocated at once.
          cache_dtype: of the cached arrays; None for the model's compute type.

        Raises:
          ValueError: no capacity, `top_k` or `vocab_limit` beyond the vocabulary.
        """
        require(capacity >= 1, "capacity", capacity, "must be at least 1")
        sampling.require_within(model.config.vocab_size)
        self._model, self._params, self._sampling, self._key = model, params, sampling, key
        self._capacity, self._turns, self._held = capacity, 0, list[int]()
        self._cache_dtype = cache_dtype
        self._caches: Any = self._empty()

    def _empty(self) -> Any:
        return init_cache(self._model.config, 1, self._capacity, self._cache_dtype, scan_layers=False)

    def _taken(self) -> Any:
        """The caches, which a step is given for good: what interrupts it leaves a conversation that holds nothing."""
        caches, self._caches, self._held = self._caches, None, []
        return self._empty() if caches is None else caches

    @property
    def held(self) -> int:
        """Tokens that are in the cache."""
        return len(self._held)

    def reply(
        self, ids: Sequence[int], *, max_new_tokens: int, stop_tokens: Sequence[int] = (), chunk: int = 4
    ) -> Iterator[Generated]:
        """What follows the conversation, handed out after every `chunk` tokens; one row.

        Args:
          ids: the whole conversation.
          max_new_tokens: at most so many tokens.
          stop_tokens: ids that end the answer.

        Raises:
          ValueError: no tokens, one outside the vocabulary, or more than the cache holds with those that are to come.
        """
        require(len(ids) > 0, "ids", list(ids), "must have at least one token")
        require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "must be at least 1")
        require(chunk >= 1, "chunk", chunk, "must be at least 1")
        vocab = self._model.config.vocab_size
        wrong = [i for i in ids if not 0 <= i < vocab]
        require(not wrong, "ids", wrong[:5], f"token ids must be in 0 .. {vocab - 1}")
        require(len(ids) + max_new_tokens <= self._capacity, "capacity", self._capacity,
                f"must be at least {len(ids) + max_new_tokens}: the conversation has {len(ids)} tokens, and "
                f"max_new_tokens={max_new_tokens} are to come")
        return self._reply([operator.index(i) for i in ids], max_new_tokens, stop_tokens, chunk)

    def _reply(
        self, ids: list[int], max_new_tokens: int, stop_tokens: Sequence[int], chunk: int
    ) -> Iterator[Generated]:
        # The last token is read in any case: the next one follows from it.
        same = min(_common(self._held, ids), len(ids) - 1)
        new = np.zeros((1, min(bucket(len(ids) - same), self._capacity)), np.int32)
        new[0, : len(ids) - same] = ids[same:]
        seen = None
        if self._sampling.repetition_penalty != 1:
            seen = np.zeros((1, self._model.config.vocab_size), bool)
            seen[0, ids] = True
        stops = np.asarray(stop_tokens, np.int32).reshape(1, -1)
        key = jax.random.fold_in(self._key, self._turns)
        self._turns += 1
        state = _extend(self._model, self._params, self._taken(), np.int32(same), new, np.int32(len(ids) - same), stops,
                        key, seen, sampling=self._sampling, buffer=bucket(max_new_tokens))
        limit = 1
        while True:
            found = jax.tree.map(lambda x: np.asarray(x[:, :max_new_tokens] if x.ndim == 2 else x), state.generated)
            # Of what was chosen the last token is not in the cache yet.
            self._caches, self._held = state.caches, [*ids, *found.tokens[0, : found.lengths[0] - 1].tolist()]
            yield found
            if found.stopped.all() or limit >= max_new_tokens:
                return
            limit = min(limit + chunk, max_new_tokens)
            self._taken()
            state = decode(self._model, self._params, state, jnp.int32(limit), sampling=self._sampling)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens at the beginning are the same."""
    same = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        same += 1
    return same


@functools.partial(jax.jit, static_argnames=("model", "sampling", "buffer"), donate_argnames="caches")
def _extend(
    model: Transformer, params: Any, caches: Any, start: Int[Array, ""], tokens: Int[Array, "1 T"],
    length: Int[Array, ""], stops: Int[Array, "1 Z"], key: Key[Array, ""], seen: Bool[Array, "1 V"] | None, *,
    sampling: SamplingConfig, buffer: int,
) -> Any:
    """Cuts the caches back to `start` tokens, reads `length` of `tokens`, and chooses the next."""
    caches = tuple(cache.with_length(jnp.reshape(start, (1,))) for cache in caches)
    return read(model, params, caches, tokens, jnp.reshape(length, (1,)), stops, key, seen, sampling=sampling,
                buffer=buffer)
