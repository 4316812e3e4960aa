"""The grouped product on Hopper GPUs: the Mosaic GPU kernels that come with JAX, forward and for both gradients.

Each works on the tiles of rows of a group alone, for any sizes of groups. Block sizes are such as the kernels' authors
try, four steps of 32 KiB on their way into shared memory; none was timed here.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_ROWS, _INNER, _STEPS = 128, 64, 4
"""Rows of a tile, width that is summed at a time, steps of that on their way."""
_WIDTHS = (128, 64)
"""Of a tile, the widest that divides; others are padded to the last."""


@jax.custom_vjp
def product(
    rows: Float[Array, "M D"], weights: Float[Array, "E D F"], sizes: Int[Array, " E"]
) -> Float[Array, "M F"]:
    """`y_m = x_m W_e(m)`, in float32 sums; rows past the last group are as memory was, in results and in the gradient
    of the rows, and must be finite in `rows` and in what comes back.

    Args:
      rows: float16 or bfloat16, M a multiple of 128, D and F of 64 (`padded`).
      weights: of the same type.
    """
    return _rows_by_weights(rows, weights, sizes, transposed=False)


def _forward(rows: Array, weights: Array, sizes: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return product(rows, weights, sizes), (rows, weights, sizes)


def _backward(kept: tuple[Array, Array, Array], gradient: Array) -> tuple[Array, Array, None]:
    rows, weights, sizes = kept
    return _rows_by_weights(gradient, weights, sizes, transposed=True), _rows_by_rows(rows, gradient, sizes), None


product.defvjp(_forward, _backward)


def padded(x: Array, *multiples: int) -> Array:
    """With zeros behind each of the last axes, up to a multiple."""
    lead = x.ndim - len(multiples)
    return jnp.pad(x, [(0, 0)] * lead + [(0, -size % n) for size, n in zip(x.shape[lead:], multiples, strict=True)])


def pad_rows(rows: Float[Array, "M D"]) -> Float[Array, "m d"]:
    """As `product` takes them."""
    return padded(rows, _ROWS, _WIDTHS[-1])


def pad_weights(weights: Float[Array, "E D F"]) -> Float[Array, "E d f"]:
    """As `product` takes them."""
    return padded(weights, _WIDTHS[-1], _WIDTHS[-1])


def _width(size: int) -> int:
    return next(width for width in _WIDTHS if size % width == 0)


def _rows_by_weights(rows: Array, weights: Array, sizes: Array, *, transposed: bool) -> Array:
    # Not parts of JAX's public surface that have to import everywhere; only their users meet them.
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

    kernel: Any = ragged_dot
    outer = weights.shape[1 if transposed else 2]
    return kernel(rows, weights, group_sizes=sizes, block_m=_ROWS, block_n=_width(outer), block_k=_INNER,
                  max_concurrent_steps=_STEPS, grid_block_n=1, transpose_rhs=transposed)


def _rows_by_rows(rows: Array, gradient: Array, sizes: Array) -> Array:
    from jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu import transposed_ragged_dot

    kernel: Any = transposed_ragged_dot
    return kernel(rows, gradient, group_sizes=sizes, block_m=_width(rows.shape[1]), block_n=_width(gradient.shape[1]),
                  block_k=_INNER, max_concurrent_steps=_STEPS, grid_block_n=1)
