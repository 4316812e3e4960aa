"""Compiles a training step with experts for H100s that are not here: `python -m experiments.aot_experts`.

    make PYTHON=python3.13 VENV=.venv-newer .venv-newer/.cuda
    .venv-newer/bin/python -m experiments.aot_experts --output experiments/results/gpu/experts.json

On one GPU, and with the experts split over several. Of each program: memory, bytes moved by what they are for (see
`aot_step`), what the grouped products of the experts have become and how many FLOPs they compute, and what devices
exchange. Nothing is run.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import re
import time
from pathlib import Path
from typing import Any, Literal

import jax

from experiments import aot_gpu, aot_step, cli
from experiments.bench_mfu import OPTIMIZER
from mfa_jax.config import DataConfig, ModelConfig, TrainConfig, require
from mfa_jax.plan import hlo
from mfa_jax.plan.chips import bytes_sent
from mfa_jax.plan.costs import Costs, count
from mfa_jax.presets import model_preset
from mfa_jax.train.compiling import memory_of

_KERNEL = 'custom_call_target="mosaic_gpu'


@dataclasses.dataclass(frozen=True)
class AotExpertsConfig:
    """Which steps are compiled."""

    model: str = "small-mfa-moe"
    """A preset with experts."""
    experts: tuple[Literal["ragged_dot", "mosaic_gpu"], ...] = ("ragged_dot", "mosaic_gpu")
    """Implementations of the grouped product, see `mfa_jax.model.grouped.resolve`."""
    gpus: tuple[int, ...] = (1, 4)
    """H100s of each program, all of them on the mesh axis `expert`."""
    rows: int = 8
    """Of a step, for each GPU."""
    seq: int = 4096
    """Tokens of a row, which is one document: cuDNN attends."""
    output: str | None = None
    """JSON file; none to print only."""

    def __post_init__(self) -> None:
        require(model_preset(self.model).moe is not None, "model", self.model,
                "must have experts, such as small-mfa-moe")
        for name in ("rows", "seq"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        for gpus in self.gpus:
            require(gpus >= 1, "gpus", gpus, "must be at least 1")


def grouped(module: hlo.Module, costs: Costs, gpus: int = 1) -> dict[str, Any]:
    """What computes the grouped products of a program and their gradients, how often, and the FLOPs of all.

    Args:
      gpus: that experts are split over: a balanced router fills one in so many of the rows that there is room for, and
        a kernel works on those that are there.
    """
    places = {name: (home, each) for home in module.computations.values() for name, each in home.instructions.items()}
    names: collections.Counter[str] = collections.Counter()
    flops = 0.0
    for work in costs.work:
        if work.collective is not None:
            continue
        home, instruction = places[work.name]
        if _KERNEL in instruction.attributes:
            names["mosaic_gpu"] += work.times
            flops += _flops_of_kernel(home, instruction) / gpus * work.times
        elif work.flops and "ragged_dot" in instruction.attributes:
            kind = re.search(r'"kind":"([^"]*)"|custom_call_target="([^"]*)"', instruction.attributes)
            names[next(filter(None, kind.groups())) if kind else instruction.opcode] += work.times
            flops += work.flops * work.times
    return {"kernels": dict(names.most_common()), "flops": flops}


def _flops_of_kernel(home: hlo.Computation, call: hlo.Instruction) -> float:
    """Of a grouped product or one of its gradients: rows with the matrix of their group, or the two of a row."""
    arrays = [shape for shapes in (*home.operand_shapes(call), call.shapes) for shape in shapes]
    rows, groups = (next(x for x in arrays if len(x.dims) == rank) for rank in (2, 3))
    return 2.0 * rows.dims[0] * groups.dims[1] * groups.dims[2]


def wanted_flops(model: ModelConfig, tokens: int) -> float:
    """FLOPs of the experts' products and of both gradients of each: every token with its own experts."""
    moe = model.moe
    assert moe is not None
    layers = model.num_layers if moe.layers is None else len(moe.layers)
    return 3.0 * 3 * 2 * layers * tokens * moe.experts_per_token * model.model_dim * moe.expert_dim


def exchanged(costs: Costs) -> dict[str, float]:
    """Bytes that a device sends in a step, by kind; of the exchange of experts what a balanced router sends."""
    found: collections.Counter[str] = collections.Counter()
    for collective, times in costs.collectives:
        if len(collective.group) > 1:
            found[collective.kind] += round(
                times * bytes_sent(collective.kind, collective.nbytes, len(collective.group)))
    return dict(found.most_common())


def compile_step(
    config: AotExpertsConfig, experts: Literal["ragged_dot", "mosaic_gpu"], gpus: int
) -> dict[str, Any]:
    """One line of output."""
    model = dataclasses.replace(model_preset(config.model), dtype="bfloat16", attention_implementation="cudnn",
                                expert_implementation=experts)
    train = TrainConfig(model=model, optimizer=OPTIMIZER, data=DataConfig(
        batch_size=config.rows * gpus, sequence_length=config.seq, separate_documents=False))
    start = time.perf_counter()
    program = aot_step.compiled(train, aot_gpu.h100_mesh(expert=gpus))
    seconds, text = time.perf_counter() - start, program.as_text()
    module = hlo.parse(text)
    costs, moved = count(module), aot_step.moved(text)
    products, wanted = grouped(module, costs, gpus), wanted_flops(model, config.rows * config.seq)
    return {"model": config.model, "experts": experts, "gpus": gpus, "rows": train.data.batch_size, "seq": config.seq,
            "compile_seconds": round(seconds, 1),
            **{f"{part}_bytes": size for part, size in dataclasses.asdict(memory_of(program)).items()},
            "moved_bytes": sum(moved.values()), "moved": moved, "grouped": products,
            "grouped_flops_over_wanted": round(products["flops"] / wanted, 2),
            "ragged_exchanges": len(re.findall(r" ragged-all-to-all(?:-start)?\(", text)), "sent": exchanged(costs)}


def main(config: AotExpertsConfig) -> None:
    aot_gpu.prepare()
    aot_step.as_if_on_hopper()
    lines = []
    for experts, gpus in itertools.product(config.experts, config.gpus):
        lines.append(compile_step(config, experts, gpus))
        print(json.dumps(lines[-1]), flush=True)
    if config.output is not None:
        Path(config.output).write_text(json.dumps({"jax": jax.__version__, "steps": lines}, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(lambda: main(cli.parse(AotExpertsConfig)))
