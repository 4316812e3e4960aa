"""Causal attention for training and prefill: one function, `attend`, and what serves it, by name.

| implementation | where | memory for scores | serves |
| --- | --- | --- | --- |
| `dense` | anywhere | `B N T S` | everything |
| `blockwise` | anywhere | one block | everything |
| `splash` | TPU | in the kernel | self-attention, segments; T a multiple of 128 |
| `cudnn` | NVIDIA GPU | in the kernel | self-attention in 16 bits, width at most 128 (256 from Hopper on) |
| `tokamax` | optional package | in the kernel | self-attention |
| `context` | a mesh that splits the sequence | as blockwise, or splash | training: zig-zag order, segments, ALiBi |

`resolve` says what `auto` chooses, and why a named one can't serve. Nothing is replaced without being asked.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Int

from mfa_jax.attention.blockwise import blockwise_attention
from mfa_jax.attention.context import context_attention, local_implementation, splits_sequence
from mfa_jax.attention.library import cudnn_attention, splash_attention, tokamax_attention
from mfa_jax.kernels.calls import default_device

IMPLEMENTATIONS = ("dense", "blockwise", "splash", "cudnn", "tokamax", "context")
DENSE_SCORES = 1024 * 1024
"""`auto` forms all scores at once up to this many (query, key) pairs."""
DENSE_QUERIES_ON_CPU = {"self": 128, "cached": 256}
"""On CPU only up to this many queries: above, blocks that stay in its caches are faster.

Sooner without an offset, as in training: its backward pass would read all scores back from memory.
"""
_BATCH_AXES = ("data", "fsdp", "expert")
_HEAD_AXES = ("tensor",)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"] | Float[Array, "B S H"],
    v: Float[Array, "B K S h"] | Float[Array, "B S h"],
    *,
    scale: float,
    offset: Int[Array, " B"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    alibi_slopes: Float[Array, " N"] | None = None,
    implementation: str = "auto",
) -> Float[Array, "B T N h"]:
    """`o_n = sum_j softmax_j(scale q_n . k_j - slope_n (i - j)) v_j` over the keys j that query i sees.

    Query t of row b stands at `i = offset[b] + t` (offset None: at t) and sees the keys `j <= i`, those of its own
    segment only where segments are given. Head n reads key head `n // (N / K)`; keys and values of rank 3 are one head
    that all query heads share, and are not repeated in memory.

    With a cache, S is its allocated length and `offset` the tokens it held before these; what lies past them may be
    anything, nan included, and does not show in the result (the gradient of `dense` wants it finite). A row past the
    end of its cache sees all of it. Segment 0 is padding: such queries give zeros and pass no gradient on. Slopes are
    constants: no gradient flows into them.

    Scores and softmax are float32; probabilities take the type of `v` for the product with it, which is accumulated in
    float32; the result has the type of `q`.

    Args:
      scale: what scores are multiplied by, usually `H ** -0.5`.
      implementation: a name of `IMPLEMENTATIONS`, or `auto`; see `resolve`.

    Raises:
      ValueError: shapes that do not fit together, an unknown implementation.
      NotImplementedError: segments with an offset; a named implementation that can't serve this call.
    """
    _check(q, k, v, offset, segments, alibi_slopes)
    if k.ndim == 3:
        k, v = k[:, None], v[:, None]
    (_, T, N, H), (K, S), h = q.shape, k.shape[1:3], v.shape[-1]
    device = default_device()
    name = resolve(
        implementation, device.platform, T=T, S=S, N=N, K=K, H=H, h=h, dtype=q.dtype, offset=offset is not None,
        segments=segments is not None, alibi=alibi_slopes is not None, compute_capability=device.compute_capability,
    )
    if alibi_slopes is not None:
        alibi_slopes = lax.stop_gradient(jnp.asarray(alibi_slopes, jnp.float32))
    # Kept for the backward pass as they are read, after rope, in place of what they were before it.
    q, k = checkpoint_name(q, "queries"), checkpoint_name(k, "keys")
    out = _SERVE[name](q, k, v, scale, offset, segments, alibi_slopes)
    return out if segments is None else jnp.where((segments != 0)[:, :, None, None], out, 0)


def resolve(
    implementation: str, platform: str, *, T: int, S: int, N: int, K: int, H: int, h: int, dtype: Any, offset: bool,
    segments: bool, alibi: bool, compute_capability: float = 8.0,
) -> str:
    """The implementation that serves such a call on such a platform (`cpu`, `gpu`, `tpu`).

    `auto` takes the platform's library kernel where it can serve (`splash`, `cudnn`), otherwise `dense` up to
    `DENSE_SCORES` pairs of query and key (on CPU also `DENSE_QUERIES_ON_CPU`) and `blockwise` above. A named
    implementation is never replaced.

    Args:
      compute_capability: of the NVIDIA GPU, such as 8.0 or 9.0; 0 for other GPUs.

    Raises:
      ValueError: an unknown name.
      NotImplementedError: a named implementation can't serve the call; says why, and what can.
    """
    def obstacle(name: str) -> str | None:
        return _obstacle(name, platform, T=T, S=S, H=H, h=h, dtype=dtype, offset=offset, segments=segments,
                         alibi=alibi, compute_capability=compute_capability)

    if implementation == "auto":
        kernel = {"tpu": "splash", "gpu": "cudnn"}.get(platform)
        if kernel is not None and obstacle(kernel) is None:
            return kernel
        few = platform != "cpu" or T <= DENSE_QUERIES_ON_CPU["cached" if offset else "self"]
        return "dense" if few and T * S <= DENSE_SCORES else "blockwise"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: must be one of auto, {', '.join(IMPLEMENTATIONS)}")
    reason = obstacle(implementation)
    if reason is not None:
        # `context` takes tokens in an order that only a training step lays them in.
        able = [name for name in IMPLEMENTATIONS if name != "context" and obstacle(name) is None]
        if importlib.util.find_spec("tokamax") is None and "tokamax" in able:
            able.remove("tokamax")
        raise NotImplementedError(f"implementation={implementation!r}: {reason}; use one of auto, {', '.join(able)}")
    return implementation


def _obstacle(
    name: str, platform: str, *, T: int, S: int, H: int, h: int, dtype: Any, offset: bool, segments: bool, alibi: bool,
    compute_capability: float,
) -> str | None:
    """Why an implementation can't serve a call, None if it can."""
    if name in ("dense", "blockwise"):
        return None
    widest = 256 if compute_capability >= 9 else 128
    reasons = [
        (name == "splash" and platform != "tpu", f"runs on tpu, not on {platform}"),
        (name == "cudnn" and platform != "gpu", f"runs on gpu, not on {platform}"),
        (name == "cudnn" and compute_capability < 8, "needs an NVIDIA GPU of compute capability 8.0 or newer, "
                                                     f"not {compute_capability}"),
        (name == "context" and not splits_sequence(), "needs a mesh whose axis context splits the sequence"),
        (offset, "knows no offset, it can't read a cache"),
        (T != S, f"needs as many keys as queries, not S={S} for T={T}"),
        (alibi and name != "context", "knows no ALiBi bias"),
        (segments and name not in ("splash", "context"), "knows no segments"),
        (name == "splash" and T % 128 != 0, f"needs T to be a multiple of 128, not {T}"),
        (name == "cudnn" and jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16),
         f"needs bfloat16 or float16, not {jnp.dtype(dtype).name}"),
        (name == "cudnn" and (H > widest or H % 8 != 0),
         f"needs a key width H of at most {widest} and a multiple of 8 on this GPU, not {H}"),
        (name == "cudnn" and h > H, f"needs a value width of at most the key width, not h={h} over H={H}"),
    ]
    return next((reason for holds, reason in reasons if holds), None)


def dense_attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B K S H"], v: Float[Array, "B K S h"], *, scale: float,
    offset: Int[Array, " B"] | None = None, segments: Int[Array, "B T"] | None = None,
    alibi_slopes: Float[Array, " N"] | None = None,
) -> Float[Array, "B T N h"]:
    """`attend` with all scores at once. Keys and values are read as they lie, which is what decoding needs."""
    B, T, N, H = q.shape
    K, S, h = *k.shape[1:3], v.shape[-1]
    M = N // K * T
    grouped = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, M, H)
    if M > H:
        scores = jnp.einsum("BKMH,BKSH->BKMS", grouped, k, preferred_element_type=jnp.float32)
    else:
        # Few queries, as in decoding: k q^T reads the keys as they lie, where q k^T would rearrange them first (on CPU
        # half the speed). Turning the scores is the lesser work.
        columns = jnp.einsum("BKSH,BKHM->BKSM", k, grouped.swapaxes(2, 3), preferred_element_type=jnp.float32)
        scores = columns.swapaxes(2, 3)
    scores = scale * scores.reshape(B, K, N // K, T, S)

    key = jnp.arange(S)
    query = (jnp.zeros((1,), jnp.int32) if offset is None else offset)[:, None] + jnp.arange(T)
    distance = query[:, :, None] - key
    seen = distance >= 0
    if segments is not None:
        seen = seen & (segments[:, :, None] == segments[:, None, :])
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.reshape(K, N // K, 1, 1) * distance[:, None, None]
    scores = jnp.where(seen[:, None, None], scores, jnp.finfo(jnp.float32).min)
    p = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(B, K, M, S)

    def average(values: Float[Array, "B K S h"]) -> Float[Array, "B K M h"]:
        return jnp.einsum("BKMS,BKSh->BKMh", p, values, preferred_element_type=jnp.float32)

    out = average(v)
    if offset is not None or T != S:
        # 0 * nan is nan: values past the last token must count for nothing. To clear them always would copy the cache
        # at every decoded token, so it is done only where something not finite did show.
        held = (key <= query[:, -1:])[:, None, :, None]
        out = lax.cond(jnp.isfinite(out).all(), lambda: out, lambda: average(jnp.where(held, v, 0)))
    out = out.reshape(B, K, N // K, T, h).transpose(0, 3, 1, 2, 4).reshape(B, T, N, h).astype(q.dtype)
    return checkpoint_name(out, "attention")


def over_mesh(
    attention: Callable[..., Array], q: Float[Array, "B T N H"], k: Float[Array, "B K S H"],
    v: Float[Array, "B K S h"], offset: Int[Array, " B"] | None, segments: Int[Array, "B T"] | None,
    alibi_slopes: Float[Array, " N"] | None,
) -> Float[Array, "B T N h"]:
    """`attention(q, k, v, offset, segments, slopes)` on each device's own rows and heads, where a mesh is set.

    A kernel can't be partitioned by the compiler, and a loop over blocks would be given a collective per block for
    the gradient of a key that all heads share; so both run on local arrays, with one sum at the end. Rows are split
    over `data`, `fsdp` and `expert`, heads over `tensor`; where those do not divide them (one row on eight devices)
    they are left out, and their devices compute the same. A single key head is on every device of `tensor`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
        return attention(q, k, v, offset, segments, alibi_slopes)
    K, (rows, heads) = k.shape[1], _split(q, k)
    keys = PartitionSpec(rows, None if K == 1 else heads)
    by_heads = PartitionSpec(rows, None, heads)
    specs = (by_heads, keys, keys, PartitionSpec(rows), PartitionSpec(rows), PartitionSpec(heads))
    # Without the check of replication: the interpreter of the TPU kernel and custom gradients do not carry it.
    return jax.shard_map(attention, in_specs=specs, out_specs=by_heads, check_vma=False)(
        q, k, v, offset, segments, alibi_slopes
    )


def _split(q: Array, k: Array) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """Axes of the ambient mesh that split rows and heads; None where they do not divide them."""
    mesh = jax.sharding.get_abstract_mesh()

    def split(axes: tuple[str, ...], size: int) -> tuple[str, ...] | None:
        present = tuple(axis for axis in axes if axis in mesh.axis_names)
        return present if size % math.prod(mesh.shape[axis] for axis in present) == 0 else None

    N, K = q.shape[2], k.shape[1]
    return split(_BATCH_AXES, q.shape[0]), split(_HEAD_AXES, N if K == 1 else math.gcd(N, K))


def _context(q: Array, k: Array, v: Array, scale: float, offset: Any, segments: Any, slopes: Any) -> Array:
    rows, heads = _split(q, k)
    local = local_implementation(default_device().platform, q.shape[1], alibi=slopes is not None)
    return context_attention(q, k, v, scale=scale, segments=segments, alibi_slopes=slopes, rows=rows, heads=heads,
                             local=local)


def _blockwise(q: Array, k: Array, v: Array, scale: float, offset: Any, segments: Any, slopes: Any) -> Array:
    return over_mesh(
        lambda q, k, v, offset, segments, slopes: blockwise_attention(
            q, k, v, scale=scale, offset=offset, segments=segments, alibi_slopes=slopes
        ),
        q, k, v, offset, segments, slopes,
    )


def _splash(q: Array, k: Array, v: Array, scale: float, offset: Any, segments: Any, slopes: Any) -> Array:
    return over_mesh(lambda q, k, v, _, segments, __: splash_attention(q, k, v, scale=scale, segments=segments),
                     q, k, v, offset, segments, slopes)


_SERVE: dict[str, Callable[..., Array]] = {
    "dense": lambda q, k, v, scale, offset, segments, slopes: dense_attention(
        q, k, v, scale=scale, offset=offset, segments=segments, alibi_slopes=slopes),
    "blockwise": _blockwise,
    "splash": _splash,
    "cudnn": lambda q, k, v, scale, *_: cudnn_attention(q, k, v, scale=scale),
    "tokamax": lambda q, k, v, scale, *_: tokamax_attention(q, k, v, scale=scale),
    "context": _context,
}


def _check(q: Array, k: Array, v: Array, offset: Any, segments: Any, slopes: Any) -> None:
    def require(condition: bool, field: str, value: object, accepted: str) -> None:
        if not condition:
            raise ValueError(f"{field}={value!r}: {accepted}")

    require(q.ndim == 4, "q.shape", q.shape, "must be [B, T, N, H]")
    require(k.ndim in (3, 4), "k.shape", k.shape, "must be [B, K, S, H], or [B, S, H] for one shared head")
    B, T, N, H = q.shape
    require(k.shape[0] == B and k.shape[-1] == H, "k.shape", k.shape, f"must have the batch and width of q {q.shape}")
    require(v.shape[:-1] == k.shape[:-1], "v.shape", v.shape, f"must be as k {k.shape} but for the width")
    K, S = (1 if k.ndim == 3 else k.shape[1]), k.shape[-2]
    if N % K:
        raise ValueError(f"num_heads={N} is not a multiple of num_kv_heads={K}")
    require(T <= S, "T", T, f"must be at most the number of keys S={S}")
    require(offset is None or offset.shape == (B,), "offset.shape", getattr(offset, "shape", None), f"must be ({B},)")
    require(slopes is None or slopes.shape == (N,), "alibi_slopes.shape", getattr(slopes, "shape", None),
            f"must be ({N},)")
    if segments is not None:
        require(segments.shape == (B, T), "segments.shape", segments.shape, f"must be {(B, T)}")
        if offset is not None:
            raise NotImplementedError("segments with an offset: packed documents are not decoded from one cache row")
        require(T == S, "S", S, f"must be T={T} with segments")
