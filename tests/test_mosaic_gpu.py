"""What the GPU kernel promises beyond the contract of every backend: shares, races, widths, and its compilation."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.export import DisabledSafetyCheck, export
from test_kernels import errors, make, oracle

from experiments import aot_gpu
from experiments.kernel_cases import CASES, Case
from mfa_jax.attention import build, init_cache
from mfa_jax.attention.cached import Serving
from mfa_jax.config import MFAConfig, MFAKRConfig, MLAConfig, PositionConfig
from mfa_jax.kernels import Call, Device, gpu_memory, gpu_merge, gpu_plan, mosaic_gpu, resolve

BACKEND = "mosaic_gpu_interpret"
BORDER_LENGTHS = (0, 1, 63, 64, 65, 200)
TOLERANCE = 4 * 2**-8
"""Weights, turned keys and the result are rounded to bfloat16: a relative 2 ** -9 of values up to 4, and of scores."""
H100 = Device("gpu", "NVIDIA H100 80GB HBM3", 9.0, 132)
SERVES = jax.__version_info__ >= (0, 11)
interpreted = pytest.mark.skipif(not hasattr(plgpu, "InterpretGPUParams"), reason="no interpreter before JAX 0.11")


def call_of(
    variant: str, encoding: str, dtype: Any = jnp.bfloat16, value_width: int = 64, **options: Any
) -> dict[str, Any]:
    call = make(variant, encoding, dtype=dtype, **{"lengths": BORDER_LENGTHS, "S": 200, "width": 64, **options})
    if variant == "mla":
        call["value_width"] = value_width
    return {**call, "q": call["q"].astype(jnp.bfloat16)}


def run(call: dict[str, Any], **options: Any) -> tuple[Any, Any]:
    """The kernel itself, with the detection of races."""
    static = {"scale": call["scale"], "value_width": call.get("value_width"),
              "interpret": plgpu.InterpretGPUParams(detect_races=True), **options}
    arrays = {name: call.get(name) for name in ("q", "k", "v", "lengths", "alibi_slopes", "k_scale", "v_scale")}
    return jax.jit(functools.partial(mosaic_gpu.decode_attention, **static))(**arrays, inv_freq=call.get("rope"))


def assert_equals_the_loop(call: dict[str, Any], found: tuple[Any, Any]) -> None:
    for one, other in zip(found, oracle(call), strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float64), other, atol=TOLERANCE, rtol=0)


@interpreted
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn])
@pytest.mark.parametrize(("variant", "encoding"), [
    ("mfa", "none"), ("mfa", "alibi"), ("mfa_kr", "rope"), ("mla", "none"), ("mla", "alibi")])
def test_no_race_and_no_garbage_at_any_border(variant: str, encoding: str, dtype: Any) -> None:
    """Caches are nan past their lengths."""
    call = call_of(variant, encoding, dtype, width=128 if variant == "mla" else 64)
    assert_equals_the_loop(call, run(call, cores=3))


@interpreted
@pytest.mark.parametrize("T", [2, 3, 8])
@pytest.mark.parametrize("variant", ["mfa", "mfa_kr"])
def test_drafted_tokens_over_several_tiles_of_queries(variant: str, T: int) -> None:
    """At 24 heads the rows of 8 and of 3 tokens do not end with a tile."""
    call = call_of(variant, "alibi" if variant == "mfa" else "rope", T=T, N=24, lengths=(0, 2, T, 70), S=80)
    assert errors(call, BACKEND) < TOLERANCE


@interpreted
@pytest.mark.parametrize("lengths", [(200,), (0,), (200, 200, 1), (5, 200), (64, 64, 64)])
@pytest.mark.parametrize("cores", [2, 12])
def test_shares_of_a_row_are_merged(lengths: tuple[int, ...], cores: int) -> None:
    """Up to one block a share, and more shares than there are blocks."""
    call = call_of("mfa_kr", "rope", lengths=lengths)
    assert_equals_the_loop(call, run(call, cores=cores))


@interpreted
def test_many_tiles_of_results_are_merged_in_wide_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks of columns, and a row of more parts than are read at once."""
    monkeypatch.setattr(gpu_merge, "_FEW", 0)
    call = call_of("mfa", "none", width=128, S=512, lengths=(512, 3))
    assert_equals_the_loop(call, run(call, cores=12))


@interpreted
@pytest.mark.parametrize(("variant", "dtype"), [("mla", jnp.bfloat16), ("mfa", jnp.int8)])
def test_blocks_of_threads_of_a_cluster_free_what_they_fetch_together(variant: str, dtype: Any) -> None:
    """72 heads are two tiles of queries."""
    call = call_of(variant, "none", dtype, width=128 if variant == "mla" else 64, N=72, lengths=(0, 65, 200))
    assert_equals_the_loop(call, run(call, cores=6))


@pytest.mark.parametrize("name", CASES)
def test_a_cluster_waits_for_the_readers_of_all_its_blocks(name: str) -> None:
    plan = plan_for(CASES[name])
    assert plan.cluster == (2 if name.startswith("MLA") else 1)
    shared = gpu_memory.scratch(plan)
    fetched = {"k", "v", "scales"} & {ring.removesuffix("_free") for ring in shared}
    kind = plgpu.ClusterBarrier if plan.cluster == 2 else plgpu.Barrier
    assert all(isinstance(shared[f"{ring}_free"], kind) for ring in fetched) and "k" in fetched
    for interpret in (False, True):
        found = gpu_memory.rings(plan, shared, interpret)
        together = {ring for ring, x in found.items() if x.together is not None}
        assert together == (fetched if plan.cluster == 2 and not interpret else set())


@interpreted
def test_key_heads_are_one_list() -> None:
    calls = [call_of("mfa", "alibi", lengths=(0, 65, 200), seed=seed) for seed in range(3)]
    whole = {**calls[0], **{name: jnp.stack([c[name] for c in calls], axis=1) for name in ("k", "v")},
             "q": jnp.concatenate([c["q"] for c in calls], axis=2),
             "alibi_slopes": jnp.concatenate([c["alibi_slopes"] for c in calls])}
    found = run(whole, cores=4)
    for i, call in enumerate(calls):
        assert_equals_the_loop(call, tuple(x[:, :, 3 * i : 3 * i + 3] for x in found))


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize(("variant", "width", "value_width"), [
    ("mfa", 128, 128), ("mfa", 192, 192), ("mfa", 256, 256), ("mfa_kr", 128, 128), ("mfa_kr", 192, 192),
    ("mfa_kr", 256, 256), ("mla", 576, 512)])
def test_every_width(variant: str, width: int, value_width: int, dtype: Any) -> None:
    """576 has two warpgroups of averages and products in parts; 192 has tiles in a shorter pattern."""
    call = call_of(variant, "rope", dtype, value_width, width=width, N=64, lengths=(65, 3), S=128)
    assert_equals_the_loop(call, run(call, cores=3))


@interpreted
def test_lengths_outside_the_cache_are_those_of_a_shard() -> None:
    call = call_of("mfa", "none", lengths=(200, 200), T=2)
    out, lse = run({**call, "lengths": jnp.array([-5, 220])})
    assert np.all(np.asarray(out[0]) == 0) and np.all(np.isneginf(np.asarray(lse[0])))
    # With 220 keys before them both drafted tokens see all 200, as a single one does at length 200.
    single = {**call, "q": call["q"][:, 1:]}
    assert np.abs(np.asarray(out[1, 1]) - oracle(single)[0][1, 0]).max() < TOLERANCE


@interpreted
@pytest.mark.slow
@hypothesis.given(st.data())
@hypothesis.settings(max_examples=12)
def test_any_shape_equals_the_loop(data: st.DataObject) -> None:
    S = 8 * data.draw(st.integers(8, 20))
    call = call_of(
        data.draw(st.sampled_from(["mfa", "mfa_kr"])), data.draw(st.sampled_from(["rope", "alibi"])),
        data.draw(st.sampled_from([jnp.bfloat16, jnp.int8])), S=S, T=data.draw(st.integers(1, 8)),
        N=data.draw(st.integers(1, 20)), lengths=tuple(data.draw(st.lists(st.integers(0, S), min_size=1, max_size=3))))
    assert_equals_the_loop(call, run(call, cores=data.draw(st.integers(1, 7))))


@interpreted
@pytest.mark.slow
def test_a_missing_wait_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The detector of races is no ornament: without the wait for a free place it raises."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    monkeypatch.setattr(gpu_memory.Ring, "claim", gpu_memory.Ring.slot)
    call = call_of("mfa", "none", lengths=(200, 200))
    try:
        with pytest.raises(Exception, match="(?i)race"):
            jax.block_until_ready(run(call, cores=1))
    finally:
        gpu_callbacks.reset_gpu_interpret_mode_state()


CONFIGS: dict[str, Any] = {
    "mfa": MFAConfig(num_heads=4, latent_dim=64, query_rank=32),
    "mfa_kr": MFAKRConfig(num_heads=4, latent_dim=64, query_rank=32),
    "mla": MLAConfig(num_heads=4, nope_dim=32, rope_dim=64, value_dim=32, latent_dim=64),
}


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("variant", CONFIGS)
def test_prefill_and_decoding_equal_the_full_forward(variant: str) -> None:
    """Of a whole layer in bfloat16, against the same layer through the definition."""
    config, D, prompt, capacity = CONFIGS[variant], 32, 60, 72
    x = jax.random.normal(jax.random.key(1), (2, prompt + 8, D), jnp.bfloat16)
    positions = jnp.broadcast_to(jnp.arange(prompt + 8), (2, prompt + 8))

    def outputs(implementation: str) -> jax.Array:
        layer = build(config, PositionConfig(), dtype=jnp.bfloat16, serving=Serving(decode=implementation))
        params = layer.init(jax.random.key(0), x, positions)
        cache = init_cache(config, 2, capacity, jnp.bfloat16)
        first, cache = layer.apply(params, x[:, :prompt], positions[:, :prompt], cache=cache)
        rest = []
        for t in (prompt, prompt + 4):
            y, cache = layer.apply(params, x[:, t : t + 4], positions[:, t : t + 4], cache=cache)
            rest.append(y)
        return jnp.concatenate([first, *rest], axis=1).astype(jnp.float32)

    found, wanted = outputs(BACKEND), outputs("reference")
    scale = float(jnp.abs(wanted).max())
    np.testing.assert_allclose(found, wanted, atol=4 * 2**-8 * scale, rtol=0)


# ---- without an interpreter --------------------------------------------------------------------------------------


def plan_for(case: Case, cores: int = 132) -> gpu_plan.Plan:
    return gpu_memory.with_stages(gpu_plan.make_plan(case.call(8192), 64, case.K, cores))


@pytest.mark.parametrize(("name", "stages", "key_slots", "shares", "roles"), [
    ("MFA 64x256", 2, 1, 132, 3), ("MFA-KR 64x256", 3, 2, 132, 4), ("MLA 128x(512+64)", 2, 1, 66, 4),
    ("MFA 64x256 int8", 3, 1, 132, 4), ("MFA-KR 64x256 int8", 4, 2, 132, 4), ("MLA 128x(512+64) int8", 2, 1, 66, 4),
    ("GQA 64/4x128", 6, 1, 132, 3), ("GQA 64/4x128 int8", 6, 2, 132, 4)])
def test_plans_fit_an_sm(name: str, stages: int, key_slots: int, shares: int, roles: int) -> None:
    plan = plan_for(CASES[name])
    assert (plan.stages, plan.key_slots, plan.shares, plan.roles) == (stages, key_slots, shares, roles)
    assert gpu_memory.bytes_of(plan) <= gpu_memory.LIMIT
    registers = mosaic_gpu.registers_of(plan)
    # They draw on what the block of threads was launched with: more would be waited for in vain.
    wanted = sum(registers.values()) + (len(plan.parts) - 1) * registers["average"]
    assert wanted <= plan.roles * mosaic_gpu._LAUNCHED[plan.roles] <= 65536 // 128
    assert len(registers) + len(plan.parts) - 1 == plan.roles


def test_the_table_that_is_kept_is_of_these_plans() -> None:
    """`experiments.aot_gpu --output experiments/results/kernels` writes it anew."""
    path = Path(aot_gpu.__file__).parent / "results/kernels/gpu.json"
    for line in json.loads(path.read_text())["lines"]:
        plan = aot_gpu.plan_of(aot_gpu.EVERY[line["case"]])
        kept = tuple(line[name] for name in ("stages", "roles", "shares", "shared_bytes"))
        assert kept == (plan.stages, plan.roles, plan.shares, gpu_memory.bytes_of(plan)), line["case"]


def test_the_list_of_work_is_cut_into_equal_shares() -> None:
    """Of two key heads with rows of 1, 3 and 1 blocks: 10 items over 4 shares of 3."""
    plan = plan_for(Case(2, 64, K=2))._replace(B=3, shares=4)
    work = gpu_plan.divide(jnp.array([0, 129, 5]), plan)
    assert work.stop.tolist() == [1, 4, 5]
    shares = [gpu_plan.segments_of(plan, work, jnp.int32(c)) for c in range(4)]
    assert [(int(first), int(stop)) for first, stop in shares] == [(0, 2), (1, 4), (4, 5), (5, 6)]
    segments = [gpu_plan.segment_of(plan, work, jnp.int32(c), 0, jnp.int32(s)) for c, s in [(0, 1), (1, 1), (1, 3)]]
    assert [(int(x.row), int(x.head), int(x.block), int(x.count), int(x.out)) for x in segments] == [
        (1, 0, 0, 2, 2), (1, 0, 2, 1, 6), (0, 1, 0, 1, 1)]


@pytest.mark.parametrize("name", aot_gpu.EVERY)
def test_every_case_lowers_for_a_gpu_or_says_why_not(name: str) -> None:
    """Without a GPU and without CUDA: the program that a GPU's compiler would be given."""
    case = aot_gpu.EVERY[name]
    reason = mosaic_gpu.obstacle(case.call(8192), H100)
    if name in aot_gpu.REFUSED:
        assert reason is not None
    else:
        assert reason is None or not SERVES, reason
        arrays = case.arguments(4, 8192, jax.ShapeDtypeStruct)
        checks = [DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
        lowered = export(jax.jit(functools.partial(aot_gpu.kernel, case)), platforms=["cuda"], disabled_checks=checks)
        assert len(re.findall(r"custom_call @mosaic_gpu_v2", lowered(arrays).mlir_module())) == 2


@pytest.mark.parametrize("name", ["MFA 64x256", "MFA-KR 64x256 int8"])
@pytest.mark.parametrize(("S", "whole_tiles"), [(200, True), (204, False), (205, False)])
def test_a_cache_of_whole_tiles_lowers_and_no_other(name: str, S: int, whole_tiles: bool) -> None:
    case = CASES[name]
    lower = export(jax.jit(functools.partial(aot_gpu.kernel, case)), platforms=["cuda"],
                   disabled_checks=[DisabledSafetyCheck.custom_call("mosaic_gpu_v2")])
    assert ("multiple of 8" in str(mosaic_gpu.obstacle(case.call(S), H100))) == (not whole_tiles)
    with contextlib.nullcontext() if whole_tiles else pytest.raises((ValueError, AssertionError)):
        lower(case.arguments(4, S, jax.ShapeDtypeStruct))


@pytest.mark.parametrize(("changes", "device", "reason"), [
    ({}, Device("cpu"), "runs on NVIDIA GPUs, and this is cpu"),
    ({}, Device("gpu", "NVIDIA A100-SXM4-80GB", 8.0, 108), "compute capability 9.0, and NVIDIA A100-SXM4-80GB has 8.0"),
    ({}, Device("gpu", "NVIDIA B200", 10.0, 148), "compute capability 9.0, and NVIDIA B200 has 10.0"),
    ({"dtype": jnp.dtype("float32")}, H100, "takes queries of bfloat16, not float32"),
    ({"cache_dtype": jnp.dtype("float32")}, H100, "reads caches of bfloat16, int8 or float8_e4m3fn, not float32"),
    ({"H": 80, "h": 80}, H100, "multiples of 64, not keys of 80 and values of 80"),
    ({"H": 640, "h": 640}, H100, "averages values up to 512 wide, not 640"),
    ({"S": 60}, H100, "S=60 must be a multiple of 8 and at least 64"),
    ({"S": 8190}, H100, "S=8190 must be a multiple of 8 and at least 64"),
    ({"S": 204}, H100, "S=204 must be a multiple of 8 and at least 64"),
    ({"H": 320, "h": 320, "rope": True}, H100, "turns keys up to 256 wide, not 320"),
])
def test_a_call_that_it_cannot_serve_is_named(changes: dict[str, Any], device: Device, reason: str) -> None:
    call = Call(**{"T": 1, "N": 64, "S": 8192, "H": 256, "h": 256, "dtype": jnp.dtype("bfloat16"),
                   "cache_dtype": jnp.dtype("bfloat16"), "shared": False, **changes})
    with pytest.raises(NotImplementedError, match=f"implementation='mosaic_gpu': .*{reason}.*; use one of auto, .*xla"):
        resolve("mosaic_gpu", call, device)
    assert resolve("auto", call, device) == "xla"


def test_auto_takes_it_on_hopper() -> None:
    """With JAX 0.10 it would be a program that no interpreter has checked."""
    call = CASES["MFA 64x256"].call(8192)
    assert resolve("auto", call, H100) == ("mosaic_gpu" if SERVES else "xla")
    unknown = dataclasses.replace(H100, cores=0)
    assert ("does not say how many" if SERVES else "JAX 0.11") in str(mosaic_gpu.obstacle(call, unknown))


@pytest.mark.skipif(not SERVES, reason="the kernel serves from JAX 0.11 on")
def test_what_is_accepted_fits_and_the_rest_says_how_large_it_is() -> None:
    widths, refused = range(64, 641, 64), set()
    for H, h, shared, rope, alibi, dtype in itertools.product(
        widths, widths, (True, False), (True, False), (True, False), ("bfloat16", "int8")):
        if h > H or (rope and not shared):
            continue
        call = Call(1, 64, 8192, H, h, jnp.dtype("bfloat16"), jnp.dtype(dtype), shared, rope, alibi)
        reason = mosaic_gpu.obstacle(call, H100)
        if reason is None:
            assert gpu_memory.bytes_of(gpu_memory.with_stages(gpu_plan.make_plan(call))) <= gpu_memory.LIMIT
        elif "shared memory" in reason:
            refused.add((H, h, shared, alibi, dtype))
    assert (576, 512, True, True, "int8") in refused and (384, 384, False, False, "bfloat16") in refused
    assert (576, 512, True, True, "bfloat16") not in refused


@pytest.mark.slow
@pytest.mark.skipif(not aot_gpu.can_compile(), reason="it takes JAX 0.11 and its CUDA plug-in: make aot-gpu")
def test_every_case_compiles_for_an_h100_without_spills() -> None:
    done = subprocess.run([sys.executable, "-m", "experiments.aot_gpu"], capture_output=True, text=True, timeout=900,
                          env={**os.environ})
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    kernels, programs, layouts = lines[:-9], lines[-9:-3], lines[-3:]
    assert {x["case"]: x["exchanges"] for x in layouts} == {
        "layout heads": [], "layout batch": ["all-to-all"],
        "layout sequence": ["all-gather", "all-reduce", "reduce-scatter"]}
    assert {x["case"] for x in kernels} == set(aot_gpu.EVERY) - set(aot_gpu.REFUSED)
    assert all(x["spill_bytes"] == 0 for x in kernels), kernels
    assert all(x["case"].startswith("generate") and x["kernels"] and not x["copies"] for x in programs), programs


def test_copies_are_found_in_loops() -> None:
    program = """
%region_1 (p: s8[4,8192]) -> s8[4,8192] {
  %gte = s8[4,8192]{1,0} get-tuple-element(%p), index=0
  %input_scatter_fusion = s8[4,8192]{1,0} fusion(%gte), kind=kInput, metadata={}
  %other = s8[4,81920]{1,0} fusion(%gte)
  %pair = (f32[4]{0}, s8[4,8192]{1,0}) fusion(%gte), kind=kLoop
  ROOT %copy.1 = s8[4,8192]{0,1} copy(%gte), metadata={}
}
ENTRY %main () -> s8[4,8192] {
  %copy.2 = s8[4,8192]{0,1} copy(%x)
  ROOT %w = s8[4,8192] while(%copy.2), condition=%c, body=%region_1
}
"""
    assert aot_gpu.copies(program) == ["pair (f32[4]{0}, s8[4,8192]{1,0})", "copy.1 s8[4,8192]{0,1}"]
