"""The experts' products as the compiler for TPUs sees them: compiled ahead of time, in a process of their own."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import aot_tpu
from mfa_jax.plan import compiler, costs, hlo

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


def layer(chip: str) -> str:
    """A layer and its gradient on four chips of the axis `expert`, compiled."""
    import jax
    import jax.numpy as jnp
    from flax import linen as nn
    from jax.experimental import topologies
    from jax.sharding import NamedSharding

    from mfa_jax import axes
    from mfa_jax.config import MoEConfig
    from mfa_jax.model.moe import MoE

    devices = topologies.get_topology_desc(platform="tpu", topology_name=aot_tpu.TOPOLOGIES[chip]).devices
    mesh = axes.make_mesh((1, 1, 4, 1, 1), devices)
    moe = MoE(MoEConfig(num_experts=E, experts_per_token=2, expert_dim=F), dtype=jnp.bfloat16)
    tokens = (8, 128, D)
    boxed = jax.eval_shape(moe.init, jax.random.key(0), jax.ShapeDtypeStruct(tokens, jnp.bfloat16))["params"]
    where = axes.shardings(boxed, mesh)
    params = jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), nn.unbox(boxed),
                          where)
    at = NamedSharding(mesh, axes.RULES.spec("batch"))

    def loss(params: object, x: jax.Array) -> jax.Array:
        y, routing = moe.apply({"params": params}, x)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))) + jnp.sum(routing.balance)

    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss, (0, 1)), out_shardings=(where, at)).lower(
            params, jax.ShapeDtypeStruct(tokens, jnp.bfloat16, sharding=at)).compile().as_text()


def collectives(chip: str) -> dict[str, int]:
    """Of `layer` each kind, and its largest result in elements."""
    found: dict[str, int] = {}
    text = layer(chip)
    for shapes, kind in re.findall(r"= (\(?[a-z0-9]+\[[^=]*?) (all-gather|all-to-all|ragged-all-to-all|all-reduce|"
                                   r"collective-permute|reduce-scatter)(?:-start)?\(", text):
        sizes = [math.prod(map(int, size.split(","))) for size in re.findall(r"\[([0-9,]+)\]", shapes)]
        found[kind] = max([found.get(kind, 0), *sizes])
    return found


def counted(chip: str) -> dict[str, float]:
    """What the planner counts in `layer`: FLOPs of the experts, bytes of the rows that travel."""
    found = costs.count(hlo.parse(layer(chip)), expert_shards=4)
    return {"flops": sum(w.flops * w.times for w in found.work if "gmm" in w.name),
            "bytes": sum(c.nbytes * times for c, times in found.collectives if c.kind == "all-to-all")}


@pytest.mark.slow
@pytest.mark.skipif(compiler.libtpu() is None, reason="the compiler for TPUs is not there: make aot-tpu")
def test_tokens_travel_to_their_experts_and_weights_stay() -> None:
    """All that crosses the axis but the ragged exchange is smaller than one expert."""
    found = in_a_process("collectives", "v5e")
    receiving = 4 * (8 * 128 * 2 // 4) * D
    assert found["ragged-all-to-all"] == receiving
    others = {kind: size for kind, size in found.items() if kind != "ragged-all-to-all"}
    assert max(others.values()) <= D * E, f"the router's gradient is the largest of the rest: {others}"


@pytest.mark.slow
@pytest.mark.skipif(compiler.libtpu() is None, reason="the compiler for TPUs is not there: make aot-tpu")
def test_the_planner_counts_what_a_balanced_router_sends() -> None:
    """Two choices of 256 tokens on each chip: three products and two gradients of each, there and back twice."""
    found, rows = in_a_process("counted", "v5e"), 2 * 256
    assert found["flops"] == 9 * 2 * rows * D * F
    assert found["bytes"] == pytest.approx(4 * rows * D * 2, rel=1e-4), "and where they go"


def in_a_process(what: str, chip: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-m", "tests.test_moe_tpu", what, chip], cwd=ROOT, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("chip", aot_tpu.TOPOLOGIES)
@pytest.mark.skipif(compiler.libtpu() is None, reason="the compiler for TPUs is not there: make aot-tpu")
def test_auto_works_on_the_groups_alone_forward_and_backward(chip: str) -> None:
    """Three products, where the gradient of `ragged_dot` multiplies every row with every expert."""
    found = in_a_process("flops", chip)
    assert found["auto"] == pytest.approx(3, rel=0.02)
    assert found["ragged_dot"] == pytest.approx(2 + E, rel=0.02)


if __name__ == "__main__":
    compiler.prepare()
    what, chip = sys.argv[1:]
    print(json.dumps({"collectives": collectives, "counted": counted}[what](chip) if what != "flops" else {
        name: flops(chip, name) for name in ("auto", "ragged_dot")}))
