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


@jax.custom_vjp
def linear(x: Float[Array, "*B D"], w: Float[Array, "D F"]) -> Float[Array, "*B F"]:
    """`x w`, of one type; the gradient of `w` is made with the narrower of the two arrays that it sums over turned.

    Which one is only a matter of speed: XLA turns it on CPUs, element by element. Left to JAX's own rule it turns both,
    and a feed-forward layer takes 1.5 times as long there. Gradients are those of reverse mode: `jax.jvp` is refused.
    """
    return jnp.matmul(x, w)


def _linear(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return jnp.matmul(x, w), (x, w)


def _linear_gradients(factors: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = factors
    tokens = tuple(range(x.ndim - 1))
    sums = ((tokens, tokens), ((), ()))
    wide = x.shape[-1] > g.shape[-1]
    return jnp.matmul(g, w.T), jax.lax.dot_general(g, x, sums).T if wide else jax.lax.dot_general(x, g, sums)


linear.defvjp(_linear, _linear_gradients)


def to_heads(x: Float[Array, "*B D"], w: Float[Array, "D N H"]) -> Float[Array, "*B N H"]:
    """`x W_n` for every head n, as one plain matrix product: on CPU an einsum over `N, H` takes twice the time."""
    return linear(x, w.reshape(w.shape[0], -1)).reshape(*x.shape[:-1], *w.shape[1:])


def from_heads(o: Float[Array, "*B N H"], w: Float[Array, "N H D"]) -> Float[Array, "*B D"]:
    """`sum_n o_n W_n`, as one plain matrix product like `to_heads`."""
    return linear(o.reshape(*o.shape[:-2], -1), w.reshape(-1, w.shape[-1]))


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
