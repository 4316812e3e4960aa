"""The TPU decode kernel (Pallas, Mosaic): copies exactly the valid keys of a cache that stays in HBM.

The blocks of all rows form one list of work, made from the lengths before the kernel starts: its grid ends where the
list ends, so no step is spent on what is not valid, and the copy of the next block overlaps this block's arithmetic
across the border of a row. The last block of a row copies its valid keys, rounded up to 16, and no more. Two programs
compute a block: one without masks that issues the scores of a part before the softmax of the part before it, and one
with masks for the ends of rows. Where a chip has two cores each takes half of the list; the row that straddles the
border is merged by its log-sum-exp.

Keys that are stored before rope turn by their offset in the block, queries back by the start of the block (see
`xla`); the table of offsets is made once a call in VMEM by the angle sum formulas, from two tables of its square root.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Num

from mfa_jax.kernels.calls import default_device
from mfa_jax.kernels.rows import from_rows, to_rows
from mfa_jax.kernels.tpu_block import FLOOR, attend, fill_table
from mfa_jax.kernels.tpu_plan import CHIPS, LANES, TILE, Plan, Work, grain, item_of, make_plan, merge, work_list

_SLOTS = 2
"""Blocks in flight: one is computed while the next is copied."""
_LOG2E, _LN2 = math.log2(math.e), math.log(2)


def decode_attention(
    q: Float[Array, "B T N H"], k: Num[Array, "B *K S H"], v: Num[Array, "B *K S h"] | None, lengths: Int[Array, " B"],
    *, scale: float, inv_freq: Float[Array, " W"] | None, alibi_slopes: Float[Array, " N"] | None,
    k_scale: Float[Array, "B *K S"] | None, v_scale: Float[Array, "B *K S"] | None, value_width: int | None,
    block: int | None = None, chip: str | None = None, interpret: Any = False,
) -> tuple[Float[Array, "B T N h"], Float[Array, "B T N"]]:
    """`kernels.decode_attention` on a TPU; products take the type of `q`, sums and softmax are float32.

    Args:
      block: keys of a block, a multiple of 128; None for what `make_plan` chooses.
      chip: a name of `CHIPS`; None for the default device's, and for v5e where that is interpreted.
      interpret: False to compile, or `pltpu.InterpretParams`.
    """
    if k.ndim == 3:
        k = k[:, None]
        v, k_scale, v_scale = (None if x is None else x[:, None] for x in (v, k_scale, v_scale))
    B, T, N, _ = q.shape
    K = k.shape[1]
    kind = chip or ("TPU v5 lite" if interpret else default_device().kind)
    plan = make_plan(q, k, v, rope=inv_freq is not None, alibi=alibi_slopes is not None, value_width=value_width,
                     chip=CHIPS[kind], block=block)
    M = plan.M
    queries = to_rows(q.astype(jnp.float32) * (scale * _LOG2E), K, M)
    inputs: dict[str, tuple[Array, Any]] = {"q": (queries if plan.rope else queries.astype(q.dtype), "head")}
    if T > 1:
        inputs["draft"] = to_rows(jnp.broadcast_to(jnp.arange(T)[:, None, None], (1, T, N, LANES)), K, M)[0, 0], None
    if alibi_slopes is not None:
        slopes = jnp.broadcast_to((alibi_slopes * _LOG2E)[:, None], (1, T, N, LANES))
        inputs["slopes"] = to_rows(slopes, K, M)[0], "key_head"
    if inv_freq is not None:
        inputs |= _rope_tables(inv_freq, plan)
    inputs |= {name: (x, "hbm") for name, x in (("k", k), ("v", v)) if x is not None}
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    # A copy of scales ends at whole lanes.
    inputs |= {name: (jnp.pad(x[:, :, None], ((0, 0),) * 3 + ((0, -plan.S % LANES),)), "hbm")
               for name, x in scales.items() if x is not None}
    work = work_list(lengths, plan)
    out, lse = _call(plan, work, inputs, CHIPS[kind].vmem_bytes, interpret)
    out, lse = merge(out, lse[:, :, 0] * _LN2, work, plan)
    return from_rows(out, B, T, N, K), from_rows(lse[..., None], B, T, N, K)[..., 0]


def _rope_tables(inv_freq: Float[Array, " W"], plan: Plan) -> dict[str, tuple[Array, Any]]:
    # Whole tiles are written to the table of a block.
    fine = max(TILE, 2 ** (int(math.log2(plan.block)) // 2))
    tables = {"fine": jnp.arange(fine), "coarse": jnp.arange(plan.block // fine) * fine,
              "origin": jnp.arange(-(-plan.S // plan.block)) * plan.block}
    out: dict[str, tuple[Array, Any]] = {}
    for name, position in tables.items():
        angle = position[:, None].astype(jnp.float32) * inv_freq
        for turn, function in (("cos", jnp.cos), ("sin", jnp.sin)):
            table = function(angle)
            out[f"{name}_{turn}"] = (table[:, None], "block") if name == "origin" else (table, None)
    return out


def _call(
    plan: Plan, work: Work, inputs: dict[str, tuple[Array, Any]], vmem_bytes: int, interpret: Any
) -> tuple[Float[Array, "R M h"], Float[Array, "R M L"]]:
    def spec(x: Any, kind: str | None) -> pl.BlockSpec:
        zeros = (0,) * (x.ndim - 1)
        if kind == "hbm":
            return pl.BlockSpec(memory_space=pl.ANY)
        if kind is None:
            return pl.BlockSpec(x.shape, lambda core, i, *work: (0, *zeros))

        def index(core: Array, i: Array, *work: Any) -> tuple[Any, ...]:
            item = item_of(plan, core, i, Work(*work))
            if kind == "head":
                return item.row, item.head, 0, 0
            return {"key_head": item.head, "block": item.block, "out": item.out}[kind], *zeros

        squeezed = 2 if kind == "head" else 1
        return pl.BlockSpec((None,) * squeezed + x.shape[squeezed:], index)

    rows = plan.B * plan.K + plan.cores - 1
    results = tuple(jax.ShapeDtypeStruct((rows, plan.M, width), jnp.float32) for width in (plan.h, LANES))
    arrays = {name: x for name, (x, kind) in inputs.items() if kind == "hbm"}
    scratch: dict[str, Any] = {f"{name}_slots": pltpu.VMEM((_SLOTS, *_slot(name, plan.block, x)), x.dtype)
                               for name, x in arrays.items()}
    scratch["arrived"] = pltpu.SemaphoreType.DMA((len(arrays), _SLOTS))
    scratch |= {name: pltpu.VMEM((plan.M, width), jnp.float32)
                for name, width in (("top", LANES), ("total", LANES), ("sum", plan.h))}
    if plan.rope:
        scratch |= {name: pltpu.VMEM((plan.block, plan.H // 2), plan.turn) for name in ("cos", "sin")}
    names = (*Work._fields, *inputs, "out", "lse", *scratch)

    def body(*refs: Any) -> None:
        _kernel(plan, Work(*refs[:5]), dict(zip(names, refs, strict=True)), tuple(arrays))

    return pl.pallas_call(
        body, out_shape=results,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5, grid=(plan.cores, work.size[1]),
            in_specs=[spec(x, kind) for x, kind in inputs.values()],
            out_specs=[spec(x, "out") for x in results], scratch_shapes=list(scratch.values())),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_bytes),
        interpret=interpret, name="decode_attention")(*work, *(x for x, _ in inputs.values()))


def _slot(name: str, block: int, x: Array) -> tuple[int, int]:
    return (1, block) if name.endswith("scale") else (block, x.shape[-1])


def _copies(plan: Plan, core: Array, i: Array, work: Work, refs: dict[str, Any], arrays: tuple[str, ...]) -> Any:
    """The copies of item i's valid keys into its slot, and whether there is any key."""
    item, slot = item_of(plan, core, i, work), lax.rem(i, _SLOTS)
    start = item.block * plan.block
    left = jnp.minimum(plan.block, jnp.clip(work.length[item.row], 0, plan.S) - start)
    copies = []
    for at, name in enumerate(arrays):
        lanes, unit = ((slice(None),), LANES) if name.endswith("scale") else ((), grain(refs[name].dtype))
        begin = pl.multiple_of(start, unit)
        keys = pl.multiple_of(lax.div(left + unit - 1, unit) * unit, unit)
        source = refs[name].at[(item.row, item.head, *lanes, pl.ds(begin, keys))]
        target = refs[f"{name}_slots"].at[(slot, *lanes, pl.ds(0, keys))]
        copies.append(pltpu.make_async_copy(source, target, refs["arrived"].at[at, slot]))
    return copies, left > 0


def _kernel(plan: Plan, work: Work, refs: dict[str, Any], arrays: tuple[str, ...]) -> None:
    core, i = pl.program_id(0), pl.program_id(1)
    share = work.size[1]
    items = jnp.minimum(work.size[0] * plan.K - core * share, share)

    def fetch(at: Any) -> None:
        copies, some = _copies(plan, core, at, work, refs, arrays)

        @pl.when(some & (at < items))
        def _() -> None:
            for copy in copies:
                copy.start()

    @pl.when(i == 0)
    def _() -> None:
        for ahead in range(_SLOTS - 1):
            fetch(jnp.int32(ahead))
        if plan.rope:
            fill_table(refs)

    @pl.when(i < items)
    def _() -> None:
        fetch(i + _SLOTS - 1)
        item = item_of(plan, core, i, work)

        @pl.when((i == 0) | (item.block == 0))
        def _() -> None:
            refs["top"][...] = jnp.full_like(refs["top"], FLOOR)
            refs["total"][...] = jnp.zeros_like(refs["total"])
            refs["sum"][...] = jnp.zeros_like(refs["sum"])

        copies, some = _copies(plan, core, i, work, refs, arrays)

        @pl.when(some)
        def _() -> None:
            for copy in copies:
                copy.wait()

        length = work.length[item.row]
        attend(plan, refs, lax.rem(i, _SLOTS), item.block * plan.block, length)

        # A row may be longer than what is held here, a shard of it: its last block is then the last there is.
        @pl.when(((item.block + 1) * plan.block >= jnp.minimum(length, plan.S)) | (i == items - 1))
        def _() -> None:
            total = refs["total"][...].sum(axis=1, keepdims=True)
            none = total == 0
            refs["out"][...] = refs["sum"][...] / jnp.where(none, 1, total)
            refs["lse"][...] = jnp.where(none, -jnp.inf, refs["top"][...] + jnp.log2(jnp.where(none, 1, total)))
