"""Training: one step against its definition, resuming bit for bit, other meshes, and what stops a run."""

from __future__ import annotations

import dataclasses
import email
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tokenizers
from flax import linen as nn

from mfa_jax import axes
from mfa_jax.attention import mfa
from mfa_jax.attention.core import attend
from mfa_jax.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from mfa_jax.data import ByteTokenizer, load_tokenizer
from mfa_jax.model.transformer import Transformer, init_params
from mfa_jax.train import loop, parts, run, starting
from mfa_jax.train.loop import NonFiniteError, train
from mfa_jax.train.losses import batch_loss
from mfa_jax.train.metrics import MetricsWriter
from mfa_jax.train.optimizer import make_optimizer, make_schedule
from mfa_jax.train.step import BATCH_SPEC, create_state, make_train_step, state_layout, watched_leaves
from tests.contract import ATTENTION, model_config

ROOT = Path(__file__).resolve().parent.parent
ONE = MeshConfig(data=1)
# One worker runs them all, so that the run they share happens once.
pytestmark = pytest.mark.xdist_group("train")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten files of Python's standard library: unlike our own source, they do not change with every edit."""
    folder = tmp_path_factory.mktemp("corpus")
    for path in sorted(Path(email.__file__).parent.glob("*.py"))[:10]:
        (folder / path.name).write_text(path.read_text())
    return folder


def config_for(workdir: Path, corpus: Path, variant: str = "mfa", **changes: object) -> TrainConfig:
    config = TrainConfig(
        workdir=str(workdir), model=dataclasses.replace(model_config(variant), vocab_size=264), mesh=ONE,
        data=DataConfig(source=str(corpus), sequence_length=32, batch_size=8, held_out=0.1),
        optimizer=OptimizerConfig(warmup_steps=2, schedule_steps=6), steps=6, log_every=2,
        save_every=2, eval_every=3, eval_batches=2)
    return dataclasses.replace(config, **changes)


def train_on_one(config: TrainConfig) -> loop.TrainResult:
    return train(config, progress=False, devices=jax.devices()[:1])


def synthetic_batch(config: TrainConfig, seed: int = 0) -> dict[str, np.ndarray]:
    r = np.random.default_rng(seed)
    shape = (config.data.batch_size, config.data.sequence_length)
    tokens = r.integers(0, config.model.vocab_size, (2, *shape)).astype(np.int32)
    segments = np.sort(r.integers(1, 4, shape), axis=1).astype(np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    return {"inputs": tokens[0], "targets": tokens[1], "positions": positions, "segments": segments,
            "mask": (r.random(shape) < 0.8).astype(np.float32)}


def one_step(config: TrainConfig, devices: int) -> tuple[object, dict[str, jax.Array]]:
    """State and metrics after one update of the fresh state, on a mesh of so many devices."""
    mesh = axes.make_mesh(dataclasses.astuple(config.mesh), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        model = Transformer(config.model)
        optimizer = make_optimizer(config.optimizer, config.steps, run.abstract_params(model, mesh))
        layout = state_layout(config, model, optimizer, mesh)
        state = create_state(config, model, optimizer, layout)
        step = jax.jit(make_train_step(config, model, optimizer, make_schedule(config.optimizer, config.steps)),
                       donate_argnums=0, out_shardings=(jax.tree.map(lambda x: x.sharding, layout), None))
        where = jax.sharding.NamedSharding(mesh, BATCH_SPEC)
        batch = {name: jax.device_put(x, where) for name, x in synthetic_batch(config).items()}
        before = state.params["embed"]
        state, metrics = step(state, batch)
        assert before.is_deleted(), "the state must be donated"
        return state, metrics


def sgd_config(workdir: Path, variant: str, **changes: object) -> TrainConfig:
    """Large clip and a step without adaptive scaling, so that parameter differences are gradient differences."""
    return config_for(workdir, workdir, variant, optimizer=OptimizerConfig(
        warmup_steps=0, schedule="constant", learning_rate=1e-2, eps=1.0, clip_norm=None, weight_decay=0.0), **changes)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ATTENTION)
def test_sharded_step_equals_single_device_leaf_by_leaf(variant: str, tmp_path: Path) -> None:
    """Adam with eps = 1 moves a parameter by about lr * gradient, so wrong gradients show; they agree to rounding."""
    single, single_metrics = one_step(sgd_config(tmp_path, variant), 1)
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    sharded, sharded_metrics = one_step(sgd_config(tmp_path, variant, mesh=mesh), 8)
    chex.assert_trees_all_close(jax.device_get(single_metrics), jax.device_get(sharded_metrics), rtol=2e-5, atol=1e-7)
    moments = jax.device_get((single.optimizer, sharded.optimizer))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(moments[0]), jax.tree.leaves(moments[1]), strict=True):
        scale = np.abs(a).max() + 1e-12
        assert np.abs(a - b).max() <= 2e-5 * scale, jax.tree_util.keystr(path)
    split = sharded.params["layers"]["ffn"]["W_up"]
    assert split.addressable_shards[0].data.size * 4 == split.size, "fsdp and tensor must each halve a projection"


@pytest.mark.slow
@pytest.mark.parametrize("separate", [True, False])
def test_rows_of_one_document_are_attended_to_without_segments(
    separate: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which kernels without segments, such as cuDNN's, can serve; the loss is that of rows with one segment."""
    config = config_for(tmp_path, tmp_path, "mfa")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, separate_documents=separate))
    model = Transformer(config.model)
    batch = {name: jnp.asarray(x) for name, x in synthetic_batch(config).items()}
    batch["segments"] = jnp.ones_like(batch["inputs"])
    params = nn.unbox(init_params(model, jax.random.key(0)))
    whole = dataclasses.replace(config, data=dataclasses.replace(config.data, separate_documents=True))
    expected = batch_loss(whole, model, params, batch)
    seen = []

    def spy(*arrays: jax.Array, segments: jax.Array | None, **options: Any) -> jax.Array:
        seen.append(segments is not None)
        return attend(*arrays, segments=segments, **options)

    monkeypatch.setattr(mfa, "attend", spy)
    chex.assert_trees_all_close(batch_loss(config, model, params, batch), expected, rtol=1e-6)
    assert set(seen) == {separate}


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_gradient_equals_the_full_batch(accumulate: int, tmp_path: Path) -> None:
    """The mask differs between parts, so a mean of means would be wrong."""
    full, full_metrics = one_step(sgd_config(tmp_path, "mfa"), 1)
    parts, metrics = one_step(sgd_config(tmp_path, "mfa", accumulate=accumulate), 1)
    chex.assert_trees_all_close(jax.device_get(full.params), jax.device_get(parts.params), atol=1e-6)
    chex.assert_trees_all_close(jax.device_get(full_metrics), jax.device_get(metrics), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_gives_the_types_that_it_took(kind: str, accumulate: int, tmp_path: Path) -> None:
    """Of bfloat16 parameters, too: the loop's step is compiled ahead for the state that it starts with."""
    config = config_for(tmp_path, tmp_path, optimizer=OptimizerConfig(kind=kind), accumulate=accumulate)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, param_dtype="bfloat16"))
    mesh, model = axes.make_mesh((1,) * 5, jax.devices()[:1]), Transformer(config.model)
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(config.optimizer, config.steps, run.abstract_params(model, mesh))
        layout = state_layout(config, model, optimizer, mesh)
        step = make_train_step(config, model, optimizer, make_schedule(config.optimizer, config.steps))
        after, metrics = jax.eval_shape(step, layout, jax.tree.map(jnp.asarray, synthetic_batch(config)))
    types = [jax.tree.map(lambda x: x.dtype, tree) for tree in (layout, after)]
    assert types[0] == types[1]
    assert {x.dtype for x in jax.tree.leaves(after.params)} == {jnp.dtype(jnp.bfloat16)}
    floats = {x.dtype for x in jax.tree.leaves((after.optimizer, metrics)) if jnp.issubdtype(x.dtype, jnp.floating)}
    assert floats == {jnp.dtype(jnp.float32)}


@pytest.mark.slow
def test_a_run_with_bfloat16_parameters_trains_and_goes_on(corpus: Path, tmp_path: Path) -> None:
    config = config_for(tmp_path, corpus)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, param_dtype="bfloat16"))
    train_on_one(dataclasses.replace(config, steps=4))
    train_on_one(config)
    losses = [line["loss"] for line in metric_lines(config.workdir) if "loss" in line]
    assert losses[-1] < losses[0] and {x.dtype.name for x in jax.tree.leaves(saved_leaves(config))} == {"bfloat16"}


def test_a_step_is_what_optax_says_and_ema_follows(tmp_path: Path) -> None:
    config = config_for(tmp_path, tmp_path, ema_decay=0.5)
    state, metrics = one_step(config, 1)
    model = Transformer(config.model)
    mesh = axes.make_mesh((1,) * 5, jax.devices()[:1])
    optimizer = make_optimizer(config.optimizer, config.steps, run.abstract_params(model, mesh))
    start = create_state(config, model, optimizer, state_layout(config, model, optimizer, mesh))
    batch = jax.tree.map(jnp.asarray, synthetic_batch(config))

    def loss(params: dict) -> jax.Array:
        logits, _ = model.apply({"params": params}, batch["inputs"], batch["positions"], batch["segments"])
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return jnp.sum(nll * batch["mask"]) / jnp.sum(batch["mask"])

    value, grads = jax.jit(jax.value_and_grad(loss))(start.params)
    updates, _ = jax.jit(optimizer.update)(grads, start.optimizer, start.params)
    expected = optax.apply_updates(start.params, updates)
    chex.assert_trees_all_close(jax.device_get(state.params), jax.device_get(expected), atol=2e-6)
    average = jax.tree.map(lambda a, b: (a + b) / 2, start.params, expected)
    chex.assert_trees_all_close(jax.device_get(state.ema), jax.device_get(average), atol=2e-6)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-4)


@pytest.fixture(scope="module")
def straight(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, loop.TrainResult]:
    """Six steps in one start."""
    config = config_for(tmp_path_factory.mktemp("straight"), corpus, "mfa_kr", ema_decay=0.9)
    return config, train_on_one(config)


def saved_leaves(config: TrainConfig, item: str = "params") -> dict:
    return jax.device_get(run.load_trained(config.workdir, ema=item == "ema").params)


def metric_lines(workdir: str) -> list[dict]:
    return [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]


def without_times(line: dict) -> dict:
    return {name: value for name, value in line.items()
            if name != "goodput" and not name.startswith(("tokens_per_second", "seconds/"))}


@pytest.mark.slow
def test_resuming_equals_the_uninterrupted_run_bit_for_bit(
    straight: tuple[TrainConfig, loop.TrainResult], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told to stop in the middle of six steps, started again: the same parameters, average, losses and data."""
    config = dataclasses.replace(straight[0], workdir=str(tmp_path))
    written = MetricsWriter.write

    def stop_at_four(self: MetricsWriter, step: int, values: dict) -> None:
        written(self, step, values)
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MetricsWriter, "write", stop_at_four)
    first = train_on_one(config)
    assert first.interrupted and first.step == 4
    monkeypatch.undo()
    second = train_on_one(config)
    assert second.step == 6 and not second.interrupted
    for item in ("params", "ema"):
        chex.assert_trees_all_equal(saved_leaves(config, item), saved_leaves(straight[0], item))
    mine, theirs = metric_lines(config.workdir), metric_lines(straight[0].workdir)
    assert [without_times(line) for line in mine] == [without_times(line) for line in theirs]


def test_metrics_say_what_a_run_needs(straight: tuple[TrainConfig, loop.TrainResult]) -> None:
    lines = metric_lines(straight[0].workdir)
    assert [line["step"] for line in lines] == [2, 3, 4, 6]
    named = {"loss", "bits_per_byte", "grad_norm", "update_norm", "learning_rate", "tokens_per_second",
             "alpha_norm/layer_0", "alpha_norm/layer_1"}
    assert named <= set(lines[0])
    assert {"eval_loss", "eval_bits_per_byte", "eval_ema_loss"} <= set(lines[1])
    assert lines[0]["loss"] / np.log(2) == pytest.approx(lines[0]["bits_per_byte"], rel=0.01)
    assert straight[1].metrics["eval_loss"] == lines[-1]["eval_loss"]
    assert straight[1].metrics["eval_loss"] < np.log(264)


@pytest.mark.slow
def test_a_run_goes_on_with_another_mesh(straight: tuple[TrainConfig, loop.TrainResult], tmp_path: Path) -> None:
    """One device to eight, split three ways, and back: each start reads the checkpoint of the one before."""
    config = dataclasses.replace(straight[0], workdir=str(tmp_path), steps=2)
    train_on_one(config)
    train(dataclasses.replace(config, steps=4, mesh=MeshConfig(data=2, fsdp=2, tensor=2)), progress=False)
    two = MeshConfig(data=1, fsdp=2)
    train(dataclasses.replace(config, steps=6, mesh=two), progress=False, devices=jax.devices()[:2])
    losses, expected = ({line["step"]: line["loss"] for line in metric_lines(where) if "loss" in line}
                        for where in (config.workdir, straight[0].workdir))
    assert losses.keys() == expected.keys() == {2, 4, 6}
    assert losses[2] == expected[2]
    np.testing.assert_allclose(list(losses.values()), list(expected.values()), rtol=1e-3)


@pytest.mark.parametrize("first_bad", [3, 4])
def test_not_a_number_stops_with_step_and_leaf_and_keeps_the_checkpoint(
    first_bad: int, straight: tuple[TrainConfig, loop.TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 4 would be saved. Of step 3 that is known only when step 4 is under way, from what step 3 has left."""
    config = dataclasses.replace(straight[0], workdir=str(tmp_path))
    honest = parts.make_train_step

    def poisoned(config: TrainConfig, *rest: object) -> object:
        step = honest(config, *rest)

        def spoiled(state: object, batch: dict) -> object:
            scale = jnp.where(state.step + 1 >= first_bad, jnp.nan, 1.0)
            params = {**state.params, "final_norm": {"scale": state.params["final_norm"]["scale"] * scale}}
            return step(state._replace(params=params), batch)

        return spoiled

    monkeypatch.setattr(parts, "make_train_step", poisoned)
    with pytest.raises(NonFiniteError, match=f"step {first_bad}: gradient of embed is not finite"):
        train_on_one(config)
    monkeypatch.undo()
    trained = run.load_trained(tmp_path)
    assert trained.step == 2 and not trained.skipped
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(jax.device_get(trained.params)))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("choice", ["stop", "continue"])
def test_a_full_disk_for_metrics_does_what_it_does_for_checkpoints(
    choice: str, straight: tuple[TrainConfig, loop.TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture
) -> None:
    """Lines 2 and 3 go to a full disk, 4 and 6 to one with room again."""
    config = dataclasses.replace(straight[0], workdir=str(tmp_path), on_save_failure=choice)
    written = MetricsWriter.write

    def write(self: MetricsWriter, step: int, values: dict) -> None:
        file = self._file
        with Path("/dev/full").open("ab", buffering=0) as full:
            self._file = full if step < 4 else file
            try:
                written(self, step, values)
            finally:
                self._file = file

    monkeypatch.setattr(MetricsWriter, "write", write)
    if choice == "stop":
        with pytest.raises(OSError, match="metrics of step 2 were not written: No space left on device"):
            train_on_one(config)
        return
    result = train_on_one(config)
    assert result.step == 6 and result.metrics["lost_lines"] == 2
    assert [(line["step"], line.get("lost_lines")) for line in metric_lines(tmp_path)] == [(4, 2), (6, 2)]
    assert caplog.text.count("the metrics of step 2 were not written: No space left on device; the run goes on") == 1
    assert "step 3 were" not in caplog.text, "one warning until there is room again"


def test_watched_leaves_name_gradients_then_updates() -> None:
    assert watched_leaves({"a": 1, "b": {"c": 2}}) == [
        "gradient of a", "gradient of b/c", "update of a", "update of b/c"]


@pytest.mark.parametrize(("changes", "message"), [
    ({"data": DataConfig(source="stdlib", batch_size=6)}, r"data.batch_size=6: .* multiple of the 4 shards"),
    ({"mesh": MeshConfig(data=3)}, r"mesh data=3, .* needs 3 devices, there are 4"),
    ({"data": DataConfig(source="/nonexistent/corpus", batch_size=8)}, r"nonexistent"),
    ({"model": dataclasses.replace(model_config("mfa"), vocab_size=100)}, r"vocab_size=100: must be at least 264"),
    ({"model": dataclasses.replace(model_config("mfa"), param_dtype="bfloat16"), "ema_decay": 0.9},
     "ema_decay=0.9: must be none with model.param_dtype=bfloat16"),
])
def test_what_cannot_work_is_refused(changes: dict, message: str, corpus: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(config_for(tmp_path, corpus, mesh=MeshConfig()), **changes)
    with pytest.raises(ValueError, match=message):
        train(config, progress=False, devices=jax.devices()[:4])


def test_another_model_in_the_same_workdir_is_refused(straight: tuple[TrainConfig, loop.TrainResult]) -> None:
    other = dataclasses.replace(straight[0], model=dataclasses.replace(straight[0].model, ffn_dim=48))
    with pytest.raises(ValueError, match=r"holds a run of another model: model.ffn_dim=48 \(saved: 32\)"):
        train_on_one(other)
    with pytest.raises(ValueError, match=r"steps=4: the run in .* is at step 6 already"):
        train_on_one(dataclasses.replace(straight[0], steps=4))


@pytest.mark.parametrize(("changes", "message"), [
    ({"optimizer": {"kind": "muon"}}, "optimizer.kind='muon': the run in .* has 'adamw'; accepted: that, or another"),
    ({"optimizer": {"clip_norm": None}}, "optimizer.clip_norm=None: the run in .* has 1.0; accepted: another number"),
    ({"data": {"batch_size": 4}}, "data.batch_size=4: the run in .* has 8; accepted: that"),
    ({"data": {"seed": 3}}, "data.seed=3: the run in .* has 0; accepted: that"),
    ({"ema_decay": None}, "ema_decay=None: the run in .* has 0.9; accepted: another number, or another workdir"),
])
def test_what_a_run_cannot_go_on_with_is_named_before_anything_is_compiled(
    changes: dict, message: str, straight: tuple[TrainConfig, loop.TrainResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts.Parts, "build", lambda *_: pytest.fail("compiled"))
    changed = {name: dataclasses.replace(getattr(straight[0], name), **value) if isinstance(value, dict) else value
               for name, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        train_on_one(dataclasses.replace(straight[0], steps=8, **changed))


def test_a_text_without_a_window_is_refused_before_anything_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts.Parts, "build", lambda *_: pytest.fail("compiled"))
    (tmp_path / "short.txt").write_text("ab")
    config = config_for(tmp_path / "run", tmp_path / "short.txt")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, held_out=0))
    with pytest.raises(ValueError, match=r"sequence_length=\d+: must be below the 3 tokens of the train split"):
        train_on_one(config)


def test_a_run_goes_on_with_its_own_tokenizer_or_not_at_all(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_for(tmp_path / "run", corpus)
    before = starting.open_data(config)
    def named(tokenizer: str) -> TrainConfig:
        return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=tokenizer))

    assert starting.open_data(named("/no/longer/there")).meta == before.meta
    assert "data.tokenizer='/no/longer/there' is not there; the run goes on with its own" in caplog.text
    other = tmp_path / "tokenizer.json"
    tokens = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "</s>": 1}, []))
    tokens.save(str(other))
    with pytest.raises(ValueError, match=r"tokenizer.json'?: is not the tokenizer of the run in .*; accepted: .*run"):
        starting.open_data(named(str(other)))
    (tmp_path / "run" / "tokenizer" / "mfa_tokenizer.json").unlink()  # as a save that was cut off leaves it
    assert starting.open_data(config).meta == before.meta
    assert load_tokenizer(tmp_path / "run" / "tokenizer").fingerprint == ByteTokenizer.fingerprint


def test_a_trace_of_steps_that_are_not_run_is_told(
    straight: tuple[TrainConfig, loop.TrainResult], caplog: pytest.LogCaptureFixture
) -> None:
    assert train_on_one(dataclasses.replace(straight[0], profile=(2, 3))).step == 6
    assert "profile=(2, 3): no trace, the run goes from step 6 to 6" in caplog.text


def test_reading_a_run_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run"):
        run.load_trained(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_the_script_saves_when_told_to_stop_and_resumes(how: signal.Signals, corpus: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments.train", "--preset", "tiny-mfa", "--data.source", str(corpus),
               "--data.sequence-length", "32", "--mesh.data", "1", "--workdir", str(tmp_path), "--save-every", "100000"]
    where = {"cwd": ROOT, "text": True}
    child = subprocess.Popen([*command, "--steps", "100000"], stderr=subprocess.PIPE, **where)
    metrics = tmp_path / "metrics.jsonl"
    while child.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.1)
    child.send_signal(how)
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    step = run.load_trained(tmp_path).step
    assert step >= 10
    done = subprocess.run([*command, "--steps", str(step + 2)], capture_output=True, **where)
    assert done.returncode == 0 and f"resumed at step {step}" in done.stderr
    assert run.load_trained(tmp_path).step == step + 2
