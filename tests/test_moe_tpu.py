"""The experts' products as the compiler for TPUs sees them: compiled ahead of time, in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import aot_tpu

ROOT = Path(__file__).resolve().parent.parent
M, D, F, E = 2048, 1024, 640, 16


def flops(chip: str, implementation: str) -> float:
    """FLOPs of the product and its two gradients, over those of one product of M rows."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from mfa_jax.model.grouped import grouped_matmul

    mesh = aot_tpu.mesh_of(chip)

    def array(shape: tuple[int, ...], dtype: object) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    def loss(rows: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(grouped_matmul(rows, weights, sizes, implementation).astype(jnp.float32)))

    with jax.set_mesh(mesh):
        local = jax.shard_map(jax.grad(loss, (0, 1)), in_specs=PartitionSpec(), out_specs=PartitionSpec(),
                              check_vma=False)
        compiled = jax.jit(local).lower(array((M, D), jnp.bfloat16), array((E, D, F), jnp.bfloat16),
                                        array((E,), jnp.int32)).compile()
    return compiled.cost_analysis()["flops"] / (2 * M * D * F)


@pytest.mark.slow
@pytest.mark.parametrize("chip", aot_tpu.TOPOLOGIES)
@pytest.mark.skipif(aot_tpu.libtpu() is None, reason="the compiler for TPUs is not there: make aot-tpu")
def test_auto_works_on_the_groups_alone_forward_and_backward(chip: str) -> None:
    """Three products, where the gradient of `ragged_dot` multiplies every row with every expert."""
    done = subprocess.run([sys.executable, "-m", "tests.test_moe_tpu", chip], cwd=ROOT, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["auto"] == pytest.approx(3, rel=0.02)
    assert found["ragged_dot"] == pytest.approx(2 + E, rel=0.02)


if __name__ == "__main__":
    aot_tpu.prepare()
    print(json.dumps({name: flops(sys.argv[1], name) for name in ("auto", "ragged_dot")}))
