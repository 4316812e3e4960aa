"""What goes wrong beside a training step loses nothing that was done, and what cannot work is told before it costs."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments.train import parse
from mfa_jax.config import MeshConfig, OptimizerConfig, TrainConfig, to_dict, to_json
from mfa_jax.data import Batches, ByteTokenizer
from mfa_jax.data.pipeline import require_same_order
from mfa_jax.data.shards import DamagedShardError
from mfa_jax.generate import SamplingConfig, generate
from mfa_jax.train import orbax_io, parts, run
from mfa_jax.train.checkpoint import Checkpoints, CheckpointWriteError
from mfa_jax.train.integrity import sealed
from mfa_jax.train.loop import train
from tests.contract import model_config
from tests.test_train import config_for, corpus, metric_lines, train_on_one  # noqa: F401  # a fixture
from tests.test_train_moe import MOE

pytestmark = pytest.mark.xdist_group("train")


def saved_steps(workdir: Path) -> list[int]:
    with Checkpoints(workdir / run.CHECKPOINTS, read_only=True) as checkpoints:
        return checkpoints.steps()


def failing_waits(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """The first waits that have a save to wait for find that it was not written."""
    wait, left = Checkpoints.wait, [times]

    def waits(self: Checkpoints) -> None:
        wait(self)
        if self._saving >= 0 and left[0]:
            left[0] -= 1
            raise CheckpointWriteError(28, f"checkpoint of step {self._saving} was not written: No space", "there")

    monkeypatch.setattr(Checkpoints, "wait", waits)


@pytest.mark.parametrize("choice", ["stop", "continue"])
def test_after_a_save_that_failed_the_next_step_is_saved_before_anything_else(
        corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choice: str,  # noqa: F811
        caplog: pytest.LogCaptureFixture) -> None:
    failing_waits(monkeypatch, 1)
    config = config_for(tmp_path, corpus, eval_every=0, on_save_failure=choice, keep_checkpoints=9)
    if choice == "stop":
        with pytest.raises(CheckpointWriteError, match="step 2 was not written"):
            train_on_one(config)
        assert saved_steps(tmp_path)[-1] == 4
    else:
        assert train_on_one(config).metrics["failed_saves"] == 1
        assert saved_steps(tmp_path)[-1] == 6 and "step 2 was not written: No space; the run goes on" in caplog.text


def test_a_failed_save_is_noticed_with_the_next_line_of_metrics(
        corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Not a whole `save_every` later, and what was trained meanwhile is saved."""
    failing_waits(monkeypatch, 1)
    is_over = orbax_io.Manager.is_over

    def waits(manager: orbax_io.Manager) -> bool:  # as where steps are slow beside saves
        while not is_over(manager):
            time.sleep(0.01)
        return True

    monkeypatch.setattr(orbax_io.Manager, "is_over", waits)
    with pytest.raises(CheckpointWriteError, match="step 5 was not written"):
        train_on_one(config_for(tmp_path, corpus, steps=20, save_every=5, eval_every=0))
    assert saved_steps(tmp_path)[-1] == 6


def test_a_failed_save_before_the_last_is_told_and_does_not_undo_it(
        corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture  # noqa: F811
) -> None:
    failing_waits(monkeypatch, 1)
    result = train_on_one(config_for(tmp_path, corpus, steps=4, eval_every=0))
    assert result.step == 4 and saved_steps(tmp_path)[-1] == 4 and "step 2 was not written" in caplog.text


def test_an_evaluation_that_fails_loses_no_step(
        corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    build = parts.Parts.build

    def broken(*given: Any) -> parts.Parts:
        def evaluate(_: Any) -> dict[str, float]:
            raise DamagedShardError("held_out.bin: not what was written")

        return dataclasses.replace(build(*given), evaluate=evaluate)

    monkeypatch.setattr(parts.Parts, "build", broken)
    with pytest.raises(DamagedShardError, match="held_out.bin"):
        train_on_one(config_for(tmp_path, corpus, save_every=100))
    assert saved_steps(tmp_path) == [3]


def test_a_batch_that_cannot_be_read_loses_no_step_before_it(
        corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    take, taken = Batches.__next__, []

    def read(self: Batches) -> Any:
        taken.append(None)
        if len(taken) == 4:
            raise DamagedShardError("train.bin: not what was written")
        return take(self)

    monkeypatch.setattr(Batches, "__next__", read)
    config = config_for(tmp_path, corpus, save_every=100, eval_every=0)
    with pytest.raises(DamagedShardError, match="train.bin"):
        train_on_one(config)
    assert saved_steps(tmp_path) == [3] and metric_lines(str(tmp_path))[-1]["step"] == 2
    assert train_on_one(config).step == 6, "with the file restored it goes on"


def test_a_trace_that_cannot_be_written_is_told_and_ends_nothing(
        corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    (tmp_path / "profile").write_text("a file where the folder would be")
    assert train_on_one(config_for(tmp_path, corpus, profile=(2, 2), eval_every=0)).step == 6
    assert "profile: no trace" in caplog.text


def test_evaluation_in_the_parts_of_a_step_gives_the_same(corpus: Path, tmp_path: Path) -> None:  # noqa: F811
    found = [train_on_one(config_for(tmp_path / str(parts), corpus, steps=1, accumulate=parts)).metrics
             for parts in (1, 4)]
    assert found[0]["eval_loss"] == pytest.approx(found[1]["eval_loss"], rel=1e-5)


def test_an_evaluation_computes_one_batch_at_a_time(
        corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Of hundreds in flight at once the threads of eight CPU devices wait for each other until XLA ends the process."""
    wait, waited = jax.block_until_ready, list[int]()

    def waiting(x: Any) -> Any:
        waited.extend([len(x)] if isinstance(x, list) else [])
        return wait(x)

    monkeypatch.setattr(jax, "block_until_ready", waiting)
    train_on_one(config_for(tmp_path, corpus, steps=1, eval_batches=5))
    assert waited == [0, 1, 1, 1, 1]


@pytest.mark.parametrize(("change", "message"), [
    ({"model": {"vocab_size": 265}, "mesh": MeshConfig(data=1, tensor=2)}, "axis 'vocab' of size 265 does not divide"),
    ({"model": {"attention_implementation": "splash"}}, "runs on tpu, not on cpu"),
    ({"model": {"attention_implementation": "context"}}, "needs a mesh whose axis context splits"),
])
def test_what_the_mesh_or_the_device_cannot_do_is_told_before_the_data(
        corpus: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:  # noqa: F811
    config = config_for(tmp_path / "run", corpus)
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, **change["model"]), mesh=change.get("mesh", config.mesh))
    with pytest.raises((ValueError, NotImplementedError), match=message):
        train(config, progress=False, devices=jax.devices()[:config.mesh.tensor])
    assert [path.name for path in (tmp_path / "run").iterdir()] == [run.CHECKPOINTS]


def test_the_config_of_a_folder_that_was_moved_says_which_run_is_meant(tmp_path: Path) -> None:
    config = TrainConfig(workdir=str(tmp_path / "run"))
    (tmp_path / "moved" / run.CHECKPOINTS).mkdir(parents=True)
    file = tmp_path / "moved" / run.CONFIG
    file.write_text(to_json(config))
    with pytest.raises(ValueError, match=r"workdir='.*run': the file of --config lies in the folder of another run .*; "
                                         r"accepted: --workdir .*moved to go on with that, or --workdir with another"):
        parse(["--config", str(file)])
    for workdir in (file.parent, tmp_path / "new"):
        assert parse(["--config", str(file), f"--workdir={workdir}"]).workdir == str(workdir)
    file.parent.rename(tmp_path / "run")
    assert parse(["--config", os.path.relpath(tmp_path / "run" / run.CONFIG)]) == config


@pytest.mark.parametrize("schedule_steps", [None, 4])
def test_a_learning_rate_that_leaps_is_told(
        corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, schedule_steps: int | None) -> None:  # noqa: F811
    """As it does where more steps stretch a schedule that was at its end."""
    config = config_for(tmp_path, corpus, steps=4, eval_every=0, optimizer=OptimizerConfig(warmup_steps=1))
    train_on_one(config)
    rates = dataclasses.replace(config.optimizer, schedule_steps=schedule_steps)
    train_on_one(dataclasses.replace(config, steps=8, optimizer=rates))
    told = [line.message for line in caplog.records if "learning rate" in line.message]
    assert told == ([] if schedule_steps else [
        "the learning rate goes on with 0.00195 from step 4, where the run's own schedule has 0.0003; to keep to that "
        "give --optimizer.schedule-steps 4"])


def test_a_run_goes_on_with_its_own_data_alone(
        corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Not with another text of as many tokens; told before anything is compiled."""
    reversed_text = tmp_path / "reversed"
    reversed_text.mkdir()
    for path in corpus.iterdir():
        (reversed_text / path.name).write_text(path.read_text()[::-1])
    config = config_for(tmp_path / "run", corpus, steps=2, eval_every=0)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, held_out=0.0))
    train_on_one(config)
    monkeypatch.setattr(parts.Parts, "build", lambda *_: pytest.fail("compiles first"))
    other = dataclasses.replace(config.data, source=str(reversed_text), prepared=str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"data.source=.*reversed.*other data than those of the run in .*digest="):
        train_on_one(dataclasses.replace(config, data=other, steps=4))


def test_rows_begin_with_the_tokenizers_begin_token_or_the_run_is_refused(
        corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,  # noqa: F811
        caplog: pytest.LogCaptureFixture) -> None:
    config = config_for(tmp_path / "run", corpus, steps=2, eval_every=2)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, add_bos_token=True))
    first = []
    read = Batches.__next__
    monkeypatch.setattr(Batches, "__next__", lambda self: first.append(batch := read(self)) or batch)
    train_on_one(config)
    assert first and all((batch["inputs"][:, 0] == ByteTokenizer.bos_id).all() for batch in first)
    train_on_one(dataclasses.replace(config, steps=3, data=dataclasses.replace(config.data, add_bos_token=False)))
    assert "data.add_bos_token=False from here on, where the run so far had True" in caplog.text
    train_on_one(dataclasses.replace(config, workdir=str(tmp_path / "next"), initial=config.workdir))
    assert f"data.add_bos_token=True from here on, where initial={config.workdir} had False" in caplog.text
    monkeypatch.setattr(ByteTokenizer, "bos_id", None)
    other = dataclasses.replace(config, workdir=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="data.add_bos_token=True: the tokenizer 'bytes' has no begin token"):
        train_on_one(other)
    assert not (tmp_path / "other" / run.DATA).exists()


def test_a_state_of_the_first_version_has_no_digest_and_goes_on(corpus: Path, tmp_path: Path) -> None:  # noqa: F811
    config = config_for(tmp_path, corpus, steps=2, eval_every=0)
    result = train_on_one(config)
    assert result.step == 2
    with Checkpoints(tmp_path / run.CHECKPOINTS, read_only=True) as checkpoints:
        found = checkpoints.read_meta()
    assert found is not None
    saved = {name: value for name, value in found[1]["data"].items() if name not in ("next_index", "digest")}
    require_same_order(saved, {**saved, "digest": 7})
    with pytest.raises(ValueError, match="digest=7: must be 8"):
        require_same_order({**saved, "digest": 8}, {**saved, "digest": 7})


@pytest.mark.parametrize("change", [
    {"attention_implementation": "splash"}, {"attention_implementation": "cudnn"},
    {"attention_implementation": "context"}, {"expert_implementation": "megablox", "expert_exchange": "ragged"},
    {"expert_implementation": "mosaic_gpu", "expert_exchange": "ragged", "expert_exchange_tokens": 2}])
def test_a_run_trained_with_a_kernel_of_another_device_is_read_and_decoded(
        corpus: Path, tmp_path: Path, change: dict[str, Any]) -> None:  # noqa: F811
    config = config_for(tmp_path, corpus, steps=1, eval_every=0)
    moe = dataclasses.replace(MOE, layers=(1,)) if "expert_exchange" in change else None
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))
    train_on_one(config)
    named = dataclasses.replace(config, model=dataclasses.replace(config.model, **change))
    for document in tmp_path.glob("checkpoints/*/meta/metadata"):  # as if that device had written it
        content = json.loads(document.read_text())
        content["meta"]["config"] = to_dict(named)
        content.pop("crc32")
        document.write_text(json.dumps(sealed(content)))
    trained = run.load_trained(tmp_path)
    out = generate(trained.model, trained.params, np.ones((1, 3), np.int32), [3], SamplingConfig(temperature=0),
                   jax.random.key(0), max_new_tokens=3)
    assert out.tokens.shape[0] == 1
    assert trained.config.model == named.model and model_config("mfa").attention == trained.model.config.attention
    assert trained.model.config.expert_exchange_tokens is None, "which divides the tokens of a training step"
