"""Configs: JSON both ways, and each either works or says what would."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfa_jax.config import (
    DataConfig,
    GQAConfig,
    MeshConfig,
    MFAConfig,
    MFAKRConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    PositionConfig,
    RopeScaling,
    TrainConfig,
    from_dict,
    load_json,
    to_dict,
    to_json,
)
from mfa_jax.model.transformer import Transformer

small = st.integers(-1, 9)
attention = st.one_of(
    st.tuples(st.just(GQAConfig), st.fixed_dictionaries(
        {"num_heads": small, "num_kv_heads": small, "head_dim": small})),
    st.tuples(st.just(MFAConfig), st.fixed_dictionaries(
        {"num_heads": small, "latent_dim": small, "query_rank": small})),
    st.tuples(st.just(MFAKRConfig), st.fixed_dictionaries({"num_heads": small, "latent_dim": small})),
    st.tuples(st.just(MLAConfig), st.fixed_dictionaries(
        {"num_heads": small, "rope_dim": small, "value_dim": small, "latent_dim": small,
         "query_rank": st.none() | small})),
)


@pytest.mark.slow
@settings(max_examples=40)
@given(drawn=attention, encoding=st.sampled_from(["rope", "alibi", "none"]), layers=small, width=small)
def test_a_drawn_model_is_refused_or_works(drawn: tuple, encoding: str, layers: int, width: int) -> None:
    """What is accepted can be built and called (abstractly), and survives JSON."""
    kind, fields = drawn
    try:
        config = ModelConfig(num_layers=layers, model_dim=width, attention=kind(**fields),
                             position=PositionConfig(kind=encoding))
    except ValueError as error:
        assert any(name in str(error) for name in [*fields, "num_layers", "model_dim"])
        return
    assert from_dict(ModelConfig, json.loads(to_json(config))) == config
    model = Transformer(config)
    shape = jax.ShapeDtypeStruct((1, 3), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), shape)
    logits, _ = jax.eval_shape(model.apply, params, shape)
    assert logits.shape == (1, 3, config.vocab_size)


def test_every_field_survives_json() -> None:
    config = TrainConfig(
        preset="x", ema_decay=0.5, mesh=MeshConfig(data=2, tensor=4), optimizer=OptimizerConfig(clip_norm=None),
        model=ModelConfig(
            num_layers=2, attention=MLAConfig(rope_dim=4, query_rank=8), inv_freq=((1.0, 0.5), (1.0, 0.25)),
            position=PositionConfig(scaling=RopeScaling(kind="yarn", factor=4.0))))
    assert from_dict(TrainConfig, json.loads(to_json(config))) == config
    assert hash(config) == hash(from_dict(TrainConfig, to_dict(config)))


@pytest.mark.parametrize(("build", "message"), [
    (lambda: GQAConfig(num_heads=6, num_kv_heads=4), "num_heads=6 is not a multiple of num_kv_heads=4"),
    (lambda: GQAConfig(num_heads=0), "num_heads=0: must be at least 1"),
    (lambda: ModelConfig(attention=MFAConfig(latent_dim=7)), "latent_dim=7: rope rotates pairs"),
    (lambda: ModelConfig(attention=MLAConfig(rope_dim=3)), "rope_dim=3: rope rotates pairs"),
    (lambda: ModelConfig(inv_freq=((1.0,),)), "inv_freq='1 rows': must be num_layers=2 rows of 64 frequencies"),
    (lambda: PositionConfig(kind="alibi", scaling=RopeScaling()), "only kind='rope' can be scaled"),
    (lambda: RopeScaling(factor=0.5), "factor=0.5: must be at least 1"),
    (lambda: RopeScaling("yarn", beta_slow=0.0), "beta_slow=0.0: must be positive"),
    (lambda: DataConfig(held_out=1.0), r"held_out=1.0: must be in \[0, 1\)"),
    (lambda: DataConfig(held_out=0.0, held_out_source="x"), "held_out=0.0: holds nothing out, though held_out_s"),
    (lambda: DataConfig(held_out_source=""), r"held_out_source='': must be stdlib, a path, or hf:NAME"),
    (lambda: OptimizerConfig(learning_rate=0.0), "learning_rate=0.0: must be positive"),
    (lambda: OptimizerConfig(warmup_steps=10, schedule_steps=5), "schedule_steps=5: must exceed warmup_steps=10"),
    (lambda: MeshConfig(data=-1, fsdp=-1), "only one axis may be -1"),
    (lambda: MeshConfig(tensor=0), "tensor=0: must be at least 1"),
    (lambda: TrainConfig(accumulate=3), "batch_size=16 is not a multiple of accumulate=3"),
    (lambda: TrainConfig(workdir="gs://bucket/run"), "workdir='gs://bucket/run': must be a folder; a bucket can be m"),
    (lambda: DataConfig(prepared="gs://bucket/data"), "prepared='gs://bucket/data': must be a folder"),
    (lambda: DataConfig(seed=-1), r"seed=-1: must be in 0 \.\. 2\^32 - 1"),
    (lambda: DataConfig(seed=2**32), r"seed=4294967296: must be in 0 \.\. 2\^32 - 1"),
    (lambda: OptimizerConfig(learning_rate=math.inf), "learning_rate=inf: must be positive and finite"),
    (lambda: OptimizerConfig(weight_decay=math.inf), "weight_decay=inf: must be 0 or positive"),
    (lambda: OptimizerConfig(eps=math.inf), "eps=inf: must be positive and finite"),
    (lambda: TrainConfig(z_loss=math.inf), "z_loss=inf: must be 0 or positive"),
    (lambda: TrainConfig(ema_decay=1.0), r"ema_decay=1.0: must be in \(0, 1\)"),
    (lambda: from_dict(TrainConfig, {"model": {"atention": {}}}), "config.model=.*atention.*unknown field; accepted"),
    (lambda: from_dict(TrainConfig, {"steps": "many"}), "config.steps='many': must be of type int"),
    (lambda: from_dict(TrainConfig, {"steps": True}), "config.steps=True: must be of type int"),
    (lambda: from_dict(TrainConfig, {"model": {"attention": {"kind": "rnn"}}}), "kind='rnn': must be one of gqa, mla"),
    (lambda: from_dict(TrainConfig, {"model": {"attention": {"kind": ["gqa"]}}}), r"kind=\['gqa'\]: must be one of"),
    (lambda: MoEConfig(output_scale=math.inf), "output_scale=inf: must be positive and finite"),
    (lambda: MoEConfig(balance_loss=math.inf), "balance_loss=inf: must be finite"),
    (lambda: MoEConfig(bias_update_rate=math.inf), "bias_update_rate=inf: must be finite"),
    (lambda: from_dict(TrainConfig, {"model": {"dtype": "int4"}}), "dtype='int4': must be one of float32, bfloat16"),
    (lambda: from_dict(TrainConfig, []), r"config=\[\]: must be an object"),
])
def test_errors_name_field_value_and_what_is_accepted(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_config_files(tmp_path: object) -> None:
    path = tmp_path / "c.json"
    path.write_text(to_json(TrainConfig(steps=7)))
    assert load_json(TrainConfig, path).steps == 7
    for content in (b"{", b'{"workdir": "\xe9"}'):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"c.json': is not JSON"):
            load_json(TrainConfig, path)
    with pytest.raises(ValueError, match="cannot be read"):
        load_json(TrainConfig, tmp_path / "none.json")


def test_variants_are_named_by_their_heads() -> None:
    heads = [GQAConfig(num_heads=8, num_kv_heads=k).variant for k in (8, 4, 1)]
    assert heads == ["mha", "gqa", "mqa"]
    assert dataclasses.replace(MFAKRConfig()).variant == "mfa_kr"
