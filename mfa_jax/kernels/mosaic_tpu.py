"""The TPU decode kernel (Pallas, Mosaic): copies exactly the valid keys of a cache that stays in HBM.

The blocks of all rows form one list of work, made from the lengths before the kernel starts: its grid ends where the
list ends, so no step is spent on what is not valid, and the copy of the next block overlaps this block's arithmetic
across the border of a row. The last block of a row copies its valid keys, rounded up to 16, and no more. Two programs
compute a block: one without masks that issues the scores of a part before the softmax of the part before it, and one
with masks for the ends of rows. Where a chip has two cores each takes half of the list; the row that straddles the
border is merged by its log-sum-exp.

Keys that are stored before rope turn by their offset in the block, queries back by the start of the block (see
`xla`); the table of offsets is made once a call in VMEM by the angle sum formulas, from two tables of its square root.

Statistics are kept in base 2, repeated over the 128 lanes: to broadcast one lane costs a seventh of a step.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Num

from mfa_jax.kernels.calls import default_device
from mfa_jax.kernels.tpu_plan import CHIPS, LANES, TILE, Plan, Work, block_size, grain, item_of, merge, work_list

_HIDDEN, _FLOOR = -1e30, -5e29
"""As in `xla`: 2^(_HIDDEN - _FLOOR) is exactly 0."""
_SLOTS = 2
"""Blocks in flight: one is computed while the next is copied."""
_LOG2E, _LN2 = math.log2(math.e), math.log(2)
_QK = (((1,), (1,)), ((), ()))
_PV = (((1,), (0,)), ((), ()))


def decode_attention(
    q: Float[Array, "B T N H"], k: Num[Array, "B *K S H"], v: Num[Array, "B *K S h"] | None, lengths: Int[Array, " B"],
    *, scale: float, inv_freq: Float[Array, " W"] | None, alibi_slopes: Float[Array, " N"] | None,
    k_scale: Float[Array, "B *K S"] | None, v_scale: Float[Array, "B *K S"] | None, value_width: int | None,
    block: int | None = None, chip: str | None = None, interpret: Any = False,
) -> tuple[Float[Array, "B T N h"], Float[Array, "B T N"]]:
    """`kernels.decode_attention` on a TPU; products take the type of `q`, sums and softmax are float32.

    Args:
      block: keys of a block, a multiple of 128; None for `block_size`.
      chip: a name of `CHIPS`; None for the default device's, and for v5e where that is interpreted.
      interpret: False to compile, or `pltpu.InterpretParams`.
    """
    if k.ndim == 3:
        k = k[:, None]
        v, k_scale, v_scale = (None if x is None else x[:, None] for x in (v, k_scale, v_scale))
    B, T, N, H = q.shape
    K, S = k.shape[1:3]
    h = v.shape[-1] if v is not None else value_width or H
    kind = chip or ("TPU v5 lite" if interpret else default_device().kind)
    row_bytes = sum(-(-x.shape[-1] // LANES) * LANES * x.dtype.itemsize for x in (k, v) if x is not None)
    block = block or block_size(CHIPS[kind], S, row_bytes)
    M = -(-T * N // K // TILE) * TILE
    part = math.gcd(block, max(LANES, CHIPS[kind].part // 2 ** math.ceil(math.log2(M))))
    plan = Plan(B, K, T, M, S, H, h, v is None, inv_freq is not None, alibi_slopes is not None, k_scale is not None,
                q.dtype, block, part, CHIPS[kind].cores)
    queries = _rows((q.astype(jnp.float32) * (scale * _LOG2E)).swapaxes(1, 2), plan)
    inputs: dict[str, tuple[Array, Any]] = {"q": (queries if plan.rope else queries.astype(q.dtype), "head")}
    if T > 1:
        inputs["draft"] = _rows(jnp.broadcast_to(jnp.arange(T)[:, None], (1, N, T, LANES)), plan)[0, 0], None
    if alibi_slopes is not None:
        slopes = jnp.broadcast_to((alibi_slopes * _LOG2E)[:, None, None], (1, N, T, LANES))
        inputs["slopes"] = _rows(slopes, plan)[0], "key_head"
    if inv_freq is not None:
        inputs |= _rope_tables(inv_freq, plan)
    inputs |= {name: (x, "hbm") for name, x in (("k", k), ("v", v)) if x is not None}
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    # A copy of scales ends at whole lanes.
    inputs |= {name: (jnp.pad(x[:, :, None], ((0, 0),) * 3 + ((0, -S % LANES),)), "hbm")
               for name, x in scales.items() if x is not None}
    work = work_list(lengths, plan)
    out, lse = _call(plan, work, inputs, CHIPS[kind].vmem_bytes, interpret)
    out, lse = merge(out, lse[:, :, 0] * _LN2, work, plan)

    def by_tokens(x: Array) -> Array:
        x = x.reshape(B, K, M, -1)[:, :, : N // K * T].reshape(B, N, T, -1)
        return x.swapaxes(1, 2)

    return by_tokens(out), by_tokens(lse)[..., 0]


def _rows(x: Num[Array, "b N T W"], plan: Plan) -> Num[Array, "b K M W"]:
    """Queries of a key head as rows of a matrix, heads before drafted tokens, with rows of zeros to a whole tile."""
    x = x.reshape(x.shape[0], plan.K, -1, x.shape[-1])
    return jnp.pad(x, ((0, 0), (0, 0), (0, plan.M - x.shape[2]), (0, 0)))


def _rope_tables(inv_freq: Float[Array, " W"], plan: Plan) -> dict[str, tuple[Array, Any]]:
    fine = 2 ** (int(math.log2(plan.block)) // 2)
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
        scratch |= {name: pltpu.VMEM((plan.block, plan.H // 2), jnp.float32) for name in ("cos", "sin")}
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
            _fill_table(refs)

    @pl.when(i < items)
    def _() -> None:
        fetch(i + _SLOTS - 1)
        item = item_of(plan, core, i, work)

        @pl.when((i == 0) | (item.block == 0))
        def _() -> None:
            refs["top"][...] = jnp.full_like(refs["top"], _FLOOR)
            refs["total"][...] = jnp.zeros_like(refs["total"])
            refs["sum"][...] = jnp.zeros_like(refs["sum"])

        copies, some = _copies(plan, core, i, work, refs, arrays)

        @pl.when(some)
        def _() -> None:
            for copy in copies:
                copy.wait()

        length = work.length[item.row]
        _attend(plan, refs, lax.rem(i, _SLOTS), item.block * plan.block, length)

        @pl.when(((item.block + 1) * plan.block >= length) | (i == items - 1))
        def _() -> None:
            total = refs["total"][...].sum(axis=1, keepdims=True)
            none = total == 0
            refs["out"][...] = refs["sum"][...] / jnp.where(none, 1, total)
            refs["lse"][...] = jnp.where(none, -jnp.inf, refs["top"][...] + jnp.log2(jnp.where(none, 1, total)))


def _attend(plan: Plan, refs: dict[str, Any], slot: Array, start: Array, length: Array) -> None:
    """Adds a block to the running softmax: whole, or only the parts that hold a valid key."""
    queries = refs["q"][...]
    if plan.rope:
        queries = _turn(queries, refs["origin_cos"][...], -refs["origin_sin"][...]).astype(plan.dtype)

    def scores(part: Any) -> tuple[Array, Array, Any, Any]:
        keys = pl.ds(part * plan.part, plan.part)
        stored = refs["k_slots"][slot, keys].astype(plan.dtype)
        turned = stored
        if plan.rope:
            turned = _turn(refs["k_slots"][slot, keys].astype(jnp.float32), refs["cos"][keys], refs["sin"][keys])
            turned = turned.astype(plan.dtype)
        s = _product(queries, turned, _QK)
        values = stored[:, : plan.h] if plan.shared else refs["v_slots"][slot, keys].astype(plan.dtype)
        if not plan.quantized:
            return s, values, None, None
        k_scale = refs["k_scale_slots"][slot, :, keys]
        return s, values, k_scale, k_scale if plan.shared else refs["v_scale_slots"][slot, :, keys]

    @pl.when(start + plan.block <= jnp.minimum(length - plan.T + 1, plan.S))
    def _() -> None:
        state = refs["top"][...], refs["total"][...], refs["sum"][...]
        parts = plan.block // plan.part
        now = scores(0)
        for part in range(parts):
            after = scores(part + 1) if part + 1 < parts else None
            state = _step(plan, refs, now, state, start + part * plan.part, length, masked=False)
            now = after
        refs["top"][...], refs["total"][...], refs["sum"][...] = state

    @pl.when(start + plan.block > jnp.minimum(length - plan.T + 1, plan.S))
    def _() -> None:
        def step(part: Array, carry: None) -> None:
            state = refs["top"][...], refs["total"][...], refs["sum"][...]
            state = _step(plan, refs, scores(part), state, start + part * plan.part, length, masked=True)
            refs["top"][...], refs["total"][...], refs["sum"][...] = state

        held = jnp.clip(length, 0, plan.S) - start
        lax.fori_loop(0, lax.div(jnp.minimum(held, plan.block) + plan.part - 1, plan.part), step, None)


def _step(
    plan: Plan, refs: dict[str, Any], found: Any, state: Any, start: Array, length: Array, *, masked: bool
) -> Any:
    """One part of a block: `found` of its scores and values, into the running maximum, total and sum."""
    s, values, k_scale, v_scale = found
    top, total, out = state
    key = start + lax.broadcasted_iota(jnp.int32, (1, plan.part), 1)
    query = length - plan.T if plan.T == 1 else length - plan.T + _lanes(refs["draft"][...], plan.part)
    if k_scale is not None:
        s = s * k_scale
    if plan.alibi:
        s = s - _lanes(refs["slopes"][...], plan.part) * (query - key).astype(jnp.float32)
    if masked:
        seen = (key <= query) & (key < plan.S)
        s = jnp.where(seen, s, _HIDDEN)
        at = start + lax.broadcasted_iota(jnp.int32, values.shape, 0)
        values = jnp.where(at < jnp.minimum(length, plan.S), values.astype(jnp.float32), 0).astype(plan.dtype)
    above = jnp.maximum(top, jnp.broadcast_to(s.max(axis=1, keepdims=True), top.shape))
    kept, p = jnp.exp2(top - above), jnp.exp2(s - _lanes(above, plan.part))
    total = total * kept + functools.reduce(jnp.add, jnp.split(p, plan.part // LANES, axis=1))
    if v_scale is not None:
        p = p * v_scale
        if masked:
            p = jnp.where(seen, p, 0)
    return above, total, out * _lanes(kept, plan.h) + _product(p.astype(plan.dtype), values, _PV)


def _product(a: Array, b: Array, axes: Any) -> Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


def _lanes(x: Num[Array, "M L"], width: int) -> Num[Array, "M w"]:
    """A number that is repeated over 128 lanes, over `width` of them."""
    return jnp.concatenate([x] * -(-width // LANES), axis=1)[:, :width] if width != LANES else x


def _turn(x: Float[Array, "P H"], cos: Float[Array, "#P W"], sin: Float[Array, "#P W"]) -> Float[Array, "P H"]:
    first, second = x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1)


def _fill_table(refs: dict[str, Any]) -> None:
    """`cos(a + d) = cos a cos d - sin a sin d`, and so the sine: offsets of a block from two short tables."""
    fine = refs["fine_cos"].shape[0]

    def fill(j: Array, carry: None) -> None:
        rows = pl.ds(pl.multiple_of(j * fine, fine), fine)
        cos, sin = refs["coarse_cos"][pl.ds(j, 1)], refs["coarse_sin"][pl.ds(j, 1)]
        refs["cos"][rows] = cos * refs["fine_cos"][...] - sin * refs["fine_sin"][...]
        refs["sin"][rows] = sin * refs["fine_cos"][...] + cos * refs["fine_sin"][...]

    lax.fori_loop(0, refs["coarse_cos"].shape[0], fill, None)
