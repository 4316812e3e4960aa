"""The grouped matrix product of the experts: one library kernel a platform, chosen by name."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mfa_jax.kernels.calls import default_device

IMPLEMENTATIONS = ("ragged_dot", "megablox", "megablox_interpret")


def resolve(implementation: str, platform: str) -> str:
    """The implementation that serves on a platform (`cpu`, `gpu`, `tpu`).

    - `ragged_dot`: `jax.lax.ragged_dot`, runs anywhere. XLA has a kernel for the forward product on TPU; on CPU, and
      for the gradient of the weights on TPU too, it multiplies every row with every expert and masks: E times the work.
    - `megablox`: the Pallas kernels that come with JAX, on TPU; forward and both gradients work on the groups alone.
    - `megablox_interpret`: the same on any platform in the interpreter, for tests.

    `auto` takes `megablox` on TPU and `ragged_dot` elsewhere. A named implementation is never replaced.

    Raises:
      ValueError: an unknown name.
      NotImplementedError: `megablox` away from a TPU.
    """
    if implementation == "auto":
        return "megablox" if platform == "tpu" else "ragged_dot"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"expert_implementation={implementation!r}: must be one of auto, {', '.join(IMPLEMENTATIONS)}")
    if implementation == "megablox" and platform != "tpu":
        raise NotImplementedError(f"expert_implementation='megablox': runs on tpu, not on {platform}; use auto, "
                                  f"ragged_dot")
    return implementation


def grouped_matmul(
    rows: Float[Array, "M D"], weights: Float[Array, "E D F"], sizes: Int[Array, " E"], implementation: str = "auto"
) -> Float[Array, "M F"]:
    """`y_m = x_m W_e(m)`: the first `sizes[0]` rows meet expert 0, the next `sizes[1]` expert 1, and so on.

    Sums are float32, the result has the type of the rows. Rows past the last group give nothing to rely on.

    Raises:
      ValueError, NotImplementedError: as `resolve`, for the default backend.
    """
    name = resolve(implementation, default_device().platform)
    if name == "ragged_dot":
        return jax.lax.ragged_dot(rows, weights, sizes)
    return _megablox(rows, weights, sizes, interpret=name == "megablox_interpret")


def _megablox(rows: Array, weights: Array, sizes: Array, *, interpret: bool) -> Array:
    # Not a part of JAX's public surface that has to import everywhere; only its users meet it.
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    product: Any = gmm
    count, (_, inner, outer) = len(rows), weights.shape
    tiling = _tiling(count, inner, outer, rows.dtype.itemsize)
    padded = jnp.pad(rows, ((0, -count % tiling[0]), (0, 0)))
    return product(padded, weights, sizes, rows.dtype, tiling, None, None, False, interpret)[:count]


def _tiling(rows: int, inner: int, outer: int, itemsize: int) -> tuple[int, int, int]:
    """Tiles of rows, summed width and result width: whole registers, two buffers of each within 16 MiB of VMEM."""
    widest = 1024 if itemsize == 2 else 512

    def fit(size: int, most: int) -> int:
        return min(-(-size // 128) * 128, most)

    return fit(rows, 512), fit(inner, widest), fit(outer, widest)
