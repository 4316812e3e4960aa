"""GQA as MFA and MFA-KR with as large a cache: the same logits, with every encoding, and through the cache."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfa_jax import capacity
from mfa_jax.config import ModelConfig, PositionConfig, RopeScaling
from mfa_jax.convert import expand_key_reuse, gqa_to_mfa, gqa_to_mfa_kr, load_pretrained, save_run
from mfa_jax.data import ByteTokenizer
from mfa_jax.model.transformer import Transformer, init_cache
from mfa_jax.train.run import load_trained
from tests.contract import ATTENTION, compiled, model_config, tokens
from tests.smollm2 import smollm2

CONVERSIONS = {"mfa": gqa_to_mfa, "mfa_kr": gqa_to_mfa_kr}
targets = pytest.mark.parametrize("target", CONVERSIONS)


def logits(config: ModelConfig, params: Any, ids: Any) -> np.ndarray:
    return np.asarray(jax.jit(Transformer(config).apply)({"params": params}, jnp.asarray(ids))[0], np.float64)


def scaled(params: Any) -> Any:
    """Norms whose scales are not all one, as in trained models."""
    return jax.tree.map(lambda x: x * jnp.linspace(0.5, 1.5, x.shape[-1]) if x.ndim == 2 and x.shape[0] == 2 else x,
                        params)


@targets
@pytest.mark.parametrize("source", ["mha", "gqa", "mqa"])
@pytest.mark.parametrize("position", [
    PositionConfig(base=100.0), PositionConfig(kind="alibi"), PositionConfig(kind="none"),
    PositionConfig(base=100.0, scaling=RopeScaling("yarn", 4.0, 8))],
    ids=lambda p: p.kind + "-scaled" * bool(p.scaling))
def test_logits_are_equal(target: str, source: str, position: PositionConfig) -> None:
    c = compiled(model_config(source, position=position))
    params = scaled(c.params)
    config, converted = CONVERSIONS[target](c.config, params)
    expected = logits(c.config, params, tokens())
    np.testing.assert_allclose(logits(config, converted, tokens()), expected, rtol=0, atol=2e-5)
    assert capacity.cache_elements_per_token(config.attention) == capacity.cache_elements_per_token(c.config.attention)
    assert (config.inv_freq is None) == (position.kind != "rope")


@targets
def test_decoding_and_a_saved_run(target: str, tmp_path: Path) -> None:
    """Through the cache, with frequencies of its own, and as a run that every script reads."""
    c = compiled(model_config("gqa", vocab_size=264))
    config, params = CONVERSIONS[target](c.config, c.params)
    save_run(tmp_path / "run", config, params, ByteTokenizer())
    trained = load_trained(tmp_path / "run")
    assert trained.model.config == config
    step = jax.jit(lambda t, cache: trained.model.apply({"params": trained.params}, t, cache=cache))
    out, cache = step(tokens()[:, :4], init_cache(config, 3, 16))
    outs = [out]
    for t in range(4, 9):
        out, cache = step(tokens()[:, t : t + 1], cache)
        outs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outs, axis=1), c.full(c.params, tokens()), rtol=0, atol=2e-5)


def test_a_narrower_query_latent_keeps_the_largest_directions() -> None:
    """The query projection of 24 by 4 heads of 8 has rank 24; below, the error grows as directions are left out."""
    c = compiled(model_config("gqa"))
    expected = logits(c.config, c.params, tokens())
    errors = []
    for rank in (24, 20, 12, 4):
        config, params = gqa_to_mfa(c.config, c.params, query_rank=rank)
        S_q = params["layers"]["attention"]["S_q"][0]
        np.testing.assert_allclose(S_q.T @ S_q, np.eye(rank), atol=1e-5)
        errors.append(np.abs(logits(config, params, tokens()) - expected).max())
    assert errors[0] < 2e-5 < errors[1] < errors[2] < errors[3]


def test_a_norm_on_the_query_latent_changes_as_much_as_epsilon() -> None:
    c = compiled(model_config("gqa", norm_eps=1e-12))
    params = scaled(c.params)
    config, converted = gqa_to_mfa(c.config, params, query_norm=True)
    np.testing.assert_allclose(logits(config, converted, tokens()), logits(c.config, params, tokens()), rtol=0,
                               atol=2e-5)


def test_key_reuse_written_out_is_mfa() -> None:
    c = compiled(model_config("mfa_kr"))
    config, params = expand_key_reuse(c.config, c.params)
    assert config.attention.kind == "mfa"
    np.testing.assert_allclose(logits(config, params, tokens()), c.full(c.params, tokens()), rtol=0, atol=2e-5)
    post = dataclasses.replace(c.config, attention=dataclasses.replace(ATTENTION["mfa_kr"], reuse="post_rope"))
    with pytest.raises(NotImplementedError, match="post_rope"):
        expand_key_reuse(post, c.params)
    with pytest.raises(ValueError, match="attention='mfa': must be mfa_kr"):
        expand_key_reuse(config, params)


@targets
def test_a_trained_model(data_dir: Path, target: str) -> None:
    stories = data_dir / "models" / "stories260K"
    golden = np.load(stories / "golden_stories260K_fp64.npz")
    config, params = CONVERSIONS[target](*load_pretrained(stories))
    np.testing.assert_allclose(logits(config, params, golden["ids"][None])[0], golden["logits"], rtol=0, atol=1e-4)


@pytest.mark.slow
@targets
def test_smollm2(data_dir: Path, target: str) -> None:
    """The first quarter of the golden tokens: the converted projections are three times as wide."""
    config, params = CONVERSIONS[target](*load_pretrained(smollm2()))
    golden = np.load(data_dir / "models" / "smollm2-135m" / "golden_hf_fp32.npz")
    ids = golden["ids"][:128]
    found = logits(config, params, ids[None])[0]
    log_p = found - np.log(np.exp(found - found.max(-1, keepdims=True)).sum(-1, keepdims=True))
    log_p -= found.max(-1, keepdims=True)
    np.testing.assert_allclose(-log_p[np.arange(127), ids[1:]], golden["nll"][:127], rtol=0, atol=2e-4)
    np.testing.assert_allclose(found[:8], golden["logits_first8"], rtol=0, atol=5e-4)


@pytest.mark.parametrize(("variant", "options", "error", "message"), [
    ("mfa", {}, ValueError, "attention='mfa': must be mha, gqa or mqa"),
    ("gqa_bias_norm", {}, NotImplementedError, "qkv_bias=True"),
    ("gqa", {"query_rank": 25}, ValueError, "query_rank=25: must be in 1 .. 24"),
])
def test_what_is_refused(variant: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    c = compiled(model_config(variant))
    with pytest.raises(error, match=message):
        gqa_to_mfa(c.config, c.params, **options)
