"""Our evaluation beside lm-eval's own of `transformers`, on the same items: what each says of each request.

    python -m experiments.check_evaluation --hf DIR --tasks local_hellaswag,local_bbh --local-data DIR --limit 50 \\
        --output record.json

We compute in float32. Exit code 1 says that the two sides disagree, by the rule of what a task asks for:

* choices: a metric differs, or a log-likelihood by more than `--tolerance`,
* whole texts: a log-likelihood differs by more than `--tolerance` for each thousand nats of it,
* texts that are written: a metric differs.

Needs the extras: pip install "mfa_jax[bench,evaluate]" accelerate.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments import cli
from experiments.evaluate import EvaluateConfig, evaluate, load_tasks, require_new
from experiments.opening import open_model
from mfa_jax.config import require


@dataclasses.dataclass(frozen=True)
class CheckEvaluationConfig:
    """A checkpoint and the tasks that both sides are given."""

    hf: str
    """A Hugging Face folder."""
    tasks: str
    """Names, separated by commas."""
    output: str
    """File of the record, written after each task; must not exist yet."""
    local_data: str | None = None
    """Folder of the files of the local_ tasks, at any depth."""
    limit: int = 50
    """Only the first so many items of each task."""
    max_length: int = 2048
    """Tokens of a row at most."""
    apply_chat_template: bool = False
    """Write requests as conversations."""
    add_bos_token: bool = False
    """Begin every context with the begin token, on both sides; by itself the peer goes by the tokenizer's files."""
    peer_dtype: Literal["float32", "float64"] = "float32"
    """What the peer computes in; float64 says which side of a difference is off."""
    peer_batch_size: int = 8
    """Rows that the peer computes at once."""
    tolerance: float = 1e-3
    """Largest difference of two log-likelihoods that is accepted, in nats; of whole texts, for each thousand nats."""

    def __post_init__(self) -> None:
        require_new(self.output)
        require(self.tolerance >= 0, "tolerance", self.tolerance, "must not be negative")
        require(self.peer_batch_size >= 1, "peer_batch_size", self.peer_batch_size, "must be at least 1")

    def of(self, task: str) -> EvaluateConfig:
        return EvaluateConfig(tasks=task, hf=self.hf, local_data=self.local_data, limit=self.limit,
                              max_length=self.max_length, apply_chat_template=self.apply_chat_template,
                              add_bos_token=self.add_bos_token)


class EvaluationError(ArithmeticError):
    """The two sides are further apart than was accepted."""


def compare(ours: dict[str, Any], peer: dict[str, Any], tolerance: float) -> dict[str, Any]:
    """What differs between two results of lm-eval for one task.

    Log-likelihoods of choices are compared in nats, those of whole texts (some ten thousand nats) relative to a
    thousand of them; texts that were generated, by equality.
    """
    (task,) = ours["results"]
    metrics = {name: [value, peer["results"][task][name]] for name, value in ours["results"][task].items()
               if isinstance(value, float) and "stderr" not in name}
    pairs = list(zip(_answers(ours["samples"][task]), _answers(peer["samples"][task]), strict=True))
    found: dict[str, Any] = {"items": len(ours["samples"][task]), "requests": len(pairs), "metrics": metrics}
    if isinstance(pairs[0][0], str):
        found["equal_texts"] = sum(mine == theirs for mine, theirs in pairs)
        return found | {"agree": all(a == b for a, b in metrics.values())}
    if isinstance(pairs[0][0], float):
        difference = _largest(abs(a - b) / max(1.0, abs(b) / 1000) for a, b in pairs)
        return found | {"largest_difference_per_1000_nats": difference, "agree": difference <= tolerance}
    difference = _largest(abs(a[0] - b[0]) for a, b in pairs)
    return found | {"largest_difference": difference, "equal_greedy": sum(a[1] == b[1] for a, b in pairs),
                    "agree": difference <= tolerance and all(a == b for a, b in metrics.values())}


def _largest(differences: Iterable[float]) -> float:
    """The maximum, and nan where one is."""
    return float(np.max(list(differences)))


def _answers(samples: list[dict[str, Any]]) -> list[Any]:
    """The answers to all requests of all items, in order: (log-likelihood, greedy), log-likelihood, or text."""
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    return [response[0] for sample in ordered for response in sample["resps"]]


def peer_results(config: CheckEvaluationConfig, model: Any, manager: Any, tasks: list[Any]) -> dict[str, Any]:
    import lm_eval

    found = lm_eval.simple_evaluate(model, tasks=tasks, task_manager=manager, limit=config.limit,
                                    apply_chat_template=config.apply_chat_template, bootstrap_iters=0)
    return dict(found)


def main(config: CheckEvaluationConfig) -> None:
    load_tasks(config.of(config.tasks))
    from lm_eval.models.huggingface import HFLM

    opened = open_model(None, config.hf)
    peer = HFLM(config.hf, dtype=config.peer_dtype, device="cpu", batch_size=config.peer_batch_size,
                max_length=config.max_length, add_bos_token=config.add_bos_token)
    record: dict[str, Any] = {
        **{name: value for name, value in dataclasses.asdict(config).items() if name != "local_data"},
        "machine": platform.processor() or platform.machine(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "torch", "transformers", "lm_eval")},
        "results": {}}
    for task in config.of(config.tasks).task_names:
        # Loaded once for each side: lm-eval keeps what it was answered in the tasks.
        start = time.monotonic()
        ours = evaluate(config.of(task), opened, *load_tasks(config.of(task)), log_samples=True)
        between = time.monotonic()
        theirs = peer_results(config, peer, *load_tasks(config.of(task)))
        seconds = [round(between - start, 1), round(time.monotonic() - between, 1)]
        record["results"][task] = {**compare(ours, theirs, config.tolerance), "seconds": seconds}
        print(json.dumps({task: record["results"][task]}), file=sys.stderr)
        Path(config.output).write_text(json.dumps(record, indent=1) + "\n")
    apart = [task for task, found in record["results"].items() if not found["agree"]]
    if apart:
        raise EvaluationError(f"{', '.join(apart)}: further apart than tolerance={config.tolerance:g}")


if __name__ == "__main__":
    cli.run(lambda: main(cli.parse(CheckEvaluationConfig)))
