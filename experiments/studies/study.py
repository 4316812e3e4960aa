"""What a study is: a plan of training runs at a scale, what is measured of each, and a report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.studies.records import Record
from mfa_jax.config import (
    DataConfig,
    DType,
    ModelConfig,
    OptimizerConfig,
    PositionConfig,
    TrainConfig,
    from_dict,
    require,
    to_dict,
)
from mfa_jax.data import Prepared
from mfa_jax.train.run import Trained


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large the runs of a study are, and how long; the same for all that a study compares."""

    name: str
    preset: str
    """Which sizes of `presets` the models have."""
    train: str
    """Name of the training text, see `corpus`."""
    sequence_length: int
    batch_size: int
    steps: int
    learning_rates: tuple[float, ...]
    """The grid that is tried for everything that is compared, with the first seed."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the initial parameters and of the order of the data; all but the first run at the best learning rate alone."""
    dtype: DType = "float32"
    valid_batches: int = 32
    test_batches: int = 128
    """Batches of `batch_size` windows, evenly spread over all books of the split."""


SCALES = {scale.name: scale for scale in (
    Scale("tiny", "tiny", "books-train-xs", sequence_length=64, batch_size=16, steps=60, learning_rates=(4e-3, 8e-3),
          seeds=(0, 1), valid_batches=8, test_batches=16),
    # 2 bytes for each parameter beside the embedding, what two CPU cores can do in hours. Small batches, so that there
    # are many steps in them.
    Scale("nano", "nano", "books-train-00", sequence_length=256, batch_size=8, steps=1000,
          learning_rates=(3e-3, 6e-3, 1.2e-2), valid_batches=32),
    # About a minute a run on an H100 at a fifth of its peak; 1.5 tokens a parameter, far from trained to the end.
    Scale("small", "small", "books-train-00", sequence_length=1024, batch_size=32, steps=1500,
          learning_rates=(1e-3, 2e-3, 4e-3), dtype="bfloat16", valid_batches=16, test_batches=32),
)}


SHORT_ROPE = PositionConfig("rope", base=10000.0)
"""Rope for windows of some thousand tokens at most. The presets' base, 500000, leaves a narrow head few elements that
turn within one, which costs MLA most (`positions`); studies that ran before that was found have it."""


def lower_rates(scale: Scale) -> Scale:
    """With half of the lowest learning rate besides, since that one was the best for most (`cache_quality`)."""
    return dataclasses.replace(scale, learning_rates=(scale.learning_rates[0] / 2, *scale.learning_rates))


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run of a study. Where its text and its folder are is for the runner to fill in."""

    name: str
    """Unique in the study and scale."""
    labels: dict[str, Any]
    """What the report tells runs apart by."""
    config: TrainConfig


Results = Callable[[Run], Record | None]
"""The record of a run that is done; None for one that is not."""


@dataclasses.dataclass(frozen=True)
class Study:
    """A question, as runs and what is made of them."""

    name: str
    title: str
    plan: Callable[[Scale, Results], list[Run]]
    """All runs that are known to be needed, what matters most first; results of early runs may add to them."""
    section: Callable[[Sequence[Record], Path], str]
    """The report on the records of one scale, as Markdown; pictures go into the folder, named after the scale."""
    measure: Callable[[Scale, Trained, Prepared], dict[str, Any]] | None = None
    """What is measured of a trained model besides what every study measures, on the test books."""


def make_run(scale: Scale, name: str, model: ModelConfig, learning_rate: float, seed: int, *, steps: int | None = None,
             log_every: int | None = None, **labels: Any) -> Run:
    """The run of one model, learning rate and seed; `labels` join `name`, `learning_rate` and `seed`."""
    steps = steps or scale.steps
    config = TrainConfig(
        model=dataclasses.replace(model, dtype=scale.dtype),
        data=DataConfig(sequence_length=scale.sequence_length, batch_size=scale.batch_size, seed=seed),
        optimizer=OptimizerConfig(learning_rate=learning_rate, warmup_steps=max(steps // 20, 1)),
        steps=steps, seed=seed, log_every=log_every or max(steps // 40, 1), eval_every=max(steps // 4, 1),
        eval_batches=scale.valid_batches, save_every=max(steps // 4, 1), keep_checkpoints=1)
    return Run(f"{name}-lr{learning_rate:g}-seed{seed}",
               {"name": name, "learning_rate": learning_rate, "seed": seed, **labels}, config)


def tuned(scale: Scale, models: Mapping[str, ModelConfig], results: Results, **options: Any) -> list[Run]:
    """The grid of learning rates for each model with the first seed, then the other seeds at each one's best."""
    first, *others = scale.seeds
    grid = {name: [make_run(scale, name, model, rate, first, **options) for rate in scale.learning_rates]
            for name, model in models.items()}
    repeats = []
    for name, runs in grid.items():
        found = [record for record in map(results, runs) if record is not None]
        if len(found) == len(runs):
            chosen = best(found)
            rate = chosen.labels["learning_rate"]
            seeds = others if chosen.outcome == "finished" else []
            repeats += [make_run(scale, name, models[name], rate, seed, **options) for seed in seeds]
    return [run for runs in grid.values() for run in runs] + repeats


def best(records: Iterable[Record]) -> Record:
    """The record with the lowest loss on the validation books; one that diverged only if all did."""
    return min(records, key=lambda record: record.metrics.get("valid_bits_per_byte", float("inf")))


def identity(config: TrainConfig) -> Any:
    """A run's config without what depends on the machine or is no part of the result, as JSON; records hold it."""
    defaults = TrainConfig()
    operation = {name: getattr(defaults, name)
                 for name in ("workdir", "on_save_failure", "compilation_cache", "profile")}
    places = {name: getattr(defaults.data, name) for name in ("source", "held_out_source", "prepared")}
    return to_dict(dataclasses.replace(config, **operation, data=dataclasses.replace(config.data, **places)))


def has_config(record: Record, config: TrainConfig) -> bool:
    """Whether a record is of this config: fields that it was written without have their defaults."""
    try:
        recorded = from_dict(TrainConfig, record.config)
    except ValueError:  # of a field that is no more, or a value that is refused now
        return False
    return bool(identity(recorded) == identity(config))


def results_of(records: Iterable[Record], text: dict[str, Any] | None = None) -> Results:
    """Looks runs up among records: the last one of that name, if it has the run's config.

    Args:
      text: as `corpus` describes it; a record of another text does not count, one that does not say of which does.
    """
    last = {record.run: record for record in records}

    def find(run: Run) -> Record | None:
        record = last.get(run.name)
        if record is None or (text and record.text and record.text != text):
            return None
        return record if has_config(record, run.config) else None

    return find


def scale_named(name: str) -> Scale:
    """Raises: ValueError: an unknown scale; lists the known ones."""
    require(name in SCALES, "scale", name, f"must be one of {', '.join(SCALES)}")
    return SCALES[name]
