"""Position encodings across variants: the loss at the trained length, and beyond it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.capacity import COLORS
from experiments.studies import report
from experiments.studies.measure import bits_per_byte
from experiments.studies.records import Record
from experiments.studies.study import SHORT_ROPE, Results, Run, Scale, Study, tuned
from mfa_jax.config import ModelConfig, PositionConfig
from mfa_jax.data import Prepared
from mfa_jax.presets import model_preset
from mfa_jax.train.run import Trained

VARIANTS = ("mfa", "mfa-kr", "mha", "mla")
ENCODINGS = {"rope": PositionConfig("rope"), "alibi": PositionConfig("alibi"), "none": PositionConfig("none"),
             "rope-10000": SHORT_ROPE}
"""By name; `rope` has the presets' base, which turns few of a narrow head's elements within a short window."""
PAIRS = (("mfa", "mha"), ("mfa", "mla"), ("mfa-kr", "mfa"), ("mfa-kr", "mha"))
"""Variants that are compared under each encoding."""
LENGTHS = (1, 2, 4, 8)
"""Windows of the test books, in trained lengths."""


def plan(scale: Scale, results: Results) -> list[Run]:
    """Every variant with every encoding over the grid of learning rates, then more seeds at its best."""
    return tuned(scale, models(scale), results)


def models(scale: Scale) -> dict[str, ModelConfig]:
    """By variant and encoding; MFA-KR with rope also reuses the key as rope has turned it."""
    found = {f"{variant} {encoding}": dataclasses.replace(model_preset(f"{scale.preset}-{variant}"), position=position)
             for encoding, position in ENCODINGS.items() for variant in VARIANTS}
    turned: Any = found["mfa-kr rope"]
    found["mfa-kr rope, key reused after it"] = dataclasses.replace(
        turned, attention=dataclasses.replace(turned.attention, reuse="post_rope"))
    return found


def measure(scale: Scale, trained: Trained, test: Prepared) -> dict[str, Any]:
    """Loss in windows of several lengths, as many bytes of the test books for each."""
    found = {}
    for factor in LENGTHS:
        data = dataclasses.replace(trained.config.data, sequence_length=factor * scale.sequence_length,
                                   batch_size=scale.batch_size // factor)
        found[name_of(factor)] = bits_per_byte(trained, test, data, scale.test_batches)
    return found


def name_of(factor: int) -> str:
    return f"bits_per_byte_at_{factor}x"


def section(found: Sequence[Record], folder: Path) -> str:
    """Loss by length of the window, each against rope of the same variant; variants against each other."""
    chosen = {name: report.at_best_rate(runs) for name, runs in report.groups(found).items()}
    rows, seeds = [], report.planned_seeds(found)
    for name, runs in chosen.items():
        rope = chosen.get(f"{name.split()[0]} rope", [])
        against = ["", "", ""] if runs is rope else report.compared(runs, rope, seeds)
        rows.append([name, *(report.spread(report.values(runs, name_of(factor))) for factor in LENGTHS), *against])
    table = report.table(["variant and encoding", *(f"bits per byte, {factor}x" for factor in LENGTHS),
                          "against rope at 1x, 95 % interval", report.COMPARED[1], "loss against rope"], rows)
    pairs = [[f"{left} - {right}, {encoding}",
              *report.compared(chosen[f"{left} {encoding}"], chosen[f"{right} {encoding}"], seeds)]
             for encoding in ENCODINGS for left, right in PAIRS
             if {f"{left} {encoding}", f"{right} {encoding}"} <= chosen.keys()]
    compared = report.table(["difference at 1x, bits per byte", *report.COMPARED, "loss of the first"], pairs)
    return "\n\n".join([table, compared, report.rates_table(found), _picture(chosen, folder, found[0].scale)])


def _picture(chosen: dict[str, list[Record]], folder: Path, scale: str) -> str:
    """A panel for each encoding, with a scale of its own: they are far apart. Bars are deviations over seeds."""
    figure = Figure(figsize=(14, 4.5), layout="constrained")
    for encoding, axes in zip(ENCODINGS, figure.subplots(1, len(ENCODINGS)), strict=True):
        for name, runs in chosen.items():
            if name.split()[1].rstrip(",") == encoding and runs:
                losses = np.array([report.values(runs, name_of(factor)) for factor in LENGTHS])
                one = losses.shape[1] == 1
                axes.errorbar(LENGTHS, losses.mean(1), None if one else losses.std(1, ddof=1), capsize=3,
                              fmt="o-" if name.endswith(encoding) else "s--", label=f"{name} (1 seed)" if one else name,
                              color=COLORS[name.split()[0].replace("-", "_")])
        axes.set(xscale="log", xlabel="window, in trained lengths", ylabel="bits per byte on books-test",
                 title=f"{encoding} ({scale})")
        axes.set_xticks(LENGTHS, [f"{factor}x" for factor in LENGTHS])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=7)
    figure.suptitle("Scales differ; bars: deviations over seeds", fontsize=10)
    return report.save(figure, folder / f"{scale}.png")


STUDY = Study("positions", "Positions", plan, section, measure)
