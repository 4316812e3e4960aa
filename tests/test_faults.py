"""What befalls a run in one process: the code of `experiments.faults.single`, a few times each."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.faults import damage
from experiments.faults.outcome import Outcome, table
from experiments.faults.runs import SmallRun, write_corpus
from experiments.faults.single import FaultsConfig, interrupted
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
def test_every_file_of_the_newest_checkpoint_damaged(
    killed: tuple[SmallRun, list[Outcome]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(damage, "DAMAGE", {"bit flipped": damage.flip})
    (outcome,) = damage.checkpoints(killed[0], tmp_path)
    assert not outcome.lost and outcome.tried > 30 and outcome.notes["previous used"] > 5


def test_lost_is_what_was_told() -> None:
    outcome = Outcome("a fault", notes={"where": "here"})
    outcome.add(None)
    outcome.add("step 5 is gone")
    assert (outcome.tried, outcome.survived, outcome.lost) == (2, 1, ["step 5 is gone"])
    assert table([outcome]).splitlines()[-1] == "| a fault | 2 | 1 | 1 | where: here |"


@pytest.mark.parametrize(("kills", "terminations"), [(-1, 0), (0, -1)])
def test_bad_counts(kills: int, terminations: int) -> None:
    with pytest.raises(ValueError, match="=-1: must not be negative"):
        FaultsConfig(kills=kills, terminations=terminations)
