"""Compiles the decode kernels for an H100 that is not here: `python -m experiments.aot_gpu`.

It needs JAX's CUDA plug-in, no driver and no toolkit: installed, or in `gpu/` of the virtual environment (`make
aot-gpu` puts it there). Each line of output is a JSON object: the case, seconds, the blocks of threads that share the
work, the stages and the shared memory of the kernel, and what ptxas says of registers and spills, the merge included.
A small model's whole `generate` is compiled besides: `copies` are the arrays of so many tokens that a decoded token
makes, beside those that it writes in place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import importlib.util
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments import cli
from experiments.aot_tpu import CAPACITY, MODELS, compile_model
from experiments.kernel_cases import BORDERS, CASES, GPU_BORDERS, Case, decode
from mfa_jax import axes
from mfa_jax.attention.cached import Serving, cached_attention
from mfa_jax.cache import SharedKVCache
from mfa_jax.kernels import gpu_memory, gpu_plan, mosaic_gpu
from mfa_jax.kernels.sharded import LAYOUTS

BATCH = 64
EVERY = CASES | BORDERS | GPU_BORDERS
REFUSED = ("odd 3x80", "MFA 64x256 float32")
"""Cases that the kernel says it can't serve."""
_RUNTIME = "jax_cuda13_plugin/libmosaic_gpu_runtime.so"
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""What XLA asks of a device, as it is for an H100 SXM."""


@dataclasses.dataclass(frozen=True)
class AotGpuConfig:
    """What is compiled."""

    cases: tuple[str, ...] = tuple(name for name in EVERY if name not in REFUSED)
    """Names of `EVERY`, the cases of `kernel_cases`."""
    generate: bool = True
    """Also a small model's whole `generate`, for MFA, MFA-KR and MLA, and a step of MFA over four GPUs."""
    output: str | None = None
    """A folder: gpu.json and the table gpu.md are written into it; none to print only."""

    def __post_init__(self) -> None:
        for name in self.cases:
            if name not in EVERY:
                raise ValueError(f"cases={name!r}: must be of {', '.join(EVERY)}")


def plugin_folder() -> Path:
    """Where `make aot-gpu` puts the CUDA plug-in, out of the way of programs that would look for a GPU."""
    return Path(sys.prefix, "gpu")


def can_compile() -> bool:
    """Whether this environment compiles for a GPU."""
    there = plugin_folder().exists() or importlib.util.find_spec("jax_plugins") is not None
    return there and jax.__version_info__ >= (0, 11)


def prepare() -> None:
    """Makes this process one that compiles for GPUs and runs on the CPU; to be called before JAX has a backend.

    Raises:
      NotImplementedError: JAX 0.10, for which the kernel does not serve.
    """
    if jax.__version_info__ < (0, 11):
        raise NotImplementedError(
            f"jax=={jax.__version__}: the kernel serves from 0.11 on, whose interpreter checks it; take Python 3.12 or "
            "newer: make PYTHON=python3.13 VENV=.venv-newer aot-gpu")
    if plugin_folder().exists():
        sys.path.append(str(plugin_folder()))
        # What compiled programs are linked with; JAX looks for it when it is imported, which was earlier.
        os.environ["MOSAIC_GPU_RUNTIME_LIB_PATH"] = str(plugin_folder() / _RUNTIME)
    os.environ.update(JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1", TF_CPP_MIN_LOG_LEVEL="3")
    jax.config.update("jax_platforms", "cpu")


def h100_mesh(**sizes: int) -> Mesh:
    """So many H100s on each of the mesh axes, one on those that are not named.

    Raises:
      RuntimeError: the CUDA plug-in is not installed.
    """
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="h100", target_config=_H100, topology=f"1x1x{math.prod(sizes.values())}")
    except (RuntimeError, NotImplementedError) as error:
        raise RuntimeError("the CUDA plug-in of JAX is not there, `make aot-gpu` installs it") from error
    return axes.make_mesh([sizes.get(axis, 1) for axis in axes.MESH_AXES], topology.devices)


def kernel(case: Case, arrays: dict[str, Any]) -> Any:
    """A case through the GPU kernel, for a GPU of 132 SMs whatever this machine is."""
    return mosaic_gpu.decode_attention(
        arrays["q"], arrays["k"], arrays["v"], arrays["lengths"], scale=case.H**-0.5, inv_freq=arrays["rope"],
        alibi_slopes=arrays["alibi_slopes"], k_scale=arrays["k_scale"], v_scale=arrays["v_scale"],
        value_width=case.value_width, cores=132)


def plan_of(case: Case, B: int = BATCH, S: int = CAPACITY) -> gpu_plan.Plan:
    """What the kernel decides for a case on an H100."""
    return gpu_memory.with_stages(gpu_plan.make_plan(case.call(S), B, case.K, 132, case.H**-0.5))


@contextlib.contextmanager
def _dumping_to(folder: str) -> Iterator[None]:
    """Mosaic GPU writes what ptxas says into a folder."""
    settings = {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_TO": folder}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name in settings:
            del os.environ[name]


def compile_case(name: str, mesh: Mesh, reports: dict[gpu_plan.Plan, str]) -> dict[str, Any]:
    """One line of output; `reports` has ptxas' words on kernels of earlier cases, which are not compiled again."""
    case = EVERY[name]
    sharding = NamedSharding(mesh, PartitionSpec())
    arrays = case.arguments(BATCH, CAPACITY, lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, _dumping_to(folder), jax.set_mesh(mesh):
        local = jax.shard_map(lambda x: decode(case, x, "mosaic_gpu"), in_specs=PartitionSpec(),
                              out_specs=PartitionSpec(), check_vma=False)
        jax.jit(local).lower(arrays).compile()
        report = "\n".join(path.read_text() for path in Path(folder).glob("*.ptxas"))
    plan = plan_of(case)
    text = reports.setdefault(plan, report)
    if not text:
        raise RuntimeError(f"{name}: the compiler has left no report of its registers")
    return {"case": name, "seconds": round(time.perf_counter() - start, 1),
            "block_bytes": gpu_plan.BLOCK * case.token_bytes // case.K, "roles": plan.roles, "shares": plan.shares,
            "stages": plan.stages, "shared_bytes": gpu_memory.bytes_of(plan),
            "registers": max(int(n) for n in re.findall(r"Used (\d+) registers", text)),
            "spill_bytes": sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", text))}


def compile_generate(attention: Any, cache_dtype: str, mesh: Mesh) -> dict[str, Any]:
    """One line of output."""
    start = time.perf_counter()
    program = compile_model(attention, mesh, cache_dtype, "mosaic_gpu").as_text()
    return {"case": f"generate {attention.variant} {cache_dtype}", "seconds": round(time.perf_counter() - start, 1),
            "kernels": program.count('custom_call_target="mosaic_gpu'), "copies": copies(program)}


_MADE = re.compile(r"\s*(?:ROOT )?%?(\S+) = (\(.*?\)|\S+) ([\w-]+)\(")
_PLUMBING = ("get-tuple-element", "parameter", "bitcast", "tuple", "while")


def copies(program: str, S: int = CAPACITY) -> list[str]:
    """Instructions of a program's loops whose result has S tokens; XLA scatters into the array that it is given."""
    bodies = set(re.findall(r"body=%?([\w.-]+)", program))
    found = []
    for text in re.split(r"\n(?=%|ENTRY)", program):
        name = re.match(r"%?([\w.-]+)", text)
        if name is None or name[1] not in bodies:
            continue
        for line in text.splitlines():
            made = _MADE.match(line)
            if made and re.search(rf"\b{S}\b", made[2]) and made[3] not in _PLUMBING and "scatter" not in made[1]:
                found.append(f"{made[1]} {made[2]}")
    return found


def compile_layout(layout: str) -> dict[str, Any]:
    """One line of output: MFA over four GPUs, and what they exchange."""
    start, case = time.perf_counter(), CASES["MFA 64x256"]
    mesh = h100_mesh(tensor=4)
    sharding = NamedSharding(mesh, PartitionSpec())
    arrays = case.arguments(BATCH, CAPACITY, lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding))
    cache = SharedKVCache(arrays["lengths"], arrays["k"], arrays["v"])
    new = jax.ShapeDtypeStruct((BATCH, 1, case.H), case.dtype, sharding=sharding)
    serving = Serving(decode="mosaic_gpu", layout=layout)
    with jax.set_mesh(mesh):
        step = jax.jit(functools.partial(cached_attention, scale=case.H**-0.5, serving=serving))
        program = str(step.lower(arrays["q"], cache, (new, new)).compile().as_text())
    exchanges = r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
    return {"case": f"layout {layout}", "seconds": round(time.perf_counter() - start, 1),
            "kernels": program.count('custom_call_target="mosaic_gpu'),
            "exchanges": sorted(set(re.findall(exchanges, program)))}


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown."""
    titles = ("case", "KiB a block", "blocks on their way", "warpgroups", "shares", "shared memory, KiB",
              "registers at launch", "spills, bytes")
    rows = [f"| {' | '.join(titles)} |", "| --- " + "| ---: " * 7 + "|"]
    for x in lines:
        cells = (x["case"], f"{x['block_bytes'] / 2**10:.1f}", x["stages"], x["roles"], x["shares"],
                 f"{x['shared_bytes'] / 2**10:.1f}", x["registers"], x["spill_bytes"])
        rows.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "\n".join(rows) + "\n"


def main(config: AotGpuConfig) -> None:
    prepare()
    mesh = h100_mesh()
    reports: dict[gpu_plan.Plan, str] = {}
    lines = []
    for name in config.cases:
        lines.append(compile_case(name, mesh, reports))
        print(json.dumps(lines[-1]), flush=True)
    if config.generate:
        for attention in MODELS:
            for cache_dtype in ("bfloat16", "int8"):
                print(json.dumps(compile_generate(attention, cache_dtype, mesh)), flush=True)
        for layout in LAYOUTS:
            print(json.dumps(compile_layout(layout)), flush=True)
    if config.output is not None:
        folder = Path(config.output)
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"date": datetime.date.today().isoformat(), "jax": jax.__version__, "jaxlib": jaxlib.__version__}
        (folder / "gpu.json").write_text(json.dumps({**facts, "lines": lines}, indent=1) + "\n")
        (folder / "gpu.md").write_text(table(lines))


if __name__ == "__main__":
    cli.run(lambda: main(cli.parse(AotGpuConfig)))
