"""Training, read from top to bottom: set up or resume, then step, log, evaluate, save, until done or told to stop."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from mfa_jax import axes, capacity
from mfa_jax.config import TrainConfig, from_dict, require, to_dict, to_json
from mfa_jax.data import Batches, Prepared, Tokenizer, eval_batches, load_tokenizer, make_loader, prepare
from mfa_jax.model.transformer import Transformer
from mfa_jax.train import processes, run
from mfa_jax.train.checkpoint import Checkpoints, Restored
from mfa_jax.train.metrics import MetricsWriter, Progress, peak_flops
from mfa_jax.train.optimizer import make_optimizer, make_schedule
from mfa_jax.train.step import (
    BATCH_SPEC,
    TrainState,
    batch_loss,
    create_state,
    data_shard,
    jit_step,
    make_train_step,
    require_divisible_batch,
    state_layout,
    watched_leaves,
)

log = logging.getLogger(__name__)


class NonFiniteError(ArithmeticError):
    """A gradient or an update became NaN or infinite; the message names the step and the leaf."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    step: int
    """Updates done, all starts counted."""
    interrupted: bool
    """Whether a signal ended it; what was done is saved."""
    metrics: dict[str, Any]
    """The last metrics, of training and, as `eval_*`, on the held-out documents."""


@processes.naming_the_lost()
def train(config: TrainConfig, *, progress: bool = True, devices: Sequence[jax.Device] | None = None) -> TrainResult:
    """Trains until `config.steps`, going on from the newest intact checkpoint of `config.workdir` if there is one.

    SIGTERM and Ctrl-C save the step that is done and return. With several processes (`cluster.joined`) all of them
    call this, with the same config and a folder that they share; one that is told to stop stops all, at the same step.

    Args:
      progress: whether to show how far it is.
      devices: those of the mesh; None for all.

    Raises:
      ValueError: a config that cannot work (a batch that does not divide over the mesh, a vocabulary smaller than the
        tokenizer's, a workdir of another model, ...), named with its value; processes whose configs or data differ.
      NonFiniteError: a number that is not finite; the checkpoints are those from before.
      CheckpointWriteError: a checkpoint could not be written; the earlier ones are intact.
    """
    mesh = axes.make_mesh(dataclasses.astuple(config.mesh), devices)
    require_divisible_batch(config, mesh)
    workdir = Path(config.workdir)
    checkpoints = Checkpoints(workdir / run.CHECKPOINTS, keep_last=config.keep_checkpoints)
    with checkpoints, jax.set_mesh(mesh):
        _require_same_run(config, checkpoints)
        processes.require_same("config", to_json(config))
        _, prepared = processes.leader_first(lambda: _open_data(config, workdir))
        processes.require_same("prepared data", to_json(prepared.meta))
        parts = _Parts.build(config, mesh, prepared)
        restored = checkpoints.restore(_items(parts.layout))
        loader = make_loader(prepared, config.data, "train", *data_shard(mesh, config.data.batch_size))
        state = _start(config, parts, restored, loader)
        start = int(state.step)
        require(start <= config.steps, "steps", config.steps, f"the run in {config.workdir} is at step {start} already")
        leader = jax.process_index() == 0
        if leader:
            (workdir / run.CONFIG).write_text(to_json(config))
        with (
            contextlib.closing(loader),
            MetricsWriter(workdir, start_step=start, enabled=leader) as writer,
            Progress(config.steps, start=start, enabled=progress and leader) as bar,
            processes.stop_signals() as stop,
        ):
            if restored is not None:
                bar.print(f"resumed at step {start} from {checkpoints.folder}")
            loop = _Loop(config, parts, checkpoints, loader, writer, bar)
            loop.metrics |= {} if restored is None else restored.meta["metrics"]
            return loop.run(state, stop)


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What a run is compiled from."""

    mesh: Mesh
    prepared: Prepared
    layout: TrainState
    create: Callable[[], TrainState]
    step: Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]
    evaluate: Callable[[Any, Any], Any]

    @classmethod
    def build(cls, config: TrainConfig, mesh: Mesh, prepared: Prepared) -> _Parts:
        model = Transformer(config.model)
        optimizer = make_optimizer(config.optimizer, config.steps, run.abstract_params(model, mesh))
        layout = state_layout(config, model, optimizer, mesh)
        step = make_train_step(config, model, optimizer, make_schedule(config.optimizer, config.steps))
        return cls(
            mesh, prepared, layout, functools.partial(create_state, config, model, optimizer, layout),
            jit_step(step, layout),
            jax.jit(lambda params, batch: batch_loss(dataclasses.replace(config, z_loss=0.0), model, params, batch),
                    out_shardings=layout.step.sharding),
        )


def _items(state: Any) -> dict[str, Any]:
    """The state as the named trees of a checkpoint, each of which can be read alone."""
    trees = {"params": state.params, "optimizer": state.optimizer, "counters": {"step": state.step, "rng": state.rng}}
    return trees | ({"ema": state.ema} if state.ema else {})


def _open_data(config: TrainConfig, workdir: Path) -> tuple[Tokenizer, Prepared]:
    saved = workdir / run.TOKENIZER
    # A run keeps its tokenizer: it goes on without the file it came from.
    tokenizer = load_tokenizer(saved if saved.exists() else config.data.tokenizer)
    require(config.model.vocab_size >= tokenizer.vocab_size, "model.vocab_size", config.model.vocab_size,
            f"must be at least {tokenizer.vocab_size}, the vocabulary of tokenizer {config.data.tokenizer!r}")
    prepared = prepare(config.data, config.data.prepared or workdir / run.DATA, tokenizer)
    if not saved.exists():
        tokenizer.save(saved)
    return tokenizer, prepared


def _require_same_run(config: TrainConfig, checkpoints: Checkpoints) -> None:
    found = checkpoints.read_meta()
    if found is not None:
        saved = from_dict(TrainConfig, found[1]["config"], f"{checkpoints.folder}/{found[0]}")
        run.require_same_model(saved.model, config.model, config.workdir)


def _start(config: TrainConfig, parts: _Parts, restored: Restored | None, loader: Batches) -> TrainState:
    if restored is None:
        return parts.create()
    loader.set_state(restored.meta["data"])
    items = restored.items
    return TrainState(items["counters"]["step"], items["params"], items["optimizer"], items.get("ema", {}),
                      items["counters"]["rng"])


class _Loop:
    """The steps of one start."""

    def __init__(
        self, config: TrainConfig, parts: _Parts, checkpoints: Checkpoints, loader: Batches, writer: MetricsWriter,
        bar: Progress,
    ) -> None:
        self.config, self.parts, self.checkpoints = config, parts, checkpoints
        self.loader, self.writer, self.bar = loader, writer, bar
        self.metrics: dict[str, Any] = {}
        peak = peak_flops(jax.devices()[0])
        self.flops = capacity.training_flops_per_token(config.model, config.data.sequence_length)
        self.peak = None if peak is None else peak * parts.mesh.size

    def run(self, state: TrainState, stop: Callable[[int], bool]) -> TrainResult:
        config, step, saved = self.config, int(state.step), int(state.step)
        pending: dict[str, Any] | None = None
        began, steps_timed = time.perf_counter(), 0
        while step < config.steps and not stop(step):
            batch = self._to_mesh(next(self.loader))
            state, fresh = self.parts.step(state, batch)
            step, steps_timed = step + 1, steps_timed + 1
            # The flag of the step before: reading this step's would leave the device idle until the next is issued.
            self._require_finite(pending, step - 1, state)
            pending = fresh
            last = step == config.steps
            evaluate = last or (config.eval_every > 0 and step % config.eval_every == 0)
            save = last or step % config.save_every == 0
            log_now = last or step % config.log_every == 0
            if not (evaluate or save or log_now):
                continue
            self._require_finite(pending, step, state)
            line = self._measure(step, fresh, steps_timed, time.perf_counter() - began) if log_now else {}
            evaluation = self._evaluate(step, state) if evaluate else {}
            self.metrics |= line | evaluation
            if line or evaluation:
                self.writer.write(step, line | evaluation)
            if save:
                self._save(step, state, evaluation.get("eval_loss"))
                saved = step
            began, steps_timed = time.perf_counter(), 0
        self._require_finite(pending, step, state)
        if step > saved:
            self.bar.print(f"told to stop: saving step {step}")
            self._save(step, state, None)
        self.checkpoints.wait()
        return TrainResult(step, step < config.steps, self.metrics)

    def _to_mesh(self, batch: Any) -> Any:
        where = NamedSharding(self.parts.mesh, BATCH_SPEC)
        return {name: jax.make_array_from_process_local_data(where, rows) for name, rows in batch.items()}

    def _require_finite(self, metrics: dict[str, Any] | None, step: int, state: TrainState) -> None:
        bad = -1 if metrics is None else int(metrics["bad_leaf"])
        if bad >= 0:
            raise NonFiniteError(f"step {step}: {watched_leaves(state.params)[bad]} is not finite; the run stops, its "
                                 f"checkpoints up to the last good step are in {self.checkpoints.folder}")

    def _measure(self, step: int, metrics: dict[str, Any], steps: int, seconds: float) -> dict[str, Any]:
        """The metrics of a step as numbers, with the speed of the last `steps` steps; shown as they are made."""
        values = {name: np.asarray(value).tolist() for name, value in metrics.items() if name != "bad_leaf"}
        size = self.parts.prepared.size("train")
        rate = steps * self.config.data.batch_size * self.config.data.sequence_length / seconds
        values |= {"bits_per_byte": values["loss"] / math.log(2) / size.bytes_per_token, "tokens_per_second": rate}
        if self.peak is not None:
            values["mfu"] = rate * self.flops / self.peak
        self.bar.update(step, loss=values["loss"], tokens_per_second=rate)
        return values

    def _evaluate(self, step: int, state: TrainState) -> dict[str, float]:
        """Held-out loss in nats per token and bits per byte, of the weights and of their moving average."""
        size = self.parts.prepared.size("held_out")
        if size.tokens < 2:
            return {}
        found = {}
        for prefix, params in (("eval", state.params), ("eval_ema", state.ema)):
            if not params:
                continue
            nll = tokens = 0.0
            for batch in eval_batches(self.parts.prepared, self.config.data, self.config.eval_batches,
                                      *data_shard(self.parts.mesh, self.config.data.batch_size)):
                sums = self.parts.evaluate(params, self._to_mesh(batch))
                nll, tokens = nll + float(sums.nll), tokens + float(sums.tokens)
            found[f"{prefix}_loss"] = nll / tokens
            found[f"{prefix}_bits_per_byte"] = nll / tokens / math.log(2) / size.bytes_per_token
        self.bar.print("  ".join([f"step {step}", *(f"{name} {value:.4f}" for name, value in found.items())]))
        return found

    def _save(self, step: int, state: TrainState, metric: float | None) -> None:
        meta = {"config": to_dict(self.config), "data": self.loader.get_state(), "metrics": self.metrics}
        self.checkpoints.save(step, _items(state), meta, metric=metric)
