"""The GPU decode kernel (Pallas, Mosaic GPU, for Hopper): copies by TMA into a ring, and a warpgroup for each job.

The blocks of all rows form one list of work, made from the lengths before the kernel starts, and every SM takes an
equal share of it, whatever the lengths: rows that end inside a share, and one that goes on in the next, whose results
are merged by their log-sum-exp in a second small kernel. Of an SM's warpgroups one fetches blocks, one scores and takes
the softmax, one or two hold the sums of 256 value columns each, so that the softmax of a block overlaps the products of
the one before; one more turns keys that are stored before rope, and widens what is stored in 8 bits (beside two that
average there are no registers for it, and the one that scores widens).

Keys before rope are turned by `R(origin) R(offset)`: angles of the origins, a row for each half of a block that is
fetched with it, and those of the offsets, a table in shared memory, combine by the angle sum formulas. The same tile,
as it was stored, serves as values.

Where the queries of a key head are an even number of tiles (MLA, drafted tokens), two SMs with a tile each form a
cluster: each fetches half of a block into the memory of both, and a place is free when both have read it.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Num

from mfa_jax.kernels.calls import SCALED, Call, Device, default_device
from mfa_jax.kernels.gpu_memory import PAIR, ROWS, key_ring, rings, scratch, value_ring, with_stages
from mfa_jax.kernels.gpu_merge import merge
from mfa_jax.kernels.gpu_plan import BLOCK, OFFSETS, PART, TILE, Plan, Work, divide, make_plan, segment_of, segments_of
from mfa_jax.kernels.gpu_roles import LOG2E, LSE_COLUMNS, average, fetch, prepare, score
from mfa_jax.kernels.rows import from_rows, to_rows

_INTERPRETED_CORES = 4
_INTERPRETER_THREADS = 8
"""The interpreter runs each warpgroup of a cluster in a thread of XLA's pool and hangs where there are too few."""
_HOPPER = 9.0
"""Compute capability whose matrix instructions the kernel uses; Blackwell does not have them."""
_LAUNCHED = {3: 168, 4: 128}
"""Registers a thread that so many warpgroups start with: 65536 over all threads, rounded down to 8."""
_REGISTERS = {
    "as stored": {"fetch": 40, "score": 168, "average": 232},
    "turned": {"fetch": 32, "score": 128, "average": 168, "prepare": 184},
    "widened": {"fetch": 40, "score": 144, "average": 176, "prepare": 152},
    "widened and turned": {"fetch": 24, "score": 136, "average": 168, "prepare": 184},
    "two parts": {"fetch": 40, "score": 136, "average": 168},
}
"""Registers a thread of each role, by what is done to keys, or that there are two parts of value columns. Found by
compiling for sm_90a with the ptxas of CUDA 13: what a role needs without spills, and in all at most what they were
launched with: a warpgroup that asks for more waits for ever."""


def registers_of(plan: Plan) -> dict[str, int]:
    """Registers a thread of each role."""
    done = [how for how, due in (("widened", plan.narrow), ("turned", plan.rope)) if due]
    return _REGISTERS["two parts" if len(plan.parts) > 1 else " and ".join(done) or "as stored"]


def obstacle(call: Call, device: Device, interpret: bool = False) -> str | None:
    """Why the kernel can't serve a call on a device; None if it can."""
    if interpret:
        threads = max(os.cpu_count() or 1, jax.device_count())
        if threads < _INTERPRETER_THREADS:
            return (f"Pallas' interpreter needs {_INTERPRETER_THREADS} threads of XLA, and there are {threads}; set "
                    f"jax_num_cpu_devices to {_INTERPRETER_THREADS}")
    elif device.platform != "gpu":
        return (f"runs on NVIDIA GPUs, and this is {device.platform}; mosaic_gpu_interpret runs its program anywhere, "
                "slowly")
    elif device.compute_capability != _HOPPER:
        return (f"is written for the matrix instructions of Hopper, compute capability {_HOPPER}, and "
                f"{device.kind or 'this'} has {device.compute_capability}")
    cache = jnp.dtype(call.cache_dtype)
    if call.dtype != jnp.bfloat16:
        return f"takes queries of bfloat16, not {jnp.dtype(call.dtype)}: Hopper multiplies float32 in 10 bits only"
    if cache not in (jnp.bfloat16, *SCALED):
        return f"reads caches of bfloat16, int8 or float8_e4m3fn, not {cache}"
    if call.H % TILE or call.h % TILE:
        return f"takes widths that are multiples of {TILE}, not keys of {call.H} and values of {call.h}"
    if call.h > 2 * PART:
        return f"averages values up to {2 * PART} wide, not {call.h}"
    if call.S < BLOCK or call.S % ROWS:
        return (f"copies {BLOCK} tokens at a time, in tiles of {ROWS}: S={call.S} must be a multiple of {ROWS} and at "
                f"least {BLOCK}")
    if call.rope and call.H > PART:
        return f"turns keys up to {PART} wide, not {call.H}"
    if jax.__version_info__ < (0, 11):
        return f"is checked in an interpreter that came with JAX 0.11, and this is {jax.__version__}"
    if not interpret and device.cores == 0:
        return f"divides the work over SMs, and {device.kind} does not say how many it has"
    try:
        with_stages(make_plan(call))
    except NotImplementedError as error:
        return str(error)
    return None


def decode_attention(
    q: Float[Array, "B T N H"], k: Num[Array, "B *K S H"], v: Num[Array, "B *K S h"] | None, lengths: Int[Array, " B"],
    *, scale: float, inv_freq: Float[Array, " W"] | None, alibi_slopes: Float[Array, " N"] | None,
    k_scale: Float[Array, "B *K S"] | None, v_scale: Float[Array, "B *K S"] | None, value_width: int | None,
    dtype: Any = jnp.float32, cores: int | None = None, interpret: Any = False,
) -> tuple[Float[Array, "B T N h"], Float[Array, "B T N"]]:
    """`kernels.decode_attention` on a Hopper GPU; products take bfloat16, sums and softmax are float32.

    Args:
      dtype: of the averages.
      cores: SMs to divide the work over; None for the default device's, and for 4 where that is interpreted.
      interpret: False to compile, or `pallas.mosaic_gpu.InterpretGPUParams`.
    """
    if k.ndim == 3:
        k = k[:, None]
        v, k_scale, v_scale = (None if x is None else x[:, None] for x in (v, k_scale, v_scale))
    B, T, N, H = q.shape
    K, S = k.shape[1:3]
    h = v.shape[-1] if v is not None else value_width or H
    cores = cores or (_INTERPRETED_CORES if interpret else default_device().cores)
    call = Call(T, N // K, S, H, h, q.dtype, k.dtype, v is None, inv_freq is not None, alibi_slopes is not None)
    plan = with_stages(make_plan(call, B, K, cores, scale))
    inputs = {"q": to_rows(q, K, plan.M), "k": k, "v": v, "k_scale": k_scale, "v_scale": v_scale}
    if alibi_slopes is not None:
        slopes = jnp.broadcast_to((alibi_slopes * LOG2E)[:, None], (1, T, N, 1))
        inputs["slopes"] = to_rows(slopes, K, plan.M)[0, :, :, 0]
    if inv_freq is not None:
        inputs |= _rope_tables(inv_freq, plan)
    work = divide(lengths, plan)
    out, lse = _call(plan, work, {name: x for name, x in inputs.items() if x is not None}, interpret)
    out, lse = merge(plan, work, out, lse, dtype, interpret)
    return from_rows(out, B, T, N, K), from_rows(lse, B, T, N, K)[..., 0]


def _rope_tables(inv_freq: Float[Array, " W"], plan: Plan) -> dict[str, Array]:
    """Cosines and sines of the origins in each block, `[blocks, BLOCK / OFFSETS, W]`, and of offsets from there,
    `[OFFSETS, W]` in half precision: 2^-12 off at most."""
    starts = jnp.minimum(jnp.arange(-(-plan.S // BLOCK)) * BLOCK, plan.S - BLOCK)[:, None]
    origins, offsets = starts + jnp.arange(0, BLOCK, OFFSETS), jnp.arange(OFFSETS)
    out: dict[str, Array] = {}
    for name, position, dtype in (("origin", origins, jnp.float32), ("offset", offsets, jnp.float16)):
        angle = position[..., None].astype(jnp.float32) * inv_freq
        out |= {f"{name}_cos": jnp.cos(angle).astype(dtype), f"{name}_sin": jnp.sin(angle).astype(dtype)}
    return out


def _call(
    plan: Plan, work: Work, inputs: dict[str, Array], interpret: Any
) -> tuple[Float[Array, "P M h"], Float[Array, "P M L"]]:
    """Results of each row of each key head, then those of rows that a share goes on with."""
    names = (*Work._fields, *inputs, "out", "lse")
    places = plan.B * plan.K + plan.shares - 1
    results = tuple(jax.ShapeDtypeStruct((places, plan.M, width), jnp.float32) for width in (plan.h, LSE_COLUMNS))
    options: dict[str, Any] = {"interpret": interpret} if interpret else {}
    if plan.cluster > 1:
        options |= {"cluster": (plan.cluster,), "cluster_names": (PAIR,)}

    def body(*found: Any, **shared: Any) -> None:
        _roles(plan, Work(*found[:len(Work._fields)]), dict(zip(names, found, strict=True)) | shared, bool(interpret))

    program = plgpu.kernel(
        body, out_type=results, scratch_types=scratch(plan), grid=(plan.M // TILE // plan.cluster, plan.shares),
        grid_names=("tile", "share"), num_threads=plan.roles, thread_name="role",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        kernel_name="decode_attention", **options)
    out, lse = program(*work, *inputs.values())
    return out, lse


def _roles(plan: Plan, work: Work, refs: dict[str, Any], interpret: bool) -> None:
    """Gives each warpgroup its job; all walk the same segments."""
    share, tile, warpgroup = (lax.axis_index(name) for name in ("share", "tile", "role"))
    if plan.cluster > 1:
        tile = tile * plan.cluster + lax.axis_index(PAIR)
    tiles = rings(plan, refs, interpret)
    first, stop = segments_of(plan, work, share)

    def run(at: int, name: str, job: Any, begin: Any = None, **options: Any) -> None:
        @pl.when(warpgroup == at)
        def _() -> None:
            launched, registers = _LAUNCHED[plan.roles], registers_of(plan)[name]
            if registers != launched and not interpret:
                plgpu.set_max_registers(registers, action="increase" if registers > launched else "decrease")
            if begin is not None:
                begin(plan, refs, tiles)
            lax.fori_loop(
                first, stop,
                lambda s, i: job(plan, refs, tiles, segment_of(plan, work, share, tile, s), i, **options), jnp.int32(0))

    run(0, "score", score, _begin_scoring)
    for at, part in enumerate(plan.parts, 1):
        accumulate = _accumulate_interpreted if interpret else _accumulate
        run(at, "average", average, _begin_averaging, part=part, accumulate=accumulate)
    if plan.prepares and not plan.scorer_prepares:
        run(plan.roles - 2, "prepare", prepare, _begin_preparing)
    run(plan.roles - 1, "fetch", fetch)
    if plan.cluster > 1:
        # Memory of a block of threads that has ended must not be written by another.
        plgpu.barrier_arrive(refs["done"])
        plgpu.barrier_wait(refs["done"])


def _begin_scoring(plan: Plan, refs: dict[str, Any], tiles: Any) -> None:
    key_ring(plan, tiles).release_all()
    if plan.narrow:
        tiles["scales"].release_all()
    if plan.scorer_prepares:
        _begin_preparing(plan, refs, tiles)


def _begin_averaging(plan: Plan, refs: dict[str, Any], tiles: Any) -> None:
    value_ring(plan, tiles).release_all()
    tiles["weights"].release_all()


def _begin_preparing(plan: Plan, refs: dict[str, Any], tiles: Any) -> None:
    tiles["k"].release_all()
    if plan.narrow and not plan.shared:
        tiles["v"].release_all()
    if plan.rope:
        for name in ("cos", "sin"):
            plgpu.copy_gmem_to_smem(refs[f"offset_{name}"], refs[f"offset_{name}_tile"], refs["offset_full"])
        plgpu.barrier_wait(refs["offset_full"])


def _accumulate(sums: tuple[Any, ...], weights: Any, values: list[Any]) -> tuple[Any, ...]:
    """All products are under way before the first is waited for."""
    def products(accumulators: tuple[Any, ...]) -> None:
        for acc, columns in zip(accumulators, values, strict=True):
            plgpu.wgmma(acc, weights, columns)

    return tuple(pl.run_state(products)(tuple(plgpu.ACC.init(x) for x in sums)))


def _accumulate_interpreted(sums: tuple[Any, ...], weights: Any, values: list[Any]) -> tuple[Any, ...]:
    """The interpreter can't start a product from sums."""
    def product(acc: Any, columns: Any) -> Any:
        plgpu.wgmma(acc, weights, columns)
        return acc[...]

    return tuple(x + pl.run_scoped(functools.partial(product, columns=columns), plgpu.ACC(x.shape, jnp.float32))
                 for x, columns in zip(sums, values, strict=True))
