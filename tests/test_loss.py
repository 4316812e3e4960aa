"""Cross entropy in chunks: the same numbers and gradients, without the logits of the whole batch."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mfa_jax import axes
from mfa_jax.model.loss import LossSums, TokenScores, cross_entropy, token_scores
from mfa_jax.plan import costs, hlo

B, T, D, V = 2, 11, 8, 50


def inputs() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 4)
    return (jax.random.normal(keys[0], (B, T, D)), jax.random.normal(keys[1], (V, D)),
            jax.random.randint(keys[2], (B, T), 0, V), jax.random.bernoulli(keys[3], 0.7, (B, T)))


@pytest.mark.parametrize("positions", [1, 4, 11])
def test_chunks_equal_the_definition(positions: int) -> None:
    hidden, table, targets, mask = inputs()
    sums = cross_entropy(hidden, table, targets, mask, z_loss=0.1, chunk_elements=positions * B * V)
    logits = np.einsum("btd,vd->btv", np.asarray(hidden, np.float64), np.asarray(table, np.float64))
    log_partition = np.log(np.exp(logits).sum(-1))
    nll = log_partition - np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
    np.testing.assert_allclose(sums.nll, nll[mask].sum(), rtol=1e-5)
    np.testing.assert_allclose(sums.loss, nll[mask].sum() + 0.1 * np.square(log_partition[mask]).sum(), rtol=1e-5)
    assert sums.tokens == mask.sum()


@pytest.mark.parametrize("positions", [1, 4, 11])
def test_scores_equal_the_definition(positions: int) -> None:
    """Half of the targets are the most probable tokens."""
    hidden, table, targets, mask = inputs()
    logits = np.einsum("btd,vd->btv", np.asarray(hidden, np.float64), np.asarray(table, np.float64))
    targets = jnp.where(mask, targets, logits.argmax(-1))
    scores = token_scores(hidden, table, targets, chunk_elements=positions * B * V)
    chosen = np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
    np.testing.assert_allclose(scores.logprob, chosen - np.log(np.exp(logits).sum(-1)), atol=1e-5)
    assert scores.best.tolist() == (logits.argmax(-1) == targets).tolist() and not scores.best.all()


def test_gradients_do_not_depend_on_the_chunks() -> None:
    hidden, table, targets, mask = inputs()

    def gradients(elements: int) -> tuple[jax.Array, jax.Array]:
        return jax.grad(lambda h, t: cross_entropy(h, t, targets, mask, 1e-2, elements).loss, (0, 1))(hidden, table)

    chex.assert_trees_all_close(gradients(3 * B * V), gradients(1 << 24), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [(2, 2, 1, 1, 2), (1, 1, 1, 1, 8), (8, 1, 1, 1, 1)])
def test_a_mesh_changes_neither_sums_nor_gradients(sizes: tuple[int, ...]) -> None:
    """Over tokens and vocabulary; four rows do not divide over eight shards, which then compute the same."""
    keys = jax.random.split(jax.random.key(1), 4)
    hidden, table = jax.random.normal(keys[0], (4, T, D)), jax.random.normal(keys[1], (48, D))
    targets, mask = jax.random.randint(keys[2], (4, T), 0, 48), jax.random.bernoulli(keys[3], 0.7, (4, T))

    def sums(hidden: jax.Array, table: jax.Array) -> tuple[jax.Array, LossSums]:
        found = cross_entropy(hidden, table, targets, mask, 0.1, chunk_elements=3 * 48)
        return found.loss, found

    def run() -> object:
        return jax.jit(jax.value_and_grad(sums, (0, 1), has_aux=True))(hidden, table)

    expected = run()
    with jax.set_mesh(axes.make_mesh(sizes)):
        chex.assert_trees_all_close(jax.device_get(run()), jax.device_get(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [(2, 2, 1, 1, 2), (1, 1, 1, 1, 8)])
def test_a_mesh_does_not_change_scores(sizes: tuple[int, ...]) -> None:
    keys = jax.random.split(jax.random.key(2), 3)
    hidden, table = jax.random.normal(keys[0], (4, T, D)), jax.random.normal(keys[1], (48, D))
    targets = jnp.where(jnp.arange(T) % 2, jax.random.randint(keys[2], (4, T), 0, 48), (hidden @ table.T).argmax(-1))

    def run() -> TokenScores:
        return jax.device_get(jax.jit(token_scores, static_argnums=3)(hidden, table, targets, 3 * 48))

    expected = run()
    with jax.set_mesh(axes.make_mesh(sizes)):
        found = run()
    chex.assert_trees_all_close(found.logprob, expected.logprob, atol=1e-5)
    assert found.best.tolist() == expected.best.tolist()


def test_the_table_is_gathered_and_its_gradient_summed_once_and_not_in_every_chunk() -> None:
    mesh = axes.make_mesh((1, 8, 1, 1, 1))

    def place(shape: tuple[int, ...], dtype: type, *spec: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    arrays = (place((8, 64, 16), jnp.float32, "fsdp"), place((512, 16), jnp.float32, None, "fsdp"),
              place((8, 64), jnp.int32, "fsdp"), place((8, 64), jnp.bool_, "fsdp"))
    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(lambda h, t, y, m: cross_entropy(h, t, y, m, 0.0, chunk_elements=512).loss, (0, 1)))
        found = costs.count(hlo.parse(step.lower(*arrays).compile().as_text()))
    assert not found.unknown_loops and any(work.times == 64 for work in found.work)
    assert [c for c, times in found.collectives if times > 1] == []


def test_a_large_vocabulary_is_never_whole_in_memory() -> None:
    """B T V = 2 x 512 x 65536 float32 logits would be 268 MB; forward and backward stay under a quarter of that."""
    hidden = jax.ShapeDtypeStruct((2, 512, D), jnp.float32)
    table = jax.ShapeDtypeStruct((65536, D), jnp.float32)
    targets, mask = jax.ShapeDtypeStruct((2, 512), jnp.int32), jax.ShapeDtypeStruct((2, 512), jnp.bool_)
    step = jax.jit(jax.grad(lambda h, t, y, m: cross_entropy(h, t, y, m, chunk_elements=1 << 22).loss, (0, 1)))
    used = step.lower(hidden, table, targets, mask).compile().memory_analysis().temp_size_in_bytes
    assert used < 2 * 512 * 65536 * 4 / 4
