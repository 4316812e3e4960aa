r"""What a model needs on a TPU slice, and how fast it could be there, without a TPU.

    python -m experiments.plan --model base-mfa --topology v5p:4x4x4 --mesh fsdp=64 --batch-tokens 1048576 --seq 4096
    python -m experiments.plan --model base-mfa --topology v5e:2x4 --mesh data=4,tensor=2 --batch-tokens 64 --seq 8192 \
        --decode

The real training step, or the loop that decodes, is compiled by libtpu for that slice. Sizes are the compiler's, FLOPs
and bytes are counted in its program, and times are predictions from published peaks: nothing is run.
"""

from __future__ import annotations

import dataclasses
import json as json_format
import sys
from typing import Literal

import jax
from jax.sharding import Mesh
from rich import box
from rich.console import Console
from rich.table import Table

from experiments import cli
from mfa_jax.capacity import model_parameters
from mfa_jax.config import DataConfig, DType, MeshConfig, ModelConfig, TrainConfig, require
from mfa_jax.plan import (
    Decoding,
    Plan,
    Suggestion,
    mesh_of,
    parse_topology,
    plan_decoding,
    plan_training,
    prepare,
    suggest,
)
from mfa_jax.plan.programs import decoding_arguments, training_arguments
from mfa_jax.plan.search import POLICIES, Program
from mfa_jax.presets import model_preset

GIB = 2**30
Remat = Literal["none", "dots", "full"]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What a model needs on a TPU slice, and how fast it could be there: compiled ahead of time, not run."""

    model: str
    """A preset."""
    topology: str
    """A slice: v5e:4x4, v5p:4x4x4, v6e:8x8, ..."""
    batch_tokens: int
    """Tokens of a step over all chips: rows x seq in training, rows (a token each) in decoding."""
    seq: int
    """Tokens of a row; with --decode, tokens in its cache."""
    mesh: str = "fsdp=-1"
    """Sizes of mesh axes (data, fsdp, expert, context, tensor), such as fsdp=32,tensor=2; one may be -1, the rest."""
    decode: bool = False
    """Plan the loop that decodes; otherwise a training step."""
    remat: Remat = "full"
    """What the backward pass of a training step recomputes."""
    unroll_layers: bool = False
    """Compile a training step without a loop over layers: fewer bytes of HBM, more compile time."""
    accumulate: int = 1
    """Parts that the batch of a training step is computed in."""
    dtype: DType = "bfloat16"
    """What is computed in."""
    param_dtype: DType | None = None
    """What parameters are stored in; none for float32 in training, bfloat16 in decoding."""
    cache_dtype: Literal["float32", "bfloat16", "int8", "float8_e4m3fn"] = "bfloat16"
    """With --decode, what the cache holds."""
    vocab_size: int | None = None
    """Rows of the tables in place of the model's own number, where that does not divide over `tensor`."""
    suggest: bool = True
    """Also look for the smallest slice that it fits, which compiles for some others."""
    json: bool = False
    """Print JSON in place of tables."""

    @property
    def rows(self) -> int:
        """Sequences of a step."""
        return self.batch_tokens if self.decode else self.batch_tokens // self.seq

    def __post_init__(self) -> None:
        model_preset(self.model)  # refuses a name it does not know
        for name in ("batch_tokens", "seq", "accumulate", "vocab_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "must be at least 1")
        what, unread = (("decoding", ("remat", "unroll_layers", "accumulate")) if self.decode
                        else ("a training step", ("cache_dtype",)))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            require(field.name not in unread or value == field.default, field.name, value,
                    f"must be left out: {what} reads none")
        require(self.decode or self.batch_tokens % self.seq == 0, "batch_tokens", self.batch_tokens,
                f"must be a multiple of seq={self.seq}")


def mesh_config(text: str) -> MeshConfig:
    """The sizes of `fsdp=32,tensor=2`; an axis that is not named has size 1.

    Raises:
      ValueError: an unknown axis, one named twice, or what is no number.
    """
    names = [field.name for field in dataclasses.fields(MeshConfig)]
    sizes = dict.fromkeys(names, 1)
    seen: set[str] = set()
    for part in text.split(","):
        name, _, size = part.partition("=")
        require(name in names and name not in seen, "mesh", text, f"must name axes of {', '.join(names)} once each")
        require(size.removeprefix("-").isdigit(), "mesh", text, f"{name} must have a number, such as {name}=4")
        seen.add(name)
        sizes[name] = int(size)
    return MeshConfig(**sizes)


def model_of(arguments: Arguments, remat: Remat) -> ModelConfig:
    """The model as it is compiled."""
    stored: DType = arguments.param_dtype or ("bfloat16" if arguments.decode else "float32")
    model = model_preset(arguments.model)
    return dataclasses.replace(model, dtype=arguments.dtype, param_dtype=stored, remat=remat,
                               unroll_layers=arguments.unroll_layers,
                               vocab_size=arguments.vocab_size or model.vocab_size)


def program_of(arguments: Arguments) -> Program:
    """What is compiled, for any slice and remat policy."""
    def decoding(remat: Remat) -> Decoding:
        return Decoding(model_of(arguments, remat), arguments.rows, arguments.seq, arguments.cache_dtype)

    def training(remat: Remat) -> TrainConfig:
        data = DataConfig(batch_size=arguments.rows, sequence_length=arguments.seq)
        return TrainConfig(model=model_of(arguments, remat), data=data, accumulate=arguments.accumulate)

    if arguments.decode:
        return Program(lambda topology, mesh, remat: plan_decoding(decoding(remat), topology, mesh),
                       lambda mesh: decoding_arguments(decoding("none"), mesh), ("none",))
    return Program(lambda topology, mesh, remat: plan_training(training(remat), topology, mesh),
                   lambda mesh: training_arguments(training("full"), mesh), POLICIES)


def answer(arguments: Arguments) -> tuple[Plan, Suggestion | None]:
    """The plan that was asked for, and what else would fit."""
    topology, sizes, program = parse_topology(arguments.topology), mesh_config(arguments.mesh), program_of(arguments)
    mesh = mesh_of(topology, dataclasses.astuple(sizes))
    require_vocabulary(arguments, mesh)
    remat: Remat = "none" if arguments.decode else arguments.remat
    _progress(f"compiling for {topology.name}")
    plan = program.compile(topology, mesh, remat)
    if not arguments.suggest:
        return plan, None
    laid = MeshConfig(**dict(mesh.shape))
    return plan, suggest(program, topology.chip, laid, [(topology.name, remat, plan)], _progress)


def require_vocabulary(arguments: Arguments, mesh: Mesh) -> None:
    """Refuses a vocabulary that does not divide over `tensor`, and says which does.

    Raises:
      ValueError: with the size, and the next one that divides.
    """
    size, shards = model_of(arguments, "none").vocab_size, mesh.shape["tensor"]
    require(size % shards == 0, "vocab_size", size, f"must be a multiple of mesh tensor={shards}; published ones are "
            f"padded with rows that no token names: --vocab-size {-(-size // shards) * shards}")


def _progress(text: str) -> None:
    print(f"{text} ...", file=sys.stderr, flush=True)


# ---- output ----------------------------------------------------------------------------------------------------


def to_json(arguments: Arguments, plan: Plan, suggestion: Suggestion | None) -> str:
    """One JSON object."""
    chip = parse_topology(arguments.topology).chip
    return json_format.dumps({
        "request": dataclasses.asdict(arguments), "jax": jax.__version__, "compiler": compiler_version(),
        "chip": {k: v for k, v in dataclasses.asdict(chip).items() if k != "slices"},
        "parameters": model_parameters(model_of(arguments, "full")).total, "predicted_not_measured": True,
        "plan": dataclasses.asdict(plan), "suggestion": suggestion and dataclasses.asdict(suggestion)}, indent=2)


def compiler_version() -> str:
    """Of the libtpu that compiled."""
    from mfa_jax.plan.compiler import libtpu

    path = libtpu()
    found = [] if path is None else sorted(path.parent.parent.glob("libtpu-*.dist-info"))
    return found[-1].name.removesuffix(".dist-info") if found else str(path)


def print_tables(arguments: Arguments, plan: Plan, suggestion: Suggestion | None, console: Console) -> None:
    """What a reader wants to know, in the order of the questions: does it fit, what does it do, how long, what else."""
    what = (f"decoding {arguments.rows} rows with {arguments.seq} tokens of cache in {arguments.cache_dtype}"
            if arguments.decode else f"a training step of {arguments.rows} rows of {arguments.seq} tokens")
    count = model_parameters(model_of(arguments, "full")).total
    console.print(f"[bold]{arguments.model}[/bold] ({count / 1e9:.3g} B parameters): {what}, on {plan.topology} as "
                  f"{' x '.join(f'{axis}={size}' for axis, size in plan.mesh.items()) or 'one chip'}")
    if plan.cache is not None:
        console.print(f"Cache: {plan.cache}")
    chip = parse_topology(arguments.topology).chip
    if plan.memory is None:
        needed = "more memory" if plan.bytes_needed is None else f"{plan.bytes_needed / GIB:.2f} GiB"
        console.print(f"[bold]Does not fit[/bold]: asks for {needed}, a chip gives "
                      f"{(plan.bytes_available or chip.hbm_bytes) / GIB:.2f} GiB.")
    else:
        console.print(memory_table(plan, chip.hbm_bytes))
    if plan.prediction is not None:
        console.print(time_table(plan))
        console.print(exchange_table(plan))
        for kind, names in (("loops whose length only the data say count once", plan.prediction.unknown_loops),
                            ("kernels whose FLOPs are not counted", plan.prediction.unknown_kernels)):
            if names:
                console.print(f"Note: {kind}: {', '.join(names)}")
        if "expert" in plan.mesh:
            console.print("Note: products and exchange of experts are those of a balanced router, which gives each as "
                          "many tokens")
    if suggestion is not None:
        console.print(suggestion_table(suggestion))
    console.print(f"traced and lowered in {plan.lower_seconds:.1f} s, compiled in {plan.compile_seconds:.1f} s "
                  f"by {compiler_version()}, jax {jax.__version__}")


def _table(title: str, *headings: str, caption: str | None = None) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", caption=caption, caption_justify="left")
    table.add_column(headings[0], no_wrap=True)
    for heading in headings[1:]:
        table.add_column(heading, justify="right")
    return table


def memory_table(plan: Plan, hbm_bytes: int) -> Table:
    """Bytes of one chip."""
    assert plan.memory is not None
    table = _table("Memory of one chip", "", "GiB", caption=f"It fits: the compiler placed it in {hbm_bytes / GIB:.0f} "
                   "GiB, less what the system keeps.")
    for name, size in dataclasses.asdict(plan.memory).items():
        table.add_row(name, f"{size / GIB:.3f}")
    return table


def time_table(plan: Plan) -> Table:
    """The roofline of one chip."""
    p = plan.prediction
    assert p is not None
    table = _table("Predicted from published peaks, not measured: one step of one chip", "", "amount", "least time, ms",
                   caption=f"Step: {1e3 * p.step_seconds:.3g} ms, MFU {p.mfu:.1%}, if all exchange hides behind "
                   f"arithmetic; {1e3 * p.step_seconds_without_overlap:.3g} ms, {p.mfu_without_overlap:.1%}, if none "
                   f"does; instructions one after another. No step is below {1e3 * p.least_seconds:.3g} ms, MFU "
                   f"{p.mfu * p.step_seconds / p.least_seconds:.1%}, the longest of the times below. Latency, vector "
                   "arithmetic and half-filled units come on top.")
    table.add_row("model FLOPs, closed form", f"{plan.model_flops:.3e}", "")
    table.add_row("FLOPs of the program", f"{p.flops:.3e}", f"{1e3 * p.compute_seconds:.3g}")
    table.add_row("bytes of HBM", f"{p.hbm_bytes:.3e}", f"{1e3 * p.memory_seconds:.3g}")
    table.add_row("bytes sent", f"{sum(e.bytes_sent for e in p.exchanges):.3e}",
                  f"{1e3 * p.interconnect_seconds:.3g}")
    table.add_row("compiler's FLOPs, loops counted once", f"{plan.compiler_flops or 0:.3e}", "")
    table.add_row("compiler's bytes, loops counted once", f"{plan.compiler_bytes or 0:.3e}", "")
    return table


def exchange_table(plan: Plan) -> Table:
    """Collectives by kind and mesh axis."""
    assert plan.prediction is not None
    table = _table("Collectives of one step", "kind", "mesh axes", "chips", "calls", "MB sent by a chip",
                   "least time, ms")
    for e in plan.prediction.exchanges:
        table.add_row(e.kind, " x ".join(e.axes) or "unknown", str(e.devices), str(e.calls),
                      f"{e.bytes_sent / 1e6:.4g}", f"{1e3 * e.seconds:.3g}")
    return table


def suggestion_table(suggestion: Suggestion) -> Table:
    """What was tried, and what came of it."""
    if suggestion.topology is None:
        found = "No slice of the list fits."
    else:
        found = f"Smallest slice that fits: {suggestion.topology}, with remat {suggestion.remat}."
    table = _table(f"Slices: {found}", "slice", "remat", "fits", "memory of a chip, or why not")
    for t in suggestion.tries:
        table.add_row(t.topology, t.remat, "yes" if t.fits else "no", t.reason)
    return table


def main() -> None:
    arguments = cli.parse(Arguments)
    parse_topology(arguments.topology), mesh_config(arguments.mesh)
    prepare()
    plan, suggestion = answer(arguments)
    if arguments.json:
        print(to_json(arguments, plan, suggestion))
    else:
        print_tables(arguments, plan, suggestion, Console())


if __name__ == "__main__":
    cli.run(main)
