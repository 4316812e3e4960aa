"""Long context: loss by position in long books, a needle in them, associative recall, and state per byte of cache."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure

from experiments.capacity import COLORS
from experiments.studies import report
from experiments.studies.long_context import tasks
from experiments.studies.long_context.measurements import RECALL, Judge, by_position, needles, recall
from experiments.studies.records import Record
from experiments.studies.study import SHORT_ROPE, Results, Run, Scale, Study, lower_rates, tuned
from mfa_jax.data import Prepared
from mfa_jax.presets import model_preset
from mfa_jax.train.run import Trained

VARIANTS = ("mha", "mfa", "mfa-kr", "mla", "mqa", "gqa")
LONGER = 4
"""Windows of this study over those of the others, with as many bytes a step."""
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where the needle lies: 0 at the begin, 1 right before the question."""
PARTS = (0.5, 0.75, 1.0)
"""Lengths of the haystack over the trained length."""
PAIRS = (2, 4, 8, 16, 32)
"""Pairs to be recalled; those that do not fit into the trained length are left out."""
ROWS, SEED = 64, 7


def plan(scale: Scale, results: Results) -> list[Run]:
    """Every variant over the grid of learning rates, then more seeds at its best; trained on long windows."""
    scale = dataclasses.replace(lower_rates(scale), sequence_length=LONGER * scale.sequence_length,
                                batch_size=scale.batch_size // LONGER)
    return tuned(scale, {name: dataclasses.replace(model_preset(f"{scale.preset}-{name}"), position=SHORT_ROPE)
                         for name in VARIANTS}, results)


def measure(scale: Scale, trained: Trained, test: Prepared) -> dict[str, Any]:
    """Bits by position, of the needle by depth and length, and of recalled values by the number of pairs."""
    data, books = trained.config.data, tasks.long_documents(test)
    model = Judge(trained.model, trained.params, trained.tokenizer, data.batch_size)
    lengths = [round(part * data.sequence_length) for part in PARTS]
    return (by_position(model, books, ROWS, data.sequence_length)
            | needles(model, books, ROWS, lengths, DEPTHS, SEED)
            | recall(model, ROWS, PAIRS, data.sequence_length, SEED))


def section(found: Sequence[Record], folder: Path) -> str:
    """Bits by position, of the needle, and held, for each variant at its best rate."""
    chosen = {name: report.at_best_rate(runs) for name, runs in report.groups(found).items()}
    chosen = {name: runs for name, runs in chosen.items() if runs}
    if not chosen:
        return report.rates_table(found)
    edges = next(iter(chosen.values()))[0].metrics["position_edges"]
    header = ["bits per byte at positions", *(f"{a} to {b - 1}" for a, b in zip(edges, edges[1:], strict=False))]
    positions = report.table(header, [[name, *cells(runs, "position_bits")] for name, runs in chosen.items()])
    found_needles = report.table(
        ["bits a digit of the needle (chance 3.32)", *(f"depth {depth:g}" for depth in DEPTHS)],
        [[f"{name}, {part:g} of the length", *(f"{x:.2f}" for x in mean(runs, "needle_bits")[i])]
         for name, runs in chosen.items() for i, part in enumerate(PARTS)])
    count = len(next(iter(chosen.values()))[0].metrics["told_bits"])
    counts = [f"{pairs} pairs" for pairs in PAIRS[:count]]
    recalled = report.table(
        ["bits a value byte: told, after other keys, after their own", *counts],
        [[name, *(", ".join(f"{x:.2f}" for x in three) for three in np.transpose([mean(runs, m) for m in RECALL[:3]]))]
         for name, runs in chosen.items()])
    held = report.table(
        ["held", *counts],
        [[f"{name}, {unit}", *(report.spread([run.metrics[metric][i] for run in runs], digits) for i in range(count))]
         for name, runs in chosen.items()
         for unit, metric, digits in (("bits", RECALL[3], 2), ("bits per cached byte", RECALL[4], 5))])
    picture = _picture(chosen, folder, found[0].scale)
    return "\n\n".join([positions, found_needles, recalled, held, report.rates_table(found), picture])


def mean(runs: Sequence[Record], metric: str) -> np.ndarray:
    """Of a metric that is an array, over seeds."""
    return np.mean([run.metrics[metric] for run in runs], axis=0)


def cells(runs: Sequence[Record], metric: str) -> list[str]:
    return [f"{value:.3f}" for value in mean(runs, metric)]


def _picture(chosen: dict[str, list[Record]], folder: Path, scale: str) -> str:
    figure = Figure(figsize=(13, 4.5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for name, runs in chosen.items():
        metrics = runs[0].metrics
        look: dict[str, Any] = {"color": COLORS[name.replace("-", "_")], "markersize": 4, "label": name}
        left.plot(metrics["position_edges"][1:], mean(runs, "position_bits"), "o-", **look)
        middle.plot(DEPTHS, mean(runs, "needle_bits")[-1], "o-", **look)
        gained = mean(runs, "fresh_bits") - mean(runs, "again_bits")
        right.plot(PAIRS[:len(gained)], gained, "o-", **look)
    left.set(xlabel="position in the window, up to", ylabel="bits per byte", title="long books")
    middle.axhline(math.log2(10), color="grey", linestyle=":", label="chance")
    middle.set(xlabel="depth of the needle", ylabel="bits a digit", title="needle, at the trained length")
    right.set(xscale="log", xlabel="pairs", ylabel="bits a value byte gained", title="own keys against others")
    right.set_xticks(PAIRS, [str(count) for count in PAIRS])
    left.set_xscale("log", base=2)
    left.xaxis.set_major_formatter(ticker.ScalarFormatter())
    for axes in (left, middle, right):
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    for axes in (left, middle):
        axes.legend(fontsize=8)
    figure.suptitle(f"Long windows ({scale}), mean over seeds")
    return report.save(figure, folder / f"{scale}.png")


STUDY = Study("long_context", "Long context", plan, section, measure)
