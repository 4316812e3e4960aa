"""Training, read from top to bottom: set up or resume, then step, log, evaluate, save, until done or told to stop."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mfa_jax import axes, capacity
from mfa_jax.config import TrainConfig, require, to_dict, to_json
from mfa_jax.data import Batches, make_loader
from mfa_jax.train import processes, run, starting
from mfa_jax.train.checkpoint import Checkpoints, CheckpointWriteError, Restored
from mfa_jax.train.compiling import explaining_memory, use_compilation_cache
from mfa_jax.train.feed import Feed
from mfa_jax.train.goodput import Goodput
from mfa_jax.train.losses import Teacher
from mfa_jax.train.metrics import MetricsWriter, Progress, peak_flops
from mfa_jax.train.parts import Parts
from mfa_jax.train.profiling import ProfileWindow
from mfa_jax.train.step import TrainState, data_shard, require_divisible_batch, watched_leaves

log = logging.getLogger(__name__)

_COUNTS = ("failed_saves", "lost_lines")


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
def train(
    config: TrainConfig, *, progress: bool = True, devices: Sequence[jax.Device] | None = None,
    teacher: Callable[[Mesh], Teacher] | None = None,
) -> TrainResult:
    """Trains until `config.steps`, going on from the newest intact checkpoint of `config.workdir` if there is one.

    SIGTERM and Ctrl-C save the step that is done and return. With several processes (`cluster.joined`) all of them
    call this, with the same config and a folder that they share; one that is told to stop stops all, at the same step.

    Args:
      progress: whether to show how far it is.
      devices: those of the mesh; None for all.
      teacher: reads the model of `config.distillation` onto the mesh; None without one. It is no part of a checkpoint.

    Raises:
      ValueError: a config that cannot work (a batch that does not divide over the mesh, a vocabulary smaller than the
        tokenizer's, a workdir of another model, ...), named with its value; processes whose configs or data differ.
      NonFiniteError: a number that is not finite; the checkpoints are those from before.
      OSError: a checkpoint (`CheckpointWriteError`) or the metrics could not be written, or a checkpoint not be read.
      NotImplementedError: an implementation that is named can't serve here.
      DeviceMemoryError: a device ran out of memory; the message has what the compiled step needs.
    """
    goodput = Goodput()
    with contextlib.ExitStack() as stack:
        with goodput.phase("setup"):
            mesh = axes.make_mesh(dataclasses.astuple(config.mesh), devices)
            require_divisible_batch(config, mesh)
            use_compilation_cache(config.compilation_cache)
            require(config.on_save_failure == "stop" or jax.process_count() == 1, "on_save_failure",
                    config.on_save_failure, "must be stop with several processes, which have to fail alike")
            workdir, keep = Path(config.workdir), config.keep_checkpoints
            checkpoints = stack.enter_context(Checkpoints(workdir / run.CHECKPOINTS, keep_last=keep))
            starting.require_startable(config, checkpoints, has_teacher=teacher is not None)
            processes.require_same("config", to_json(config))
        stack.enter_context(jax.set_mesh(mesh))
        leader = jax.process_index() == 0
        bar = stack.enter_context(Progress(config.steps, enabled=progress and leader))
        bar.print(starting.describe(config, mesh))
        with goodput.phase("restore"):  # before the data: what the model cannot learn from leaves nothing in workdir
            known = None if teacher is None else starting.read_teacher(config, teacher, mesh, checkpoints)
        with goodput.phase("setup"):
            prepared = processes.leader_first(lambda: starting.open_data(config, bar.print))
            starting.require_same_data(config, checkpoints, prepared)
        parts = Parts.build(config, mesh, prepared, goodput, known)
        stack.enter_context(explaining_memory(config, mesh.local_devices[0], parts.memory))
        with goodput.phase("restore"):
            restored = checkpoints.restore(checkpoint_items(parts.layout))
            loader = make_loader(prepared, config.data, "train", *data_shard(mesh, config.data.batch_size))
            state = _start(config, parts, restored, loader)
        if leader:
            run.write_config(workdir, config)
        with (
            contextlib.closing(loader),
            MetricsWriter(workdir, start_step=-1 if restored is None else restored.step, enabled=leader) as writer,
            processes.stop_signals() as stop,
        ):
            loop = _Loop(config, parts, checkpoints, Feed(loader, mesh, goodput), writer, bar, goodput, known)
            if restored is not None:
                loop.resume(restored)
            return loop.run(state, stop)


def checkpoint_items(state: Any) -> dict[str, Any]:
    """The state as the named trees of a checkpoint, each of which can be read alone."""
    trees = {"params": state.params, "optimizer": state.optimizer, "counters": {"step": state.step, "rng": state.rng}}
    return trees | ({"ema": state.ema} if state.ema else {})


def _start(config: TrainConfig, parts: Parts, restored: Restored | None, loader: Batches) -> TrainState:
    if restored is None:
        return parts.create(config.initial and run.load_trained(config.initial, mesh=parts.mesh).params)
    loader.set_state(restored.meta["data"])
    items = restored.items
    done = int(items["counters"]["step"])
    require(done <= config.steps, "steps", config.steps, f"the run in {config.workdir} is at step {done} already")
    return TrainState(items["counters"]["step"], items["params"], items["optimizer"], items.get("ema", {}),
                      items["counters"]["rng"])


class _Loop:
    """The steps of one start."""

    def __init__(
        self, config: TrainConfig, parts: Parts, checkpoints: Checkpoints, feed: Feed, writer: MetricsWriter,
        bar: Progress, goodput: Goodput, teacher: Teacher | None,
    ) -> None:
        self.config, self.parts, self.checkpoints = config, parts, checkpoints
        self.feed, self.writer, self.bar, self.goodput = feed, writer, bar, goodput
        self.metrics: dict[str, Any] = {}
        self.failed_saves = self.lost_lines = 0
        self.losing_lines = False
        # The closed form counts every gradient: with some of them left out there is no MFU.
        frozen = 0 in dataclasses.astuple(config.optimizer.rates)
        peak = None if frozen else peak_flops(parts.mesh.devices.flat[0])
        self.flops = capacity.training_flops_per_token(config.model, config.data.sequence_length)
        self.of_teacher = {} if teacher is None else {"teacher": teacher.digest}
        if teacher is not None:  # forward only
            self.flops += capacity.training_flops_per_token(teacher.config, config.data.sequence_length) // 3
        self.peak = None if peak is None else peak * parts.mesh.size

    def resume(self, restored: Restored) -> None:
        """Says where it goes on, with the metrics from there; what could not be written is counted by start."""
        self.bar.resumed(restored.step, self.checkpoints.folder)
        self.metrics |= {k: v for k, v in restored.meta["metrics"].items() if k not in _COUNTS}

    def run(self, state: TrainState, stop: Callable[[int], bool]) -> TrainResult:
        window, ahead = self.config.profile, (int(state.step), self.config.steps)
        if window is not None and not range(max(window[0], ahead[0]), min(sum(window), ahead[1])):
            log.warning("profile=%s: no trace, the run goes from step %d to %d", window, *ahead)
        with ProfileWindow(window, Path(self.config.workdir) / "profile", self.goodput) as profile:
            step, saved, state = self._steps(state, stop, profile)
        if step > saved:
            self.bar.print(f"told to stop: saving step {step}")
            self._save(step, state, None, last=True)
        with self.goodput.phase("checkpoint"):
            self.checkpoints.wait()
        self.metrics |= self.goodput.metrics()
        self.bar.print(self.goodput.summary())
        return TrainResult(step, step < self.config.steps, self.metrics)

    def _steps(
        self, state: TrainState, stop: Callable[[int], bool], profile: ProfileWindow
    ) -> tuple[int, int, TrainState]:
        """Steps until done or told to stop: the last step, the last one saved, and the state."""
        config, step, saved = self.config, int(state.step), int(state.step)
        pending: dict[str, Any] | None = None
        if step == 0 and config.initial is not None and (before := self._evaluate(step, state)):
            self._write(step, before)
        began, steps_timed = time.perf_counter(), 0
        while step < config.steps and not stop(step):
            profile.at(step, state)
            with self._keeping(step, saved, state, pending):
                batch = self.feed.take()
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, fresh = self.parts.step(state, batch)
            if step + 1 < config.steps:  # a batch past the end, were it damaged, would cost the last checkpoint
                self.feed.read_ahead(fresh["loss"])
            step, steps_timed = step + 1, steps_timed + 1
            # The flag of the step before: reading this step's would leave the device idle until the next is issued.
            self._require_finite(pending, step - 1, state)
            pending = fresh
            last = step == config.steps
            evaluate = last or (config.eval_every > 0 and step % config.eval_every == 0)
            log_now = last or step % config.log_every == 0
            save = last or step % config.save_every == 0 or (log_now and self.checkpoints.has_failed())
            if not (evaluate or save or log_now):
                continue
            self._require_finite(pending, step, state)
            line = self._measure(step, fresh, steps_timed, time.perf_counter() - began) if log_now else {}
            with self._keeping(step, saved, state):
                evaluation = self._evaluate(step, state) if evaluate else {}
            self.metrics |= line | evaluation
            if line or evaluation:
                self._write(step, line | evaluation)
            if save and self._save(step, state, evaluation.get("eval_kl", evaluation.get("eval_loss")), last=last):
                saved = step
            began, steps_timed = time.perf_counter(), 0
        self._require_finite(pending, step, state)
        return step, saved, state

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
        values |= {"bits_per_byte": values["loss"] / math.log(2) / size.bytes_per_token, "tokens_per_second": rate,
                   "tokens_per_second_per_device": rate / self.parts.mesh.size, **self.goodput.metrics()}
        values |= {name: count for name in _COUNTS if (count := getattr(self, name))}
        if self.peak is not None:
            values["mfu"] = rate * self.flops / self.peak
        self.bar.update(step, loss=values["loss"], tokens_per_second=rate)
        return values

    def _evaluate(self, step: int, state: TrainState) -> dict[str, float]:
        with self.goodput.phase("evaluate"):
            found = self.parts.evaluate(state)
        if found:
            self.bar.print("  ".join([f"step {step}", *(f"{name} {value:.4f}" for name, value in found.items())]))
        return found

    def _write(self, step: int, values: dict[str, Any]) -> None:
        """Writes a line of metrics; what to do where that fails is the config's choice, as with checkpoints."""
        try:
            self.writer.write(step, values)
            self.losing_lines = False
        except OSError as error:
            if self.config.on_save_failure == "stop":
                raise
            self.lost_lines += 1
            if not self.losing_lines:  # once, until one is written again
                log.warning("%s: %s; the run goes on without, and the next line that is written counts those that are "
                            "lost", error.filename, error.strerror)
            self.losing_lines = True

    def _save(self, step: int, state: TrainState, metric: float | None, *, last: bool) -> bool:
        """Starts a save once the one before is written, and says whether; where one fails the config has the choice."""
        meta = {"config": to_dict(self.config), "data": self.feed.place, "metrics": self.metrics} | self.of_teacher
        earlier: CheckpointWriteError | None = None
        with self.goodput.phase("checkpoint"):
            try:
                self.checkpoints.wait()
            except CheckpointWriteError as error:
                if jax.process_count() > 1:  # others may not have failed, and would wait
                    raise
                earlier = error  # what is in hand is saved first: there may be room by now
            try:
                self.checkpoints.save(step, checkpoint_items(state), meta, metric=metric, wait=earlier is not None)
            except CheckpointWriteError as error:
                if last or self.config.on_save_failure == "stop":
                    raise
                self._note(earlier, error)
                return False
        if earlier is not None and self.config.on_save_failure == "stop" and not last:
            self.bar.print(f"step {step} is saved")
            raise earlier
        self._note(earlier)
        return True

    def _note(self, *errors: CheckpointWriteError | None) -> None:
        for error in filter(None, errors):
            self.failed_saves += 1
            log.warning("%s: %s; the run goes on", error.filename, error.strerror)

    @contextlib.contextmanager
    def _keeping(
        self, step: int, saved: int, state: TrainState, pending: dict[str, Any] | None = None
    ) -> Iterator[None]:
        """Saves the step that is done before an error beside it, of the data or an evaluation, ends the run. Of several
        processes maybe not all have it, so that they end as they are."""
        try:
            yield
        except (ValueError, OSError, RuntimeError):
            if step > saved and jax.process_count() == 1:
                self._require_finite(pending, step, state)
                self.bar.print(f"the run cannot go on: saving step {step}")
                try:
                    self._save(step, state, None, last=True)
                    self.checkpoints.wait()
                except CheckpointWriteError as error:
                    log.warning("%s: %s", error.filename, error.strerror)
            raise
