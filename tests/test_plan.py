"""The planner: what it reads in compiled programs, what it makes of it, and one real compilation for a TPU."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments import plan as script
from experiments import plan_report
from mfa_jax import axes, capacity
from mfa_jax.config import DataConfig, MeshConfig, TrainConfig
from mfa_jax.plan import chips, compiler, costs, flops, groups, hlo, programs, report, search
from mfa_jax.presets import model_preset
from mfa_jax.train import compiling

ROOT = Path(__file__).resolve().parent.parent
V5P = chips.parse_topology("v5p:4x4x4")


# ---- compiled programs whose content is known ------------------------------------------------------------------


def compiled(function: object, *arrays: jax.ShapeDtypeStruct) -> costs.Costs:
    return costs.count(hlo.parse(jax.jit(function).lower(*arrays).compile().as_text()))  # type: ignore[call-overload]


def f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_products_count_as_often_as_their_loops_run() -> None:
    def f(x: jax.Array, w: jax.Array) -> jax.Array:
        def outer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            return jax.lax.fori_loop(0, 3, lambda _, y: jnp.tanh(y @ w), x), None

        return jax.lax.scan(outer, x, w)[0]

    found = compiled(f, f32(8, 16), f32(5, 16, 16))
    assert found.flops == 5 * 3 * 2 * 8 * 16 * 16 and not found.unknown_loops


def test_a_loop_that_the_data_end_counts_once_and_is_named() -> None:
    def f(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda y: jnp.sum(y) > 0, lambda y: y @ w, x)

    module = hlo.parse(jax.jit(f).lower(f32(8, 16), f32(16, 16)).compile().as_text())
    found = costs.count(module)
    assert found.flops == 2 * 8 * 16 * 16 and len(found.unknown_loops) == 1
    assert costs.count(module, costs.decode_loop(module)).flops == found.flops
    with pytest.raises(ValueError, match="has 0 loops"):
        costs.decode_loop(hlo.parse(jax.jit(jnp.sin).lower(f32(2)).compile().as_text()))


def test_of_a_conditional_the_dearest_branch_counts() -> None:
    def f(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w @ w)

    assert compiled(f, f32(8, 16), f32(16, 16)).flops == 2 * 2 * 8 * 16 * 16


def test_of_a_slice_and_of_an_update_in_place_only_the_part_is_read_and_written() -> None:
    """A scan over 100 rows of 4 KB reads each once; whole operands would be 400 KB a step."""
    def f(x: jax.Array, rows: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda y, row: (jnp.tanh(y + row), None), x, rows)[0]

    found = compiled(f, f32(1024), f32(100, 1024))
    assert 100 * 3 * 4096 <= found.nbytes <= 100 * 8 * 4096


MESH_SIZES = (1, 4, 1, 1, 2)


@pytest.mark.parametrize(("kind", "crossed", "nbytes", "sent"), [
    ("all-gather", ("fsdp",), 4096, 3072),
    ("all-reduce", ("tensor",), 4096, 4096),
    ("all-reduce", ("fsdp", "tensor"), 4096, 7168),
    ("reduce-scatter", ("fsdp",), 4096, 3072),
    ("all-to-all", ("fsdp",), 4096, 3072),
    ("collective-permute", ("tensor",), 4096, 4096),
])
def test_collectives_by_kind_bytes_and_mesh_axis(kind: str, crossed: tuple[str, ...], nbytes: int, sent: float) -> None:
    """In a scan of seven, so that each is run seven times."""
    mesh = axes.make_mesh(MESH_SIZES)
    n = int(np.prod([mesh.shape[axis] for axis in crossed]))

    def exchange(x: jax.Array) -> jax.Array:
        if kind == "all-gather":
            return jax.lax.all_gather(x, crossed, tiled=True).reshape(n, -1).sum(0)
        if kind == "all-reduce":
            return jax.lax.psum(x, crossed)
        if kind == "reduce-scatter":
            return jnp.tile(jax.lax.psum_scatter(x, crossed, tiled=True), n)
        if kind == "all-to-all":
            return jax.lax.all_to_all(x.reshape(n, -1), crossed, 0, 0).ravel()
        return jax.lax.ppermute(x, crossed, [(i, (i + 1) % n) for i in range(n)])

    local = 1024 // n if kind == "all-gather" else 1024

    def f(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda y, _: (jnp.cos(exchange(y)), None), x, length=7)[0]

    everywhere = PartitionSpec(("fsdp", "tensor"))
    array = jax.ShapeDtypeStruct((8 * local,), jnp.float32, sharding=NamedSharding(mesh, everywhere))
    with jax.set_mesh(mesh):
        local_f = jax.shard_map(f, in_specs=everywhere, out_specs=everywhere, check_vma=False)
        found = costs.count(hlo.parse(jax.jit(local_f).lower(array).compile().as_text()))
    ((collective, times),) = found.collectives
    assert (collective.kind, collective.nbytes, times, len(collective.group)) == (kind, nbytes, 7, n)
    places = np.array(np.unravel_index(np.array(collective.group), mesh.devices.shape))
    assert tuple(a for a, row in zip(mesh.axis_names, places, strict=True) if len(set(row.tolist())) > 1) == crossed
    assert chips.bytes_sent(kind, nbytes, n) == sent


@pytest.mark.parametrize(("rows", "buffer"), [(2048, 8192), (8192, 2048)])
def test_a_ragged_exchange_counts_the_rows_that_a_device_has(rows: int, buffer: int) -> None:
    """On the way there the buffer has room for the worst case, on the way back the rows have; the smaller is 8192
    bytes."""
    text = f"""ENTRY %main (a: s32[]) -> s32[] {{
  %a = bf16[{rows},2]{{1,0}} parameter(0)
  %b = bf16[{buffer},2]{{1,0}} parameter(1)
  %c = s32[4]{{0}} parameter(2)
  ROOT %r = bf16[{buffer},2] ragged-all-to-all(%a, %b, %c, %c, %c, /*index=5*/%c), replica_groups={{{{0,1,2,3}}}}
}}
"""
    found = costs.count(hlo.parse(text))
    ((collective, times),) = found.collectives
    assert (collective.kind, collective.nbytes, times, collective.group) == ("all-to-all", 8192, 1, (0, 1, 2, 3))
    assert chips.bytes_sent(collective.kind, collective.nbytes, 4) == 6144
    assert found.nbytes == 2 * 8192, "it fills the buffer in place"


def test_of_grouped_products_the_rows_of_a_balanced_router_count() -> None:
    """Arrays with room for 1024 rows on each of 4 devices of the axis `expert`, of 2 experts each."""
    text = """ENTRY %main (a: s32[]) -> s32[] {
  %s = s32[3]{0} parameter(0)
  %x = bf16[1024,64]{1,0} parameter(1)
  %w = bf16[2,64,32]{2,1,0} parameter(2)
  %gmm.1 = bf16[1024,32]{1,0} custom-call(%s, %x, %w), custom_call_target="tpu_custom_call"
  ROOT %tgmm.1 = bf16[2,64,32]{2,1,0} custom-call(%s, %x, %gmm.1), custom_call_target="tpu_custom_call"
}
"""
    for shards in (1, 4):
        found = costs.count(hlo.parse(text), expert_shards=shards)
        assert found.flops == 2 * 2 * 1024 // shards * 64 * 32
        assert found.nbytes == 2 * (12 + 2 * (1024 // shards * (64 + 32) + 2 * 64 * 32))


@pytest.mark.parametrize(("text", "group"), [
    ("channel_id=1, replica_groups={{0,2},{1,3}}, use_global_device_ids=true", (0, 2)),
    ("replica_groups=[2,4]<=[8], dimensions={0}", (0, 1, 2, 3)),
    ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", (0, 4)),
    ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}, to_apply=%add", (0, 1, 4, 5)),
    ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}, to_apply=%add", (0, 2)),
    ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}, to_apply=%add", (0, 1)),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, dimensions={0}", (0, 2)),
    ("source_target_pairs={{0,0},{1,3},{3,1}}, metadata={}", (1, 3)),
    ("replica_groups=mesh['a'=8] {'a':(1)2,'a':(4)2}", ()),  # two parts of an axis: not understood
    ("replica_groups=unheard-of", ()),
])
def test_groups_in_every_notation(text: str, group: tuple[int, ...]) -> None:
    assert groups.first_group(f", {text}") == group


def test_products_as_a_tpu_program_writes_them() -> None:
    """Two lines of such a program: a batched product is a convolution whose window meets one position a batch."""
    text = """HloModule m

ENTRY %main (a: bf16[4,256,64], b: bf16[1,64,84], c: bf16[8,128,32], d: bf16[8,32,16]) -> bf16[8,128,16] {
  %a = bf16[4,256,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[1,64,84]{2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  %c = bf16[8,128,32]{2,1,0} parameter(2)
  %d = bf16[8,32,16]{2,1,0} parameter(3)
  %plain = bf16[4,256,84]{2,1,0} convolution(%a, %b), window={size=1}, dim_labels=0bf_0io->0bf, metadata={x={
"y": "z"
}}
  ROOT %batched = bf16[8,128,16]{2,1,0} convolution(%c, %d), window={size=8 stride=7 lhs_dilate=8}, dim_labels=LABELS
}, execution_thread="sparsecore"

%after (x: f32[]) -> f32[] {
  ROOT %x = f32[] parameter(0)
}
""".replace("LABELS", "0bf_0io->0bf")
    module = hlo.parse(text)
    assert list(module.computations) == ["main", "after"]
    home = module.computations["main"]
    assert flops.instruction_flops(home, home.instructions["plain"]) == 2 * 4 * 256 * 64 * 84
    assert flops.instruction_flops(home, home.instructions["batched"]) == 2 * 8 * 128 * 32 * 16
    plain = next(w for w in costs.count(module).work if w.name == "plain")
    assert plain.nbytes == 2 * (4 * 256 * 64 + 4 * 256 * 84), "what lies on the chip is not read from HBM"


def test_kernels_have_the_flops_of_their_formulas() -> None:
    def call(name: str, operands: str, results: str) -> float | None:
        names = ", ".join(f"%p{i}" for i in range(len(operands.split())))
        parameters = "\n".join(f"  %p{i} = {shape} parameter({i})" for i, shape in enumerate(operands.split()))
        text = (f"ENTRY %main (x: s32[]) -> s32[] {{\n{parameters}\n  ROOT %{name} = {results} custom-call({names}), "
                'custom_call_target="tpu_custom_call"\n}\n')
        home = hlo.parse(text).computations["main"]
        return flops.instruction_flops(home, home.root)

    qkv = "s8[1,4,2] bf16[2,18,512,128] bf16[2,512,128] bf16[2,512,64]"
    pairs = 2 * 18 * 512 * 513 / 2
    assert call("splash_mqa_fwd_segmented.1", qkv, "bf16[2,18,512,64]") == 2 * pairs * (128 + 64)
    assert call("splash_mqa_dq.2", qkv, "bf16[2,18,512,128]") == 2 * pairs * (2 * 128 + 64)
    assert call("splash_mqa_dkv.2", qkv, "bf16[2,512,128]") == 2 * pairs * (2 * 128 + 2 * 64)
    grouped = "s32[] s32[9] bf16[1024,64] bf16[8,64,28]"
    assert call("gmm.1", grouped, "bf16[1024,28]") == 2 * 1024 * 64 * 28
    assert call("tgmm.1", "s32[9] bf16[64,1024] bf16[1024,28]", "bf16[8,64,28]") == 2 * 1024 * 64 * 28
    decode = "s32[16] bf16[16,1,32,128] bf16[16,1,4096,128] bf16[16,1,4096,128]"
    assert call("decode_attention.4", decode, "(f32[16,32,128], f32[16,32,128])") == 2 * 16 * 32 * 4096 * 256
    assert call("somebody_elses", qkv, "bf16[2]") is None


# ---- roofline, by hand -----------------------------------------------------------------------------------------


def test_time_on_the_links_of_a_torus() -> None:
    W = 100e9
    assert V5P.chip.link_bandwidth == W
    ring, line = (1, 4, 1), (1, 2, 1)
    assert chips.collective_seconds("all-gather", 8 * 10**9, ring, V5P) == pytest.approx(8e9 * 3 / 4 / (2 * W))
    assert chips.collective_seconds("all-reduce", 8 * 10**9, ring, V5P) == pytest.approx(2 * 8e9 * 3 / 4 / (2 * W))
    assert chips.collective_seconds("reduce-scatter", 10**9, (4, 4, 4), V5P) == pytest.approx(1e9 * 63 / 64 / (6 * W))
    assert chips.collective_seconds("all-gather", 10**9, line, V5P) == pytest.approx(1e9 / 2 / W)
    assert chips.collective_seconds("all-to-all", 10**9, ring, V5P) == pytest.approx(1e9 * 4 / 8 / W)
    assert chips.collective_seconds("all-to-all", 10**9, line, V5P) == pytest.approx(1e9 * 2 / 4 / W)
    assert chips.collective_seconds("collective-permute", 10**9, line, V5P) == pytest.approx(1e9 / W)
    assert chips.collective_seconds("all-reduce", 10**9, (1, 1, 1), V5P) == 0
    assert chips.parse_topology("v5e:8x16").wraps == (False, True)
    assert chips.parse_topology("v5p:2x4x4").wraps == (False, False, False)
    with pytest.raises(ValueError, match="kind='broadcast'"):
        chips.collective_seconds("broadcast", 1, ring, V5P)


@dataclasses.dataclass(frozen=True)
class FakeChip:
    """A device of a slice that is not here."""

    id: int
    coords: tuple[int, int, int]
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5"


def fake_mesh(sizes: tuple[int, ...]) -> Mesh:
    """Chips in their order, 4 x 4 of them in each plane."""
    devices = np.empty(np.prod(sizes), object)
    for i in range(len(devices)):
        devices[i] = FakeChip(i, (i // 16, i // 4 % 4, i % 4))
    return Mesh(devices.reshape(sizes), axes.MESH_AXES)


def test_a_prediction_by_hand() -> None:
    """One product that arithmetic bounds, run ten times, one copy that memory bounds, one gather over `tensor`."""
    tensor = costs.Collective("all-gather", 4 * 10**9, (0, 1, 2, 3), "")
    fsdp = costs.Collective("all-reduce", 10**9, tuple(range(0, 64, 4)), "")
    work = (costs.Work("product", 10, flops=459e12, nbytes=10**6), costs.Work("copy", 1, nbytes=2765 * 10**9),
            costs.Work("all-gather", 2, collective=tensor), costs.Work("all-reduce", 1, collective=fsdp))
    found = report.predict(costs.Costs(work, (), ()), 64 * 459e12, V5P, fake_mesh((1, 16, 1, 1, 4)))
    assert (found.flops, found.compute_seconds) == (4590e12, 10)
    assert found.memory_seconds == pytest.approx(1 + 1e7 / 2765e9)
    by_axes = {e.axes: e for e in found.exchanges}
    assert by_axes["tensor",].calls == 2 and by_axes["tensor",].bytes_sent == 2 * 3e9
    assert by_axes["tensor",].seconds == pytest.approx(2 * 4e9 * 3 / 4 / 200e9)
    assert by_axes["fsdp",].seconds == pytest.approx(2 * 1e9 * 15 / 16 / 400e9), "two dimensions of the torus"
    links = 0.03 + 2 * 1e9 * 15 / 16 / 400e9
    assert found.step_seconds == pytest.approx(11) and found.step_seconds_without_overlap == pytest.approx(11 + links)
    assert found.mfu == pytest.approx(1 / 11)


def test_model_flops_of_a_decoded_token() -> None:
    """Step-3's attention at 8192 tokens as published (2.07e10 + 3.27e10), the rest 2 for each active parameter."""
    model = model_preset("step3")
    attention = model.num_layers * capacity.attention_parameters(model.attention, model.model_dim)
    rest = 2 * (capacity.model_parameters(model).active - attention)
    assert report.decoding_flops(model, 8192) - rest == pytest.approx(2.07e10 + 3.27e10, rel=2e-3)


def test_the_compilers_refusals_are_read() -> None:
    error = compiling.DoesNotFitError("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for "
                                      "HLO temporaries (58.50G) exceeds available HBM (15.75G).")
    assert (error.needed, error.limit) == (round(58.5 * 2**30), round(15.75 * 2**30))
    error = compiling.DoesNotFitError("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in "
                                      "memory space hbm. Used 20.03G of 15.75G hbm. Exceeded hbm capacity by 4.28G.")
    assert (error.needed, error.limit) == (round(20.03 * 2**30), round(15.75 * 2**30))
    assert compiling.DoesNotFitError("RESOURCE_EXHAUSTED: out of luck").needed is None


def test_arguments_of_a_device_are_the_closed_forms() -> None:
    """Projections over fsdp and tensor, the embedding too, norms whole; three of each, and 20 bytes a token."""
    mesh, model = axes.make_mesh((1, 4, 1, 1, 2)), model_preset("tiny-mfa")
    config = TrainConfig(model=model, data=DataConfig(batch_size=8, sequence_length=128))
    N, C, Q, D, F, L = 10, 16, 16, model.model_dim, model.ffn_dim, model.num_layers
    assert (model.attention.num_heads, model.attention.latent_dim) == (N, C)
    heads_and_ffn = L * (Q * N * C + N * C * D + 3 * D * F) + model.vocab_size * D
    over_fsdp = L * (D * Q + 2 * D * C)
    norms = L * (2 * D + Q) + D
    state = heads_and_ffn // 8 + over_fsdp // 4 + norms
    found = programs.training_arguments(config, mesh)
    counters = 3 * 4  # the state's, Adam's, the schedule's
    assert found == 3 * 4 * state + 2 * 128 * 20 + counters


# ---- search ----------------------------------------------------------------------------------------------------


def plan_for(topology: chips.Topology, fits: bool) -> report.Plan:
    memory = compiling.Memory(1, 1, 1, 1, 1, 2**30)
    return report.Plan(topology.name, {}, fits, None if fits else 2**40, None, 1.0, memory if fits else None, None,
                       None, None, 0.0, 0.0)


def run_search(monkeypatch: pytest.MonkeyPatch, smallest: dict[str, int]) -> tuple[search.Suggestion, list[str]]:
    """A program that fits on so many chips of v5e or more, by policy, and whose arguments fit on 8."""
    tried: list[str] = []

    def compile_for(topology: chips.Topology, mesh: Mesh, remat: str) -> report.Plan:
        tried.append(f"{topology.name} {remat}")
        return plan_for(topology, topology.size >= smallest[remat])

    monkeypatch.setattr(search, "mesh_of", lambda topology, sizes: fake_mesh(sizes))
    program = search.Program(compile_for, lambda mesh: 2**34 * 8 // mesh.size)
    return search.suggest(program, chips.CHIPS["v5e"], MeshConfig(data=1, fsdp=8, tensor=2)), tried


def test_the_smallest_slice_and_the_fastest_policy_are_found_in_few_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    found, tried = run_search(monkeypatch, {"full": 32, "dots": 32, "none": 300})
    assert (found.topology, found.remat) == ("v5e:4x8", "dots")
    assert len(tried) <= 5 and tried[-2:] == ["v5e:4x8 none", "v5e:4x8 dots"]
    skipped = [t for t in found.tries if not t.compiled]
    assert [t.topology for t in skipped] == ["v5e:2x2"] and "arguments alone take 32.00 GiB" in skipped[0].reason


def test_where_nothing_fits_the_search_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = run_search(monkeypatch, {"full": 512, "dots": 512, "none": 512})
    assert found.topology is None and found.remat is None and not any(t.fits for t in found.tries)


# ---- the command -----------------------------------------------------------------------------------------------


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # Not the suite's flags: they weaken the compiler's optimisation.
    clean = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return subprocess.run([sys.executable, "-m", "experiments.plan", *arguments], cwd=ROOT, capture_output=True,
                          text=True, timeout=600, env={**clean, **environment})


REQUEST = ("--model", "tiny-mfa", "--topology", "v5e:2x2", "--mesh", "fsdp=2,tensor=2", "--batch-tokens", "2048",
           "--seq", "256")


@pytest.mark.parametrize(("changed", "message"), [
    ({"model": "tiny-mfq"}, "'tiny-mfq': must be one of tiny-mha"),
    ({"topology": "v9z:2x2"}, "topology='v9z:2x2': must be one of v5e:AxA, v5p:AxAxA, v6e:AxA"),
    ({"topology": "v5p:4x4"}, "must have 3 numbers, such as v5p:2x2x1"),
    ({"mesh": "fsdp=2,tensors=2"}, "must name axes of data, fsdp, expert, context, tensor once each"),
    ({"mesh": "fsdp=two"}, "fsdp must have a number"),
    ({"mesh": "fsdp=0"}, "fsdp=0: must be at least 1"),
    ({"batch_tokens": 2000}, "batch_tokens=2000: must be a multiple of seq=256"),
    ({"vocab_size": 0}, "vocab_size=0: must be at least 1"),
    ({"cache_dtype": "int8"}, "cache_dtype='int8': must be left out: a training step reads none"),
    ({"decode": True, "remat": "dots"}, "remat='dots': must be left out: decoding reads none"),
    ({"decode": True, "unroll_layers": True}, "unroll_layers=True: must be left out: decoding reads none"),
    ({"decode": True, "accumulate": 2}, "accumulate=2: must be left out: decoding reads none"),
])
def test_bad_input_names_what_would_be_accepted(changed: dict[str, object], message: str) -> None:
    request: dict[str, object] = {"model": "tiny-mfa", "topology": "v5e:2x2", "batch_tokens": 2048, "seq": 256}
    with pytest.raises(ValueError) as error:
        arguments = script.Arguments(**(request | changed))  # type: ignore[arg-type]
        chips.parse_topology(arguments.topology)
        script.mesh_config(arguments.mesh)
    assert message in str(error.value)


def test_a_vocabulary_that_does_not_divide_is_told_with_one_that_does() -> None:
    """Step-3 as published, over 16 shards of heads."""
    arguments = script.Arguments("step3", "v5p:4x4x4", batch_tokens=128, seq=8192, decode=True)
    mesh = fake_mesh((4, 1, 1, 1, 16))
    with pytest.raises(ValueError, match="vocab_size=128815: must be .* tensor=16; .*: --vocab-size 128816$"):
        script.require_vocabulary(arguments, mesh)
    script.require_vocabulary(dataclasses.replace(arguments, vocab_size=128816), mesh)


@pytest.mark.parametrize(("model", "rows", "mesh", "place"), [
    ("mfa", 128, (4, 1, 1, 1, 2), "rows over data x tensor"),
    ("mfa", 1, (1, 1, 1, 1, 2), "positions over tensor"),
    ("mfa", 4, (4, 1, 1, 2, 2), "rows over data, positions over context x tensor"),
    ("mfa", 6, (1, 64, 1, 1, 1), "not split; the same on all chips of fsdp=64"),
    ("mha", 6, (2, 4, 1, 1, 2), "rows over data, key heads over tensor; the same on all chips of fsdp=4"),
    ("mfa", 8, (1, 1, 1, 1, 4), "not split; the same on all chips of tensor=4"),  # nor do 10 heads divide
    ("mfa", 6, (1, 1, 1, 1, 1), "not split"),
])
def test_where_a_cache_lies_is_told_with_what_is_held_more_than_once(
        model: str, rows: int, mesh: tuple[int, ...], place: str) -> None:
    decoding = programs.Decoding(model_preset(f"small-{model}"), rows, 4096)
    assert programs.cache_place(decoding, fake_mesh(mesh)) == place


@pytest.mark.slow
def test_without_the_compiler_it_says_how_to_install_it() -> None:
    done = command(*REQUEST, TPU_LIBRARY_PATH="/nonexistent/libtpu.so")
    assert done.returncode == 2 and "make aot-tpu" in done.stderr and "Traceback" not in done.stderr


needs_libtpu = pytest.mark.skipif(compiler.libtpu() is None, reason="the compiler for TPUs is not there: make aot-tpu")


@pytest.mark.slow
@needs_libtpu
def test_a_slice_that_the_compiler_refuses_is_told_with_those_there_are() -> None:
    done = command(*(word.replace("v5e:2x2", "v5p:3x3x3") for word in REQUEST))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: topology='v5p:3x3x3': the compiler does not know it (")
    assert ", ".join(f"v5p:{shape}" for shape in ("2x2x1", "2x2x2", "2x2x4")) in done.stderr


@pytest.mark.slow
@needs_libtpu
def test_a_real_training_step_against_the_closed_forms() -> None:
    """A model whose parts fill most of their tiles of memory: of tiny's, most of a tile would be padding."""
    request = [word.replace("tiny", "small") for word in REQUEST]
    done = command(*request, "--json", "--no-suggest")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    plan, model = found["plan"], model_preset("small-mfa")
    parameters = capacity.model_parameters(model).total
    assert found["parameters"] == parameters and plan["fits"] and found["predicted_not_measured"]
    # Float32 parameters and two moments over four chips, with what pads them to tiles.
    share = 3 * 4 * parameters / 4
    assert share <= plan["memory"]["arguments"] <= 1.15 * share + 20 * 2048
    assert plan["memory"]["arguments"] <= plan["memory"]["peak"] < 16 * 2**30
    assert plan["model_flops"] == 2048 * capacity.training_flops_per_token(model, 256) / 4
    # Full remat computes the forward pass twice, and splash the scores three times.
    assert 4 / 3 * 0.9 <= plan["prediction"]["flops"] / plan["model_flops"] <= 1.8
    assert not plan["prediction"]["unknown_kernels"] and not plan["prediction"]["unknown_loops"]
    crossed = {tuple(e["axes"]) for e in plan["prediction"]["exchanges"]}
    assert {("fsdp",), ("tensor",)} <= crossed and () not in crossed


@pytest.mark.slow
@needs_libtpu
def test_an_axis_may_be_a_part_of_a_dimension_of_the_torus() -> None:
    done = command("--no-suggest", "--json", "--model", "tiny-mfa", "--topology", "v5p:2x2x4", "--mesh",
                   "fsdp=8,tensor=2", "--batch-tokens", "1024", "--seq", "128")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)["plan"]
    assert plan["mesh"] == {"fsdp": 8, "tensor": 2} and plan["fits"]
    assert {("fsdp",), ("tensor",)} <= {tuple(e["axes"]) for e in plan["prediction"]["exchanges"]}


@pytest.mark.slow
@needs_libtpu
def test_a_sequence_that_the_mesh_splits_against_the_closed_forms() -> None:
    """Two rows of 4096 tokens over four chips: splash on each, and the key and value of each layer gathered."""
    done = command("--model", "small-mfa", "--topology", "v5e:2x2", "--mesh", "context=4,fsdp=1", "--batch-tokens",
                   "8192", "--seq", "4096", "--remat", "none", "--json", "--no-suggest")
    assert done.returncode == 0, done.stderr
    plan, model = json.loads(done.stdout)["plan"], model_preset("small-mfa")
    assert plan["fits"] and not plan["prediction"]["unknown_kernels"] and not plan["prediction"]["unknown_loops"]
    # Splash computes the scores three times, and the rest once.
    assert 0.9 <= plan["prediction"]["flops"] / plan["model_flops"] <= 1.5
    gathered = sum(e["bytes_sent"] for e in plan["prediction"]["exchanges"]
                   if e["kind"] == "all-gather" and e["axes"] == ["context"])
    closed = capacity.sequence_exchange_bytes(model, rows=2, length=4096, shards=4, itemsize=2)
    assert closed <= gathered <= 1.1 * closed, "positions and segments beside them"


@pytest.mark.slow
@needs_libtpu
def test_tables_with_a_suggestion() -> None:
    done = command(*REQUEST)
    assert done.returncode == 0, done.stderr
    for text in ("Memory of one chip", "Predicted from published peaks, not measured", "Collectives of one step",
                 "Smallest slice that fits: v5e:2x2, with remat none."):
        assert text in done.stdout


@pytest.mark.slow
@needs_libtpu
def test_a_real_decoding_loop_and_one_that_does_not_fit() -> None:
    """A cache of 64 rows x 4096 tokens, split over four chips; and one a thousand times as long."""
    request = ("--model", "small-mfa", "--topology", "v5e:2x2", "--mesh", "data=2,tensor=2", "--batch-tokens", "64",
               "--decode", "--json", "--no-suggest")
    done = command(*request, "--seq", "4096")
    assert done.returncode == 0, done.stderr
    plan, model = json.loads(done.stdout)["plan"], model_preset("small-mfa")
    cache = 64 * 4096 * capacity.cache_bytes_per_token(model.attention, model.num_layers, "bfloat16")
    assert cache / 4 <= plan["memory"]["aliased"] <= 1.01 * cache / 4
    # Each cached token is read, but for what the compiler keeps in the 128 MiB on the chip from one token to the next.
    assert cache / 4 - 2**27 <= plan["prediction"]["hbm_bytes"] <= 2 * cache / 4
    assert ["all-to-all", ["tensor"]] in [[e["kind"], e["axes"]] for e in plan["prediction"]["exchanges"]]
    done = command(*request, "--seq", str(4096 * 1024))
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)["plan"]
    assert not plan["fits"] and plan["memory"] is None and plan["prediction"] is None


# ---- the report ------------------------------------------------------------------------------------------------


KEPT = ROOT / "experiments" / "results" / "plan" / "plan.json"


@pytest.mark.parametrize(("name", "X"), [("4", 4), ("8", 8), ("8-parts", 8)])
def test_rows_that_travel_to_experts_are_the_closed_form(name: str, X: int) -> None:
    """There and back: forward, computed again, backward; in parts no more and no less."""
    found, model = json.loads(KEPT.read_text())[f"experts/paper-7b-mfa-{name}"], model_preset("paper-7b-mfa")
    assert model.moe is not None
    rows = found["rows"] * found["seq"] // 64 * model.moe.experts_per_token
    sent = sum(e["bytes_sent"] for e in found["plan"]["prediction"]["exchanges"] if e["kind"] == "all-to-all")
    assert sent == pytest.approx(6 * model.num_layers * rows * model.model_dim * 2 * (X - 1) / X, rel=1e-4)
    title, _, row = plan_report.experts_table([found]).splitlines()
    cells = dict(zip(title.split(" | "), row.split(" | "), strict=True))
    assert float(cells["over expert, GB"]) == pytest.approx(sent / 1e9, rel=0.02)
    assert float(cells["peak, GiB"]) == pytest.approx(found["plan"]["memory"]["peak"] / 2**30, abs=0.01)


def test_a_line_that_does_not_fit_stands_in_the_table_of_experts() -> None:
    lines = json.loads(KEPT.read_text())
    title, _, row = plan_report.experts_table([lines["experts/step3-4"], lines["train/paper-7b-mfa"]]).splitlines()
    assert "does not fit, asks for 109.8" in row and row.count("|") == title.count("|")


def test_a_line_of_other_arguments_is_superseded_and_marked() -> None:
    lines = json.loads(KEPT.read_text())
    found = lines["train/paper-7b-mfa"]
    nbytes = found["plan"]["memory"]["arguments"]
    assert not plan_report.superseded(found, round(nbytes / 1.0005))
    assert plan_report.superseded(found, round(nbytes / 1.02)) and plan_report.superseded(found, 2 * nbytes)
    assert not plan_report.superseded(lines["decode/step3-mha"], 1), "what does not fit has no size to compare"
    first, second = plan_report.table([found, lines["train/paper-7b-mha"]], {found["name"]}).splitlines()[2:]
    assert first.startswith("| train/paper-7b-mfa (superseded) |") and second.startswith("| train/paper-7b-mha |")
