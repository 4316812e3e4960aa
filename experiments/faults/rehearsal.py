"""A small training run as several processes of one machine, each of which can be told to stop, or killed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from mfa_jax.train.run import CHECKPOINTS

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 300.0
"""Seconds until what shows no sign of life is a failure; nothing that is measured."""


class Rehearsal:
    """One run's folder, started now with four processes and now with two.

    Args:
      cache: a folder for compiled programs, which makes restarts cheap.
    """

    def __init__(self, workdir: Path, corpus: Path, cache: Path, *flags: str) -> None:
        self.workdir, self._cache = workdir, cache
        self._flags = ["--data.source", str(corpus), "--data.sequence-length", "32", "--data.batch-size", "8",
                       "--data.held-out", "0.1", "--optimizer.warmup-steps", "5", "--optimizer.schedule", "constant",
                       "--log-every", "1", "--eval-every", "0", *flags]
        workdir.mkdir(parents=True, exist_ok=True)

    def start(self, processes: int, steps: int, *flags: str, launch: tuple[str, ...] = ()) -> Job:
        """Starts so many processes, which go on until `steps` are done."""
        command = [sys.executable, "-m", "experiments.launch", "--processes", str(processes), *launch, "--", "-m",
                   "experiments.faults.recorded_train", "--workdir", str(self.workdir), "--steps", str(steps),
                   *self._flags, *flags]
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(self._cache),
                       "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        return Job(command, self.workdir / "said.txt", environment)

    def losses(self) -> dict[int, float]:
        """The loss of each step."""
        file = self.workdir / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return {line["step"]: line["loss"] for line in lines if "loss" in line}

    def saved(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        folder = self.workdir / CHECKPOINTS
        return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []


class Job:
    """The processes of one start, under their launcher."""

    def __init__(self, command: list[str], output: Path, environment: dict[str, str]) -> None:
        self._output = output
        with output.open("wb") as file:
            self._launcher = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)

    def until(self, condition: Callable[[], bool]) -> None:
        """Returns as soon as the condition holds; `AssertionError` where all ends before, or nothing happens."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if self._launcher.poll() is not None or time.monotonic() > deadline:
                self._kill()
                raise AssertionError(self.said())
            time.sleep(0.02)

    def tell(self, process: int, number: signal.Signals) -> None:
        """Sends a signal to one of the processes."""
        found = re.search(rf"process {process} of \d+ is pid (\d+)", self.said())
        assert found, self.said()
        os.kill(int(found[1]), number)

    def wait(self) -> int:
        """The launcher's exit code."""
        try:
            return self._launcher.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._kill()
            raise AssertionError(f"hangs: {self.said()}") from None

    def _kill(self) -> None:
        """Ends all of them: each process is in a session of its own, and would outlive its launcher."""
        if self._launcher.poll() is None:
            for found in re.finditer(r"process \d+ of \d+ is pid (\d+)", self.said()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(found[1]), signal.SIGKILL)
            self._launcher.kill()
            self._launcher.wait()

    def said(self, process: int | None = None) -> str:
        """What all, or one process, said."""
        text = self._output.read_text(errors="replace")
        mine = f"[{process}] "
        return text if process is None else "\n".join(
            line.removeprefix(mine) for line in text.splitlines() if line.startswith(mine))

    def trained(self) -> bool:
        """Whether it has done a step; only then the metrics beyond where it goes on from are its own."""
        return re.search(r"step \d+/\d+  loss", self.said()) is not None

    def resumed_at(self) -> int:
        """The step that it went on from, 0 for none."""
        found = re.search(r"resumed at step (\d+)", self.said())
        return int(found[1]) if found else 0


def names_the_lost(said: str, process: int) -> bool:
    """Whether what a process said at its end tells which other one was lost.

    JAX's coordinator gives the number; where process 0 is lost, which the coordinator is a part of, the others speak of
    the leader.
    """
    number = rf"heartbeats?\):\s*{process}\s*$|Task {process} heartbeat"
    leader = r"|leader \(usually slice 0 task 0\)" if process == 0 else ""
    return re.search(number + leader, said, re.MULTILINE) is not None
