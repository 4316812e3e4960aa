"""A sequence split over the mesh axis `context`: the order, attention in it, whole steps, and the bytes that move."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
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
from mfa_jax.attention.context import zigzag
from mfa_jax.attention.core import attend
from mfa_jax.config import DataConfig, MeshConfig, TrainConfig
from mfa_jax.model.transformer import Transformer
from mfa_jax.presets import model_preset
from mfa_jax.train.loop import train
from mfa_jax.train.losses import batch_loss
from mfa_jax.train.step import BATCH_SPEC
from tests.contract import ATTENTION, model_config
from tests.test_train import one_step, synthetic_batch
from tests.test_train_moe import assert_same_step, config_for, curve_config, losses

pytestmark = pytest.mark.xdist_group("train")


@given(st.integers(1, 9), st.integers(1, 7))
def test_zigzag_gives_each_shard_as_many_pairs(shards: int, chunk: int) -> None:
    length = 2 * shards * chunk
    parts = zigzag(length, shards).reshape(shards, -1)
    assert sorted(parts.ravel()) == list(range(length))
    assert len({int(np.sum(part + 1)) for part in parts}) == 1, "query i meets i + 1 keys"


def test_the_order_of_four_shards() -> None:
    assert zigzag(8, 4).tolist() == [0, 7, 1, 6, 2, 5, 3, 4]
    with pytest.raises(ValueError, match="sequence_length=12: must be a multiple of 8, two chunks for each of the 4"):
        zigzag(12, 4)


@pytest.mark.parametrize(("key_heads", "alibi", "packed"), [(1, False, True), (2, True, False), (4, False, False)])
def test_attention_and_its_gradients_equal_those_of_one_device(key_heads: int, alibi: bool, packed: bool) -> None:
    B, T, N, H, h = 2, 32, 4, 8, 6
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (B, T, N, H))
    k, v = (jax.random.normal(key, (B, key_heads, T, width)) for key, width in ((keys[1], H), (keys[2], h)))
    weights = jax.random.normal(keys[3], (B, T, N, h))
    segments = jnp.sort(jax.random.randint(keys[3], (B, T), 0, 3), axis=1) if packed else None
    slopes = jnp.array([0.5, 0.25, 0.1, 0.05]) if alibi else None
    order = zigzag(T, 4)

    def outputs(q: Any, k: Any, v: Any, weights: Any, segments: Any, implementation: str) -> Any:
        def total(q: Any, k: Any, v: Any) -> Any:
            o = attend(q, k, v, scale=H**-0.5, segments=segments, alibi_slopes=slopes, implementation=implementation)
            return jnp.sum(o * weights), o

        return jax.grad(total, (0, 1, 2), has_aux=True)(q, k, v)

    run = jax.jit(outputs, static_argnames="implementation")
    (dq, dk, dv), o = run(q, k, v, weights, segments, "dense")
    with jax.set_mesh(axes.make_mesh((1, 1, 1, 4, 2))):
        found = run(q[:, order], k[:, :, order], v[:, :, order], weights[:, order],
                    None if segments is None else segments[:, order], "context")
    expected = (dq[:, order], dk[:, :, order], dv[:, :, order]), o[:, order]
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(expected), rtol=2e-5, atol=2e-5)


def test_without_a_mesh_it_is_refused() -> None:
    q = jnp.ones((1, 4, 2, 8))
    message = "'context': needs a mesh whose axis context splits the sequence; use one of auto, dense, blockwise"
    with pytest.raises(NotImplementedError, match=message):
        attend(q, q[:, :, 0], q[:, :, 0], scale=1.0, implementation="context")


def test_a_length_that_does_not_divide_is_named(tmp_path: Path) -> None:
    config = TrainConfig(workdir=str(tmp_path), mesh=MeshConfig(data=1, context=8),
                         data=DataConfig(sequence_length=24, batch_size=8))
    with pytest.raises(ValueError, match=r"data.sequence_length=24: must be a multiple of 16, .* mesh context=8"):
        train(config, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ATTENTION)
def test_a_step_equals_that_of_one_device_leaf_by_leaf(variant: str, tmp_path: Path) -> None:
    """Packed rows, positions of their own, masked targets; three axes at once."""
    config = config_for(tmp_path)
    config = dataclasses.replace(config, model=dataclasses.replace(model_config(variant), vocab_size=264))
    mesh = MeshConfig(data=1, fsdp=2, context=2, tensor=2)
    assert_same_step(one_step(dataclasses.replace(config, mesh=mesh), 8), one_step(config, 1))


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, list[float]]:
    """Of one device, without and with experts."""
    return {sparse: losses(curve(tmp_path_factory.mktemp("one"), sparse), 1) for sparse in (False, True)}


def curve(workdir: Path, sparse: bool, **changes: object) -> TrainConfig:
    config = curve_config(workdir, **changes)
    return config if sparse else dataclasses.replace(config, model=dataclasses.replace(config.model, moe=None))


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "sparse"), [
    (MeshConfig(data=1, context=8), False), (MeshConfig(data=2, context=4), False),
    (MeshConfig(data=1, fsdp=2, context=2, tensor=2), False), (MeshConfig(data=2, expert=2, context=2), True),
    (MeshConfig(data=1, expert=4, context=2), True),
], ids=["context8", "data2-context4", "fsdp2-context2-tensor2", "data2-expert2-context2", "expert4-context2"])
def test_twenty_steps_over_the_axis_of_the_sequence(
    mesh: MeshConfig, sparse: bool, curves: dict[bool, list[float]], tmp_path: Path
) -> None:
    np.testing.assert_allclose(losses(curve(tmp_path, sparse, mesh=mesh), 8), curves[sparse], rtol=0, atol=1e-5)


# ---- bytes ----


@pytest.mark.parametrize("variant", [
    name if name in ("mfa", "mfa_kr") else pytest.param(name, marks=pytest.mark.slow) for name in ATTENTION])
def test_the_compiled_program_gathers_what_the_closed_form_says(variant: str) -> None:
    """Of one layer's forward pass on 8 devices, from the program: all that is gathered and as long as the sequence."""
    config = TrainConfig(model=dataclasses.replace(model_config(variant), vocab_size=264, num_layers=1),
                         data=DataConfig(sequence_length=512, batch_size=1))
    mesh = axes.make_mesh((1, 1, 1, 8, 1))
    with jax.set_mesh(mesh):
        model = Transformer(config.model)
        params = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))["params"]
        batch = jax.device_put(synthetic_batch(config), jax.sharding.NamedSharding(mesh, BATCH_SPEC))
        text = jax.jit(lambda p, b: batch_loss(config, model, p, b)).lower(params, batch).compile().as_text()
    gathered = 0
    for dtype, size in re.findall(r"= \(?([a-z0-9]+)\[([0-9,]+)\][^=]* all-gather\(", text):
        elements = math.prod(map(int, size.split(",")))
        gathered += 4 * elements if dtype == "f32" and elements >= 512 else 0
    received = capacity.sequence_exchange_bytes(config.model, rows=1, length=512, shards=8, itemsize=4)
    assert gathered * 7 // 8 == received


def test_bytes_beside_those_of_mha() -> None:
    """A row of 131072 tokens over 8 devices, the paper's 7B family in bfloat16: 1/8 and 1/16 of MHA."""
    mha, mla, mfa, mfa_kr = (
        capacity.sequence_exchange_bytes(model_preset(f"paper-7b-{name}"), rows=1, length=131072, shards=8)
        for name in ("mha", "mla", "mfa", "mfa-kr"))
    assert mha == 24 * (131072 * 7 // 8) * 2 * 16 * 128 * 2
    assert (mha / mfa, mha / mfa_kr) == (8, 16) and mla / mfa == 1152 / 512
