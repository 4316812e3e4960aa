"""The factorization (arXiv 2412.19255, section 3): C, N and Q at equal parameters, and at equal cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from experiments.studies import report
from experiments.studies.records import Record
from experiments.studies.study import Results, Run, Scale, Study, tuned
from mfa_jax import capacity
from mfa_jax.circuits import circuits
from mfa_jax.config import ModelConfig, from_dict
from mfa_jax.data import Prepared
from mfa_jax.presets import match_feed_forward, matched, model_preset
from mfa_jax.train.run import Trained

WIDTHS = ((2, 2), (1, 1), (4, 4), (2, 1), (2, 4), (1, 2), (4, 2))
"""C and Q over MHA's head width H; heads are solved for MHA's attention parameters. The paper's choice is first."""
HEADS = (4, 16)
"""Heads at the cache of the paper's choice, C = Q = 2H; the feed-forward pays for them or takes what they leave."""


def plan(scale: Scale, results: Results) -> list[Run]:
    """Every shape over the grid of learning rates, then more seeds at its best."""
    return tuned(scale, models(scale), results)


def models(scale: Scale) -> dict[str, ModelConfig]:
    """All with as many parameters as the MHA model, by shape."""
    reference = model_preset(f"{scale.preset}-mha")
    paper: Any = model_preset(f"{scale.preset}-mfa").attention
    H = paper.latent_dim // 2
    found = [matched(reference, dataclasses.replace(paper, latent_dim=c * H, query_rank=q * H)) for c, q in WIDTHS]
    found += [match_feed_forward(reference, dataclasses.replace(paper, num_heads=n)) for n in HEADS]
    return {shape(model.attention): model for model in found}


def shape(attention: Any) -> str:
    return f"C{attention.latent_dim}-Q{attention.query_rank}-N{attention.num_heads}"


def measure(scale: Scale, trained: Trained, test: Prepared) -> dict[str, Any]:
    """Effective ranks of the trained circuits, mean over heads and layers; nominally both are at most FRH."""
    ranks = [circuits(trained.params, layer).ranks() for layer in range(trained.config.model.num_layers)]
    return {name: float(np.mean([found[name] for found in ranks])) for name in ("W_effective_rank", "U_effective_rank")}


def section(found: Sequence[Record], folder: Path) -> str:
    """Loss beside the paper's measures and measured ranks, against the first shape's; what it follows; the frontier."""
    chosen = {name: report.at_best_rate(runs) for name, runs in report.groups(found).items()}
    first, seeds = next(iter(chosen)), report.planned_seeds(found)
    rows, points = [], []
    for name, runs in chosen.items():
        if not runs:
            rows.append([name, *[""] * 8, "diverged", "", "", ""])
            continue
        model = from_dict(ModelConfig, runs[0].config["model"])
        nominal, metrics = capacity.analyse_model(model, context=1), runs[0].metrics
        points.append((name, nominal.ter, nominal.slsd, nominal.frh, metrics["cache_bytes_per_token"],
                       report.values(runs)))
        rows.append([name, str(model.ffn_dim), f"{metrics['parameters']:,}", f"{metrics['cache_bytes_per_token']:,.0f}",
                     str(nominal.frh), str(nominal.slsd), str(nominal.ter),
                     *(f"{np.mean(report.values(runs, m)):.1f}" for m in ("W_effective_rank", "U_effective_rank")),
                     report.spread(report.values(runs)),
                     *(["", "", ""] if name == first else report.compared(runs, chosen[first], seeds))])
    losses = report.table(["shape", "feed-forward", "parameters", "cached bytes a token", "FRH", "SLSD", "TER",
                           "effective rank of W", "of U", "bits per byte on books-test",
                           f"against {first}, 95 % interval", report.COMPARED[1], f"loss against {first}"], rows)
    return "\n\n".join([losses, _follows(points), report.rates_table(found), _picture(points, folder, found[0].scale)])


_MEASURES = ("TER", "SLSD", "FRH", "cached bytes a token")
_Point = tuple[str, int, int, int, float, list[float]]
"""A shape: its name, its measures, and its losses."""


def _follows(points: Sequence[_Point]) -> str:
    """Rank correlation of the mean loss with each measure, over all shapes, and over those of one SLSD.

    Over all shapes the measures go together, so that no correlation is of its measure alone. There is no p value: the
    shapes are chosen, not drawn, and few.
    """
    paper = [point for point in points if point[2] == points[0][2]]
    groups = [(f"{len(points)} shapes", points), (f"{len(paper)} shapes with SLSD = {points[0][2]}", paper)]
    rows = [[name, *(_correlation(group, i) for i in range(3))] for name, group in groups] if points else []
    return report.table(["Spearman's correlation of the loss, over shapes", *_MEASURES[:3]], rows)


def _correlation(points: Sequence[_Point], measure: int) -> str:
    found = [point[1 + measure] for point in points]
    if len(set(found)) < 3:
        return "too few shapes"
    return f"{stats.spearmanr(found, [np.mean(values) for *_, values in points]).statistic:+.2f}"


def _picture(points: Sequence[_Point], folder: Path, scale: str) -> str:
    figure = Figure(figsize=(16, 4.5), layout="constrained")
    panels = figure.subplots(1, len(_MEASURES), sharey=True)
    for i, axes in enumerate(panels):
        for name, *measures, losses in sorted(points, key=lambda point: np.mean(point[-1])):
            drawn = axes.plot([measures[i]] * len(losses), losses, ".", alpha=0.5)
            axes.plot(measures[i], np.mean(losses), "o", color=drawn[0].get_color(), label=name)
        axes.set(xlabel=_MEASURES[i] + (" [dimensions]" if i < 3 else ""),
                 ylabel="" if i else "bits per byte on books-test")
        axes.margins(x=0.1)
        axes.grid(alpha=0.3)
    # In order of loss, beside the panels: next to the points names would lie on each other.
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles[::-1], names[::-1], loc="outside right upper")
    figure.suptitle(f"MFA at equal parameters ({scale}); dots are seeds")
    return report.save(figure, folder / f"{scale}.png")


STUDY = Study("factorization", "The factorization", plan, section, measure)
