"""Schedules by hand, which parameter gets which update, and where the optimizer's state lives."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers as Dimensions

from mfa_jax.config import GroupRates, OptimizerConfig
from mfa_jax.train.optimizer import (
    decay_mask,
    group_rates,
    make_optimizer,
    make_schedule,
    muon_dimensions,
    state_shardings,
)

D, N, K, H, C, Q, R, F, V, L = 16, 4, 2, 4, 8, 6, 2, 24, 32, 3
NOPE, VALUE = 4, 5

LOW_RANK = {"S_q": (D, Q), "q_norm": {"scale": (Q,)}, "Q": (Q, N, C), "S_k": (D, C), "O": (N, C, D)}
MLA = {"W_DKV": (D, C), "W_KR": (D, R), "kv_norm": {"scale": (C,)}, "W_UK": (C, N, NOPE), "W_UV": (C, N, VALUE),
       "W_O": (N, VALUE, D)}
ATTENTION: dict[str, dict[str, Any]] = {
    "gqa": {"W_Q": (D, N, H), "W_K": (D, K, H), "W_V": (D, K, H), "W_O": (N, H, D)},
    "gqa_bias_norm": {"W_Q": (D, N, H), "W_K": (D, K, H), "W_V": (D, K, H), "W_O": (N, H, D), "b_Q": (N, H),
                      "b_K": (K, H), "b_V": (K, H), "q_norm": {"scale": (H,)}, "k_norm": {"scale": (H,)}},
    "mla": {**MLA, "W_Q": (D, N, NOPE + R)},
    "mla_ranked": {**MLA, "W_DQ": (D, Q), "q_norm": {"scale": (Q,)}, "W_UQ": (Q, N, NOPE + R)},
    "mfa": {**LOW_RANK, "S_v": (D, C)},
    "mfa_kr": {**LOW_RANK, "alpha": (C,), "N_kr": (C, C)},
}


def abstract(variant: str) -> Any:
    layer = {"attention": ATTENTION[variant], "ffn": {"W_gate": (D, F), "W_up": (D, F), "W_down": (F, D)},
             "attention_norm": {"scale": (D,)}, "ffn_norm": {"scale": (D,)}}
    stacked = jax.tree.map(lambda s: (L, *s), layer, is_leaf=lambda x: isinstance(x, tuple))
    shapes = {"layers": stacked, "embed": (V, D), "unembed": (V, D), "final_norm": {"scale": (D,)}}
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple))


def normal(tree: Any, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), tree)


def by_name(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is None or isinstance(x, Dimensions))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


# ---- schedules ----


def values(config: OptimizerConfig, steps: int, at: list[int]) -> list[float]:
    schedule = make_schedule(config, steps)
    return [float(schedule(jnp.asarray(i))) for i in at]


def test_cosine_by_hand() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10, final_fraction=0.1)
    quarter = 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2
    np.testing.assert_allclose(values(config, 110, [0, 1, 5, 10, 35, 60, 110, 500]),
                               [0, 0.1, 0.5, 1, quarter, 0.55, 0.1, 0.1], rtol=1e-6)


def test_warmup_stable_decay_by_hand() -> None:
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=10, schedule="wsd", decay_fraction=0.2,
                             final_fraction=0.5)
    np.testing.assert_allclose(values(config, 100, [0, 5, 10, 79, 80, 90, 100, 200]),
                               [0, 1, 2, 2, 2, 1.5, 1, 1], rtol=1e-6)


def test_warmup_stable_decay_that_decays_all_the_way() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=20, schedule="wsd", decay_fraction=1.0, final_fraction=0)
    np.testing.assert_allclose(values(config, 100, [20, 60, 100]), [1, 0.5, 0], atol=1e-6)


def test_constant_and_no_warmup() -> None:
    config = OptimizerConfig(learning_rate=0.5, warmup_steps=4, schedule="constant")
    np.testing.assert_allclose(values(config, 10, [0, 2, 4, 100]), [0, 0.25, 0.5, 0.5])
    np.testing.assert_allclose(values(OptimizerConfig(learning_rate=0.5, warmup_steps=0), 10, [0, 10]), [0.5, 0.05])


def test_schedule_steps_override_the_length_of_the_run() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=0, schedule_steps=100, final_fraction=0)
    np.testing.assert_allclose(values(config, 50, [50, 100]), [0.5, 0], atol=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_a_run_within_its_warmup(schedule: Any) -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=50, schedule=schedule)
    np.testing.assert_allclose(values(config, 50, [0, 25, 49]), [0, 0.5, 0.98], rtol=1e-6)


# ---- which parameter gets which update ----

PROJECTIONS = {"W_Q", "W_K", "W_V", "W_O", "W_DKV", "W_KR", "W_UK", "W_UV", "W_DQ", "W_UQ", "S_q", "Q", "S_k", "S_v",
               "O", "N_kr", "W_gate", "W_up", "W_down"}


@pytest.mark.parametrize("variant", ATTENTION)
def test_weight_decay_and_muon_go_by_name(variant: str) -> None:
    params = abstract(variant)
    for path, decays in by_name(decay_mask(OptimizerConfig(), params)).items():
        assert decays == (path.rpartition("/")[2] in PROJECTIONS), path
    for path, decays in by_name(decay_mask(OptimizerConfig(decay_embeddings=True), params)).items():
        assert decays == (path.rpartition("/")[2] in PROJECTIONS | {"embed", "unembed"}), path
    for path, dimensions in by_name(muon_dimensions(params)).items():
        assert (dimensions is not None) == (path.rpartition("/")[2] in PROJECTIONS), path


def test_decay_shrinks_projections_alone() -> None:
    whole = normal(abstract("mfa_kr"))
    some = {name: whole["layers"]["attention"][name] for name in ("N_kr", "alpha", "q_norm")}
    params = {"layers": {"attention": some}, "embed": whole["embed"]}
    zeros = jax.tree.map(jnp.zeros_like, params)
    cases: list[tuple[Any, bool]] = [("adamw", False), ("adamw", True), ("muon", True)]
    for kind, tables in cases:
        config = OptimizerConfig(kind=kind, learning_rate=0.5, warmup_steps=0, schedule="constant",
                                 weight_decay=0.1, decay_embeddings=tables)
        optimizer = make_optimizer(config, 10, params)
        updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
        expected = jax.tree.map(lambda p, m: -0.05 * p if m else 0 * p, params, decay_mask(config, params))
        chex.assert_trees_all_close(updates, expected, rtol=1e-6)


# The matrices of a parameter with a leading layer axis: its last axes as (batch, rows summed over, columns produced).
MATRICES = {
    "W_Q": lambda x: x.transpose(0, 2, 1, 3).reshape(L * x.shape[2], x.shape[1], x.shape[3]),
    "W_O": lambda x: x.reshape(L, -1, x.shape[-1]),
    "S_q": lambda x: x,
}
LIKE = {"Q": "W_Q", "W_K": "W_Q", "W_V": "W_Q", "W_UK": "W_Q", "W_UV": "W_Q", "W_UQ": "W_Q", "O": "W_O"}


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["gqa", "mla_ranked", "mfa_kr"])
def test_muon_orthogonalises_each_head_and_the_rest_is_adamw(variant: str) -> None:
    params = {"layers": {"attention": normal(abstract(variant))["layers"]["attention"]}}
    gradients = normal(params, 1)
    config = OptimizerConfig(kind="muon", learning_rate=1.0, warmup_steps=0, schedule="constant", weight_decay=0.0,
                             clip_norm=None)

    def first_update(kind: Any) -> dict[str, Any]:
        optimizer = make_optimizer(OptimizerConfig(**{**vars(config), "kind": kind}), 10, params)
        return by_name(jax.jit(optimizer.update)(gradients, jax.jit(optimizer.init)(params), params)[0])

    muon, adamw = first_update("muon"), first_update("adamw")
    for path, update in muon.items():
        name = path.rpartition("/")[2]
        if name not in PROJECTIONS:
            np.testing.assert_allclose(update, adamw[path], rtol=1e-6, err_msg=path)
            continue
        matrices = np.asarray(MATRICES.get(LIKE.get(name, name), MATRICES["S_q"])(update))
        scale = 0.2 * math.sqrt(max(matrices.shape[1:]))
        singular = np.linalg.svd(matrices, compute_uv=False) / scale
        # Five Newton-Schulz steps bring the singular values near 1, not to it (optax: about 0.5 .. 1.5); a gradient
        # that is orthogonalised along other axes has values down to 0.
        assert singular.min() > 0.3 and singular.max() < 1.3, (path, singular.min(), singular.max())


def test_a_zero_gradient_stays_zero_under_muon() -> None:
    params = {"layers": {"attention": {"N_kr": jnp.ones((L, C, C))}}}
    optimizer = make_optimizer(OptimizerConfig(kind="muon", warmup_steps=0, weight_decay=0.0), 10, params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
    chex.assert_trees_all_equal(updates, zeros)


def test_clipping_by_global_norm() -> None:
    params = {"layers": {"ffn": normal(abstract("mfa"))["layers"]["ffn"]}}
    gradients = normal(params, 1)
    norm = math.sqrt(sum(float((np.asarray(g, np.float64) ** 2).sum()) for g in jax.tree.leaves(gradients)))
    for clip in (0.5, None, 1e9):
        optimizer = make_optimizer(OptimizerConfig(clip_norm=clip, b1=0.0), 10, params)
        _, state = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
        moments = jax.tree.leaves(optax.tree.get(state, "mu"))
        found = math.sqrt(sum(float((np.asarray(m, np.float64) ** 2).sum()) for m in moments))
        assert found == pytest.approx(min(norm, clip or norm), rel=1e-5)


def test_adamw_by_hand() -> None:
    params = {"layers": {"ffn": {"W_up": jnp.full((1, 1, 1), 2.0)}}}
    gradients = {"layers": {"ffn": {"W_up": jnp.full((1, 1, 1), 0.5)}}}
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=0, schedule="constant", b1=0.9, b2=0.99, eps=1e-8,
                             weight_decay=0.3, clip_norm=None)
    optimizer = make_optimizer(config, 10, params)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    np.testing.assert_allclose(updates["layers"]["ffn"]["W_up"], -0.1 * (1 + 0.3 * 2.0), rtol=1e-5)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_unknown_names_and_ranks_raise(kind: Any) -> None:
    config = OptimizerConfig(kind=kind)
    params = abstract("mfa")
    unknown = {**params, "bias": jax.ShapeDtypeStruct((D,), jnp.float32)}
    with pytest.raises(ValueError, match="parameter bias: the optimizer does not know 'bias'; known: N_kr, O"):
        make_optimizer(config, 10, unknown)
    flat = {"layers": {"attention": {"S_q": jax.ShapeDtypeStruct((D, Q), jnp.float32)}}}
    with pytest.raises(ValueError, match=r"layers/attention/S_q: has shape \(16, 6\), expected 3 axes"):
        make_optimizer(config, 10, flat)


# ---- rates by group ----

GROUP_OF = {"attention": "attention", "ffn": "feed_forward", "attention_norm": "norms", "ffn_norm": "norms",
            "final_norm": "norms", "embed": "embeddings", "unembed": "embeddings"}


@pytest.mark.parametrize("variant", ["gqa_bias_norm", "mla_ranked", "mfa_kr"])
def test_each_parameter_has_the_rate_of_its_group(variant: str) -> None:
    rates = GroupRates(attention=0.5, feed_forward=2.0, norms=0.0, embeddings=0.25)
    found = by_name(group_rates(OptimizerConfig(rates=rates), abstract(variant)))
    for path, rate in found.items():
        module = path.removeprefix("layers/").split("/")[0]
        assert rate == getattr(rates, GROUP_OF[module]), path
    assert set(found.values()) == {0.5, 2.0, 0.0, 0.25}
    with pytest.raises(ValueError, match="parameter='other/scale': must lie in one of attention, ffn"):
        group_rates(OptimizerConfig(), {"other": {"scale": jax.ShapeDtypeStruct((D,), jnp.float32)}})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_rate_is_a_learning_rate(kind: Any) -> None:
    """Over two steps, weight decay included: each group moves as it does alone at that learning rate, and what is
    frozen has no update, though its gradient is large."""
    params = normal(abstract("mfa_kr"))
    rates = GroupRates(attention=0.5, feed_forward=2.0, norms=0.0)

    def moved(config: OptimizerConfig) -> dict[str, Any]:
        optimizer = make_optimizer(config, 10, params)
        state, now = jax.jit(optimizer.init)(params), params
        for seed in (1, 2):
            updates, state = jax.jit(optimizer.update)(normal(params, seed), state, now)
            now = optax.apply_updates(now, updates)
        return by_name(now)

    config = OptimizerConfig(kind=kind, learning_rate=0.1, warmup_steps=0, schedule="constant", clip_norm=None)
    found = moved(dataclasses.replace(config, rates=rates))
    alone = {name: moved(dataclasses.replace(config, learning_rate=0.1 * rate))
             for name, rate in vars(rates).items() if rate}
    start = by_name(params)
    for path, value in found.items():
        group = GROUP_OF[path.removeprefix("layers/").split("/")[0]]
        if group == "norms":
            np.testing.assert_array_equal(value, start[path], err_msg=path)
        else:
            np.testing.assert_allclose(value, alone[group][path], rtol=1e-4, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_what_is_frozen_has_no_state_and_rates_change_no_layout(kind: Any) -> None:
    params = abstract("mfa")

    def state(**rates: float) -> dict[str, Any]:
        config = OptimizerConfig(kind=kind, rates=GroupRates(**rates))
        return by_name(jax.eval_shape(make_optimizer(config, 10, params).init, params))

    assert state(attention=0.5).keys() == state().keys()
    frozen = state(feed_forward=0, embeddings=0)
    assert any("S_q" in path for path in frozen)
    assert not any(name in path for path in frozen for name in ("W_up", "embed"))


def test_layers_that_are_not_stacked() -> None:
    params = normal({"layer_0": {"attention": {"Q": jax.ShapeDtypeStruct((Q, N, C), jnp.float32)}}})
    optimizer = make_optimizer(OptimizerConfig(kind="muon", learning_rate=1.0, warmup_steps=0, weight_decay=0.0,
                                               schedule="constant"), 10, params)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    heads = np.asarray(updates["layer_0"]["attention"]["Q"]).transpose(1, 0, 2)
    singular = np.linalg.svd(heads, compute_uv=False) / (0.2 * math.sqrt(C))
    assert singular.min() > 0.3 and singular.max() < 1.3


# ---- sharding ----


def sharding_of(mesh: jax.sharding.Mesh, leaf: Any) -> NamedSharding:
    """Splits the last axis that divides, so that every parameter of two and more axes is split."""
    entries: list[str | None] = [None] * leaf.ndim
    entries[-1] = "fsdp" if leaf.ndim > 1 and leaf.shape[-1] % mesh.size == 0 else None
    return NamedSharding(mesh, PartitionSpec(*entries))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_lives_where_its_parameter_does_and_updates_agree(kind: Any) -> None:
    if jax.device_count() < 8:
        pytest.skip(f"needs 8 devices, there are {jax.device_count()}")
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    whole_model = normal(abstract("mfa_kr"))
    attention = {name: whole_model["layers"]["attention"][name] for name in ("Q", "O", "alpha")}
    params = {"layers": {"attention": attention}, "embed": whole_model["embed"]}
    gradients = normal(params, 1)
    optimizer = make_optimizer(OptimizerConfig(kind=kind, warmup_steps=0), 10, params)
    where = jax.tree.map(lambda x: sharding_of(mesh, x), params)
    state_where = state_shardings(jax.eval_shape(optimizer.init, params), params, where)
    state = jax.jit(optimizer.init, out_shardings=state_where)(params)

    moments = [(path, leaf) for path, leaf in by_name(state).items() if leaf.shape]
    for path, leaf in moments:
        if leaf.ndim > 1 and leaf.shape[-1] % 8 == 0:
            assert not leaf.sharding.is_fully_replicated, path
    names = {path.split("/", 1)[-1] for path, _ in moments}
    assert any("mu/layers/attention/Q" in name for name in names)

    whole, _ = jax.jit(optimizer.update)(gradients, jax.jit(optimizer.init)(params), params)
    split = jax.jit(optimizer.update, out_shardings=(where, state_where))
    updates, new_state = split(jax.device_put(gradients, where), state, jax.device_put(params, where))
    chex.assert_trees_all_close(jax.device_get(updates), jax.device_get(whole), rtol=2e-4, atol=1e-6)
    for leaf, want in zip(jax.tree.leaves(new_state), jax.tree.leaves(state_where), strict=True):
        assert leaf.sharding.is_equivalent_to(want, leaf.ndim)


def test_state_of_another_shape_is_replicated() -> None:
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    split, whole = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec())
    params = {"embed": jax.ShapeDtypeStruct((4, 2), jnp.float32)}
    state = {"mu": params, "row": {"embed": jax.ShapeDtypeStruct((4,), jnp.float32)}, "count": jnp.zeros(())}
    assert state_shardings(state, params, {"embed": split}) == {
        "mu": {"embed": split}, "row": {"embed": whole}, "count": whole}
