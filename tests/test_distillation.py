"""Learning from a teacher: the loss against its definition, meshes, frozen groups, resuming, and what is refused."""

from __future__ import annotations

import dataclasses
import email
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from jax.sharding import Mesh, NamedSharding

from experiments import heal
from experiments.opening import open_model
from mfa_jax import axes
from mfa_jax.config import (
    DataConfig,
    DistillationConfig,
    GroupRates,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    TrainConfig,
    from_dict,
    load_json,
    to_dict,
)
from mfa_jax.convert import gqa_to_mfa, gqa_to_mfa_kr, save_pretrained, save_run
from mfa_jax.convert.reduce import reduce_gqa
from mfa_jax.data import ByteTokenizer
from mfa_jax.model.transformer import Transformer, unstack_layers
from mfa_jax.plan import programs
from mfa_jax.train import loop, run
from mfa_jax.train.checkpoint import Checkpoints
from mfa_jax.train.losses import Teacher, distillation_loss, stream_distance, teacher_config
from mfa_jax.train.metrics import MetricsWriter
from mfa_jax.train.optimizer import make_optimizer, make_schedule
from mfa_jax.train.step import BATCH_SPEC, create_state, make_train_step, state_layout
from tests.contract import compiled, model_config, tokens
from tests.test_train import metric_lines, saved_leaves, synthetic_batch, without_times

ROOT = Path(__file__).resolve().parent.parent
GQA = dataclasses.replace(model_config("gqa"), vocab_size=264)
ONE = MeshConfig(data=1)
pytestmark = pytest.mark.xdist_group("distillation")
Converted = tuple[ModelConfig, Any]


@pytest.fixture(scope="module")
def original() -> Converted:
    return GQA, compiled(GQA).params


@pytest.fixture(scope="module")
def reduced(original: Converted) -> Converted:
    """MFA-KR with two thirds of the original's cache."""
    text = np.asarray(tokens(9, (24, 32)))
    config, params, _ = reduce_gqa(*original, text, target="mfa_kr", width=22)
    return config, jax.tree.map(jnp.asarray, params)


def config_for(student: ModelConfig, workdir: str = "runs/x", **changes: Any) -> TrainConfig:
    """A large clip and a step without adaptive scaling, so that parameter differences are gradient differences."""
    distillation = DistillationConfig("teacher", **changes.pop("distillation", {}))
    optimizer = OptimizerConfig(warmup_steps=0, schedule="constant", learning_rate=1e-2, eps=1.0, clip_norm=None,
                                weight_decay=0.0, rates=changes.pop("rates", GroupRates()))
    config = TrainConfig(workdir=workdir, model=student, mesh=ONE, optimizer=optimizer, distillation=distillation,
                         data=DataConfig(sequence_length=32, batch_size=8), steps=6)
    return dataclasses.replace(config, **changes)


def sums_of(config: TrainConfig, student: Any, teacher: Converted) -> Any:
    """Sums of the synthetic batch and their gradient."""
    batch = jax.tree.map(jnp.asarray, synthetic_batch(config))
    known = Transformer(teacher_config(config, teacher[0]))

    def loss(params: Any) -> Any:
        sums = distillation_loss(config, Transformer(config.model), known, params, batch, teacher[1])
        return sums.loss, sums

    (_, sums), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(student)
    return sums, gradient


# ---- the loss ----


def log_softmax(logits: Any) -> np.ndarray:
    wide = np.asarray(logits, np.float64)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def test_the_loss_is_what_the_config_says(original: Converted, reduced: Converted) -> None:
    """Against logits and streams of whole models, with layers one after the other and sums in float64."""
    wanted = {"temperature": 2.0, "cross_entropy": 0.3, "hidden": 0.7}
    config = config_for(reduced[0], distillation=wanted)
    batch = synthetic_batch(config)
    sums, _ = sums_of(config, reduced[1], original)
    inputs = [jnp.asarray(batch[name]) for name in ("inputs", "positions", "segments")]

    def whole(model: Converted) -> tuple[np.ndarray, np.ndarray]:
        module, variables = Transformer(model[0], keep_streams=True), {"params": model[1]}
        states = module.apply(variables, *inputs, method="states")
        return (np.asarray(module.apply(variables, *inputs)[0], np.float64), np.asarray(states.streams, np.float64))

    (ours, x), (theirs, y) = whole(reduced), whole(original)
    mask = batch["mask"].astype(np.float64)
    p, q = log_softmax(theirs / 2), log_softmax(ours / 2)
    kl = 4 * (mask * (np.exp(p) * (p - q)).sum(-1)).sum()
    nll = -(mask * np.take_along_axis(log_softmax(ours), batch["targets"][..., None], -1)[..., 0]).sum()
    hidden = (mask * (((x - y) ** 2).sum(-1) / (y**2).sum(-1)).mean(0)).sum()
    assert kl > 1 and hidden > 1e-2
    np.testing.assert_allclose(sums.terms["kl"], kl, rtol=1e-4)
    np.testing.assert_allclose(sums.terms["hidden"], hidden, rtol=1e-4)
    np.testing.assert_allclose(sums.nll, nll, rtol=1e-5)
    np.testing.assert_allclose(sums.loss, 0.7 * kl + 0.3 * nll + 0.7 * hidden, rtol=1e-4)


def test_streams_are_those_after_each_layer(original: Converted) -> None:
    """Scanned as unrolled, and the last one is what the final norm is given."""
    config, params = original
    text = tokens()
    states = Transformer(config, keep_streams=True).apply({"params": params}, text, method="states")
    assert states.streams.shape == (config.num_layers, *text.shape, config.model_dim)
    last = states.streams[-1]
    normed = last / np.sqrt(np.mean(last**2, axis=-1, keepdims=True) + config.norm_eps)
    np.testing.assert_allclose(states.hidden, normed * params["final_norm"]["scale"], rtol=1e-5, atol=1e-6)
    unrolled = Transformer(config, scan_layers=False, keep_streams=True).apply(
        {"params": unstack_layers(params, config.num_layers)}, text, method="states")
    np.testing.assert_allclose(states.streams, unrolled.streams, rtol=1e-4, atol=1e-5)
    assert Transformer(config).apply({"params": params}, text, method="states").streams is None


def test_streams_of_dense_and_expert_layers() -> None:
    moe = MoEConfig(num_experts=4, experts_per_token=2, expert_dim=8, layers=(1,))
    c = compiled(model_config("mfa", num_layers=3, moe=moe))
    states = Transformer(c.config, keep_streams=True).apply({"params": c.params}, tokens(), method="states")
    unrolled = Transformer(c.config, scan_layers=False, keep_streams=True).apply(
        {"params": unstack_layers(c.params, 3)}, tokens(), method="states")
    np.testing.assert_allclose(states.streams, unrolled.streams, rtol=1e-4, atol=1e-5)
    assert states.streams.shape[0] == 3


def test_a_token_counts_by_its_own_size() -> None:
    theirs = jnp.asarray([[[[3.0, 4.0], [300.0, 400.0]]]])
    apart = jnp.asarray([[[[3.0, 5.0], [300.0, 500.0]]]])
    both = stream_distance(apart, theirs, jnp.ones((1, 2), bool))
    one = stream_distance(apart, theirs, jnp.asarray([[True, False]]))
    np.testing.assert_allclose([both, one], [2 / 25, 1 / 25], rtol=1e-6)


@pytest.mark.parametrize("distillation", [{}, {"hidden": 1.0}])
def test_from_itself_there_is_nothing_to_learn(distillation: dict[str, float], original: Converted) -> None:
    sums, gradient = sums_of(config_for(GQA, distillation=distillation), original[1], original)
    assert sums.loss == 0 and all(not np.any(leaf) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("exact", [gqa_to_mfa, gqa_to_mfa_kr])
def test_an_exact_conversion_has_nothing_to_heal(exact: Callable[..., Converted], original: Converted) -> None:
    config, params = exact(*original)
    sums, _ = sums_of(config_for(config, distillation={"hidden": 1.0}), params, original)
    assert abs(sums.terms["kl"]) / sums.tokens < 1e-6 and sums.terms["hidden"] / sums.tokens < 1e-6


# ---- the step ----


def one_step(
    config: TrainConfig, student: Converted, teacher: Converted, devices: int = 1
) -> tuple[Any, dict[str, jax.Array], Any]:
    """State and metrics after one update, on a mesh of so many devices, and the teacher as it lay there."""
    mesh = axes.make_mesh(dataclasses.astuple(config.mesh), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        model, known = Transformer(config.model), Transformer(teacher_config(config, teacher[0]))
        abstract = run.abstract_params(model, mesh)
        optimizer = make_optimizer(config.optimizer, config.steps, abstract)
        layout = state_layout(config, model, optimizer, mesh)
        params = jax.tree.map(lambda x, leaf: jax.device_put(jnp.array(x), leaf.sharding), student[1], abstract)
        state = create_state(config, model, optimizer, layout, params)

        def loss(params: Any, batch: Any, *given: Any) -> Any:
            return distillation_loss(config, model, known, params, batch, *given)

        step = jax.jit(make_train_step(config, model, optimizer, make_schedule(config.optimizer, 1), loss),
                       donate_argnums=0, out_shardings=(jax.tree.map(lambda x: x.sharding, layout), None))
        where = NamedSharding(mesh, BATCH_SPEC)
        batch = {name: jax.device_put(x, where) for name, x in synthetic_batch(config).items()}
        teacher_params = jax.tree.map(lambda x, leaf: jax.device_put(jnp.array(x), leaf.sharding), teacher[1],
                                      run.abstract_params(known, mesh))
        state, metrics = step(state, batch, teacher_params)
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(teacher_params))
        return state, metrics, teacher_params


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2, 1, 1, 2), (1, 2, 1, 2, 2)])
def test_a_mesh_changes_nothing(sizes: tuple[int, ...], original: Converted, reduced: Converted) -> None:
    """Adam with eps = 1 moves a parameter by about lr * gradient, so wrong gradients show; they agree to rounding."""
    distillation = {"temperature": 2.0, "cross_entropy": 0.3, "hidden": 0.7}
    single, expected, _ = one_step(config_for(reduced[0], distillation=distillation), reduced, original)
    config = config_for(reduced[0], distillation=distillation, mesh=MeshConfig(*sizes))
    sharded, metrics, teacher = one_step(config, reduced, original, 8)
    chex.assert_trees_all_close(jax.device_get(metrics), jax.device_get(expected), rtol=1e-4, atol=1e-6)
    moments = jax.device_get((single.optimizer, sharded.optimizer))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(moments[0]), jax.tree.leaves(moments[1]), strict=True):
        assert np.abs(a - b).max() <= 1e-4 * (np.abs(a).max() + 1e-12), jax.tree_util.keystr(path)
    split = teacher["layers"]["ffn"]["W_up"]
    assert split.addressable_shards[0].data.size * 4 == split.size, "the teacher is split as a model is"


def test_accumulation_changes_nothing(original: Converted, reduced: Converted) -> None:
    """The mask differs between parts, so a mean of means would be wrong."""
    distillation = {"hidden": 0.7}
    whole, expected, _ = one_step(config_for(reduced[0], distillation=distillation), reduced, original)
    parts, metrics, _ = one_step(config_for(reduced[0], distillation=distillation, accumulate=4), reduced, original)
    chex.assert_trees_all_close(jax.device_get(parts.params), jax.device_get(whole.params), atol=1e-6)
    chex.assert_trees_all_close(jax.device_get(metrics), jax.device_get(expected), rtol=1e-4, atol=1e-6)


def test_frequencies_of_a_converted_model_are_no_parameters(reduced: Converted) -> None:
    config, params = reduced
    assert config.inv_freq is not None and len(config.inv_freq) == config.num_layers
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in
             jax.tree_util.tree_leaves_with_path(params)]
    assert not any("freq" in path for path in paths) and "layers/attention/alpha" in paths


@pytest.mark.parametrize(("rates", "moved"), [
    (GroupRates(feed_forward=0, norms=0, embeddings=0), {"attention"}),
    (GroupRates(attention=0.5, embeddings=0), {"attention", "ffn", "attention_norm", "ffn_norm", "final_norm"}),
])
def test_what_is_frozen_stays_bit_equal(
    rates: GroupRates, moved: set[str], original: Converted, reduced: Converted
) -> None:
    state, metrics, _ = one_step(config_for(reduced[0], rates=rates), reduced, original)
    after = jax.device_get(state.params)
    found = {part for part, leaf in parts_of(after) if not np.array_equal(leaf, at(reduced[1], part, leaf))}
    assert {name.split("/")[0] for name in found} == moved
    everything, _, _ = one_step(config_for(reduced[0]), reduced, original)
    size, whole = (sum(leaf.size for leaf in jax.tree.leaves(s.optimizer)) for s in (state, everything))
    assert size < whole, "what is frozen has no moments"
    # What is frozen takes no part in the norm, by which gradients are clipped.
    config = config_for(reduced[0])
    sums, gradient = sums_of(config, reduced[1], original)
    squares = {name: float(np.sum(np.square(leaf, dtype=np.float64))) for name, leaf in parts_of(gradient)}
    trained = sum(square for name, square in squares.items() if name.split("/")[0] in moved)
    assert trained < 0.99 * sum(squares.values())
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(trained) / sums.tokens, rtol=1e-4)


@pytest.mark.slow
def test_frozen_routers_do_not_move_and_others_do() -> None:
    """Selection biases move without a gradient; they are of the feed-forward all the same."""
    moe = MoEConfig(num_experts=4, experts_per_token=2, expert_dim=8, scores="sigmoid", bias_update_rate=0.01)
    c = compiled(dataclasses.replace(model_config("mfa", moe=moe), vocab_size=264))
    known = c.config, jax.tree.map(lambda x: x + 0.01, c.params)
    for rates, moves in ((GroupRates(), True), (GroupRates(feed_forward=0), False)):
        state, metrics, _ = one_step(config_for(c.config, rates=rates), (c.config, c.params), known)
        after, before = (tree["layers"]["moe"] for tree in (jax.device_get(state.params), c.params))
        assert any(not np.array_equal(after[name], before[name]) for name in after) == moves
        assert np.array_equal(after["router_bias"], before["router_bias"]) != moves
        assert metrics["kl"] > 0 and "balance_loss" in metrics


def parts_of(params: Any) -> list[tuple[str, np.ndarray]]:
    """Leaves by the name of their module and their own."""
    flat = {**{name: tree for name, tree in params.items() if name != "layers"}, **params["layers"]}
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(flat)]


def at(params: Any, part: str, like: np.ndarray) -> np.ndarray:
    found = dict(parts_of(params))[part]
    return np.asarray(found, like.dtype)


# ---- runs ----


@pytest.fixture(scope="module")
def folders(original: Converted, reduced: Converted, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A corpus of ten files of Python's standard library, the teacher as a checkpoint, the student as a run."""
    root = tmp_path_factory.mktemp("heal")
    (root / "corpus").mkdir()
    for path in sorted(Path(email.__file__).parent.glob("*.py"))[:10]:
        (root / "corpus" / path.name).write_text(path.read_text())
    save_pretrained(root / "teacher", *original, context_length=64, tokenizer=ByteTokenizer())
    save_run(root / "teacher_run", *original, ByteTokenizer())
    save_run(root / "student", *reduced, ByteTokenizer())
    return {name: root / name for name in ("corpus", "teacher", "teacher_run", "student")}


def flags(folders: dict[str, Path], workdir: Path, *more: str, teacher: str = "teacher_run") -> list[str]:
    return ["--teacher", str(folders[teacher]), "--student", str(folders["student"]), "--workdir", str(workdir),
            "--data.source", str(folders["corpus"]), "--data.sequence-length", "32", "--data.held-out", "0.1",
            "--optimizer.warmup-steps", "2", "--optimizer.schedule-steps", "6", "--steps", "6", "--log-every", "2",
            "--save-every", "2", "--eval-every", "3", "--eval-batches", "2", "--mesh.data", "1",
            "--optimizer.learning-rate", "3e-4", *more]  # a toy stands a hundred times what is set for models of use


def train(config: TrainConfig, devices: int = 1) -> loop.TrainResult:
    return loop.train(config, progress=False, devices=jax.devices()[:devices],
                      teacher=lambda mesh: heal.read_teacher(config, mesh))


@pytest.fixture(scope="module")
def straight(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Six steps in one start."""
    config = heal.parse(flags(folders, tmp_path_factory.mktemp("straight"), "--distillation.hidden", "0.5"))
    train(config)
    return config


def test_a_run_starts_with_the_student_and_nears_the_teacher(
    straight: TrainConfig, reduced: Converted, folders: dict[str, Path], tmp_path: Path
) -> None:
    lines = metric_lines(straight.workdir)
    assert [line["step"] for line in lines] == [0, 2, 3, 4, 6]
    assert {"loss", "kl", "hidden", "teacher_loss", "bits_per_byte", "alpha_norm/layer_0"} <= set(lines[1])
    assert {"eval_loss", "eval_kl", "eval_hidden", "eval_teacher_loss", "eval_bits_per_byte"} <= set(lines[0])
    still = heal.parse(flags(folders, tmp_path, "--optimizer.learning-rate", "1e-30", "--optimizer.warmup-steps", "0",
                             "--distillation.hidden", "0.5", "--steps", "3"))
    before = train(still).metrics
    chex.assert_trees_all_close(saved_leaves(still), jax.device_get(reduced[1]), atol=1e-12)
    assert {name: before[name] for name in ("eval_kl", "eval_hidden", "eval_loss", "eval_teacher_loss")} == {
        name: lines[0][name] for name in ("eval_kl", "eval_hidden", "eval_loss", "eval_teacher_loss")}
    assert lines[-1]["eval_kl"] < 0.9 * before["eval_kl"] and lines[-1]["eval_hidden"] < before["eval_hidden"]
    item = {path.name for path in (Path(straight.workdir) / run.CHECKPOINTS / "6").iterdir() if path.is_dir()}
    assert item == {"params", "optimizer", "counters", "meta"}, "the teacher is in no checkpoint"


@pytest.mark.slow
def test_resuming_equals_the_uninterrupted_run_bit_for_bit(
    straight: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told to stop in the middle of six steps, started again, from what it saved alone."""
    config = dataclasses.replace(straight, workdir=str(tmp_path))
    written = MetricsWriter.write

    def stop_at_four(self: MetricsWriter, step: int, values: dict[str, Any]) -> None:
        written(self, step, values)
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MetricsWriter, "write", stop_at_four)
    first = train(config)
    assert first.interrupted and first.step == 4
    monkeypatch.undo()
    second = train(heal.parse(["--config", str(tmp_path / run.CONFIG)]))
    assert second.step == 6 and not second.interrupted
    chex.assert_trees_all_equal(saved_leaves(config), saved_leaves(straight))
    mine, theirs = metric_lines(config.workdir), metric_lines(straight.workdir)
    assert [without_times(line) for line in mine] == [without_times(line) for line in theirs]


@pytest.mark.slow
def test_a_run_goes_on_with_another_mesh(straight: TrainConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(straight, workdir=str(tmp_path), steps=2)
    train(config)
    train(dataclasses.replace(config, steps=6, mesh=MeshConfig(data=2, fsdp=2, tensor=2)), devices=8)
    mine, theirs = ({line["step"]: line["kl"] for line in metric_lines(where) if "kl" in line}
                    for where in (config.workdir, straight.workdir))
    assert mine.keys() == theirs.keys() == {2, 4, 6}
    np.testing.assert_allclose(list(mine.values()), list(theirs.values()), rtol=1e-3)


@pytest.mark.slow
def test_the_script_heals_from_a_checkpoint_in_one_command(folders: dict[str, Path], tmp_path: Path) -> None:
    """Both kinds of teacher hold the same model; the healed run is read like any other."""
    command = [sys.executable, "-m", "experiments.heal", *flags(folders, tmp_path, "--steps", "2", teacher="teacher")]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0 and "done: step 2" in done.stdout, done.stderr
    trained = run.load_trained(tmp_path)
    assert trained.step == 2 and trained.config.initial == str(folders["student"])
    (line,) = [line for line in metric_lines(str(tmp_path)) if "kl" in line]
    other = tmp_path / "other"
    train(heal.parse(flags(folders, other, "--steps", "2")))
    np.testing.assert_allclose(line["kl"], metric_lines(str(other))[-1]["kl"], rtol=1e-4)


# ---- what is refused ----


def test_flags_become_the_config(folders: dict[str, Path], reduced: Converted, tmp_path: Path) -> None:
    config = heal.parse(flags(folders, tmp_path, "--distillation.temperature", "2", "--optimizer.rates.embeddings", "0",
                              "--model.remat", "full"))
    assert config.model == dataclasses.replace(reduced[0], remat="full")
    assert config.initial == str(folders["student"]) and config.data.tokenizer == str(folders["student"] / "tokenizer")
    assert config.distillation == DistillationConfig(str(folders["teacher_run"]), temperature=2.0)
    assert config.optimizer.rates == GroupRates(embeddings=0.0)
    assert from_dict(TrainConfig, to_dict(config)) == config


def test_a_student_that_expects_the_begin_token_is_healed_and_opened_so(
        folders: dict[str, Path], reduced: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_run(tmp_path / "student", *reduced, ByteTokenizer(), add_bos_token=True)
    begun = {**folders, "student": tmp_path / "student"}
    assert heal.parse(flags(begun, tmp_path / "healed")).data.add_bos_token
    assert not heal.parse(flags(begun, tmp_path / "healed", "--data.no-add-bos-token")).data.add_bos_token
    assert not heal.parse(flags(folders, tmp_path / "healed")).data.add_bos_token
    assert open_model(str(tmp_path / "student"), None).add_bos_token
    monkeypatch.setattr(ByteTokenizer, "bos_id", None)
    with pytest.raises(ValueError, match="add_bos_token=True: the tokenizer has no begin token"):
        save_run(tmp_path / "other", *reduced, ByteTokenizer(), add_bos_token=True)
    assert not (tmp_path / "other").exists()


def test_a_checkpoint_is_held_in_what_the_run_computes_in(folders: dict[str, Path], tmp_path: Path) -> None:
    mesh = axes.make_mesh((1,) * 5, jax.devices()[:1])
    for teacher, dtype in (("teacher", jnp.bfloat16), ("teacher_run", jnp.float32)):
        config = heal.parse(flags(folders, tmp_path, "--model.dtype", "bfloat16", teacher=teacher))
        assert {leaf.dtype for leaf in jax.tree.leaves(heal.read_teacher(config, mesh).params)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize(("drop", "message"), [
    ("--teacher", "teacher=None: give --teacher"), ("--student", "student=None: give --student")])
def test_both_models_are_needed(drop: str, message: str, folders: dict[str, Path], tmp_path: Path) -> None:
    args = flags(folders, tmp_path)
    at = args.index(drop)
    with pytest.raises(ValueError, match=message):
        heal.parse(args[:at] + args[at + 2 :])


def test_a_student_without_a_checkpoint_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    with pytest.raises(ValueError, match=r"student='.*empty': holds no run"):
        heal.parse(flags({**folders, "student": empty}, tmp_path / "out"))
    (empty / run.CHECKPOINTS).mkdir(parents=True)
    with pytest.raises(ValueError, match=r"student='.*empty': holds no finished checkpoint"):
        heal.parse(flags({**folders, "student": empty}, tmp_path / "out"))
    with pytest.raises(ValueError, match=r"initial='.*student': must be the folder of another run than workdir"):
        heal.parse(flags(folders, folders["student"]))


@pytest.mark.parametrize(("changes", "distillation", "message"), [
    ({"vocab_size": 300}, {}, r"teacher 'teacher' vocab_size=300: must be the student's 264"),
    ({"num_layers": 3}, {"hidden": 0.1}, r"num_layers=3: must be the student's 2, or distillation.hidden=0 \(now 0.1"),
    ({"model_dim": 48}, {"hidden": 0.1}, r"model_dim=48: must be the student's 24"),
])
def test_another_kind_of_teacher_is_refused(
    changes: dict[str, int], distillation: dict[str, float], message: str, reduced: Converted
) -> None:
    config = config_for(reduced[0], distillation=distillation)
    with pytest.raises(ValueError, match=message):
        teacher_config(config, dataclasses.replace(GQA, **changes))
    if "vocab_size" not in changes:
        teacher_config(config_for(reduced[0]), dataclasses.replace(GQA, **changes))


def test_a_teacher_of_another_tokenizer_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    config = heal.parse(flags(folders, tmp_path))

    def other(mesh: Mesh) -> Teacher:
        return dataclasses.replace(heal.read_teacher(config, mesh), tokenizer="another")

    with pytest.raises(ValueError, match="distillation.tokenizer='that of .*teacher_run': must make the same ids of "
                                         "text as that of the run does, which is '.*student/tokenizer'"):
        loop.train(config, progress=False, devices=jax.devices()[:1], teacher=other)
    assert not (tmp_path / run.TOKENIZER).exists() and not (tmp_path / run.DATA).exists()


def test_a_teacher_and_its_config_go_together(folders: dict[str, Path], tmp_path: Path) -> None:
    config = heal.parse(flags(folders, tmp_path))
    with pytest.raises(ValueError, match="distillation=.* must be given where a teacher is read"):
        loop.train(config, progress=False, devices=jax.devices()[:1])
    with pytest.raises(ValueError, match="distillation=.* needs a loss that asks the teacher"):
        programs.lower_training(config, axes.make_mesh((1,) * 5, jax.devices()[:1]))


def test_starting_with_another_model_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    config = heal.parse(flags(folders, tmp_path))
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, ffn_dim=48))
    with pytest.raises(ValueError, match=r"initial='.*student': holds a run of another model: model.ffn_dim=48 \(sa"):
        train(other)


@pytest.mark.slow
def test_any_run_can_start_with_the_parameters_of_another(folders: dict[str, Path], tmp_path: Path) -> None:
    """Without a teacher, from the config that a conversion wrote; a tokenizer of another kind is refused."""
    converted = load_json(TrainConfig, folders["student"] / run.CONFIG)
    assert converted.data.tokenizer == str(folders["student"] / run.TOKENIZER)
    config = dataclasses.replace(
        converted, workdir=str(tmp_path / "new"), initial=str(folders["student"]), mesh=ONE, steps=1, eval_batches=2,
        optimizer=OptimizerConfig(learning_rate=1e-30, warmup_steps=0), data=dataclasses.replace(
            converted.data, source=str(folders["corpus"]), sequence_length=32, batch_size=8, held_out=0.1))
    loop.train(config, progress=False, devices=jax.devices()[:1])
    chex.assert_trees_all_close(saved_leaves(config), jax.device_get(
        run.load_trained(folders["student"]).params), atol=1e-12)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "a": 1}, unk_token="</s>"))
    words.save(str(tmp_path / "tokenizer.json"))
    other = dataclasses.replace(config, workdir=str(tmp_path / "other"), data=dataclasses.replace(
        config.data, tokenizer=str(tmp_path / "tokenizer.json")))
    with pytest.raises(ValueError, match=r"initial tokenizer='.*student/tokenizer': must make .*'.*/tokenizer.json'"):
        loop.train(other, progress=False, devices=jax.devices()[:1])
    assert not (tmp_path / "other" / run.TOKENIZER).exists()


def test_going_on_towards_something_else_is_refused(straight: TrainConfig, tmp_path: Path) -> None:
    """A run that is there has its own student, teacher, loss and frozen groups; another spelling of a path is none."""
    config, distillation = straight, straight.distillation
    assert distillation is not None and config.initial is not None
    other = dataclasses.replace(distillation, teacher=str(tmp_path / "other"))
    softer = dataclasses.replace(distillation, temperature=2.0)
    frozen = dataclasses.replace(config.optimizer, rates=GroupRates(norms=0))
    for changes, message in (
        ({"initial": str(tmp_path)}, "initial='.*': the run in .* started with '.*student'; .* or another workdir"),
        ({"distillation": other}, "distillation=.*other.*: the run in .* has .*teacher_run.* or another workdir"),
        ({"distillation": softer}, "distillation=.*'temperature': 2.0.* has .*'temperature': 1.0"),
        ({"optimizer": frozen}, r"rates with 0=\['norms'\]: the run in .* has \[\].* --initial "),
    ):
        with pytest.raises(ValueError, match=message):
            train(dataclasses.replace(config, **changes))
    shutil.copytree(config.workdir, tmp_path / "copy")
    rates = dataclasses.replace(config.optimizer, rates=GroupRates(norms=0.5))
    same = dataclasses.replace(distillation, teacher=os.path.relpath(distillation.teacher) + "/")
    result = train(dataclasses.replace(config, workdir=str(tmp_path / "copy"), optimizer=rates, distillation=same,
                                       initial=config.initial + "/"))
    assert result.step == 6 and not result.interrupted


def test_a_run_goes_on_with_the_weights_that_it_learned_from(
    straight: TrainConfig, original: Converted, tmp_path: Path
) -> None:
    """Not with others that lie at the same place by now."""
    shutil.copytree(straight.workdir, tmp_path / "copy")
    config = dataclasses.replace(straight, workdir=str(tmp_path / "copy"), steps=8)

    def another(mesh: Mesh) -> Teacher:
        found = heal.read_teacher(config, mesh)
        return dataclasses.replace(found, params=jax.tree.map(lambda x: x * 1.01, found.params))

    with pytest.raises(ValueError, match=r"distillation.teacher='.*teacher_run': holds other weights than those that "
                                         r"the run in .*copy has learned from up to step 6 .*; accepted: those"):
        loop.train(config, progress=False, devices=jax.devices()[:1], teacher=another)
    assert train(config).step == 8


def test_the_checkpoint_that_stays_is_the_nearest_to_the_teacher(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[float | None] = []
    save = Checkpoints.save

    def noting(self: Checkpoints, *args: Any, metric: float | None = None, **more: Any) -> None:
        told.append(metric)
        save(self, *args, metric=metric, **more)

    monkeypatch.setattr(Checkpoints, "save", noting)
    train(heal.parse(flags(folders, tmp_path, "--steps", "3", "--save-every", "3")))
    assert told == [metric_lines(str(tmp_path))[-1]["eval_kl"]]


def test_going_on_needs_no_student_and_starting_needs_a_text(folders: dict[str, Path], tmp_path: Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(folders["student"], student)
    here = flags({**folders, "student": student}, tmp_path / "run", "--steps", "2")
    started = heal.parse(here)
    train(started)
    shutil.rmtree(student)
    assert heal.parse(here) == started
    assert train(heal.parse(flags({**folders, "student": student}, tmp_path / "run", "--steps", "3"))).step == 3
    at = here.index("--data.source")
    with pytest.raises(ValueError, match="data.source=None: give the text to heal on"):
        heal.parse(flags(folders, tmp_path / "new")[:at] + flags(folders, tmp_path / "new")[at + 2 :])


@pytest.mark.parametrize(("more", "message"), [
    (["--preset", "tiny-mfa"], "preset='tiny-mfa': must be left out"),
    (["--initial", "x"], "initial='x': is another name of --student"),
    (["--config", "CONVERTED"], "config='.*': is of no healing run: its distillation is null"),
])
def test_flags_that_would_do_nothing_are_refused(
    more: list[str], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    more = [str(folders["student"] / run.CONFIG) if arg == "CONVERTED" else arg for arg in more]
    with pytest.raises(ValueError, match=message):
        heal.parse([*flags(folders, tmp_path), *more])


def test_initial_is_another_name_of_student(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = flags(folders, tmp_path)
    assert heal.parse(["--initial" if arg == "--student" else arg for arg in args]) == heal.parse(args)
    with pytest.raises(SystemExit):
        heal.parse(["--help"])
    shown = capsys.readouterr().out
    assert "--teacher PLACE" in shown and "--student DIR" in shown


@pytest.mark.parametrize(("make", "message"), [
    (lambda: DistillationConfig("x", temperature=0), "temperature=0: must be positive"),
    (lambda: DistillationConfig("x", cross_entropy=1.5), r"cross_entropy=1.5: must be in \[0, 1\]"),
    (lambda: DistillationConfig("x", hidden=-1), "hidden=-1: must not be negative"),
    (lambda: DistillationConfig(""), "teacher=''"),
    (lambda: TrainConfig(workdir="runs/a", initial="runs/a/"), "initial='runs/a/': must be the folder of another"),
    (lambda: GroupRates(attention=-1), "attention=-1: must be 0 or positive"),
    (lambda: GroupRates(0, 0, 0, 0), "rates=.*one of them must be positive"),
    (lambda: TrainConfig(z_loss=1e-4, distillation=DistillationConfig("x")), "z_loss=0.0001: must be 0 with distil"),
])
def test_values_that_make_no_sense(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
