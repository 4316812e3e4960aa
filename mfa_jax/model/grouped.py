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
      So it does on GPU, forward and backward, with E masked copies of the rows in memory: dense products in Triton,
      `__triton_nested_gemm_fusion` (`experiments.aot_experts`, for an H100 by jax 0.12). XLA's flags for a grouped
      kernel, `xla_gpu_experimental_use_ragged_dot_fusion` and `.._grouped_gemm`, change nothing there.
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

    Sums are float32, the result has the type of the rows. Rows past the last group give zeros.

    Raises:
      ValueError, NotImplementedError: as `resolve`, for the devices of the ambient mesh, else the default backend.
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
    # The kernels leave rows past the last group as memory was, in results and in gradients: NaN, if need be.
    served = (jnp.arange(count) < jnp.sum(sizes))[:, None]
    padded = jnp.pad(jnp.where(served, rows, 0), ((0, -count % tiling[0]), (0, 0)))
    out = product(padded, weights, sizes, rows.dtype, tiling, None, None, False, interpret)
    return jnp.where(served, out[:count], 0)


def _tiling(rows: int, inner: int, outer: int, itemsize: int) -> tuple[int, int, int]:
    """Tiles of rows, summed width and result width: whole registers, two buffers of each within 16 MiB of VMEM."""
    widest = 1024 if itemsize == 2 else 512

    def fit(size: int, most: int) -> int:
        return min(-(-size // 128) * 128, most)

    return fit(rows, 512), fit(inner, widest), fit(outer, widest)
