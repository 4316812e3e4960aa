"""The grouped matrix product of the experts: one library kernel a platform, chosen by name."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mfa_jax.kernels.calls import default_device
from mfa_jax.model import grouped_gpu

IMPLEMENTATIONS = ("ragged_dot", "megablox", "megablox_interpret", "mosaic_gpu")


def resolve(implementation: str, platform: str, compute_capability: float = 0.0) -> str:
    """The implementation that serves on a platform (`cpu`, `gpu`, `tpu`), for a GPU of a compute capability.

    - `ragged_dot`: `jax.lax.ragged_dot`, runs anywhere. XLA has a kernel for the forward product on TPU; on CPU, and
      for the gradient of the weights on TPU too, it multiplies every row with every expert and masks: E times the work.
      So it does on GPU, forward and backward, with E masked copies of the rows in memory: dense products in Triton,
      `__triton_nested_gemm_fusion` (`experiments.aot_experts`, for an H100 by jax 0.12). XLA's flags for a grouped
      kernel, `xla_gpu_experimental_use_ragged_dot_fusion` and `.._grouped_gemm`, change nothing there.
    - `megablox`: the Pallas kernels that come with JAX, on TPU; forward and both gradients work on the groups alone.
    - `megablox_interpret`: the same on any platform in the interpreter, for tests.
    - `mosaic_gpu`: likewise the kernels for Hopper GPUs, of float16 or bfloat16 (`grouped_gpu`). They are right in the
      interpreter and compile for an H100; they have not been run on one, so that `auto` does not take them yet.

    `auto` takes `megablox` on TPU and `ragged_dot` elsewhere. A named implementation is never replaced.

    Raises:
      ValueError: an unknown name.
      NotImplementedError: `megablox` away from a TPU, `mosaic_gpu` away from a Hopper GPU or with JAX before 0.11.
    """
    if implementation == "auto":
        return "megablox" if platform == "tpu" else "ragged_dot"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"expert_implementation={implementation!r}: must be one of auto, {', '.join(IMPLEMENTATIONS)}")
    if implementation == "megablox" and platform != "tpu":
        raise NotImplementedError(f"expert_implementation='megablox': runs on tpu, not on {platform}; use auto, "
                                  f"ragged_dot")
    if implementation == "mosaic_gpu" and (platform != "gpu" or int(compute_capability) != 9):
        raise NotImplementedError(f"expert_implementation='mosaic_gpu': runs on gpu of compute capability 9 (Hopper), "
                                  f"not on {platform} of {compute_capability:g}; use auto, ragged_dot")
    if implementation == "mosaic_gpu" and jax.__version_info__ < (0, 11):
        raise NotImplementedError(f"expert_implementation='mosaic_gpu': needs JAX 0.11, this is {jax.__version__}; use "
                                  f"auto, ragged_dot")
    return implementation


def grouped_matmul(
    rows: Float[Array, "M D"], weights: Float[Array, "E D F"], sizes: Int[Array, " E"], implementation: str = "auto"
) -> Float[Array, "M F"]:
    """`y_m = x_m W_e(m)`: the first `sizes[0]` rows meet expert 0, the next `sizes[1]` expert 1, and so on.

    Sums are float32, the result has the type of the rows. Rows past the last group give zeros.

    Raises:
      ValueError, NotImplementedError: as `resolve`, for the devices of the ambient mesh, else the default backend;
        another type than a kernel takes.
    """
    device = default_device()
    name = resolve(implementation, device.platform, device.compute_capability)
    if name == "ragged_dot":
        return jax.lax.ragged_dot(rows, weights, sizes)
    # The kernels leave rows past the last group as memory was, in results and in gradients: NaN, if need be.
    served = (jnp.arange(len(rows)) < jnp.sum(sizes))[:, None]
    given = jnp.where(served, rows, 0)
    if name == "mosaic_gpu":
        out = _mosaic_gpu(given, weights, sizes)
    else:
        out = _megablox(given, weights, sizes, interpret=name == "megablox_interpret")
    return jnp.where(served, out[: len(rows), : weights.shape[2]], 0)


def _mosaic_gpu(rows: Array, weights: Array, sizes: Array) -> Array:
    """With padding."""
    if rows.dtype not in (jnp.bfloat16, jnp.float16) or weights.dtype != rows.dtype:
        raise NotImplementedError(f"expert_implementation='mosaic_gpu': takes rows and weights of bfloat16 or of "
                                  f"float16, not {rows.dtype} and {weights.dtype}; use dtype='bfloat16', or ragged_dot")
    return grouped_gpu.product(grouped_gpu.pad_rows(rows), grouped_gpu.pad_weights(weights), sizes.astype(jnp.int32))


def _megablox(rows: Array, weights: Array, sizes: Array, *, interpret: bool) -> Array:
    """With padding."""
    # Not a part of JAX's public surface that has to import everywhere; only its users meet it.
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    product: Any = gmm
    tiling = _tiling(len(rows), weights.shape[1], weights.shape[2], rows.dtype.itemsize)
    padded = jnp.pad(rows, ((0, -len(rows) % tiling[0]), (0, 0)))
    out: Array = product(padded, weights, sizes, rows.dtype, tiling, None, None, False, interpret)
    return out


def _tiling(rows: int, inner: int, outer: int, itemsize: int) -> tuple[int, int, int]:
    """Tiles of rows, summed width and result width: whole registers, two buffers of each within 16 MiB of VMEM."""
    widest = 1024 if itemsize == 2 else 512

    def fit(size: int, most: int) -> int:
        return min(-(-size // 128) * 128, most)

    return fit(rows, 512), fit(inner, widest), fit(outer, widest)
