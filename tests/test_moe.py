"""The mixture of experts against a loop over tokens and experts in float64, and its pieces one by one."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st

from mfa_jax import axes, capacity
from mfa_jax.config import MoEConfig, from_dict, to_dict
from mfa_jax.layers import at_path, stacked_blocks
from mfa_jax.model import dispatch
from mfa_jax.model.dispatch import experts_over_mesh, make_route, resolve_exchange, take_rows
from mfa_jax.model.grouped import grouped_matmul, resolve
from mfa_jax.model.layers import SwiGLU
from mfa_jax.model.moe import MoE, Routing, route, updated_bias
from mfa_jax.model.stack import REMAT_POLICIES, Segment, segments_of
from mfa_jax.model.transformer import Transformer, init_cache, unstack_layers
from tests.contract import model_config, tokens

B, T, D = 3, 5, 12
SOFTMAX = MoEConfig(num_experts=6, experts_per_token=2, expert_dim=8, shared_dim=10, renormalize=False)
SIGMOID = MoEConfig(num_experts=6, experts_per_token=3, expert_dim=8, scores="sigmoid", output_scale=2.5,
                    bias_update_rate=0.01)
CONFIGS = {"softmax": SOFTMAX, "sigmoid": SIGMOID, "renormalised": dataclasses.replace(SOFTMAX, renormalize=True),
           "one": dataclasses.replace(SOFTMAX, experts_per_token=1), "all": dataclasses.replace(SOFTMAX,
                                                                                               experts_per_token=6)}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def inputs(seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (B, T, D))


def parameters(config: MoEConfig, **options: Any) -> Any:
    params = nn.unbox(MoE(config, **options).init(jax.random.key(1), inputs()))["params"]
    if "router_bias" in params:
        params["router_bias"] = 0.2 * jax.random.normal(jax.random.key(2), params["router_bias"].shape)
    return params


@functools.partial(jax.jit, static_argnames=("config", "implementation"))
def apply(config: MoEConfig, params: Any, x: jax.Array, segments: Any = None, implementation: str = "auto") -> Any:
    return MoE(config, implementation=implementation).apply({"params": params}, x, segments)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def loop(config: MoEConfig, params: Any, x: np.ndarray) -> tuple[np.ndarray, list[list[int]]]:
    """Token by token, expert by expert, in float64; the experts of each token besides."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    out, chosen = np.zeros(x.shape), []
    for b, t in np.ndindex(x.shape[:2]):
        token = np.asarray(x[b, t], np.float64)
        logits = token @ p["router"]
        scores = np.exp(logits) / np.exp(logits).sum() if config.scores == "softmax" else 1 / (1 + np.exp(-logits))
        ranked = scores + p.get("router_bias", 0.0)
        best = sorted(range(config.num_experts), key=lambda e: (-ranked[e], e))[: config.experts_per_token]
        total = sum(scores[e] for e in best) if config.renormalize else 1.0
        for e in best:
            hidden = silu(token @ p["experts_gate"][e]) * (token @ p["experts_up"][e])
            out[b, t] += config.output_scale * scores[e] / total * (hidden @ p["experts_down"][e])
        if "shared" in p:
            s = p["shared"]
            out[b, t] += (silu(token @ s["W_gate"]) * (token @ s["W_up"])) @ s["W_down"]
        chosen.append(best)
    return out, chosen


@configs
def test_equals_the_loop_over_tokens_and_experts(config: MoEConfig) -> None:
    params, x = parameters(config), inputs()
    y, routing = apply(config, params, x)
    expected, chosen = loop(config, params, np.asarray(x))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(routing.counts, np.bincount(np.ravel(chosen), minlength=config.num_experts))
    assert int(routing.dropped) == 0


@configs
def test_gradients_are_the_slopes_of_the_loop(config: MoEConfig) -> None:
    """Along a random direction of each leaf, against central differences in float64; none crosses a tie here."""
    params, x = parameters(config), inputs()
    weights = np.asarray(jax.random.normal(jax.random.key(3), x.shape))
    found = jax.grad(lambda p, x: jnp.sum(weights * apply(config, p, x)[0]), (0, 1))(params, x)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, x))
    leaves, tree = jax.tree.flatten(wide)
    r = np.random.default_rng(0)
    for i, (path, gradient) in enumerate(jax.tree_util.tree_leaves_with_path(found)):
        direction = r.normal(size=gradient.shape)

        def value(step: float) -> float:
            moved = [leaf + step * direction if j == i else leaf for j, leaf in enumerate(leaves)]  # noqa: B023
            return float(np.sum(weights * loop(config, *jax.tree.unflatten(tree, moved))[0]))

        slope = (value(1e-6) - value(-1e-6)) / 2e-6
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(np.sum(np.asarray(gradient) * direction), slope, rtol=2e-4, atol=1e-5, err_msg=where)
        by_design = "router_bias" in where
        assert np.any(np.asarray(gradient)) != by_design, where


def test_one_expert_is_the_dense_feed_forward() -> None:
    config = MoEConfig(num_experts=1, experts_per_token=1, expert_dim=8)
    params, x = parameters(config), inputs()
    dense = {f"W_{name}": params[f"experts_{name}"][0] for name in ("gate", "up", "down")}
    expected = SwiGLU(8).apply({"params": dense}, x)
    chex.assert_trees_all_close(apply(config, params, x)[0], expected, rtol=1e-5, atol=1e-6)


def test_permuting_tokens_or_experts_permutes_the_result() -> None:
    params, x = parameters(SIGMOID), inputs()
    y, routing = apply(SIGMOID, params, x)
    order = np.array([3, 0, 4, 1, 2])
    chex.assert_trees_all_close(apply(SIGMOID, params, x[:, order])[0], y[:, order], rtol=1e-6, atol=1e-6)
    experts = np.array([2, 5, 0, 1, 4, 3])
    shuffled = {**{name: leaf[experts] for name, leaf in params.items() if name != "router"},
                "router": params["router"][:, experts]}
    y_shuffled, shuffled_routing = apply(SIGMOID, shuffled, x)
    chex.assert_trees_all_close(y_shuffled, y, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(shuffled_routing.counts, routing.counts[experts])


def test_of_equal_scores_the_first_experts_are_taken() -> None:
    params = parameters(SOFTMAX)
    params["router"] = jnp.zeros_like(params["router"])
    y, routing = apply(SOFTMAX, params, inputs())
    np.testing.assert_array_equal(routing.counts, [B * T, B * T, 0, 0, 0, 0])
    np.testing.assert_allclose(y, loop(SOFTMAX, params, np.asarray(inputs()))[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(routing.entropy / routing.tokens, np.log(6), rtol=1e-6)


def test_the_bias_chooses_and_does_not_weigh() -> None:
    params, x = parameters(SIGMOID), inputs()
    logits = x @ params["router"]
    bias = jnp.zeros(6).at[4].set(10.0)
    chosen, weights, scores = route(logits, bias, SIGMOID)
    assert np.all(np.any(np.asarray(chosen) == 4, axis=-1))
    np.testing.assert_allclose(np.sum(weights, axis=-1), SIGMOID.output_scale, rtol=1e-6)
    picked = np.take_along_axis(np.asarray(scores), np.asarray(chosen), axis=-1)
    np.testing.assert_allclose(weights, SIGMOID.output_scale * picked / picked.sum(-1, keepdims=True), rtol=1e-6)


def test_routing_is_float32_in_a_bfloat16_model() -> None:
    """Two experts whose logits differ by less than bfloat16 tells apart."""
    config = MoEConfig(num_experts=2, experts_per_token=1, expert_dim=8)
    params = parameters(config, dtype=jnp.bfloat16)
    params["router"] = jnp.ones((D, 2)).at[0, 1].add(2**-12)
    y, routing = MoE(config, dtype=jnp.bfloat16).apply({"params": params}, jnp.ones((1, 1, D), jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(routing.counts, [0, 1])
    biased = nn.unbox(MoE(SIGMOID, param_dtype=jnp.bfloat16).init(jax.random.key(0), inputs()))["params"]
    assert biased["router_bias"].dtype == jnp.float32 and biased["router"].dtype == jnp.bfloat16


# ---- balance ----


@pytest.mark.parametrize("over", ["sequence", "batch"])
def test_balance_loss_by_hand(over: str) -> None:
    config = dataclasses.replace(SIGMOID, balance_over=over)
    params, x = parameters(config), inputs()
    segments = jnp.array([[1, 1, 1, 1, 1], [1, 1, 2, 2, 0], [1, 0, 0, 0, 0]])
    routing = apply(config, params, x, segments)[1]
    counted = np.asarray(segments != 0)
    chosen = np.array(loop(config, params, np.asarray(x))[1]).reshape(B, T, -1)
    scores = 1 / (1 + np.exp(-np.asarray(x, np.float64) @ np.asarray(params["router"], np.float64)))
    shares = scores / scores.sum(-1, keepdims=True)

    def balance(rows: list[int]) -> float:
        n = counted[rows].sum()
        counts = np.bincount(chosen[rows][counted[rows]].ravel(), minlength=6)
        return float(6 / (3 * n) * np.sum(counts * shares[rows][counted[rows]].mean(axis=0)))

    expected = [balance([b]) for b in range(B)] if over == "sequence" else [balance([0, 1, 2])] * B
    np.testing.assert_allclose(routing.balance, expected, rtol=1e-5)
    np.testing.assert_array_equal(routing.counts, np.bincount(chosen[counted].ravel(), minlength=6))
    assert int(routing.tokens) == counted.sum() and int(routing.dropped) == 0


def test_balance_loss_of_an_even_load_is_one() -> None:
    """Each token alone with its expert, scores even over the row."""
    config = MoEConfig(num_experts=4, experts_per_token=1, expert_dim=4)
    params = parameters(config)
    params["router"] = 8.0 * jnp.eye(D, 4)
    x = jnp.eye(4, D)[None]
    np.testing.assert_allclose(apply(config, params, x)[1].balance, [1.0], rtol=1e-6)
    collapsed = jnp.broadcast_to(x[:, :1], x.shape)
    assert float(apply(config, params, collapsed)[1].balance[0]) > 3.9


def test_biases_even_the_load_without_a_gradient() -> None:
    """A router that sends nearly all to expert 0 is turned around by its biases alone."""
    config = dataclasses.replace(SIGMOID, experts_per_token=1)
    params = parameters(config)
    params["router_bias"] = jnp.zeros(6)
    x = inputs().at[..., 0].set(4.0)
    params["router"] = 0.3 * params["router"].at[0].set(jnp.array([2.0, 0, 0, 0, 0, 0]))
    first = apply(config, params, x)[1]
    assert int(first.counts[0]) > 12
    for _ in range(200):
        params["router_bias"] = updated_bias(params["router_bias"], apply(config, params, x)[1].counts, 0.01)
    last = apply(config, params, x)[1]
    assert int(jnp.max(last.counts)) <= 6
    np.testing.assert_allclose(updated_bias(jnp.zeros(3), jnp.array([1, 2, 6]), 0.5), [0.5, 0.5, -0.5])


# ---- pieces ----


@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 99))
def test_take_rows_and_its_gradient(repeats: int, rows: int, seed: int) -> None:
    r = np.random.default_rng(seed)
    order = r.permutation(rows * repeats)
    x, cotangent = (jnp.asarray(r.normal(size=(count, 2)), jnp.float32) for count in (rows, rows * repeats))
    y, pull = jax.vjp(lambda x: take_rows(x, jnp.asarray(order), jnp.asarray(np.argsort(order)), repeats), x)
    y_plain, pull_plain = jax.vjp(lambda x: x[order // repeats], x)
    chex.assert_trees_all_equal(y, y_plain)
    chex.assert_trees_all_close(pull(cotangent), pull_plain(cotangent), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [[3, 0, 4, 2], [0, 0, 9, 0], [2, 0, 3, 1]])
def test_megablox_equals_ragged_dot(sizes: list[int]) -> None:
    rows, weights = jax.random.normal(jax.random.key(0), (9, 12)), jax.random.normal(jax.random.key(1), (4, 12, 8))
    groups = jnp.array(sizes, jnp.int32)

    @functools.partial(jax.jit, static_argnames="name")
    def both(rows: jax.Array, weights: jax.Array, name: str) -> Any:
        def loss(rows: jax.Array, weights: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(grouped_matmul(rows, weights, groups, name)))

        return grouped_matmul(rows, weights, groups, name), jax.grad(loss, (0, 1))(rows, weights)

    found, expected = (both(rows, weights, name) for name in ("megablox_interpret", "ragged_dot"))
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)
    served = np.repeat(range(4), sizes)
    by_hand = np.stack([np.asarray(rows[m]) @ np.asarray(weights[e]) for m, e in enumerate(served)])
    np.testing.assert_allclose(expected[0][: len(served)], by_hand, rtol=1e-5, atol=1e-5)
    assert not np.any(expected[0][len(served) :])


def test_what_a_grouped_product_resolves_to() -> None:
    assert [resolve("auto", platform) for platform in ("cpu", "gpu", "tpu")] == ["ragged_dot", "ragged_dot", "megablox"]
    assert resolve("ragged_dot", "tpu") == "ragged_dot"
    with pytest.raises(NotImplementedError, match="'megablox': runs on tpu, not on cpu; use auto, ragged_dot"):
        grouped_matmul(jnp.ones((2, 2)), jnp.ones((1, 2, 2)), jnp.array([2]), "megablox")
    with pytest.raises(ValueError, match="expert_implementation='fast': must be one of auto, ragged_dot"):
        resolve("fast", "cpu")


def ragged_all_to_all(operands: list[np.ndarray], outputs: list[np.ndarray], routes: list[tuple]) -> list[np.ndarray]:
    """The definition, for all devices at once; a route is input offsets, send sizes, output offsets, sizes received."""
    for source, (starts, counts, places, _) in enumerate(routes):
        for target, output in enumerate(outputs):
            assert counts[target] == routes[target][3][source], "both ends must agree"
            start, count, place = starts[target], counts[target], places[target]
            output[place : place + count] = operands[source][start : start + count]
    return outputs


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_a_ragged_exchange_brings_rows_there_and_back(devices: int, each: int, seed: int) -> None:
    """The offsets that `send` and `collect` hand to the platform's collective, which no CPU has."""
    r, P = np.random.default_rng(seed), 7
    chosen = np.sort(r.integers(0, devices * each, (devices, P)), axis=1)
    sizes = np.stack([np.bincount(row, minlength=devices * each) for row in chosen])
    routes = [jax.tree.map(np.asarray, make_route(jnp.asarray(sizes), jnp.int32(me))) for me in range(devices)]
    there = [(x.starts, x.counts, np.full(devices, x.me * P), x.arriving) for x in routes]
    slots = ragged_all_to_all(list(chosen), [np.full(devices * P, -1) for _ in routes], there)
    for me, slot in enumerate(slots):
        assert set(slot[slot >= 0] // each) <= {me}, "an expert's rows are where it is"
        np.testing.assert_array_equal(np.sort(slot[slot >= 0]), np.sort(chosen[chosen // each == me]))
    back = [(np.arange(devices) * P, x.arriving, x.returning, x.counts) for x in routes]
    found = ragged_all_to_all(slots, [np.full(P, -1) for _ in routes], back)
    np.testing.assert_array_equal(found, chosen)


def test_a_choice_that_gets_lost_on_the_way_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two devices tells the others of one row less than it has for its first expert."""
    whole, params = dispatch._elsewhere, parameters(SOFTMAX)

    def dropped(rows: int) -> int:
        run = jax.jit(lambda params, x: MoE(SOFTMAX).apply({"params": params}, x)[1].dropped)
        return int(run(params, inputs()[:rows]))

    with jax.set_mesh(axes.make_mesh((1, 1, 2, 1, 1), jax.devices()[:2])):
        assert [dropped(2), dropped(3)] == [0, 0]
        monkeypatch.setattr(dispatch, "_elsewhere", lambda rows, sizes, *rest: whole(
            rows, sizes.at[jnp.argmax(sizes)].add(-1), *rest))
        assert [dropped(2), dropped(3)] == [2, 1], "three rows are on both devices"


def test_what_an_exchange_resolves_to() -> None:
    assert [resolve_exchange("auto", platform) for platform in ("cpu", "gpu", "tpu")] == ["padded", "ragged", "ragged"]
    with pytest.raises(NotImplementedError, match="expert_exchange='ragged': XLA has no ragged all-to-all for cpu"):
        resolve_exchange("ragged", "cpu")
    with pytest.raises(ValueError, match="expert_exchange='fast': must be one of auto, ragged, padded"):
        resolve_exchange("fast", "tpu")


@pytest.mark.parametrize(("changes", "message"), [
    ({"experts_per_token": 9}, "experts_per_token=9: must be at most num_experts=8"),
    ({"num_experts": 0}, "num_experts=0: must be at least 1"),
    ({"layers": (2, 1)}, r"layers=\(2, 1\): must be layer indices in ascending order"),
    ({"layers": ()}, r"layers=\(\): must be layer indices in ascending order, at least one"),
    ({"bias_update_rate": -1.0}, "bias_update_rate=-1.0: must be finite and not negative"),
    ({"output_scale": 0.0}, "output_scale=0.0: must be positive"),
])
def test_bad_configs_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEConfig(**changes)


def test_no_token_at_a_time_is_refused() -> None:
    with pytest.raises(ValueError, match="expert_exchange_tokens=0: must be at least 1, or none for all at once"):
        dataclasses.replace(model_config("mfa"), expert_exchange_tokens=0)


def test_layers_must_exist() -> None:
    with pytest.raises(ValueError, match=r"moe.layers=\(0, 2\): must be in 0 .. 1"):
        model_config("mfa", moe=MoEConfig(layers=(0, 2)))


# ---- in the model ----


def layers(pattern: str) -> tuple[bool, ...]:
    return tuple(kind == "M" for kind in pattern)


@pytest.mark.parametrize(("pattern", "expected"), [
    ("DDDD", [("D", 4)]), ("MMM", [("M", 3)]), ("DMDMDM", [("DM", 3)]), ("D" * 4 + "M" * 56 + "D", [
        ("D", 4), ("M", 56), ("D", 1)]), ("DMM", [("D", 1), ("M", 2)]), ("DDMDDMD", [("DDM", 2), ("D", 1)]),
])
def test_layers_become_few_segments(pattern: str, expected: list[tuple[str, int]]) -> None:
    assert segments_of(layers(pattern)) == [Segment(layers(kinds), repeats) for kinds, repeats in expected]


@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_segments_give_the_layers_back(kinds: list[bool]) -> None:
    assert [kind for pattern, repeats in segments_of(tuple(kinds)) for kind in pattern * repeats] == kinds


MIXED = {
    "all": (2, None), "alternating": (4, (1, 3)), "step3": (5, (1, 2, 3)),
}


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("variant", ["mfa", pytest.param("mla", marks=pytest.mark.slow)])
def test_a_model_of_dense_and_expert_layers(name: str, variant: str) -> None:
    """Scanned equals unrolled; prefill and decoding equal the whole; parameters are those of the closed form."""
    num_layers, with_experts = MIXED[name]
    config = model_config(variant, num_layers=num_layers, moe=dataclasses.replace(SIGMOID, layers=with_experts))
    model, unrolled = Transformer(config), Transformer(config, scan_layers=False)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), tokens()[:1]))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == capacity.model_parameters(config).total
    logits = jax.jit(lambda p, t: model.apply({"params": p}, t)[0])(params, tokens())

    def hidden(model: Transformer, params: Any) -> Any:
        return jax.jit(lambda p, t: model.apply({"params": p}, t, method="states"))(params, tokens())

    scanned, plain = hidden(model, params), hidden(unrolled, unstack_layers(params, num_layers))
    chex.assert_trees_all_close(scanned, plain, rtol=1e-5, atol=2e-5)
    assert isinstance(scanned[2], Routing)
    assert scanned[2].counts.shape == (len(config.moe_layers), 6)
    step = jax.jit(lambda p, t, c: model.apply({"params": p}, t, cache=c))
    first, cache = step(params, tokens()[:, :6], init_cache(config, 3, 12))
    second, _ = step(params, tokens()[:, 6:], cache)
    chex.assert_trees_all_close(jnp.concatenate([first, second], axis=1), logits, rtol=1e-5, atol=3e-5)


def test_gradients_of_experts_come_back_scattered() -> None:
    """On each device its part of them, never the whole: over `fsdp` they are scattered, over `data` summed."""
    r = np.random.default_rng(0)
    B, T, A, E, D, F = 4, 6, 2, 4, 8, 6
    shapes = ((B, T, D), (B, T, A), (E, D, F), (E, D, F), (E, F, D))
    x, weights, *experts = (jnp.asarray(r.normal(size=shape), jnp.float32) for shape in shapes)
    chosen = jnp.asarray(r.permuted(np.tile(np.arange(E), (B, T, 1)), axis=-1)[..., :A])

    def loss(experts: Any) -> jax.Array:
        return jnp.sum(experts_over_mesh(x, chosen, weights, experts)[0] ** 2)

    expected = jax.jit(jax.grad(loss))(tuple(experts))
    with jax.set_mesh(axes.make_mesh((2, 2, 2, 1, 1))):
        program = str(jax.make_jaxpr(jax.grad(loss))(tuple(experts)))
        found = jax.jit(jax.grad(loss))(tuple(experts))
        with pytest.raises(ValueError, match="axis 'embed' of size 7 does not divide over mesh fsdp=2"):
            experts_over_mesh(x[..., :7], chosen, weights, (experts[0][:, :7], experts[1][:, :7], experts[2][..., :7]))
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-4)
    assert program.count("reduce_scatter[") == 3
    whole = rf"f32\[{E // 2},({D},{F}|{F},{D})\] = psum"
    assert not re.search(whole, program), "only parts are summed"


@pytest.mark.parametrize("spread", ["evenly", "to one device"])
def test_tokens_that_travel_in_parts_get_what_they_would_at_once(spread: str) -> None:
    """Bit for bit forward, in float32; sums of gradients over tokens are in another order."""
    r = np.random.default_rng(0)
    B, T, A, E, D, F = 8, 6, 2, 8, 8, 6
    x, weights, *experts = (jnp.asarray(r.normal(size=shape), jnp.float32)
                            for shape in ((B, T, D), (B, T, A), (E, D, F), (E, D, F), (E, F, D)))
    experts_met = np.arange(E if spread == "evenly" else A)
    chosen = jnp.asarray(r.permuted(np.tile(experts_met, (B, T, 1)), axis=-1)[..., :A])

    @functools.partial(jax.jit, static_argnames="at_once")
    def layer(x: Any, weights: Any, experts: Any, at_once: int | None) -> Any:
        def loss(x: Any, weights: Any, experts: Any) -> Any:
            y, served = experts_over_mesh(x, chosen, weights, experts, at_once=at_once)
            return jnp.sum(jnp.sin(y)), (y, served)

        return jax.grad(loss, (0, 1, 2), has_aux=True)(x, weights, experts)

    with jax.set_mesh(axes.make_mesh((1, 2, 4, 1, 1))):
        gradients, (y, served) = layer(x, weights, tuple(experts), None)
        for at_once in (1, 3, 6, 100):
            found, (found_y, found_served) = layer(x, weights, tuple(experts), at_once)
            np.testing.assert_array_equal(found_y, y)
            assert found_served == served == B * T * A
            chex.assert_trees_all_close(found, gradients, rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="expert_exchange_tokens=4: must divide the 6 tokens of a device"):
            layer(x, weights, tuple(experts), 4)
        room = [str(jax.make_jaxpr(functools.partial(layer, at_once=n))(x, weights, tuple(experts)))
                for n in (None, 3)]
    whole, part = f"f32[{4 * T * A},{D}]", f"f32[{4 * 3 * A},{D}]"
    assert whole in room[0] and whole not in room[1] and part in room[1], "the room is that of a part"


def test_where_blocks_lie() -> None:
    config = model_config("mfa", num_layers=5, moe=dataclasses.replace(SOFTMAX, layers=(1, 3)))
    params = jax.eval_shape(lambda: nn.unbox(Transformer(config).init(jax.random.key(0), tokens()[:1])))["params"]
    found = {path: list(indices) for path, indices in stacked_blocks(params["layers"])}
    assert found == {("segment_0", "block_0"): [0, 2], ("segment_0", "block_1"): [1, 3], ("segment_1", "block_0"): [4]}
    assert "moe" in at_path(params["layers"], ("segment_0", "block_1"))
    assert from_dict(type(config), to_dict(config)) == config


@pytest.mark.slow
def test_unequal_layers_in_a_row_have_the_gradients_of_loops_over_them() -> None:
    config = model_config("mfa", num_layers=3, moe=dataclasses.replace(SOFTMAX, layers=(1, 2)))
    params = nn.unbox(jax.jit(Transformer(config).init)(jax.random.key(0), tokens()[:1]))["params"]

    def gradient(unroll: bool) -> Any:
        model = Transformer(dataclasses.replace(config, unroll_layers=unroll))
        return jax.jit(jax.grad(lambda p: jnp.sum(model.apply({"params": p}, tokens())[0] ** 2)))(params)

    chex.assert_trees_all_close(gradient(unroll=True), gradient(unroll=False), rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("remat", ["none", "dots", pytest.param("full", marks=pytest.mark.slow)])
def test_remat_changes_no_gradient(remat: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = model_config("mfa", num_layers=3, remat=remat, moe=dataclasses.replace(SOFTMAX, layers=(1, 2)))
    params = nn.unbox(jax.jit(Transformer(config).init)(jax.random.key(0), tokens()[:1]))["params"]

    def gradient() -> Any:
        model = Transformer(config)
        return jax.jit(jax.grad(lambda p: jnp.sum(model.apply({"params": p}, tokens())[0] ** 2)))(params)

    recomputed = gradient()
    monkeypatch.setitem(REMAT_POLICIES, remat, jax.checkpoint_policies.everything_saveable)
    # The largest of a leaf are some 50, of which float32 rounds 3e-6 away.
    chex.assert_trees_all_close(recomputed, gradient(), rtol=1e-4, atol=5e-5)
