"""Shared memory of the GPU kernel: tiles, rings of tiles, and the barriers at which warpgroups meet."""

from __future__ import annotations

import inspect
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from mfa_jax.kernels.gpu_plan import BLOCK, OFFSETS, TILE, Plan

LIMIT = 232448
"""Bytes that a block of threads may have on Hopper."""
_ALIGNMENT, _BARRIERS = 1024, 512
MAX_STAGES = 6
"""Blocks on their way, at most."""
COLUMNS = 64
"""Of a tile that are cleared at once, in registers; what is widened at once is a multiple of it."""

ROWS = 8
"""Of a tile of the pattern in which TMA lays rows: what is fetched begins and ends with one, of a cache too."""

PAIR = "pair"
"""Axis of the blocks of threads of a cluster."""
_FETCHED = ("k", "v", "scales")
"""Rings that are filled by TMA."""

_load: Any = plgpu.load
_LOADS_BY_INDEX = "idx" in inspect.signature(plgpu.load).parameters
"""Until JAX 0.10."""


class Ring(NamedTuple):
    """Tiles that are used in turn. Who reads them frees every place once at the start, so that no wait is special."""

    tiles: Any
    full: Any
    """Barriers: the tile is there."""
    free: Any
    """Barriers: everyone who reads the tile has read it."""
    size: int
    together: Any = None
    """Axis of the blocks of threads that each fetch a part for all of them; None where each fetches its own."""

    def slot(self, i: Any) -> Any:
        return lax.rem(i, jnp.int32(self.size))

    def wait(self, i: Any) -> Any:
        """Until the tile of item i is there; its place."""
        plgpu.barrier_wait(self._at(self.full, i))
        return self.slot(i)

    def claim(self, i: Any) -> Any:
        """Until the place of item i may be written; that place."""
        plgpu.barrier_wait(self._at(self.free, i))
        return self.slot(i)

    def copy(self, source: Any, target: Any, i: Any) -> None:
        """Of a part of item i; the tile is there when all its parts are."""
        plgpu.copy_gmem_to_smem(source, target.at[self.slot(i)], self._at(self.full, i), collective_axes=self.together)

    def put(self, i: Any) -> None:
        """Makes what was written to the tile of item i visible."""
        plgpu.commit_smem()
        plgpu.barrier_arrive(self._at(self.full, i))

    def release(self, i: Any) -> None:
        plgpu.barrier_arrive(self._at(self.free, i))

    def release_all(self) -> None:
        for at in range(self.size):
            self.release(jnp.int32(at))

    def _at(self, barriers: Any, i: Any) -> Any:
        """One barrier has no axis."""
        return barriers if self.size == 1 else barriers.at[self.slot(i)]


def rings(plan: Plan, refs: dict[str, Any], interpret: bool) -> dict[str, Ring]:
    """By name: k and v as they are stored, their scales; keys and values as they were prepared; weights."""
    sizes = dict.fromkeys(_FETCHED, plan.stages) | {"keys": plan.key_slots, "values": 1, "weights": 1}
    # The interpreter has no copies to several blocks of threads; each then fetches all, and the barriers are the same.
    together = PAIR if plan.cluster > 1 and not interpret else None
    return {name: Ring(refs.get(f"{name}_ring"), refs[f"{name}_full"], refs[f"{name}_free"], size,
                       together if name in _FETCHED else None)
            for name, size in sizes.items() if f"{name}_full" in refs}


def key_ring(plan: Plan, rings: dict[str, Ring]) -> Ring:
    """Where keys are scored: as they are stored, or as they were prepared."""
    return rings["keys" if plan.prepares else "k"]


def value_ring(plan: Plan, rings: dict[str, Ring]) -> Ring:
    """Where values are averaged."""
    if plan.narrow:
        return rings["values" if plan.widens_values else "keys"]
    return rings["k" if plan.shared else "v"]


def swizzle(width: int, dtype: Any) -> int:
    """Bytes of the pattern in which rows of a tile lie in memory: the longest that divides them."""
    row = width * jnp.dtype(dtype).itemsize
    return next(size for size in (128, 64, 32) if row % size == 0)


def _tile(rows: int, width: int, dtype: Any, size: int, ring: int | None = None) -> Any:
    """A tile, or a ring of them, in the pattern of `size` bytes."""
    transforms = (plgpu.TilingTransform((ROWS, size // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(size))
    return plgpu.SMEM((rows, width) if ring is None else (ring, rows, width), dtype, transforms=transforms)


def scratch(plan: Plan) -> dict[str, Any]:
    """By name. Both operands of a product lie in patterns of the same size; halves of a turned tile end with one."""
    wide, half, n, readers = jnp.bfloat16, plan.H // 2, plan.stages, len(plan.parts)
    keys = swizzle(half if plan.rope else plan.H, wide)
    values = keys if plan.shared else swizzle(plan.h, wide)
    narrow = swizzle(math.gcd(COLUMNS, half if plan.rope else plan.H), plan.cache_dtype)
    barrier = plgpu.Barrier

    def freed(num_arrivals: int) -> Any:
        """Of a place that is fetched into: by all who read it in all blocks of threads that fetch together."""
        if plan.cluster == 1:
            return barrier(num_arrivals=num_arrivals, num_barriers=n)
        return plgpu.ClusterBarrier(collective_axes=(PAIR,), num_arrivals=num_arrivals, num_barriers=n)

    out = {
        "q_tile": _tile(TILE, plan.H, wide, keys), "q_full": barrier(),
        "weights_tile": _tile(TILE, BLOCK, wide, values), "kept": plgpu.SMEM((TILE,), jnp.float32),
        "weights_full": barrier(), "weights_free": barrier(num_arrivals=readers),
        "k_ring": _tile(BLOCK, plan.H, plan.cache_dtype, narrow if plan.narrow else keys, n),
        "k_full": barrier(num_arrivals=3 if plan.rope else 1, num_barriers=n),
        "k_free": freed(1 + (readers if plan.shared and not plan.narrow else 0)),
    }
    if not plan.shared:
        out |= {"v_ring": _tile(BLOCK, plan.h, plan.cache_dtype, narrow if plan.narrow else values, n),
                "v_full": barrier(num_barriers=n),
                "v_free": freed(1 if plan.narrow else readers)}
    if plan.narrow:
        names = ("k_scale",) if plan.shared else ("k_scale", "v_scale")
        out |= {f"{name}_ring": plgpu.SMEM((n, BLOCK), jnp.float32) for name in names}
        out |= {"scales_full": barrier(num_arrivals=len(names), num_barriers=n), "scales_free": freed(1)}
    if plan.prepares:
        both = plan.narrow and not plan.widens_values
        slots = plan.key_slots
        out |= {"keys_ring": _tile(BLOCK, plan.H, wide, keys, slots), "keys_full": barrier(num_barriers=slots),
                "keys_free": barrier(num_arrivals=1 + (readers if both else 0), num_barriers=slots)}
    if plan.widens_values:
        out |= {"values_ring": _tile(BLOCK, plan.h, wide, values, 1), "values_full": barrier(),
                "values_free": barrier(num_arrivals=readers)}
    if plan.rope:
        table = _tile(OFFSETS, half, jnp.float16, swizzle(half, jnp.float16))
        out |= {f"offset_{x}_tile": table for x in ("cos", "sin")} | {"offset_full": barrier(num_arrivals=2)}
        out |= {f"origin_{x}_ring": plgpu.SMEM((n, BLOCK // OFFSETS, half), jnp.float32) for x in ("cos", "sin")}
    if plan.cluster > 1:
        out["done"] = plgpu.ClusterBarrier(collective_axes=(PAIR,), num_arrivals=plan.roles)
    if plan.alibi:
        out |= {"slopes_tile": plgpu.SMEM((TILE,), jnp.float32), "slopes_full": barrier()}
    return out


def bytes_of(plan: Plan) -> int:
    """Shared memory that a plan takes."""
    arrays = [x for x in scratch(plan).values() if not isinstance(x, (plgpu.Barrier, plgpu.ClusterBarrier))]
    sizes = [math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays]
    return _BARRIERS + sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)


def with_stages(plan: Plan) -> Plan:
    """With as many blocks on their way as fit, and two places for prepared keys where that leaves three of them.

    Raises:
      NotImplementedError: not even two blocks fit.
    """
    two_slots = plan.prepares and not plan.scorer_prepares
    plans = [plan._replace(stages=n, key_slots=2) for n in range(MAX_STAGES, 2, -1) if two_slots]
    plans += [plan._replace(stages=n) for n in range(MAX_STAGES, 1, -1)]
    for p in plans:
        if bytes_of(p) <= LIMIT:
            return p
    raise NotImplementedError(
        f"needs {bytes_of(plans[-1])} bytes of shared memory for two blocks of keys of {plan.H} and values of {plan.h} "
        f"in {plan.cache_dtype}, and there are {LIMIT}")


def load(ref: Any, *, layout: Any, optimized: bool = True) -> Any:
    """An array in registers; `optimized=False` for one in HBM."""
    indices = ((),) if _LOADS_BY_INDEX else ()
    return _load(ref, *indices, layout=layout, optimized=optimized)


def store(ref: Any, x: Any) -> None:
    """To HBM."""
    if hasattr(plgpu, "store"):  # since JAX 0.12
        plgpu.store(ref, x, optimized=False)
    else:
        ref[...] = x
