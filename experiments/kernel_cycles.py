"""The static cycles that a TPU's compiler gives one block of the decode kernel: `python -m experiments.kernel_cycles`.

A twin of the kernel computes the same whole block again and again, from memory that is fetched once; the difference of
two numbers of steps is the arithmetic of one, without any copy. With `--products` it computes the two products of a
block alone, and for int8 the conversion they need: what no schedule of all the rest can go below. The compiler writes
its estimate to a file while it compiles, and may abort after it has: so each estimate is a process of its own.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec

from experiments import cli
from experiments.aot_tpu import mesh_of
from experiments.kernel_cases import CASES, Case
from mfa_jax.kernels.tpu_block import attend_whole
from mfa_jax.kernels.tpu_plan import CHIPS, LANES, Plan, make_plan
from mfa_jax.plan.compiler import prepare

STEPS = (16, 32)
_NAME = "decode_twin"


@dataclasses.dataclass(frozen=True)
class KernelCyclesConfig:
    """One compilation."""

    case: str
    """A name of `kernel_cases.CASES`."""
    chip: str
    """v5e, v5p or v6e."""
    steps: int
    """Blocks that the twin computes."""
    products: bool = False
    """Without softmax, and without the turn of keys."""


def plan_of(case: Case, kind: str, S: int = 32768) -> Plan:
    """What the kernel decides for a case on a chip."""
    arrays = dataclasses.replace(case, K=1, N=case.N // case.K).arguments(1, S, jax.ShapeDtypeStruct)
    k, v = (None if x is None else jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for x in (arrays["k"], arrays["v"]))
    return make_plan(arrays["q"], k, v, rope=case.rope, alibi=case.alibi, value_width=case.value_width,
                     chip=CHIPS[kind])


def _products(plan: Plan, refs: dict[str, Any]) -> None:
    """Scores and averages of a block, as `attend_whole` has them but for all that is between."""
    queries, out = refs["q"][...].astype(plan.dtype), refs["sum"][...]
    for part in range(plan.block // plan.part):
        keys = pl.ds(part * plan.part, plan.part)
        stored = refs["k_slots"][0, keys].astype(plan.dtype)
        values = stored[:, : plan.h] if plan.shared else refs["v_slots"][0, keys].astype(plan.dtype)
        s = lax.dot_general(queries, stored, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        out = out + jnp.dot(s.astype(plan.dtype), values, preferred_element_type=jnp.float32)
    refs["sum"][...] = out


def twin(plan: Plan, cache_dtype: Any, steps: int, products: bool) -> tuple[Any, list[jax.ShapeDtypeStruct]]:
    """The program, and the shapes of its arguments."""
    half = (plan.block, plan.H // 2)
    arrays = {"q": ((plan.M, plan.H), jnp.float32 if plan.rope else plan.dtype),
              "k_slots": ((1, plan.block, plan.H), cache_dtype)}
    if not plan.shared:
        arrays["v_slots"] = ((1, plan.block, plan.h), cache_dtype)
    if plan.quantized:
        arrays |= {f"{name}_scale_slots": ((1, 1, plan.block), jnp.float32) for name in ("k", "v")}
    if plan.rope:
        arrays |= {name: ((1, half[1]), jnp.float32) for name in ("origin_cos", "origin_sin")}
        arrays |= {name: (half, plan.turn) for name in ("cos", "sin")}
    state = {"top": LANES, "total": LANES, "sum": plan.h}
    names = (*arrays, "out", *state)

    def body(*found: Any) -> None:
        refs = dict(zip(names, found, strict=True))

        @pl.when(pl.program_id(0) == 0)
        def _() -> None:
            for name in state:
                refs[name][...] = jnp.zeros_like(refs[name])

        if products:
            _products(plan, refs)
        else:
            attend_whole(plan, refs, 0, 0, plan.S)

        @pl.when(pl.program_id(0) == steps - 1)
        def _() -> None:
            refs["out"][...] = refs["sum"][...] / refs["total"][...].sum(axis=1, keepdims=True)

    def whole(shape: tuple[int, ...]) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda i: (0,) * len(shape))

    program = pl.pallas_call(
        body, grid=(steps,), in_specs=[whole(shape) for shape, _ in arrays.values()],
        out_specs=whole((plan.M, plan.h)), out_shape=jax.ShapeDtypeStruct((plan.M, plan.h), jnp.float32),
        scratch_shapes=[pltpu.VMEM((plan.M, width), jnp.float32) for width in state.values()], name=_NAME,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=2**26))
    return program, [jax.ShapeDtypeStruct(*x) for x in arrays.values()]


def cycles(case: str, chip: str, products: bool = False) -> float:
    """Estimated cycles of one block's arithmetic, or of its products alone."""
    found = []
    for steps in STEPS:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "experiments.kernel_cycles", "--case", case, "--chip", chip, "--steps",
                       str(steps), "--products" if products else "--no-products"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=600, env={
                **os.environ, "LIBTPU_INIT_ARGS": f"--xla_jf_dump_static_llo_profile_to={folder}"})
            profiles = list(Path(folder).glob(f"{_NAME}*"))
            if not profiles:
                raise RuntimeError(f"no estimate of {case} on {chip}: {done.stderr[-2000:]}")
            estimate = re.search(r"estimated_cycles: (\d+)", profiles[0].read_text())
            if estimate is None:
                raise RuntimeError(f"{profiles[0]} holds no estimated_cycles")
            found.append(int(estimate[1]))
    return (found[1] - found[0]) / (STEPS[1] - STEPS[0])


def main(config: KernelCyclesConfig) -> None:
    prepare()
    mesh, case = mesh_of(config.chip), CASES[config.case]
    plan = plan_of(case, mesh.devices.flat[0].device_kind)
    program, shapes = twin(plan, case.cache_dtype, config.steps, config.products)
    sharding = NamedSharding(mesh, PartitionSpec())
    arguments = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in shapes]
    jax.jit(jax.shard_map(program, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(),
                          check_vma=False)).lower(*arguments).compile()


if __name__ == "__main__":
    cli.run(lambda: main(cli.parse(KernelCyclesConfig)))
