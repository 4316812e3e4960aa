"""Texts that follow prompts, up to a stop string, many at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from mfa_jax.config import require
from mfa_jax.data import Tokenizer
from mfa_jax.evaluate.batches import largest_batch, padded_batch, require_ids, require_mesh
from mfa_jax.generate import Generated, SamplingConfig, bucket, stream
from mfa_jax.model.transformer import Transformer


def complete_until(
    model: Transformer, params: Any, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], until: Sequence[str],
    sampling: SamplingConfig, key: Key[Array, ""], *, max_new_tokens: int, batch_tokens: int = 4096, chunk: int = 16,
    cache_dtype: str | None = None, on_done: Callable[[int], object] = lambda _: None,
) -> list[str]:
    """What follows each prompt, cut off before the first stop string, before what ends a text, or at the most tokens.

    Prompts are sorted by length, and decoded in batches; a batch ends when each of its rows has. A prompt's text does
    not depend on the others: prompt i draws from `fold_in(key, i)`, so that equal prompts get texts of their own.

    Args:
      model: the model that `params` belong to, layers stacked.
      prompts: token ids, at least one each.
      until: strings that end a text; one that spells a special token stands for that token, which leaves no text.
      max_new_tokens: at most so many tokens a text.
      batch_tokens: tokens that the caches of a batch hold; a longer row is a batch of its own.
      chunk: stop strings are looked for after so many tokens.
      cache_dtype: of the cached arrays; None for the model's compute type.
      on_done: called with the number of prompts that were done since the last call.

    Raises:
      ValueError: an empty prompt or stop string, an id outside the vocabulary.
      NotImplementedError: a mesh that splits the sequence.
    """
    require_mesh()
    require(batch_tokens >= 1, "batch_tokens", batch_tokens, "must be at least 1")
    require("" not in until, "until", list(until), "a stop string must not be empty")
    for i, prompt in enumerate(prompts):
        require(len(prompt) > 0, "prompts", f"number {i}", "must have at least one token")
        require_ids(prompt, model.config.vocab_size)
    texts = [""] * len(prompts)
    special = [at for stop in until if (at := tokenizer.special_id(stop)) is not None]
    stops = list(dict.fromkeys([*tokenizer.stop_ids, *special]))
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    while order:
        largest = largest_batch(bucket(len(prompts[order[0]]) + max_new_tokens), batch_tokens)
        members, order = order[:largest], order[largest:]
        filled = [*members, *[members[-1]] * (padded_batch(len(members), largest) - len(members))]
        rows, lengths = _padded([prompts[i] for i in filled])
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.array(filled))
        found = [""] * len(members)
        for generated in stream(model, params, rows, lengths, sampling, keys, max_new_tokens=max_new_tokens,
                                stop_tokens=stops, chunk=chunk, cache_dtype=cache_dtype):
            found, ended = _texts(generated, tokenizer, until, len(members))
            if all(ended):
                break
        for i, text in zip(members, found, strict=True):
            texts[i] = text
        on_done(len(members))
    return texts


def _padded(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts `[B, T]` and their lengths."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    rows = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt
    return rows, lengths


def _texts(
    generated: Generated, tokenizer: Tokenizer, until: Sequence[str], count: int
) -> tuple[list[str], list[bool]]:
    """The text of each of the first rows so far, cut off, and whether it has ended."""
    found, ended = [], []
    for tokens, length, stopped in zip(generated.tokens[:count], generated.lengths, generated.stopped, strict=False):
        # Special tokens leave no text, the end token among them.
        text = tokenizer.decode(tokens[:length].tolist())
        cuts = [at for stop in until if (at := text.find(stop)) >= 0]
        found.append(text[: min(cuts)] if cuts else text)
        ended.append(bool(cuts) or bool(stopped))
    return found, ended
