"""A trace of some steps of a run, for XProf, TensorBoard or Perfetto."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax

from mfa_jax.train.goodput import Goodput


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
            if self._tracing:
                jax.profiler.stop_trace()
            else:
                jax.profiler.start_trace(self._folder)
        self._tracing = not self._tracing

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._tracing:  # the run ends within the window
            jax.profiler.stop_trace()
