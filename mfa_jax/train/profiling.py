"""A trace of some steps of a run, for XProf, TensorBoard or Perfetto."""

from __future__ import annotations

import logging
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax

from mfa_jax.train.goodput import Goodput

log = logging.getLogger(__name__)


class ProfileWindow:
    """Traces `steps` steps once `start` are done, into a folder; nothing without a window.

    Each process writes what its own host and devices did, of several into `process-<number>` within the folder, since
    two of one host would write the same file. Steps before the window have ended when the trace begins, and those in
    it before it ends.
    """

    def __init__(self, window: tuple[int, int] | None, folder: Path, goodput: Goodput) -> None:
        start, steps = window or (0, 0)
        self._steps, self._goodput = range(start, start + steps), goodput
        self._folder = folder / f"process-{jax.process_index()}" if jax.process_count() > 1 else folder
        self._tracing = False

    def at(self, step: int, state: Any) -> None:
        """To be called before each step, with the steps done and what the last of them made."""
        if (step in self._steps) == self._tracing:
            return
        jax.block_until_ready(state)
        with self._goodput.phase("profile"):
            self._trace(not self._tracing)

    def _trace(self, on: bool) -> None:
        """A trace that cannot be written is told, and no reason to end a run."""
        try:
            if on:
                self._folder.mkdir(parents=True, exist_ok=True)
                jax.profiler.start_trace(self._folder)
            else:
                jax.profiler.stop_trace()
            self._tracing = on
        except (OSError, RuntimeError) as error:
            log.warning("%s: no trace (%s)", self._folder, error)
            self._steps, self._tracing = range(0), False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._tracing:  # the run ends within the window
            self._trace(False)
