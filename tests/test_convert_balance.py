"""A balanced model computes the same, and no width is written larger than it is read."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfa_jax.convert import balanced, gqa_to_mfa, gqa_to_mfa_kr
from mfa_jax.model.transformer import Transformer
from tests.contract import compiled, model_config, tokens

C = 16


def squares(attention: dict[str, jax.Array], name: str, axes: tuple[int, ...]) -> np.ndarray:
    return np.mean(np.asarray(attention[name], np.float64) ** 2, axis=axes)


@pytest.mark.parametrize("encoding", ["rope", "none"])
@pytest.mark.parametrize("variant", ["mfa", "mfa_kr"])
def test_scales_are_evened_out_and_logits_stay(variant: str, encoding: str) -> None:
    """Widths are scaled by factors from 1/100 to 100, those of a pair alike and of the values of MFA each its own."""
    c = compiled(model_config(variant, encoding))
    rng = np.random.default_rng(0)
    pair = np.tile(10.0 ** rng.uniform(-2, 2, C // 2), 2)
    own = pair if variant == "mfa_kr" else 10.0 ** rng.uniform(-2, 2, C)
    given = dict(c.params["layers"]["attention"])
    given |= {"S_k": given["S_k"] * pair, "Q": given["Q"] / pair, "O": given["O"] / own[:, None]}
    given |= {"S_v": given["S_v"] * own} if variant == "mfa" else {"N_kr": given["N_kr"] * own[:, None] / pair}
    skewed = {**c.params, "layers": {**c.params["layers"], "attention": given}}
    expected = c.full(c.params, tokens())
    np.testing.assert_allclose(c.full(skewed, tokens()), expected, atol=2e-4)  # so the scales are free, and skewed
    found = jax.tree.map(jnp.asarray, balanced(c.config, skewed))
    np.testing.assert_allclose(c.full(found, tokens()), expected, atol=2e-5)
    after = found["layers"]["attention"]
    written, by_query, by_output = (squares(after, *of) for of in (("S_k", (1,)), ("Q", (1, 2)), ("O", (1, 3))))
    halves = lambda x: x[:, : C // 2] + x[:, C // 2 :]  # noqa: E731
    read = by_query + by_output if variant == "mfa_kr" else by_query
    np.testing.assert_allclose(halves(written), halves(read), rtol=1e-5)
    if variant == "mfa":
        np.testing.assert_allclose(squares(after, "S_v", (1,)), by_output, rtol=1e-5)


def test_what_nothing_reads_stays_finite() -> None:
    """An exact MFA-KR with two pairs that nothing reads, and one that is not written."""
    c = compiled(model_config("gqa"))
    config, params = gqa_to_mfa_kr(c.config, c.params)
    given = {name: np.array(leaf) for name, leaf in params["layers"]["attention"].items()}
    half = config.attention.latent_dim // 2
    unread, unwritten = [0, half, 2, half + 2], [1, half + 1]
    given["Q"][..., unread] = given["O"][:, :, unread] = given["N_kr"][:, :, unread] = 0.0
    given["S_k"][..., unwritten] = 0.0
    params = {**params, "layers": {**params["layers"], "attention": given}}
    after = balanced(config, params)["layers"]["attention"]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after)) and not after["S_k"][..., unwritten].any()
    np.testing.assert_array_equal(after["S_k"][..., unread], given["S_k"][..., unread])


def test_other_attention_is_left_alone() -> None:
    c = compiled(model_config("gqa"))
    assert balanced(c.config, c.params) is c.params


@pytest.mark.parametrize("convert", [gqa_to_mfa, gqa_to_mfa_kr])
def test_an_exact_conversion_keeps_its_logits(convert: Any) -> None:
    c = compiled(model_config("gqa"))
    config, params = convert(c.config, c.params)
    logits = jax.jit(Transformer(config).apply)({"params": balanced(config, params)}, tokens())[0]
    np.testing.assert_allclose(logits, c.full(c.params, tokens()), atol=2e-4)


def test_an_odd_width_without_rope_has_no_pairs() -> None:
    base = model_config("mfa", "none")
    c = compiled(dataclasses.replace(base, attention=dataclasses.replace(base.attention, latent_dim=15)))
    found = jax.tree.map(jnp.asarray, balanced(c.config, c.params))
    np.testing.assert_allclose(c.full(found, tokens()), c.full(c.params, tokens()), atol=2e-5)
