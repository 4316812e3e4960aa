"""What the TPU kernel promises beyond the contract of every backend: blocks, copies, cores, and its compilation."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hbm_traffic import count_hbm
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from test_kernels import make, oracle

from experiments import aot_tpu
from experiments.kernel_cases import BORDERS, CASES
from mfa_jax.kernels import mosaic_tpu, tpu_plan
from mfa_jax.plan import compiler

BLOCK = 128
ROUNDED = 2**-7
"""Tolerance of bfloat16. Scaled queries, turned keys and probabilities are each rounded, to a relative 2 ** -10 (root
mean square): scores of unit variance are off by about that, and the worst of ten thousand by five times as much."""


@pytest.fixture(autouse=True)
def fresh_interpreter() -> Iterator[None]:
    yield
    pltpu.reset_tpu_interpret_mode_state()


def run(
    call: dict[str, Any], interpret: Any = None, chip: str | None = None, block: int | None = BLOCK
) -> tuple[Any, Any]:
    static = {"scale": call["scale"], "value_width": call.get("value_width"), "block": block, "chip": chip,
              "interpret": interpret or pltpu.InterpretParams()}
    options = {name: call.get(name) for name in ("alibi_slopes", "k_scale", "v_scale")}
    arrays = {**{name: call[name] for name in ("q", "k", "v", "lengths")}, "inv_freq": call.get("rope"), **options}
    return jax.jit(functools.partial(mosaic_tpu.decode_attention, **static))(**arrays)


def plan_of(call: dict[str, Any], chip: str = "TPU v5e", block: int | None = None) -> tpu_plan.Plan:
    k, v = (None if call[name] is None else call[name][:, None] for name in ("k", "v"))
    return tpu_plan.make_plan(call["q"], k, v, rope="rope" in call, alibi="alibi_slopes" in call,
                              value_width=call.get("value_width"), chip=tpu_plan.CHIPS[chip], block=block)


def assert_equals_the_loop(call: dict[str, Any], found: tuple[Any, Any], tolerance: float | None = None) -> None:
    tolerance = tolerance or (ROUNDED if call["q"].dtype == jnp.bfloat16 else 2e-5)
    for one, other in zip(found, oracle(call), strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float64), other, atol=tolerance, rtol=0)


@pytest.mark.parametrize("mode", ["eager", "on_wait"])
@pytest.mark.parametrize(("variant", "encoding", "dtype"), [
    ("mfa", "none", jnp.float32), ("mfa_kr", "rope", jnp.float32), ("mla", "alibi", jnp.float32),
    ("mfa", "alibi", jnp.int8), ("mfa_kr", "rope", jnp.int8), ("mfa", "none", jnp.bfloat16)])
def test_no_race_and_no_garbage_at_any_border(mode: str, variant: str, encoding: str, dtype: Any) -> None:
    """Uninitialised memory is nan, and so are the caches past their lengths."""
    call = make(variant, encoding, dtype=dtype, lengths=(0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK), T=2)
    params = pltpu.InterpretParams(dma_execution_mode=mode, detect_races=True)
    assert_equals_the_loop(call, run(call, params))
    assert interpret_pallas_call.races.races_found is False


@pytest.mark.parametrize(("variant", "encoding", "dtype", "chip"), [
    ("mfa", "alibi", jnp.float32, "TPU v5e"), ("mfa_kr", "rope", jnp.float32, "TPU v5p"),
    ("mfa", "alibi", jnp.int8, "TPU v5p"), ("mfa_kr", "rope", jnp.int8, "TPU v5e"),
    ("mla", "none", jnp.bfloat16, "TPU v5p")])
def test_whole_blocks_of_several_parts(variant: str, encoding: str, dtype: Any, chip: str) -> None:
    """As almost all real blocks are. Whole is a block from the length on at which the first drafted token sees it."""
    block, T = 3 * 128, 2
    lengths = (block - 1, block, block + 1, 2 * block, 2 * block + 1)
    call = make(variant, encoding, dtype=dtype, lengths=lengths, S=2 * block + 32, T=T, N=64)
    plan = plan_of(call, chip, block)
    assert (plan.part, plan.block) == (128, block)
    assert_equals_the_loop(call, run(call, chip=chip, block=block))


def test_int8_keys_turn_in_bfloat16_where_vectors_can() -> None:
    """A key's turn is four roundings of 2 ** -9, beside those of the other backends (see `test_kernels`)."""
    lengths = (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK)
    call = make("mfa_kr", "rope", dtype=jnp.int8, lengths=lengths, width=256, N=16)
    call["q"] = call["q"].astype(jnp.bfloat16)
    errors = {}
    for chip in ("TPU v5e", "TPU v6e"):
        found = run(call, chip=chip)
        assert_equals_the_loop(call, found, tolerance=12 * 2**-8)
        errors[chip] = np.abs(np.asarray(found[0], np.float64) - oracle(call)[0]).mean()
    assert errors["TPU v5e"] < errors["TPU v6e"] < 2 * errors["TPU v5e"], "another rounding, and not much of one"
    arrays = (jax.ShapeDtypeStruct((1, 1, 16, 256), jnp.bfloat16), jax.ShapeDtypeStruct((1, 1, 512, 256), jnp.int8))
    for name, chip in tpu_plan.CHIPS.items():
        plan = tpu_plan.make_plan(*arrays, None, rope=True, alibi=False, value_width=None, chip=chip)
        assert (plan.turn == jnp.bfloat16) == ("v6" in name)


@pytest.mark.parametrize("lengths", [(0, 1, 129, 384), (384,), (1,), (0,), (384, 384, 1), (5, 384)])
@pytest.mark.parametrize("variant", ["mfa", "mfa_kr"])
def test_two_cores_share_the_list(variant: str, lengths: tuple[int, ...]) -> None:
    """A row that straddles the border is merged; a core without work leaves no trace."""
    call = make(variant, "rope", lengths=lengths)
    assert_equals_the_loop(call, run(call, chip="TPU v5p"))


@pytest.mark.parametrize(("chip", "dtype", "T"), [
    ("TPU v5e", jnp.float32, 1), ("TPU v5p", jnp.float32, 1), ("TPU v5p", jnp.int8, 2)])
def test_key_heads_are_one_list(chip: str, dtype: Any, T: int) -> None:
    calls = [make("mfa", "alibi", lengths=(0, 129, 384), seed=seed, dtype=dtype, T=T) for seed in range(3)]
    streams = [name for name in ("k", "v", "k_scale", "v_scale") if name in calls[0]]
    whole = {**calls[0], **{name: jnp.stack([c[name] for c in calls], axis=1) for name in streams},
             "q": jnp.concatenate([c["q"] for c in calls], axis=2),
             "alibi_slopes": jnp.concatenate([c["alibi_slopes"] for c in calls])}
    found = run(whole, chip=chip)
    for i, call in enumerate(calls):
        assert_equals_the_loop(call, tuple(x[:, :, 3 * i : 3 * i + 3] for x in found))


@pytest.mark.parametrize(("variant", "encoding", "dtype", "N", "width"), [
    ("mfa", "alibi", jnp.bfloat16, 64, 256), ("mfa", "none", jnp.int8, 64, 128),
    ("mfa", "none", jnp.bfloat16, 128, 192), ("mfa_kr", "rope", jnp.int8, 64, 256),
    ("mfa_kr", "rope", jnp.bfloat16, 64, 192), ("mla", "none", jnp.bfloat16, 128, 576),
    ("mla", "alibi", jnp.int8, 128, 576)])
def test_real_heads_and_widths_equal_the_loop(variant: str, encoding: str, dtype: Any, N: int, width: int) -> None:
    call = make(variant, encoding, dtype=dtype, lengths=(1, 129, 256), S=256, N=N, width=width)
    if variant == "mla":
        call["value_width"] = 512
    assert_equals_the_loop(call, run(call))


def test_lengths_outside_the_cache_are_those_of_a_shard() -> None:
    """Below 0 a row sees nothing; above S its queries stand past the last key."""
    call = make("mfa", "none", lengths=(384, 384), S=384, T=2)
    out, lse = run({**call, "lengths": jnp.array([-5, 400])})
    assert np.all(np.asarray(out[0]) == 0) and np.all(np.isneginf(np.asarray(lse[0])))
    # With 400 keys before them both drafted tokens see all 384, as a single one does at length 384.
    single = {**call, "q": call["q"][:, 1:]}
    assert np.abs(np.asarray(out[1, 1]) - oracle(single)[0][1, 0]).max() < 2e-5


@pytest.mark.parametrize("chip", ["TPU v5e", "TPU v5p"])
@pytest.mark.parametrize("lengths", [(600, 600, 10), (385, 50, 0), (600, 600, 600)])
def test_every_row_longer_than_its_shard_is_written(lengths: tuple[int, ...], chip: str) -> None:
    """Its last block ends before its length does."""
    call = make("mfa", "none", lengths=tuple(min(length, 384) for length in lengths), S=384)
    assert_equals_the_loop(call, run({**call, "lengths": jnp.array(lengths)}, chip=chip))


@pytest.mark.parametrize("S", [2048, 16384])
@pytest.mark.parametrize("variant", ["mfa", "mfa_kr", "mla"])
def test_bytes_read_are_those_of_the_valid_keys(variant: str, S: int) -> None:
    """At most 2 % more than the keys rounded up to 16, tables of rope included, whatever is allocated."""
    lengths = (0, 1, 2048, 517, 2048, 1999, 2048)
    call = make(variant, "rope", lengths=lengths, S=S, width=256, dtype=jnp.bfloat16)
    with count_hbm() as read:
        jax.block_until_ready(run(call, block=512))
    rows = sum(-(-n // 16) * 16 for n in lengths)
    valid = rows * sum(call[name].shape[-1] * 2 for name in ("k", "v") if call[name] is not None)
    assert read.copies == valid
    queries = call["q"].size // 3 * 16 * (4 if variant == "mfa_kr" else 2)
    assert read.blocks - queries <= 0.02 * valid


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=12)
def test_any_shape_equals_the_loop(data: st.DataObject) -> None:
    S = 16 * data.draw(st.integers(1, 20))
    call = make(
        data.draw(st.sampled_from(["mfa", "mfa_kr", "mla"])), data.draw(st.sampled_from(["rope", "alibi"])), S=S,
        T=data.draw(st.integers(1, 8)), N=data.draw(st.integers(1, 20)), width=data.draw(st.sampled_from([6, 64, 130])),
        lengths=tuple(data.draw(st.lists(st.integers(0, S), min_size=1, max_size=4))),
        dtype=jnp.int8 if S % 32 == 0 and data.draw(st.booleans()) else jnp.float32)
    assert_equals_the_loop(call, run(call, chip=data.draw(st.sampled_from(["TPU v5e", "TPU v5p"]))), 5e-5)


@pytest.mark.parametrize(("chip", "row_bytes", "keys"), [
    ("TPU v5e", 1024, 2048), ("TPU v5p", 512, 4096), ("TPU v6e", 1280, 2048), ("TPU v6e", 256, 8192)])
def test_blocks_fill_a_slot(chip: str, row_bytes: int, keys: int) -> None:
    assert tpu_plan.slot_keys(tpu_plan.CHIPS[chip], row_bytes) == keys


@pytest.mark.parametrize(("S", "block", "part"), [
    (32, 128, 128), (200, 256, 256), (384, 384, 384), (1536, 1536, 768), (1664, 1792, 896), (1904, 2048, 1024),
    (1920, 1920, 640), (2032, 2048, 1024), (2048, 2048, 1024), (8192, 2048, 1024)])
def test_a_cache_shorter_than_a_slot_is_one_block_of_few_parts(S: int, block: int, part: int) -> None:
    """64 queries of 256 in bfloat16, whose slot has 2048 keys and whose parts have 1024."""
    q, k = jax.ShapeDtypeStruct((1, 1, 64, 256), jnp.bfloat16), jax.ShapeDtypeStruct((1, 1, S, 256), jnp.bfloat16)
    plan = tpu_plan.make_plan(q, k, k, rope=False, alibi=False, value_width=None, chip=tpu_plan.CHIPS["TPU v5e"])
    assert (plan.block, plan.part) == (block, part)


@pytest.mark.parametrize("most", [128, 512, 2048])
def test_a_short_block_is_no_longer_than_a_slot(most: int) -> None:
    """What its parts have beyond the cache is less than a tile of lanes each."""
    for fill in (128, 2048, 8192):
        for S in range(16, fill, 16):
            block, part = tpu_plan.short_block(S, most)
            parts, fewest = block // part, -(-S // most)
            assert part % 128 == 0 and part <= most and block == parts * part
            assert S <= block <= fill and block - S < 128 * parts
            assert parts == fewest or (fewest < parts < 2 * fewest and block == S)


@pytest.mark.parametrize(("variant", "encoding", "dtype", "S", "block"), [
    ("mfa_kr", "rope", jnp.int8, 640, 768), ("mfa", "alibi", jnp.float32, 768, 768)])
def test_a_short_block_of_two_parts(variant: str, encoding: str, dtype: Any, S: int, block: int) -> None:
    """One reaches past the cache, one ends with it and is computed without masks where it is full."""
    call = make(variant, encoding, dtype=dtype, lengths=(383, 384, 385, S - 1, S), S=S, N=128)
    plan = plan_of(call)
    assert (plan.block, plan.part) == (block, 384)
    assert_equals_the_loop(call, run(call, block=None))


def test_the_list_of_work_ends_with_the_lengths() -> None:
    plan = tpu_plan.Plan(4, 1, 1, 16, 512, 128, 128, False, False, False, False, jnp.float32, 128, 128, 2)
    work = tpu_plan.work_list(jnp.array([0, 129, 512, -3]), plan)
    assert work.size.tolist() == [8, 4]
    assert work.row[:8].tolist() == [0, 1, 1, 2, 2, 2, 2, 3] and work.block[:8].tolist() == [0, 0, 1, 0, 1, 2, 3, 0]


@pytest.mark.slow
@pytest.mark.parametrize("chip", aot_tpu.TOPOLOGIES)
@pytest.mark.skipif(compiler.libtpu() is None, reason="the compiler for TPUs is not there: make aot-tpu")
def test_every_case_compiles_and_copies_no_cache(chip: str) -> None:
    """Of int8 caches, the scales are laid out anew; keys and values are not, and nothing of the other caches is."""
    command = [sys.executable, "-m", "experiments.aot_tpu", "--chips", chip]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [x["case"] for x in lines if not x["case"].startswith("generate")] == [
        *CASES, *BORDERS, "MFA-KR 64x256 int8, 1664 tokens"]
    assert len(lines) == len(CASES) + len(BORDERS) + 7
    for line in lines:
        moved = [x for x in line["copies"] if not ("int8" in line["case"] and x.startswith("reshape f32"))]
        assert not moved, line
