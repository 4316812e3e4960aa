"""Log-likelihoods of continuations, many at once: batched by length, one compiled program for each shape.

A request is a context and a continuation, both token ids. Requests that read the same tokens are read once, such as the
choices of a question that are one token each. What is read is sorted by length and padded on the right to a bucket
(`generate.bucket`), which causal attention does not see; so are batches, to a power of two. On a mesh a batch is split
over its batch axes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from mfa_jax.axes import constrain
from mfa_jax.config import require
from mfa_jax.evaluate.batches import largest_batch, padded_batch, require_ids, require_mesh
from mfa_jax.generate import bucket
from mfa_jax.model.loss import TokenScores, token_scores
from mfa_jax.model.transformer import Transformer, unembedding

Request = tuple[Sequence[int], Sequence[int]]


class Score(NamedTuple):
    """What a model says of one continuation."""

    logprob: float
    """Sum over its tokens of their log-probabilities, in nats."""
    greedy: bool
    """Whether each of its tokens is a most probable one."""


class _Row(NamedTuple):
    """Tokens that are read once, and what is asked of them."""

    tokens: tuple[int, ...]
    requests: list[int]
    """Number of the request that each question is of."""
    positions: list[int]
    targets: list[int]
    """The token after each position whose score is asked for."""


def loglikelihoods(
    model: Transformer, params: Any, requests: Sequence[Request], *, batch_tokens: int = 4096,
    on_done: Callable[[int], object] = lambda _: None,
) -> list[Score]:
    """`sum_t log p(continuation_t | context, continuation_<t)` of each request.

    Args:
      model: the model that `params` belong to, layers stacked.
      requests: a context and a continuation each, neither empty.
      batch_tokens: tokens of a batch, padding counted in; a longer row is a batch of its own.
      on_done: called with the number of requests that were done since the last call.

    Raises:
      ValueError: an empty context or continuation, an id outside the vocabulary.
      NotImplementedError: a mesh that splits the sequence.
    """
    require_mesh()
    require(batch_tokens >= 1, "batch_tokens", batch_tokens, "must be at least 1")
    rows = _rows(requests, model.config.vocab_size)
    sums, greedy = np.zeros(len(requests)), np.ones(len(requests), bool)
    for batch in _batches(rows, batch_tokens):
        tokens, positions, targets = _padded(batch, batch_tokens)
        scores = jax.device_get(_score(model, params, tokens, positions, targets))
        for row, logprob, best in zip(batch, *scores, strict=False):
            # In float64: a long text is a sum of many terms.
            np.add.at(sums, row.requests, logprob[: len(row.requests)].astype(np.float64))
            np.logical_and.at(greedy, row.requests, best[: len(row.requests)])
        on_done(len({i for row in batch for i in row.requests}))
    return [Score(float(total), bool(all_best)) for total, all_best in zip(sums, greedy, strict=True)]


def _rows(requests: Sequence[Request], vocab_size: int) -> list[_Row]:
    """What is to be read, longest first."""
    rows: dict[tuple[int, ...], _Row] = {}
    for i, (context, continuation) in enumerate(requests):
        require(len(context) > 0 and len(continuation) > 0, "requests", f"number {i}",
                "must have a context and a continuation of at least one token each")
        require_ids((*context, *continuation), vocab_size)
        read = (*context, *continuation[:-1])
        row = rows.setdefault(read, _Row(read, [], [], []))
        row.requests.extend([i] * len(continuation))
        row.positions.extend(range(len(context) - 1, len(read)))
        row.targets.extend(continuation)
    return sorted(rows.values(), key=lambda row: -len(row.tokens))


def _batches(rows: Iterable[_Row], batch_tokens: int) -> Iterator[list[_Row]]:
    """Neighbours that share a shape."""
    batch: list[_Row] = []
    for row in rows:
        if batch and (_shape(row) != _shape(batch[0]) or len(batch) == largest_batch(_shape(row)[0], batch_tokens)):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _shape(row: _Row) -> tuple[int, int]:
    return bucket(len(row.tokens)), bucket(len(row.targets))


def _padded(batch: list[_Row], batch_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens `[B, T]`, positions and targets `[B, C]`."""
    T, C = _shape(batch[0])
    B = padded_batch(len(batch), largest_batch(T, batch_tokens))
    tokens, positions, targets = np.zeros((B, T), np.int32), np.zeros((B, C), np.int32), np.zeros((B, C), np.int32)
    for b, row in enumerate(batch):
        tokens[b, : len(row.tokens)] = row.tokens
        positions[b, : len(row.positions)] = row.positions
        targets[b, : len(row.targets)] = row.targets
    return tokens, positions, targets


@functools.partial(jax.jit, static_argnames="model")
def _score(
    model: Transformer, params: Any, tokens: Int[Array, "B T"], positions: Int[Array, "B C"],
    targets: Int[Array, "B C"],
) -> TokenScores:
    """Of each row, what the states at some positions say of some tokens."""
    tokens = constrain(tokens, "batch", "sequence")
    hidden, _ = model.apply({"params": params}, tokens, method="hidden")
    asked = jnp.take_along_axis(hidden, positions[..., None], axis=1)
    scores = token_scores(constrain(asked, "batch", None, None), unembedding(params, model.config), targets)
    return jax.tree.map(lambda x: constrain(x, None, None), scores)  # of several processes each can read them
