"""The embedding table on a mesh: the same rows and gradients, and no table travels over the axis that splits it."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mfa_jax import axes
from mfa_jax.model.embedding import look_up
from mfa_jax.plan import costs, hlo

V, D = 48, 16


@pytest.mark.parametrize("sizes", [(2, 2, 1, 1, 2), (1, 1, 1, 1, 8), (8, 1, 1, 1, 1)])
def test_a_mesh_changes_neither_rows_nor_gradients(sizes: tuple[int, ...]) -> None:
    """Four rows of tokens do not divide over eight shards, which then compute the same."""
    table = jax.random.normal(jax.random.key(0), (V, D))
    tokens = jax.random.randint(jax.random.key(1), (4, 11), 0, V)
    factors = jax.random.normal(jax.random.key(2), (4, 11, D))

    def run() -> object:
        def f(table: jax.Array) -> tuple[jax.Array, jax.Array]:
            rows = look_up(table, tokens, jnp.float32)
            return jnp.sum(factors * rows), rows

        return jax.jit(jax.value_and_grad(f, has_aux=True))(table)

    expected = run()
    with jax.set_mesh(axes.make_mesh(sizes)):
        chex.assert_trees_all_close(jax.device_get(run()), jax.device_get(expected), rtol=1e-5, atol=1e-5)


def test_no_table_is_gathered_over_the_axis_that_splits_the_vocabulary() -> None:
    """Eight tokens on eight shards of the vocabulary: one sum of their rows, 8 x 16 numbers, and nothing else."""
    mesh = axes.make_mesh((1, 1, 1, 1, 8))
    table = jax.ShapeDtypeStruct((V, D), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("tensor")))
    tokens = jax.ShapeDtypeStruct((8, 1), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        program = jax.jit(lambda table, tokens: look_up(table, tokens, jnp.float32)).lower(table, tokens).compile()
    found = costs.count(hlo.parse(program.as_text())).collectives
    assert [(c.kind, c.nbytes) for c, _ in found] == [("all-reduce", 8 * D * 4)]
