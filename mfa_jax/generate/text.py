"""Text in, text out: decoding with a tokenizer around it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Int, Key

from mfa_jax.config import require
from mfa_jax.data.tokenizers import StreamDecoder, Tokenizer
from mfa_jax.generate.loop import generate, stream
from mfa_jax.generate.sampling import SamplingConfig
from mfa_jax.model.transformer import Transformer


def encode_prompts(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    """Token ids of the texts, padded on the right, and the length of each.

    Raises:
      ValueError: a text without tokens.
    """
    rows = [np.asarray(tokenizer.encode(text), np.int32) for text in texts]
    for text, row in zip(texts, rows, strict=True):
        require(row.size > 0, "prompt", text, "must have at least one token")
    lengths = np.array([row.size for row in rows], np.int32)
    prompts = np.zeros((len(rows), lengths.max()), np.int32)
    for prompt, row in zip(prompts, rows, strict=True):
        prompt[: row.size] = row
    return prompts, lengths


def complete(
    model: Transformer, params: Any, tokenizer: Tokenizer, texts: Sequence[str], sampling: SamplingConfig,
    key: Key[Array, ""], *, stop_at_end: bool = True, **options: Any,
) -> list[str]:
    """What follows each text; `options` are those of `generate`."""
    prompts, lengths = encode_prompts(tokenizer, texts)
    stops = [tokenizer.eos_id] if stop_at_end else []
    found = generate(model, params, prompts, lengths, sampling, key, stop_tokens=stops, **options)
    return [tokenizer.decode(np.asarray(row)[:size].tolist())
            for row, size in zip(found.tokens, np.asarray(found.lengths), strict=True)]


def stream_text(
    model: Transformer, params: Any, tokenizer: Tokenizer, text: str, sampling: SamplingConfig, key: Key[Array, ""], *,
    stop_at_end: bool = True, **options: Any,
) -> Iterator[str]:
    """What follows the text, in pieces as they come; together they are `complete`'s result. `options`: `stream`'s."""
    prompts, lengths = encode_prompts(tokenizer, [text])
    stops = [tokenizer.eos_id] if stop_at_end else []
    decoder, shown = StreamDecoder(tokenizer, prompts[0].tolist()), 0
    for found in stream(model, params, prompts, lengths, sampling, key, stop_tokens=stops, **options):
        fresh = found.tokens[0, shown : found.lengths[0]]
        shown = int(found.lengths[0])
        yield "".join(decoder.feed(int(token)) for token in fresh)
    yield decoder.flush()
