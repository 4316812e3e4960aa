"""Cache against quality (arXiv 2412.19255, figure 1): the six variants at equal parameters, data and steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure

from experiments.capacity import COLORS
from experiments.studies import report
from experiments.studies.records import Record
from experiments.studies.study import Results, Run, Scale, Study, tuned
from mfa_jax.presets import model_preset

VARIANTS = ("mha", "mfa", "mfa-kr", "mla", "mqa", "gqa")
"""In the order in which they matter, should a run be cut off."""
PAIRS = (("mfa", "mha"), ("mfa", "mla"), ("mfa", "mqa"), ("mfa", "gqa"), ("mfa-kr", "mfa"), ("mfa-kr", "mqa"),
         ("mfa-kr", "mha"))


def plan(scale: Scale, results: Results) -> list[Run]:
    """Every variant over the grid of learning rates, then more seeds at its best."""
    return tuned(scale, {name: model_preset(f"{scale.preset}-{name}") for name in VARIANTS}, results)


def section(found: Sequence[Record], folder: Path) -> str:
    """Bits per byte beside cached bytes, the pairs that the paper speaks of, and the grid of learning rates."""
    chosen = {name: report.at_best_rate(runs) for name, runs in report.groups(found).items()}
    chosen = {name: runs for name, runs in chosen.items() if runs}
    rows = []
    for name, runs in sorted(chosen.items(), key=lambda item: -item[1][0].metrics["cache_bytes_per_token"]):
        model, metrics = runs[0].config["model"], runs[0].metrics
        rows.append([name, str(model["attention"]["num_heads"]), f"{metrics['parameters']:,}",
                     f"{metrics['cache_bytes_per_token']:,.0f}", f"{runs[0].labels['learning_rate']:g}",
                     report.spread(report.values(runs))])
    losses = report.table(["variant", "heads", "parameters", "cached bytes a token (bfloat16, measured)",
                           "learning rate", "bits per byte on books-test"], rows)
    seeds = report.planned_seeds(found)
    pairs = [[f"{left} - {right}", *report.compared(chosen[left], chosen[right], seeds)]
             for left, right in PAIRS if left in chosen and right in chosen]
    differences = report.table(["difference, bits per byte", *report.COMPARED, "loss of the first"], pairs)
    return "\n\n".join([losses, differences, report.rates_table(found), _picture(chosen, folder, found[0].scale)])


def _picture(chosen: dict[str, list[Record]], folder: Path, scale: str) -> str:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    order = sorted(chosen.items(), key=lambda item: np.mean(report.values(item[1])))
    for i, (name, runs) in enumerate(order):
        bytes_, losses = runs[0].metrics["cache_bytes_per_token"], report.values(runs)
        color = COLORS[name.replace("-", "_")]
        axes.plot([bytes_] * len(losses), losses, ".", color=color, alpha=0.5)
        axes.plot(bytes_, np.mean(losses), "o", color=color, markersize=8, alpha=0.7)
        axes.annotate(name.upper(), (bytes_, float(np.mean(losses))), xytext=(8, 5 if i % 2 else -12),
                      textcoords="offset points")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ticker.ScalarFormatter())
    axes.set(xlabel="cached bytes a token, all layers (bfloat16, measured)", ylabel="bits per byte on books-test",
             title=f"Equal parameters, data, steps ({scale}); dots: seeds, circles: means")
    axes.margins(x=0.15, y=0.15)
    axes.grid(alpha=0.3)
    return report.save(figure, folder / f"{scale}.png")


STUDY = Study("cache_quality", "Cache against quality", plan, section)
