"""What attention variants and the model share: RMSNorm, and parameters with their initial scale and their axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float


def partitioned(initializer: Callable[..., Array], axes: tuple[str | None, ...]) -> Callable[..., Array]:
    """`initializer` for `Module.param`, noting the logical axes of the array that it makes."""
    boxed: Callable[..., Any] = nn.with_logical_partitioning(initializer, axes)
    return boxed


def weight(
    module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], *, fan_in: int,
    scale: float = 1.0, dtype: Any, param_dtype: Any,
) -> Array:
    """Parameter `name` of `module`: normal with standard deviation `scale / sqrt(fan_in)`, cast to `dtype`.

    With `fan_in` the number of elements that one output element sums over, an input of unit variance gives an output
    of variance `scale ** 2`, whatever the widths are.
    """
    initializer = partitioned(nn.initializers.normal(scale / fan_in**0.5), axes)
    return module.param(name, initializer, shape, param_dtype).astype(dtype)


def to_heads(x: Float[Array, "*B D"], w: Float[Array, "D N H"]) -> Float[Array, "*B N H"]:
    """`x W_n` for every head n, as one plain matrix product: on CPU an einsum over `N, H` takes twice the time."""
    return jnp.matmul(x, w.reshape(w.shape[0], -1)).reshape(*x.shape[:-1], *w.shape[1:])


def from_heads(o: Float[Array, "*B N H"], w: Float[Array, "N H D"]) -> Float[Array, "*B D"]:
    """`sum_n o_n W_n`, as one plain matrix product like `to_heads`."""
    return jnp.matmul(o.reshape(*o.shape[:-2], -1), w.reshape(-1, w.shape[-1]))


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x ** 2) + eps) * scale`, the mean in float32 (Zhang and Sennrich, arXiv 1910.07467)."""

    eps: float
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    axis: str = "act_embed"

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        scale = self.param("scale", partitioned(nn.initializers.ones, (self.axis,)), (x.shape[-1],), self.param_dtype)
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return normed.astype(self.dtype) * scale.astype(self.dtype)


def stacked_blocks(layers: Any) -> list[tuple[tuple[str, ...], range]]:
    """Where a model's blocks lie in its parameters `layers`: the path to each stacked block, and its layers in order.

    A model of equal blocks has one, at the empty path. One of dense blocks and blocks with experts has segments, each
    a pattern of blocks that repeats: row r of `segment_s/block_j` is layer `start_s + r * blocks_s + j`.
    """
    def rows(block: Any) -> int:
        return int(jax.tree.leaves(block)[0].shape[0])

    if "segment_0" not in layers:
        return [((), range(rows(layers)))]
    found: list[tuple[tuple[str, ...], range]] = []
    start = 0
    for s in range(len(layers)):
        segment = layers[f"segment_{s}"]
        stop = start + len(segment) * rows(segment)
        found += [((f"segment_{s}", f"block_{j}"), range(start + j, stop, len(segment))) for j in range(len(segment))]
        start = stop
    return found


def at_path(tree: Any, path: tuple[str, ...]) -> Any:
    """The subtree of nested dicts at a path of keys."""
    for key in path:
        tree = tree[key]
    return tree
