"""A small training run, of one process or of several, that can be told to stop, or killed; and what it leaves."""

from __future__ import annotations

import contextlib
import dataclasses
import email
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mfa_jax import axes
from mfa_jax.config import TrainConfig, load_json
from mfa_jax.plan.programs import training_state
from mfa_jax.train import run
from mfa_jax.train.checkpoint import Checkpoints, Restored
from mfa_jax.train.loop import checkpoint_items

ROOT = Path(__file__).resolve().parents[2]
LONG = 10**6
"""Steps that no run here reaches."""
PATIENCE = 300.0
"""Seconds until what shows no sign of life is a failure: no time that is expected, and none that is measured."""


def write_corpus(folder: Path) -> Path:
    """Ten files of Python's standard library."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(Path(email.__file__).parent.glob("*.py"))[:10]:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@dataclasses.dataclass(frozen=True)
class SmallRun:
    """A tiny model, trained on a corpus, and the folder of its run."""

    workdir: Path
    corpus: Path
    cache: Path
    """Of compiled programs: what makes thirty restarts a matter of minutes."""
    save_every: int = 5
    flags: tuple[str, ...] = ("--preset", "tiny-mfa")

    @property
    def checkpoints(self) -> Path:
        return self.workdir / run.CHECKPOINTS

    def beside(self, name: str, **changes: Any) -> SmallRun:
        """Another run, with a folder beside this one's."""
        return dataclasses.replace(self, workdir=self.workdir.with_name(name), **changes)

    def start(self, steps: int, *flags: str, processes: int | None = None, launch: tuple[str, ...] = ()) -> Job:
        """Starts, or goes on, until so many steps are done.

        Args:
          processes: how many, under `experiments.launch` with the flags `launch`, each of which writes down its
            batches (`recorded_train`); None for `experiments.train` itself.
        """
        program = ["-m", "experiments.train" if processes is None else "experiments.faults.recorded_train"]
        if processes is not None:
            program = ["-m", "experiments.launch", "--processes", str(processes), *launch, "--", *program]
        command = [
            sys.executable, *program, "--data.source", str(self.corpus), "--data.sequence-length", "32",
            "--data.batch-size", "8", "--data.held-out", "0.1", "--optimizer.warmup-steps", "5",
            "--optimizer.schedule", "constant", "--workdir", str(self.workdir), "--compilation-cache", str(self.cache),
            "--steps", str(steps), "--save-every", str(self.save_every), "--log-every", "1", "--eval-every", "0",
            *(("--mesh.data", "1") if processes is None else ()), *self.flags, *flags]
        self.workdir.mkdir(parents=True, exist_ok=True)
        return Job(command, self.workdir / "said.txt")

    def finish(self, steps: int, *flags: str, **how: Any) -> Job:
        """Runs to the end. Raises `AssertionError` where that is not the end."""
        job = self.start(steps, *flags, **how)
        code, said = job.wait()
        assert code == 0, f"exit code {code}: {said}"
        return job

    def losses(self) -> dict[int, float]:
        """The loss of each step. Raises `AssertionError` where a step is told twice."""
        file = self.workdir / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        found = [(line["step"], line["loss"]) for line in lines if "loss" in line]
        steps = [step for step, _ in found]
        assert len(steps) == len(set(steps)), f"{file} has a step twice: {steps}"
        return dict(found)

    def saved(self) -> list[int]:
        """Steps of the checkpoints that are complete, ascending."""
        names = [path.name for path in self.checkpoints.iterdir()] if self.checkpoints.exists() else []
        return sorted(int(name) for name in names if name.isdigit())

    def unfinished(self) -> set[tuple[str, int]]:
        """Saves that are under way, or were when a run was killed: name and inode of the folder."""
        found = self.checkpoints.iterdir() if self.checkpoints.exists() else []
        return {(path.name, path.stat().st_ino) for path in found if path.name.partition(".")[2]}

    def state(self, step: int | None = None) -> Restored:
        """A checkpoint, read and verified; nothing on disk is changed."""
        with Checkpoints(self.checkpoints, read_only=True) as checkpoints:
            found = checkpoints.restore(self.layout(), step)
        assert found is not None, f"no checkpoint in {self.checkpoints}"
        return found

    def layout(self) -> dict[str, Any]:
        config = load_json(TrainConfig, self.workdir / run.CONFIG)
        mesh = axes.make_mesh((1,) * len(axes.MESH_AXES), jax.devices()[:1])
        return checkpoint_items(training_state(config, mesh))


class Job:
    """One start of a run: a process, or several under their launcher, whose output goes to a file."""

    def __init__(self, command: list[str], output: Path) -> None:
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        self._output = output
        with output.open("wb") as file:
            self._process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)

    def until(self, condition: Callable[[], bool]) -> bool:
        """Returns as soon as the condition holds; False where all ended before that."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if self._process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                self._kill()
                raise AssertionError(f"nothing happened: {self.said()}")
            time.sleep(0.002)
        return True

    def tell(self, process: int, number: signal.Signals) -> None:
        """Sends a signal to one of several processes."""
        found = re.search(rf"process {process} of \d+ is pid (\d+)", self.said())
        assert found, self.said()
        os.kill(int(found[1]), number)

    def stop(self, how: signal.Signals) -> tuple[int, str]:
        """Sends a signal to the only process, or to the launcher; the exit code and what was said."""
        self._process.send_signal(how)
        return self.wait()

    def wait(self) -> tuple[int, str]:
        """The exit code and what was said."""
        try:
            return self._process.wait(PATIENCE), self.said()
        except subprocess.TimeoutExpired:
            self._kill()
            raise AssertionError(f"hangs: {self.said()}") from None

    def _kill(self) -> None:
        """Ends all of them: each of several is in a session of its own, and would outlive its launcher."""
        if self._process.poll() is None:
            for found in re.finditer(r"process \d+ of \d+ is pid (\d+)", self.said()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(found[1]), signal.SIGKILL)
            self._process.kill()
            self._process.wait()

    def said(self, process: int | None = None) -> str:
        """What all, or one of several processes, said."""
        text = self._output.read_text(errors="replace")
        mine = f"[{process}] "
        return text if process is None else "\n".join(
            line.removeprefix(mine) for line in text.splitlines() if line.startswith(mine))

    def last_step(self) -> int:
        """The last step that it reported, 0 before the first: then the metrics are those of an earlier start."""
        return max((int(step) for step in re.findall(r"^(?:\[\d+\] )?step (\d+)/\d+  loss", self.said(), re.MULTILINE)),
                   default=0)

    def resumed_at(self) -> int | None:
        """The step that it went on from; None if it did not come that far, or began at 0."""
        found = re.search(r"resumed at step (\d+)", self.said())
        return int(found[1]) if found else None


def names_the_lost(said: str, process: int) -> bool:
    """Whether what a process said at its end tells which other one was lost.

    JAX's coordinator gives the number; where process 0 is lost, which the coordinator is a part of, the others speak of
    the leader.
    """
    number = rf"heartbeats?\):\s*{process}\s*$|Task {process} heartbeat"
    leader = r"|leader \(usually slice 0 task 0\)" if process == 0 else ""
    return re.search(number + leader, said, re.MULTILINE) is not None


def differences(a: Any, b: Any) -> list[str]:
    """Paths of the leaves of two trees that are not the same bit for bit."""
    def raw(x: Any) -> tuple[Any, ...]:
        x = np.asarray(jax.random.key_data(x) if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
        return x.dtype, x.shape, x.tobytes()

    left, right = jax.tree_util.tree_leaves_with_path(a), jax.tree_util.tree_leaves_with_path(b)
    paths = [jax.tree_util.keystr(path) for path, _ in left]
    if paths != [jax.tree_util.keystr(path) for path, _ in right]:
        return ["the trees"]
    return [path for path, (_, x), (_, y) in zip(paths, left, right, strict=True) if raw(x) != raw(y)]
