"""What befalls a run in one process, done to it for real: `python -m experiments.faults.single`.

    python -m experiments.faults.single --output experiments/results/faults
    python -m experiments.faults.single --kills 4 --terminations 1

Each fault is tried as often as its row says, and survived if nothing was lost: the run goes on from the newest
checkpoint that was complete, or the damage is told by name and what was good before stays good. Writes `single.json`
after each part, beside the parts that are in it already, and prints a table. Exit code 1 if anything was lost.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from experiments import cli
from experiments.faults import damage
from experiments.faults.outcome import Outcome, table
from experiments.faults.runs import SmallRun, differences, resumed_at, write_corpus


@dataclasses.dataclass(frozen=True)
class FaultsConfig:
    """How often, and where the counts go."""

    kills: int = 30
    """SIGKILLs of one run, a third of them each: at any moment of a start, between steps, in the middle of a save."""
    terminations: int = 5
    """SIGTERMs of the same run."""
    seed: int = 0
    """Of the moments."""
    parts: tuple[Literal["signals", "checkpoints", "disk", "shards", "cache", "memory"], ...] = (
        "signals", "checkpoints", "disk", "shards", "cache", "memory")
    """What is tried."""
    output: str | None = None
    """Folder of `single.json`; none prints only."""
    workdir: str | None = None
    """Where the runs go; none for a temporary folder."""

    def __post_init__(self) -> None:
        for name in ("kills", "terminations"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative")


# ---- signals ---------------------------------------------------------------------------------------------------

LONG = 10**6
"""Steps that no run here reaches."""
MODES = ("any moment of a start", "between steps", "in a save")


def interrupted(run: SmallRun, config: FaultsConfig) -> list[Outcome]:
    """One run that is killed and told to stop again and again, and then finished; beside it one that is left alone."""
    random = np.random.default_rng(config.seed)
    run.finish(run.save_every)  # fills the cache of compiled programs
    began = time.monotonic()
    run.finish(2 * run.save_every)
    seconds_of_a_start = time.monotonic() - began
    kinds = [(signal.SIGKILL, MODES[i % len(MODES)]) for i in range(config.kills)]
    kinds += [(signal.SIGTERM, MODES[1])] * config.terminations
    outcomes = {key: Outcome(f"{key[0].name} {key[1]}") for key in dict.fromkeys(kinds)}
    in_saves = 0
    for count, number in enumerate(random.permutation(len(kinds)), 1):
        how, mode = kinds[number]
        print(f"{count} of {len(kinds)}: {how.name} {mode}", file=sys.stderr)
        left = run.unfinished()
        outcomes[how, mode].add(_interrupt(run, random, how, mode, seconds_of_a_start))
        in_saves += bool(run.unfinished() - left)
    steps = run.finished()[-1] + 2 * run.save_every
    run.finish(steps)
    alone = dataclasses.replace(run, workdir=run.workdir.with_name("alone"))
    alone.finish(steps, "--save-every", str(steps))
    same = Outcome("parameters, optimizer, step and key at the end, bit for bit those of a run left alone")
    same.add(", ".join(differences(run.state().items, alone.state().items)) or None)
    same.notes = {"steps": steps, "kills while a save was under way": in_saves}
    losses = Outcome("losses told on the way, the same and each step once")
    losses.add(None if _losses(run) == _losses(alone) else f"{_losses(run)} and {_losses(alone)}")
    return [*outcomes.values(), same, losses]


def _interrupt(run: SmallRun, random: np.random.Generator, how: signal.Signals, mode: str, start: float) -> str | None:
    """Starts the run and interrupts it; what went wrong."""
    before = run.finished()[-1]
    child = run.start(LONG)
    if mode == MODES[0]:
        deadline = time.monotonic() + random.uniform(0, start)
        child.until(lambda: time.monotonic() > deadline)
    else:
        child.until(lambda: child.last_step() > 0)
        deadline = time.monotonic() + random.uniform(0, 1)
        child.until(lambda: time.monotonic() > deadline)
    if mode == MODES[2]:
        child.until(lambda: bool(run.unfinished()))
        deadline = time.monotonic() + random.uniform(0, 0.1)
        child.until(lambda: time.monotonic() > deadline)
    code, said = child.stop(how)
    if code != (0 if how == signal.SIGTERM else -how):
        return f"exit code {code}: {said}"
    resumed = resumed_at(said)
    if resumed not in (None, before):
        return f"went on from step {resumed}, and {before} was complete"
    after = run.finished()[-1]
    if how == signal.SIGTERM and after < child.last_step():
        return f"told to stop after step {child.last_step()}, saved {after}"
    return None if after >= before else f"step {before} is gone"


def _losses(run: SmallRun) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run.workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


# ---- all of it -------------------------------------------------------------------------------------------------


def measure(part: str, config: FaultsConfig, run: SmallRun, folder: Path) -> list[Outcome]:
    """One part."""
    if part == "signals":
        return interrupted(run, config)
    if len(run.finished()) < 2:
        run.finish(3 * run.save_every)
    return {"checkpoints": damage.checkpoints, "disk": damage.full_disk, "shards": damage.shards,
            "cache": damage.compilation_cache, "memory": damage.device_memory}[part](run, folder)


def main() -> None:
    config = cli.parse(FaultsConfig)
    jax.config.update("jax_platforms", "cpu")
    path = None if config.output is None else Path(config.output, "single.json")
    records: dict[str, Any] = json.loads(path.read_text()) if path is not None and path.exists() else {}
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(config.workdir or temporary)
        run = SmallRun(folder / "run", write_corpus(folder / "corpus"), folder / "cache")
        for part in config.parts:
            print(f"{part} ...", file=sys.stderr)
            began = time.monotonic()
            found = measure(part, config, run, folder)
            outcomes += found
            records[part] = {
                "date": datetime.date.today().isoformat(), "jax": jax.__version__,
                "python": platform.python_version(), "cpus": os.cpu_count(), "seed": config.seed,
                "seconds": round(time.monotonic() - began), "outcomes": [dataclasses.asdict(o) for o in found]}
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(records, indent=2) + "\n")
    print(table(outcomes))
    if any(outcome.lost for outcome in outcomes):
        raise ArithmeticError("something was lost: see the table")


if __name__ == "__main__":
    cli.run(main)
