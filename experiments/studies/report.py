"""The generated part of a study's README: tables and pictures, from `metrics.jsonl` alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from experiments.studies import records
from experiments.studies.records import Record
from experiments.studies.study import SCALES, Run, Scale, Study, best, results_of
from mfa_jax.config import require

README = "README.md"
BEGIN, END = "<!-- results: written by `report`, not by hand -->", "<!-- end of results -->"
_EVIDENCE = {
    "tiny": "**No evidence of quality**: models of 0.1 M parameters after a minute of text. It shows that the study "
            "runs from end to end.",
    "nano": "Models of about 1 M parameters (of `scaling` 0.15 to 2.7 M), trained on 2 MB of text or less: a hint "
            "about the first part of training, and nothing of what large models do.",
    "small": "Models of about 30 M parameters (of `scaling` 5 to 59 M), far from trained to the end.",
}


def write(study: Study, folder: Path, page: Path) -> Path:
    """Rewrites what stands between the marks of the README in `folder`, and the pictures beside it.

    Args:
      page: a folder whose README is taken where `folder` has none.

    Raises:
      ValueError: no metrics; says which command makes them.
    """
    found = records.read(folder)
    require(bool(found), "metrics", str(folder / records.METRICS),
            f"holds no finished run; `python -m experiments.studies {study.name} run --scale tiny` makes some")
    sections = [_section(study, scale, [r for r in found if r.scale == scale.name], folder)
                for scale in SCALES.values() if any(r.scale == scale.name for r in found)]
    return rewrite(folder, page, sections)


def rewrite(folder: Path, page: Path, sections: Sequence[str]) -> Path:
    """Puts the sections between the marks of the README in `folder`, or of a copy of that in `page`.

    Raises:
      ValueError: it does not have each mark once.
    """
    readme = folder / README
    text = (readme if readme.exists() else page / README).read_text()
    require(text.count(BEGIN) == text.count(END) == 1, "README", str(readme), f"must hold {BEGIN!r} and {END!r} once")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    readme.write_text(before + "\n\n".join([BEGIN, *sections, END]) + after)
    return readme


def _section(study: Study, scale: Scale, found: Sequence[Record], folder: Path) -> str:
    # Runs of two texts are not compared: those of the latest count.
    results = results_of(found, next((record.text for record in reversed(found) if record.text), None))
    plan = study.plan(scale, results)
    done = [record for record in map(results, plan) if record is not None]
    diverged = [record.run for record in done if record.outcome == "diverged"]
    others = len({record.run for record in found}) - len(done)
    notes = [_EVIDENCE[scale.name]]
    if len(done) < len(plan):
        notes.append(f"**{len(plan) - len(done)} of {len(plan)} planned runs are missing**, and the further seeds of "
                     f"every model whose rates are not all done: {_missing(plan, done)}. Where a rate is missing, the "
                     f"best is that of the others, and may change. `python -m experiments.studies {study.name} run "
                     f"--scale {scale.name}` goes on.")
    if diverged:
        notes.append(f"Diverged: {', '.join(diverged)}.")
    if others:
        notes.append(f"Left out: {others} runs of other settings than the study has now.")
    body = [_how(study, scale, done), study.section(done, folder)] if done else []
    return "\n\n".join([f"### {scale.name}", " ".join(notes), *body]).strip()


def _missing(plan: Sequence[Run], done: Sequence[Record]) -> str:
    """Of each model the rates and seeds that are planned and not done."""
    there, first = {record.run for record in done}, plan[0].labels["seed"]
    missing: dict[str, list[str]] = {}
    for run in plan:
        if run.name not in there:
            rate, seed = run.labels["learning_rate"], run.labels["seed"]
            missing.setdefault(run.labels["name"], []).append(f"{rate:g}" if seed == first else f"seed {seed}")
    return "; ".join(f"{name} ({', '.join(parts)})" for name, parts in missing.items())


def _how(study: Study, scale: Scale, done: Sequence[Record]) -> str:
    def every(name: str) -> str:
        return ", ".join(sorted({str(record.machine[name]) for record in done}))

    config = done[0].config
    hours = sum(record.machine["seconds"] for record in done) / 3600
    return (f"Command: `python -m experiments.studies {study.name} run --scale {scale.name}`. "
            f"{len(done)} runs of {config['steps']} steps of {config['data']['batch_size']} x "
            f"{config['data']['sequence_length']} bytes from {scale.train}; commit {every('commit')}; "
            f"{every('device')}, jax {every('jax')}; {every('date')}; {hours:.2f} hours of the starts that finished, "
            f"summed over processes.")


# ---- what studies make their sections of -----------------------------------------------------------------------


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def groups(found: Sequence[Record], label: str = "name") -> dict[Any, list[Record]]:
    """Records by a label, in the order in which the labels come first."""
    by: dict[Any, list[Record]] = {}
    for record in found:
        by.setdefault(record.labels[label], []).append(record)
    return by


def at_best_rate(found: Sequence[Record]) -> list[Record]:
    """Of one model's records those at its best learning rate, all seeds; the rate is chosen on the validation books."""
    first = found[0].labels["seed"]
    rate = best([record for record in found if record.labels["seed"] == first]).labels["learning_rate"]
    return [r for r in found if r.labels["learning_rate"] == rate and r.outcome == "finished"]


def values(found: Sequence[Record], metric: str = "test_bits_per_byte") -> list[float]:
    """A metric of each finished record."""
    return [record.metrics[metric] for record in found if record.outcome == "finished"]


def spread(numbers: Sequence[float], digits: int = 4) -> str:
    """`mean ± standard deviation (n)`; `none` where no run has finished."""
    if not numbers:
        return "none"
    if len(numbers) == 1:
        return f"{numbers[0]:.{digits}f} (1)"
    return f"{np.mean(numbers):.{digits}f} ± {np.std(numbers, ddof=1):.{digits}f} ({len(numbers)})"


def difference(left: Sequence[float], right: Sequence[float]) -> tuple[float, float]:
    """`mean(left) - mean(right)` and the half width of its 95 % interval (Welch); infinite below two values a side."""
    mean = float(np.mean(left) - np.mean(right))
    if min(len(left), len(right)) < 2:
        return mean, math.inf
    parts = [np.var(side, ddof=1) / len(side) for side in (left, right)]
    if not sum(parts):
        return mean, 0.0
    freedom = sum(parts) ** 2 / sum(p**2 / (len(s) - 1) for p, s in zip(parts, (left, right), strict=True))
    return mean, float(stats.t.ppf(0.975, freedom) * math.sqrt(sum(parts)))


def paired(left: Sequence[float], right: Sequence[float]) -> float:
    """Half width of the 95 % interval of the mean of `left - right`, one by one; infinite below two."""
    if len(left) < 2:
        return math.inf
    apart = np.subtract(left, right)
    return float(stats.t.ppf(0.975, len(apart) - 1) * np.std(apart, ddof=1) / math.sqrt(len(apart)))


COMPARED = ("mean, 95 % interval", "paired by seed")
"""Headers of the first two cells of `compared`."""


def compared(left: Sequence[Record], right: Sequence[Record], seeds: int) -> list[str]:
    """Three cells: the difference in bits per byte with its interval, that of pairs, and whether they are told apart.

    Of the seeds that both have. One seed gives both the same batches, so that the spread of their difference may be
    smaller than that of either, and from few seeds it may look so; the verdict goes by the first interval, always.
    Below `seeds`, those that are planned, there is no verdict; without common ones `none`. A seed that diverged has no
    value, so there never is one then: the rest would flatter the side. The report names such runs.
    """
    sides = [{r.labels["seed"]: r.metrics["test_bits_per_byte"] for r in side if r.outcome == "finished"}
             for side in (left, right)]
    common = sorted(sides[0].keys() & sides[1].keys())
    if not common:
        return ["", "", "none"]
    mine, others = ([side[seed] for seed in common] for side in sides)
    mean, half = difference(mine, others)
    cells = [f"{mean:+.4f}", ""] if len(common) < 2 else [f"{mean:+.4f} ± {half:.4f}",
                                                          f"± {paired(mine, others):.4f}"]
    if len(common) < seeds:
        return [*cells, "too few seeds"]
    return [*cells, "not told apart" if abs(mean) <= half else "lower" if mean < 0 else "higher"]


def planned_seeds(found: Sequence[Record]) -> int:
    """How many seeds each model of these records is to have at its best rate."""
    return len(SCALES[found[0].scale].seeds)


def rates_table(found: Sequence[Record]) -> str:
    """Bits per byte on the validation books for each model and learning rate of the grid; the chosen one is bold.

    A best rate on the edge of the grid, which may lie beyond it, is said to be there; one of an unfinished row, too.
    """
    rates = sorted({record.labels["learning_rate"] for record in found})
    rows = []
    for name, runs in groups(found).items():
        grid = [record for record in runs if record.labels["seed"] == found[0].labels["seed"]]
        by_rate = {record.labels["learning_rate"]: record for record in grid}
        chosen = best(grid).labels["learning_rate"]
        cells = ["missing" if rate not in by_rate else f"{by_rate[rate].metrics['valid_bits_per_byte']:.4f}"
                 if by_rate[rate].outcome == "finished" else "diverged" for rate in rates]
        edge = len(rates) > 1 and chosen in (rates[0], rates[-1])
        remarks = ["unfinished"] * (len(by_rate) < len(rates)) + ["edge of the grid"] * edge
        rows.append([name, *(f"**{c}**" if rate == chosen else c for rate, c in zip(rates, cells, strict=True)),
                     ", ".join(remarks)])
    return table(["validation", *(f"{rate:g}" for rate in rates), "best"], rows)


def save(figure: Figure, path: Path) -> str:
    """Writes a picture and gives its Markdown."""
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return f"![{path.stem}]({path.name})"
