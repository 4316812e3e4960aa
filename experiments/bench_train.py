"""How fast we train beside PyTorch: the same weights, batch and AdamW, one process, the two taking turns.

    python -m experiments.bench_train --json

A step is forward, backward and update, in float32 on the same cores; ours is the step of `experiments.train`, jitted
with its state donated, the peer's is eager with fused AdamW (no `torch.compile`). Neither clips gradients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from experiments.benchmark import MODEL, Peer, Timing, machine, make_peer, random_tokens, show, take_turns, use_threads
from experiments.cli import parse, run
from mfa_jax.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig, require, to_dict
from mfa_jax.model.transformer import Transformer
from mfa_jax.train.optimizer import make_optimizer, make_schedule
from mfa_jax.train.step import TrainState, make_train_step

OPTIMIZER = OptimizerConfig(learning_rate=1e-4, schedule="constant", warmup_steps=0, clip_norm=None,
                            decay_embeddings=True)
LOSS_TOLERANCE = 1e-3
"""Largest relative difference between the losses of the two after the same number of steps."""


@dataclasses.dataclass(frozen=True)
class BenchTrainConfig:
    """Tokens per second of training, ours over the peer's."""

    model: ModelConfig = MODEL
    """The model of both; grouped heads and rope, which the peer knows too."""
    batch_size: int = 4
    """Rows of a step."""
    sequence_length: int = 512
    """T, tokens a row."""
    repeats: int = 7
    """Timed steps of each; the two take turns."""
    threads: int = 2
    """Cores that the process is bound to, and threads of each side."""
    seed: int = 0
    """Of the weights and the batch."""
    json: bool = False
    """Print one JSON object instead of a table."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "repeats", "threads"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        require(self.sequence_length >= 2, "sequence_length", self.sequence_length, "must be at least 2")


def our_step(config: BenchTrainConfig, params: Any, tokens: np.ndarray) -> Callable[[], float]:
    """A call that does one step and returns the loss before it. `params` are copied, then donated from step to step."""
    train = TrainConfig(model=config.model, optimizer=OPTIMIZER, data=DataConfig(batch_size=config.batch_size))
    optimizer = make_optimizer(OPTIMIZER, train.steps, jax.eval_shape(lambda: params))
    step = jax.jit(make_train_step(train, Transformer(config.model), optimizer, make_schedule(OPTIMIZER, train.steps)),
                   donate_argnums=0)
    own = jax.tree.map(jnp.copy, params)
    state = TrainState(jnp.zeros((), jnp.int32), own, jax.jit(optimizer.init)(own), {}, jax.random.key(config.seed))
    shape = (config.batch_size, config.sequence_length)
    batch = {
        "inputs": jnp.asarray(tokens[:, :-1], jnp.int32), "targets": jnp.asarray(tokens[:, 1:], jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape), "segments": None,
        "mask": jnp.ones(shape),
    }

    def call() -> float:
        nonlocal state
        state, metrics = jax.block_until_ready(step(state, batch))
        return float(metrics["loss"])

    return call


def peer_step(peer: Peer, tokens: np.ndarray) -> Callable[[], float]:
    """The same for the peer, with the same weight decay: on projections and embeddings, not on norms."""
    torch, model = peer.torch, peer.model.train()
    inputs, targets = torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(tokens[:, 1:].copy())
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    rest = [p for name, p in model.named_parameters() if "norm" not in name]
    optimizer = torch.optim.AdamW(
        [{"params": rest, "weight_decay": OPTIMIZER.weight_decay}, {"params": norms, "weight_decay": 0.0}],
        lr=OPTIMIZER.learning_rate, betas=(OPTIMIZER.b1, OPTIMIZER.b2), eps=OPTIMIZER.eps, fused=True)

    def call() -> float:
        optimizer.zero_grad(set_to_none=True)
        logits = model(input_ids=inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return call


def measure(config: BenchTrainConfig) -> dict[str, Any]:
    """The record of the benchmark, ready for `json.dumps`.

    Raises:
      ValueError: the peer is missing or another model, or the two losses part.
    """
    found = machine(config.threads)
    peer = make_peer(config.model, config.threads, config.seed)
    tokens = random_tokens(config.model, config.batch_size, config.sequence_length + 1, config.seed)
    calls = {"ours": our_step(config, peer.params, tokens), "peer": peer_step(peer, tokens)}
    losses: dict[str, list[float]] = {name: [] for name in calls}

    def recorded(name: str) -> Callable[[], None]:
        return lambda: losses[name].append(calls[name]())

    timings = take_turns({name: recorded(name) for name in calls}, config.repeats)
    ours, theirs = (np.array(losses[name]) for name in ("ours", "peer"))
    difference = float(np.max(np.abs(ours - theirs) / np.abs(theirs)))
    require(difference < LOSS_TOLERANCE, "loss_difference", difference,
            f"must be below {LOSS_TOLERANCE}: the two do not train the same model")
    sides = {name: _side(config, timing) for name, timing in timings.items()}
    return {
        "benchmark": "train", "config": to_dict(config), "optimizer": to_dict(OPTIMIZER),
        "machine": {**found, "load_after": machine(1)["load_before"]},
        "check": {"logit_difference": peer.logit_difference, "loss_difference": difference,
                  "losses": {name: values for name, values in losses.items()}},
        "sides": sides,
        "ratios": {"tokens_per_s": sides["ours"]["tokens_per_s"] / sides["peer"]["tokens_per_s"]},
    }


def _side(config: BenchTrainConfig, timing: Timing) -> dict[str, Any]:
    return {"tokens_per_s": config.batch_size * config.sequence_length / timing.median_s,
            "compile_s": timing.compile_s, "step": dataclasses.asdict(timing)}


def to_table(record: dict[str, Any]) -> Table:
    """A row a side; the compile time of an eager peer is its lazy set-up."""
    table = Table(title="Training, medians", title_justify="left")
    for heading in ("", "tokens/s", "step (ms)", "compile (s)"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, side in record["sides"].items():
        table.add_row(name, f"{side['tokens_per_s']:.0f}", f"{1e3 * side['step']['median_s']:.0f}",
                      f"{side['compile_s']:.1f}")
    table.caption = (f"ours / peer: tokens/s {record['ratios']['tokens_per_s']:.2f}; largest relative difference of "
                     f"losses {record['check']['loss_difference']:.1e}")
    return table


def main() -> None:
    config = parse(BenchTrainConfig)
    use_threads(config.threads)
    show(measure(config), to_table, as_json=config.json)


if __name__ == "__main__":
    run(main)
