"""Damage to what a run keeps on disk, a disk that is full, a device whose memory does not suffice."""

from __future__ import annotations

import dataclasses
import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from experiments.faults.outcome import Outcome
from experiments.faults.runs import SmallRun, differences
from mfa_jax.train import run as run_folder
from mfa_jax.train.checkpoint import Checkpoints

# ---- to a file -------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    """One bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "cut in half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "bit flipped": flip,
    "removed": Path.unlink,
}


def copy_of(run: SmallRun, folder: Path) -> SmallRun:
    """The run and its folder, to be damaged."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run.workdir, folder)
    return dataclasses.replace(run, workdir=folder)


# ---- checkpoints -----------------------------------------------------------------------------------------------


def checkpoints(run: SmallRun, folder: Path) -> list[Outcome]:
    """Every file of the newest checkpoint, damaged in every way, each alone, and read by a writer.

    Survived is only: the damage is reported with a reason, the step moved aside and the one before read, exact; or the
    newest is read, every leaf exact: the file holds nothing that is needed.
    """
    before, newest = run.saved()[-2:]
    wanted = {step: run.state(step) for step in (before, newest)}
    layout = run.layout()
    outcomes = []
    for kind, harm in DAMAGE.items():
        outcome = Outcome(f"a file of the newest checkpoint {kind}", notes={"previous used": 0, "not needed": 0})
        for path in sorted(p for p in (run.checkpoints / str(newest)).rglob("*") if p.is_file()):
            if path.stat().st_size < 2 and kind != "removed":
                continue
            hurt = copy_of(run, folder / "hurt")
            name = path.relative_to(run.checkpoints)
            harm(hurt.checkpoints / name)
            try:
                with Checkpoints(hurt.checkpoints) as store:
                    found = store.restore(layout)
                assert found is not None and found.step in wanted, f"read {found and found.step}"
            except Exception as error:  # whatever it is, it is counted and told
                outcome.add(f"{name}: {type(error).__name__}: {error}")
                continue
            wrong = differences(found.items, wanted[found.step].items)
            told = found.step == newest or (bool(found.skipped.get(newest)) and not (
                hurt.checkpoints / str(newest)).exists())
            if wrong or not told:
                outcome.add(f"{name}: step {found.step}, {found.skipped}, {wrong}")
                continue
            outcome.add(None)
            outcome.notes["previous used" if found.step == before else "not needed"] += 1
        outcomes.append(outcome)
    return outcomes


# ---- a full disk -----------------------------------------------------------------------------------------------


def full_disk(run: SmallRun, folder: Path) -> list[Outcome]:
    """Checkpoints on a tmpfs that fills up: the run stops and says so, or goes on and saves once there is room."""
    outcome = Outcome("the disk full while saving: stop, go on until there is room, go on to the end")
    full = dataclasses.replace(run, workdir=folder / "full")
    full.checkpoints.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(full.checkpoints)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        outcome.skipped = "a tmpfs cannot be mounted here"
        return [outcome]
    try:
        _fill_and_go_on(full, folder, outcome)
    finally:
        subprocess.run(["umount", str(full.checkpoints)], check=True)
    return [outcome]


def _fill_and_go_on(full: SmallRun, folder: Path, outcome: Outcome) -> None:
    full.finish(10)
    good = full.state(10)
    filler = full.checkpoints / "filler.taken"
    free = shutil.disk_usage(full.checkpoints).free
    filler.write_bytes(bytes(free - 2**18))

    def kept() -> str | None:
        left = full.saved()
        return None if left[-1] == 10 and not differences(full.state(10).items, good.items) else f"there is {left}"

    for choice in ("stop", "continue"):
        code, said = full.start(40, "--on-save-failure", choice).wait()
        told = code == 2 and "No space left on device" in said  # also at the end: the last save has to succeed
        goes_on = "step 40/40" in said
        outcome.add(kept() if told and goes_on == (choice == "continue") else f"{choice}: exit code {code}: {said}")
    job = full.start(60, "--on-save-failure", "continue")
    job.until(lambda: "was not written" in job.said())
    filler.unlink()
    code, said = job.wait()
    alone = dataclasses.replace(full, workdir=folder / "never-full")
    alone.finish(60)
    wrong = differences(full.state().items, alone.state().items)
    outcome.add(None if code == 0 and not wrong else f"after there was room: exit code {code}: {said} {wrong}")


# ---- token shards ----------------------------------------------------------------------------------------------


def shards(run: SmallRun, folder: Path) -> list[Outcome]:
    """Each file of the training shards, damaged in every way: the run ends and names the file."""
    outcomes = []
    steps = run.saved()[-1] + 200  # more than an epoch of the corpus
    for kind, harm in DAMAGE.items():
        outcome = Outcome(f"a file of the token shards {kind}")
        for name in ("train.bin", "train.offsets.npy", "train.bin.crc32.npy"):
            hurt = copy_of(run, folder / "hurt")
            harm(hurt.workdir / run_folder.DATA / name)
            code, said = hurt.start(steps).wait()
            outcome.add(None if code == 2 and name.removesuffix(".crc32.npy") in said and "Traceback" not in said
                        else f"{name}: exit code {code}: {said}")
        outcomes.append(outcome)
    return outcomes


# ---- compiled programs, memory ---------------------------------------------------------------------------------


def compilation_cache(run: SmallRun, folder: Path) -> list[Outcome]:
    """Every entry of the cache of compiled programs cut in half, as a kill may leave it: compiled again."""
    outcome = Outcome("the entries of the compilation cache cut in half")
    hurt = dataclasses.replace(copy_of(run, folder / "hurt"), cache=folder / "hurt-cache")
    shutil.copytree(run.cache, hurt.cache)
    for path in hurt.cache.iterdir():
        os.truncate(path, path.stat().st_size // 2)
    before = run.saved()[-1]
    job = hurt.start(before + 5)
    code, said = job.wait()
    outcome.add(None if code == 0 and job.resumed_at() == before else f"exit code {code}: {said}")
    return [outcome]


def device_memory(run: SmallRun, folder: Path) -> list[Outcome]:
    """Rows of 65536 tokens and all scores in memory: XLA's allocator for CPUs really refuses it, in the step itself.

    What a device has to give is not known on a CPU; that part of the message needs a GPU or TPU.
    """
    outcome = Outcome("a device out of memory in a step")
    big = dataclasses.replace(run, workdir=folder / "big")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (64 * 2**30, before[1]))  # for the child: however much this machine has
    try:
        code, said = big.start(1, "--data.sequence-length", "65536", "--model.attention-implementation", "dense").wait()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    told = "a device ran out of memory: a training step needs" in said and "RESOURCE_EXHAUSTED" in said
    outcome.add(None if code == 2 and told and "Traceback" not in said else f"exit code {code}: {said}")
    outcome.notes = {"said": said.strip().splitlines()[-1]}
    return [outcome]
