"""Where the wall time of one start goes, and which share of it was spent in steps."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Literal, get_args

Phase = Literal["setup", "compile", "restore", "data", "evaluate", "checkpoint", "profile"]
"""What is no step:

* `setup`: opening checkpoints and data, preparing data the first time;
* `compile`: the layout of the state, tracing and compiling the training step (other programs count where they are
  first called);
* `restore`: reading a checkpoint, or making the state at step 0;
* `data`: waiting for a batch while the devices had nothing to do;
* `evaluate`: held-out loss;
* `checkpoint`: the loop being held up by a save, most of which goes on beside the steps;
* `profile`: starting and writing a trace.
"""


class Goodput:
    """Seconds since a start, by phase; what is in no phase is the steps, a few lines of metrics counted in.

    Steps that a run does again after it was killed count as steps: what a crash costs beside starting again is the
    steps since the last checkpoint.
    """

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._seconds = {phase: 0.0 for phase in get_args(Phase)}

    @contextlib.contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Counts the time within to that phase; phases do not nest."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - began)

    def add(self, name: Phase, seconds: float) -> None:
        """Counts so many seconds, that have passed, to that phase."""
        self._seconds[name] += seconds

    def metrics(self) -> dict[str, float]:
        """`goodput`, seconds in steps over all seconds of this start, and `seconds/<phase>` and `seconds/steps`."""
        total = time.perf_counter() - self._began
        steps = total - sum(self._seconds.values())
        return {"goodput": steps / total, "seconds/steps": steps} | {
            f"seconds/{phase}": seconds for phase, seconds in self._seconds.items()}

    def summary(self) -> str:
        """The same as a line of text, phases of no time left out."""
        named = {phase: seconds for phase, seconds in self._seconds.items() if seconds >= 0.05}
        found = self.metrics()
        parts = [f"steps {found['seconds/steps']:.1f} s", *(f"{phase} {s:.1f} s" for phase, s in named.items())]
        return f"goodput {100 * found['goodput']:.1f} % ({', '.join(parts)})"
