"""The table between logical and mesh axes, and what it refuses."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from mfa_jax import axes
from mfa_jax.model.transformer import Transformer
from tests.contract import ATTENTION, model_config


def test_spec_is_strict() -> None:
    assert axes.RULES.spec("embed", "heads", None) == P("fsdp", "tensor", None)
    with pytest.raises(ValueError, match="logical axis 'head' is unknown; accepted: .*heads"):
        axes.RULES.spec("embed", "head")
    with pytest.raises(ValueError, match="mesh axis 'tensor' would be used twice"):
        axes.RULES.spec("heads", "ffn")
    with pytest.raises(ValueError, match="mesh axis 'fsdp' would be used twice"):
        dataclasses.replace(axes.RULES, latent="fsdp").spec("embed", "latent")


@pytest.mark.parametrize(("sizes", "expected"), [(None, (8, 1, 1, 1, 1)), ((2, -1, 1, 1, 2), (2, 2, 1, 1, 2))])
def test_mesh_takes_all_devices(sizes: tuple | None, expected: tuple) -> None:
    assert tuple(axes.make_mesh(sizes).shape.values()) == expected


@pytest.mark.parametrize("sizes", [(3, 1, 1, 1, 1), (-1, 3, 1, 1, 1), (16, -1, 1, 1, 1)])
def test_mesh_that_does_not_multiply_is_refused(sizes: tuple) -> None:
    with pytest.raises(ValueError, match=r"devices, there are 8; the sizes must multiply to 8"):
        axes.make_mesh(sizes)


@pytest.mark.parametrize("sizes", [(0, -1, 1, 1, 1), (-1, -1, 1, 1, 1), (-2, 1, 1, 1, 4)])
def test_sizes_of_a_mesh_are_positive(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"mesh \(.*: sizes must be positive, but for one that may be -1"):
        axes.make_mesh(sizes)


def test_constrain_without_a_mesh_does_nothing() -> None:
    x = jnp.ones((2, 3))
    assert axes.constrain(x, "batch", "act_embed") is x


@pytest.mark.parametrize("variant", ATTENTION)
def test_every_parameter_has_axes_of_the_table_and_big_ones_are_split(variant: str) -> None:
    """A name missing from a table silently replicates in Flax; here each leaf is boxed and each projection split."""
    model = Transformer(model_config(variant))
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    mesh = axes.make_mesh((1, 2, 1, 1, 2), jax.devices()[:4])
    placed = axes.shardings(boxed, mesh)
    for (path, leaf), where in zip(
        jax.tree_util.tree_leaves_with_path(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)),
        jax.tree.leaves(placed), strict=True,
    ):
        name = jax.tree_util.keystr(path)
        assert isinstance(leaf, nn.LogicallyPartitioned), name
        assert len(leaf.names) == leaf.value.ndim, name
        if "layers" in name:
            assert leaf.names[0] == "layers" and where.spec[0] is None, name
        if leaf.value.ndim - ("layers" in name) >= 2 and "N_kr" not in name:
            assert not where.is_fully_replicated, name
            assert "fsdp" in jax.tree.leaves(tuple(where.spec)) or "['b_" in name, name


def test_sizes_that_do_not_divide_name_the_leaf() -> None:
    model = Transformer(model_config("mfa"))
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    with pytest.raises(ValueError, match=r"\['O'\]: axis 'heads' of size 4 does not divide over mesh tensor=8"):
        axes.shardings({"O": boxed["layers"]["attention"]["O"]}, axes.make_mesh((1, 1, 1, 1, 8)))
