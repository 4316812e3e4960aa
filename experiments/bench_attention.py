"""How fast attention trains: forward and gradient of each implementation beside `jax.nn.dot_product_attention`.

    python -m experiments.bench_attention
    python -m experiments.bench_attention --variants mfa,mfa-kr --lengths 2048,8192 --dtype bfloat16 --json

For the heads and widths of each variant, and each length, all that can serve the call on this device take turns in one
process, on the same arrays; before that their results and gradients are held against `dense` in float32. What `auto`
chooses is in the record, so that its bounds (`core.DENSE_SCORES`, `core.DENSE_QUERIES_ON_CPU`) can be checked.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from experiments.benchmark import machine, show, take_turns, use_threads
from experiments.cli import parse, run
from mfa_jax.attention.core import attend, dense_attention, resolve
from mfa_jax.config import DType, GQAConfig, MLAConfig, require, to_dict
from mfa_jax.presets import model_preset

CANDIDATES = ("dense", "blockwise", "splash", "cudnn", "tokamax")
"""Implementations that are timed where they can serve; `context` needs a mesh that splits the sequence."""
PEER = "jax.nn"
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
"""Largest error of a result or gradient over the largest value of what is right."""


@dataclasses.dataclass(frozen=True)
class BenchAttentionConfig:
    """Time of attention, forward and gradient, over that of `jax.nn.dot_product_attention`."""

    scale: str = "nano"
    """Presets that heads and widths are of: tiny, nano or small."""
    variants: str = "mha,gqa,mqa,mla,mfa,mfa-kr"
    """Which of them, separated by commas."""
    lengths: str = "64,128,256,512,1024"
    """T, tokens a row, separated by commas."""
    tokens: int = 2048
    """Tokens of a call; a call has `tokens / T` rows."""
    dtype: DType = "float32"
    """Of queries, keys and values."""
    repeats: int = 7
    """Timed calls of each; all take turns."""
    threads: int = 1
    """Cores that the process is bound to; 0 leaves it as it is, where a device computes."""
    seed: int = 0
    """Of the arrays."""
    json: bool = False
    """Print one JSON object instead of a table."""

    def __post_init__(self) -> None:
        require(self.repeats >= 1, "repeats", self.repeats, "must be at least 1")
        require(self.threads >= 0, "threads", self.threads, "must be at least 0")
        require(bool(self.variants), "variants", self.variants, "must name one at least")
        for length in self.lengths.split(","):
            require(length.isdecimal() and 2 <= int(length) <= self.tokens, "lengths", self.lengths,
                    f"must be numbers from 2 to tokens={self.tokens}, separated by commas")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Heads and widths of the attention that a variant computes in training."""

    N: int
    """Query heads."""
    K: int
    """Key heads."""
    H: int
    """Width of queries and keys."""
    h: int
    """Width of values."""


def shape_of(preset: str) -> Shape:
    """What the attention of a preset is given.

    Raises:
      ValueError: an unknown preset.
    """
    a = model_preset(preset).attention
    if isinstance(a, GQAConfig):
        return Shape(a.num_heads, a.num_kv_heads, a.head_dim, a.head_dim)
    if isinstance(a, MLAConfig):
        return Shape(a.num_heads, a.num_heads, a.nope_dim + a.rope_dim, a.value_dim)
    return Shape(a.num_heads, 1, a.latent_dim, a.latent_dim)


Gradients = Callable[..., tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]]


def with_gradients(attention: Callable[..., jax.Array]) -> Gradients:
    """`attention(q, k, v)` and the gradient of its sum over `cotangent`, as one compiled program."""

    def both(q: jax.Array, k: jax.Array, v: jax.Array, cotangent: jax.Array) -> Any:
        out, back = jax.vjp(attention, q, k, v)
        return out, back(cotangent)

    return jax.jit(both)


def sides(config: BenchAttentionConfig, shape: Shape, length: int) -> tuple[dict[str, Gradients], str]:
    """What is timed, by name, and which of ours `auto` chooses."""
    device, scale = jax.local_devices()[0], shape.H**-0.5
    call = dict(T=length, S=length, **dataclasses.asdict(shape), dtype=config.dtype, offset=False, segments=False,
                alibi=False, compute_capability=float(getattr(device, "compute_capability", 0)))

    def serves(name: str) -> bool:
        if name == "tokamax" and importlib.util.find_spec(name) is None:  # an optional package
            return False
        try:
            return resolve(name, device.platform, **call) == name
        except NotImplementedError:
            return False

    found = {name: with_gradients(lambda q, k, v, name=name: attend(q, k, v, scale=scale, implementation=name))
             for name in CANDIDATES if serves(name)}
    found[PEER] = with_gradients(lambda q, k, v: _peer(q, k, v, scale))
    return found, resolve("auto", device.platform, **call)


def _peer(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> jax.Array:
    """What jax.nn takes by itself on this device; it has keys by token, and wants values as wide as keys."""
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    h, missing = v.shape[-1], k.shape[-1] - v.shape[-1]
    v = jnp.pad(v, [(0, 0)] * 3 + [(0, missing)]) if missing else v
    return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True)[..., :h]


def arrays(config: BenchAttentionConfig, shape: Shape, length: int) -> tuple[jax.Array, ...]:
    """Queries `[B, T, N, H]`, keys `[B, K, T, H]`, values `[B, K, T, h]` and a cotangent `[B, T, N, h]`."""
    r, rows = np.random.default_rng(config.seed), config.tokens // length
    dims = ((rows, length, shape.N, shape.H), (rows, shape.K, length, shape.H), (rows, shape.K, length, shape.h),
            (rows, length, shape.N, shape.h))
    return tuple(jnp.asarray(r.standard_normal(dim), config.dtype) for dim in dims)


def errors(calls: dict[str, Gradients], given: tuple[jax.Array, ...], scale: float) -> dict[str, float]:
    """Of each, the largest difference from dense attention in float32 over its largest value, of all four arrays.

    Raises:
      ValueError: one is further off than rounding in this type explains.
    """
    with jax.default_matmul_precision("highest"):
        right = with_gradients(lambda q, k, v: dense_attention(q, k, v, scale=scale))(
            *(x.astype(jnp.float32) for x in given))
    bound, found = TOLERANCE[given[0].dtype.name], {}
    for name, call in calls.items():
        pairs = zip(jax.tree.leaves(call(*given)), jax.tree.leaves(right), strict=True)
        found[name] = max(float(jnp.abs(x - y).max() / jnp.abs(y).max()) for x, y in pairs)
        require(found[name] < bound, f"{name}.error", found[name], f"must be below {bound}: it computes something else")
    return found


def measure(config: BenchAttentionConfig) -> dict[str, Any]:
    """The record of the benchmark, ready for `json.dumps`: a point for each variant and length.

    Raises:
      ValueError: an unknown variant, or one computes something else.
    """
    found, points = machine(config.threads), []
    for name in config.variants.split(","):
        shape = shape_of(f"{config.scale}-{name}")
        for length in map(int, config.lengths.split(",")):
            given, (calls, chosen) = arrays(config, shape, length), sides(config, shape, length)
            off = errors(calls, given, shape.H**-0.5)
            timings = take_turns({side: _waits(call, given) for side, call in calls.items()}, config.repeats)
            peer = timings[PEER].median_s
            points.append({
                "variant": name, "length": length, "rows": given[0].shape[0], **dataclasses.asdict(shape),
                "auto": chosen, "error": off, "time": {side: dataclasses.asdict(t) for side, t in timings.items()},
                "ratio": {side: t.median_s / peer for side, t in timings.items() if side != PEER}})
    return {"benchmark": "attention", "config": to_dict(config), "device": jax.local_devices()[0].device_kind,
            "machine": {**found, "load_after": machine(1)["load_before"]}, "points": points}


def _waits(call: Gradients, given: tuple[jax.Array, ...]) -> Callable[[], object]:
    return lambda: jax.block_until_ready(call(*given))


def to_table(record: dict[str, Any]) -> Table:
    """A row a variant and length; times over the peer's, below 1 is faster; `*` marks what `auto` chooses."""
    names = [name for name in CANDIDATES if any(name in point["ratio"] for point in record["points"])]
    table = Table(title=f"Attention, forward and gradient, on {record['device']}: medians over jax.nn's",
                  title_justify="left")
    for heading in ("", "T", "N", "K", "H", "h", *names, "jax.nn (ms)"):
        table.add_column(heading, justify="right" if heading else "left")
    for point in record["points"]:
        cells = [f"{point['ratio'][name]:.2f}{'*' if name == point['auto'] else ''}" if name in point["ratio"] else ""
                 for name in names]
        table.add_row(point["variant"], *(str(point[name]) for name in ("length", "N", "K", "H", "h")), *cells,
                      f"{1e3 * point['time'][PEER]['median_s']:.1f}")
    return table


def main() -> None:
    config = parse(BenchAttentionConfig)
    if config.threads:
        use_threads(config.threads)
    show(measure(config), to_table, as_json=config.json)


if __name__ == "__main__":
    run(main)
