"""Presets: sizes, equal parameters across variants, divisibility, and the solver behind them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from mfa_jax import capacity
from mfa_jax.config import VARIANTS, GQAConfig, MFAConfig, MFAKRConfig, MLAConfig, ModelConfig, from_dict, to_dict
from mfa_jax.layers import stacked_blocks
from mfa_jax.model.transformer import Transformer
from mfa_jax.presets import (
    MODEL_PRESETS,
    attention_shape,
    language_models,
    match_heads,
    matched,
    model_preset,
    published,
    with_experts,
)

SCALES = ("tiny", "nano", "small", "base")


def non_embedding(model: ModelConfig) -> int:
    return capacity.model_parameters(model).non_embedding


def test_every_scale_has_every_variant() -> None:
    expected = {f"{scale}-{v}" for scale in SCALES for v in ("mha", "gqa", "mqa", "mla", "mfa", "mfa-kr")}
    assert set(MODEL_PRESETS) == expected
    assert {model_preset(name).attention.variant for name in MODEL_PRESETS} == set(VARIANTS)


@pytest.mark.parametrize("name", MODEL_PRESETS)
def test_preset_matches_the_mha_model(name: str) -> None:
    model = model_preset(name)
    assert model.attention.variant == name.partition("-")[2].replace("-", "_")
    reference = non_embedding(model_preset(name.split("-")[0] + "-mha"))
    assert abs(non_embedding(model) - reference) <= 0.02 * reference


@pytest.mark.parametrize("name", MODEL_PRESETS)
def test_preset_splits_over_two_shards(name: str) -> None:
    model = model_preset(name)
    kv_heads = getattr(model.attention, "num_kv_heads", 1)
    assert model.attention.num_heads % 2 == 0
    assert kv_heads == 1 or kv_heads % 2 == 0
    assert model.model_dim % 2 == model.vocab_size % 2 == 0
    assert model.ffn_dim % 8 == 0
    assert 2 < model.ffn_dim / model.model_dim < 3
    assert (model.vocab_size, model.tie_embeddings) == (264, True)
    assert from_dict(ModelConfig, to_dict(model)) == model


@pytest.mark.parametrize(("scale", "parameters"), [("nano", 1e6), ("small", 30e6), ("base", 120e6)])
def test_scale_has_its_size(scale: str, parameters: float) -> None:
    for variant in VARIANTS:
        name = f"{scale}-{variant.replace('_', '-')}"
        assert non_embedding(model_preset(name)) == pytest.approx(parameters, rel=0.06)


def test_cache_shrinks_and_rank_grows_in_the_papers_order() -> None:
    for scale in SCALES:
        reports = {
            v: capacity.analyse_model(model_preset(f"{scale}-{v.replace('_', '-')}"), context=64) for v in VARIANTS
        }
        cache = {v: r.cache_bytes_per_token for v, r in reports.items()}
        assert cache["mha"] > cache["mla"] > cache["mfa"] == cache["gqa"] == 2 * cache["mfa_kr"]
        assert reports["mfa"].ter >= 2 * reports["mha"].ter


def test_match_heads_by_hand() -> None:
    # D = 64, MHA with 8 heads of 8: 16384. MFA shares 3 * 64 * 16 + 16 = 3088 and takes 1280 a head: 10.4 heads.
    mfa = MFAConfig(latent_dim=16, query_rank=16)
    assert match_heads(mfa, 64, 16384).num_heads == 10
    assert match_heads(mfa, 64, 16384, multiple=4).num_heads == 12
    assert match_heads(mfa, 64, 16384, multiple=1).num_heads == 10
    # GQA with 3 key heads of 8 shares 3072 and takes 1024 a head: 13 heads, of which 12 are a multiple of 2 and 3.
    gqa = GQAConfig(num_heads=3, num_kv_heads=3, head_dim=8)
    assert match_heads(gqa, 64, 16384) == GQAConfig(num_heads=12, num_kv_heads=3, head_dim=8)


templates = st.one_of(
    st.builds(lambda k, h: GQAConfig(num_heads=k, num_kv_heads=k, head_dim=2 * h), st.integers(1, 2),
              st.integers(2, 16)),
    st.builds(lambda c, r, q: MLAConfig(nope_dim=8, rope_dim=2 * r, value_dim=8, latent_dim=c, query_rank=q),
              st.integers(8, 32), st.integers(1, 4), st.none() | st.integers(8, 32)),
    st.builds(lambda c, q, n: MFAConfig(latent_dim=2 * c, query_rank=q, query_norm=n), st.integers(4, 16),
              st.integers(8, 32), st.booleans()),
    st.builds(lambda c, q: MFAKRConfig(latent_dim=2 * c, query_rank=q), st.integers(4, 16), st.integers(8, 32)),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(template=templates, heads=st.integers(4, 16), multiple=st.sampled_from([1, 2, 4]))
def test_matched_is_nearest_and_within_its_bound(
    template: GQAConfig | MLAConfig | MFAConfig | MFAKRConfig, heads: int, multiple: int
) -> None:
    mha = GQAConfig(num_heads=heads, num_kv_heads=heads, head_dim=16)
    reference = ModelConfig(num_layers=3, model_dim=128, ffn_dim=344, attention=mha)
    model = matched(reference, template, multiple)
    assert abs(non_embedding(model) - non_embedding(reference)) <= 12 * 128 * 3
    budget = capacity.attention_parameters(mha, 128)

    def distance(num_heads: int) -> int:
        other = dataclasses.replace(model.attention, num_heads=num_heads)
        return abs(capacity.attention_parameters(other, 128) - budget)

    solved = model.attention.num_heads
    step = math.lcm(multiple, getattr(template, "num_kv_heads", 1))
    assert solved % step == 0
    neighbours = [n for n in (solved - step, solved + step) if n >= step]
    assert all(distance(solved) <= distance(n) for n in neighbours)


def test_impossible_matches_are_named() -> None:
    with pytest.raises(ValueError, match=r"parameters=16384: must be near \d+ or above, what 2 heads of mfa take"):
        match_heads(MFAConfig(latent_dim=256, query_rank=256), 64, 16384)
    # 8 heads are nearest to the 10240 parameters, and take 3088 more: twice what the feed-forward has.
    narrow = ModelConfig(model_dim=64, ffn_dim=8, attention=GQAConfig(num_heads=5, num_kv_heads=5, head_dim=8))
    with pytest.raises(ValueError, match="ffn_dim=-8: 8 heads of mfa leave no feed-forward"):
        matched(narrow, MFAConfig(latent_dim=16, query_rank=16), multiple=8)


def test_published_models_name_their_source() -> None:
    assert list(published) == ["step3", "deepseek-v3", "kimi-k2", "qwen3-235b", "qwen3-32b", "paper-7b-mha",
                               "paper-7b-mla", "paper-7b-mfa", "paper-7b-mfa-kr"]
    for name, model in published.items():
        assert model.name == name
        assert "arXiv" in model.source
        assert attention_shape(name) == model


def test_paper_7b_layers_are_matched() -> None:
    counts = [capacity.attention_parameters(published[f"paper-7b-{v}"].attention, 2048)
              for v in ("mha", "mla", "mfa", "mfa-kr")]
    assert max(abs(c / counts[0] - 1) for c in counts) < 0.02


def test_attention_shape_reads_presets() -> None:
    model = model_preset("nano-mfa-kr")
    shape = attention_shape("nano-mfa-kr")
    assert (shape.num_layers, shape.model_dim, shape.attention) == (model.num_layers, model.model_dim, model.attention)


@pytest.mark.parametrize("name", ["tiny-mfa_kr", "tiny", "huge-mfa", "", "step4", "step3-moe", "tiny-moe"])
def test_unknown_preset_lists_what_is_accepted(name: str) -> None:
    with pytest.raises(ValueError, match=r"must be one of tiny-mha, .*base-mfa-kr, one of these with -moe, .*step3$"):
        model_preset(name)


@pytest.mark.parametrize("name", MODEL_PRESETS)
def test_a_preset_with_experts_works_as_much_and_holds_more(name: str) -> None:
    dense, sparse = model_preset(name), model_preset(f"{name}-moe")
    assert sparse == with_experts(dense) and sparse.moe_layers == tuple(range(1, dense.num_layers))
    counts = [capacity.model_parameters(model) for model in (dense, sparse)]
    assert abs(counts[1].active / counts[0].active - 1) < 0.08  # the router, and the rounding of a third
    assert counts[1].total > 1.5 * counts[0].total
    with pytest.raises(ValueError, match="num_layers=1: must be at least 2"):
        with_experts(dataclasses.replace(dense, num_layers=1))


# ---- published language models ----


def abstract_parameters(model: ModelConfig) -> Any:
    """Shapes alone: nothing of the 316B is ever allocated."""
    return nn.unbox(jax.eval_shape(Transformer(model).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))["params"]


@pytest.mark.parametrize("name", language_models)
def test_a_language_model_has_the_parameters_of_the_closed_form(name: str) -> None:
    model = model_preset(name)
    assert model is language_models[name].config
    counted = sum(leaf.size for leaf in jax.tree.leaves(abstract_parameters(model)))
    assert counted == capacity.model_parameters(model).total
    assert model.attention == published[name].attention == attention_shape(name).attention
    assert from_dict(ModelConfig, to_dict(model)) == model


def test_step3_has_the_parameters_of_the_released_text_model() -> None:
    """Tensor by tensor, as the checkpoint holds them; the model card prints 316B and 38B."""
    D, Q, N, C, V = 7168, 2048, 64, 256, 128815
    attention = D * (Q + C + C) + Q + Q * N * C + N * C * D  # qkv_proj, inter_norm, wq, o_proj
    norms = 2 * D
    dense = 3 * D * 18432
    expert = 3 * D * 5120
    experts = 48 * D + 48 * expert + expert  # gate, moe, share_expert
    total = 61 * (attention + norms) + 5 * dense + 56 * experts + D + 2 * V * D
    found = capacity.model_parameters(model_preset("step3"))
    assert found.total == total == 316_294_538_240
    assert found.active == total - 56 * 45 * expert - V * D == 37_917_982_720
    assert (round(found.total / 1e9), round(found.active / 1e9)) == (316, 38)
    layers = abstract_parameters(model_preset("step3"))["layers"]
    assert {path: (indices[0], indices[-1]) for path, indices in stacked_blocks(layers)} == {
        ("segment_0", "block_0"): (0, 3), ("segment_1", "block_0"): (4, 59), ("segment_2", "block_0"): (60, 60)}


@pytest.mark.parametrize("variant", ["mha", "mla", "mfa", "mfa-kr"])
def test_the_papers_7b_models_have_7b_parameters_and_1_2b_active(variant: str) -> None:
    found = capacity.model_parameters(model_preset(f"paper-7b-{variant}"))
    assert (round(found.total / 1e9), round(found.active / 1e9, 1)) == (7, 1.2)
    mha = capacity.model_parameters(model_preset("paper-7b-mha"))
    assert abs(found.active / mha.active - 1) < 0.01


def test_training_flops_follow_the_active_parameters() -> None:
    """Of the Step-3 step, all but attention scores and norms: 6 a matrix element that serves a token."""
    model = model_preset("step3")
    scores = 3 * 61 * 64 * 2 * 256 * 2
    vectors = 61 * (2048 + 2 * 7168) + 7168
    assert capacity.training_flops_per_token(model, 1) - scores == 6 * (
        capacity.model_parameters(model).active - vectors)


def test_heads_of_whole_models_divide_over_a_tensor_axis() -> None:
    """What the page on sharding says."""
    for name in language_models:
        assert model_preset(name).attention.num_heads % (64 if name == "step3" else 2) == 0, name
