"""What befalls a run in one process, done to it for real: `python -m experiments.faults.single`.

    python -m experiments.faults.single --output experiments/results/faults
    python -m experiments.faults.single --kills 4 --terminations 1

Each fault is tried as often as its row says, and survived if nothing was lost: the run goes on from the newest
checkpoint that was complete, or the damage is told by name and what was good before stays good. Writes `single.json`
after each part, beside the parts that are in it already, and prints a table. Exit code 1 if anything was lost.
"""

from __future__ import annotations

import dataclasses
import functools
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from experiments import cli
from experiments.faults import damage
from experiments.faults.outcome import Outcome, Signals, measure
from experiments.faults.runs import LONG, SmallRun, differences, write_corpus


@dataclasses.dataclass(frozen=True)
class FaultsConfig(Signals):
    """How often, and where the counts go."""

    kills: int = 30
    """SIGKILLs of one run, a third of them each: at any moment of a start, between steps, in the middle of a save."""
    terminations: int = 5
    """SIGTERMs of the same run."""
    parts: tuple[Literal["signals", "checkpoints", "disk", "shards", "cache", "memory"], ...] = (
        "signals", "checkpoints", "disk", "shards", "cache", "memory")
    """What is tried."""
    workdir: str | None = None
    """Where the runs go; none for a temporary folder."""


# ---- signals ---------------------------------------------------------------------------------------------------

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
    steps = run.saved()[-1] + 2 * run.save_every
    run.finish(steps)
    alone = run.beside("alone", save_every=steps)
    alone.finish(steps)
    same = Outcome("parameters, optimizer, step and key at the end, bit for bit those of a run left alone")
    same.add(", ".join(differences(run.state().items, alone.state().items)) or None)
    same.notes = {"steps": steps, "kills while a save was under way": in_saves}
    losses = Outcome("losses told on the way, the same and each step once")
    told, wanted = run.losses(), alone.losses()
    losses.add(None if list(told.items()) == list(wanted.items()) else f"{told} and {wanted}")
    return [*outcomes.values(), same, losses]


def _interrupt(run: SmallRun, random: np.random.Generator, how: signal.Signals, mode: str, start: float) -> str | None:
    """Starts the run and interrupts it; what went wrong."""
    before = run.saved()[-1]
    job = run.start(LONG)
    if mode == MODES[0]:
        deadline = time.monotonic() + random.uniform(0, start)
        job.until(lambda: time.monotonic() > deadline)
    else:
        job.until(lambda: job.last_step() > 0)
        deadline = time.monotonic() + random.uniform(0, 1)
        job.until(lambda: time.monotonic() > deadline)
    if mode == MODES[2]:
        job.until(lambda: bool(run.unfinished()))
        deadline = time.monotonic() + random.uniform(0, 0.1)
        job.until(lambda: time.monotonic() > deadline)
    code, said = job.stop(how)
    if code != (0 if how == signal.SIGTERM else -how):
        return f"exit code {code}: {said}"
    if job.resumed_at() not in (None, before):
        return f"went on from step {job.resumed_at()}, and {before} was complete"
    after = run.saved()[-1]
    if how == signal.SIGTERM and after < job.last_step():
        return f"told to stop after step {job.last_step()}, saved {after}"
    return None if after >= before else f"step {before} is gone"


# ---- all of it -------------------------------------------------------------------------------------------------


def outcomes_of(part: str, config: FaultsConfig, run: SmallRun, folder: Path) -> list[Outcome]:
    """One part."""
    if part == "signals":
        return interrupted(run, config)
    if len(run.saved()) < 2:
        run.finish(3 * run.save_every)
    return {"checkpoints": damage.checkpoints, "disk": damage.full_disk, "shards": damage.shards,
            "cache": damage.compilation_cache, "memory": damage.device_memory}[part](run, folder)


def main() -> None:
    config = cli.parse(FaultsConfig)
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(config.workdir or temporary)
        run = SmallRun(folder / "run", write_corpus(folder / "corpus"), folder / "cache")
        measure("single", config, {part: functools.partial(outcomes_of, part, config, run, folder)
                                   for part in config.parts})


if __name__ == "__main__":
    cli.run(main)
