"""MFA-KR at the start of training (arXiv 2412.19255, section 3): how alpha and N_kr begin, and at what rates."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.studies import report
from experiments.studies.records import Record
from experiments.studies.study import Results, Run, Scale, Study, tuned
from mfa_jax.config import ModelConfig
from mfa_jax.presets import model_preset

STARTS: dict[str, dict[str, float]] = {
    "zero": {},
    "V = K": {"n_kr_init_scale": 0.0},
    "one": {"alpha_init": 1.0},
    "free": {"alpha_init": 1.0, "n_kr_init_diagonal": -1.0},
    "small": {"alpha_init": 0.1},
    "random": {"alpha_init_scale": 1.0},
    "zero, N_kr x 0.1": {"n_kr_init_scale": 0.1},
    "zero, N_kr x 3": {"n_kr_init_scale": 3.0},
}
"""Settings of MFA-KR by name, what matters most first; the first is the default."""
FIRST = ("zero", "one", "V = K", "free")
"""These are run to their last seed before the others begin: the paper's start, and what it is to be better than."""
FACTORS = (1, 4, 16, 64)
"""Learning rates over the lowest of the scale's grid."""
STABLE = 1.05
"""A rate is stable when the final loss is at most this times that of the start's best rate."""
SPIKE, BEFORE = 0.5, 9
"""A spike is a loss so many nats above the median of the (at most) so many before it: several times the noise."""


def plan(scale: Scale, results: Results) -> list[Run]:
    """Every start, and MFA beside them, over rates four times apart; a quarter of the steps, gradients watched."""
    rates = tuple(scale.learning_rates[0] * factor for factor in FACTORS)
    scale = dataclasses.replace(scale, steps=scale.steps // 4, learning_rates=rates)
    found = models(scale)
    parts = ({name: found[name] for name in FIRST}, {name: m for name, m in found.items() if name not in FIRST})
    return [run for part in parts for run in tuned(scale, part, results, log_every=max(scale.steps // 80, 1))]


def models(scale: Scale) -> dict[str, ModelConfig]:
    """The model of each start, and of MFA."""
    reuse: Any = model_preset(f"{scale.preset}-mfa-kr")
    found = {name: dataclasses.replace(reuse, attention=dataclasses.replace(reuse.attention, **changes))
             for name, changes in STARTS.items()}
    return {**found, "MFA": model_preset(f"{scale.preset}-mfa")}


def section(found: Sequence[Record], folder: Path) -> str:
    """Loss at each start's best rate, the largest stable rate; gradients and spikes at each rate; the grid; curves."""
    rows, watched = [], []
    groups = report.groups(found)
    zero = groups.get("zero")
    default = report.at_best_rate(zero) if zero else []
    rates = sorted({run.labels["learning_rate"] for run in found})
    for name, runs in groups.items():
        chosen = report.at_best_rate(runs)
        against = ["", "", ""] if name == "zero" else report.compared(chosen, default, report.planned_seeds(found))
        rows.append([name, f"{chosen[0].labels['learning_rate']:g}" if chosen else "none",
                     report.spread(report.values(chosen)), *against, stable_rate(runs)])
        grid = {run.labels["learning_rate"]: run for run in runs if run.labels["seed"] == found[0].labels["seed"]}
        each = [watch(grid[rate]) if rate in grid else ["missing"] * 3 for rate in rates]
        watched.append([name, *(", ".join(cells) for cells in zip(*each, strict=True))])
    table = report.table(
        ["start", "best rate", "bits per byte on books-test", "against zero, 95 % interval", report.COMPARED[1],
         "loss against zero", "largest stable rate"], rows)
    watches = report.table(["at each rate, lowest first", "gradient norm, first logged", "largest after warm-up",
                            "loss spikes"], watched)
    return "\n\n".join([table, watches, report.rates_table(found), _picture(found, folder)])


def stable_rate(runs: Sequence[Record]) -> str:
    """The largest rate whose final validation loss is within `STABLE` of the best; of the first seed."""
    grid = [run for run in runs if run.labels["seed"] == runs[0].labels["seed"] and run.outcome == "finished"]
    if not grid:
        return "none"
    limit = STABLE * min(run.metrics["valid_bits_per_byte"] for run in grid)
    rate = max(run.labels["learning_rate"] for run in grid if run.metrics["valid_bits_per_byte"] <= limit)
    return f"{rate:g}{' or more' if rate == max(run.labels['learning_rate'] for run in runs) else ''}"


def watch(run: Record) -> list[str]:
    """Three cells of a run: the first gradient norm logged, the largest past the warm-up, how often the loss jumped."""
    points = [(step, loss, norm) for step, loss, norm in zip(
        run.curve["step"], run.curve["loss"], run.curve["grad_norm"], strict=True) if None not in (loss, norm)]
    warm = run.config["optimizer"]["warmup_steps"]
    later = [point for point in points if point[0] > warm]
    losses, spikes, high = [loss for _, loss, _ in points], 0, False
    for i in range(1, len(points)):
        was, high = high, losses[i] > float(np.median(losses[max(i - BEFORE, 0):i])) + SPIKE
        spikes += high and not was and points[i][0] > warm
    first = f"{points[0][2]:.2f}" if points else "none"
    return [first, f"{max(norm for _, _, norm in later):.2f}" if later else "none", str(spikes)]


def _picture(found: Sequence[Record], folder: Path) -> str:
    figure = Figure(figsize=(10, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, runs in report.groups(found).items():
        seed = runs[0].labels["seed"]
        grid = sorted((run.labels["learning_rate"], run.metrics["valid_bits_per_byte"]) for run in runs
                      if run.labels["seed"] == seed and run.outcome == "finished")
        if not grid:
            continue
        line = left.plot(*zip(*grid, strict=True), "o-", markersize=4, label=name)
        curve = report.at_best_rate(runs)[0].curve
        points = np.array([(s, g) for s, g in zip(curve["step"], curve["grad_norm"], strict=True) if g is not None])
        right.plot(points[:, 0], points[:, 1], linewidth=1, color=line[0].get_color())
    left.set(xscale="log", xlabel="learning rate", ylabel="bits per byte on books-valid", title="final loss")
    right.set(yscale="log", xlabel="step", ylabel="global norm of the gradient", title="at the best rate, first seed")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=7)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return report.save(figure, folder / f"{found[0].scale}.png")


STUDY = Study("key_reuse_start", "MFA-KR at the start of training", plan, section)
