"""Training on one accelerator: model FLOPs utilisation, tokens a second and memory, MFA beside MHA in one run.

    python -m experiments.bench_mfu --output experiments/results/gpu/h100.json
    python -m experiments.bench_mfu --tiny --output tiny.json                     # any machine; no result

A pair of models has as many parameters beside the embedding, the same widths and layers but for heads and feed-forward
(`presets.matched`), and the same batch of random tokens. A step is that of `experiments.train`: forward, backward,
clipping, AdamW and the norms it reports, in bfloat16 with float32 weights and states, jitted with its state donated,
without a loop over layers.
All sides of a pair are in memory together and take turns; a time is the median of the rounds over the steps of a round,
which are handed over without waiting. FLOPs are those of the model (`capacity.training_flops_per_token`), so what remat
computes twice does not count; the peak is the data sheet's, and the rate of a large product measured in the same run
stands beside it. Memory is what the compiler says a step needs, before it runs, beside the peak that the device counted
while the first side of the run was alone on it.
"""

from __future__ import annotations

import dataclasses
import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from experiments import cli
from experiments.benchmark import machine, random_tokens, take_turns, write
from experiments.decode_kernel.speed import multiplier, speed
from mfa_jax import axes
from mfa_jax.capacity import model_parameters, training_flops_per_token
from mfa_jax.config import DataConfig, GQAConfig, MFAConfig, ModelConfig, OptimizerConfig, TrainConfig, require, to_dict
from mfa_jax.model.transformer import Transformer
from mfa_jax.presets import matched, model_preset
from mfa_jax.train.metrics import peak_flops
from mfa_jax.train.optimizer import make_optimizer, make_schedule
from mfa_jax.train.run import abstract_params
from mfa_jax.train.step import create_state, jit_step, make_train_step, state_layout

OPTIMIZER = OptimizerConfig(learning_rate=1e-5, schedule="constant", warmup_steps=0)
"""So slow that the loss on one batch falls from step to step, which is checked."""
MFU_TARGET = 0.45
"""MFU that the billion-parameter MFA model is to reach."""


Implementation = Literal["cudnn", "blockwise", "dense", "splash"]


@dataclasses.dataclass(frozen=True)
class Pair:
    """A model of MHA, one of MFA with as many parameters, and the batch of both."""

    mha: ModelConfig
    mfa: ModelConfig
    rows: int
    T: int

    def sides(self, implementation: Implementation) -> dict[str, ModelConfig]:
        """By name, MFA first, with one kind of attention for training, and no loop over layers."""
        return {name: dataclasses.replace(model, attention_implementation=implementation, dtype="bfloat16",
                                          unroll_layers=True)
                for name, model in (("mfa", self.mfa), ("mha", self.mha))}


_BILLION = ModelConfig(vocab_size=32768, num_layers=18, model_dim=2048, ffn_dim=5464, tie_embeddings=True,
                       attention=GQAConfig(num_heads=16, num_kv_heads=16, head_dim=128))
"""The width, heads and head width of the paper's 7B family, without experts: 0.97 billion parameters."""


def pairs(tiny: bool) -> dict[str, Pair]:
    """What is measured, by name."""
    if tiny:
        return {"tiny": Pair(model_preset("tiny-mha"), model_preset("tiny-mfa"), rows=2, T=64)}
    billion = matched(_BILLION, MFAConfig(latent_dim=256, query_rank=256, query_norm=False))
    return {"1b": Pair(_BILLION, billion, rows=4, T=4096),
            "1b-8": Pair(_BILLION, billion, rows=8, T=4096),  # over more tokens the optimizer's traffic weighs less
            "small": Pair(model_preset("small-mha"), model_preset("small-mfa"), rows=32, T=4096)}


@dataclasses.dataclass(frozen=True)
class BenchMfuConfig:
    """MFU, tokens a second and memory of training, of MFA beside MHA with as many parameters, taking turns on a GPU."""

    output: str
    """JSON file; it is written as it grows."""
    implementations: tuple[Implementation, ...] = ("cudnn", "blockwise")
    """Kinds of attention for training; what one can't serve is recorded."""
    rounds: int = 7
    """Timed rounds; all sides of a pair take turns."""
    steps: int = 3
    """Steps of a round."""
    tiny: bool = False
    """A model that any machine can do, to see that everything works. What it measures is no result."""
    seed: int = 0
    """Of weights and tokens."""

    def __post_init__(self) -> None:
        for implementation in self.implementations:
            require(implementation in get_args(Implementation), "implementations", implementation,
                    f"must be of {', '.join(get_args(Implementation))}")
        for name in ("rounds", "steps"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")


class _Side:
    """One model and its step: compiled when made, in memory from the first step on."""

    def __init__(self, model: ModelConfig, pair: Pair, seed: int) -> None:
        self.pair = pair
        self.config = TrainConfig(model=model, optimizer=OPTIMIZER, seed=seed,
                                  data=DataConfig(batch_size=pair.rows, sequence_length=pair.T))
        self.model, self.mesh = Transformer(model), axes.make_mesh((1,) * len(axes.MESH_AXES), jax.devices()[:1])
        self.optimizer = make_optimizer(OPTIMIZER, self.config.steps, abstract_params(self.model, self.mesh))
        self.layout = state_layout(self.config, self.model, self.optimizer, self.mesh)
        step = make_train_step(self.config, self.model, self.optimizer, make_schedule(OPTIMIZER, self.config.steps))
        tokens = random_tokens(model, pair.rows, pair.T + 1, seed)
        shape = (pair.rows, pair.T)
        self.batch = {
            "inputs": jnp.asarray(tokens[:, :-1], jnp.int32), "targets": jnp.asarray(tokens[:, 1:], jnp.int32),
            "positions": jnp.broadcast_to(jnp.arange(pair.T, dtype=jnp.int32), shape), "segments": None,
            "mask": jnp.ones(shape),
        }
        with jax.set_mesh(self.mesh):
            self.step = jit_step(step, self.layout).lower(self.layout, self.batch).compile()
        self.state: Any = None

    def run(self, steps: int) -> float:
        """So many steps; the loss before the last."""
        with jax.set_mesh(self.mesh):
            if self.state is None:
                self.state = create_state(self.config, self.model, self.optimizer, self.layout)
            for _ in range(steps):
                self.state, metrics = self.step(self.state, self.batch)
            return float(metrics["loss"])

    def predicted_bytes(self) -> int | None:
        """What the compiler says that a step takes; None where it does not say."""
        memory = self.step.memory_analysis()
        if memory is None:
            return None
        return int(memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
                   + memory.temp_size_in_bytes)


def measure(config: BenchMfuConfig) -> dict[str, Any]:
    """The record of the benchmark; it is written to `config.output` as it grows.

    Raises:
      ValueError: a model's loss does not fall.
    """
    device = jax.devices()[0]
    size = 128 if config.tiny else 8192
    product = multiplier(size)
    record: dict[str, Any] = {
        "benchmark": "mfu", "target": MFU_TARGET, "config": to_dict(config), "optimizer": to_dict(OPTIMIZER),
        "machine": {**machine(threads=0), "device": device.device_kind}, "peak_flops": peak_flops(device),
        "matmul_flops_per_s": 2 * size**3 / speed(product, 0.02, 7), "pairs": {},
    }
    del product  # its matrices would count among the memory of the first side
    write(config.output, record)
    for name, pair in pairs(config.tiny).items():
        for implementation in config.implementations:
            first = not record["pairs"]
            record["pairs"][f"{name}, {implementation}"] = measure_pair(pair, implementation, config,
                                                                        record["peak_flops"], first)
            write(config.output, record)
    return record


def measure_pair(
    pair: Pair, implementation: Implementation, config: BenchMfuConfig, peak: float | None, first: bool
) -> dict[str, Any]:
    """Of each side its status, its figures where that is `ok`, and why where it is not.

    Args:
      first: whether nothing else has run on the device, whose peak of memory is then that of the first side.
    """
    models = pair.sides(implementation)

    def compiled(model: ModelConfig) -> _Side | Exception:
        # What a library kernel raises for a shape it does not take, and when, is its own affair; here it is recorded.
        try:
            return _Side(model, pair, config.seed)
        except Exception as error:
            return error

    with ThreadPoolExecutor() as pool:
        made = dict(zip(models, pool.map(compiled, models.values()), strict=True))
    found: dict[str, dict[str, Any]] = {}
    sides: dict[str, _Side] = {}
    for name, side in made.items():
        try:
            if isinstance(side, Exception):
                raise side
            losses = [side.run(1) for _ in range(3)]
            alone = first and name == next(iter(made))  # a side that failed leaves its peak
            after = jax.devices()[0].memory_stats() if alone else None
        except Exception as error:
            found[name] = {"status": "failed",
                           "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            if isinstance(side, _Side):
                side.state = None
            continue
        require(losses[0] > losses[1] > losses[2], f"{name}: losses", losses, "must fall on the same batch")
        sides[name] = side
        found[name] = {"status": "ok", "losses": losses, "predicted_bytes": side.predicted_bytes(),
                       "peak_bytes": None if after is None else after["peak_bytes_in_use"]}
    timings = take_turns({name: functools.partial(side.run, config.steps) for name, side in sides.items()},
                         config.rounds)
    tokens = pair.rows * pair.T
    for name, timing in timings.items():
        seconds = [s / config.steps for s in timing.seconds]
        median = timing.median_s / config.steps
        flops = training_flops_per_token(models[name], pair.T)
        found[name] |= {"seconds": median, "rounds": seconds, "tokens_per_s": tokens / median,
                        "flops_per_s": flops * tokens / median,
                        "mfu": None if peak is None else flops * tokens / median / peak}
    return {
        "rows": pair.rows, "T": pair.T, "sides": found,
        "models": {name: {"config": to_dict(model), "parameters": model_parameters(model).total,
                          "flops_per_token": training_flops_per_token(model, pair.T)}
                   for name, model in models.items()},
    }


def to_table(record: dict[str, Any]) -> Table:
    """A row a side."""
    table = Table(title=f"Training on {record['machine']['device']}", title_justify="left")
    for heading in ("", "ms a step", "tokens/s", "TFLOP/s", "MFU", "GB predicted", "GB measured"):
        table.add_column(heading, justify="right" if heading else "left")
    for pair, found in record["pairs"].items():
        for name, side in found["sides"].items():
            if side["status"] != "ok":
                table.add_row(f"{pair} {name}", "failed", "", "", "", "", "")
                continue
            cells = (1e3 * side["seconds"], side["tokens_per_s"], side["flops_per_s"] / 1e12)
            memory = [f"{side[x] / 1e9:.1f}" if side[x] else "" for x in ("predicted_bytes", "peak_bytes")]
            table.add_row(f"{pair} {name}", *(f"{x:,.1f}" for x in cells),
                          "" if side["mfu"] is None else f"{side['mfu']:.3f}", *memory)
    return table


def main(config: BenchMfuConfig) -> None:
    Console().print(to_table(measure(config)))


if __name__ == "__main__":
    cli.run(lambda: main(cli.parse(BenchMfuConfig)))
