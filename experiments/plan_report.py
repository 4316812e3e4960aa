"""What MFA saves on a pod, by the planner: `python -m experiments.plan_report`, for `experiments/results/plan/`.

The paper's 7B family, and Step-3 beside MHA and MLA with as many attention parameters: a decoding step with full caches
and a training step, compiled for the same slice and mesh. Then one small model on 8 to 512 chips, with as much work a
chip, training steps whose layers are a loop or a row, and such whose experts are split over chips. Each line is written
as soon as it is there, and is compiled again only where its program now has arguments of another size; until then it is
shown as superseded. It takes two hours or three; nothing is run on a TPU.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from experiments import cli
from experiments.plan import compiler_version, mesh_config
from mfa_jax import capacity
from mfa_jax.config import DataConfig, GQAConfig, MLAConfig, ModelConfig, TrainConfig, require
from mfa_jax.plan import Decoding, Plan, mesh_of, parse_topology, plan_decoding, plan_training, prepare
from mfa_jax.plan.programs import decoding_arguments, training_arguments
from mfa_jax.presets import match_heads, model_preset

DECODE, TRAIN, LONG, SCALE, ROW, EXPERTS = "decode", "train", "long", "scale", "row", "experts"


@dataclasses.dataclass(frozen=True)
class PlanReportConfig:
    """Which lines, and where they go."""

    output: str = "experiments/results/plan"
    """A folder: plan.json, plan.md and the picture are written into it."""
    only: str = ""
    """Compile only the lines whose name begins so; the table and the picture show all that are there."""


@dataclasses.dataclass(frozen=True)
class Line:
    """One program on one slice."""

    name: str
    model: Callable[[], ModelConfig]
    topology: str
    mesh: str
    rows: int
    seq: int
    remat: Literal["none", "full"] = "full"
    """Of a training step."""
    unroll: bool = False
    """Whether its layers are a row, and not a loop."""
    at_once: int | None = None
    """Tokens of a chip that travel to their experts at a time."""


def step3_with(attention: Any) -> ModelConfig:
    """Step-3 with other attention of as many parameters; a vocabulary that 16 shards divide."""
    model = dataclasses.replace(model_preset("step3"), vocab_size=128896)
    if attention is None:
        return model
    parameters = capacity.attention_parameters(model.attention, model.model_dim)
    if attention == "mha":
        # Key heads grow with the query heads, which `match_heads` leaves as they are.
        heads = 16 * round(parameters / (4 * model.model_dim * 128) / 16)
        return dataclasses.replace(model, attention=GQAConfig(num_heads=heads, num_kv_heads=heads, head_dim=128))
    return dataclasses.replace(model, attention=match_heads(attention, model.model_dim, parameters, multiple=16))


def _step3(attention: Any) -> Callable[[], ModelConfig]:
    return lambda: step3_with(attention)


def _preset(name: str) -> Callable[[], ModelConfig]:
    return lambda: model_preset(name)


_MLA16 = MLAConfig(num_heads=16, nope_dim=128, rope_dim=64, value_dim=128, latent_dim=512, query_rank=1536)
_VARIANTS = ("mha", "mla", "mfa", "mfa-kr")
LINES: Sequence[Line] = (
    *(Line(f"{DECODE}/paper-7b-{v}", _preset(f"paper-7b-{v}"), "v5p:2x4x4", "data=16,tensor=2", 256, 32768)
      for v in _VARIANTS),
    *(Line(f"{DECODE}/step3-{v}", _step3(a), "v5p:4x4x4", "data=4,tensor=16", 128, 8192)
      for v, a in (("mfa", None), ("mla", _MLA16), ("mha", "mha"))),
    *(Line(f"{TRAIN}/paper-7b-{v}", _preset(f"paper-7b-{v}"), "v5p:4x4x4", "fsdp=64", 256, 4096) for v in _VARIANTS),
    Line(f"{TRAIN}/paper-7b-mfa-fsdp16", _preset("paper-7b-mfa"), "v5p:4x4x4", "data=4,fsdp=16", 256, 4096),
    *(Line(f"{LONG}/base-{v}", _preset(f"base-{v}"), "v5p:2x2x2", "context=8", 1, 131072) for v in _VARIANTS),
    *(Line(f"{LONG}/paper-7b-{v}", _preset(f"paper-7b-{v}"), "v5p:4x4x4", "fsdp=4,context=16", 4, 131072)
      for v in ("mha", "mfa", "mfa-kr")),
    *(Line(f"{SCALE}/base-mfa-{chips}", _preset("base-mfa"), f"v5p:{shape}", f"fsdp=4,data={chips // 4}", 4 * chips,
           2048)
      for chips, shape in ((8, "2x2x2"), (64, "4x4x4"), (512, "4x8x16"))),
    *(Line(f"{ROW}/base-mfa-{remat}-{'row' if unroll else 'loop'}", _preset("base-mfa"), "v5p:2x2x2", "fsdp=4,data=2",
           32, 2048, remat, unroll) for remat in ("full", "none") for unroll in (False, True)),
    Line(f"{ROW}/paper-7b-mfa-full-row", _preset("paper-7b-mfa"), "v5p:4x4x4", "fsdp=64", 256, 4096, unroll=True),
    *(Line(f"{EXPERTS}/paper-7b-mfa-{X}", _preset("paper-7b-mfa"), "v5p:4x4x4", f"fsdp={64 // X},expert={X}", 256, 4096)
      for X in (1, 4, 8)),
    Line(f"{EXPERTS}/paper-7b-mfa-8-parts", _preset("paper-7b-mfa"), "v5p:4x4x4", "fsdp=8,expert=8", 256, 4096,
         at_once=2048),
    *(Line(f"{EXPERTS}/step3-{X}{'' if chips == 64 else f'-{chips}'}", _step3(None), f"v5p:{shape}",
           f"fsdp={chips // X},expert={X}", chips, 4096)
      for chips, shape in ((64, "4x4x4"), (128, "4x4x8")) for X in (1, 4)),
)


def program(line: Line) -> Decoding | TrainConfig:
    """What a line compiles."""
    model = dataclasses.replace(line.model(), dtype="bfloat16")
    if line.name.startswith(DECODE):
        return Decoding(dataclasses.replace(model, param_dtype="bfloat16"), line.rows, line.seq, "bfloat16")
    data = DataConfig(batch_size=line.rows, sequence_length=line.seq)
    return TrainConfig(data=data, model=dataclasses.replace(
        model, remat=line.remat, unroll_layers=line.unroll, expert_exchange_tokens=line.at_once))


def arguments(line: Line) -> int:
    """Bytes of the arguments of a line's program on one chip, in closed form."""
    asked, mesh = program(line), mesh_of(parse_topology(line.topology), dataclasses.astuple(mesh_config(line.mesh)))
    return decoding_arguments(asked, mesh) if isinstance(asked, Decoding) else training_arguments(asked, mesh)


def superseded(found: dict[str, Any], now: int) -> bool:
    """Whether a line was compiled of arguments that differ by more than 1 % from what they are `now`, in bytes.

    The compiler's padding is below 0.1 %. Of a program that did not fit it tells no size: such a line is kept.
    """
    memory = found["plan"]["memory"]
    return memory is not None and abs(memory["arguments"] / now - 1) > 0.01


def compile_line(line: Line) -> dict[str, Any]:
    """The plan of a line and the closed forms beside it."""
    asked, topology = program(line), parse_topology(line.topology)
    mesh, model = mesh_of(topology, dataclasses.astuple(mesh_config(line.mesh))), asked.model
    plan: Plan = (plan_decoding(asked, topology, mesh) if isinstance(asked, Decoding)
                  else plan_training(asked, topology, mesh))
    return {
        "name": line.name, "rows": line.rows, "seq": line.seq, "mesh_asked": line.mesh,
        "parameters": capacity.model_parameters(model).total, "heads": model.attention.num_heads,
        "cache_bytes_per_token": capacity.cache_bytes_per_token(model.attention, model.num_layers, "bfloat16"),
        "date": datetime.date.today().isoformat(), "jax": jax.__version__, "compiler": compiler_version(),
        "plan": dataclasses.asdict(plan)}


def table(lines: Sequence[dict[str, Any]], old: Collection[str] = ()) -> str:
    """Markdown: one row a line; those whose names are in `old` are marked as superseded."""
    titles = ("program", "slice, mesh", "rows x tokens", "B parameters", "cache, KB a token", "cache, GiB a chip",
              "peak, GiB a chip", "GFLOPs a chip", "HBM, GB", "sent, MB", "no step is below, ms",
              "predicted step, ms", "exchange not hidden, ms")
    out = [f"| {' | '.join(titles)} |", "| --- | --- | --- " + "| ---: " * (len(titles) - 3) + "|"]
    for x in lines:
        plan, p = x["plan"], x["plan"]["prediction"]
        chips = parse_topology(plan["topology"]).size
        decode = x["name"].startswith(DECODE)
        cache = x["cache_bytes_per_token"] * x["rows"] * x["seq"] / chips / 2**30
        cells = [x["name"] + " (superseded)" * (x["name"] in old),
                 f"{plan['topology']}, {x['mesh_asked']}", f"{x['rows']} x {x['seq']}",
                 f"{x['parameters'] / 1e9:.2f}", f"{x['cache_bytes_per_token'] / 1e3:.1f}",
                 f"{cache:.2f}" if decode else ""]
        if p is None:
            asked = "" if plan["bytes_needed"] is None else f", asks for {plan['bytes_needed'] / 2**30:.1f}"
            cells += [f"does not fit{asked}", *[""] * 6]
        else:
            cells += [f"{plan['memory']['peak'] / 2**30:.2f}", f"{p['flops'] / 1e9:.4g}", f"{p['hbm_bytes'] / 1e9:.4g}",
                      f"{sum(e['bytes_sent'] for e in p['exchanges']) / 1e6:.4g}",
                      f"{1e3 * _least(p):.4g}", f"{1e3 * p['step_seconds']:.4g}",
                      f"{1e3 * p['step_seconds_without_overlap']:.4g}"]
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out) + "\n"


def experts_table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown: of the lines with and without the axis of experts, memory by what it holds and bytes sent by axis."""
    titles = ("program", "mesh", "arguments, GiB a chip", "temporaries, GiB", "peak, GiB", "GFLOPs a chip", "HBM, GB",
              "sent over fsdp, GB", "over expert, GB", "over both or others, GB", "no step is below, ms",
              "predicted step, ms", "exchange not hidden, ms")
    out = [f"| {' | '.join(titles)} |", "| --- | --- " + "| ---: " * (len(titles) - 2) + "|"]
    for x in lines:
        memory, p = x["plan"]["memory"], x["plan"]["prediction"]
        if not x["name"].startswith(EXPERTS):
            continue
        cells = [x["name"], x["mesh_asked"]]
        if p is None:
            needed = x["plan"]["bytes_needed"]
            asked = "" if needed is None else f", asks for {needed / 2**30:.1f}"
            cells += ["", f"does not fit{asked}", *[""] * (len(titles) - 4)]
        else:
            sent = {axis: sum(e["bytes_sent"] for e in p["exchanges"] if list(e["axes"]) == [axis])
                    for axis in ("fsdp", "expert")}
            other = sum(e["bytes_sent"] for e in p["exchanges"]) - sum(sent.values())
            cells += [*(f"{memory[part] / 2**30:.2f}" for part in ("arguments", "temporaries", "peak")),
                      f"{p['flops'] / 1e9:.4g}", f"{p['hbm_bytes'] / 1e9:.4g}",
                      *(f"{nbytes / 1e9:.3g}" for nbytes in (*sent.values(), other)), f"{1e3 * _least(p):.4g}",
                      f"{1e3 * p['step_seconds']:.4g}", f"{1e3 * p['step_seconds_without_overlap']:.4g}"]
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out) + "\n"


def _least(prediction: dict[str, Any]) -> float:
    return max(prediction[f"{what}_seconds"] for what in ("compute", "memory", "interconnect"))


def save_plot(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Decoding: memory of a chip by what fills it, bytes sent by a chip, predicted time of a step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [x for x in lines if x["name"].startswith(DECODE)]
    require(bool(shown), "lines", len(lines), "must hold a decoding line to plot")
    names = [f"{x['name'].removeprefix(f'{DECODE}/')}, {parse_topology(x['plan']['topology']).size} chips"
             for x in shown]
    figure, (memory, sent, seconds) = plt.subplots(1, 3, figsize=(14, 1.6 + 0.4 * len(shown)), sharey=True,
                                                   layout="constrained")
    cache = [x["cache_bytes_per_token"] * x["rows"] * x["seq"] / parse_topology(x["plan"]["topology"]).size / 2**30
             for x in shown]
    whole = [(x["plan"]["memory"]["peak"] if x["plan"]["memory"] else x["plan"]["bytes_needed"] or 0) / 2**30
             for x in shown]
    rest = [max(w - c, 0) for w, c in zip(whole, cache, strict=True)]
    memory.barh(names, cache, color="C2", label="cache")
    memory.barh(names, rest, left=cache, color="C7", label="weights, temporaries, code")
    memory.axvline(95, color="k", linestyle=":", linewidth=1, zorder=0)
    for i, (x, c, r) in enumerate(zip(shown, cache, rest, strict=True)):
        text = f"{c:.1f} + {r:.1f}" + ("" if x["plan"]["fits"] else ": does not fit")
        memory.text(c + r + 1, i, text, va="center", fontsize=8, bbox={"fc": "w", "ec": "none", "pad": 0.5})
    memory.set_xlim(0, 170)
    memory.set_xlabel("memory of a chip [GiB]; dotted: 95 GiB of v5p")
    predictions = [x["plan"]["prediction"] for x in shown]
    mega = [sum(e["bytes_sent"] for e in p["exchanges"]) / 1e6 if p else 0 for p in predictions]
    predicted = [1e3 * p["step_seconds"] if p else 0 for p in predictions]
    for axis, values, color, label in ((sent, mega, "C0", "sent by a chip in a step [MB]"),
                                       (seconds, predicted, "C1", "predicted step [ms], from published peaks")):
        axis.bar_label(axis.barh(names, values, color=color), padding=3, fontsize=8,
                       labels=[f"{v:.3g}" if p else "does not fit" for v, p in zip(values, predictions, strict=True)])
        axis.set_xlabel(label)
    for axis in (sent, seconds):
        axis.margins(x=0.15)
    memory.invert_yaxis()
    figure.legend(*memory.get_legend_handles_labels(), loc="outside lower left", ncols=2, fontsize=8)
    figure.suptitle("Decoding a token for each row at full caches: compiled for v5p, predicted, not measured")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(config: PlanReportConfig) -> None:
    prepare()
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "plan.json"
    done: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    old = {line.name for line in LINES if line.name in done and superseded(done[line.name], arguments(line))}
    for line in LINES:
        if (line.name in done and line.name not in old) or not line.name.startswith(config.only):
            continue
        print(f"{line.name} on {line.topology} ...", file=sys.stderr, flush=True)
        found = compile_line(line)
        # Another process may have written lines of its own meanwhile.
        done = (json.loads(file.read_text()) if file.exists() else {}) | {line.name: found}
        part = file.with_suffix(".part")
        part.write_text(json.dumps(done, indent=1) + "\n")
        part.replace(file)
        old.discard(line.name)
    ordered = [done[line.name] for line in LINES if line.name in done]
    (folder / "plan.md").write_text("\n".join([table(ordered, old), experts_table(ordered)]))
    save_plot(ordered, folder / "decode.png")


if __name__ == "__main__":
    cli.run(lambda: main(cli.parse(PlanReportConfig)))
