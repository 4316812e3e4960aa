"""Pictures of a record of `bench_decode_kernel`.

    python -m experiments.decode_kernel.plots --record h100.json --output FOLDER

One for each type of cache: time against length, bandwidth against length, tokens a second against batch, a column a
variant; and a roofline of the largest batch, whose roofs are the copy and the product of matrices of the same run.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from experiments import cli
from mfa_jax.config import require

MARKERS = "osD^v<>PX*"


@dataclasses.dataclass(frozen=True)
class PlotConfig:
    """What is drawn."""

    record: str
    """JSON file that `bench_decode_kernel` wrote."""
    output: str
    """Folder of the pictures: roofline.png, and one named after each type of cache."""


def save_plots(record: dict[str, Any], folder: str) -> None:
    """The pictures, as png files in a folder.

    Raises:
      ValueError: a record without any point.
      OSError: a file that can't be written.
    """
    require(bool(record["points"]), "record", "no points", "nothing was measured that could be drawn")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for cache_dtype in dict.fromkeys(p["cache_dtype"] for p in record["points"]):
        panels(record, cache_dtype).savefig(target / f"{cache_dtype}.png", dpi=110)
    roofline(record).savefig(target / "roofline.png", dpi=130)


def panels(record: dict[str, Any], cache_dtype: str) -> Figure:
    """Time, bandwidth and tokens a second of every side, for one type of cache; a column a variant."""
    points = [p for p in record["points"] if p["cache_dtype"] == cache_dtype and p["length"]]
    variants, largest = list(dict.fromkeys(p["variant"] for p in points)), max(p["batch"] for p in record["points"])
    # Not through pyplot, whose backend belongs to whoever imports this: a notebook shows figures in its own way.
    figure = Figure(figsize=(2.8 * len(variants) + 2, 9), layout="constrained")
    axes = figure.subplots(3, len(variants), squeeze=False, sharey="row")
    names = list(dict.fromkeys(name for p in record["points"] for name, s in p["sides"].items() if "seconds" in s))
    styles: dict[str, dict[str, Any]] = {
        name: {"color": f"C{i}", "marker": MARKERS[i % len(MARKERS)], "markersize": 4, "linewidth": 1.2}
        for i, name in enumerate(names)}
    copy: dict[str, Any] = {"color": "k", "linestyle": "--", "linewidth": 1}
    for column, variant in enumerate(variants):
        here = [p for p in points if p["variant"] == variant]
        longest = max(p["length"] for p in here)
        at_largest = sorted((p for p in here if p["batch"] == largest), key=lambda p: p["length"])
        at_longest = sorted((p for p in here if p["length"] == longest), key=lambda p: p["batch"])
        for name, style in styles.items():
            _line(axes[0, column], at_largest, "length", name, "seconds", 1e6, style)
            _line(axes[1, column], at_largest, "length", name, "bytes_per_s", 1e-9, style)
            _line(axes[2, column], at_longest, "batch", name, "tokens_per_s", 1, style)
        axes[1, column].axhline(_copy(record) / 1e9, **copy)
        axes[0, column].set(title=variant, xlabel=f"tokens a row, batch {largest}")
        axes[1, column].set(xlabel=f"tokens a row, batch {largest}")
        axes[2, column].set(xlabel=f"batch, {longest} tokens a row")
        for axis, log_y, ticks in zip(axes[:, column], (True, False, True), ("length", "length", "batch"), strict=True):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log" if log_y else "linear")
            axis.set_xticks(sorted({p[ticks] for p in points}))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}k" if x >= 1024 else f"{x:g}"))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.grid(alpha=0.3)
    axes[1, 0].set_ylim(0, None)
    for axis, label in zip(axes[:, 0], ("time of a step [us]", "valid bytes read [GB/s]", "tokens/s"), strict=True):
        axis.set_ylabel(label)
    drawn = [name for name in names if any("seconds" in p["sides"].get(name, {}) for p in points)]
    lines = [Line2D([], [], **styles[name]) for name in drawn]
    figure.legend([*lines, Line2D([], [], **copy)], [*drawn, "copy, read and written"],
                  loc="outside lower center", ncols=4)
    figure.suptitle(f"Decode attention on {record['machine']['device']}, cache of {cache_dtype}")
    return figure


def _copy(record: dict[str, Any]) -> float:
    """Bytes a second of the copy that took turns with the points: at the start of a run the device may be slower."""
    return statistics.median(p["copy_bytes_per_s"] for p in record["points"])


def _line(
    axis: Any, points: list[dict[str, Any]], x: str, name: str, y: str, unit: float, style: dict[str, Any]
) -> None:
    found = [(p[x], unit * p["sides"][name][y]) for p in points if y in p["sides"].get(name, {})]
    if found:
        axis.plot(*zip(*found, strict=True), **style)


def roofline(record: dict[str, Any]) -> Figure:
    """The largest batch beside the copy and the product of matrices of the same run."""
    largest = max(p["batch"] for p in record["points"])
    measured = [p for p in record["points"] if p["batch"] == largest and p["length"] and
                "seconds" in p["sides"][p["auto"]]]
    bandwidth, peak = _copy(record), record["device_speed"]["matmul_flops_per_s"]
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axis = figure.subplots()
    intensities = [p["flops"] / p["valid_bytes"] for p in measured]
    x = np.geomspace(0.5 * min([*intensities, 1]), 2 * max([*intensities, peak / bandwidth]), 200)
    axis.plot(x, np.minimum(x * bandwidth, peak) / 1e12, color="k", label="copy, and product of matrices, of this run")
    names = list(dict.fromkeys((p["variant"], p["cache_dtype"]) for p in measured))
    for i, name in enumerate(names):
        these = [p for p in measured if (p["variant"], p["cache_dtype"]) == name]
        axis.scatter([p["flops"] / p["valid_bytes"] for p in these],
                     [p["sides"][p["auto"]]["flops_per_s"] / 1e12 for p in these], s=22, color=f"C{i % 10}",
                     marker=MARKERS[i % len(MARKERS)], label=" ".join(name))
    axis.set(xscale="log", yscale="log", xlabel="FLOPs a valid byte of the cache", ylabel="TFLOP/s",
             title=f"{record['machine']['device']}, batch {largest}, what `auto` takes, all lengths")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    return figure


def main() -> None:
    config = cli.parse(PlotConfig)
    save_plots(json.loads(Path(config.record).read_text()), config.output)


if __name__ == "__main__":
    cli.run(main)
