"""What befalls a run in one process: the code of `experiments.faults.single`, a few times each."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.faults import damage, runs
from experiments.faults.outcome import Outcome, Signals, measure, table
from experiments.faults.recorded_train import RecordedBatches, wrong_batches
from experiments.faults.runs import SmallRun, write_corpus
from experiments.faults.single import FaultsConfig, interrupted
from mfa_jax.config import DataConfig, TrainConfig, to_json
from mfa_jax.data import load_tokenizer, make_loader, prepare
from mfa_jax.train.run import CONFIG, DATA
from tests.test_checkpoint import collect_abandoned_reads  # noqa: F401  # a fixture of every test here, too

# Reads that orbax abandons beside one that fails complain when they are collected, as `tests/test_checkpoint.py` says;
# with forty files damaged, in more ways than the two that it names.
pytestmark = [pytest.mark.xdist_group("faults"),
              pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[SmallRun, list[Outcome]]:
    """A run after three kills, one of each kind, and a SIGTERM, finished."""
    folder = tmp_path_factory.mktemp("faults")
    run = SmallRun(folder / "run", write_corpus(folder / "corpus"), folder / "cache")
    return run, interrupted(run, FaultsConfig(kills=3, terminations=1))


@pytest.mark.slow
def test_a_run_that_is_killed_and_told_to_stop_ends_as_if_left_alone(killed: tuple[SmallRun, list[Outcome]]) -> None:
    outcomes = killed[1]
    assert not [line for outcome in outcomes for line in outcome.lost]
    assert [outcome.tried for outcome in outcomes] == [1] * 6


@pytest.mark.slow
def test_every_file_of_the_newest_checkpoint_damaged(killed: tuple[SmallRun, list[Outcome]], tmp_path: Path) -> None:
    """In every way: cut in half, emptied, a bit flipped, removed."""
    outcomes = damage.checkpoints(killed[0], tmp_path)
    assert len(outcomes) == 4 and not [line for outcome in outcomes for line in outcome.lost]
    for outcome in outcomes:
        assert outcome.tried > 30 and outcome.notes["previous used"] > 5, outcome


@pytest.mark.slow
def test_a_disk_that_is_full_stops_a_run_or_is_waited_for(
    killed: tuple[SmallRun, list[Outcome]], tmp_path: Path
) -> None:
    """A real one, of 24 MB."""
    (outcome,) = damage.full_disk(dataclasses.replace(killed[0], save_every=20), tmp_path)
    if outcome.skipped:
        pytest.skip(outcome.skipped)
    assert not outcome.lost and outcome.tried == 3


@pytest.mark.slow
def test_every_file_of_the_token_shards_damaged(
    killed: tuple[SmallRun, list[Outcome]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in one way, or it would take a minute."""
    kinds = iter(("bit flipped", "cut in half", "emptied"))
    harm = dict(damage.DAMAGE)
    monkeypatch.setattr(damage, "DAMAGE", {"each in its way": lambda path: harm[next(kinds)](path)})
    (outcome,) = damage.shards(killed[0], tmp_path)
    assert not outcome.lost and outcome.tried == 3 and not list(kinds)


@pytest.mark.slow
def test_a_device_that_is_out_of_memory_says_what_the_step_needs(
    killed: tuple[SmallRun, list[Outcome]], tmp_path: Path
) -> None:
    (outcome,) = damage.device_memory(killed[0], tmp_path)
    assert not outcome.lost and outcome.tried == 1
    assert "GiB temporaries" in outcome.notes["said"] and "model.remat=full" in outcome.notes["said"]


def test_lost_is_what_was_told() -> None:
    outcome = Outcome("a fault", notes={"where": "here"})
    outcome.add(None)
    outcome.add("step 5 is gone")
    assert (outcome.tried, outcome.survived, outcome.lost) == (2, 1, ["step 5 is gone"])
    assert table([outcome]).splitlines()[-1] == "| a fault | 2 | 1 | 1 | where: here |"


def test_a_part_of_a_record_is_replaced_when_it_is_complete(tmp_path: Path) -> None:
    def broken_off() -> Iterator[Outcome]:
        yield Outcome("other")
        raise KeyboardInterrupt

    config, file = Signals(0, 0, output=str(tmp_path)), tmp_path / "some.json"
    measure("some", config, {"a": lambda: [Outcome("first")], "b": lambda: [Outcome("second")]})
    before = json.loads(file.read_text())
    assert [part["outcomes"][0]["fault"] for part in before.values()] == ["first", "second"]
    with pytest.raises(KeyboardInterrupt):
        measure("some", config, {"a": broken_off})
    assert json.loads(file.read_text()) == before and list(tmp_path.iterdir()) == [file]
    measure("some", config, {"b": lambda: [Outcome("third")]})
    after = json.loads(file.read_text())
    assert after["a"] == before["a"] and after["b"]["outcomes"][0]["fault"] == "third"


def test_a_step_that_is_told_twice_is_no_history(tmp_path: Path) -> None:
    run = SmallRun(tmp_path, tmp_path, tmp_path)
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "validation_loss": 2.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run.losses() == {1: 3.0, 2: 2.0}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, lines[1]]))
    with pytest.raises(AssertionError, match="a step twice"):
        run.losses()


def test_a_batch_with_a_part_that_nobody_recorded_is_wrong(tmp_path: Path) -> None:
    data = DataConfig(source=str(write_corpus(tmp_path / "corpus")), sequence_length=32, batch_size=4)
    prepared = prepare(data, tmp_path / DATA, load_tokenizer("bytes"))
    (tmp_path / CONFIG).write_text(to_json(TrainConfig(workdir=str(tmp_path), data=data)))
    for process, batches in ((0, 4), (1, 3)):  # as where process 1 was killed
        labels = {"start": "first", "process": process, "part": process, "parts": 2}
        with contextlib.closing(RecordedBatches(
                make_loader(prepared, data, "train", process, 2), tmp_path / f"rows-{process}.jsonl", labels)) as drawn:
            for _ in range(batches):
                next(drawn)
    assert wrong_batches(tmp_path, [0]) == []
    (tmp_path / "rows-1.jsonl").unlink()
    assert wrong_batches(tmp_path, [0]) == [
        f"batch {number} of first: only parts [0] of 2 are recorded" for number in range(4)]


def test_nothing_goes_on_after_a_wait_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sleep = "import time; time.sleep(600)"
    launch = ("import subprocess, sys, time; "
              f"child = subprocess.Popen([sys.executable, '-c', {sleep!r}], start_new_session=True); "
              "print('process 0 of 1 is pid', child.pid, flush=True); time.sleep(600)")
    for wait in (lambda job: job.wait(), lambda job: job.until(lambda: False)):
        job = runs.Job([sys.executable, "-c", launch], tmp_path / "said.txt")
        assert job.until(lambda job=job: job.said().endswith("\n"))
        with monkeypatch.context() as impatient, pytest.raises(AssertionError, match="(hangs|happened): .*is pid"):
            impatient.setattr(runs, "PATIENCE", 0.1)
            wait(job)
        assert job._process.poll() is not None
        until_ended(int(job.said().split()[-1]))


def test_a_wait_for_what_does_not_come_ends_with_the_process(tmp_path: Path) -> None:
    job = runs.Job([sys.executable, "-c", "print('[1] step 7/9  loss 5.1')"], tmp_path / "said.txt")
    assert not job.until(lambda: job.last_step() > 7)
    assert job.wait() == (0, "[1] step 7/9  loss 5.1\n") and job.last_step() == 7 and job.resumed_at() is None
    assert job.said(1).startswith("step 7") and job.said(0) == ""


def until_ended(pid: int) -> None:
    """Gone, or a zombie that its new parent has not asked for its exit code; a kill takes a moment."""
    deadline = time.monotonic() + 60
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
            assert time.monotonic() < deadline, f"process {pid} goes on"
            time.sleep(0.01)


@pytest.mark.parametrize(("kills", "terminations"), [(-1, 0), (0, -1)])
def test_bad_counts(kills: int, terminations: int) -> None:
    with pytest.raises(ValueError, match="=-1: must not be negative"):
        FaultsConfig(kills=kills, terminations=terminations)
