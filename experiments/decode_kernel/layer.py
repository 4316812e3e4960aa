"""Step-3's attention layer as it decodes a token of every row: projections, append, attention, against its bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from experiments.benchmark import take_turns
from experiments.decode_kernel.data import TOLERANCE, difference
from experiments.decode_kernel.speed import Copy, repeated
from mfa_jax.attention import Serving, build, decode_call, init_cache
from mfa_jax.config import MFAConfig, PositionConfig
from mfa_jax.kernels import default_device, resolve

PUBLISHED = {"source": "arXiv 2507.19427", "device": "H800, 64 sequences, 8-bit projections",
             "seconds": {8192: 281e-6, 32768: 791e-6}}
"""Context for the figures, from other hardware and with half of the weights' bytes; not a like-for-like comparison."""


@dataclasses.dataclass(frozen=True)
class LayerSizes:
    """Rows, tokens of each with the new one, and the layer: model width D and the letters of `MFAConfig`."""

    batch: int = 64
    lengths: tuple[int, ...] = (32768, 8192)
    D: int = 7168
    N: int = 64
    C: int = 256
    Q: int = 2048

    @property
    def config(self) -> MFAConfig:
        return MFAConfig(num_heads=self.N, latent_dim=self.C, query_rank=self.Q)


def measure_layer(
    sizes: LayerSizes, length: int, implementations: list[str], copy: Copy, *, rounds: int, round_seconds: float,
    seed: int,
) -> dict[str, Any]:
    """The record of a length, in bfloat16: of each implementation its time, and its time over the floor.

    The floor is the time of copying as many bytes: those of the weights, of the valid cache, and of the hidden states
    in and out, each once; what is between the products need not leave the chip. The cache is updated in place, and its
    length set back, so that every step is the same. Outputs are compared with those of `reference`.
    """
    layer = _Layer(sizes, length, seed)
    found: dict[str, dict[str, Any]] = {}
    runs: dict[str, tuple[Callable[[], Any], int]] = {}
    wanted = layer.run("reference")()
    for name in implementations:
        try:
            resolve(name, layer.call, default_device())
        except NotImplementedError as reason:
            found[name] = {"status": "left out", "reason": str(reason)}
            continue
        run = layer.run(name)
        try:
            error = float(difference(run(), wanted.astype(jnp.float32)))
        except jax.errors.JaxRuntimeError as reason:
            found[name] = {"status": "failed", "reason": str(reason).splitlines()[0]}
            continue
        # A comparison with nan is false.
        if error <= TOLERANCE:
            found[name] = {"status": "ok", "error": error}
            runs[name] = repeated(run, jax.block_until_ready, round_seconds)
        else:
            found[name] = {"status": "failed", "reason": f"outputs differ by {error} of the largest"}
    runs["copy"] = repeated(copy.run, jax.block_until_ready, round_seconds)
    timings = take_turns({name: several for name, (several, _) in runs.items()}, rounds)
    copy_rate = copy.nbytes * runs["copy"][1] / timings["copy"].median_s
    floor = sum(layer.nbytes.values()) / copy_rate
    for name in runs.keys() - {"copy"}:
        seconds = timings[name].median_s / runs[name][1]
        found[name] |= {"seconds": seconds, "over_floor": seconds / floor,
                        "rounds": [s / runs[name][1] for s in timings[name].seconds]}
    return {"length": length, "batch": sizes.batch, "auto": resolve("auto", layer.call, default_device()),
            "bytes": layer.nbytes, "copy_bytes_per_s": copy_rate, "floor_s": floor, "published": PUBLISHED,
            "sides": found}


class _Layer:
    """Random weights, hidden states and caches of one length."""

    def __init__(self, sizes: LayerSizes, length: int, seed: int) -> None:
        self.config, self.batch, self.length = sizes.config, sizes.batch, length
        of_weights, of_x, *self.of_cache = jax.random.split(jax.random.key(seed), 4)
        self.x = jax.random.normal(of_x, (sizes.batch, 1, sizes.D), jnp.bfloat16)
        self.positions = jnp.full((sizes.batch, 1), length - 1)
        init = jax.jit(lambda key: nn.unbox(self.module("reference").init(key, self.x, self.positions)["params"]))
        self.params = init(of_weights)
        self.call = decode_call(self.config, PositionConfig(), capacity=length, dtype=jnp.bfloat16,
                                cache_dtype=jnp.bfloat16)
        self.nbytes = {"weights": sum(w.nbytes for w in jax.tree.leaves(self.params)), "states": 2 * self.x.nbytes,
                       "cache": self.cache().nbytes}

    def module(self, implementation: str) -> Any:
        return build(self.config, PositionConfig(), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16,
                     serving=Serving(decode=implementation))

    def cache(self) -> Any:
        """Full but for the token to come."""
        cache: Any = init_cache(self.config, self.batch, self.length, jnp.bfloat16)
        k, v = (jax.random.normal(key, cache.k.shape, jnp.bfloat16) for key in self.of_cache)
        return dataclasses.replace(cache, k=k, v=v, length=cache.length + self.length - 1)

    def run(self, implementation: str) -> Callable[[], Any]:
        """A step of a cache of its own, which gives the layer's output."""
        module, cache = self.module(implementation), self.cache()

        def step(params: Any, x: Any, positions: Any, cache: Any) -> Any:
            y, after = module.apply({"params": params}, x, positions, cache=cache)
            return y, after.with_length(cache.length)

        program = jax.jit(step, donate_argnums=3)

        def run() -> Any:
            nonlocal cache
            y, cache = program(self.params, self.x, self.positions, cache)
            return y

        return run
