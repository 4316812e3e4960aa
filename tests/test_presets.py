"""Presets: sizes, equal parameters across variants, divisibility, and the solver behind them."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfa_jax import capacity
from mfa_jax.config import VARIANTS, GQAConfig, MFAConfig, MFAKRConfig, MLAConfig, ModelConfig, from_dict, to_dict
from mfa_jax.presets import MODEL_PRESETS, attention_shape, match_heads, matched, model_preset, published

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


@pytest.mark.parametrize("name", ["tiny-mfa_kr", "tiny", "huge-mfa", "", "step3"])
def test_unknown_preset_lists_what_is_accepted(name: str) -> None:
    with pytest.raises(ValueError, match=r"must be one of tiny-mha, .*base-mfa-kr$"):
        model_preset(name)
