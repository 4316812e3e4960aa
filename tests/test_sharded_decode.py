"""Decoding over a mesh of eight devices: every layout gives what one device gives, and holds what its table says."""

from __future__ import annotations

import collections
import contextlib
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest

from mfa_jax import axes
from mfa_jax.attention.cached import Serving, cached_attention
from mfa_jax.cache import Cache, KeyCache, KVCache, SharedKVCache, allocate
from mfa_jax.kernels import IMPLEMENTATIONS, xla
from mfa_jax.kernels.decode import Backend
from mfa_jax.kernels.sharded import LAYOUTS, ROW_AXES, choose
from mfa_jax.plan import costs, hlo
from mfa_jax.positions import rope_table, rotate

B, N, S, C = 8, 8, 16, 8
CACHES: dict[str, Any] = {
    "mfa": (SharedKVCache, [(), ()]), "mfa_kr": (KeyCache, [()]), "mla": (KeyCache, [()]),
    "gqa": (KVCache, [(4,), (4,)]),
}
"""A cache, and the axis of key heads of each of its streams."""


def make(
    variant: str, T: int, dtype: str, S: int = S
) -> tuple[jax.Array, Cache, tuple[jax.Array, ...], dict[str, Any]]:
    """Ragged rows, those that are empty, full to the brim, and on either side of a shard of the sequence among them."""
    keys = iter(jax.random.split(jax.random.key(0), 8))
    kind, widths = CACHES[variant]
    shapes = [(*heads, S, C) for heads in widths]
    cache = allocate(kind, B, *shapes, dtype=dtype)
    held = tuple(jax.random.normal(next(keys), (B, *shape)) for shape in shapes)
    length = jnp.array([0, 1, 3, 4, 7, 8, 9, S - T])
    cache = cache.append(*held).with_length(length)
    new = tuple(jax.random.normal(next(keys), (B, *shape[:-2], T, C)) for shape in shapes)
    options: dict[str, Any] = {"scale": C**-0.5, "alibi_slopes": 2.0 ** -jnp.arange(1, N + 1)}
    if variant == "mfa_kr":
        options |= {"inv_freq": 10.0 ** -jnp.arange(C // 2), "alibi_slopes": None}
    if variant == "mla":
        options["value_width"] = C - 2
    return jax.random.normal(next(keys), (B, T, N, C)), cache, new, options


@pytest.mark.parametrize("variant", CACHES)
@pytest.mark.parametrize("layout", ["auto", *LAYOUTS])
@pytest.mark.parametrize(("sizes", "T", "dtype"), [
    ((2, 1, 1, 1, 4), 1, "float32"), ((1, 1, 1, 2, 4), 3, "int8"), ((1, 2, 1, 4, 1), 2, "float32"),
    ((2, 1, 2, 1, 2), 1, "float32"),
])
def test_every_layout_equals_one_device(variant: str, layout: str, sizes: tuple[int, ...], T: int, dtype: str) -> None:
    q, cache, new, options = make(variant, T, dtype)
    wanted, wanted_cache = cached_attention(q, cache, new, serving=Serving(), **options)
    mesh = axes.make_mesh(sizes)
    with jax.set_mesh(mesh):
        def step(q: Any, cache: Any, new: Any) -> Any:
            return cached_attention(q, cache, new, serving=Serving(layout=layout), **options)

        if variant == "gqa" and layout in ("batch", "sequence") and sizes[-1] > 1:
            with pytest.raises(ValueError, match=f"layout='{layout}': needs one key head"):
                step(q, cache, new)
            return
        out, after = jax.jit(step)(q, cache, new)
    chex.assert_trees_all_close(out, wanted, atol=2e-6, rtol=2e-6)
    chex.assert_trees_all_equal(after, wanted_cache)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", ["mfa", "mfa_kr"])
def test_the_tpu_kernel_serves_every_layout(variant: str, layout: str) -> None:
    q, cache, new, options = make(variant, 2, "float32", S=128)
    wanted, _ = cached_attention(q, cache, new, serving=Serving(), **options)
    with jax.set_mesh(axes.make_mesh((2, 1, 1, 1, 4))):
        serving = Serving(decode="mosaic_tpu_interpret", layout=layout)
        out, _ = jax.jit(lambda *a: cached_attention(*a, serving=serving, **options))(q, cache, new)
    chex.assert_trees_all_close(out, wanted, atol=2e-5, rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "layout"), [((1, 1, 1, 1, 2), "sequence"), ((1, 1, 1, 2, 1), "auto")])
def test_the_tpu_kernel_serves_rows_that_go_on_in_the_next_shard(sizes: tuple[int, ...], layout: str) -> None:
    """Each of two devices holds a block of 128 positions, and rows that are longer."""
    q, cache, new, options = make("mfa", 1, "float32", S=256)
    cache = cache.with_length(jnp.array([200, 250, 127, 128, 129, 254, 0, 255]))
    wanted, _ = cached_attention(q, cache, new, serving=Serving(), **options)
    with jax.set_mesh(axes.make_mesh(sizes, jax.devices()[:2])):
        serving = Serving(decode="mosaic_tpu_interpret", layout=layout)
        out, _ = jax.jit(lambda *a: cached_attention(*a, serving=serving, **options))(q, cache, new)
    chex.assert_trees_all_close(out, wanted, atol=2e-5, rtol=2e-5)


def test_a_row_past_its_end_is_refused_on_a_mesh_as_without_one() -> None:
    q, cache, new, options = make("mfa", 2, "float32")
    cache = cache.with_length(jnp.full(B, S - 1))
    for mesh in (contextlib.nullcontext(), jax.set_mesh(axes.make_mesh((2, 1, 1, 1, 4)))):
        with mesh, pytest.raises(ValueError, match=r"lengths=\[17, .*must be in 0 .. 16, the keys allocated"):
            cached_attention(q, cache, new, serving=Serving(), **options)


def exchanged(layout: str, sizes: tuple[int, ...], variant: str) -> dict[str, int]:
    """Bytes of what is gathered, reduced and scattered, or held for an all-to-all, in float32."""
    context, t = sizes[-2:]
    rows, heads, h = B // sizes[0], N // t, C - 2 if variant == "mla" else C
    slopes = 0 if variant == "mfa_kr" else N
    kinds = {
        "heads": {},
        "batch": {"all-to-all": rows * heads * (C + h), "all-gather": slopes},
        "sequence": {"all-gather": rows * N * C + slopes, "all-reduce": 2 * rows * N, "reduce-scatter": rows * N * h},
    }[layout]
    if context > 1:
        # The average, and its maximum and total where no other axis has merged them.
        merged = {"heads": rows * heads * (h + 2), "batch": rows // t * N * (h + 2), "sequence": rows * heads * h}
        kinds["all-reduce"] = kinds.get("all-reduce", 0) + merged[layout]
    return {kind: 4 * size for kind, size in kinds.items() if size}


@pytest.mark.parametrize(("variant", "dtype", "sizes", "layout", "share"), [
    ("mfa", "float32", (2, 1, 1, 1, 4), "heads", 2), ("mfa", "float32", (2, 1, 1, 1, 4), "batch", 8),
    ("mfa", "float32", (2, 1, 1, 1, 4), "sequence", 8), ("mfa_kr", "int8", (2, 1, 1, 1, 4), "batch", 8),
    ("mla", "float32", (2, 1, 1, 1, 4), "sequence", 8), ("mfa", "int8", (1, 1, 1, 2, 4), "sequence", 8),
    ("mfa_kr", "float32", (1, 1, 1, 2, 4), "heads", 2), ("mla", "int8", (1, 1, 1, 2, 4), "batch", 8),
])
def test_a_device_holds_and_exchanges_what_the_table_says(
    variant: str, dtype: str, sizes: tuple[int, ...], layout: str, share: int
) -> None:
    """Nothing of the cache moves, and of the new tokens nothing: they are given to all."""
    q, cache, new, options = make(variant, 1, dtype)
    with jax.set_mesh(axes.make_mesh(sizes)):
        step = jax.jit(lambda *a: cached_attention(*a, serving=Serving(layout=layout), **options))
        _, placed = step(q, cache, new)
        found = costs.count(hlo.parse(step.lower(q, placed, new).compile().as_text()))
    arrays = [x for x in (*placed.streams, *placed.scales) if x is not None]
    assert {sum(x.addressable_shards[i].data.nbytes for x in arrays) for i in range(8)} == {cache.nbytes // share}
    moved = collections.Counter[str]()
    for collective, times in found.collectives:
        moved[collective.kind] += times * collective.nbytes
    assert moved == exchanged(layout, sizes, variant)


@pytest.mark.parametrize(("sizes", "shape", "name"), [
    ({"data": 2, "tensor": 4}, {"B": 8, "K": 1, "S": 64}, "batch"),
    ({"data": 2, "tensor": 4}, {"B": 2, "K": 1, "S": 64}, "sequence"),
    ({"data": 2, "tensor": 4}, {"B": 2, "K": 1, "S": 63}, "heads"),
    ({"data": 2, "tensor": 4}, {"B": 8, "K": 4, "S": 64}, "heads"),
    ({"data": 8, "tensor": 1}, {"B": 8, "K": 1, "S": 64}, "heads"),
])
def test_the_rule(sizes: dict[str, int], shape: dict[str, int], name: str) -> None:
    assert choose(sizes, N=8, **shape).name == name


def test_rows_are_split_by_the_axes_that_split_a_batch() -> None:
    """As far as they divide: four rows do not go over two by two by four devices, but over the first two axes."""
    assert ROW_AXES == axes.RULES.batch
    assert choose({"data": 2, "fsdp": 2, "expert": 4}, N=8, B=4, K=1, S=64).rows == ("data", "fsdp")
    assert choose({"data": 2, "fsdp": 2, "expert": 2}, N=8, B=8, K=1, S=64).rows == ("data", "fsdp", "expert")


@pytest.mark.parametrize(("layout", "sizes", "shape", "message"), [
    ("rows", (1, 4), {}, "layout='rows': must be one of auto, heads, batch, sequence"),
    ("batch", (1, 4), {"B": 6}, "layout='batch': needs one key head, heads N=8 and rows B=6"),
    ("sequence", (1, 4), {"S": 63}, "layout='sequence': needs one key head, heads N=8 and positions S=63"),
    ("sequence", (4, 2), {"S": 66}, "layout='sequence': needs one key head, heads N=8 and positions S=66"),
    ("sequence", (4, 1), {"S": 63}, "layout='sequence': needs positions S=63 that divide over {'data': 2,"),
    ("heads", (1, 4), {"N": 6}, "layout='heads': needs heads N=6 that divide over {'data': 2,"),
    ("heads", (1, 4), {"N": 12, "K": 6}, "layout='heads': needs heads N=12 that divide over {'data': 2, 'context': 1, "
     "'tensor': 4}, and one key head or such that do, not K=6; use auto"),
])
def test_a_layout_that_cannot_split_says_why(
    layout: str, sizes: tuple[int, int], shape: dict[str, int], message: str
) -> None:
    mesh = {"data": 2, "context": sizes[0], "tensor": sizes[1]}
    wanted = {"B": 8, "N": 8, "K": 1, "S": 64, **shape}
    with pytest.raises(ValueError, match=re.escape(message)):
        choose(mesh, layout=layout, **wanted)
    assert choose(mesh, **wanted).name in LAYOUTS, "auto does with what divides"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("K", [1, 6])
def test_an_axis_of_one_device_splits_nothing_and_is_no_error(layout: str, K: int) -> None:
    found = choose({"data": 2, "context": 1, "tensor": 1}, B=8, N=6, K=K, S=63, layout=layout)
    assert (found.name, found.heads, found.sequence) == ("heads", (), ())


@pytest.mark.parametrize(("layout", "sizes", "split"), [
    ("heads", (2, 1, 1, 1, 4), False), ("batch", (2, 1, 1, 1, 4), False), ("sequence", (2, 1, 1, 1, 4), True),
    ("heads", (1, 1, 1, 2, 4), True), ("auto", None, False)])
def test_averages_are_rounded_by_the_backend_unless_they_are_merged(
    monkeypatch: pytest.MonkeyPatch, layout: str, sizes: tuple[int, ...] | None, split: bool
) -> None:
    asked = []

    def run(*args: Any, dtype: Any, **options: Any) -> Any:
        asked.append(jnp.dtype(dtype))
        out, lse = xla.decode_attention(*args, **options)
        return out.astype(dtype), lse

    monkeypatch.setitem(IMPLEMENTATIONS, "rounds", Backend(run, takes_dtype=True))
    q, cache, new, options = make("mfa", 1, "bfloat16")
    q, serving = q.astype(jnp.bfloat16), Serving(decode="rounds", layout=layout)
    wanted, _ = cached_attention(q, cache, new, serving=Serving(decode="xla"), **options)
    with jax.set_mesh(axes.make_mesh(sizes)) if sizes else contextlib.nullcontext():
        out, _ = jax.jit(lambda *a: cached_attention(*a, serving=serving, **options))(q, cache, new)
    assert set(asked) == {jnp.dtype("float32" if split else "bfloat16")} and out.dtype == jnp.bfloat16
    chex.assert_trees_all_close(out.astype(jnp.float32), wanted.astype(jnp.float32), atol=2**-7, rtol=2**-7)


def test_a_row_past_the_end_sees_all_of_its_cache_under_jit() -> None:
    """Where its length is known it is refused."""
    q, cache, new, options = make("mfa_kr", 2, "float32")
    past = cache.with_length(jnp.full(B, S + 3))
    options |= {"serving": Serving(decode="xla")}
    out, after = jax.jit(lambda *a: cached_attention(*a, **options))(q, past, new)
    assert after.length.tolist() == [S + 5] * B and after.overflowed.all()
    chex.assert_trees_all_equal(after.streams, past.streams)
    turned = rotate(cache.k, *rope_table(jnp.arange(S), options["inv_freq"]))
    p = jax.nn.softmax(options["scale"] * jnp.einsum("BTNC,BSC->BTNS", q, turned), axis=-1)
    chex.assert_trees_all_close(out, jnp.einsum("BTNS,BSC->BTNC", p, cache.k), atol=2e-6, rtol=2e-6)
    with pytest.raises(ValueError, match=rf"lengths=.*{S + 5}.*: must be in 0 .. {S}, the keys allocated"):
        cached_attention(q, past, new, **options)
