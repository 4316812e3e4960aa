"""`metrics.jsonl`: a line for each finished run of a study or row of a table, appended by any number of processes."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

R = TypeVar("R", bound="DataclassInstance")
log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


@dataclasses.dataclass(frozen=True)
class Record:
    """What a run left behind."""

    scale: str
    run: str
    labels: dict[str, Any]
    config: dict[str, Any]
    """As `study.identity` makes it."""
    outcome: str
    """`finished` or `diverged`."""
    note: str
    """Of a run that diverged: where."""
    metrics: dict[str, Any]
    """What was measured at the end; `*_bits_per_byte` among it. Empty for a run that diverged."""
    curve: dict[str, list[Any]]
    """Metrics over the steps: `step` and, as long, loss, gradient norm and so on; None where a step has none."""
    machine: dict[str, Any]
    """`device`, `jax`, `commit`, `date`, and `seconds` of the start that finished the run."""
    text: dict[str, Any] | None = None
    """What text it was, as `corpus` describes it; None for records older than this field."""


def read(folder: Path) -> list[Record]:
    """The records of a study, oldest first; lines that are not whole are left out, with a warning that counts them."""
    return read_as(Record, folder)


def read_as(kind: type[R], folder: Path) -> list[R]:
    """The records of a folder as dataclasses of another kind, likewise."""
    path = folder / METRICS
    if not path.exists():
        return []
    records, damaged = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            records.append(kind(**json.loads(line)))
        except (ValueError, TypeError):
            damaged += bool(line.strip())
    if damaged:
        log.warning("%s: %d half-written or damaged lines are skipped", path, damaged)
    return records


def append(folder: Path, record: DataclassInstance) -> None:
    """Adds one line. Raises: OSError: the disk is full, or the folder cannot be written to."""
    folder.mkdir(parents=True, exist_ok=True)
    line = json.dumps(dataclasses.asdict(record), allow_nan=False) + "\n"
    with (folder / METRICS).open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            file.write(b"\n")  # ends a line that a killed process left half-written
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def lock(path: Path, *, wait: bool) -> Iterator[int | None]:
    """Holds a lock file; gives its descriptor, or None where another process holds it and `wait` is False.

    The lock ends with its process, however that ends, so that nothing is ever left locked; with the last of them where
    the descriptor was handed on to another.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
            return
        yield file.fileno()
