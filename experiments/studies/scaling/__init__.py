"""Scaling: the loss of each variant over four sizes, its exponent, and whether MFA's best width moves with size."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from experiments.studies import report
from experiments.studies.records import Record
from experiments.studies.study import SHORT_ROPE, Results, Run, Scale, Study, lower_rates, tuned
from mfa_jax import capacity
from mfa_jax.config import ModelConfig, from_dict
from mfa_jax.presets import matched, sized_model

SIZES = {"tiny": ((1, 32), (2, 64), (2, 96), (3, 128)), "nano": ((3, 64), (4, 96), (5, 128), (6, 192)),
         "small": ((6, 256), (8, 384), (10, 512), (12, 640))}
"""Layers and width D at each scale, smallest first; MHA's heads are D / 8 wide."""
VARIANTS = ("mfa", "mha", "mfa-kr", "mla", "mqa")
WIDTHS = {"mfa, C = H": 1, "mfa": 2, "mfa, C = 4H": 4}
"""MFA's C = Q over MHA's head width."""


def plan(scale: Scale, results: Results) -> list[Run]:
    """Every variant and width at every size over the grid of learning rates, then more seeds at its best."""
    scale = lower_rates(scale)
    parts = [tuned(scale, models(layers, width), results, size=width) for layers, width in SIZES[scale.preset]]
    first = len(scale.learning_rates) * (len(VARIANTS) + len(WIDTHS) - 1)
    return [run for part in parts for run in part[:first]] + [run for part in parts for run in part[first:]]


def models(layers: int, width: int) -> dict[str, ModelConfig]:
    """The models of one size, by variant or width, with the size in their name."""
    found = {name: sized_model(name, layers, width, width // 8) for name in VARIANTS}
    paper: Any = found["mfa"].attention
    for name, times in WIDTHS.items():
        C = times * (width // 8)
        found[name] = matched(found["mha"], dataclasses.replace(paper, latent_dim=C, query_rank=C))
    return {f"{name} D{width}": dataclasses.replace(model, position=SHORT_ROPE) for name, model in found.items()}


def section(found: Sequence[Record], folder: Path) -> str:
    """Losses by size, exponents with intervals, the best width at each size, rates, and the curves."""
    sizes = sorted({record.labels["size"] for record in found})
    chosen: dict[str, dict[int, list[Record]]] = {}
    for runs in report.groups(found).values():
        chosen.setdefault(family(runs[0]), {})[runs[0].labels["size"]] = report.at_best_rate(runs)
    rows, exponents = [], []
    for name, by_size in chosen.items():
        rows.append([name, *(report.spread(report.values(by_size.get(size, []))) for size in sizes)])
        exponents.append([name, *exponent([run for runs in by_size.values() for run in runs])])
    best = [best_width(chosen, size, report.planned_seeds(found)) for size in sizes]
    table = report.table(["bits per byte on books-test", *(f"D = {size}" for size in sizes)],
                         [*rows, ["best width of MFA", *best]])
    fits = report.table(["loss = a P^-b", "b, 95 % interval", "residual, bits per byte"], exponents)
    return "\n\n".join([table, fits, report.rates_table(found), _picture(chosen, folder, found[0].scale)])


def best_width(chosen: dict[str, dict[int, list[Record]]], size: int, seeds: int) -> str:
    """The width of MFA with the lowest mean loss at a size, and how it compares with the next; none before all ran."""
    runs = {name: chosen.get(name, {}).get(size, []) for name in WIDTHS}
    if min(map(len, runs.values())) < seeds:
        return "too few seeds"
    winner, second = sorted(runs, key=lambda name: float(np.mean(report.values(runs[name]))))[:2]
    return f"{winner} (against {second}: {report.compared(runs[winner], runs[second], seeds)[-1]})"


def family(record: Record) -> str:
    """The variant or width, without the size."""
    return str(record.labels["name"]).rsplit(" ", 1)[0]


def parameters(run: Record) -> int:
    """Those beside the embedding, P."""
    return capacity.model_parameters(from_dict(ModelConfig, run.config["model"])).non_embedding


def exponent(runs: Sequence[Record]) -> list[str]:
    """Two cells: b of the power law, by least squares of the logarithms over sizes, and what it leaves.

    A size is one point, the mean over its seeds: that the law does not hold moves all seeds of a size alike, so that
    more of them are no more evidence for it. The interval has `sizes - 2` degrees of freedom.
    """
    by_size: dict[int, list[float]] = {}
    for run in runs:
        by_size.setdefault(parameters(run), []).extend(report.values([run]))
    P, losses = list(by_size), [float(np.mean(values)) for values in by_size.values()]
    if len(P) < 3:
        return ["too few sizes", ""]
    fit = stats.linregress(np.log(P), np.log(losses))
    half = float(stats.t.ppf(0.975, len(P) - 2)) * fit.stderr
    left = np.array(losses) - np.exp(fit.intercept) * np.array(P, float) ** fit.slope
    return [f"{-fit.slope:.4f} ± {half:.4f}", f"{math.sqrt(np.mean(left**2)):.4f}"]


def _picture(chosen: dict[str, dict[int, list[Record]]], folder: Path, scale: str) -> str:
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    ticks = {size: parameters(runs[0]) for by_size in chosen.values() for size, runs in by_size.items() if runs}
    for name, by_size in chosen.items():
        groups = [runs for runs in by_size.values() if runs]
        points = [(parameters(runs[0]), float(np.mean(report.values(runs)))) for runs in groups]
        for axes, there in ((left, name in VARIANTS), (right, name in WIDTHS)):
            if there and points:
                axes.plot(*zip(*points, strict=True), "o-", label=name)
    for axes, title in ((left, "variants"), (right, "widths of MFA")):
        axes.set(xscale="log", xlabel="parameters beside the embedding", title=title)
        axes.set_xticks(list(ticks.values()), [f"{tick / 1e6:.2g} M" for tick in ticks.values()])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    left.set_ylabel(f"bits per byte on books-test ({scale})")
    return report.save(figure, folder / f"{scale}.png")


STUDY = Study("scaling", "Scaling", plan, section)
