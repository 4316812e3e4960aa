"""What is measured of each model: its loss on rows of the test texts, and which items of the tasks it gets right."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from experiments.evaluate import EvaluateConfig, evaluate, load_tasks
from experiments.opening import Opened
from experiments.studies import corpus
from experiments.studies.long_context.tasks import text_bytes
from mfa_jax.config import require
from mfa_jax.data import Tokenizer, documents
from mfa_jax.evaluate import loglikelihoods

TEXTS = ("books-test", "wikitext2-test")
CHARACTERS_PER_TOKEN = 12
"""More than a token of any text has on average: what is cut out of the text for each token of a row."""


@dataclasses.dataclass(frozen=True)
class TextLoss:
    """The loss on some rows of a text, row by row, so that two models are compared on each."""

    nats: list[float]
    """Negative log-likelihood of a row, all tokens but its first."""
    bytes: list[int]
    """Bytes of UTF-8 that those tokens stand for."""
    tokens: int
    """Those tokens, of each row."""


@dataclasses.dataclass(frozen=True)
class TaskScore:
    """The items of a task."""

    metric: str
    """`acc_norm` where the task has it, otherwise `acc`."""
    right: str
    """1 for each item that was answered rightly, 0 for the others, in the order of the items."""


def text_loss(opened: Opened, name: str, rows: int, tokens: int) -> TextLoss:
    """The loss on `rows` rows of `tokens` predicted tokens, evenly spread over a text."""
    ids = spread_rows(opened.tokenizer, "\n".join(document.text for document in documents(str(corpus.find(name)))),
                      rows, tokens + 1, name)
    scores = loglikelihoods(opened.model, opened.params, [(row[:1], row[1:]) for row in ids.tolist()])
    sizes = [text_bytes(opened.tokenizer, row[1:]) for row in ids.tolist()]
    return TextLoss([-score.logprob for score in scores], sizes, tokens)


def spread_rows(tokenizer: Tokenizer, text: str, rows: int, length: int, name: str) -> np.ndarray:
    """`[rows, length]` tokens, each row from the middle of its own of `rows` equal parts of the text on.

    Raises:
      ValueError: the text is too short for a row.
    """
    span = CHARACTERS_PER_TOKEN * length
    require(len(text) >= span, "text_tokens", length - 1,
            f"{name} has {len(text)} characters, a row is cut out of {span}")
    starts = [int((row + 0.5) / rows * (len(text) - span)) for row in range(rows)]
    found = [tokenizer.encode(text[start : start + span])[:length] for start in starts]
    require(all(len(row) == length for row in found), "text_tokens", length - 1,
            f"a row of {name} has fewer tokens in {span} characters")
    return np.stack(found)


def task_scores(opened: Opened, tasks: tuple[str, ...], items: int, data: str) -> dict[str, TaskScore]:
    """The first items of each task, as lm-eval scores them."""
    if not tasks:
        return {}
    config = EvaluateConfig(tasks=",".join(tasks), local_data=data, limit=items)
    found = evaluate(config, opened, *load_tasks(config), log_samples=True)
    return {task: _score(samples) for task, samples in found["samples"].items()}


def _score(samples: list[dict[str, Any]]) -> TaskScore:
    metric = "acc_norm" if "acc_norm" in samples[0] else "acc"
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    return TaskScore(metric, "".join(str(int(sample[metric])) for sample in ordered))
