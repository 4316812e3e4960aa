"""The whole loop on one page: train a small MFA model on real text, decode from its checkpoint, compare the variants.

    python -m experiments.quickstart --workdir runs/quickstart

Reads the source of Python's own standard library, so nothing is downloaded. Writes `report.md` and its pictures into
the workdir. A run that was cut off goes on where it was.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from experiments import quickstart_report as report
from experiments.cli import parse, run
from mfa_jax import capacity
from mfa_jax.config import DataConfig, OptimizerConfig, TrainConfig, require
from mfa_jax.generate import SamplingConfig, complete
from mfa_jax.model.transformer import init_cache
from mfa_jax.presets import model_preset
from mfa_jax.train.loop import train
from mfa_jax.train.run import load_trained

VARIANTS = ("mha", "gqa", "mqa", "mla", "mfa", "mfa-kr")
PROMPTS = ("def ", "class ", "import ", "    for ")
SAMPLING = SamplingConfig(temperature=0.8, top_p=0.95)


@dataclasses.dataclass(frozen=True)
class QuickstartConfig:
    """A small MFA language model, trained, saved, decoded and compared."""

    workdir: str = "runs/quickstart"
    """Folder of everything that is written."""
    tiny: bool = False
    """A smaller model for a few steps: a check that everything works, not text worth reading."""
    steps: int | None = None
    """Training steps; none for 450 (tiny: 30)."""
    seed: int = 0
    """Of the parameters, the order of the data, and the decoded text."""

    def __post_init__(self) -> None:
        require(self.steps is None or self.steps >= 1, "steps", self.steps, "must be at least 1")


def train_config(config: QuickstartConfig) -> TrainConfig:
    """The run: `nano-mfa` on windows of 128 bytes; `tiny-mfa` on windows of 64."""
    steps = config.steps or (30 if config.tiny else 450)
    return TrainConfig(
        workdir=config.workdir,
        preset="tiny-mfa" if config.tiny else "nano-mfa",
        model=model_preset("tiny-mfa" if config.tiny else "nano-mfa"),
        data=DataConfig(sequence_length=64 if config.tiny else 128, batch_size=8 if config.tiny else 16,
                        seed=config.seed),
        optimizer=OptimizerConfig(kind="muon", learning_rate=1.5e-2, warmup_steps=min(20, steps // 3)),
        steps=steps, seed=config.seed, log_every=10, eval_every=max(steps // 4, 1), save_every=max(steps // 2, 1),
    )


def decode(config: QuickstartConfig) -> dict[str, str]:
    """What the trained model writes after each prompt: one batch, one compiled call."""
    trained = load_trained(config.workdir)
    sampling = dataclasses.replace(SAMPLING, vocab_limit=trained.tokenizer.vocab_size)
    texts = complete(trained.model, trained.params, trained.tokenizer, PROMPTS, sampling, jax.random.key(config.seed),
                     max_new_tokens=64 if config.tiny else 256)
    return dict(zip(PROMPTS, texts, strict=True))


def compare(config: QuickstartConfig) -> list[report.Row]:
    """The six variants at the size that was trained: parameters, cache, capacity. Caches are allocated and measured."""
    scale = "tiny" if config.tiny else "nano"
    rows, batch, tokens = [], 2, 64
    for name in VARIANTS:
        model = model_preset(f"{scale}-{name}")
        analysis = capacity.analyse_model(model, context=256, cache_dtype="float32")
        cache = init_cache(model, batch, tokens, "float32")
        rows.append(report.Row(
            variant=name, heads=analysis.heads, parameters=capacity.model_parameters(model).total,
            cache_bytes_closed_form=analysis.cache_bytes_per_token,
            cache_bytes_measured=cache.nbytes / (batch * tokens),
            frh=analysis.frh, slsd=analysis.slsd, ter=analysis.ter))
    return rows


def main() -> None:
    config = parse(QuickstartConfig, default=QuickstartConfig())
    console, began = Console(), time.perf_counter()
    console.rule("training")
    result = train(train_config(config))
    if result.interrupted:
        console.print(f"stopped at step {result.step}; the same command goes on from there")
        return
    console.rule("decoding from the checkpoint")
    texts = decode(config)
    for prompt, text in texts.items():
        console.print(f"[bold]{prompt}[/bold]", end="")
        console.print(text, markup=False, highlight=False)
        console.print("-" * 20)
    console.rule("what the factorization buys")
    rows = compare(config)
    table = Table(*(field.metadata["title"] for field in dataclasses.fields(report.Row)))
    for row in rows:
        table.add_row(*report.cells(row))
    console.print(table)
    page = report.write(Path(config.workdir), train_config(config), result.metrics, texts, SAMPLING, rows)
    console.print(f"report: {page} ({time.perf_counter() - began:.0f} s)")


if __name__ == "__main__":
    run(main)
