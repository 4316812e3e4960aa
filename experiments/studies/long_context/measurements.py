"""What any model with its own tokenizer says of the tasks: loss by position, the needle, and recall of pairs."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from experiments.studies.long_context import tasks
from experiments.studies.measure import cache_bytes_per_token
from mfa_jax.data import Tokenizer
from mfa_jax.model.loss import token_scores
from mfa_jax.model.transformer import Transformer, unembedding

RECALL = ("told_bits", "fresh_bits", "again_bits", "held_bits", "held_bits_per_cached_byte")
"""Metrics of recall, a number for each count of pairs that fits."""


@dataclasses.dataclass(frozen=True)
class Judge:
    """A model that is asked, and how many rows at once."""

    model: Transformer
    params: Any
    tokenizer: Tokenizer
    rows: int
    begin: int | None = None
    """Token that is put before every row; None for none."""

    def bits(self, task: tasks.Task) -> np.ndarray:
        """Of each target, `[B, T]`; nan where it is not asked for."""
        tokens = task.tokens if self.begin is None else np.insert(task.tokens, 0, self.begin, axis=1)
        parts = [np.asarray(_losses(self.model, self.params, tokens[i:i + self.rows]))
                 for i in range(0, len(tokens), self.rows)]
        return np.where(task.asked, np.concatenate(parts)[:, -task.asked.shape[1]:], np.nan)

    def bits_per_byte(self, task: tasks.Task) -> float:
        """Over all that is asked for; nan where the model gives one."""
        return float(self.bits(task)[task.asked].sum() / task.asked_bytes)


@functools.partial(jax.jit, static_argnames="model")
def _losses(model: Transformer, params: Any, tokens: jax.Array) -> jax.Array:
    """Bits of each token but the first."""
    hidden, _ = model.apply({"params": params}, tokens[:, :-1], method="hidden")
    return -token_scores(hidden, unembedding(params, model.config), tokens[:, 1:]).logprob / math.log(2)


def by_position(judge: Judge, documents: list[np.ndarray], rows: int, length: int) -> dict[str, Any]:
    """Bits per byte of text between positions 0, 16, 32, 64, ... of windows of `length` tokens."""
    task = tasks.windows(documents, rows, length, judge.tokenizer)
    bits = judge.bits(task) * (task.asked.sum() / task.asked_bytes)
    edges = [0, *(2**k for k in range(4, int(math.log2(length)) + 1))]
    if edges[-1] < length:
        edges.append(length)
    return {"position_edges": edges,
            "position_bits": [float(bits[:, a:b].mean()) for a, b in zip(edges, edges[1:], strict=False)]}


def needles(judge: Judge, documents: list[np.ndarray], rows: int, lengths: Sequence[int], depths: Sequence[float],
            seed: int) -> dict[str, Any]:
    """Bits a digit of the needle, for each length and depth; chance is `log2(10) = 3.32`."""
    return {"needle_bits": [[judge.bits_per_byte(tasks.needle(documents, rows, length, depth, seed, judge.tokenizer))
                             for depth in depths] for length in lengths]}


def recall(judge: Judge, rows: int, counts: Sequence[int], length: int, seed: int) -> dict[str, Any]:
    """Bits a byte of values as they are told, with other keys after that, and with their own, and what is held of them.

    Counts of pairs that do not fit into `length` tokens are left out.
    """
    cached, begin = cache_bytes_per_token(judge.model.config), len(judge.tokenizer.encode("\n"))
    found: dict[str, list[float]] = {name: [] for name in RECALL}
    for count in counts:
        asked = tasks.pairs(rows, count, seed, judge.tokenizer)
        if asked[0].asked.shape[1] > length:
            continue
        told, fresh, again = map(judge.bits_per_byte, asked)
        held = held_bits(count, fresh, again)
        # What the pairs take of the cache before they are asked for.
        tokens = float(asked[0].lengths.mean() - begin) / 2
        for name, value in zip(RECALL, (told, fresh, again, held, held / (tokens * cached)), strict=True):
            found[name].append(value)
    return found


def held_bits(count: int, fresh: float, again: float) -> float:
    """`2 count (fresh - again)`: two value bytes a pair, and what each costs less than after another key."""
    return 2 * count * (fresh - again)
