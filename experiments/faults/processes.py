"""What befalls a run of several processes, done to it for real: `python -m experiments.faults.processes`.

    python -m experiments.faults.processes --output experiments/results/faults
    python -m experiments.faults.processes --kills 0 --terminations 0 --meshes data=4 tensor=4

One of four processes is killed, again and again, and the run goes on with four or with two: survived where the others
end by themselves within 60 s and name the process that was lost, and each start goes on from the newest checkpoint that
was complete. One of four is told to stop: survived where all save the same step. At the end the history must be that of
a run that nothing befell: the loss of each step, and the rows of each batch. Then the same 20 steps by four processes
and by one, for each mesh. Writes `processes.json` after each of these, and prints a table. Exit code 1 if anything was
lost.
"""

from __future__ import annotations

import dataclasses
import math
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from experiments import cli
from experiments.faults.outcome import Outcome, Signals, measure
from experiments.faults.recorded_train import wrong_batches
from experiments.faults.runs import LONG, Job, SmallRun, names_the_lost, write_corpus

STEPS, TOLERANCE, NOTICE_SECONDS = 20, 1e-5, 60.0
MESHES = ("data=4", "fsdp=4", "tensor=4", "context=4", "expert=4", "data=2,fsdp=2,tensor=2", "context=2,tensor=2",
          "expert=2,fsdp=2")


@dataclasses.dataclass(frozen=True)
class FaultsConfig(Signals):
    """How often, and where the counts go."""

    kills: int = 6
    """SIGKILLs of one of four processes, each of them in turn; every other one while a checkpoint is being written."""
    terminations: int = 4
    """SIGTERMs of one of four processes, each of them in turn."""
    meshes: tuple[str, ...] = MESHES
    """Meshes to compare with one process; of 4 or 8 devices, on four processes."""


def mesh_flags(mesh: str) -> tuple[str, ...]:
    sizes = {"data": "1"} | dict(part.split("=") for part in mesh.split(","))
    return tuple(word for axis, size in sizes.items() for word in (f"--mesh.{axis}", size))


def difference(found: dict[int, float], expected: dict[int, float]) -> float:
    """The largest difference of a loss over the loss; infinite where a step is missing."""
    if found.keys() != expected.keys():
        return math.inf
    return max(abs(found[step] - loss) / loss for step, loss in expected.items())


def compared(outcome: Outcome, run: SmallRun, resumed_at: list[int], expected: dict[int, float]) -> Outcome:
    """Adds whether losses and batches of a run are those of one that nothing befell."""
    last = max(expected)
    apart = difference({step: loss for step, loss in run.losses().items() if step <= last}, expected)
    wrong = wrong_batches(run.workdir, resumed_at)
    outcome.add("; ".join(wrong + ([f"losses differ by {apart:.1e}"] if apart > TOLERANCE else [])) or None)
    outcome.notes |= {"steps": last, "largest relative difference of a loss": apart,
                      "batches with other rows": len(wrong)}
    return outcome


# ---- the same on every mesh ------------------------------------------------------------------------------------


def equality(base: SmallRun, meshes: tuple[str, ...]) -> Iterator[Outcome]:
    """The same steps by four processes on each mesh, against one process."""
    for mesh in meshes:
        preset = "tiny-mfa-moe" if "expert" in mesh else "tiny-mfa"
        # With heads that `tensor` can split.
        flags = ("--preset", preset, "--model.attention.num-heads", "8")
        alone = base.beside(f"alone-{preset}", save_every=LONG, flags=flags)
        if not alone.losses():
            alone.finish(STEPS)
        devices = math.prod(int(part.partition("=")[2]) for part in mesh.split(","))
        run = base.beside(f"mesh-{mesh}", save_every=LONG, flags=(*flags, *mesh_flags(mesh)))
        run.finish(STEPS, processes=4, launch=("--devices-per-process", str(devices // 4)))
        outcome = Outcome(f"{preset} over {mesh}, four processes against one", notes={"devices": devices})
        yield compared(outcome, run, [0], alone.losses())


# ---- signals ---------------------------------------------------------------------------------------------------


class Befallen:
    """One run of many starts, and what befalls it."""

    def __init__(self, base: SmallRun, seed: int) -> None:
        self.run = base.beside("befallen", save_every=3, flags=(*base.flags, "--keep-checkpoints", "3"))
        self.moments = random.Random(seed)
        self.resumed_at: list[int] = []
        self.seconds: list[float] = []

    def kill(self, victim: int, in_a_save: bool) -> list[str]:
        """SIGKILL to one of four; what was lost."""
        job, complete = self._start_four("--no-stop-others")
        if in_a_save:
            left = self.run.unfinished()
            self._wait(job, lambda: bool(self.run.unfinished() - left))
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
        (code, _), step = job.wait(), self.run.saved()[-1]
        lost = [f"exit code {code}"] if code else []
        if f"stopped at step {step};" not in job.said(0):
            lost.append(f"saved {step}: {job.said(0)[-300:]}")
        return lost + self._not_resumed(job, complete)

    def go_on_with_two(self) -> list[str]:
        """A few steps on another mesh; what was lost."""
        complete = self.run.saved()[-1]
        job = self.run.start(complete + 4, *mesh_flags("tensor=2"), processes=2)
        code, said = job.wait()
        return ([f"two processes: exit code {code}: {said[-300:]}"] if code else []) + self._not_resumed(job, complete)

    def _start_four(self, *launch: str) -> tuple[Job, int]:
        """Four processes that have done a few steps, and the newest checkpoint that was complete before."""
        complete = max(self.run.saved(), default=0)
        steps = max(self.run.losses(), default=0) + self.moments.randint(4, 9)
        job = self.run.start(LONG, *mesh_flags("fsdp=2,tensor=2"), processes=4, launch=launch)
        self._wait(job, lambda: job.last_step() >= steps)
        return job, complete

    def _wait(self, job: Job, condition: Callable[[], bool]) -> None:
        assert job.until(condition), job.said()

    def _not_resumed(self, job: Job, complete: int) -> list[str]:
        self.resumed_at.append(job.resumed_at() or 0)
        return [] if self.resumed_at[-1] == complete else [
            f"resumed at {self.resumed_at[-1]}, complete was {complete}"]


def befall(base: SmallRun, config: FaultsConfig) -> Iterator[Outcome]:
    """Kills and terminations, all of one run, and what became of its history."""
    befallen = Befallen(base, config.seed)
    killed = Outcome("SIGKILL of one of four processes, started again with four or with two")
    for turn in range(config.kills):
        lost = befallen.kill(turn % 4, in_a_save=turn % 2 == 1)
        lost += befallen.go_on_with_two() if turn % 4 in (1, 2) else []
        killed.add("; ".join(lost) or None)
        print(f"kill {turn + 1}: {befallen.seconds[-1]} s; {lost or 'survived'}", file=sys.stderr)
    killed.notes = {"seconds until the others had ended": befallen.seconds}
    yield killed
    told = Outcome("SIGTERM to one of four processes: all save the same step")
    for turn in range(config.terminations):
        told.add("; ".join(befallen.terminate(turn % 4)) or None)
        print(f"termination {turn + 1}: {told.lost or 'survived'}", file=sys.stderr)
    yield told
    alone, last = base.beside("alone", save_every=LONG), befallen.run.saved()[-1]
    alone.finish(last)
    outcome = Outcome("all these starts together, against one process that nothing befell",
                      notes={"starts": len(befallen.resumed_at)})
    yield compared(outcome, befallen.run, befallen.resumed_at, alone.losses())


def main() -> None:
    config = cli.parse(FaultsConfig)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = SmallRun(folder / "run", write_corpus(folder / "corpus"), folder / "cache")
        measure("processes", config, {
            **({"signals": lambda: befall(base, config)} if config.kills or config.terminations else {}),
            **({"meshes": lambda: equality(base, config.meshes)} if config.meshes else {})})


if __name__ == "__main__":
    cli.run(main)
