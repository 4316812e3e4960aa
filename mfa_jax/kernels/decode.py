"""The one entry of decode attention: checks a call, chooses a backend, gives it one stream of keys at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from mfa_jax.kernels import mosaic_gpu, mosaic_tpu, reference, tpu_plan, xla
from mfa_jax.kernels.calls import SCALED, Call, Device, default_device


class Backend(NamedTuple):
    """One implementation: the function, and why it can't serve a call on a device (None if it can).

    The function takes the arguments of `decode_attention`, and gives averages and log-sum-exp, in float32 unless it
    takes another type.
    A length may lie outside 0 .. S: below 0 a row sees nothing; above S its queries stand past the last key.
    """

    run: Callable[..., Any]
    obstacle: Callable[[Call, Device], str | None] = lambda call, device: None
    takes_heads: bool = False
    """Whether keys may have an axis of key heads; else it is mapped over."""
    takes_dtype: bool = False
    """Whether it takes `dtype`, the type of the averages; else they are float32, and rounded in a pass of their own."""


def _gpu_interpreted(*args: Any, **options: Any) -> Any:
    names: Any = plgpu  # those of JAX 0.11
    return mosaic_gpu.decode_attention(*args, **options, interpret=names.InterpretGPUParams())


IMPLEMENTATIONS: dict[str, Backend] = {
    "reference": Backend(reference.decode_attention), "xla": Backend(xla.decode_attention),
    "mosaic_tpu": Backend(mosaic_tpu.decode_attention, tpu_plan.obstacle, takes_heads=True),
    "mosaic_tpu_interpret": Backend(
        functools.partial(mosaic_tpu.decode_attention, interpret=pltpu.InterpretParams()),
        functools.partial(tpu_plan.obstacle, interpret=True), takes_heads=True),
    "mosaic_gpu": Backend(mosaic_gpu.decode_attention, mosaic_gpu.obstacle, takes_heads=True, takes_dtype=True),
    "mosaic_gpu_interpret": Backend(
        _gpu_interpreted, functools.partial(mosaic_gpu.obstacle, interpret=True), takes_heads=True, takes_dtype=True),
}
_KERNELS = {"tpu": "mosaic_tpu", "gpu": "mosaic_gpu"}
"""What `auto` takes on a platform, where it can serve; `xla` otherwise."""
MAX_QUERIES = 8
"""Largest T: tokens drafted at once."""


def decode_attention(
    q: Float[Array, "B T N H"], k: Array, v: Array | None, lengths: Int[Array, " B"], *, scale: float,
    rope: Array | None = None, alibi_slopes: Array | None = None, k_scale: Array | None = None,
    v_scale: Array | None = None, value_width: int | None = None, return_lse: bool = False,
    implementation: str = "auto",
) -> Any:
    """`o_n = sum_j softmax_j(scale q_n . R(j) k_j - slope_n (i - j)) v_j` over the keys j that query i sees.

    The keys include those of the T new tokens: query t of row b stands at `i = lengths[b] - T + t` and sees `j <= i`.
    What lies past a length may be anything, nan included, and does not show. A query before the row's start (a row of
    length 0, or T past the length) gives zeros and a log-sum-exp of -inf.

    Args:
      q: queries, already rotated to their positions where rope is used.
      k: `[B, S, H]` cached keys, or `[B, K, S, H]`: head n reads key head `n // (N / K)`. int8 and float8_e4m3fn with
        `k_scale`.
      v: cached values, as `k` and of its type, but of width h; None where the keys serve as values: as they are stored,
        their first `value_width` elements.
      lengths: valid keys of each row, 0 .. S, of a signed integer type.
      scale: what scores are multiplied by, usually `H ** -0.5`.
      rope: `[H / 2]` frequencies of keys that are stored before rope, in radians a token; None where no turn is due.
      alibi_slopes: `[N]`, a slope a head.
      k_scale, v_scale: `[B, S]` or `[B, K, S]`, what a token's stored elements are multiplied by, for 8-bit types.
      value_width: only with `v=None`; None for H.
      return_lse: also the natural log-sum-exp of each query's scores, `[B, T, N]` float32.
      implementation: a name of `IMPLEMENTATIONS`, or `auto`; see `resolve`.

    Returns:
      `[B, T, N, h]` in the type of `q`; with `return_lse` a pair.

    Raises:
      ValueError: shapes or types that do not fit together, lengths beyond S (where known), an 8-bit type without its
        scale or another with one, an unknown implementation.
      NotImplementedError: T past `MAX_QUERIES`.
    """
    out, lse = averages(q, k, v, lengths, scale=scale, rope=rope, alibi_slopes=alibi_slopes, k_scale=k_scale,
                        v_scale=v_scale, value_width=value_width, implementation=implementation, dtype=q.dtype)
    out = out.astype(q.dtype)
    return (out, lse) if return_lse else out


def averages(
    q: Array, k: Array, v: Array | None, lengths: Array, *, scale: float, rope: Array | None,
    alibi_slopes: Array | None, k_scale: Array | None, v_scale: Array | None, value_width: int | None,
    implementation: str, dtype: Any = jnp.float32,
) -> tuple[Float[Array, "B T N h"], Float[Array, "B T N"]]:
    """`decode_attention` before its result is rounded: averages in float32, or in `dtype` already where the backend
    rounds itself, and log-sum-exps."""
    if jnp.issubdtype(lengths.dtype, jnp.signedinteger):
        lengths = lengths.astype(jnp.int32)  # a narrow type does not hold S, with which they are compared
    _check(q, k, v, lengths, rope, alibi_slopes, k_scale, v_scale, value_width)
    B, T, N, H = q.shape
    K = k.shape[1] if k.ndim == 4 else 1
    h = v.shape[-1] if v is not None else value_width or H
    call = Call(T=T, N=N // K, S=k.shape[-2], H=H, h=h, dtype=q.dtype, cache_dtype=k.dtype, shared=v is None,
                rope=rope is not None, alibi=alibi_slopes is not None)
    backend = IMPLEMENTATIONS[resolve(implementation, call, default_device())]
    run = backend.run
    options = {"scale": scale, "inv_freq": rope, "value_width": value_width}
    if backend.takes_dtype:
        options["dtype"] = dtype
    if k.ndim == 3 or backend.takes_heads:
        return run(q, k, v, lengths, alibi_slopes=alibi_slopes, k_scale=k_scale, v_scale=v_scale, **options)

    def one_key_head(q: Array, k: Array, v: Any, slopes: Any, k_scale: Any, v_scale: Any) -> tuple[Array, Array]:
        return run(q, k, v, lengths, alibi_slopes=slopes, k_scale=k_scale, v_scale=v_scale, **options)

    slopes = None if alibi_slopes is None else alibi_slopes.reshape(K, N // K)
    # Not by folding key heads into the rows: the reshape would be fused with the write of the new tokens into a second
    # write, for which XLA copies the cache.
    out, lse = jax.vmap(one_key_head, in_axes=(2, 1, 1, 0, 1, 1), out_axes=2)(
        q.reshape(B, T, K, N // K, H), k, v, slopes, k_scale, v_scale)
    return out.reshape(B, T, N, h), lse.reshape(B, T, N)


def resolve(implementation: str, call: Call, device: Device) -> str:
    """The implementation that serves such a call on such a device. A named one is never replaced.

    `auto` is the kernel written for the platform where it can serve, otherwise `xla`; `reference` holds all scores and
    is there to compare with.

    Raises:
      ValueError: an unknown name.
      NotImplementedError: a named implementation can't serve the call; says why, and what can.
    """
    if implementation == "auto":
        kernel = _KERNELS.get(device.platform)
        return kernel if kernel is not None and IMPLEMENTATIONS[kernel].obstacle(call, device) is None else "xla"
    _require(implementation in IMPLEMENTATIONS, "implementation", implementation,
             f"must be one of auto, {', '.join(IMPLEMENTATIONS)}")
    reason = IMPLEMENTATIONS[implementation].obstacle(call, device)
    if reason is not None:
        able = [name for name, backend in IMPLEMENTATIONS.items() if backend.obstacle(call, device) is None]
        raise NotImplementedError(f"implementation={implementation!r}: {reason}; use one of auto, {', '.join(able)}")
    return implementation


def _check(
    q: Array, k: Array, v: Any, lengths: Array, rope: Any, slopes: Any, k_scale: Any, v_scale: Any,
    value_width: int | None,
) -> None:
    _require(q.ndim == 4, "q.shape", q.shape, "must be [B, T, N, H]")
    B, T, N, H = q.shape
    if not 1 <= T <= MAX_QUERIES:
        raise NotImplementedError(f"T={T}: decodes 1 to {MAX_QUERIES} tokens at once; prefill is attention.core.attend")
    _require(k.ndim in (3, 4) and k.shape[0] == B and k.shape[-1] == H, "k.shape", k.shape,
             f"must be [{B}, S, {H}], or [{B}, K, S, {H}]")
    if k.ndim == 4 and N % k.shape[1]:
        raise ValueError(f"num_heads={N} is not a multiple of num_kv_heads={k.shape[1]}")
    S = k.shape[-2]
    _require(lengths.shape == (B,), "lengths.shape", lengths.shape, f"must be ({B},)")
    _require(jnp.issubdtype(lengths.dtype, jnp.signedinteger), "lengths.dtype", str(lengths.dtype),
             "must be a signed integer type: a query may stand before its row")
    if not isinstance(lengths, jax.core.Tracer):
        _require(bool((lengths >= 0).all()) and bool((lengths <= S).all()), "lengths", lengths.tolist(),
                 f"must be in 0 .. {S}, the keys allocated")
    _require(v is None or v.shape[:-1] == k.shape[:-1], "v.shape", getattr(v, "shape", None),
             f"must be as k {k.shape} but for the width")
    _require(v is None or rope is None, "rope", getattr(rope, "shape", None),
             "only with v=None: keys that are stored before rope are the values too")
    _require(value_width is None or (v is None and 1 <= value_width <= H), "value_width", value_width,
             f"must be in 1 .. {H}, and only with v=None")
    _require(rope is None or (H % 2 == 0 and rope.shape == (H // 2,)), "rope.shape", getattr(rope, "shape", None),
             f"must be ({H / 2:g},), half the width of the keys")
    _require(slopes is None or slopes.shape == (N,), "alibi_slopes.shape", getattr(slopes, "shape", None),
             f"must be ({N},)")
    for name, array, scales in (("k_scale", k, k_scale), ("v_scale", v, v_scale)):
        quantized = array is not None and array.dtype in SCALED
        shape = getattr(scales, "shape", None)
        _require(shape == (k.shape[:-1] if quantized else None), f"{name}.shape", shape,
                 f"must be {k.shape[:-1]}: {array.dtype} has a scale a token" if quantized else
                 "must be None: only int8 and float8_e4m3fn have scales")
    _require(v is None or v.dtype == k.dtype, "v.dtype", str(getattr(v, "dtype", None)),
             f"must be {k.dtype}, as k: a cache has one type")


def _require(condition: bool, field: str, value: object, accepted: str) -> None:
    if not condition:
        raise ValueError(f"{field}={value!r}: {accepted}")
