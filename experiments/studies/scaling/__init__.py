"""Scaling: the loss of each variant over four sizes, its exponent, and whether MFA's best width moves with size."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from experiments.studies import report
from experiments.studies.records import Record
from experiments.studies.study import SCALES, SHORT_ROPE, Results, Run, Scale, Study, lower_rates, tuned
from mfa_jax import capacity
from mfa_jax.config import ModelConfig, from_dict
from mfa_jax.presets import matched, sized_model

SIZES = {"tiny": ((1, 32), (2, 64), (2, 96), (3, 128)), "nano": ((3, 64), (4, 96), (5, 128), (6, 192)),
         "small": ((6, 256), (8, 384), (10, 512), (12, 640))}
"""Layers and width D at each scale, smallest first; MHA's heads are D / 8 wide."""
VARIANTS = ("mfa", "mha", "mfa-kr", "mla", "mqa")
WIDTHS = {"mfa, C = H": 1, "mfa": 2, "mfa, C = 4H": 4}
"""MFA's C = Q over MHA's head width."""
PAIRS = (("mfa", "mha"), ("mfa", "mla"), ("mfa", "mqa"), ("mfa-kr", "mfa"))
"""Variants that are compared at each size."""


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
    """Losses by size, exponents, variants against each other at each size and over sizes, rates, and the curves."""
    sizes = [width for _, width in SIZES[SCALES[found[0].scale].preset]]
    points: Points = {}
    for runs in report.groups(found).values():
        points.setdefault(family(runs[0]), dict.fromkeys(sizes, NOTHING))[runs[0].labels["size"]] = point(runs)
    seeds = report.planned_seeds(found)
    losses = report.table(
        ["bits per byte on books-test", *(f"D = {size}" for size in sizes)],
        [*([name, *(report.spread(report.values(by_size[size].best)) for size in sizes)]
           for name, by_size in points.items()),
         ["best width of MFA", *(best_width({name: points[name][size] for name in WIDTHS if name in points}, seeds)
                                 for size in sizes)]])
    fits = report.table(["loss = a P^-b", "b, 95 % interval", "residual, bits per byte"],
                        [[name, *exponent(list(by_size.values()))] for name, by_size in points.items()])
    pairs = [(left, right) for left, right in PAIRS if left in points and right in points]
    apart = report.table(
        ["difference, bits per byte", *report.COMPARED, "loss of the first"],
        [[f"{left} - {right}, D = {size}", *compared(points[left][size], points[right][size], seeds)]
         for left, right in pairs for size in sizes])
    trends = report.table(
        ["difference over sizes", "more at ten times the parameters, bits per byte, 95 % interval", "trend",
         "b of the first minus b of the second, 95 % interval"],
        [[f"{left} - {right}", *trend(list(points[left].values()), list(points[right].values()))]
         for left, right in pairs])
    return "\n\n".join([losses, fits, apart, trends, report.rates_table(found),
                        _picture(points, folder, found[0].scale)])


# ---- one model -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Point:
    """A variant or width at one size."""

    best: list[Record]
    """Its records at the best rate."""
    lacks: str
    """Why nothing is concluded from it yet; empty where nothing is missing."""


Points = dict[str, dict[int, Point]]
"""By variant or width, and by size."""
LACKS = ("unfinished", "too few seeds")
"""Rates of the grid, then seeds."""
NOTHING = Point([], LACKS[0])


def point(runs: Sequence[Record]) -> Point:
    """What the records of one model come to. A seed that diverged is missing for good, as in `report.compared`."""
    scale, best = lower_rates(SCALES[runs[0].scale]), report.at_best_rate(runs)
    rates = {run.labels["learning_rate"] for run in runs if run.labels["seed"] == scale.seeds[0]}
    if set(scale.learning_rates) - rates:
        return Point(best, LACKS[0])
    return Point(best, LACKS[1] if len(best) < len(scale.seeds) else "")


def lacking(points: Iterable[Point]) -> str:
    """What one of them lacks, the grid before seeds; empty where all are done."""
    found = {each.lacks for each in points}
    return next((lack for lack in LACKS if lack in found), "")


def family(record: Record) -> str:
    """The variant or width, without the size."""
    return str(record.labels["name"]).rsplit(" ", 1)[0]


def parameters(run: Record) -> int:
    """Those beside the embedding, P."""
    return capacity.model_parameters(from_dict(ModelConfig, run.config["model"])).non_embedding


# ---- several ---------------------------------------------------------------------------------------------------


def best_width(points: dict[str, Point], seeds: int) -> str:
    """The width of MFA with the lowest mean loss at a size, and how it compares with the next; none before all ran."""
    if lack := lacking(points.get(name, NOTHING) for name in WIDTHS):
        return lack
    winner, second = sorted(points, key=lambda name: float(np.mean(report.values(points[name].best))))[:2]
    return f"{winner} (against {second}: {report.compared(points[winner].best, points[second].best, seeds)[-1]})"


def compared(left: Point, right: Point, seeds: int) -> list[str]:
    """As `report.compared`, with no verdict before all rates and seeds of both are done."""
    *cells, verdict = report.compared(left.best, right.best, seeds)
    return [*cells, lacking([left, right]) or verdict]


def fitted(P: Sequence[float], values: Sequence[float]) -> tuple[float, float, float]:
    """Slope of values against `ln P` by least squares, half width of its 95 % interval, and intercept.

    A size is one point, the mean over its seeds: that a law does not hold moves all seeds of a size alike, so that
    more of them are no more evidence for it. The interval has `sizes - 2` degrees of freedom.
    """
    x, y = np.log(P), np.array(values)
    apart = x - x.mean()
    slope = float(apart @ y / (apart @ apart))
    intercept = float(y.mean() - slope * x.mean())
    left = y - intercept - slope * x
    error = math.sqrt(left @ left / (len(P) - 2) / (apart @ apart))
    return slope, float(stats.t.ppf(0.975, len(P) - 2)) * error, intercept


def exponent(points: Sequence[Point]) -> list[str]:
    """Two cells: b of the power law, by least squares of the logarithms over sizes, and what it leaves."""
    if lack := lacking(points):
        return [lack, ""]
    P, losses = [parameters(each.best[0]) for each in points], _means(points)
    slope, half, intercept = fitted(P, np.log(losses))
    left = losses - np.exp(intercept) * np.array(P, float) ** slope
    return [f"{-slope:.4f} ± {half:.4f}", f"{math.sqrt(np.mean(left**2)):.4f}"]


def trend(left: Sequence[Point], right: Sequence[Point]) -> list[str]:
    """Three cells: how much larger a difference is at ten times the parameters, whether that is told apart from none,
    and the difference of the exponents. Differences are taken size by size: what moves both sides is in neither."""
    if lack := lacking([*left, *right]):
        return ["", lack, ""]
    P = [math.sqrt(parameters(a.best[0]) * parameters(b.best[0])) for a, b in zip(left, right, strict=True)]
    slope, half, _ = fitted(P, _means(left) - _means(right))
    exponents, width, _ = fitted(P, np.log(_means(right)) - np.log(_means(left)))
    verdict = "not told apart from none" if abs(slope) <= half else "falls" if slope < 0 else "rises"
    return [f"{slope * math.log(10):+.4f} ± {half * math.log(10):.4f}", verdict, f"{exponents:+.4f} ± {width:.4f}"]


def _means(points: Sequence[Point]) -> np.ndarray:
    return np.array([np.mean(report.values(each.best)) for each in points])


def _picture(points: Points, folder: Path, scale: str) -> str:
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    ticks: dict[int, int] = {}
    for name, by_size in points.items():
        there = {size: each for size, each in by_size.items() if each.best}
        ticks |= {size: parameters(each.best[0]) for size, each in there.items()}
        drawn = [(parameters(each.best[0]), float(np.mean(report.values(each.best)))) for each in there.values()]
        for axes, shown in ((left, name in VARIANTS), (right, name in WIDTHS)):
            if shown and drawn:
                axes.plot(*zip(*drawn, strict=True), "o-", label=name)
    for axes, title in ((left, "variants"), (right, "widths of MFA")):
        axes.set(xscale="log", xlabel="parameters beside the embedding", title=title)
        axes.set_xticks(list(ticks.values()), [f"{tick / 1e6:.2g} M" for tick in ticks.values()])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    left.set_ylabel(f"bits per byte on books-test ({scale})")
    return report.save(figure, folder / f"{scale}.png")


STUDY = Study("scaling", "Scaling", plan, section)
