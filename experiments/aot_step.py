"""Compiles the training steps of `bench_mfu` for an H100 that is not here, and counts the bytes that they move.

    make PYTHON=python3.13 VENV=.venv-newer .venv-newer/.cuda
    .venv-newer/bin/python -m experiments.aot_step --output experiments/results/gpu/step.json

What a compiled program moves is exact, what it takes is not told: nothing runs. Bytes are counted as `plan.costs` does,
each instruction reading its operands and writing its results, and summed by what they are for: matrix products;
attention (cuDNN); what is kept for the backward pass, which a scan over layers fills with zeros, writes, and reads
again; element by element in the forward and in the backward pass; the rest, which is mostly the optimizer.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import re
import time
import types
from pathlib import Path
from typing import Any

import jax
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.experimental.pallas.ops.gpu import transposed_ragged_dot_mgpu
from jax.sharding import Mesh

from experiments import aot_gpu, cli
from experiments.bench_mfu import OPTIMIZER, Pair, pairs
from mfa_jax.config import DataConfig, TrainConfig, require
from mfa_jax.model.transformer import Transformer
from mfa_jax.plan import hlo
from mfa_jax.plan.costs import count
from mfa_jax.train.compiling import compile_program, memory_of
from mfa_jax.train.optimizer import make_optimizer, make_schedule
from mfa_jax.train.run import abstract_params
from mfa_jax.train.step import abstract_batch, jit_step, make_train_step, state_layout

COPY_BANDWIDTH = 3.0e12
"""Bytes a second that a copy reads and writes on an H100 (`results/gpu_kernels`)."""


@dataclasses.dataclass(frozen=True)
class AotStepConfig:
    """Which steps are compiled."""

    pair: str = "1b"
    """A pair of `bench_mfu`."""
    models: tuple[str, ...] = ("mfa", "mha")
    """Of the pair."""
    unroll_layers: bool = True
    """Without a loop over layers, as `bench_mfu` has it."""
    output: str | None = None
    """JSON file; none to print only."""

    def __post_init__(self) -> None:
        require(self.pair in pairs(tiny=False), "pair", self.pair, f"must be of {', '.join(pairs(tiny=False))}")
        for name in self.models:
            require(name in ("mfa", "mha"), "models", name, "must be of mfa, mha")


def moved(text: str) -> dict[str, int]:
    """Bytes of a compiled program, by what they are for."""
    # What NCCL reads and writes is in a memory of its own kind, which is HBM like the rest.
    module = hlo.parse(text.replace(":S(7)", ""))
    instructions = {name: each for home in module.computations.values() for name, each in home.instructions.items()}
    found: collections.Counter[str] = collections.Counter()
    for work in count(module).work:
        if not work.nbytes:
            continue
        instruction, nbytes = instructions[work.name], work.nbytes
        if instruction.opcode == "fusion-start":
            # One slice is copied; the whole arrays that it is cut from or put into are named besides.
            nbytes = 2 * min(shape.nbytes for shape in instruction.shapes if shape.dims)
        found[_purpose(work.name, instruction)] += nbytes * work.times
    return dict(found.most_common())


def _purpose(name: str, instruction: hlo.Instruction) -> str:
    from_source = re.search(r'op_name="([^"]*)"', instruction.attributes)
    source = from_source[1] if from_source else ""
    if "__cudnn$fmha" in instruction.attributes:
        return "attention"
    if "gemm" in name or "__cublas" in instruction.attributes:
        return "products"
    kept = ("dynamic_update" in source or "dynamic_slice" in source or "dynamic_update_slice" in name
            or name.startswith("loop_broadcast"))
    if kept:
        return "kept for the backward pass"
    return "backward" if "transpose(" in source else "forward" if "jvp(" in source else "rest"


def compiled(config: TrainConfig, mesh: Mesh) -> Any:
    """A training step of rows that are one document each, compiled."""
    model = Transformer(config.model)
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(config.optimizer, config.steps, abstract_params(model, mesh))
        layout = state_layout(config, model, optimizer, mesh)
        step = make_train_step(config, model, optimizer, make_schedule(config.optimizer, config.steps))
        batch = abstract_batch(config, mesh) | {"segments": None}
        return compile_program(jit_step(step, layout).lower(layout, batch), "gpu", mesh.size)


def compile_step(pair: Pair, name: str, unroll_layers: bool) -> dict[str, Any]:
    """One line of output."""
    model = dataclasses.replace(pair.sides("cudnn")[name], unroll_layers=unroll_layers)
    config = TrainConfig(model=model, optimizer=OPTIMIZER, data=DataConfig(
        batch_size=pair.rows, sequence_length=pair.T, separate_documents=False))
    start = time.perf_counter()
    program = compiled(config, aot_gpu.h100_mesh())
    memory, bytes_moved = memory_of(program), moved(program.as_text())
    total = sum(bytes_moved.values())
    return {"model": name, "compile_seconds": round(time.perf_counter() - start, 1),
            **{f"{part}_bytes": size for part, size in dataclasses.asdict(memory).items()},
            "moved_bytes": total, "ms_at_copy_bandwidth": round(1e3 * total / COPY_BANDWIDTH, 1), "moved": bytes_moved}


def as_if_on_hopper() -> None:
    """JAX asks the device and its cuDNN what they can do, and there is none to ask."""
    patched: Any = cudnn
    patched.check_cudnn_version = lambda: 91000
    patched.check_compute_capability = lambda wanted: float(wanted) <= 9.0
    patched.is_cuda_compute_capability_equal = lambda wanted: float(wanted) == 9.0
    kernels: Any = transposed_ragged_dot_mgpu
    kernels.jax = types.SimpleNamespace(**{**vars(jax), "devices": lambda: [types.SimpleNamespace(core_count=132)]})


def main(config: AotStepConfig) -> None:
    aot_gpu.prepare()
    as_if_on_hopper()
    lines = []
    for name in config.models:
        lines.append(compile_step(pairs(tiny=False)[config.pair], name, config.unroll_layers))
        print(json.dumps(lines[-1]), flush=True)
    if config.output is not None:
        record = {"jax": jax.__version__, "pair": config.pair, "steps": lines}
        Path(config.output).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(lambda: main(cli.parse(AotStepConfig)))
