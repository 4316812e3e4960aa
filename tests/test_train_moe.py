"""Training a mixture of experts: one step on other meshes and in parts, its metrics, its biases, and resuming."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest

from mfa_jax import axes
from mfa_jax.config import DataConfig, MeshConfig, MoEConfig, OptimizerConfig, TrainConfig, from_dict
from mfa_jax.layers import at_path, stacked_blocks
from mfa_jax.model.transformer import Transformer
from mfa_jax.train import run, starting
from mfa_jax.train.loop import train
from mfa_jax.train.optimizer import make_optimizer, make_schedule
from mfa_jax.train.step import BATCH_SPEC, create_state, make_train_step, state_layout
from tests.contract import model_config
from tests.test_train import one_step, synthetic_batch

ONE = MeshConfig(data=1)
MOE = MoEConfig(num_experts=8, experts_per_token=2, expert_dim=16, shared_dim=8, layers=(1, 2), balance_loss=0.01,
                balance_over="sequence", bias_update_rate=0.01)
pytestmark = pytest.mark.xdist_group("train")


def config_for(workdir: Path, moe: MoEConfig = MOE, **changes: object) -> TrainConfig:
    """Without adaptive scaling or clipping, so that parameter differences are gradient differences."""
    model = dataclasses.replace(model_config("mfa", num_layers=4), vocab_size=264, moe=moe)
    config = TrainConfig(
        workdir=str(workdir), model=model, mesh=ONE, data=DataConfig(sequence_length=32, batch_size=8, held_out=0.1),
        optimizer=OptimizerConfig(warmup_steps=0, schedule="constant", learning_rate=1e-2, eps=1.0, clip_norm=None,
                                  weight_decay=0.0), steps=4, log_every=1, save_every=2, eval_every=0, eval_batches=1)
    return dataclasses.replace(config, **changes)


def biases(params: Any) -> np.ndarray:
    rows = [np.asarray(at_path(params["layers"], path)["moe"]["router_bias"])
            for path, _ in stacked_blocks(params["layers"]) if "moe" in at_path(params["layers"], path)]
    return np.concatenate(rows)


def assert_same_step(found: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    """Metrics and parameters after the step, and the gradient leaf by leaf, as Adam's first moment has it."""
    chex.assert_trees_all_close(jax.device_get(found[1]), jax.device_get(expected[1]), rtol=2e-5, atol=1e-6)
    chex.assert_trees_all_close(jax.device_get(found[0].params), jax.device_get(expected[0].params), atol=1e-6)
    a, b = jax.device_get((found[0].optimizer, expected[0].optimizer))
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert np.abs(x - y).max() <= 2e-5 * (np.abs(y).max() + 1e-12), jax.tree_util.keystr(path)


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "over"), [
    (MeshConfig(data=2, fsdp=2, tensor=2), "batch"), (MeshConfig(data=1, fsdp=2, expert=4), "sequence"),
    (MeshConfig(data=2, expert=2, tensor=2), "batch"), (MeshConfig(data=1, expert=8), "sequence"),
], ids=["data-fsdp-tensor", "fsdp-expert", "data-expert-tensor", "expert"])
@pytest.mark.parametrize("at_once", [None, 8])
def test_a_sharded_step_equals_that_of_one_device(
        mesh: MeshConfig, over: str, at_once: int | None, tmp_path: Path) -> None:
    moe = dataclasses.replace(MOE, balance_over=over)
    single = one_step(config_for(tmp_path, moe), 1)
    config = config_for(tmp_path, moe, mesh=mesh)
    sharded = one_step(dataclasses.replace(
        config, model=dataclasses.replace(config.model, expert_exchange_tokens=at_once)), 8)
    assert_same_step(sharded, single)
    split = sharded[0].params["layers"]["segment_1"]["block_0"]["moe"]["experts_up"]
    assert split.addressable_shards[0].data.size * mesh.fsdp * mesh.expert * mesh.tensor == split.size


STEPS = 20


def losses(config: TrainConfig, devices: int) -> list[float]:
    """Of 20 steps of AdamW on four batches in turn, on a mesh of so many devices; one compilation."""
    mesh = axes.make_mesh(dataclasses.astuple(config.mesh), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        model = Transformer(config.model)
        optimizer = make_optimizer(config.optimizer, config.steps, run.abstract_params(model, mesh))
        layout = state_layout(config, model, optimizer, mesh)
        state = create_state(config, model, optimizer, layout)
        step = jax.jit(make_train_step(config, model, optimizer, make_schedule(config.optimizer, config.steps)),
                       donate_argnums=0, out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, layout), None))
        where, found = jax.sharding.NamedSharding(mesh, BATCH_SPEC), []
        for i in range(STEPS):
            batch = jax.device_put(synthetic_batch(config, seed=i % 4), where)
            state, metrics = step(state, batch)
            found.append(float(metrics["loss"]))
            assert int(metrics.get("dropped_tokens", 0)) == 0
    return found


def curve_config(workdir: Path, **changes: object) -> TrainConfig:
    optimizer = OptimizerConfig(learning_rate=3e-3, warmup_steps=5)
    return config_for(workdir, optimizer=optimizer, steps=STEPS, **changes)


@pytest.fixture(scope="module")
def curve_of_one_device(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    found = losses(curve_config(tmp_path_factory.mktemp("one")), 1)
    assert found[-1] < found[0] - 0.1
    return found


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [
    MeshConfig(data=1, expert=8), MeshConfig(data=2, expert=4), MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
    MeshConfig(data=2, fsdp=2, expert=2), MeshConfig(data=1, expert=4, tensor=2),
], ids=lambda mesh: "-".join(f"{axis}{size}" for axis, size in dataclasses.asdict(mesh).items() if size > 1))
def test_twenty_steps_over_the_axis_of_experts(
    mesh: MeshConfig, curve_of_one_device: list[float], tmp_path: Path
) -> None:
    np.testing.assert_allclose(losses(curve_config(tmp_path, mesh=mesh), 8), curve_of_one_device, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_step_in_parts_equals_that_of_the_whole_batch(tmp_path: Path) -> None:
    """The balance loss of each row counts by its targets, so that it adds up too."""
    assert_same_step(one_step(config_for(tmp_path, accumulate=4), 1), one_step(config_for(tmp_path), 1))


def test_the_step_reports_its_routers_and_moves_their_biases(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    state, metrics = one_step(config, 1)
    metrics = jax.device_get(metrics)
    assert {name for name in metrics if "/" in name} == {
        f"{name}/layer_{i}" for i in (1, 2) for name in ("expert_counts", "expert_max_load", "router_entropy")}
    assert metrics["dropped_tokens"] == 0 and metrics["balance_loss"] > 0.9
    counts = np.stack([metrics[f"expert_counts/layer_{i}"] for i in (1, 2)])
    np.testing.assert_array_equal(counts.sum(axis=1), 2 * 8 * 32)
    np.testing.assert_allclose([metrics[f"expert_max_load/layer_{i}"] for i in (1, 2)], counts.max(1) / 64)
    np.testing.assert_allclose(biases(state.params), 0.01 * np.sign(64.0 - counts), rtol=1e-6)
    _, without = one_step(config_for(tmp_path, dataclasses.replace(MOE, balance_loss=0.0)), 1)
    assert float(without["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-6), "the loss told is the likelihood"
    assert float(without["grad_norm"]) != float(metrics["grad_norm"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_run_with_experts_trains_and_resumes_bit_for_bit(kind: str, tmp_path: Path) -> None:
    source = tmp_path / "text.txt"
    source.write_text(Path(__file__).read_text())
    optimizer = OptimizerConfig(kind=kind, warmup_steps=1, learning_rate=1e-2, schedule_steps=4)
    config = config_for(tmp_path / "whole", optimizer=optimizer)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=str(source), held_out=0.0))
    devices = jax.devices()[:1]
    whole = train(config, progress=False, devices=devices)
    parts = dataclasses.replace(config, workdir=str(tmp_path / "parts"))
    train(dataclasses.replace(parts, steps=2), progress=False, devices=devices)
    train(parts, progress=False, devices=devices)
    found, expected = (run.load_trained(c.workdir).params for c in (parts, config))
    chex.assert_trees_all_equal(jax.device_get(found), jax.device_get(expected))
    lines = [json.loads(line) for line in (Path(config.workdir) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert len(lines[-1]["expert_counts/layer_1"]) == 8 and whole.metrics["dropped_tokens"] == 0
    assert np.abs(biases(found)).max() <= 0.04 * (1 + 1e-6)


def test_a_config_saved_before_there_were_experts_is_a_dense_model() -> None:
    saved = {"model": {"vocab_size": 264, "num_layers": 2, "model_dim": 64, "ffn_dim": 192}}
    model = from_dict(TrainConfig, saved).model
    assert model.moe is None and model.moe_layers == ()


def test_experts_that_do_not_divide_are_named(tmp_path: Path) -> None:
    config = config_for(tmp_path, dataclasses.replace(MOE, num_experts=6), mesh=MeshConfig(data=2, expert=4))
    with pytest.raises(ValueError, match=r"axis 'experts' of size 6 does not divide over mesh expert=4"):
        one_step(config, 8)
    assert axes.RULES.spec("layers", "experts", "embed", "ffn") == jax.P(None, "expert", "fsdp", "tensor")


def test_a_start_says_what_it_trains_where_and_what_auto_became(tmp_path: Path) -> None:
    config = config_for(tmp_path, mesh=MeshConfig(data=2, expert=4))
    mesh = axes.make_mesh(dataclasses.astuple(config.mesh))
    with jax.set_mesh(mesh):
        line = starting.describe(config, mesh)
    count = sum(leaf.size for leaf in jax.tree.leaves(run.abstract_params(Transformer(config.model), mesh)))
    assert line.startswith(f"mfa, 4 layers of 24, {count:,} parameters (") and "active) in float32" in line
    assert line.endswith("; 8 x cpu, data=2, expert=4; attention by dense, experts by ragged_dot, padded exchange; "
                         "8 x 32 tokens a step")
