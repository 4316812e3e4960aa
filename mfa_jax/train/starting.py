"""What is checked before a run starts or goes on, all of it before anything lies in its folder, and said of it."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable
from pathlib import Path

from jax.sharding import Mesh

from mfa_jax import attention, capacity
from mfa_jax.config import DistillationConfig, GroupRates, TrainConfig, from_dict, require, to_dict, to_json
from mfa_jax.data import Prepared, Tokenizer, load_tokenizer, pipeline, prepare
from mfa_jax.data.prepare import telling
from mfa_jax.data.shards import DamagedShardError
from mfa_jax.data.tokenizer_files import SAVED
from mfa_jax.model import dispatch, grouped
from mfa_jax.model.transformer import Transformer
from mfa_jax.train import losses, processes, run
from mfa_jax.train.checkpoint import Checkpoints
from mfa_jax.train.losses import Teacher
from mfa_jax.train.optimizer import make_schedule

log = logging.getLogger(__name__)


def require_startable(config: TrainConfig, checkpoints: Checkpoints, *, has_teacher: bool) -> None:
    """Refuses a config that does not go with the run that is there, or with the one that it starts with.

    Raises:
      ValueError: what differs, with both values.
    """
    require(has_teacher == (config.distillation is not None), "distillation", config.distillation,
            "must be given where a teacher is read, and only there; experiments.heal does both")
    # Not a config's own check: what was trained so before can still be read.
    require(config.ema_decay is None or config.model.param_dtype == "float32", "ema_decay", config.ema_decay,
            f"must be none with model.param_dtype={config.model.param_dtype}, which would round away most of what a "
            f"step adds to the average")
    found = checkpoints.read_meta()
    if found is not None:
        saved = from_dict(TrainConfig, found[1]["config"], f"{checkpoints.folder}/{found[0]}")
        run.require_same_model(saved.model, config.model, config.workdir)
        require(found[0] <= config.steps, "steps", config.steps,
                f"the run in {config.workdir} is at step {found[0]} already")
        _require_same_task(saved, config)
        _tell_rate(saved, config, found[0])
        _tell_rows(saved, config, "the run so far")
    elif config.initial is not None:
        _, theirs_config = run.load_config(config.initial)
        run.require_same_model(theirs_config.model, config.model, config.initial, field="initial")
        theirs = Path(config.initial) / run.TOKENIZER
        _require_same_encoding("initial tokenizer", theirs, load_tokenizer(theirs).encoding, config)
        _tell_rows(theirs_config, config, f"initial={config.initial}")


def _require_same_task(saved: TrainConfig, config: TrainConfig) -> None:
    """That a run goes on from where it began, towards the same, and with the same parameters frozen."""
    require(_place(saved.initial) == _place(config.initial), "initial", config.initial,
            f"the run in {config.workdir} started with {saved.initial!r}; accepted: that, or another workdir")
    require(_comparable(saved.distillation) == _comparable(config.distillation), "distillation",
            config.distillation and to_dict(config.distillation), f"the run in {config.workdir} has "
            f"{saved.distillation and to_dict(saved.distillation)!r}; accepted: that, or another workdir")
    before, now = _frozen(saved.optimizer.rates), _frozen(config.optimizer.rates)
    require(before == now, "optimizer.rates with 0", now, f"the run in {config.workdir} has {before}, and what is "
            f"frozen has no optimizer state; accepted: the same, or a new run in another workdir with "
            f"--initial {config.workdir}")
    # What would change the state of the optimizer or of the data, or throw the average away.
    for name, old, new in (
            ("optimizer.kind", saved.optimizer.kind, config.optimizer.kind),
            *((f"data.{name}", getattr(saved.data, name), getattr(config.data, name))
              for name in ("sequence_length", "batch_size", "seed"))):
        require(old == new, name, new, f"the run in {config.workdir} has {old!r}; accepted: that, or another workdir")
    for name, old_value, value in (("optimizer.clip_norm", saved.optimizer.clip_norm, config.optimizer.clip_norm),
                                   ("ema_decay", saved.ema_decay, config.ema_decay)):
        require((old_value is None) == (value is None), name, value, f"the run in {config.workdir} has {old_value!r}; "
                f"accepted: {'none' if old_value is None else 'another number'}, or another workdir")


def _tell_rate(saved: TrainConfig, config: TrainConfig, step: int) -> None:
    """Warns where the learning rate leaps, as it does where more `steps` stretch a schedule that was at its end."""
    before, now = (float(make_schedule(c.optimizer, c.steps)(step)) for c in (saved, config))
    if now > 1.5 * before:
        log.warning("the learning rate goes on with %.3g from step %d, where the run's own schedule has %.3g; to keep "
                    "to that give --optimizer.schedule-steps %d", now, step, before,
                    saved.optimizer.schedule_steps or saved.steps)


def _tell_rows(saved: TrainConfig, config: TrainConfig, whose: str) -> None:
    """Warns where rows of the same text become others than those that the weights have learned from so far."""
    for name in ("separate_documents", "add_bos_token"):
        before, now = getattr(saved.data, name), getattr(config.data, name)
        if before != now:
            log.warning("data.%s=%s from here on, where %s had %s", name, now, whose, before)


def _place(path: str | None) -> str | None:
    return path and os.path.abspath(path)


def _comparable(distillation: DistillationConfig | None) -> DistillationConfig | None:
    return distillation and dataclasses.replace(distillation, teacher=os.path.abspath(distillation.teacher))


def _frozen(rates: GroupRates) -> list[str]:
    return [name for name, rate in vars(rates).items() if rate == 0]


def _own_tokenizer(config: TrainConfig) -> tuple[Tokenizer, str]:
    """The tokenizer of the run and its place. A run keeps its own: it goes on without the file it came from.

    Raises:
      ValueError: the config names another.
    """
    saved, named = Path(config.workdir) / run.TOKENIZER, config.data.tokenizer
    if not (saved / SAVED).exists():
        return load_tokenizer(named), named
    own = load_tokenizer(saved)
    if named == "bytes" or Path(named).expanduser().exists():
        require(load_tokenizer(named).fingerprint == own.fingerprint, "data.tokenizer", named,
                f"is not the tokenizer of the run in {config.workdir}; accepted: {saved}, or another workdir")
    else:
        log.warning("data.tokenizer=%r is not there; the run goes on with its own, %s", named, saved)
    return own, str(saved)


def _require_same_encoding(name: str, theirs: object, encoding: str, config: TrainConfig) -> None:
    """By the ids that it makes of text: what ends a document may differ, as in a base model and its chat model."""
    own, place = _own_tokenizer(config)
    require(encoding == own.encoding, name, str(theirs),
            f"must make the same ids of text as that of the run does, which is {place!r} (--data.tokenizer, kept in "
            f"workdir)")


def read_teacher(
    config: TrainConfig, read: Callable[[Mesh], Teacher], mesh: Mesh, checkpoints: Checkpoints
) -> Teacher:
    """The teacher, if the model can learn from it, and it is the one that the run has learned from so far.

    Raises:
      ValueError: what cannot be compared, another tokenizer, or other weights; processes that read different ones.
    """
    assert config.distillation is not None
    teacher = read(mesh)
    losses.teacher_config(config, teacher.config)
    theirs = config.distillation.tokenizer or f"that of {config.distillation.teacher}"
    _require_same_encoding("distillation.tokenizer", theirs, teacher.tokenizer, config)
    # All have read the run's tokenizer before the first of them may write it.
    processes.require_same("teacher's tokenizer", teacher.tokenizer)
    found = checkpoints.read_meta()
    before = None if found is None else found[1].get("teacher")  # None where that was not noted yet
    if before is not None and before != teacher.digest:
        raise ValueError(f"distillation.teacher={config.distillation.teacher!r}: holds other weights than those that "
                         f"the run in {config.workdir} has learned from up to step {found and found[0]} (digest "
                         f"{teacher.digest[:12]} in {config.model.dtype}, not {before[:12]}); accepted: those, in the "
                         f"same model.dtype, or another workdir")
    return teacher


def open_data(config: TrainConfig, say: Callable[[str], object] = log.info) -> Prepared:
    """The token shards of a run, made if they are not there yet; its tokenizer is kept beside them.

    Args:
      say: is told every ten seconds how far that is.
    """
    workdir = Path(config.workdir)
    tokenizer, _ = _own_tokenizer(config)
    require(config.model.vocab_size >= tokenizer.vocab_size, "model.vocab_size", config.model.vocab_size,
            f"must be at least {tokenizer.vocab_size}, the vocabulary of tokenizer {config.data.tokenizer!r}")
    require(not config.data.add_bos_token or tokenizer.bos_id is not None, "data.add_bos_token", True,
            f"the tokenizer {config.data.tokenizer!r} has no begin token")
    prepared = prepare(config.data, config.data.prepared or workdir / run.DATA, tokenizer, telling(say))
    pipeline.require_windows(prepared, config.data, "train")
    saved = workdir / run.TOKENIZER
    if not (saved / SAVED).exists():  # one that was cut off lacks it, and is made again
        tokenizer.save(saved)
    return prepared


def require_same_data(config: TrainConfig, checkpoints: Checkpoints, prepared: Prepared) -> None:
    """Refuses data other than those that a run goes on with, or than other processes have.

    Raises:
      ValueError: what differs; processes that differ.
    """
    processes.require_same("prepared data", to_json(prepared.meta))
    found = checkpoints.read_meta()
    if found is not None:
        try:
            pipeline.require_same_order(found[1]["data"], pipeline.identity(prepared, config.data))
        except DamagedShardError:
            raise
        except ValueError as error:
            raise ValueError(f"data.source={config.data.source!r}, prepared in {str(prepared.folder)!r}: other data "
                             f"than those of the run in {config.workdir} ({error}); accepted: those, or another "
                             f"workdir") from error


def describe(config: TrainConfig, mesh: Mesh) -> str:
    """What is about to be trained, on what, and what `auto` became there; `mesh` is the ambient one.

    Raises:
      ValueError: a size of the model that does not divide over the mesh.
      NotImplementedError: a named implementation can't serve; says why, and what can.
    """
    run.abstract_params(Transformer(config.model), mesh)  # refuses what does not divide
    model, data, device = config.model, config.data, mesh.devices.flat[0]
    count, active, how = capacity.model_parameters(model), "", []
    how.append("attention by " + attention.training_implementation(
        model.attention, model.position, T=data.sequence_length, dtype=model.dtype, segments=data.separate_documents,
        implementation=model.attention_implementation))
    if model.moe is not None:
        active = f" ({count.active:,} active)"
        capability = float(getattr(device, "compute_capability", 0))
        how.append(f"experts by {grouped.resolve(model.expert_implementation, device.platform, capability)}")
        if mesh.shape["expert"] > 1:
            how.append(f"{dispatch.resolve_exchange(model.expert_exchange, device.platform)} exchange")
    where = ", ".join([f"{mesh.size} x {device.device_kind}",
                       *(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)])
    return (f"{model.attention.variant}, {model.num_layers} layers of {model.model_dim}, {count.total:,} parameters"
            f"{active} in {model.param_dtype}, computed in {model.dtype}; {where}; {', '.join(how)}; "
            f"{data.batch_size} x {data.sequence_length} tokens a step")
