"""A small training run as a child process that can be killed, and its checkpoints as they lie on disk."""

from __future__ import annotations

import dataclasses
import email
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
PATIENCE = 300.0
"""Seconds until a child that shows no sign of life is a failure: no time that is expected, and none that is measured.
"""


def write_corpus(folder: Path) -> Path:
    """Ten files of Python's standard library."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(Path(email.__file__).parent.glob("*.py"))[:10]:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@dataclasses.dataclass(frozen=True)
class SmallRun:
    """`experiments.train` of a tiny model on one device that saves every few steps."""

    workdir: Path
    corpus: Path
    cache: Path
    """Of compiled programs: what makes thirty restarts a matter of minutes."""
    save_every: int = 5

    @property
    def checkpoints(self) -> Path:
        return self.workdir / run.CHECKPOINTS

    def start(self, steps: int, *more: str) -> Child:
        """Starts, or goes on, until so many steps are done."""
        command = [
            sys.executable, "-m", "experiments.train", "--preset", "tiny-mfa", "--data.source", str(self.corpus),
            "--data.sequence-length", "32", "--data.batch-size", "8", "--data.held-out", "0.1", "--mesh.data", "1",
            "--optimizer.schedule", "constant", "--workdir", str(self.workdir), "--compilation-cache", str(self.cache),
            "--steps", str(steps), "--save-every", str(self.save_every), "--log-every", "5", "--eval-every", "0", *more]
        self.workdir.mkdir(parents=True, exist_ok=True)
        return Child(command, self.workdir / "stderr.txt")

    def finish(self, steps: int, *more: str) -> str:
        """Runs to the end; what it said. Raises `AssertionError` where that is not the end."""
        child = self.start(steps, *more)
        code, said = child.wait()
        assert code == 0, f"exit code {code}: {said}"
        return said

    def finished(self) -> list[int]:
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


class Child:
    """A process whose standard error goes to a file."""

    def __init__(self, command: list[str], errors: Path) -> None:
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        self._errors = errors
        with errors.open("wb") as file:
            self._process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=file)

    def until(self, condition: Callable[[], bool]) -> None:
        """Returns as soon as the condition holds, or the process has ended."""
        deadline = time.monotonic() + PATIENCE
        while self._process.poll() is None and not condition():
            if time.monotonic() > deadline:
                self._kill()
                raise AssertionError(f"nothing happened: {self.said()}")
            time.sleep(0.002)

    def stop(self, how: signal.Signals) -> tuple[int, str]:
        """Sends a signal; the exit code and what the process said."""
        self._process.send_signal(how)
        return self.wait()

    def wait(self) -> tuple[int, str]:
        """The exit code and what the process said."""
        try:
            return self._process.wait(PATIENCE), self.said()
        except subprocess.TimeoutExpired:
            self._kill()
            raise AssertionError(f"hangs: {self.said()}") from None

    def _kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def last_step(self) -> int:
        """The last step that it reported; 0 before the first."""
        return max((int(step) for step in re.findall(r"^step (\d+)/", self.said(), re.MULTILINE)), default=0)

    def said(self) -> str:
        return self._errors.read_text(errors="replace")


def resumed_at(said: str) -> int | None:
    """The step that a start went on from; None if it did not come that far, or began at 0."""
    found = re.search(r"resumed at step (\d+)", said)
    return int(found[1]) if found else None


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
