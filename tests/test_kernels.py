"""The contract of every decode backend, against a float64 loop over the keys that a query sees."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Iterator
from typing import Any

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from mfa_jax import cache
from mfa_jax.kernels import IMPLEMENTATIONS, Call, Device, decode, decode_attention, default_device, resolve, xla

VARIANTS = ("mfa", "mfa_kr", "mla")
CALL = Call(T=1, N=64, S=384, H=256, h=256, dtype=jnp.float32, cache_dtype=jnp.float32, shared=False)
HERE = [name for name, backend in IMPLEMENTATIONS.items() if backend.obstacle(CALL, default_device()) is None]
"""What serves on this machine."""
backends = pytest.mark.parametrize("backend", HERE)
variants = pytest.mark.parametrize("variant", VARIANTS)
LENGTHS = (0, 1, 255, 256, 257, 384)


def rotated(x: np.ndarray, position: int, inv_freq: np.ndarray) -> np.ndarray:
    first, second = np.split(x, 2, axis=-1)
    z = (first + 1j * second) * np.exp(1j * position * inv_freq)
    return np.concatenate([z.real, z.imag], axis=-1)


def oracle(call: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Float64, one query of one head at a time, over the list of the keys it sees."""
    q, k, lengths = (np.asarray(call[name], np.float64) for name in ("q", "k", "lengths"))
    B, T, N, H = q.shape
    if call.get("k_scale") is not None:
        k = k * np.asarray(call["k_scale"], np.float64)[..., None]
    if call.get("v") is None:
        v = k[..., : call.get("value_width") or H]
    else:
        v = np.asarray(call["v"], np.float64)
        if call.get("v_scale") is not None:
            v = v * np.asarray(call["v_scale"], np.float64)[..., None]
    slopes = np.zeros(N) if call.get("alibi_slopes") is None else np.asarray(call["alibi_slopes"], np.float64)
    rope = np.zeros(H // 2) if call.get("rope") is None else np.asarray(call["rope"], np.float64)
    out, lse = np.zeros((B, T, N, v.shape[-1])), np.full((B, T, N), -np.inf)
    for b in range(B):
        turned = np.stack([rotated(k[b, j], j, rope) for j in range(int(lengths[b]))]) if lengths[b] else None
        for t in range(T):
            i = int(lengths[b]) - T + t
            for n in range(N if i >= 0 else 0):
                s = call["scale"] * turned[: i + 1] @ q[b, t, n] - slopes[n] * (i - np.arange(i + 1))
                p = np.exp(s - s.max())
                out[b, t, n], lse[b, t, n] = p / p.sum() @ v[b, : i + 1], s.max() + np.log(p.sum())
    return out, lse


def make(
    variant: str, encoding: str, *, lengths: tuple[int, ...] = LENGTHS, S: int = 384, T: int = 1, N: int = 3,
    width: int = 16, dtype: Any = jnp.float32, seed: int = 0,
) -> dict[str, Any]:
    """A call whose cache holds garbage past each length: nan, scales of 8-bit types too."""
    rng = np.random.default_rng(seed)
    B, held = len(lengths), np.arange(S) < np.array(lengths)[:, None]
    call: dict[str, Any] = {"lengths": jnp.array(lengths, jnp.int32), "scale": width**-0.5, "v": None}
    activations = jnp.float32 if jnp.dtype(dtype).itemsize == 1 else dtype
    call["q"] = jnp.asarray(rng.normal(size=(B, T, N, width)), activations)
    for name in ("k", "v") if variant == "mfa" else ("k",):
        if dtype == jnp.int8:
            call[name] = jnp.asarray(rng.integers(-127, 128, (B, S, width)), jnp.int8)
        else:
            call[name] = jnp.asarray(np.where(held[..., None], rng.normal(size=(B, S, width)), np.nan), dtype)
        if jnp.dtype(dtype).itemsize == 1:
            low, high = (0.005, 0.02) if dtype == jnp.int8 else (0.5, 1.5)
            call[f"{name}_scale"] = jnp.asarray(np.where(held, rng.uniform(low, high, (B, S)), np.nan), jnp.float32)
    if variant == "mla":
        call["value_width"] = width - 4
    if encoding == "rope" and variant == "mfa_kr":
        call["rope"] = jnp.asarray(100.0 ** (-np.arange(width // 2) / (width // 2)), jnp.float32)
    if encoding == "alibi":
        call["alibi_slopes"] = jnp.asarray(2.0 ** -np.arange(1, N + 1), jnp.float32)
    return call


def errors(call: dict[str, Any], backend: str) -> float:
    """Largest difference of averages and log-sum-exps; both -inf, or both zero, where nothing is seen."""
    static = {name: call[name] for name in ("scale", "value_width") if name in call}
    arrays = {name: x for name, x in call.items() if name not in static}
    out, lse = jax.jit(functools.partial(decode_attention, return_lse=True, implementation=backend, **static))(**arrays)
    wanted, wanted_lse = oracle(call)
    assert out.dtype == call["q"].dtype and lse.dtype == jnp.float32
    nothing = np.isneginf(wanted_lse)
    assert np.array_equal(np.isneginf(lse), nothing) and np.all(np.asarray(out)[nothing] == 0)
    difference = np.where(nothing, 0, np.asarray(lse, np.float64) - np.where(nothing, 0, wanted_lse))
    return max(np.abs(np.asarray(out, np.float64) - wanted).max(), np.abs(difference).max())


@backends
@variants
@pytest.mark.parametrize("encoding", ["rope", "alibi", "none"])
def test_equals_the_loop_at_every_border_of_a_block(backend: str, variant: str, encoding: str) -> None:
    assert errors(make(variant, encoding), backend) < 2e-5


@backends
@variants
def test_drafted_tokens_are_causal_among_themselves(backend: str, variant: str) -> None:
    assert errors(make(variant, "rope", T=4, lengths=(0, 2, 4, 258)), backend) < 2e-5


@pytest.mark.parametrize(("backend", "dtype"), [
    *((name, jnp.int8) for name in HERE), ("reference", jnp.float8_e4m3fn), ("xla", jnp.float8_e4m3fn)])
@variants
def test_eight_bits_with_a_scale_a_token(backend: str, dtype: Any, variant: str) -> None:
    call = make(variant, "rope", dtype=dtype)
    assert errors(call, backend) < 2e-5
    streams = [call[name] for name in ("k", "v", "k_scale", "v_scale") if call.get(name) is not None]
    assert set(decode.SCALED) == set(cache.SCALED)
    assert sum(x.nbytes for x in streams) == sum((16 + 4) * 6 * 384 for _ in range(len(streams) // 2))


@backends
@variants
def test_bfloat16_is_within_its_rounding(backend: str, variant: str) -> None:
    """Keys are rounded after their turn, probabilities and the result once each: a relative 2 ** -9 of values up to 4,
    and of a score's terms, which sum up to about 8."""
    assert errors(make(variant, "rope", dtype=jnp.bfloat16), backend) < 8 * 2**-8


@pytest.mark.slow
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=12)
def test_any_shape_equals_the_loop(data: st.DataObject) -> None:
    S, T = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 8))
    lengths = tuple(data.draw(st.lists(st.integers(0, S), min_size=1, max_size=3)))
    call = make(data.draw(st.sampled_from(VARIANTS)), data.draw(st.sampled_from(["rope", "alibi", "none"])), S=S, T=T,
                lengths=lengths, N=data.draw(st.integers(1, 5)), width=data.draw(st.sampled_from([6, 8, 10])))
    for backend in ("reference", "xla"):
        assert errors(call, backend) < 2e-5


@pytest.mark.parametrize("block", [1, 7, 16, 40])
def test_blocks_that_do_not_divide_the_cache_count_each_key_once(block: int) -> None:
    call = make("mfa_kr", "rope", S=40, lengths=(0, 1, 15, 16, 39, 40))
    options = {"alibi_slopes": None, "k_scale": None, "v_scale": None, "value_width": None}
    out, _ = xla.decode_attention(call["q"], call["k"], None, call["lengths"], scale=call["scale"],
                                  inv_freq=call["rope"], block=block, **options)
    assert np.abs(np.asarray(out, np.float64) - oracle(call)[0]).max() < 2e-5


def test_the_loop_ends_at_the_longest_length() -> None:
    """How often it runs is a value, not a shape (JAX makes a loop of known length a scan), and no array of the loop
    but the cache itself has the allocated length."""
    S = 2048
    call = make("mfa", "none", S=S, lengths=(1, 40))
    arrays = [call[name] for name in ("q", "k", "v", "lengths")]
    jaxpr = jax.make_jaxpr(functools.partial(decode_attention, scale=1.0, implementation="xla"))(*arrays).jaxpr
    loops = [eqn for eqn in jaxpr.eqns if eqn.primitive.name in ("while", "scan")]
    assert [loop.primitive.name for loop in loops] == ["while"]
    made = [v.aval.shape for eqn in loops[0].params["body_jaxpr"].jaxpr.eqns for v in eqn.outvars]
    assert made and all(S not in shape for shape in made)


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"q": jnp.zeros((2, 9, 3, 16))}, NotImplementedError, r"T=9: decodes 1 to 8 tokens at once"),
    ({"k": jnp.zeros((2, 20, 12))}, ValueError, r"k.shape=\(2, 20, 12\): must be \[2, S, 16\], or \[2, K, S, 16\]"),
    ({"lengths": jnp.array([3, 21])}, ValueError, r"lengths=\[3, 21\]: must be in 0 .. 20"),
    ({"v": jnp.zeros((2, 19, 16))}, ValueError, r"v.shape=\(2, 19, 16\): must be as k \(2, 20, 16\)"),
    ({"rope": jnp.ones(8)}, ValueError, r"rope=\(8,\): only with v=None"),
    ({"v": None, "rope": jnp.ones(7)}, ValueError, r"rope.shape=\(7,\): must be \(8,\)"),
    ({"value_width": 8}, ValueError, r"value_width=8: .* only with v=None"),
    ({"k": jnp.zeros((2, 20, 16), jnp.int8)}, ValueError, r"k_scale.shape=None: must be \(2, 20\)"),
    ({"v_scale": jnp.ones((2, 20))}, ValueError, r"v_scale.shape=\(2, 20\): must be None"),
    ({"v": jnp.zeros((2, 20, 16), jnp.int8), "v_scale": jnp.ones((2, 20))}, ValueError,
     r"v.dtype='int8': must be float32, as k"),
    ({"k": jnp.zeros((2, 20, 16), jnp.bfloat16)}, ValueError, r"v.dtype='float32': must be bfloat16, as k"),
    ({"alibi_slopes": jnp.ones(4)}, ValueError, r"alibi_slopes.shape=\(4,\): must be \(3,\)"),
    ({"implementation": "cuda"}, ValueError, r"implementation='cuda': must be one of auto, reference, xla"),
])
def test_bad_input_is_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    call = {**make("mfa", "none", S=20, lengths=(3, 20)), **changes}
    with pytest.raises(error, match=message):
        decode_attention(**call)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.uint32, jnp.float32])
def test_lengths_are_signed(dtype: Any) -> None:
    """`lengths - T` is below zero where a query stands before its row. The annotation of `decode_attention` says so,
    too, but is checked in tests only."""
    call = make("mfa", "none", S=20, lengths=(0, 20))
    names = ("rope", "alibi_slopes", "k_scale", "v_scale", "value_width")
    with pytest.raises(ValueError, match=f"lengths.dtype='{jnp.dtype(dtype)}': must be a signed integer"):
        decode.averages(**{**dict.fromkeys(names), **call, "lengths": call["lengths"].astype(dtype)},
                        implementation="xla")


def test_narrow_lengths_reach_the_end_of_a_long_cache() -> None:
    call = make("mfa", "none", S=300, lengths=(3, 120))
    wanted = decode_attention(**call)
    narrow = {**call, "lengths": call["lengths"].astype(jnp.int8)}
    for found in (decode_attention(**narrow), jax.jit(functools.partial(decode_attention, scale=call["scale"]))(
            call["q"], call["k"], call["v"], narrow["lengths"])):
        chex.assert_trees_all_close(found, wanted, atol=1e-6)


@pytest.mark.parametrize(("dtype", "cache_dtype", "precision"), [
    (jnp.float32, jnp.float32, jax.lax.Precision.HIGHEST), (jnp.float32, jnp.int8, jax.lax.Precision.HIGHEST),
    (jnp.bfloat16, jnp.bfloat16, None)])
def test_products_of_float32_are_asked_for_in_full(dtype: Any, cache_dtype: Any, precision: Any) -> None:
    """An accelerator would round their factors otherwise, which no test on a CPU can see."""
    call = make("mfa", "none", dtype=cache_dtype)
    arrays = {name: x for name, x in {**call, "q": call["q"].astype(dtype)}.items() if isinstance(x, jax.Array)}
    program = jax.make_jaxpr(functools.partial(decode_attention, scale=1.0, implementation="xla"))(**arrays)

    def products(jaxpr: Any) -> Iterator[Any]:
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                yield eqn.params["precision"]
            for inner in jaxprs_in_params(eqn.params):
                yield from products(inner)

    assert list(products(program.jaxpr)) == [None if precision is None else (precision, precision)] * 2


def test_the_default_device_is_the_one_that_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, devices = jax.devices("cpu")[0], jax.devices
    tpu = types.SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
    monkeypatch.setattr(jax, "devices", lambda platform=None: devices(platform) if platform else [tpu])
    assert default_device() == Device("tpu", "TPU v5 lite")
    for chosen in (cpu, "cpu"):
        with jax.default_device(chosen):
            assert default_device() == Device("cpu", cpu.device_kind)
            assert resolve("auto", CALL, default_device()) == "xla"


@pytest.mark.parametrize(("implementation", "device", "chosen"), [
    ("auto", Device("cpu"), "xla"), ("reference", Device("cpu"), "reference"), ("xla", Device("tpu"), "xla"),
    ("auto", Device("tpu", "TPU v5 lite"), "mosaic_tpu"), ("auto", Device("tpu", "TPU v5"), "mosaic_tpu"),
    ("auto", Device("tpu", "TPU v2"), "xla"), ("mosaic_tpu_interpret", Device("cpu"), "mosaic_tpu_interpret"),
])
def test_what_serves_can_be_asked(implementation: str, device: Device, chosen: str) -> None:
    assert resolve(implementation, CALL, device) == chosen


@pytest.mark.parametrize(("changes", "device", "reason"), [
    ({}, Device("cpu"), "runs on TPUs, and this is cpu; mosaic_tpu_interpret runs its program anywhere"),
    ({}, Device("tpu", "TPU v2"), "has no block sizes for TPU v2; it has for TPU v5 lite"),
    ({"S": 100}, Device("tpu", "TPU v6 lite"), "copies 16 tokens of a .*float32.* cache at a time, and S=100 is not"),
    ({"S": 48, "cache_dtype": jnp.dtype("int8")}, Device("tpu", "TPU v6 lite"), "copies 32 tokens of a int8 cache"),
    ({"dtype": jnp.dtype("float16")}, Device("tpu", "TPU v6 lite"), "takes queries of .*, not float16"),
    ({"cache_dtype": jnp.dtype("float8_e4m3fn")}, Device("tpu", "TPU v6 lite"), "reads .*, not float8_e4m3fn"),
])
def test_a_backend_that_cannot_serve_says_why_and_what_would(
    changes: dict[str, Any], device: Device, reason: str
) -> None:
    call = dataclasses.replace(CALL, **changes)
    with pytest.raises(NotImplementedError, match=f"implementation='mosaic_tpu': {reason}.*; use one of auto, .*xla"):
        resolve("mosaic_tpu", call, device)
    assert resolve("auto", call, device) == "xla"
