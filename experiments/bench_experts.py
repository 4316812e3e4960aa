"""How fast the experts' grouped product trains: forward and both gradients of each implementation, taking turns.

    python -m experiments.bench_experts
    python -m experiments.bench_experts --model paper-7b-mfa --json > experiments/results/gpu/experts_time.json

For the widths and experts of a model, and groups that are even or skewed, all that can serve on this device take turns
in one process, on the same arrays; before that their results and gradients are held against `ragged_dot` in float32,
with NaN where no group has a row. What `auto` chooses (`mfa_jax.model.grouped.resolve`) is in the record.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from experiments.benchmark import machine, show, take_turns, use_threads
from experiments.cli import parse, run
from mfa_jax.config import DType, require, to_dict
from mfa_jax.kernels import default_device
from mfa_jax.model.grouped import grouped_matmul, resolve
from mfa_jax.presets import model_preset

CANDIDATES = ("ragged_dot", "megablox", "mosaic_gpu")
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
"""Largest error of a result or gradient over the largest value of what is right."""


@dataclasses.dataclass(frozen=True)
class BenchExpertsConfig:
    """Time of the grouped product, forward and gradients, over that of `jax.lax.ragged_dot`."""

    model: str = "small-mfa-moe"
    """A preset with experts, of which widths and experts are."""
    rows: int = 65536
    """M, choices of all tokens of a device; a sixteenth of them has no group."""
    dtype: DType = "bfloat16"
    """Of rows and weights."""
    repeats: int = 7
    """Timed calls of each; all take turns."""
    threads: int = 0
    """Cores that the process is bound to; 0 leaves it as it is, where a device computes."""
    seed: int = 0
    """Of the arrays."""
    json: bool = False
    """Print one JSON object instead of a table."""

    def __post_init__(self) -> None:
        require(model_preset(self.model).moe is not None, "model", self.model,
                "must have experts, such as small-mfa-moe")
        require(self.rows >= 16, "rows", self.rows, "must be at least 16")
        require(self.repeats >= 1, "repeats", self.repeats, "must be at least 1")
        require(self.threads >= 0, "threads", self.threads, "must be at least 0")


Gradients = Callable[..., tuple[jax.Array, tuple[jax.Array, jax.Array]]]


def with_gradients(implementation: str) -> Gradients:
    """The product and the gradient of its sum over `cotangent`, as one compiled program."""

    def both(rows: jax.Array, weights: jax.Array, cotangent: jax.Array, sizes: jax.Array) -> Any:
        out, back = jax.vjp(lambda rows, weights: grouped_matmul(rows, weights, sizes, implementation), rows, weights)
        return out, back(cotangent)

    return jax.jit(both)


def sides() -> dict[str, Gradients]:
    """What can serve on this device, by name."""
    device, found = default_device(), {}
    for name in CANDIDATES:
        try:
            resolve(name, device.platform, device.compute_capability)
        except NotImplementedError:
            continue
        found[name] = with_gradients(name)
    return found


def group_sizes(rows: int, experts: int, skewed: bool) -> np.ndarray:
    """Of all rows but a sixteenth: even, or each group half as large as the one before it, and the last ones empty."""
    served = rows - rows // 16
    share = 0.5 ** np.arange(1, experts + 1) if skewed else np.full(experts, 1 / experts)
    sizes = np.floor(served * share).astype(np.int32)
    sizes[0] += served - sizes.sum()
    return sizes


def errors(calls: dict[str, Gradients], given: tuple[jax.Array, ...], sizes: jax.Array) -> dict[str, float]:
    """Of each, the largest difference from `ragged_dot` in float32 over its largest value, of the three arrays.

    Raises:
      ValueError: one is further off than rounding in this type explains.
    """
    (rows, weights, cotangent), served = given, int(sizes.sum())

    def filled(value: float) -> tuple[jax.Array, ...]:
        return rows.at[served:].set(value), weights, cotangent.at[served:].set(value)

    with jax.default_matmul_precision("highest"):
        right = jax.tree.leaves(with_gradients("ragged_dot")(*(x.astype(jnp.float32) for x in filled(0)), sizes))
    bound, found = TOLERANCE[rows.dtype.name], {}
    for name, call in calls.items():
        # XLA masks by multiplying, and its NaN says nothing of the rows that have a group.
        out = jax.tree.leaves(call(*filled(0 if name == "ragged_dot" else jnp.nan), sizes))
        found[name] = max(float(jnp.abs(x - y).max() / jnp.abs(y).max()) for x, y in zip(out, right, strict=True))
        require(found[name] < bound, f"{name}.error", found[name], f"must be below {bound}: it computes something else")
    return found


def measure(config: BenchExpertsConfig) -> dict[str, Any]:
    """The record, ready for `json.dumps`: a point for even groups and one for skewed ones. Raises: as `errors`."""
    model, device = model_preset(config.model), default_device()
    assert model.moe is not None
    E, D, F, r = model.moe.num_experts, model.model_dim, model.moe.expert_dim, np.random.default_rng(config.seed)
    given = tuple(jnp.asarray(r.standard_normal(shape) / shape[-2] ** 0.5, config.dtype)
                  for shape in ((config.rows, D), (E, D, F), (config.rows, F)))
    found, points, calls = machine(config.threads), [], sides()
    for groups in ("even", "skewed"):
        sizes = jnp.asarray(group_sizes(config.rows, E, groups == "skewed"))
        served = int(sizes.sum())
        off, flops = errors(calls, given, sizes), 3 * 2.0 * served * D * F
        timings = take_turns({name: _waits(call, (*given, sizes)) for name, call in calls.items()}, config.repeats)
        points.append({
            "groups": groups, "sizes": sizes.tolist(), "error": off,
            "time": {name: dataclasses.asdict(t) for name, t in timings.items()},
            "ratio": {name: t.median_s / timings["ragged_dot"].median_s for name, t in timings.items()},
            "tflops": {name: flops / t.median_s / 1e12 for name, t in timings.items()}})
    return {"benchmark": "experts", "config": to_dict(config), "device": jax.local_devices()[0].device_kind,
            "experts": E, "widths": [D, F], "auto": resolve("auto", device.platform, device.compute_capability),
            "machine": {**found, "load_after": machine(1)["load_before"]}, "points": points}


def _waits(call: Gradients, given: tuple[jax.Array, ...]) -> Callable[[], object]:
    return lambda: jax.block_until_ready(call(*given))


def to_table(record: dict[str, Any]) -> Table:
    """A row for even groups, one for skewed; times over `ragged_dot`'s, below 1 is faster; `*` marks what `auto` takes.
    """
    table = Table(title=f"Grouped product of {record['experts']} experts, {record['widths'][0]} by "
                        f"{record['widths'][1]}, forward and gradients, on {record['device']}", title_justify="left")
    names = list(record["points"][0]["ratio"])
    for heading in ("groups", *(f"{name}{'*' * (name == record['auto'])}" for name in names), "ragged_dot (ms)"):
        table.add_column(heading, justify="left" if heading == "groups" else "right")
    for point in record["points"]:
        table.add_row(point["groups"], *(f"{point['ratio'][name]:.2f}" for name in names),
                      f"{1e3 * point['time']['ragged_dot']['median_s']:.1f}")
    return table


def main() -> None:
    config = parse(BenchExpertsConfig)
    if config.threads:
        use_threads(config.threads)
    show(measure(config), to_table, as_json=config.json)


if __name__ == "__main__":
    run(main)
