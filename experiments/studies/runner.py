"""Runs what a study has planned and not yet done, in as many processes as are started: each claims the next free run.

A run lives in a folder of its own, as `train` makes it, until its record is written; whoever is killed leaves it there
and the next start goes on from its last checkpoint. A lock file that dies with its process keeps two from the same run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np

from experiments.studies import corpus, records
from experiments.studies.measure import measure
from experiments.studies.records import Record
from experiments.studies.study import Run, Scale, Study, identity, results_of
from mfa_jax.config import require
from mfa_jax.train.loop import NonFiniteError, train
from mfa_jax.train.run import load_trained

WAIT_SECONDS = 0.5
_CURVE = ("step", "loss", "grad_norm", "update_norm", "eval_bits_per_byte")


@dataclasses.dataclass(frozen=True)
class Folders:
    """Where a study reads and writes."""

    results: Path
    """Holds `metrics.jsonl` of the study."""
    work: Path
    """Holds prepared text, unfinished runs and compiled programs; may be deleted when nothing is unfinished."""
    keep: bool = False
    """Whether finished runs stay in `work`, with their last checkpoint."""


def work_through(study: Study, scale: Scale, folders: Folders) -> None:
    """Does runs until the plan is done, those that other processes are at included. One process uses one device.

    Raises:
      KeyboardInterrupt: told to stop during a run; it is saved.
      ValueError: the corpus is not there.
      JaxRuntimeError: of the first run that the device failed at (out of memory), when all others are done.
    """
    text = corpus.prepared(scale.train, folders.work / "text")
    failures: dict[str, jax.errors.JaxRuntimeError] = {}
    while True:
        plan, done = _state(study, scale, folders, text)
        missing = [run for run in plan if run.name not in done]
        if all(run.name in failures for run in missing):
            break
        for run in missing:
            try:
                if run.name not in failures and _claim(study, scale, folders, text, run):
                    break
            except jax.errors.JaxRuntimeError as error:  # out of memory, say: the other runs may fit
                print(f"{scale.name} {run.name}: failed: {error}", file=sys.stderr, flush=True)
                failures[run.name] = error
        else:
            # Other processes are at them, and some runs are planned only when others are done.
            time.sleep(WAIT_SECONDS)
    for failure in failures.values():
        raise failure


def _state(study: Study, scale: Scale, folders: Folders, text: corpus.Corpus) -> tuple[list[Run], set[str]]:
    found = [record for record in records.read(folders.results) if record.scale == scale.name]
    results = results_of(found, text.text)
    plan = study.plan(scale, results)
    return plan, {run.name for run in plan if results(run) is not None}


def _claim(study: Study, scale: Scale, folders: Folders, text: corpus.Corpus, run: Run) -> bool:
    """Does the run unless another process is at it or has done it; says whether it did."""
    digest = hashlib.sha256(json.dumps(identity(run.config)).encode()).hexdigest()[:8]
    folder = folders.work / study.name / scale.name / f"{run.name}-{digest}"
    with records.lock(folder.with_name(f"{folder.name}.lock"), wait=False) as ours:
        if ours is None or run.name in _state(study, scale, folders, text)[1]:
            return False
        record = execute(study, scale, text, run, folder)
        records.append(folders.results, record)
        if not folders.keep:
            shutil.rmtree(folder)
    plan, done = _state(study, scale, folders, text)
    loss = record.metrics.get("test_bits_per_byte", float("nan"))
    print(f"{len(done)}/{len(plan)} {scale.name} {run.name}: {record.outcome}, {loss:.4f} bits per byte on the test "
          f"books, {record.machine['seconds']:.0f} s", file=sys.stderr, flush=True)
    return True


def execute(study: Study, scale: Scale, text: corpus.Corpus, run: Run, folder: Path) -> Record:
    """Trains, or goes on where an earlier start was, and measures.

    Raises:
      KeyboardInterrupt: told to stop; what was trained is saved.
    """
    began = time.perf_counter()
    data = dataclasses.replace(run.config.data, source=text.data.source, held_out_source=text.data.held_out_source,
                               prepared=text.data.prepared)
    outcome, note, metrics = "finished", "", {}
    try:
        result = train(dataclasses.replace(run.config, workdir=str(folder), data=data), progress=False,
                       devices=jax.local_devices()[:1])
    except NonFiniteError as error:
        outcome, note = "diverged", str(error).partition(";")[0]
    else:
        if result.interrupted:
            raise KeyboardInterrupt
        trained = load_trained(folder)
        metrics = {"valid_bits_per_byte": result.metrics["eval_bits_per_byte"], **measure(scale, trained, text.test)}
        if study.measure is not None:
            metrics |= study.measure(scale, trained, text.test)
        if bad := [name for name, value in metrics.items() if not np.all(np.isfinite(value))]:
            outcome, note, metrics = "diverged", f"step {result.step}: {', '.join(bad)} not finite", {}
    return Record(scale.name, run.name, run.labels, identity(run.config), outcome, note, metrics, _curve(folder),
                  machine(time.perf_counter() - began), text.text)


def _curve(folder: Path) -> dict[str, list[Any]]:
    path = folder / records.METRICS
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {name: [_short(line.get(name)) for line in lines] for name in _CURVE}


def _short(value: Any) -> Any:
    """Five digits are enough to draw a curve."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


def machine(seconds: float) -> dict[str, Any]:
    """What a record says of where and when it was made."""
    return {"device": jax.local_devices()[0].device_kind, "host": platform.machine(), "jax": jax.__version__,
            "commit": _commit(), "date": datetime.date.today().isoformat(), "seconds": round(seconds, 1)}


@functools.cache
def _commit() -> str:
    """MFA_JAX_COMMIT, or the commit of this tree with `-dirty` where it was changed since; `unknown` without either."""
    if "MFA_JAX_COMMIT" in os.environ:
        return os.environ["MFA_JAX_COMMIT"]
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
                              cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def keep_compiled_programs(folder: Path) -> None:
    """Programs compiled by one process serve all; runs that differ in their seed alone share theirs."""
    jax.config.update("jax_compilation_cache_dir", str(folder.resolve()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


# ---- several processes -----------------------------------------------------------------------------------------


def start_workers(arguments: Sequence[str], workers: int, devices: int) -> list[int]:
    """Runs this program `workers` times on each of the first `devices` GPUs; gives their exit codes when all are done.

    Told to stop, it tells them, and waits until they have saved.

    Raises:
      ValueError: more devices than CUDA_VISIBLE_DEVICES names.
      KeyboardInterrupt: it was told to stop.
    """
    children = []
    environments = worker_environments(workers, devices)
    with _stop_as_interrupt():
        try:
            for environment in environments:
                children.append(subprocess.Popen([sys.executable, "-m", "experiments.studies", *arguments],
                                                 env=environment, start_new_session=True))
            return [child.wait() for child in children]
        except KeyboardInterrupt:
            for child in children:
                child.terminate()
            for child in children:
                child.wait()
            raise


def worker_environments(workers: int, devices: int) -> list[dict[str, str]]:
    """The environment of each worker: its share of memory and, of several GPUs, the one that it uses.

    Raises:
      ValueError: more devices than CUDA_VISIBLE_DEVICES names.
    """
    # Without a share of its own the first process would take most of a GPU's memory.
    shared = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.85 / workers:.3f}", **os.environ}
    if devices == 1:
        return [shared] * workers
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(i) for i in range(devices)] if visible is None else [name for name in visible.split(",") if name]
    require(len(names) >= devices, "devices", devices, f"CUDA_VISIBLE_DEVICES={visible!r} names {len(names)}")
    # Without a platform a worker that cannot use its GPU would train on the CPU; one that the user chose stays.
    return [{"JAX_PLATFORMS": "cuda", **shared, "CUDA_VISIBLE_DEVICES": names[i % devices]}
            for i in range(workers * devices)]


@contextlib.contextmanager
def _stop_as_interrupt() -> Iterator[None]:
    """SIGTERM acts as Ctrl-C does."""
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
