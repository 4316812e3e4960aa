"""Checkpoints that survive a crash, a full disk, a flipped bit and a change of mesh.

One folder `<folder>/<step>/` per checkpoint: an orbax item per tree (`params`, `optimizer`, ...) and one JSON item
with the caller's meta data, the shape, dtype and checksum of every leaf, and a checksum of itself. Orbax writes
asynchronously and renames a finished checkpoint into place, but it neither notices a flipped bit nor falls back to
an older checkpoint; this module does both. It and `orbax_io` alone know orbax.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self, TypeVar

import jax
from etils import epath

from mfa_jax.config import require
from mfa_jax.train import integrity, keeping, orbax_io, processes
from mfa_jax.train.integrity import META, DamagedCheckpointError
from mfa_jax.train.keeping import Keep

log = logging.getLogger(__name__)

_READS = 5
"""How often a reader looks again where a writer removes what it was about to read."""
_T = TypeVar("_T")


class CheckpointWriteError(OSError):
    """A checkpoint was not written; `errno` says why (disk full, read-only, ...). The earlier ones are intact."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """One checkpoint, read and verified."""

    step: int
    items: dict[str, Any]
    meta: dict[str, Any]
    skipped: dict[int, str]
    """Newer checkpoints that could not be used, each with its reason."""


class Checkpoints:
    """The checkpoints of one run, in one folder; the only writer of it, until it is closed, unless `read_only`.

    With several processes every method is called by all of them, on a folder that they share.

    Raises:
      ValueError: `keep_last` below 1; a folder that another writer has open.
      CheckpointWriteError: the folder cannot be created or written to.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, keep_last: int = 3, read_only: bool = False,
        file_bytes: int | None = None,
    ) -> None:
        """Args: file_bytes: of a data file; encoded, that much of each leaf waits in memory. None for orbax's 2 GiB."""
        require(keep_last >= 1, "keep_last", keep_last, "must be at least 1")
        self.folder = epath.Path(folder if "://" in os.fspath(folder) else os.path.abspath(folder))
        self.read_only = read_only
        self._metrics: dict[int, float] = {}
        self._keep, self._saving = Keep(keep_last, self._metrics), -1
        self._failed: CheckpointWriteError | None = None
        with contextlib.ExitStack() as opened:
            if not read_only:
                try:
                    processes.require_shared(self.folder)
                    opened.enter_context(processes.sole_writer(self.folder))
                except OSError as error:
                    raise CheckpointWriteError(error.errno, f"checkpoints cannot be written: {error.strerror}",
                                               str(self.folder)) from error
            self._files = orbax_io.Manager(self.folder, self._keep, read_only=read_only, file_bytes=file_bytes)
            self._manager = self._files.orbax
            opened.callback(self._manager.close)
            if not read_only:  # each step is then a question to all processes
                processes.require_same(f"steps in {self.folder}", str(self.steps()))
            for step in [] if read_only else self.steps():
                with contextlib.suppress(DamagedCheckpointError):  # told by whoever reads it
                    self._note_metric(step, self._document(step)["metric"])
            self._opened = opened.pop_all()

    def _note_metric(self, step: int, metric: float | None) -> None:
        self._metrics.pop(step, None)
        if metric is not None and math.isfinite(metric):
            self._metrics[step] = metric

    def steps(self) -> list[int]:
        """Steps of the checkpoints there are, ascending, the one being written included."""
        if self.read_only:
            self._manager.reload()
        return sorted(self._manager.all_steps())

    # ---- writing ----

    def save(self, step: int, items: Mapping[str, Any], meta: Mapping[str, Any], *, metric: float | None = None,
             wait: bool = False) -> None:
        """Starts writing a checkpoint; the arrays may be donated or deleted as soon as this returns.

        Args:
          step: must exceed every saved step.
          items: trees of jax arrays by name; each can be restored without the others.
          meta: anything JSON can hold.
          metric: of all checkpoints the one with the lowest is kept beside the latest; None or not finite never is.
          wait: whether to return only once it is on disk.

        Raises:
          ValueError: a step that is not new, items that are not trees of arrays, meta that is not JSON.
          CheckpointWriteError: this one, or the one before it, could not be written.
        """
        require(not self.read_only, "read_only", True, f"{self.folder} was opened for reading only")
        self.wait()
        self._manager.reload()  # where files cannot be locked, another may have written
        latest = max(self.steps(), default=-1)
        require(step > latest, "step", step, f"must exceed the latest step {latest} in {self.folder}")
        integrity.require_trees(items, jax.Array, "items")
        try:
            plain = json.loads(json.dumps(meta))
        except (TypeError, ValueError) as error:
            raise ValueError(f"meta: must be JSON ({error})") from error
        document = {"step": step, "metric": metric, "meta": plain,
                    "leaves": {name: integrity.describe(tree) for name, tree in items.items()}}
        self._saving = step
        self._note_metric(step, metric)
        with self._reporting():
            self._files.save(step, items, document)
        if wait:
            self.wait()

    def has_failed(self) -> bool:
        """Whether a save ended, and failed, that nobody waited for yet; `wait` and `save` raise what it failed for."""
        if self._failed is None and self._files.is_over():
            try:
                self.wait()
            except CheckpointWriteError as error:
                self._failed = error
        return self._failed is not None

    def wait(self) -> None:
        """Returns once everything saved so far is on disk.

        Raises:
          CheckpointWriteError: the last save failed.
        """
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed
        with self._reporting():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        """Turns whatever a failed save raises into one kind of error that names the folder."""
        try:
            yield
        except Exception as error:
            self._manager.reload()  # it already counts the step that failed
            if self._is_written(self._saving):  # orbax removes old ones in the same thread, after it
                log.warning("%s: step %d is saved, but older ones could not be removed (%s)", self.folder, self._saving,
                            error)
                self._keep.remove_others(self.folder, self._manager.all_steps())
                self._manager.reload()
                return
            keeping.remove_unfinished(self.folder, self._saving)
            code = integrity.error_code(error) or errno.EIO
            reason = os.strerror(code) if code != errno.EIO else str(error)
            raise CheckpointWriteError(code, f"checkpoint of step {self._saving} was not written: {reason}",
                                       str(self.folder)) from error

    def _is_written(self, step: int) -> bool:
        try:
            integrity.read_sealed(self._meta_file(step))
        except (DamagedCheckpointError, OSError):
            return False
        return step in self._manager.all_steps()

    def close(self) -> None:
        """Waits for the last save, frees the threads and the folder; raises `CheckpointWriteError` if it failed."""
        try:
            self.wait()
        finally:
            self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- reading ----

    def read_meta(self, step: int | None = None) -> tuple[int, dict[str, Any]] | None:
        """The step and meta data of one checkpoint (the newest whose meta data is intact); None where there is none.

        Raises:
          ValueError: `step` is not there.
          DamagedCheckpointError: no checkpoint's meta data can be read; UnreadableCheckpointError: as in `restore`.
        """
        found = self._newest(lambda s: self._document(s)["meta"], step)
        return None if found is None else found[:2]

    def digest(self, step: int, item: str) -> str:
        """Of one tree of a checkpoint, as it was saved, by its meta data alone.

        Raises:
          ValueError: no such tree; DamagedCheckpointError, UnreadableCheckpointError: as in `restore`.
        """
        leaves = self._document(step)["leaves"]
        require(item in leaves, "item", item, f"is not in {self.folder}/{step}; there are {list(leaves)}")
        return integrity.digest(leaves[item])

    def restore(self, abstract: Mapping[str, Any], step: int | None = None) -> Restored | None:
        """Reads the newest checkpoint that is intact, or `step`; None where none was ever finished.

        Args:
          abstract: trees of `jax.ShapeDtypeStruct` with shardings, by item name; any mesh, any subset of the items.
          step: this checkpoint and no other.

        A newer checkpoint that is damaged or unfinished is logged, told in `skipped` and, unless `read_only`, moved to
        the folder `<folder>-damaged` beside, so that its step can be saved again; nothing is deleted but what an
        earlier save that was cut off had left there.

        Raises:
          ValueError: `step` is not there; the checkpoint is of another architecture (leaves, found and expected).
          DamagedCheckpointError: none is intact, or `step` is not; every reason is told.
          UnreadableCheckpointError: the disk or the network failed, which is no damage; nothing is moved.
        """
        integrity.require_trees(abstract, jax.ShapeDtypeStruct, "abstract")
        found = self._newest(lambda s: self._load(s, abstract), step)
        newer = {} if step is not None else {
            s: path for s, path in keeping.unfinished(self.folder).items() if found is None or s > found[0]}
        damaged = {} if found is None else found[2]
        skipped = {**damaged, **{s: "its save did not finish" for s in newer}}
        for bad, reason in sorted(skipped.items()):
            log.warning("%s: step %d is skipped: %s", self.folder, bad, reason)
        if skipped and not self.read_only:
            keeping.move_aside(self.folder, {s: self.folder / str(s) for s in damaged}, newer)
            self._manager.reload()
        return None if found is None else Restored(found[0], *found[1], skipped)

    def _newest(self, read: Callable[[int], _T], step: int | None) -> tuple[int, _T, dict[int, str]] | None:
        """The newest step that `read` can read, what it read, and why each newer one could not be read."""
        for _ in range(_READS):
            self.wait()
            self._manager.reload()
            steps = self._listed()
            if step is not None:
                require(step in steps, "step", step, f"is not in {self.folder}; there are {steps or 'none'}")
            damaged: dict[int, str] = {}
            for candidate in reversed(steps) if step is None else [step]:
                try:
                    return candidate, read(candidate), damaged
                except DamagedCheckpointError as error:
                    damaged[candidate] = str(error)
            if not (self.read_only and step is None and self._listed() != steps):
                break  # else a writer went on meanwhile, and removed what was to be read
        if not damaged:
            return None
        reasons = "; ".join(f"step {s}: {reason}" for s, reason in damaged.items())
        raise DamagedCheckpointError(f"{self.folder}: no usable checkpoint ({reasons})")

    def _listed(self) -> list[int]:
        """The same for all processes. Of a run that is being trained each may see another moment: what process 0 saw
        counts."""
        steps = self.steps()
        if self.read_only:
            return list(json.loads(processes.gather(json.dumps(steps))[0]))
        processes.require_same(f"steps in {self.folder}", str(steps))
        return steps

    def _meta_file(self, step: int) -> epath.Path:
        return self.folder / str(step) / META / "metadata"

    def _document(self, step: int) -> dict[str, Any]:
        return processes.agreeing(lambda: integrity.read_sealed(self._meta_file(step)), DamagedCheckpointError)

    def _load(self, step: int, abstract: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        document = self._document(step)
        saved = document["leaves"]
        integrity.require_same_architecture(f"step {step} of {self.folder}", saved, abstract)
        items = processes.agreeing(lambda: orbax_io.read(self.folder / str(step), abstract), DamagedCheckpointError)
        wrong = [f"{name}/{path}" for name, tree in items.items() for path, entry in integrity.describe(tree).items()
                 if entry != saved[name][path]]
        if wrong:
            raise DamagedCheckpointError(f"checksum differs in {', '.join(wrong[:3])} ({len(wrong)} leaves)")
        return items, document["meta"]
