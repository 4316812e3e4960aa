r"""Train a converted model towards the one that it was made from: distillation, as a run like any other.

    python -m experiments.convert --from DIR --to mfa_kr --cache-ratio 2 --calibration FILE --out runs/converted
    python -m experiments.heal --teacher DIR --student runs/converted --workdir runs/healed --data.source FILE \
        --steps 1000 --optimizer.schedule-steps 2000
    python -m experiments.heal --config runs/healed/config.json --steps 2000     # goes on

The loss is the divergence of the student's predictions from the teacher's; `--distillation.*` sets the temperature,
the share of the cross entropy and the weight of the hidden states, layer by layer. `--optimizer.rates.*` are learning
rates by group of parameters; 0 freezes one. Settings come from the student and the defaults for healing, then
`--config FILE.json`, then the flags, which are those of `experiments.train`; so are stopping, going on, meshes and
several hosts. `--teacher` (a Hugging Face folder, a .gguf file or the folder of a run) and `--student` (the folder of a
run, such as `experiments.convert` writes) are other names of `--distillation.teacher` and `--initial`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from jax.sharding import Mesh

from experiments import cli
from experiments.opening import open_model
from experiments.train import parse as parse_run
from experiments.train import start
from mfa_jax.config import DataConfig, DistillationConfig, OptimizerConfig, TrainConfig, load_json, require
from mfa_jax.train import cluster, run
from mfa_jax.train.losses import Teacher

_NONE = "(none)"
"""In place of a teacher, or a text, that was not given."""
_ABOUT = """--teacher PLACE is the model to learn from (a Hugging Face folder, a .gguf file or the folder of a run), and
--student DIR the folder of the run to start with, such as experiments.convert writes; other names of
--distillation.teacher and --initial."""


def defaults(student: str | None, workdir: str | None = None) -> TrainConfig:
    """What healing starts from, before there are flags: the student's model and tokenizer, and what suits healing.

    Args:
      workdir: of the run; one that has begun goes on without the student's folder.

    Raises:
      ValueError: no run, or no checkpoint, in the student's folder.
    """
    config = TrainConfig(
        workdir="runs/healed", initial=student, distillation=DistillationConfig(_NONE),
        data=DataConfig(source=_NONE, sequence_length=512, batch_size=8),
        optimizer=OptimizerConfig(learning_rate=3e-6, warmup_steps=20, weight_decay=0.0))
    if student is None:
        return config
    tokenizer = str(Path(student) / run.TOKENIZER)
    begun = not Path(student).exists() and (Path(workdir or config.workdir) / run.CHECKPOINTS).is_dir()
    _, saved = run.load_config(workdir or config.workdir) if begun else run.load_config(student, field="student")
    data = dataclasses.replace(config.data, tokenizer=tokenizer, add_bos_token=saved.data.add_bos_token)
    return dataclasses.replace(config, model=saved.model, data=data)


def parse(argv: Sequence[str] | None = None) -> TrainConfig:
    """The config of a healing run.

    Raises:
      ValueError: what `cli.parse` refuses; a teacher or a student that is missing; a preset; a config without healing.
    """
    args, teacher = cli.take(list(sys.argv[1:] if argv is None else argv), "--teacher")
    args, preset = cli.take(args, "--preset")
    require(preset is None, "preset", preset, "must be left out: the model is the student's")
    args, initial = cli.take(args, "--initial")
    args, student = cli.take(args, "--student")
    require(student is None or initial is None, "initial", initial, f"is another name of --student {student!r}")
    student = student or initial
    _, workdir = cli.take(args, "--workdir")
    _, path = cli.take(args, "--config")
    require(path is None or load_json(dict, path).get("distillation", {}) is not None, "config", path,
            "is of no healing run: its distillation is null; give --student and flags in its place, or leave "
            "distillation out of the file")
    for flag, value in (("--distillation.teacher", teacher), ("--initial", student)):
        args += [] if value is None else [flag, value]
    config = parse_run(args, default=defaults(student, workdir), about=_ABOUT)
    require(config.distillation is not None and config.distillation.teacher != _NONE, "teacher", None,
            "give --teacher, or a --config that has one")
    require(config.initial is not None, "student", None, "give --student, or a --config that has one (initial)")
    require(config.data.source != _NONE, "data.source", None, "give the text to heal on (--data.source)")
    return config


def read_teacher(config: TrainConfig, mesh: Mesh) -> Teacher:
    """The teacher of a config, placed on the mesh."""
    assert config.distillation is not None
    path, tokenizer = config.distillation.teacher, config.distillation.tokenizer
    of_run = (Path(path) / run.CHECKPOINTS).is_dir()
    opened = open_model(path if of_run else None, None if of_run else path, tokenizer=tokenizer, mesh=mesh,
                        param_dtype=config.model.dtype)
    return Teacher(opened.model.config, opened.params, opened.tokenizer.encoding)


if __name__ == "__main__":
    with cluster.leaving_at_once():
        cli.run(lambda: start(parse, read_teacher), label=cluster.label)
