"""The factorization (arXiv 2412.19255, section 3): C, N and Q at equal parameters, and at equal cache."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from experiments.studies import cache_quality, records, report
from experiments.studies.records import Record
from experiments.studies.study import SCALES, Results, Run, Scale, Study, results_of, tuned
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
MEASURES = ("TER", "SLSD", "FRH", "cached bytes a token")
RANKS = ("W_effective_rank", "U_effective_rank")
START = "start.json"
"""These ranks before training, by run, as `factorization.start` writes them."""


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
    return effective_ranks(trained.params, trained.config.model.num_layers)


def effective_ranks(params: Any, num_layers: int) -> dict[str, float]:
    """Mean over heads and layers."""
    found = [circuits(params, layer).ranks() for layer in range(num_layers)]
    return {name: float(np.mean([ranks[name] for ranks in found])) for name in RANKS}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A shape whose runs have finished: its nominal measures, and its records at the best rate."""

    name: str
    measures: dict[str, float]
    """By the names of `MEASURES`."""
    runs: list[Record]

    @property
    def loss(self) -> float:
        return float(np.mean(report.values(self.runs)))


def measured(name: str, runs: list[Record]) -> Shape:
    nominal = capacity.analyse_model(from_dict(ModelConfig, runs[0].config["model"]), context=1)
    numbers = (nominal.ter, nominal.slsd, nominal.frh, runs[0].metrics["cache_bytes_per_token"])
    return Shape(name, dict(zip(MEASURES, numbers, strict=True)), runs)


# ---- the report ------------------------------------------------------------------------------------------------


def section(found: Sequence[Record], folder: Path) -> str:
    """Loss beside the paper's measures and measured ranks, against the first shape's; what it follows; the frontier."""
    chosen = {name: report.at_best_rate(runs) for name, runs in report.groups(found).items()}
    first, seeds = next(iter(chosen)), report.planned_seeds(found)
    path = folder / START
    start = json.loads(path.read_text())["ranks"] if path.exists() else {}
    rows, shapes = [], []
    for name, runs in chosen.items():
        if not runs:
            rows.append([name, *[""] * 8, "diverged", "", "", ""])
            continue
        shapes.append(measured(name, runs))
        model, parameters, measures = runs[0].config["model"], runs[0].metrics["parameters"], shapes[-1].measures
        rows.append([name, str(model["ffn_dim"]), f"{parameters:,}",
                     *(f"{measures[measure]:,.0f}" for measure in reversed(MEASURES)),
                     *(_ranks(runs, rank, start.get(found[0].scale, {})) for rank in RANKS),
                     report.spread(report.values(runs)),
                     *(["", "", ""] if name == first else report.compared(runs, chosen[first], seeds))])
    losses = report.table(["shape", "feed-forward", "parameters", *reversed(MEASURES),
                           "effective rank of W: at the start, trained", "of U", "bits per byte on books-test",
                           f"against {first}, 95 % interval", report.COMPARED[1], f"loss against {first}"], rows)
    return "\n\n".join([losses, _follows(shapes), at_equal(shapes, seeds), frontier(shapes, seeds),
                        beside(shapes, peers(found, folder), seeds), report.rates_table(found),
                        _picture(shapes, folder, found[0].scale)])


def _ranks(runs: Sequence[Record], rank: str, start: dict[str, dict[str, float]]) -> str:
    """Mean over runs, before and after training."""
    before = [start[run.run][rank] for run in runs if run.run in start]
    known = f"{np.mean(before):.1f}" if len(before) == len(runs) else "not measured"
    return f"{known}, {np.mean(report.values(runs, rank)):.1f}"


def _follows(shapes: Sequence[Shape]) -> str:
    """Rank correlation of the mean loss with each measure, over all shapes, and over those with the first one's ranks.

    Over all shapes the measures go together, so that no correlation is of its measure alone. There is no p value: the
    shapes are chosen, not drawn, and few.
    """
    alike = groups(shapes, ("SLSD", "FRH"))
    rows = []
    for name, group in [("all", shapes), *list(alike.items())[:1]] if shapes else []:
        rows.append([f"{len(group)} shapes{'' if name == 'all' else f' with {name}'}",
                     *(_correlation(group, measure) for measure in MEASURES[:3])])
    return report.table(["Spearman's correlation of the loss, over shapes", *MEASURES[:3]], rows)


def _correlation(shapes: Sequence[Shape], measure: str) -> str:
    found = [shape.measures[measure] for shape in shapes]
    if len(set(found)) < 3:
        return "too few values" if len(set(found)) > 1 else "all equal"
    return f"{stats.spearmanr(found, [shape.loss for shape in shapes]).statistic:+.2f}"


def groups(shapes: Sequence[Shape], held: Sequence[str]) -> dict[str, list[Shape]]:
    """Shapes that agree in these measures, by the values of these."""
    by: dict[str, list[Shape]] = {}
    for one in shapes:
        by.setdefault(", ".join(f"{name} = {one.measures[name]:,.0f}" for name in held), []).append(one)
    return by


def at_equal(shapes: Sequence[Shape], seeds: int) -> str:
    """What of the loss is left to a measure where others are equal: each shape against that with the least of it."""
    rows = []
    for held in (("SLSD", "FRH"), ("TER",)):
        free = [measure for measure in MEASURES if measure not in held]
        for name, alike in groups(shapes, held).items():
            least, *others = sorted(alike, key=lambda one: [one.measures[measure] for measure in free])
            for one in others:
                differ = [f"{measure} {one.measures[measure]:,.0f}, {least.measures[measure]:,.0f}"
                          for measure in free if one.measures[measure] != least.measures[measure]]
                rows.append([f"{name}: {one.name} - {least.name}", "; ".join(differ),
                             *report.compared(one.runs, least.runs, seeds)])
    return report.table(["at equal measures, bits per byte", "these differ", *report.COMPARED, "loss of the first"],
                        rows)


def frontier(shapes: Sequence[Shape], seeds: int) -> str:
    """The lowest mean loss of each cache size, and whether it is told apart from the lowest of those with less cache.

    Both are the best of several by the very losses that are compared, which flatters the side with more shapes.
    """
    rows, less = [], list[Shape]()
    for _, alike in sorted(groups(shapes, MEASURES[-1:]).items(), key=lambda item: item[1][0].measures[MEASURES[-1]]):
        best = min(alike, key=lambda one: one.loss)
        before = min(less, key=lambda one: one.loss) if less else None
        against = [before.name, *report.compared(best.runs, before.runs, seeds)] if before else ["none", "", "", ""]
        rows.append([f"{best.measures[MEASURES[-1]]:,.0f}", str(len(alike)), best.name,
                     report.spread(report.values(best.runs)), *against])
        less += alike
    return report.table([MEASURES[-1], "shapes", "the best of them", "bits per byte on books-test",
                         "the best with less cache", *report.COMPARED, "loss against that"], rows)


def peers(found: Sequence[Record], folder: Path) -> dict[str, list[Record]]:
    """Other variants at their best rates, of `cache_quality`: equal parameters, text, steps and rates."""
    scale, text = SCALES[found[0].scale], next((run.text for run in reversed(found) if run.text), None)
    others = records.read(folder.parent / cache_quality.STUDY.name)
    results = results_of([record for record in others if record.scale == scale.name], text)
    done = [record for record in map(results, cache_quality.plan(scale, results)) if record is not None]
    chosen = {name: report.at_best_rate(runs) for name, runs in report.groups(done).items()}
    return {name: runs for name, runs in chosen.items() if runs and name != "mfa"}  # the paper's shape is here, too


def beside(shapes: Sequence[Shape], others: dict[str, list[Record]], seeds: int) -> str:
    """Each shape against the other variants that cache as much."""
    rows = [[f"{one.name} - {name}", f"{one.measures[MEASURES[-1]]:,.0f}", *report.compared(one.runs, runs, seeds)]
            for name, runs in others.items() for one in shapes
            if one.measures[MEASURES[-1]] == runs[0].metrics["cache_bytes_per_token"]]
    if not rows:
        return "No run of another variant with as large a cache, at this scale and of this text, in `cache_quality`."
    return report.table(["MFA beside the variants of `cache_quality`, bits per byte", MEASURES[-1], *report.COMPARED,
                         "loss of the first"], rows)


def _picture(shapes: Sequence[Shape], folder: Path, scale: str) -> str:
    figure = Figure(figsize=(16, 4.5), layout="constrained")
    panels = figure.subplots(1, len(MEASURES), sharey=True)
    for i, (measure, axes) in enumerate(zip(MEASURES, panels, strict=True)):
        for one in sorted(shapes, key=lambda one: one.loss):
            losses = report.values(one.runs)
            drawn = axes.plot([one.measures[measure]] * len(losses), losses, ".", alpha=0.5)
            axes.plot(one.measures[measure], one.loss, "o", color=drawn[0].get_color(), label=one.name)
        axes.set(xlabel=measure + (" [dimensions]" if i < 3 else ""), ylabel="" if i else "bits per byte on books-test")
        axes.margins(x=0.1)
        axes.grid(alpha=0.3)
    # In order of loss, beside the panels: next to the points names would lie on each other.
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles[::-1], names[::-1], loc="outside right upper")
    figure.suptitle(f"MFA at equal parameters ({scale}); dots are seeds")
    return report.save(figure, folder / f"{scale}.png")


STUDY = Study("factorization", "The factorization", plan, section, measure)
