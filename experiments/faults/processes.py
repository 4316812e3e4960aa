"""What befalls a run of several processes, done to it for real: `python -m experiments.faults.processes`.

    python -m experiments.faults.processes --output experiments/results/faults
    python -m experiments.faults.processes --kills 2 --terminations 1 --meshes data=4 tensor=4

First the same 20 steps by four processes and by one, for each mesh. Then one of four processes is killed, again and
again, and the run goes on with four or with two: survived where the others end by themselves within 60 s and name the
process that was lost, and the next start goes on from the newest complete checkpoint. One of four is told to stop:
survived where all save the same step. At the end the history must be that of a run that nothing befell: the loss of
each step, and the rows of each batch. Writes `processes.json` and prints tables. Exit code 1 if anything was lost.
"""

from __future__ import annotations

import dataclasses
import datetime
import email
import json
import os
import platform
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from experiments import cli
from experiments.faults.outcome import Outcome, table
from experiments.faults.recorded_train import wrong_batches
from experiments.faults.rehearsal import Rehearsal, names_the_lost

STEPS, TOLERANCE, NOTICE_SECONDS = 20, 1e-5, 60.0
LONG = 10**6
"""Steps that no run here reaches."""
MESHES = ("data=4", "fsdp=4", "tensor=4", "context=4", "expert=4", "data=2,fsdp=2", "fsdp=2,tensor=2",
          "context=2,tensor=2", "expert=2,fsdp=2", "data=2,fsdp=2,tensor=2")


@dataclasses.dataclass(frozen=True)
class FaultsConfig:
    """How often, and where the counts go."""

    kills: int = 8
    """SIGKILLs of one of four processes, each of them in turn; every other one while a checkpoint is being written."""
    terminations: int = 4
    """SIGTERMs of one of four processes, each of them in turn."""
    meshes: tuple[str, ...] = MESHES
    """Meshes to compare with one process; of 4 or 8 devices, on four processes."""
    seed: int = 0
    """Of the moments."""
    output: str | None = None
    """Folder of `processes.json`; none prints only."""

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

    def alone(self, name: str, steps: int, preset: str = "tiny-mfa") -> dict[int, float]:
        """Losses of one process with one device that nothing befalls."""
        run = self.run(name, preset, "--save-every", "100000")
        if len(run.losses()) < steps:
            job = run.start(1, steps, "--mesh.data", "1")
            assert job.wait() == 0, job.said()
        return {step: loss for step, loss in run.losses().items() if step <= steps}


def mesh_flags(mesh: str) -> list[str]:
    sizes = {"data": "1"} | dict(part.split("=") for part in mesh.split(","))
    return [word for axis, size in sizes.items() for word in (f"--mesh.{axis}", size)]


def difference(found: dict[int, float], expected: dict[int, float]) -> float:
    """The largest difference of a loss over the loss; infinite where a step is missing."""
    if found.keys() != expected.keys():
        return float("inf")
    return max(abs(found[step] - loss) / loss for step, loss in expected.items())


def equality(bench: Bench, meshes: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = []
    for mesh in meshes:
        preset = "tiny-mfa-moe" if "expert" in mesh else "tiny-mfa"
        expected = bench.alone(f"alone-{preset}", STEPS, preset)
        devices = 1
        for part in mesh.split(","):
            devices *= int(part.partition("=")[2])
        run = bench.run(f"mesh-{mesh}", preset, "--save-every", "100000")
        job = run.start(4, STEPS, *mesh_flags(mesh), launch=("--devices-per-process", str(devices // 4)))
        assert job.wait() == 0, job.said()
        rows.append({"mesh": mesh, "preset": preset, "processes": 4, "devices": devices, "steps": STEPS,
                     "largest relative difference of the loss": difference(run.losses(), expected),
                     "wrong batches": wrong_batches(run.workdir, [0])})
        print(rows[-1], flush=True)
    return rows


def saving(run: Rehearsal) -> bool:
    return any(".orbax" in path.name for path in (run.workdir / "checkpoints").iterdir())


def befall(bench: Bench, config: FaultsConfig) -> list[Outcome]:
    """Kills and terminations, all of one run."""
    moments = random.Random(config.seed)
    run = bench.run("befallen", "tiny-mfa", "--save-every", "3", "--keep-checkpoints", "3")
    four = mesh_flags("fsdp=2,tensor=2")
    killed = Outcome("SIGKILL of one of four processes, started again")
    termed = Outcome("SIGTERM to one of four processes")
    starts: list[int] = []
    seconds: list[float] = []
    for turn in range(config.kills):
        victim, meant = turn % 4, run.saved()[-1] if run.saved() else 0
        job = run.start(4, LONG, *four, launch=("--no-stop-others",))
        wait_for = max(run.losses(), default=0) + moments.randint(4, 9)
        job.until(lambda: max(run.losses(), default=0) >= wait_for)
        if turn % 2:
            job.until(lambda: saving(run))
        job.tell(victim, signal.SIGKILL)
        began = time.monotonic()
        job.wait()
        seconds.append(round(time.monotonic() - began, 1))
        starts.append(job.resumed_at())
        unnamed = [i for i in range(4) if i != victim and not names_the_lost(job.said(i), victim)]
        lost = ([f"{seconds[-1]} s"] if seconds[-1] > NOTICE_SECONDS else []) + [
            f"process {i} does not name {victim}: {job.said(i)[-300:]}" for i in unnamed] + (
            [f"resumed at {starts[-1]}, complete was {meant}"] if starts[-1] != meant else [])
        # Every other time the run goes on with two processes and another mesh before there are four again.
        lost += _with_two(run, starts) if turn % 4 in (1, 2) else []
        killed.add("; ".join(lost) or None)
        print(f"kill {turn + 1}: process {victim}, the others ended after {seconds[-1]} s; {lost or 'survived'}", flush=True)
    killed.notes = {"seconds until the others had ended": seconds, "victims": [i % 4 for i in range(config.kills)]}
    steps = []
    for turn in range(config.terminations):
        meant = run.saved()[-1] if run.saved() else 0
        job = run.start(4, LONG, *four)
        wait_for = max(run.losses(), default=0) + moments.randint(3, 8)
        job.until(lambda: max(run.losses(), default=0) >= wait_for)
        job.tell(turn % 4, signal.SIGTERM)
        code, starts = job.wait(), [*starts, job.resumed_at()]
        steps.append(run.saved()[-1])
        lost = ([f"exit code {code}"] if code else []) + (
            [] if f"stopped at step {steps[-1]};" in job.said(0) else [f"saved {steps[-1]}: {job.said(0)[-300:]}"]) + (
            [f"resumed at {starts[-1]}, complete was {meant}"] if starts[-1] != meant else [])
        termed.add("; ".join(lost) or None)
        print(f"termination {turn + 1}: process {turn % 4}, all saved {steps[-1]}; {lost or 'survived'}", flush=True)
    termed.notes = {"saved by all": steps}
    last = run.saved()[-1]
    history = Outcome("the history of all these starts against one process that nothing befell")
    found = {step: loss for step, loss in run.losses().items() if step <= last}
    gap = difference(found, bench.alone("alone-tiny-mfa", last))
    wrong = wrong_batches(run.workdir, starts)
    history.add("; ".join(wrong + ([f"losses differ by {gap:.1e}"] if gap > 10 * TOLERANCE else [])) or None)
    history.notes = {"steps": last, "starts": len(starts), "largest relative difference of the loss": gap,
                     "batches with other rows": len(wrong)}
    return [killed, termed, history]


def _with_two(run: Rehearsal, starts: list[int]) -> list[str]:
    meant = run.saved()[-1]
    job = run.start(2, meant + 4, *mesh_flags("tensor=2"))
    code = job.wait()
    starts.append(job.resumed_at())
    return ([f"two processes: exit code {code}: {job.said()[-300:]}"] if code else []) + (
        [f"two processes resumed at {starts[-1]}, complete was {meant}"] if starts[-1] != meant else [])


def main() -> None:
    config = cli.parse(FaultsConfig)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        equal = equality(bench, config.meshes)
        outcomes = befall(bench, config)
    found = {
        "date": datetime.date.today().isoformat(), "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "python": platform.python_version(), "jax": jax.__version__, "config": dataclasses.asdict(config),
        "faults": [{**dataclasses.asdict(outcome), "lost": len(outcome.lost), "what": outcome.lost}
                   for outcome in outcomes], "equality": equal}
    print(table(outcomes))
    if config.output is not None:
        Path(config.output).mkdir(parents=True, exist_ok=True)
        (Path(config.output) / "processes.json").write_text(json.dumps(found, indent=1) + "\n")
    apart = [row for row in equal
             if row["largest relative difference of the loss"] > TOLERANCE or row["wrong batches"]]
    if apart or any(outcome.lost for outcome in outcomes):
        print(f"lost: {[*apart, *(outcome.lost for outcome in outcomes if outcome.lost)]}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
