"""Tables and pictures of the rows, from `metrics.jsonl` alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure

from experiments.capacity import COLORS
from experiments.conversion.rows import KINDS, ORIGINAL
from experiments.conversion.runner import RESULTS, Measured, latest
from experiments.studies import records
from experiments.studies.report import rewrite, save, table
from mfa_jax.config import require

CHANCE = {"local_hellaswag": 1 / 4, "local_piqa": 1 / 2, "local_openbookqa": 1 / 4, "local_siqa": 1 / 3,
          "local_winogrande": 1 / 2}
"""Accuracy of who guesses."""
TITLES = {ORIGINAL: "original", "mfa_kr": "MFA-KR", "mfa": "MFA", "key_pca": "key PCA, real rotations (MFA)",
          "mean_pool": "mean-pooled heads (GQA)"}
_COLORS = {"mfa_kr": COLORS["mfa_kr"], "mfa": COLORS["mfa"], "key_pca": "C4", "mean_pool": COLORS["gqa"]}
CEILING = 8.0
"""Times the original's perplexity, above which the picture has numbers in place of a scale."""


def write(results: str) -> Path:
    """Rewrites what stands between the marks of the README there, and the pictures beside it.

    Raises:
      ValueError: no rows; says which command makes them.
    """
    folder = Path(results)
    found = records.read_as(Measured, folder)
    require(bool(found), "results", str(folder / records.METRICS),
            "holds no row; `python -m experiments.conversion run --from MODEL` makes some")
    models = list(dict.fromkeys(record.model for record in found))
    return rewrite(folder, RESULTS, [_section(model, found, folder) for model in models])


def _section(model: str, found: list[Measured], folder: Path) -> str:
    rows = {row: record for (name, row), record in latest(found).items() if name == model}
    original = rows.get(ORIGINAL)
    if original is None:
        return f"### {model}\n\n**The original has not been measured yet**; without it nothing is compared."
    same = [record for record in rows.values() if record.settings["measure"] == original.settings["measure"]
            and _source(record) == _source(original)]
    same.sort(key=lambda r: (r.ratio, r.kind != ORIGINAL, _order(r.kind), "healing" in r.settings))
    others = len(rows) - len(same)
    notes = [_how(same)]
    if others:
        notes.append(f"Left out: {others} rows of another checkpoint than the original, or measured on other text or "
                     f"items.")
    parts = [_losses(same, original), _accuracies(same, original) if original.tasks else "", _costs(same),
             *_pictures(model, same, original, folder)]
    return "\n\n".join([f"### {model}", " ".join(notes), *filter(None, parts)])


def _source(row: Measured) -> str | None:
    """Digest of the checkpoint that a row's model is, or was made from."""
    digest: str | None = row.settings.get("convert", row.settings).get("source")
    return digest


def _calibration(row: Measured) -> str:
    """What text a conversion was given, as a cell; empty where there is none."""
    c = row.settings.get("convert", {})
    return f"{c['rows']} rows of {c['context']} tokens of {' and '.join(c['calibration'])}" if c.get(
        "calibration") else ""


def _order(kind: str) -> int:
    return [ORIGINAL, *KINDS].index(kind)


def _how(rows: Sequence[Measured]) -> str:
    def every(values: Any) -> str:
        return ", ".join(sorted({str(value) for value in values}))

    measured = rows[0].settings["measure"]
    calibrations = {*map(_calibration, rows)} - {""}
    text = (f"{measured['rows']} rows of {measured['tokens']} predicted tokens of each text "
            f"({', '.join(measured['texts'])}, with digests), the first {measured['items']} items of each task.")
    if len(calibrations) == 1:
        text += f" Calibration: {every(calibrations)}."
    machines = [row.machine for row in rows]
    return (f"{text} {every(m['device'] for m in machines)}, {every(m['host'] for m in machines)}, jax "
            f"{every(m['jax'] for m in machines)}; {every(m['date'] for m in machines)}; standard errors behind ±.")


# ---- the loss --------------------------------------------------------------------------------------------------


def bits_per_byte(text: dict[str, Any]) -> tuple[float, float]:
    """Over all rows, and its standard error as a ratio of two means of rows."""
    bits, sizes = np.array(text["nats"]) / math.log(2), np.array(text["bytes"])
    found = bits.sum() / sizes.sum()
    return float(found), _error(bits - found * sizes) / float(sizes.mean())


def perplexity(text: dict[str, Any]) -> float:
    """Of a token."""
    return math.exp(np.mean(text["nats"]) / text["tokens"])


def perplexity_ratio(text: dict[str, Any], original: dict[str, Any]) -> tuple[float, float]:
    """A model's perplexity over the original's, and its standard error, from the differences row by row."""
    differences = (np.array(text["nats"]) - np.array(original["nats"])) / text["tokens"]
    ratio = math.exp(differences.mean())
    return ratio, ratio * _error(differences)


def _error(values: np.ndarray) -> float:
    """Of the mean of some values."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def _label(row: Measured) -> list[str]:
    """The first cells of a row: what it is, its ratio, what it caches."""
    title = TITLES[row.kind]
    if "healing" in row.settings:
        data = row.settings["healing"]["config"]["data"]
        tokens = row.settings["healing"]["step"] * data["batch_size"] * data["sequence_length"]
        title += f", healed on {tokens / 1e6:.3g} M tokens"
    return [title, f"{row.cached_elements[0] / row.cached_elements[1]:.3g}", str(row.cached_elements[1])]


def _losses(rows: Sequence[Measured], original: Measured) -> str:
    names = list(original.texts)
    header = ["model", "ratio", "cached", "parameters"]
    for name in names:
        header += [f"{name}: bits per byte", "perplexity", "over the original's"]
    calibrated = len({*map(_calibration, rows)} - {""}) > 1
    header += ["calibration"] if calibrated else []
    lines = []
    for row in rows:
        cells = [*_label(row), f"{row.parameters[1] / 1e6:.4g} M"]
        for name in names:
            ratio = ("1" if row is original else "{:.3f} ± {:.3f}".format(
                *perplexity_ratio(row.texts[name], original.texts[name])))
            cells += ["{:.4f} ± {:.4f}".format(*bits_per_byte(row.texts[name])), f"{perplexity(row.texts[name]):.2f}",
                      ratio]
        lines.append(cells + ([_calibration(row)] if calibrated else []))
    return table(header, lines)


# ---- tasks -----------------------------------------------------------------------------------------------------


def right(task: dict[str, Any]) -> np.ndarray:
    """1.0 for each item that was answered rightly."""
    return np.array([float(item) for item in task["right"]])


def mean_accuracy(row: Measured) -> float:
    """Over tasks."""
    return float(np.mean([right(task).mean() for task in row.tasks.values()]))


def accuracy_difference(row: Measured, original: Measured) -> tuple[float, float]:
    """Mean accuracy over tasks less the original's, and its standard error from the same items' differences."""
    differences = [right(task) - right(original.tasks[name]) for name, task in row.tasks.items()]
    error = math.sqrt(sum(_error(each) ** 2 for each in differences)) / len(differences)
    return float(np.mean([each.mean() for each in differences])), error


def _accuracies(rows: Sequence[Measured], original: Measured) -> str:
    header = ["model", "ratio", "cached", *(f"{name.removeprefix('local_')} ({task['metric']})"
                                            for name, task in original.tasks.items()), "mean", "less the original's"]
    chance = ["guessing", "", "", *(f"{CHANCE[name]:.3f}" if name in CHANCE else "" for name in original.tasks), "", ""]
    lines = [chance]
    for row in rows:
        cells = [f"{values.mean():.3f} ± {_error(values):.3f}" for values in map(right, row.tasks.values())]
        apart = "" if row is original else "{:+.3f} ± {:.3f}".format(*accuracy_difference(row, original))
        lines.append([*_label(row), *cells, f"{mean_accuracy(row):.3f}", apart])
    return table(header, lines)


# ---- cost, and pictures ----------------------------------------------------------------------------------------


def _costs(rows: Sequence[Measured]) -> str:
    lines = [[*_label(row), f"{row.cost['seconds']:.0f}", f"{row.cost['peak_bytes'] / 2**30:.2f}",
              str(row.machine["commit"])] for row in rows if row.cost is not None]
    parts = [table(["conversion", "ratio", "cached", "seconds", "peak memory, GiB", "commit"], lines)] if lines else []
    resumed = [row.row for row in rows if "convert" in row.settings and row.cost is None]
    if resumed:
        parts.append(f"Interrupted, so that their cost is not known: {', '.join(resumed)}.")
    return "\n\n".join(parts)


def _pictures(model: str, rows: Sequence[Measured], original: Measured, folder: Path) -> list[str]:
    curves: dict[tuple[str, bool], list[Measured]] = {}
    for row in rows:
        if row is not original:
            curves.setdefault((row.kind, "healing" in row.settings), []).append(row)
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(original.texts)), original.texts, strict=True):
        for key, members in curves.items():
            _quality(axes, key, members, [perplexity_ratio(row.texts[name], original.texts[name]) for row in members])
        axes.plot(original.cached_elements[1], 1, "k*", markersize=10)
        axes.axhline(1, color="black", linewidth=1)
        axes.set(xlabel="cached elements a token and layer", ylabel="perplexity over the original's",
                 title=f"{name}; bars: two standard errors",
                 yscale="log", yticks=(1, 1.1, 1.25, 1.5, 2, 3, 5, CEILING))
        axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    found = [_save(figure, model, "quality", folder)]
    if original.tasks:
        figure = Figure(figsize=(6.5, 4.5), layout="constrained")
        axes = figure.subplots()
        for key, members in curves.items():
            _curve(axes, key, members, [(mean_accuracy(row), accuracy_difference(row, original)[1]) for row in members])
        axes.axhline(mean_accuracy(original), color="black", linewidth=1)
        if set(original.tasks) <= set(CHANCE):
            axes.axhline(float(np.mean([CHANCE[name] for name in original.tasks])), color="grey", linestyle=":")
        axes.set(xlabel="cached elements a token and layer",
                 title="black: the original, dotted: guessing\nbars: two standard errors of the difference",
                 ylabel="accuracy, mean of tasks")
        found.append(_save(figure, model, "accuracy", folder))
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, name, scale, unit in zip(figure.subplots(1, 2), ("seconds", "peak_bytes"), (1, 2**30),
                                       ("seconds", "peak memory [GiB]"), strict=True):
        for key, members in curves.items():
            paid = [row for row in members if row.cost is not None]
            _curve(axes, key, paid, [(row.cost[name] / scale, 0.0) for row in paid if row.cost is not None],
                   joined=False)  # of several machines
        axes.set(xlabel="cached elements a token and layer", ylabel=unit, ylim=(0, None))
    return [*found, _save(figure, model, "cost", folder)]


def _quality(axes: Any, key: tuple[str, bool], rows: Sequence[Measured], values: Sequence[tuple[float, float]]) -> None:
    """A line of one kind; what is above the ceiling stands on it, with its value, so that the others can be told."""
    pairs = list(zip(rows, values, strict=True))
    shown = [(row, value) for row, value in pairs if value[0] <= CEILING]
    _curve(axes, key, [row for row, _ in shown], [value for _, value in shown])
    for row, (ratio, _) in pairs:
        if ratio > CEILING:
            axes.plot(row.cached_elements[1], CEILING, "^", color=_COLORS[row.kind], label=_title(key))
            axes.annotate(f"{ratio:.0f}", (row.cached_elements[1], CEILING), (6, -4), textcoords="offset points")


def _title(key: tuple[str, bool]) -> str:
    kind, healed = key
    return TITLES[kind] + (", healed" if healed else "")


def _curve(
    axes: Any, key: tuple[str, bool], rows: Sequence[Measured], values: Sequence[tuple[float, float]], *,
    joined: bool = True,
) -> None:
    """A line of one kind, with bars of two standard errors; where it was healed hollow points, since tokens differ.

    Kinds stand a little beside each other, so that their bars can be told.
    """
    if not rows:
        return
    kind, healed = key
    heights, errors = zip(*values, strict=True)
    bars = 2 * np.array(errors) if any(errors) else None
    look = {"marker": "s", "markerfacecolor": "white", "linestyle": ""} if healed else {"marker": "o"}
    look |= {} if joined else {"linestyle": ""}
    beside = 4 * (_order(kind) - 2) + 2 * healed if bars is not None else 0
    axes.errorbar([row.cached_elements[1] + beside for row in rows], heights, bars, capsize=3, color=_COLORS[kind],
                  label=_title(key), **look)
    axes.grid(alpha=0.3)


def _save(figure: Figure, model: str, what: str, folder: Path) -> str:
    """The picture with one legend for all of its axes, below them, where it covers nothing."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))  # a kind may be drawn in two parts
    if handles:
        figure.legend(by_label.values(), by_label.keys(), loc="outside lower center", ncols=3, fontsize=8)
    return save(figure, folder / f"{model}-{what}.png")
