"""Attention kernels that libraries keep, each behind one function; what they can't serve is refused in `core`."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def splash_attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B K T H"], v: Float[Array, "B K T h"], *, scale: float,
    segments: Int[Array, "B T"] | None = None, interpret: bool = False,
) -> Float[Array, "B T N h"]:
    """Causal self-attention by JAX's Pallas TPU kernel; T is a multiple of 128, key and value widths may differ.

    The kernel for one key head is mapped over the key heads, so that K = 1, 1 < K < N and K = N are one path. It
    applies no scale: the queries are scaled before, in their own type. `interpret` runs it without a TPU, for tests.
    """
    kernel = splash_kernel(np.arange(q.shape[1]), q.shape[2] // k.shape[1], interpret=interpret)
    return run_splash(kernel, q, k, v, scale=scale, segments=None if segments is None else (segments, segments))


def splash_kernel(order: np.ndarray, heads: int, shards: int = 1, *, interpret: bool = False) -> Any:
    """The kernel for keys as they follow each other and queries in such an order, of which each shard has a part.

    It is a tree of arrays that say which blocks a query meets; `kernel.manual_sharding_spec` says how a `shard_map`
    splits them. `run_splash` calls it.

    Args:
      order: the token at each place of the queries; a shard's part of it is a multiple of 128.
      heads: query heads of a key head.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    T, mask = len(order), _ordered_causal_mask()(order)
    block_q = _block(T // shards, 512)
    block_kv, block_kv_compute = _block(T, 1024), _block(T, 512)
    return splash.make_splash_mqa(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block_q, block_kv=block_kv, block_kv_compute=block_kv_compute, block_q_dkv=block_q,
            block_kv_dkv=block_kv, block_kv_dkv_compute=block_kv_compute, block_q_dq=block_q, block_kv_dq=block_kv,
        ),
        head_shards=1, q_seq_shards=shards, interpret=interpret,
    )


@functools.cache
def _ordered_causal_mask() -> Any:
    """The class of splash's causal mask for queries in some order.

    Splash asks for every block of the mask, four times: at T = 131072 comparing all positions takes a minute, so blocks
    that are seen or hidden as a whole are not compared. One class for all calls, since splash remembers by equality.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    class OrderedCausalMask(splash.CausalMask):
        def __init__(self, order: np.ndarray) -> None:
            super().__init__((len(order), len(order)))
            self.q_sequence = order.astype(np.int32)

        def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
            queries, keys = self.q_sequence[index[0]], index[1]
            if keys.stop <= queries.min() + 1 or keys.start > queries.max():
                return _block_of(bool(keys.start <= queries.min()), len(queries), keys.stop - keys.start)
            block: np.ndarray = super().__getitem__(index)
            return block

    return OrderedCausalMask


@functools.lru_cache(maxsize=16)
def _block_of(value: bool, *shape: int) -> np.ndarray:
    return np.full(shape, value)


def run_splash(
    kernel: Any, q: Float[Array, "B t N H"], k: Float[Array, "B K T H"], v: Float[Array, "B K T h"], *, scale: float,
    segments: tuple[Int[Array, "B t"], Int[Array, "B T"]] | None,
) -> Float[Array, "B t N h"]:
    """The kernel for one key head, mapped over rows and key heads; segments are those of queries and of keys."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    B, t, N, H = q.shape
    K, h = k.shape[1], v.shape[-1]
    ids = None if segments is None else splash.SegmentIds(*segments)
    over_key_heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    grouped = (q * scale).astype(q.dtype).reshape(B, t, K, N // K, H).transpose(0, 2, 3, 1, 4)
    out = jax.vmap(over_key_heads, in_axes=(0, 0, 0, None if ids is None else 0))(grouped, k, v, ids)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, t, N, h)


def _block(length: int, largest: int) -> int:
    """The largest of `largest`, half of it, ..., 128 that divides the length: the kernel takes whole blocks only."""
    while length % largest:
        largest //= 2
    return largest


def cudnn_attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B K T H"], v: Float[Array, "B K T h"], *, scale: float
) -> Float[Array, "B T N h"]:
    """Causal self-attention by cuDNN's fused kernel, through `jax.nn.dot_product_attention`.

    It wants keys and values of one width: narrower values are padded with zeros and the result is cut back.

    Documents packed in a row can't be kept apart with it, so `core` refuses segments. cuDNN has a layout for them, but
    `jax.nn.dot_product_attention` does not take their offsets (jax-ml/jax#29731, open), and the private function that
    does reads keys of other tokens, silently, where key heads are fewer than query heads, as they are here: in JAX
    0.10.2, mended in 0.12 (jax-ml/jax#39521). What it does take is a mask, which becomes a bias `[B, 1, T, S]` in 16
    bits that every head reads: `2 B T S` bytes, what this kernel is there to avoid.
    """
    h = v.shape[-1]
    wide = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, k.shape[-1] - h)))
    out = jax.nn.dot_product_attention(
        q, k.swapaxes(1, 2), wide.swapaxes(1, 2), scale=scale, is_causal=True, implementation="cudnn"
    )
    return out[..., :h]


def tokamax_attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B K T H"], v: Float[Array, "B K T h"], *, scale: float
) -> Float[Array, "B T N h"]:
    """Causal self-attention by tokamax, which picks a kernel for the device (and where it has none, plain XLA).

    Follows its documented interface; no test runs it, since tokamax is not among the pinned dependencies.

    Raises:
      NotImplementedError: tokamax is not installed.
    """
    try:
        import tokamax
    except ModuleNotFoundError as error:
        if error.name != "tokamax":
            raise
        raise NotImplementedError(
            "implementation='tokamax': the package is not installed; `pip install 'mfa_jax[tokamax]'` brings it on "
            "Python 3.12 or newer; use one of auto, dense, blockwise"
        ) from error
    out: Float[Array, "B T N h"] = tokamax.dot_product_attention(
        q, k.swapaxes(1, 2), v.swapaxes(1, 2), scale=scale, is_causal=True
    )
    return out
