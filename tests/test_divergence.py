"""The divergence from a teacher in chunks: the numbers and gradients of its definition, on any mesh."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mfa_jax import axes
from mfa_jax.model.divergence import DivergenceSums, divergence
from mfa_jax.plan import costs, hlo

B, T, D, E, V = 2, 11, 8, 6, 50
Inputs = dict[str, Any]


def inputs(rows: int = B, vocabulary: int = V) -> Inputs:
    keys = jax.random.split(jax.random.key(0), 6)
    return {"hidden": jax.random.normal(keys[0], (rows, T, D)), "table": jax.random.normal(keys[1], (vocabulary, D)),
            "teacher_hidden": jax.random.normal(keys[2], (rows, T, E)),
            "teacher_table": jax.random.normal(keys[3], (vocabulary, E)),
            "targets": jax.random.randint(keys[4], (rows, T), 0, vocabulary),
            "mask": jax.random.bernoulli(keys[5], 0.7, (rows, T))}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def definition(x: Inputs, temperature: float) -> tuple[list[float], np.ndarray, np.ndarray]:
    """Divergence and negative log-likelihoods, the model's and the teacher's, and the gradients of the divergence by
    `hidden` and `table`, in float64."""
    wide = {name: np.asarray(value, np.float64) for name, value in x.items()}
    ours = np.einsum("btd,vd->btv", wide["hidden"], wide["table"])
    theirs = np.einsum("btd,vd->btv", wide["teacher_hidden"], wide["teacher_table"])
    log_p, log_q = log_softmax(theirs / temperature), log_softmax(ours / temperature)
    kept = wide["mask"][..., None]
    value = temperature**2 * (kept * np.exp(log_p) * (log_p - log_q)).sum()
    targets = np.asarray(x["targets"])[..., None]
    nll = [-(wide["mask"] * np.take_along_axis(log_softmax(logits), targets, -1)[..., 0]).sum()
           for logits in (ours, theirs)]
    by_logit = temperature * kept * (np.exp(log_q) - np.exp(log_p))
    return ([value, *nll], np.einsum("btv,vd->btd", by_logit, wide["table"]),
            np.einsum("btv,btd->vd", by_logit, wide["hidden"]))


def gradients(x: Inputs, **options: Any) -> tuple[jax.Array, jax.Array]:
    def value(hidden: jax.Array, table: jax.Array) -> jax.Array:
        return divergence(**{**x, "hidden": hidden, "table": table}, **options).divergence

    return jax.grad(value, (0, 1))(x["hidden"], x["table"])


@pytest.mark.parametrize("positions", [1, 4, 11])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_value_and_gradients_equal_the_definition(positions: int, temperature: float) -> None:
    x, options = inputs(), {"temperature": temperature, "chunk_elements": positions * 2 * B * V}
    values, by_hidden, by_table = definition(x, temperature)
    sums = divergence(**x, **options)
    np.testing.assert_allclose(sums[:3], values, rtol=1e-5)
    assert sums.tokens == x["mask"].sum()
    found = gradients(x, **options)
    np.testing.assert_allclose(found[0], by_hidden, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[1], by_table, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("positions", [4, 11])
def test_no_divergence_and_no_gradient_from_itself(positions: int) -> None:
    x = inputs()
    x |= {"teacher_hidden": x["hidden"], "teacher_table": x["table"]}
    options = {"chunk_elements": positions * 2 * B * V}
    assert divergence(**x, **options).divergence == 0
    assert all(not np.any(gradient) for gradient in gradients(x, **options))
    sums, found = divergence(**x, temperature=3.0, **options), gradients(x, temperature=3.0, **options)
    assert abs(sums.divergence) < 1e-5 and all(np.abs(gradient).max() < 1e-6 for gradient in found)


@pytest.mark.parametrize("sizes", [(2, 2, 1, 1, 2), (1, 1, 1, 1, 8), (8, 1, 1, 1, 1)])
def test_a_mesh_changes_neither_sums_nor_gradients(sizes: tuple[int, ...]) -> None:
    """Over tokens and vocabulary; four rows do not divide over eight shards, which then compute the same."""
    x = inputs(4, 48)

    def both(hidden: jax.Array, table: jax.Array, rest: Inputs) -> Any:
        def value(hidden: jax.Array, table: jax.Array) -> tuple[jax.Array, DivergenceSums]:
            sums = divergence(hidden=hidden, table=table, temperature=2.0, chunk_elements=4 * 48 * 6, **rest)
            return sums.divergence + 0.5 * sums.nll, sums

        return jax.value_and_grad(value, (0, 1), has_aux=True)(hidden, table)

    rest = {name: value for name, value in x.items() if name not in ("hidden", "table")}
    expected = jax.jit(both)(x["hidden"], x["table"], rest)
    with jax.set_mesh(axes.make_mesh(sizes)):
        found = jax.jit(both)(x["hidden"], x["table"], rest)
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(expected), rtol=1e-5, atol=1e-5)


def abstract(mesh: Mesh | None, rows: int, length: int, vocabulary: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The arguments of `divergence`, tables split over `fsdp` in their width and tokens in their rows."""
    def place(shape: tuple[int, ...], dtype: type, *spec: str | None) -> jax.ShapeDtypeStruct:
        where = None if mesh is None else NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    hidden, table = place((rows, length, 16), jnp.float32, "fsdp"), place((vocabulary, 16), jnp.float32, None, "fsdp")
    rest = place((rows, length), jnp.int32, "fsdp"), place((rows, length), jnp.bool_, "fsdp")
    return hidden, table, hidden, table, *rest


def compiled_gradient(arguments: tuple[jax.ShapeDtypeStruct, ...], chunk_elements: int) -> Any:
    def value(*given: jax.Array) -> jax.Array:
        return divergence(*given, chunk_elements=chunk_elements).divergence

    return jax.jit(jax.grad(value, (0, 1))).lower(*arguments).compile()


def test_tables_are_gathered_and_their_gradients_summed_once_and_not_in_every_chunk() -> None:
    mesh = axes.make_mesh((1, 8, 1, 1, 1))
    with jax.set_mesh(mesh):
        found = costs.count(hlo.parse(compiled_gradient(abstract(mesh, 8, 64, 512), 1024).as_text()))
    assert not found.unknown_loops and any(work.times == 64 for work in found.work)
    assert [c for c, times in found.collectives if times > 1] == []


def test_large_vocabularies_are_never_whole_in_memory() -> None:
    """B T V = 2 x 512 x 65536 float32 logits would be 268 MB for each model; all stays under a quarter of that."""
    memory = compiled_gradient(abstract(None, 2, 512, 65536), 1 << 22).memory_analysis()
    assert memory.temp_size_in_bytes < 2 * 512 * 65536 * 4 / 4
