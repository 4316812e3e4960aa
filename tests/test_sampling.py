"""Sampling against a float64 brute force, row by row."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfa_jax.generate.sampling import SamplingConfig, sample

V = 7
N = 4000
LOGITS = np.array([1.0, 3.0, -2.0, 2.5, 0.5, 2.9, -0.5], np.float32)
SEEN = np.array([0, 1, 1, 0, 0, 0, 1], bool)


def expected(logits: np.ndarray, config: SamplingConfig, seen: np.ndarray | None) -> np.ndarray:
    """Probability of each token of one row, in float64, one rule after the other."""
    scores = [float(x) for x in logits]
    limit = len(scores) if config.vocab_limit is None else config.vocab_limit
    if seen is not None:
        r = config.repetition_penalty
        scores = [(x / r if x > 0 else x * r) if s else x for x, s in zip(scores, seen, strict=True)]
    ranked = sorted(range(limit), key=lambda i: (-scores[i], i))
    if config.temperature == 0:
        return np.eye(len(scores))[ranked[0]]
    ranked = ranked[: config.top_k]

    def weigh(kept: list[int]) -> list[float]:
        weights = [math.exp((scores[i] - scores[kept[0]]) / config.temperature) for i in kept]
        return [w / math.fsum(weights) for w in weights]

    sums = itertools.accumulate(weigh(ranked), initial=0.0)
    ranked = [i for i, above in zip(ranked, sums, strict=False) if above < config.top_p]
    weights = weigh(ranked)
    ranked = [i for i, w in zip(ranked, weights, strict=True) if w >= config.min_p * weights[0] * (1 - 1e-9)]
    result = np.zeros(len(scores))
    result[ranked] = weigh(ranked)
    return result


def draw(logits: Any, config: SamplingConfig, seen: Any = None, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """`N` draws from one row; always one shape, so that each operation compiles once."""
    row = np.full(V, -np.inf, np.float32)
    row[: len(logits)] = logits
    mask = None if seen is None else jnp.asarray(np.tile(np.resize([*seen, *[False] * V], V), (N, 1)))
    keys = jax.random.split(jax.random.key(seed), N)
    tokens, logprobs = sample(jnp.asarray(np.tile(row, (N, 1))), keys, config, mask)
    return np.asarray(tokens), np.asarray(logprobs)


CONFIGS = [
    SamplingConfig(),
    SamplingConfig(temperature=0),
    SamplingConfig(temperature=0.5),
    SamplingConfig(temperature=3.0),
    SamplingConfig(top_k=1),
    SamplingConfig(top_k=3),
    SamplingConfig(top_p=0.6),
    SamplingConfig(top_p=1e-6),
    SamplingConfig(min_p=0.3),
    SamplingConfig(min_p=1.0),
    SamplingConfig(repetition_penalty=1.7),
    SamplingConfig(repetition_penalty=0.6),
    SamplingConfig(vocab_limit=3),
    SamplingConfig(temperature=0, repetition_penalty=2.0),
    SamplingConfig(temperature=0, vocab_limit=3, repetition_penalty=10.0),
    SamplingConfig(temperature=1.5, top_k=4, top_p=0.8),
    SamplingConfig(temperature=1.5, top_k=5, top_p=0.9, min_p=0.5, repetition_penalty=1.3, vocab_limit=6),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_draws_are_those_of_the_brute_force(config: SamplingConfig) -> None:
    seen = SEEN if config.repetition_penalty != 1 else None
    p = expected(LOGITS, config, seen)
    tokens, logprobs = draw(LOGITS, config, seen)
    frequencies = np.bincount(tokens, minlength=V) / N
    # Five standard errors; what the brute force excludes never comes, what it expects ten times does.
    assert np.all(np.abs(frequencies - p) <= 5 * np.sqrt(p * (1 - p) / N))
    assert np.all(frequencies[p * N > 10] > 0)
    # Log-probabilities are the model's own: neither penalty nor temperature nor filter shows in them.
    own = LOGITS.astype(np.float64)[: config.vocab_limit]
    np.testing.assert_allclose(logprobs, (own - np.log(np.exp(own).sum()))[tokens], atol=1e-6)


def test_the_order_of_the_filters_shows() -> None:
    # Temperature before top-p: at 1 the best token alone has that much; at 4 it takes two tokens to reach 0.55.
    logits = np.log(np.array([0.6, 0.2, 0.1, 0.1]))
    assert set(draw(logits, SamplingConfig(top_p=0.55))[0]) == {0}
    assert set(draw(logits, SamplingConfig(temperature=4.0, top_p=0.55))[0]) == {0, 1}
    # Top-k before top-p: within the best two, 0.6 becomes 0.75.
    assert set(draw(logits, SamplingConfig(top_p=0.7))[0]) == {0, 1}
    assert set(draw(logits, SamplingConfig(top_k=2, top_p=0.7))[0]) == {0}


def test_ties_go_to_the_lower_id() -> None:
    logits = np.array([1.0, 2.0, 2.0, 2.0, 0.0], np.float32)
    assert set(draw(logits, SamplingConfig(temperature=0))[0]) == {1}
    assert set(draw(logits, SamplingConfig(top_k=2))[0]) == {1, 2}
    assert set(draw(logits, SamplingConfig(top_p=0.25))[0]) == {1}
    assert set(draw(logits, SamplingConfig(min_p=1.0))[0]) == {1, 2, 3}


def test_repetition_penalty_lowers_either_sign() -> None:
    logits = np.array([2.0, -1.0, 1.2], np.float32)
    greedy = SamplingConfig(temperature=0, repetition_penalty=2.0)
    assert draw(logits, greedy, [True, False, False])[0][0] == 2  # 2.0 becomes 1.0
    assert draw(logits - 2.5, greedy, [True, False, False])[0][0] == 0  # -0.5 becomes -1.0, the next is -1.3
    assert draw(logits, SamplingConfig(temperature=0, repetition_penalty=0.5), [False, False, True])[0][0] == 2
    assert draw([-1.0, -1.5], greedy, [True, False])[0][0] == 1  # -1.0 becomes -2.0


def test_greedy_is_argmax() -> None:
    logits = jax.random.normal(jax.random.key(3), (32, 50))
    tokens, _ = sample(logits, jax.random.split(jax.random.key(0), 32), SamplingConfig(temperature=0, top_k=3))
    chex.assert_trees_all_equal(tokens, jnp.argmax(logits, axis=-1).astype(jnp.int32))


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[-1]], ids=str)
def test_a_row_does_not_depend_on_the_others(config: SamplingConfig) -> None:
    jitted = jax.jit(sample, static_argnames="config")
    random = np.random.default_rng(0)
    logits = random.normal(size=(8, V)).astype(np.float32)
    seen = random.random((8, V)) < 0.3
    keys = jax.random.split(jax.random.key(4), 8)
    whole = jitted(logits, keys, config=config, seen=seen)
    others = jitted(logits + np.arange(8)[:, None] % 2 * random.normal(size=(8, V)).astype(np.float32), keys,
                    config=config, seen=seen)
    chex.assert_trees_all_equal(*(jax.tree.map(lambda x: np.asarray(x)[::2], out) for out in (whole, others)))
    alone = jitted(logits[5:6], keys[5:6], config=config, seen=seen[5:6])
    chex.assert_trees_all_equal(alone, jax.tree.map(lambda x: np.asarray(x)[5:6], whole))


def test_keys_decide_and_jit_changes_nothing() -> None:
    tokens, _ = draw(np.zeros(V), SamplingConfig())
    again = jax.jit(sample, static_argnames="config")(jnp.zeros((N, V)), jax.random.split(jax.random.key(0), N),
                                                      config=SamplingConfig())
    chex.assert_trees_all_equal(tokens, np.asarray(again[0]))
    assert np.any(tokens != draw(np.zeros(V), SamplingConfig(), seed=1)[0])


def test_low_precision_logits_are_computed_in_float32() -> None:
    keys = jax.random.split(jax.random.key(0), 1)
    _, logprob = sample(jnp.zeros((1, 1000), jnp.bfloat16), keys, SamplingConfig())
    chex.assert_trees_all_close(logprob, jnp.array([-math.log(1000)], jnp.float32), atol=1e-5)


def test_extreme_settings_stay_finite() -> None:
    logits = np.array([-1e4, 1e4, 9e3, -math.inf], np.float32)
    for temperature in (1e-6, 1e30):
        for penalty in (0.01, 100.0):
            config = SamplingConfig(temperature=temperature, repetition_penalty=penalty, top_p=0.999, min_p=1e-9)
            tokens, logprobs = draw(logits, config, [True, True, False, True])
            assert set(tokens) <= {0, 1, 2} and np.isfinite(logprobs).all()


@pytest.mark.slow
@settings(max_examples=50)
@given(
    logits=st.lists(st.integers(-40, 40).map(lambda x: x / 8), min_size=2, max_size=V),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.none() | st.integers(1, V),
    top_p=st.sampled_from([0.05, 0.31, 0.77, 1.0]),
    min_p=st.sampled_from([0.0, 0.013, 0.41]),
    repetition_penalty=st.sampled_from([1.0, 1.5]),
    vocab_limit=st.none() | st.integers(1, V),
    seed=st.integers(0, 2**31 - 1),
)
def test_no_draw_leaves_what_the_brute_force_allows(logits: list[float], seed: int, **fields: Any) -> None:
    config = SamplingConfig(**fields)
    padded = np.array([*logits, *[-3.0] * (V - len(logits))], np.float32)
    seen = SEEN if config.repetition_penalty != 1 else None
    limit = V if config.vocab_limit is None else config.vocab_limit
    if config.top_k is not None and config.top_k > limit:
        with pytest.raises(ValueError, match="top_k"):
            draw(padded, config, seen)
        return
    # float32 may put a sum of probabilities on the other side of top_p, so a hair more is allowed.
    allowed = expected(padded, dataclasses.replace(config, top_p=min(config.top_p + 1e-5, 1.0)), seen)
    tokens, logprobs = draw(padded, config, seen, seed=seed)
    assert (allowed[tokens] > 0).all() and (logprobs <= 1e-6).all()


@given(
    temperature=st.floats(), top_k=st.none() | st.integers(-2, 50), top_p=st.floats(), min_p=st.floats(),
    repetition_penalty=st.floats(), vocab_limit=st.none() | st.integers(-2, 50),
)
def test_a_config_is_valid_or_refused_by_field(**fields: Any) -> None:
    try:
        SamplingConfig(**fields)
    except ValueError as error:
        name = str(error).split("=")[0]
        assert name in fields and repr(fields[name]) in str(error)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", 1e-9),
        ("top_k", 0), ("top_p", 0.0), ("top_p", 1.1), ("top_p", math.nan), ("min_p", -0.1), ("min_p", 1.1),
        ("repetition_penalty", 0.0), ("repetition_penalty", math.inf), ("vocab_limit", 0),
    ],
)
def test_a_bad_field_is_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{field}={value!r}: must be"):
        SamplingConfig(**{field: value})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SamplingConfig(top_k=8), "top_k=8: must be at most 7"),
        (SamplingConfig(top_k=4, vocab_limit=3), "top_k=4: must be at most 3"),
        (SamplingConfig(vocab_limit=8), "vocab_limit=8: must be at most"),
        (SamplingConfig(repetition_penalty=2.0), "seen=None: repetition_penalty=2.0"),
    ],
    ids=str,
)
def test_what_the_logits_cannot_give_is_refused(config: SamplingConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(LOGITS, config)
