"""How fast the decode kernels are beside their peers and beside a copy of the same device, in one run.

    python -m experiments.bench_decode_kernel --output h100.json --plot .
    python -m experiments.bench_decode_kernel --tiny --output tiny.json        # any machine; no result

**What is timed.** A point is a variant, a type of cache, a batch and a length. Each side of it (our backends, and the
peers of `decode_kernel.sides`) gets one program that decodes one token against several independent caches, strictly
one after the other. Together the caches take `cold_bytes`, three times the last-level cache of an H100, so that no call
finds its keys there; `cold` is false in the record where that would take more than `MAX_CACHES`. All sides read the
same arrays. A round is as many calls of the program as take some 20 ms, handed over without waiting, and waited for at
the end; the sides of a point and the copy take turns, and a time is the median of the rounds over the calls and caches.
So a time holds the launches inside a program, while the call of the program itself is hidden where the device takes
longer than Python (`dispatch_s` in the record); `dispatch_bound` marks the sides where it may not be. JAX programs are
dispatched by XLA, those of PyTorch by a CUDA graph.

**What is checked.** Before anything is timed, ours decode from caches whose rows have every kind of length and hold
nan past it, into memory that was filled with nan; then every side decodes the caches that it is timed with. Both are
compared with the `reference` backend on the same device. A side that differs is recorded as failed, and not timed.

**Order.** What matters most comes first; when `--budget-seconds` are spent the rest is skipped, and listed. The record
is written after every point, so that a run that is cut off has lost nothing that it measured.
"""

from __future__ import annotations

import dataclasses
import os
import time
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from experiments import cli
from experiments.benchmark import machine, write
from experiments.decode_kernel.layer import LayerSizes, measure_layer
from experiments.decode_kernel.plots import save_plots
from experiments.decode_kernel.points import Point, Sizes, compile_points, measure_point
from experiments.decode_kernel.sides import sides
from experiments.decode_kernel.speed import Copy, dispatcher, make_copy, multiplier, speed
from experiments.decode_kernel.targets import targets
from experiments.kernel_cases import CASES, PAPER, Case
from mfa_jax.config import require, to_dict

CACHE_DTYPES = ("float32", "bfloat16", "int8", "float8_e4m3fn")
NAMES = ("MFA 64x256", "MFA-KR 64x256", "MLA 128x(512+64)", "GQA 64/4x128", *PAPER)


@dataclasses.dataclass(frozen=True)
class Scale:
    """What is measured."""

    batches: tuple[int, ...] = (64, 8, 1)
    lengths: tuple[int | None, ...] = (32768, 8192, None, 1024)
    """None for a mix from the shortest to the longest."""
    copy_bytes: int = 2**30
    matmul: int = 8192
    point: Sizes = Sizes()
    layer: LayerSizes = LayerSizes()
    group: int = 8
    """Points that are compiled together."""


TINY = Scale(batches=(2, 1), lengths=(128, 64, None), copy_bytes=2**20, matmul=128, group=4,
             point=Sizes(cold_bytes=2**18, round_seconds=0.002),
             layer=LayerSizes(batch=2, lengths=(64, 32), D=64, N=4, C=16, Q=32))


@dataclasses.dataclass(frozen=True)
class BenchDecodeKernelConfig:
    """Time and bandwidth of the decode kernels beside peers and a copy of the device."""

    output: str
    """JSON file; written after every point."""
    cases: tuple[str, ...] = NAMES
    """What is decoded: names of `kernel_cases`."""
    cache_dtypes: tuple[str, ...] = ("bfloat16", "int8")
    """Of float32 (queries too), bfloat16, int8, float8_e4m3fn."""
    budget_seconds: float = 570.0
    """No group of points is begun that would not end within it."""
    rounds: int = 7
    """Timed rounds of each side of a point; all take turns."""
    torch: bool = True
    """Measure PyTorch too, where it is installed."""
    leave_out: tuple[str, ...] = ()
    """Names of peers that are not measured, such as `torch flex`, which takes the longest to compile."""
    layer: bool = True
    """Measure Step-3's attention layer too, projections included."""
    tiny: bool = False
    """Sizes that any machine can do, to see that everything works. What they measure is no result."""
    plot: str | None = None
    """Folder for pictures; `experiments.decode_kernel.plots` draws them from the JSON too."""
    seed: int = 0
    """Of all random arrays and lengths."""

    def __post_init__(self) -> None:
        for name in self.cases:
            require(name in NAMES, "cases", name, f"must be of {', '.join(NAMES)}")
        for name in self.cache_dtypes:
            require(name in CACHE_DTYPES, "cache_dtypes", name, f"must be of {', '.join(CACHE_DTYPES)}")
        known = [name for name, side in sides(self.torch).items() if not side.ours]
        for name in self.leave_out:
            require(name in known, "leave_out", name, f"must be of {', '.join(known)}")
        require(self.rounds >= 1, "rounds", self.rounds, "must be at least 1")
        require(self.budget_seconds > 0, "budget_seconds", self.budget_seconds, "must be positive")

    @property
    def scale(self) -> Scale:
        scale = TINY if self.tiny else Scale()
        return dataclasses.replace(
            scale, point=dataclasses.replace(scale.point, rounds=self.rounds, seed=self.seed))


def points(config: BenchDecodeKernelConfig, scale: Scale) -> list[Point]:
    """All of them, by importance: the largest batch first, then our other batches, those of the paper's models last."""
    cases = CASES | PAPER
    largest, *smaller = scale.batches
    stages = [(largest, False), (largest, True), *((batch, paper) for paper in (False, True) for batch in smaller)]
    known = tuple(n for n in scale.lengths if n is not None)
    return [
        Point(name, _with_cache(cases[name], dtype), batch, length, known,
              slow_sides=batch == largest and length in scale.lengths[:2] and name not in PAPER)
        for batch, paper in stages for length in scale.lengths
        # A mix of one row is none.
        if length is not None or batch > 1
        for dtype in config.cache_dtypes for name in config.cases if (name in PAPER) == paper
    ]


def _with_cache(case: Case, cache_dtype: str) -> Case:
    dtype = "float32" if cache_dtype == "float32" else case.dtype
    return dataclasses.replace(case, dtype=dtype, cache_dtype=cache_dtype)


class Budget:
    """Seconds that were given, and whether another step fits into the rest: one as long as the longest so far."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.longest = seconds, 0.0
        self.start = self.mark = time.perf_counter()

    @property
    def used(self) -> float:
        return time.perf_counter() - self.start

    def allows_another(self) -> bool:
        """To be asked before each step."""
        now = time.perf_counter()
        self.longest, self.mark = max(self.longest, now - self.mark), now
        return self.used + self.longest < self.seconds


def measure(config: BenchDecodeKernelConfig, scale: Scale | None = None) -> dict[str, Any]:
    """The record of the benchmark; it is written to `config.output` as it grows.

    Args:
      scale: None for the config's own, which is made for an H100 (`tiny`: for a test).
    """
    scale = config.scale if scale is None else scale
    budget, screen = Budget(config.budget_seconds), Console(stderr=True)
    copy = make_copy(scale.copy_bytes)
    found = {name: side for name, side in sides(config.torch).items() if name not in config.leave_out}
    device = device_speed(scale, copy, "float32" if set(config.cache_dtypes) == {"float32"} else "bfloat16")
    record: dict[str, Any] = {
        "benchmark": "decode_kernel", "config": to_dict(config), "scale": dataclasses.asdict(scale),
        "machine": {**machine(threads=0), "device": jax.devices()[0].device_kind}, "device_speed": device,
        "layer": [], "points": [], "skipped": [],
    }

    def keep(done: str) -> None:
        record["seconds"], record["targets"] = budget.used, targets(record)
        write(config.output, record)
        screen.print(f"{budget.used:4.0f} s  {done}", highlight=False)

    # A file that can't be written is found out now.
    keep("copy and matrix product")
    for length in scale.layer.lengths if config.layer else ():
        record["layer"].append(measure_layer(
            scale.layer, length, [name for name, side in found.items() if side.ours], copy, rounds=config.rounds,
            round_seconds=scale.point.round_seconds, seed=config.seed))
        keep(f"layer, {length} tokens")
    rest = points(config, scale)
    while rest and budget.allows_another():
        group, rest = rest[: scale.group], rest[scale.group :]
        programs = compile_points(group, found, scale.point)
        for point in group:
            # A cache may not fit into what memory is left; a device that has broken down raises again at the copy.
            try:
                record["points"].append(measure_point(point, found, programs.pop(point.name), copy, scale.point,
                                                      device["dispatch_s"]))
            except jax.errors.JaxRuntimeError as error:
                jax.block_until_ready(copy.run())
                record["skipped"].append({"point": point.name, "reason": str(error).splitlines()[0]})
            keep(point.name)
    record["skipped"] += [{"point": point.name, "reason": "out of time"} for point in rest]
    keep(f"done, {len(record['skipped'])} points skipped")
    return record


def device_speed(scale: Scale, copy: Copy, dtype: str) -> dict[str, Any]:
    """Bytes a second of a copy, FLOPs a second of a product of matrices, and what calling a program costs."""
    seconds, rounds = scale.point.round_seconds, scale.point.rounds
    return {"copy_bytes_per_s": copy.nbytes / speed(copy.run, seconds, rounds),
            "matmul_flops_per_s": 2 * scale.matmul**3 / speed(multiplier(scale.matmul, dtype), seconds, rounds),
            "matmul_dtype": dtype,
            "dispatch_s": speed(dispatcher(64), seconds, rounds)}


def to_table(record: dict[str, Any]) -> Table:
    """A row a point and side, with the times of those that were measured and the reasons of those that failed."""
    table = Table(title=f"Decode attention on {record['machine']['device']}, medians", title_justify="left")
    for heading in ("point", "side", "time (us)", "GB/s", "of the copy", "tokens/s"):
        table.add_column(heading, justify="left" if heading in ("point", "side") else "right")
    for point in record["points"]:
        for name, side in point["sides"].items():
            if side["status"] == "ok":
                table.add_row(point["name"], name, f"{1e6 * side['seconds']:.1f}", f"{side['bytes_per_s'] / 1e9:.0f}",
                              f"{side['share_of_copy']:.2f}", f"{side['tokens_per_s']:.0f}")
            elif side["status"] == "failed":
                table.add_row(point["name"], name, "failed", side["reason"][:60])
    found = [f"{x['target']}: {'not measured' if x['found'] is None else format(x['found'], '.2f')}, wanted "
             f"{x['wanted']}" for x in record["targets"]]
    table.caption_justify = "left"
    table.caption = "\n".join([*found, f"{len(record['skipped'])} points skipped, {record['seconds']:.0f} s"])
    return table


def main() -> None:
    config = cli.parse(BenchDecodeKernelConfig)
    # JAX would take three quarters of the memory at once, and leave little for PyTorch.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    record = measure(config)
    if config.plot is not None:
        save_plots(record, config.plot)
    Console().print(to_table(record))


if __name__ == "__main__":
    cli.run(main)
