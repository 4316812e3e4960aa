"""A sequence split over the mesh axis `context`: the order, attention in it, whole steps, and the bytes that move."""

from __future__ import annotations

import dataclasses
import math
import re
from functools import partial
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
from mfa_jax.attention.context import context_attention, local_implementation, zigzag
from mfa_jax.attention.core import attend
from mfa_jax.attention.library import splash_kernel
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


def assert_equal_to_one_device(
    attention: Any, mesh: tuple[int, ...], T: int, H: int, h: int, key_heads: int, alibi: bool, packed: bool
) -> None:
    """Of four heads, in zig-zag order on that mesh: the result and its gradients, against `dense`."""
    B, N = 2, 4
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (B, T, N, H))
    k, v = (jax.random.normal(key, (B, key_heads, T, width)) for key, width in ((keys[1], H), (keys[2], h)))
    weights = jax.random.normal(keys[3], (B, T, N, h))
    segments = jnp.sort(jax.random.randint(keys[3], (B, T), 0, 3), axis=1) if packed else None
    slopes = jnp.array([0.5, 0.25, 0.1, 0.05]) if alibi else None
    order = zigzag(T, mesh[axes.MESH_AXES.index("context")])

    def outputs(attention: Any, q: Any, k: Any, v: Any, weights: Any, segments: Any) -> Any:
        def total(q: Any, k: Any, v: Any) -> Any:
            o = attention(q, k, v, scale=H**-0.5, segments=segments, alibi_slopes=slopes)
            if segments is not None:  # padding gives zeros
                o = jnp.where((segments != 0)[:, :, None, None], o, 0)
            return jnp.sum(o * weights), o

        return jax.grad(total, (0, 1, 2), has_aux=True)(q, k, v)

    dense = partial(attend, implementation="dense")
    (dq, dk, dv), o = jax.jit(partial(outputs, dense))(q, k, v, weights, segments)
    with jax.set_mesh(axes.make_mesh(mesh)):
        found = jax.jit(partial(outputs, attention))(
            q[:, order], k[:, :, order], v[:, :, order], weights[:, order],
            None if segments is None else segments[:, order])
    expected = (dq[:, order], dk[:, :, order], dv[:, :, order]), o[:, order]
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(expected), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("key_heads", "alibi", "packed"), [(1, False, True), (2, True, False), (4, False, False)])
def test_attention_and_its_gradients_equal_those_of_one_device(key_heads: int, alibi: bool, packed: bool) -> None:
    assert_equal_to_one_device(partial(attend, implementation="context"), (1, 1, 1, 4, 2), 32, 8, 6, key_heads, alibi,
                               packed)


@pytest.mark.slow
@pytest.mark.parametrize(("key_heads", "packed"), [(1, True), (2, False)])
def test_the_tpu_kernel_in_the_order_of_the_shards(key_heads: int, packed: bool) -> None:
    """Splash, interpreted, two chunks of 128 tokens a device, over rows and heads too."""
    splash = partial(context_attention, rows=("data",), heads=("tensor",), local="splash", interpret=True)
    assert_equal_to_one_device(splash, (2, 1, 1, 2, 2), 512, 16, 8, key_heads, False, packed)


@pytest.mark.parametrize("shards", [1, 4])
def test_the_mask_of_the_kernel_is_the_causal_one_in_that_order(shards: int) -> None:
    """Against splash's own, which compares every position; T = 4096 so that there are blocks of every kind."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    order = zigzag(4096, shards) if shards > 1 else np.arange(4096)
    found = splash_kernel(order, 2, shards)
    mask = splash.CausalMask((4096, 4096))
    mask.q_sequence = order.astype(np.int32)
    expected = splash.make_splash_mqa(splash.MultiHeadMask([mask] * 2), block_sizes=found.kwargs["block_sizes"],
                                      head_shards=1, q_seq_shards=shards)
    chex.assert_trees_all_equal(jax.tree.leaves(found), jax.tree.leaves(expected))


def test_what_each_device_attends_with() -> None:
    with jax.set_mesh(axes.make_mesh((1, 1, 1, 8, 1))):
        assert local_implementation("tpu", 2048, alibi=False) == "splash"
        assert local_implementation("tpu", 2048 + 16, alibi=False) == "blockwise", "its tiles are whole"
        assert local_implementation("tpu", 2048, alibi=True) == "blockwise", "it knows no ALiBi"
        assert local_implementation("gpu", 2048, alibi=False) == "blockwise"


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
    (MeshConfig(data=1, expert=4, context=2), True), (MeshConfig(data=8), False), (MeshConfig(data=2, fsdp=4), False),
    (MeshConfig(data=2, tensor=4), False), (MeshConfig(data=2, fsdp=2, tensor=2), False),
], ids=lambda value: "-".join(f"{axis}{size}" for axis, size in dataclasses.asdict(value).items() if size > 1)
    if isinstance(value, MeshConfig) else "")
def test_twenty_steps_over_the_axis_of_the_sequence_and_those_of_dense_models(
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
