"""Long context on any model: loss by position, a needle in books, and recall of pairs that were told.

    python -m experiments.long_context --hf DIR --text books.txt --length 2048
    python -m experiments.long_context --workdir runs/converted --text books.txt --tasks loss,needle --output found.json
    python -m experiments.long_context --hf DIR --text hf:emozilla/pg19-test:test --length 8192      # PG-19

The measurements of the study `long_context`, with the tokenizer of the model; the needle and the pairs are ours, and
none of a named suite (RULER's tasks are `experiments.evaluate`'s). Figures are bits per byte of what was asked: of text
by its position in tokens, of the digits of the needle (chance 3.32), of two-letter values.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from experiments import cli
from experiments.evaluate import require_new
from experiments.opening import OpenConfig
from experiments.studies.long_context import DEPTHS, PAIRS, PARTS, tasks
from experiments.studies.long_context.measurements import Judge, by_position, needles, recall
from mfa_jax.config import require

TASKS = ("loss", "needle", "recall")


@dataclasses.dataclass(frozen=True)
class LongContextConfig(OpenConfig):
    """What is asked of which model."""

    tasks: str = ",".join(TASKS)
    """Among loss, needle and recall, separated by commas."""
    text: str | None = None
    """Long documents: a file, a folder or hf:NAME:SPLIT; loss and needle need them."""
    documents: int = 8
    """The first so many documents of 256 KB or more."""
    length: int = 2048
    """Tokens of a window; the needle is looked for in half, three quarters and all of it."""
    rows: int = 16
    """Windows of each kind."""
    batch_rows: int = 4
    """Windows that are computed at once."""
    add_bos_token: bool = False
    """Put the begin token before every window, which some models were trained to see; it is not counted."""
    seed: int = 7
    """Of needles and pairs."""
    output: str | None = None
    """File that the results are written to, as JSON; must not exist yet."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.names if name not in TASKS]
        require(bool(self.names) and not unknown, "tasks", self.tasks, f"must name some of {', '.join(TASKS)}")
        require(self.text is not None or self.names == ["recall"], "text", None, "must name long documents")
        require(self.length >= 64, "length", self.length, "must be at least 64")
        for name in ("documents", "rows", "batch_rows"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        require_new(self.output)

    @property
    def names(self) -> list[str]:
        return [name.strip() for name in self.tasks.split(",") if name.strip()]


def measure(config: LongContextConfig) -> dict[str, Any]:
    """Figures of each task that was named, and what they are of."""
    opened = config.open()
    begin = opened.tokenizer.bos_id if config.add_bos_token or opened.add_bos_token else None
    require(not config.add_bos_token or begin is not None, "add_bos_token", True, "the tokenizer has no begin token")
    judge = Judge(opened.model, opened.params, opened.tokenizer, config.batch_rows, begin)
    found: dict[str, Any] = {"model": opened.name, "attention": opened.model.config.attention.variant,
                             "length": config.length, "rows": config.rows, "text": config.text}
    if config.text is not None and config.names != ["recall"]:
        books = tasks.read_long_documents(config.text, opened.tokenizer, config.documents)
        lengths = [round(part * config.length) for part in PARTS]
        if "needle" in config.names:  # a length that it can't have is told before anything is measured
            for length in lengths:
                tasks.needle(books, config.rows, length, DEPTHS[0], config.seed, opened.tokenizer)
        if "loss" in config.names:
            found |= by_position(judge, books, config.rows, config.length)
        if "needle" in config.names:
            found |= {"needle_lengths": lengths, "needle_depths": DEPTHS}
            found |= needles(judge, books, config.rows, lengths, DEPTHS, config.seed)
    if "recall" in config.names:
        told = recall(judge, config.rows, PAIRS, config.length, config.seed)
        found |= {"pairs": PAIRS[:len(told["told_bits"])]} | told
    return found


def main(config: LongContextConfig) -> None:
    found = measure(config)
    print(json.dumps(found))
    if config.output is not None:
        partial = Path(config.output).with_name(f"{Path(config.output).name}.partial")
        partial.write_text(json.dumps(found, indent=1) + "\n")
        partial.rename(config.output)


if __name__ == "__main__":
    cli.run(lambda: main(cli.parse(LongContextConfig)))
