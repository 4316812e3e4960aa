"""Batches on their way to the devices: one is always being copied while a step runs on the one before."""

from __future__ import annotations

import time
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from mfa_jax.data import Batches
from mfa_jax.train.goodput import Goodput
from mfa_jax.train.step import BATCH_SPEC


def to_mesh(batch: Any, mesh: Mesh) -> Any:
    """The rows that each process has, as arrays of the whole batch; the copy goes on after this returns."""
    where = NamedSharding(mesh, BATCH_SPEC)
    return {name: jax.make_array_from_process_local_data(where, rows) for name, rows in batch.items()}


class Feed:
    """The batches of a loader on the mesh.

    The loader's thread reads ahead on the host. `read_ahead`, called once a step is issued, takes the next batch from
    it and starts its copy, so that neither waits for the step nor makes the next one wait, whatever the loop reads in
    between.
    """

    def __init__(self, loader: Batches, mesh: Mesh, goodput: Goodput) -> None:
        self._loader, self._mesh, self._goodput = loader, mesh, goodput
        self._ahead: Any = None
        self._error: Exception | None = None
        self.place = loader.get_state()
        """Where the data go on after the last batch that was taken: for a checkpoint."""

    def take(self) -> Any:
        """The next batch. What went wrong when it was read ahead is raised here, where the step before is done."""
        if self._error is not None:
            raise self._error
        with self._goodput.phase("data"):
            batch = to_mesh(next(self._loader), self._mesh) if self._ahead is None else self._ahead
        self._ahead, self.place = None, self._loader.get_state()
        return batch

    def read_ahead(self, running: Any) -> None:
        """Draws the batch after it. Waiting for it counts as lost only if `running`, a result of the step that was
        issued, is there at the end: then the devices had nothing to do for some of that time."""
        began = time.perf_counter()
        try:
            self._ahead = to_mesh(next(self._loader), self._mesh)
        except (ValueError, OSError) as error:
            self._error = error
        if running.is_ready():
            self._goodput.add("data", time.perf_counter() - began)
