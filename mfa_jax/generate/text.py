"""Text in, text out: decoding with a tokenizer around it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Int, Key

from mfa_jax.config import require
from mfa_jax.data.streaming import StreamDecoder
from mfa_jax.data.tokenizers import Tokenizer
from mfa_jax.generate.loop import generate, stream
from mfa_jax.generate.sampling import SamplingConfig
from mfa_jax.model.transformer import Transformer


def encode_prompts(
    tokenizer: Tokenizer, texts: Sequence[str], *, add_bos_token: bool = False
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    """Token ids of the texts, padded on the right, and the length of each.

    Args:
      add_bos_token: begin each with the tokenizer's begin token.

    Raises:
      ValueError: no texts, or one without tokens; no begin token where one is asked for.
    """
    require(not isinstance(texts, str), "texts", texts, "must be a sequence of texts, not one text")
    require(len(texts) > 0, "texts", list(texts), "must be at least one")
    require(not add_bos_token or tokenizer.bos_id is not None, "add_bos_token", add_bos_token,
            "the tokenizer has no begin token")
    begin = [tokenizer.bos_id] if add_bos_token else []
    rows = [np.asarray([*begin, *tokenizer.encode(text)], np.int32) for text in texts]
    for text, row in zip(texts, rows, strict=True):
        require(row.size > 0, "prompt", text, "must have at least one token")
    lengths = np.array([row.size for row in rows], np.int32)
    prompts = np.zeros((len(rows), lengths.max()), np.int32)
    for prompt, row in zip(prompts, rows, strict=True):
        prompt[: row.size] = row
    return prompts, lengths


def complete(
    model: Transformer, params: Any, tokenizer: Tokenizer, texts: Sequence[str], sampling: SamplingConfig,
    key: Key[Array, "..."], *, stop_at_end: bool = True, add_bos_token: bool = False, **options: Any,
) -> list[str]:
    """What follows each text, up to one of the tokenizer's `stop_ids`; `options` are those of `generate`."""
    prompts, lengths = encode_prompts(tokenizer, texts, add_bos_token=add_bos_token)
    stops = tokenizer.stop_ids if stop_at_end else ()
    found = generate(model, params, prompts, lengths, _spelt(sampling, tokenizer, model), key, stop_tokens=stops,
                     **options)
    texts = []
    for prompt, length, row, size in zip(prompts, lengths, np.asarray(found.tokens), np.asarray(found.lengths),
                                         strict=True):
        decoder = StreamDecoder(tokenizer, prompt[:length].tolist())
        texts.append("".join([*map(decoder.feed, row[:size].tolist()), decoder.flush()]))
    return texts


def stream_text(
    model: Transformer, params: Any, tokenizer: Tokenizer, text: str, sampling: SamplingConfig, key: Key[Array, ""], *,
    stop_at_end: bool = True, add_bos_token: bool = False, **options: Any,
) -> Iterator[str]:
    """What follows the text, in pieces as they come; together they are `complete`'s result. `options`: `stream`'s."""
    prompts, lengths = encode_prompts(tokenizer, [text], add_bos_token=add_bos_token)
    stops = tokenizer.stop_ids if stop_at_end else ()
    decoder, shown = StreamDecoder(tokenizer, prompts[0].tolist()), 0
    for found in stream(model, params, prompts, lengths, _spelt(sampling, tokenizer, model), key, stop_tokens=stops,
                        **options):
        fresh = found.tokens[0, shown : found.lengths[0]]
        shown = int(found.lengths[0])
        yield "".join(decoder.feed(int(token)) for token in fresh)
    yield decoder.flush()


def _spelt(sampling: SamplingConfig, tokenizer: Tokenizer, model: Transformer) -> SamplingConfig:
    """Sampling among the tokens that the tokenizer can spell: the model's tables may have more rows."""
    limit = min(sampling.vocab_limit or model.config.vocab_size, tokenizer.vocab_size)
    return dataclasses.replace(sampling, vocab_limit=limit) if limit < model.config.vocab_size else sampling
