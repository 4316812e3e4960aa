"""The quickstart's page: `report.md` and one picture for each thing it compares."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mfa_jax.config import TrainConfig
from mfa_jax.generate import SamplingConfig


def _column(title: str) -> Any:
    return dataclasses.field(metadata={"title": title})


@dataclasses.dataclass(frozen=True)
class Row:
    """One variant of the comparison."""

    variant: str = _column("variant")
    heads: int = _column("heads")
    parameters: int = _column("parameters")
    cache_bytes_closed_form: int = _column("cache bytes per token, closed form")
    cache_bytes_measured: float = _column("cache bytes per token, measured")
    frh: int = _column("FRH")
    slsd: int = _column("SLSD")
    ter: int = _column("TER")


def cells(row: Row) -> list[str]:
    """A row of the table as text."""
    return [f"{value:,.0f}" if isinstance(value, (int, float)) else value for value in dataclasses.astuple(row)]


def write(
    workdir: Path, config: TrainConfig, metrics: dict[str, float], texts: dict[str, str], sampling: SamplingConfig,
    rows: Sequence[Row],
) -> Path:
    """Writes the page and its pictures into `workdir`; returns the page's path."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    _plot_loss(lines, workdir / "loss.png")
    _plot_bars(rows, {"parameters": "model parameters"}, "parameters", workdir / "parameters.png")
    _plot_bars(rows, {"cache_bytes_closed_form": "closed form", "cache_bytes_measured": "measured on the arrays"},
               "cache, bytes per token (float32, all layers)", workdir / "cache.png")
    _plot_bars(rows, {"frh": "FRH: factorization rank per head", "slsd": "SLSD: shared latent subspace dimension",
                      "ter": "TER: total effective rank"}, "rank, dimensions per layer", workdir / "ranks.png")
    page = workdir / "report.md"
    page.write_text(_page(config, metrics, texts, sampling, rows))
    return page


def _page(
    config: TrainConfig, metrics: dict[str, float], texts: dict[str, str], sampling: SamplingConfig, rows: Sequence[Row]
) -> str:
    fields = dataclasses.fields(Row)
    header = "| " + " | ".join(f.metadata["title"] for f in fields) + " |"
    body = ["| " + " | ".join(cells(row)) + " |" for row in rows]
    mha, mfa, kr = (next(r for r in rows if r.variant == name) for name in ("mha", "mfa", "mfa-kr"))
    smaller = [mha.cache_bytes_measured / row.cache_bytes_measured for row in (mfa, kr)]
    written = "\n".join(f"```python\n{prompt}{text}\n```\n" for prompt, text in texts.items())
    return f"""# Quickstart: an MFA language model

`{config.preset}`, {config.steps} steps of {config.data.batch_size} x {config.data.sequence_length} bytes of the source
of Python's standard library. Held-out documents: {metrics["eval_bits_per_byte"]:.3f} bits per byte
(loss {metrics["eval_loss"]:.3f} nats per token).

![loss](loss.png)

## What it writes

Decoded from the checkpoint, through the cache, temperature {sampling.temperature:g}, top-p {sampling.top_p:g};
the first line of each begins with the prompt.

{written}
## What the factorization buys

Six variants of this size, matched in parameters. The cache of MFA is {smaller[0]:.1f} times smaller than MHA's
and that of MFA-KR {smaller[1]:.1f} times, measured on the allocated arrays;
MFA's total effective rank is {mfa.ter / mha.ter:.1f} times MHA's.

{header}
|{" --- |" * len(fields)}
{chr(10).join(body)}

![cache](cache.png)

![ranks](ranks.png)

![parameters](parameters.png)

FRH, SLSD and TER are the paper's measures of a layer (arXiv 2412.19255, section 2); the table shows capacity and
memory, not quality: only MFA was trained here.
"""


def _plot_loss(lines: Sequence[dict[str, Any]], path: Path) -> None:
    # Not through pyplot, whose backend belongs to whoever imports this: a notebook shows its own figures.
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    train = [(line["step"], line["bits_per_byte"]) for line in lines if "bits_per_byte" in line]
    held_out = [(line["step"], line["eval_bits_per_byte"]) for line in lines if "eval_bits_per_byte" in line]
    axes.plot(*zip(*train, strict=True), label="training batch", linewidth=1)
    axes.plot(*zip(*held_out, strict=True), "o-", label="held-out documents")
    axes.set(xlabel="step", ylabel="loss, bits per byte", title="MFA on the source of the standard library")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def _plot_bars(rows: Sequence[Row], series: dict[str, str], label: str, path: Path) -> None:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(series)
    for i, (name, title) in enumerate(series.items()):
        at = [x + (i - (len(series) - 1) / 2) * width for x in range(len(rows))]
        bars = axes.bar(at, [getattr(row, name) for row in rows], width, label=title)
        axes.bar_label(bars, fmt="{:,.0f}", fontsize=7, padding=2, rotation=0 if len(series) == 1 else 45)
    axes.set_xticks(range(len(rows)), [row.variant for row in rows])
    axes.set_ylabel(label)
    axes.margins(y=0.2)
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
