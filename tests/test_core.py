"""Attention for training and prefill against a loop in float64, and what each implementation promises besides."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mfa_jax.attention.blockwise import blockwise_attention
from mfa_jax.attention.core import IMPLEMENTATIONS, attend, dense_attention, over_mesh, resolve
from mfa_jax.attention.library import splash_attention
from mfa_jax.axes import make_mesh

# Blocks so small, and so odd, that every case crosses their borders and ends inside one.
SERVERS: dict[str, Callable[..., jax.Array]] = {
    "dense": dense_attention, "blockwise": partial(blockwise_attention, query_block=8, key_block=12),
}
KINDS = ("plain", "alibi", "segments", "segments alibi", "offset", "offset alibi")
servers = pytest.mark.parametrize("server", SERVERS)
# Shared, grouped and full key heads; the inner loop runs those that cover most.
kinds_and_key_heads = pytest.mark.parametrize(("kind", "K"), (
    ("segments alibi", 1), ("offset", 2), ("offset alibi", 4),
    *(pytest.param(*case, marks=pytest.mark.slow)
      for case in (("plain", 4), ("alibi", 2), ("segments", 2), ("offset", 1))),
))


def oracle(
    q: Any, k: Any, v: Any, *, scale: float, offset: Any = None, segments: Any = None, alibi_slopes: Any = None
) -> np.ndarray:
    """One query at a time, over the list of the keys it sees."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, T, N, _ = q.shape
    K = k.shape[1]
    out = np.zeros((B, T, N, v.shape[-1]))
    for b, t, n in np.ndindex(B, T, N):
        i = t + (0 if offset is None else int(offset[b]))
        seen = [j for j in range(i + 1) if segments is None or segments[b, j] == segments[b, t]]
        head = n * K // N
        scores = k[b, head, seen] @ q[b, t, n] * scale
        if alibi_slopes is not None:
            scores = scores - float(alibi_slopes[n]) * (i - np.array(seen))
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ v[b, head, seen]
    return out


def make(
    kind: str, *, B: int = 3, T: int = 21, S: int = 40, N: int = 4, K: int = 2, H: int = 8, h: int = 5, seed: int = 0,
) -> tuple[tuple[jax.Array, ...], dict[str, Any]]:
    """Random arrays and the options of `kind`; S is the length of the cache where there is an offset."""
    rng = np.random.default_rng(seed)
    S = S if "offset" in kind else T
    shapes = ((B, T, N, H), (B, K, S, H), (B, K, S, h))
    arrays = tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    options: dict[str, Any] = {"scale": 0.4}
    if "offset" in kind:
        options["offset"] = jnp.asarray(rng.integers(0, S - T + 1, B), jnp.int32)
    if "segments" in kind:
        # Sorted documents with padding behind; the last row holds padding in front of and between documents too.
        ids = np.sort(rng.integers(1, 4, (B, T)), axis=1)
        ids[:, T - T // 5 :] = 0
        ids[-1, : T // 4], ids[-1, T // 2] = 0, 0
        options["segments"] = jnp.asarray(ids, jnp.int32)
    if "alibi" in kind:
        options["alibi_slopes"] = jnp.asarray(2.0 ** -np.arange(1, N + 1), jnp.float32)
    return arrays, options


def error(actual: Any, expected: Any) -> float:
    """Largest difference over the largest expected magnitude."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def value_and_gradients(attention: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, ...]]:
    """Gives the result, and the gradients by `q`, `k`, `v` of its sum weighted by `weights_of` its shape."""
    @jax.jit
    def both(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
        out, pull_back = jax.vjp(attention, q, k, v)
        return out, *pull_back(weights_of(out.shape))

    return both


def weights_of(shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(jax.random.key(1), shape)


# ---- values ----------------------------------------------------------------------------------------------------


@servers
@kinds_and_key_heads
def test_equals_the_loop(server: str, kind: str, K: int) -> None:
    arrays, options = make(kind, K=K)
    scale = options.pop("scale")
    out = jax.jit(partial(SERVERS[server], scale=scale))(*arrays, **options)
    assert error(out, oracle(*arrays, scale=scale, **options)) < 2e-6


@pytest.mark.slow
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=6, deadline=None, derandomize=True)
def test_any_shape_equals_the_loop(data: st.DataObject) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    kind, K, T = data.draw(st.sampled_from(KINDS)), draw(1, 3), draw(1, 30)
    shapes = {"B": draw(1, 2), "T": T, "S": T + draw(0, 20), "K": K, "N": K * draw(1, 3)}
    arrays, options = make(kind, **shapes, H=draw(1, 9), h=draw(1, 9))
    expected = oracle(*arrays, **options)
    for server in SERVERS.values():
        assert error(jax.jit(partial(server, **options))(*arrays), expected) < 2e-6


@pytest.mark.parametrize("name", ("dense", "blockwise", "auto"))
@pytest.mark.parametrize("kind", ("plain", "offset alibi"))
def test_one_shared_key_head_needs_no_axis(name: str, kind: str) -> None:
    (q, k, v), options = make(kind, K=1)
    out = attend(q, k[:, 0], v[:, 0], implementation=name, **options)
    assert out.dtype == q.dtype
    assert error(out, oracle(q, k, v, **options)) < 2e-6


@servers
@pytest.mark.parametrize("kind", ("plain", "offset"))
def test_bfloat16_is_within_its_rounding(server: str, kind: str) -> None:
    """Probabilities and the result are rounded to 8 bits, each a relative 2 ** -9 of values up to max |v|."""
    arrays, options = make(kind)
    arrays = tuple(x.astype(jnp.bfloat16) for x in arrays)
    out = SERVERS[server](*arrays, **options)
    assert out.dtype == jnp.bfloat16
    difference = np.abs(np.asarray(out, np.float64) - oracle(*arrays, **options)).max()
    assert difference < 2 * 2**-9 * float(jnp.abs(arrays[2]).max())


@servers
@pytest.mark.parametrize("T", (1, 21))
def test_what_lies_past_the_cached_tokens_does_not_show(server: str, T: int) -> None:
    (q, k, v), options = make("offset", T=T)
    past = (jnp.arange(k.shape[2]) >= options["offset"][:, None] + T)[:, None, :, None]
    attention = jax.jit(partial(SERVERS[server], scale=options.pop("scale")))
    zeros, *others = (
        attention(q, jnp.where(past, filler, k), jnp.where(past, filler, v), **options)
        for filler in (0.0, jnp.nan, jnp.inf, 1e30)
    )
    assert bool(past.any()) and bool(jnp.isfinite(zeros).all())
    for other in others:
        chex.assert_trees_all_equal(other, zeros)


@pytest.mark.parametrize("server", [*SERVERS, "splash"])
def test_a_later_key_changes_no_earlier_bit(server: str) -> None:
    served = {**SERVERS, "splash": partial(splash_attention, interpret=True)}[server]
    T, t = (128, 77) if server == "splash" else (21, 13)
    (q, k, v), options = make("plain", T=T, B=1)
    attention = jax.jit(partial(served, **options))
    before, after = attention(q, k, v), attention(q, k.at[:, :, t].set(3.0), v.at[:, :, t].set(-7.0))
    chex.assert_trees_all_equal(before[:, :t], after[:, :t])
    assert bool((before[:, t:] != after[:, t:]).any(axis=(0, 2, 3)).all())


# ---- gradients -------------------------------------------------------------------------------------------------


@kinds_and_key_heads
def test_blockwise_gradients_equal_dense_ones(kind: str, K: int) -> None:
    arrays, options = make(kind, K=K)
    blockwise, dense = (value_and_gradients(partial(server, **options))(*arrays)
                        for server in (SERVERS["blockwise"], dense_attention))
    for actual, wanted in zip(blockwise, dense, strict=True):
        assert error(actual, wanted) < 5e-6


@pytest.mark.parametrize("kind", ("segments alibi", "offset"))
def test_dense_gradients_equal_differences_of_the_loop(kind: str) -> None:
    arrays, options = make(kind, B=2, T=9, S=15)
    rng = np.random.default_rng(2)
    weights = np.asarray(weights_of((2, 9, 4, 5)), np.float64)
    _, *slopes = value_and_gradients(partial(dense_attention, **options))(*arrays)
    step = 1e-5
    for index, slope in enumerate(slopes):
        direction = rng.standard_normal(arrays[index].shape)
        moved = [[np.asarray(x, np.float64) + (sign * step * direction if i == index else 0)
                  for i, x in enumerate(arrays)] for sign in (1, -1)]
        ahead, behind = (np.sum(oracle(*x, **options) * weights) for x in moved)
        assert float(np.sum(np.asarray(slope) * direction)) == pytest.approx((ahead - behind) / (2 * step), rel=1e-4)


def test_blockwise_gradients_do_not_see_garbage_in_the_cache() -> None:
    (q, k, v), options = make("offset")
    past = (jnp.arange(k.shape[2]) >= options["offset"][:, None] + q.shape[1])[:, None, :, None]
    attention = value_and_gradients(partial(SERVERS["blockwise"], **options))
    clean, dirty = (attention(q, jnp.where(past, x, k), jnp.where(past, x, v)) for x in (0.0, jnp.nan))
    chex.assert_trees_all_equal(clean, dirty)


@pytest.mark.parametrize("name", ("dense", "blockwise"))
def test_slopes_are_constants(name: str) -> None:
    arrays, options = make("alibi")
    slopes = options.pop("alibi_slopes")
    gradient = jax.grad(lambda m: attend(*arrays, alibi_slopes=m, implementation=name, **options).sum())(slopes)
    chex.assert_trees_all_equal(gradient, jnp.zeros_like(slopes))


# ---- segments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("dense", "blockwise"))
def test_a_document_in_a_packed_row_equals_the_document_alone(name: str) -> None:
    (q, k, v), options = make("plain", B=1, T=20)
    ids = jnp.asarray([[0] * 2 + [3] * 7 + [1] * 8 + [0] * 3], jnp.int32)
    packed = attend(q, k, v, segments=ids, implementation=name, **options)
    for span in (slice(2, 9), slice(9, 17)):
        alone = attend(q[:, span], k[:, :, span], v[:, :, span], implementation=name, **options)
        assert error(packed[:, span], alone) < 2e-6


def test_queries_that_only_fill_up_a_block_pass_nothing_on() -> None:
    """Without padding tokens no key shares the segment of the queries behind the last one: they see nothing at all."""
    arrays, options = make("plain", B=2, K=1)
    options["segments"] = jnp.repeat(jnp.asarray([[1, 5, 2]], jnp.int32), 7, axis=1).repeat(2, axis=0)
    blockwise, dense = (value_and_gradients(partial(server, **options))(*arrays)
                        for server in (SERVERS["blockwise"], dense_attention))
    for actual, wanted in zip(blockwise, dense, strict=True):
        assert error(actual, wanted) < 5e-6


@pytest.mark.parametrize("name", ("dense", "blockwise"))
def test_padding_gives_zeros_and_no_gradient(name: str) -> None:
    arrays, options = make("segments")
    padding = np.asarray(options["segments"]) == 0
    attention = partial(attend, implementation=name, **options)
    out, dq, dk, dv = (np.asarray(x) for x in value_and_gradients(attention)(*arrays))
    assert padding.any()
    for array in (out, dq, dk.swapaxes(1, 2), dv.swapaxes(1, 2)):
        assert np.isfinite(array).all()
        assert not array[padding].any() and array[~padding].any()


# ---- splash, interpreted ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("N", "K", "segments"), ((2, 1, True), (4, 2, False)))
def test_splash_equals_dense_with_gradients(N: int, K: int, segments: bool) -> None:
    arrays, options = make("segments" if segments else "plain", B=2, T=384, N=N, K=K, H=16, h=8)
    splash, dense = partial(splash_attention, interpret=True, **options), partial(dense_attention, **options)
    splashed, expected = value_and_gradients(splash)(*arrays), value_and_gradients(dense)(*arrays)
    for actual, wanted in zip(splashed, expected, strict=True):
        assert error(actual, wanted) < 1e-5


# ---- several devices -------------------------------------------------------------------------------------------


def _splash(q: Any, k: Any, v: Any, segments: Any, scale: float) -> jax.Array:
    return over_mesh(lambda q, k, v, _, ids, __: splash_attention(q, k, v, scale=scale, segments=ids, interpret=True),
                     q, k, v, None, segments, None)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind", "K", "set_mesh"), (
    ("blockwise", "segments alibi", 1, True), ("blockwise", "segments alibi", 1, False),
    ("blockwise", "offset", 4, True), ("dense", "segments", 1, True), ("splash", "segments", 1, True),
))
def test_sharded_rows_and_heads_equal_one_device(name: str, kind: str, K: int, set_mesh: bool) -> None:
    """With the mesh set, and (but for Pallas kernels, which that needs) with nothing but sharded inputs."""
    T = 128 if name == "splash" else 300
    (q, k, v), options = make(kind, B=4, T=T, S=310, N=8, K=K)
    if name == "splash":
        attention = partial(_splash, scale=options["scale"], segments=options["segments"])
    else:
        attention = partial(attend, implementation=name, **options)
    expected = value_and_gradients(attention)(q, k, v)
    mesh = make_mesh((2, 1, 1, 1, 4))
    heads = None if K == 1 else "tensor"
    specs = (PartitionSpec("data", None, "tensor"), PartitionSpec("data", heads), PartitionSpec("data", heads))
    placed = tuple(jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip((q, k, v), specs, strict=True))
    with jax.set_mesh(mesh if set_mesh else None):
        split = value_and_gradients(attention)(*placed)
    assert split[0].sharding.shard_shape(split[0].shape)[0] == 2
    for actual, wanted in zip(split, expected, strict=True):
        assert error(actual, wanted) < 1e-5


def test_on_a_mesh_the_gradient_of_a_shared_key_is_summed_once_not_per_block() -> None:
    (q, k, v), options = make("plain", B=4, T=600, N=8, K=1)
    attention = partial(attend, implementation="blockwise", **options)
    with jax.set_mesh(make_mesh((2, 1, 1, 1, 4))):
        text = jax.jit(jax.grad(lambda *x: attention(*x).sum(), (0, 1, 2))).lower(q, k, v).compile().as_text()
    reductions = [line for line in text.splitlines() if re.search(r" all-reduce(-start)?\(", line)]
    assert reductions and not [line for line in reductions if "/while/" in line]


@pytest.mark.slow
def test_what_does_not_divide_over_the_mesh_is_computed_on_every_device() -> None:
    arrays, options = make("plain", B=3, N=6, K=3)
    with jax.set_mesh(make_mesh((2, 1, 1, 1, 4))):
        out = jax.jit(partial(attend, implementation="blockwise", **options))(*arrays)
    assert error(out, oracle(*arrays, **options)) < 2e-6


# ---- memory ----------------------------------------------------------------------------------------------------

LONG = """
import jax, jax.numpy as jnp
from flax import linen as nn
from mfa_jax import attention
from mfa_jax.config import MFAConfig, PositionConfig

def peak():
    # Not getrusage: its maximum is inherited from the process that started this one.
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

layer = attention.build(MFAConfig(num_heads=8, latent_dim=128, query_rank=128), PositionConfig())
x, positions = jnp.ones((1, 16384, 1024)), jnp.arange(16384)[None]
params = nn.unbox(layer.init(jax.random.key(0), x[:, :2], positions[:, :2]))
step = jax.jit(jax.value_and_grad(lambda params, x: layer.apply(params, x, positions)[0].sum(), (0, 1)))
before = peak()
loss, grads = step(params, x)
assert jnp.isfinite(loss) and all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))
print(peak() - before)
"""


def test_a_long_row_compiles_to_little_memory() -> None:
    """All scores of such a row in float32 would be 8.6 GB."""
    q, k = jax.ShapeDtypeStruct((1, 16384, 8, 128), jnp.float32), jax.ShapeDtypeStruct((1, 16384, 128), jnp.float32)
    step = jax.jit(jax.value_and_grad(lambda *x: attend(*x, scale=0.09).sum(), (0, 1, 2)))
    memory = step.lower(q, k, k).compile().memory_analysis()
    assert 0 < memory.temp_size_in_bytes < 0.5e9
    assert memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes < 1e9


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_a_layer_runs_a_long_row_in_little_memory() -> None:
    """What forward and backward of one layer add to the process's peak, compilation included, in kilobytes."""
    root = Path(__file__).resolve().parent.parent
    plain = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, "-c", LONG], cwd=root, env=plain, capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < 2e6


@pytest.mark.parametrize(("K", "G", "width"), ((1, 16, 128), (2, 4, 64), (8, 1, 64)))
def test_a_decoded_token_reads_the_cache_as_it_lies(K: int, G: int, width: int) -> None:
    B, S = 2, 640
    q = jax.ShapeDtypeStruct((B, 1, K * G, width), jnp.float32)
    cached = jax.ShapeDtypeStruct((B, K, S, width), jnp.float32)
    offset = jax.ShapeDtypeStruct((B,), jnp.int32)

    def decode(q: jax.Array, k: jax.Array, v: jax.Array, offset: jax.Array) -> jax.Array:
        return attend(q, k, v, scale=0.1, offset=offset)

    text = jax.jit(decode).lower(q, cached, cached, offset).compile().as_text()
    entry = text[text.index("\nENTRY "):]
    made = re.findall(r"= \w+\[([\d,]+)\]\S* (?!parameter|bitcast|get-tuple-element)[\w-]+\(", entry)
    sizes = [int(np.prod([int(n) for n in shape.split(",")])) for shape in made]
    assert sizes and max(sizes) < B * K * S * width


# ---- what is chosen, what is refused ---------------------------------------------------------------------------

CALL: dict[str, Any] = {
    "T": 2048, "S": 2048, "N": 16, "K": 1, "H": 128, "h": 128, "dtype": jnp.bfloat16, "offset": False,
    "segments": False, "alibi": False,
}


@pytest.mark.parametrize(("platform", "change", "chosen"), (
    ("cpu", {}, "blockwise"), ("cpu", {"T": 128, "S": 128}, "dense"), ("cpu", {"T": 129, "S": 129}, "blockwise"),
    ("cpu", {"T": 256, "S": 4096, "offset": True}, "dense"), ("tpu", {"T": 1000, "S": 1048}, "dense"),
    ("cpu", {"T": 257, "S": 4000, "offset": True}, "blockwise"),
    ("cpu", {"T": 256, "S": 4097, "offset": True}, "blockwise"),
    ("cpu", {"T": 1, "S": 131072, "offset": True}, "dense"),
    ("tpu", {}, "splash"), ("tpu", {"segments": True}, "splash"), ("tpu", {"T": 128, "S": 128}, "splash"),
    ("tpu", {"T": 100, "S": 100}, "dense"), ("tpu", {"T": 2000, "S": 2000}, "blockwise"),
    ("tpu", {"alibi": True}, "blockwise"), ("tpu", {"T": 1, "offset": True}, "dense"),
    ("gpu", {}, "cudnn"), ("gpu", {"h": 64}, "cudnn"), ("gpu", {"h": 256}, "blockwise"),
    ("gpu", {"H": 256}, "blockwise"), ("gpu", {"H": 256, "compute_capability": 9.0}, "cudnn"),
    ("gpu", {"H": 576, "compute_capability": 9.0}, "blockwise"), ("gpu", {"dtype": jnp.float32}, "blockwise"),
    ("gpu", {"segments": True}, "blockwise"), ("gpu", {"compute_capability": 7.5}, "blockwise"),
    ("gpu", {"T": 1, "offset": True}, "dense"),
))
def test_auto_takes_the_kernel_of_the_platform_where_it_serves(platform: str, change: dict, chosen: str) -> None:
    call = {**CALL, **change}
    assert resolve("auto", platform, **call) == chosen
    assert resolve(chosen, platform, **call) == chosen


@pytest.mark.parametrize(("name", "platform", "change", "reason"), (
    ("splash", "cpu", {}, "runs on tpu, not on cpu"),
    ("cudnn", "tpu", {}, "runs on gpu, not on tpu"),
    ("splash", "tpu", {"T": 200, "S": 200}, "multiple of 128, not 200"),
    ("splash", "tpu", {"alibi": True}, "ALiBi"),
    ("splash", "tpu", {"offset": True}, "offset"),
    ("splash", "tpu", {"T": 128}, "S=2048 for T=128"),
    ("cudnn", "gpu", {"segments": True}, "segments"),
    ("cudnn", "gpu", {"H": 256}, "at most 128 .* not 256"),
    ("cudnn", "gpu", {"H": 100}, "multiple of 8 .* not 100"),
    ("cudnn", "gpu", {"h": 136}, "h=136 over H=128"),
    ("cudnn", "gpu", {"dtype": jnp.float32}, "not float32"),
    ("cudnn", "gpu", {"compute_capability": 7.5}, "8.0 or newer, not 7.5"),
    ("tokamax", "cpu", {"segments": True}, "segments"),
))
def test_a_named_implementation_that_cannot_serve_says_why(name: str, platform: str, change: dict, reason: str) -> None:
    message = f"implementation='{name}': .*{reason}.*; use one of auto, dense, blockwise"
    with pytest.raises(NotImplementedError, match=message):
        resolve(name, platform, **{**CALL, **change})


def test_attend_refuses_what_it_cannot_do() -> None:
    (q, k, v), options = make("plain")
    ids, offset = jnp.ones((3, 21), jnp.int32), jnp.zeros((3,), jnp.int32)
    with pytest.raises(ValueError, match=r"implementation='fast': must be one of auto, dense"):
        attend(q, k, v, implementation="fast", **options)
    with pytest.raises(NotImplementedError, match="runs on tpu, not on cpu"):
        attend(q, k, v, implementation="splash", **options)
    with pytest.raises(NotImplementedError, match="segments with an offset"):
        attend(q, k, v, segments=ids, offset=offset, **options)
    with pytest.raises(ValueError, match="num_heads=3 is not a multiple of num_kv_heads=2"):
        attend(q[:, :, :3], k, v, **options)
    with pytest.raises(ValueError, match="T=21: must be at most the number of keys S=20"):
        attend(q, k[:, :, :20], v[:, :, :20], **options)
    with pytest.raises(ValueError, match="S=30: must be T=21 with segments"):
        longer = ((0, 0), (0, 0), (0, 9), (0, 0))
        attend(q, jnp.pad(k, longer), jnp.pad(v, longer), segments=ids, **options)


def test_tokamax_where_it_is_absent_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokamax", None)
    (q, k, v), options = make("plain")
    with pytest.raises(NotImplementedError, match=r"not installed; `pip install 'mfa_jax\[tokamax\]'`"):
        attend(q, k, v, implementation="tokamax", **options)


def test_every_implementation_is_named() -> None:
    assert IMPLEMENTATIONS == ("dense", "blockwise", "splash", "cudnn", "tokamax", "context")
