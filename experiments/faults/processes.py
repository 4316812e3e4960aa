"""What befalls a run of several processes, done to it for real: `python -m experiments.faults.processes`.

    python -m experiments.faults.processes --output experiments/results/faults
    python -m experiments.faults.processes --kills 0 --terminations 0 --meshes data=4 tensor=4

One of four processes is killed, again and again, and the run goes on with four or with two: survived where the others
end by themselves within 60 s and name the process that was lost, and each start goes on from the newest checkpoint that
was complete. One of four is told to stop: survived where all save the same step. At the end the history must be that of
a run that nothing befell: the loss of each step, and the rows of each batch. Then the same 20 steps by four processes
and by one, for each mesh. Writes `processes.json` and `processes_equality.json`, and prints a table. Exit code 1 if
anything was lost.
"""

from __future__ import annotations

import dataclasses
import datetime
import email
import json
import math
import os
import platform
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from experiments import cli
from experiments.faults.outcome import Outcome, table
from experiments.faults.recorded_train import wrong_batches
from experiments.faults.rehearsal import Job, Rehearsal, names_the_lost

STEPS, TOLERANCE, NOTICE_SECONDS = 20, 1e-5, 60.0
LONG = 10**6
"""Steps that no run here reaches."""
MESHES = ("data=4", "fsdp=4", "tensor=4", "context=4", "expert=4", "data=2,fsdp=2,tensor=2", "context=2,tensor=2",
          "expert=2,fsdp=2")


@dataclasses.dataclass(frozen=True)
class FaultsConfig:
    """How often, and where the counts go."""

    kills: int = 6
    """SIGKILLs of one of four processes, each of them in turn; every other one while a checkpoint is being written."""
    terminations: int = 4
    """SIGTERMs of one of four processes, each of them in turn."""
    meshes: tuple[str, ...] = MESHES
    """Meshes to compare with one process; of 4 or 8 devices, on four processes."""
    seed: int = 0
    """Of the moments."""
    output: str | None = None
    """Folder of the JSON files; none prints only."""

    def __post_init__(self) -> None:
        for name in ("kills", "terminations"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative")


class Bench:
    """Where the runs lie."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.corpus = folder / "corpus"
        self.corpus.mkdir()
        for path in sorted(Path(email.__file__).parent.glob("*.py"))[:10]:
            (self.corpus / path.name).write_bytes(path.read_bytes())

    def run(self, name: str, preset: str = "tiny-mfa", *flags: str) -> Rehearsal:
        return Rehearsal(self.folder / name, self.corpus, self.folder / "cache", "--preset", preset, *flags)

    def alone(self, name: str, steps: int, preset: str = "tiny-mfa", *flags: str) -> dict[int, float]:
        """Losses of one process with one device that nothing befalls."""
        run = self.run(name, preset, "--save-every", "100000", *flags)
        if len(run.losses()) < steps:
            job = run.start(1, steps, "--mesh.data", "1")
            assert job.wait() == 0, job.said()
        return {step: loss for step, loss in run.losses().items() if step <= steps}


EIGHT_HEADS = ("--model.attention.num-heads", "8")
"""Of the models that meshes are compared with, so that `tensor` can split them."""


def mesh_flags(mesh: str) -> list[str]:
    sizes = {"data": "1"} | dict(part.split("=") for part in mesh.split(","))
    return [word for axis, size in sizes.items() for word in (f"--mesh.{axis}", size)]


def difference(found: dict[int, float], expected: dict[int, float]) -> float:
    """The largest difference of a loss over the loss; infinite where a step is missing."""
    if found.keys() != expected.keys():
        return float("inf")
    return max(abs(found[step] - loss) / loss for step, loss in expected.items())


def equality(bench: Bench, meshes: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The same steps by four processes on each mesh, against one process."""
    for mesh in meshes:
        preset = "tiny-mfa-moe" if "expert" in mesh else "tiny-mfa"
        expected = bench.alone(f"eight-{preset}", STEPS, preset, *EIGHT_HEADS)
        devices = math.prod(int(part.partition("=")[2]) for part in mesh.split(","))
        run = bench.run(f"mesh-{mesh}", preset, "--save-every", "100000", *EIGHT_HEADS)
        job = run.start(4, STEPS, *mesh_flags(mesh), launch=("--devices-per-process", str(devices // 4)))
        assert job.wait() == 0, job.said()
        yield {"mesh": mesh, "preset": preset, "processes": 4, "devices": devices, "steps": STEPS,
               "largest relative difference of a loss": difference(run.losses(), expected),
               "batches with other rows": len(wrong_batches(run.workdir, [0]))}


class Befallen:
    """One run of many starts, and what befalls it."""

    def __init__(self, bench: Bench, seed: int) -> None:
        self.run = bench.run("befallen", "tiny-mfa", "--save-every", "3", "--keep-checkpoints", "3")
        self.moments = random.Random(seed)
        self.resumed_at: list[int] = []
        self.seconds: list[float] = []

    def kill(self, victim: int, in_a_save: bool) -> list[str]:
        """SIGKILL to one of four; what was lost."""
        job, complete = self._start_four("--no-stop-others")
        if in_a_save:
            job.until(self._saving)
        job.tell(victim, signal.SIGKILL)
        began = time.monotonic()
        job.wait()
        self.seconds.append(round(time.monotonic() - began, 1))
        lost = [f"process {i} does not name {victim}: {job.said(i)[-300:]}"
                for i in range(4) if i != victim and not names_the_lost(job.said(i), victim)]
        if self.seconds[-1] > NOTICE_SECONDS:
            lost.append(f"the others ended after {self.seconds[-1]} s")
        return lost + self._not_resumed(job, complete)

    def terminate(self, victim: int) -> list[str]:
        """SIGTERM to one of four; what was lost."""
        job, complete = self._start_four()
        job.tell(victim, signal.SIGTERM)
        code, step = job.wait(), self.run.saved()[-1]
        lost = [f"exit code {code}"] if code else []
        if f"stopped at step {step};" not in job.said(0):
            lost.append(f"saved {step}: {job.said(0)[-300:]}")
        return lost + self._not_resumed(job, complete)

    def go_on_with_two(self) -> list[str]:
        """A few steps on another mesh; what was lost."""
        complete = self.run.saved()[-1]
        job = self.run.start(2, complete + 4, *mesh_flags("tensor=2"))
        code = job.wait()
        return ([f"two processes: exit code {code}: {job.said()[-300:]}"] if code else []) + self._not_resumed(
            job, complete)

    def _start_four(self, *launch: str) -> tuple[Job, int]:
        """Four processes that have done a few steps, and the newest checkpoint that was complete before."""
        complete = self.run.saved()[-1] if self.run.saved() else 0
        steps = max(self.run.losses(), default=0) + self.moments.randint(4, 9)
        job = self.run.start(4, LONG, *mesh_flags("fsdp=2,tensor=2"), launch=launch)
        job.until(lambda: job.trained() and max(self.run.losses(), default=0) >= steps)
        return job, complete

    def _saving(self) -> bool:
        return any(".orbax" in path.name for path in (self.run.workdir / "checkpoints").iterdir())

    def _not_resumed(self, job: Job, complete: int) -> list[str]:
        self.resumed_at.append(job.resumed_at())
        return [] if job.resumed_at() == complete else [f"resumed at {job.resumed_at()}, complete was {complete}"]


def befall(bench: Bench, config: FaultsConfig) -> Iterator[Outcome]:
    """Kills and terminations, all of one run, and what became of its history."""
    befallen = Befallen(bench, config.seed)
    killed = Outcome("SIGKILL of one of four processes, started again with four or with two")
    for turn in range(config.kills):
        lost = befallen.kill(turn % 4, in_a_save=turn % 2 == 1)
        lost += befallen.go_on_with_two() if turn % 4 in (1, 2) else []
        killed.add("; ".join(lost) or None)
        print(f"kill {turn + 1}: {befallen.seconds[-1]} s; {lost or 'survived'}", flush=True)
    killed.notes = {"seconds until the others had ended": befallen.seconds}
    yield killed
    told = Outcome("SIGTERM to one of four processes: all save the same step")
    for turn in range(config.terminations):
        told.add("; ".join(befallen.terminate(turn % 4)) or None)
        print(f"termination {turn + 1}: {told.lost or 'survived'}", flush=True)
    yield told
    yield history(bench, befallen)


def history(bench: Bench, befallen: Befallen) -> Outcome:
    last = befallen.run.saved()[-1]
    found = {step: loss for step, loss in befallen.run.losses().items() if step <= last}
    apart = difference(found, bench.alone("alone-tiny-mfa", last))
    wrong = wrong_batches(befallen.run.workdir, befallen.resumed_at)
    outcome = Outcome("all these starts together, against one process that nothing befell")
    outcome.add("; ".join(wrong + ([f"losses differ by {apart:.1e}"] if apart > TOLERANCE else [])) or None)
    outcome.notes = {"starts": len(befallen.resumed_at), "steps": last, "largest relative difference of a loss": apart,
                     "batches with other rows": len(wrong)}
    return outcome


def main() -> None:
    config = cli.parse(FaultsConfig)
    head = {
        "date": datetime.date.today().isoformat(), "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "python": platform.python_version(), "jax": jax.__version__,
        "config": {name: value for name, value in dataclasses.asdict(config).items() if name != "output"}}

    def keep(name: str, part: str, rows: list[dict[str, Any]]) -> None:
        if config.output is not None:
            Path(config.output).mkdir(parents=True, exist_ok=True)
            (Path(config.output) / name).write_text(json.dumps({**head, part: rows}, indent=2) + "\n")

    outcomes: list[Outcome] = []
    equal: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for outcome in befall(bench, config) if config.kills or config.terminations else ():
            outcomes.append(outcome)
            keep("processes.json", "faults", [
                {**dataclasses.asdict(one), "lost": len(one.lost), "what": one.lost} for one in outcomes])
        for row in equality(bench, config.meshes):
            equal.append(row)
            print(row, flush=True)
            keep("processes_equality.json", "meshes", equal)
    print(table(outcomes))
    apart = [row for row in equal if row["largest relative difference of a loss"] > TOLERANCE
             or row["batches with other rows"]]
    if apart or any(outcome.lost for outcome in outcomes):
        print(f"lost: {[*apart, *(outcome.lost for outcome in outcomes if outcome.lost)]}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
