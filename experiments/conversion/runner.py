"""Makes the rows that are not there yet: converts, measures, adds a line.

A conversion is a process of its own, so that its memory is its own. It holds the row's lock, too, so that the row
stays taken where it outlives this process. What is converted stays in the workdir until its line is written; a
conversion that was cut off goes on where it was. Several processes may share a plan.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments.conversion import measure, rows
from experiments.conversion.rows import KINDS, ORIGINAL, TINY, Row, Sizes
from experiments.convert import ConvertConfig
from experiments.opening import Opened, open_model
from experiments.studies import corpus, records, runner
from experiments.studies.study import identity
from mfa_jax.capacity import cache_elements_per_token, model_parameters
from mfa_jax.config import GQAConfig, ModelConfig, require
from mfa_jax.convert import pretrained_config
from mfa_jax.train.run import load_config, parameters_digest

RESULTS = Path(__file__).parents[1] / "results" / "conversion"


@dataclasses.dataclass(frozen=True)
class Measured:
    """A line of `metrics.jsonl`."""

    model: str
    row: str
    kind: str
    ratio: float
    """That was asked for."""
    settings: dict[str, Any]
    """Of the conversion or of the run that healed it, and of the measurement: what makes the row what it is."""
    cached_elements: list[int]
    """Of a token and layer: the original's, this model's."""
    parameters: list[int]
    """The original's, this model's."""
    cost: dict[str, float] | None
    """`seconds` and `peak_bytes` of the conversion; None for the original, for what was healed, and for a conversion
    that was interrupted and went on, of which only the last part is known."""
    texts: dict[str, dict[str, Any]]
    """`measure.TextLoss` of each test text."""
    tasks: dict[str, dict[str, Any]]
    """`measure.TaskScore` of each task."""
    machine: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Rows of the table of conversions."""

    source: Annotated[str, tyro.conf.arg(name="from")] = ""
    """A Hugging Face folder or a .gguf file; may be left out with --tiny."""
    model: str | None = None
    """What the tables call it; none for the name of the file or folder."""
    ratios: tuple[float, ...] = (1.5, 2.0, 3.0, 1.2, 1.0)
    """Cached elements of the original over those of the converted model."""
    kinds: tuple[str, ...] = tuple(KINDS)
    """Which conversions; where one can't have a ratio, it is left out."""
    healed: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """KIND-RATIO=FOLDER of a run that trained a converted model; may be given several times."""
    only: tuple[str, ...] = ()
    """Names of rows, such as mfa_kr-1.5; none for all."""
    sizes: Sizes = dataclasses.field(default_factory=Sizes)
    tiny: bool = False
    """The Llama of 260 thousand parameters in the folder of data, and next to no text: shows that it runs."""
    tokenizer: str | None = None
    """Name of the tokenizer in the folder; none for what it holds."""
    calibration: tuple[str, ...] = ("books-valid", "wikitext2-valid")
    """Names of calibration texts in the folder of data; not the test texts."""
    results: str = str(RESULTS)
    """Folder of `metrics.jsonl`."""
    workdir: str = "runs/conversion"
    """Folder of what is converted."""
    keep: bool = False
    """Leave converted models there."""

    def __post_init__(self) -> None:
        require(self.tiny != bool(self.source), "from", self.source,
                "must name a checkpoint, or be left out with --tiny")
        require(not set(self.calibration) & set(measure.TEXTS), "calibration", list(self.calibration),
                f"must not have the test texts {', '.join(measure.TEXTS)}")

    def resolved(self) -> RunConfig:
        """With what --tiny stands for."""
        if not self.tiny:
            return self
        source = corpus.data_folder() / "models" / "stories260K"
        return dataclasses.replace(self, tiny=False, source=str(source), model="stories260K", sizes=TINY,
                                   tokenizer="tok512.bin")


def run(config: RunConfig) -> None:
    """Makes every row of the plan that has no line with its settings.

    Raises:
      ValueError: a model or text that is not there, a conversion that was refused; the other rows are made first.
    """
    config = config.resolved()
    runner.keep_compiled_programs(Path(config.workdir) / "compiled")
    planned, model = _plan(config)
    failed = []
    for row in planned:
        settings = _settings(config, row)
        folder = Path(config.workdir) / f"{row.name}-{_short(settings)}"
        with records.lock(folder.with_name(f"{folder.name}.lock"), wait=False) as ours:
            if ours is None or _is_done(config, row, settings):
                print(f"{row.name}: {'another process makes it' if ours is None else 'is there'}", file=sys.stderr)
                continue
            try:
                measured = _execute(config, row, settings, folder, model, ours)
            except subprocess.CalledProcessError as error:  # it has said why on its own
                print(f"{row.name}: the conversion ended with code {error.returncode}", file=sys.stderr)
                failed.append(row.name)
                continue
            records.append(Path(config.results), measured)
            if not config.keep:
                shutil.rmtree(folder, ignore_errors=True)
        print(f"{row.name}: done after {measured.machine['seconds']:.0f} s", file=sys.stderr, flush=True)
    if failed:
        raise ValueError(f"rows that could not be converted: {', '.join(failed)}")


def _plan(config: RunConfig) -> tuple[list[Row], ModelConfig]:
    """The rows, and the original's config."""
    for name in (*config.calibration, *measure.TEXTS):
        corpus.find(name)
    model = pretrained_config(config.source)
    require(isinstance(model.attention, GQAConfig), "from", config.source, "must hold a GQA model")
    assert isinstance(model.attention, GQAConfig)
    planned = rows.plan(config.ratios, config.kinds, model.attention.num_kv_heads, config.healed)
    names = [row.name for row in planned]
    for name in config.only:
        require(name in names, "only", name, f"must be among {', '.join(names)}")
    planned = [row for row in planned if not config.only or row.name in config.only]
    for row in planned:
        if row.healed is not None:
            _require_form(row, row.healed, model)
    return planned, model


def _require_form(row: Row, folder: str, model: ModelConfig) -> None:
    """Refuses a healed model that is not what its row is called."""
    _, config = load_config(folder, field="healed")
    found = config.model.attention
    wanted = rows.KINDS[row.kind]["to"], rows.cached_elements(row, model)
    require((found.kind, cache_elements_per_token(found)) == wanted, "healed", folder,
            f"is {found.kind} of {cache_elements_per_token(found)} cached elements, {row.name} must be {wanted[0]} of "
            f"{wanted[1]}")


def _conversion(config: RunConfig, row: Row, folder: Path) -> ConvertConfig:
    texts = tuple(str(corpus.find(name)) for name in config.calibration)
    return rows.conversion(row, config.sizes, config.source, config.tokenizer, texts, str(folder))


def _settings(config: RunConfig, row: Row) -> dict[str, Any]:
    """As JSON has them."""
    sizes = config.sizes
    found: dict[str, Any] = {"measure": {
        "rows": sizes.text_rows, "tokens": sizes.text_tokens, "items": sizes.items, "tasks": sizes.tasks,
        "texts": [rows.text_digest(str(corpus.find(name))) for name in measure.TEXTS]}}
    if row.healed is not None:
        found |= {"healing": _healing(row.healed), "source": rows.model_digest(config.source)}
    elif row.kind == ORIGINAL:
        found["source"] = rows.model_digest(config.source)
    else:
        found["convert"] = rows.conversion_settings(_conversion(config, row, Path(config.workdir)))
    return dict(json.loads(json.dumps(found)))


def _healing(folder: str) -> dict[str, Any]:
    """How a run trained, how far it is, and what it made. Raises: as `load_config`."""
    step, config = load_config(folder, field="healed")
    found = identity(config)
    del found["initial"], found["data"]["tokenizer"]
    (found["distillation"] or {}).pop("teacher", None)
    # Its student, teacher and text are in no config but by their places: what came of them says the same.
    return {"step": step, "config": found, "parameters": parameters_digest(folder, step)}


def _short(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def _name(config: RunConfig) -> str:
    return config.model or Path(config.source).name.removesuffix(".gguf")


def _is_done(config: RunConfig, row: Row, settings: dict[str, Any]) -> bool:
    found = latest(records.read_as(Measured, Path(config.results)))
    record = found.get((_name(config), row.name))
    if record is None:
        return False
    healing = dict(settings.get("healing", {}))
    if "parameters" not in record.settings.get("healing", {}):  # written before they were noted
        healing.pop("parameters", None)
    recorded, wanted = ({"healing": {}, **each, "convert": None} for each in (record.settings, settings))
    if recorded != {**wanted, "healing": healing}:
        return False
    return rows.same_conversion(record.settings.get("convert", {}), settings.get("convert", {}))


def latest(found: list[Measured]) -> dict[tuple[str, str], Measured]:
    """The last line of each row of each model."""
    return {(record.model, record.row): record for record in found}


def _execute(
    config: RunConfig, row: Row, settings: dict[str, Any], folder: Path, original: ModelConfig, lock: int
) -> Measured:
    start, cost = time.perf_counter(), None
    if row.healed is not None:
        opened = open_model(row.healed, None, step=settings["healing"]["step"])
    elif row.kind == ORIGINAL:
        opened = open_model(None, config.source, tokenizer=config.tokenizer)
    else:
        cost = _converted(_conversion(config, row, folder), lock)
        opened = open_model(str(folder), None)
    texts, tasks = _measured(config.sizes, opened)
    models = (original, opened.model.config)
    return Measured(_name(config), row.name, row.kind, row.ratio, settings,
                    [cache_elements_per_token(model.attention) for model in models],
                    [model_parameters(model).total for model in models], cost, texts, tasks,
                    runner.machine(time.perf_counter() - start))


def _measured(sizes: Sizes, opened: Opened) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    texts = {name: dataclasses.asdict(measure.text_loss(opened, name, sizes.text_rows, sizes.text_tokens))
             for name in measure.TEXTS}
    found = measure.task_scores(opened, sizes.tasks, sizes.items, str(corpus.data_folder()))
    return texts, {task: dataclasses.asdict(score) for task, score in found.items()}


def _converted(config: ConvertConfig, lock: int) -> dict[str, float] | None:
    """Converts, unless an earlier start did; what it cost, None where that is not known. The process holds the lock.

    Raises:
      CalledProcessError: the conversion failed, and said why.
    """
    cost = Path(f"{config.out}.json")
    if not (cost.exists() and Path(config.out).exists()):
        shutil.rmtree(config.out, ignore_errors=True)
        cost.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "experiments.convert", *_flags(config)]
        # On Linux a process inherits the peak memory of the one that it was spawned from; a shell's is small.
        done = subprocess.run(["sh", "-c", '"$@"; exit $?', "sh", *command], check=True, text=True,
                              stdout=subprocess.PIPE, pass_fds=(lock,))
        cost.write_text(done.stdout.splitlines()[-1])
    found = json.loads(cost.read_text())
    # Of a conversion that went on, these are those of its last part.
    return None if found.get("resumed") else {"seconds": found["seconds"], "peak_bytes": found["peak_bytes"]}


def _flags(config: ConvertConfig) -> list[str]:
    """The command line that `experiments.convert` reads this config from."""
    found: list[str] = []
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), f"--{'from' if field.name == 'source' else field.name}"
        if isinstance(value, bool):
            found += [flag] if value else []
        elif isinstance(value, tuple):
            found += [part for each in value for part in (flag, str(each))]
        elif value is not None:
            found += [flag, str(value)]
    return [item.replace("_", "-") if item.startswith("--") else item for item in found]
