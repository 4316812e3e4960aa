"""What attention costs and can express: the paper's measures for published models and for our presets.

    python -m experiments.capacity --model step3 --context 8192 --cache-dtype int8 --json
    python -m experiments.capacity --model all --cache-dtype int8 --plot capacity.png
"""

from __future__ import annotations

import dataclasses
import json as json_format
from pathlib import Path
from typing import Annotated

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from experiments.cli import parse, run
from mfa_jax.capacity import Report, analyse
from mfa_jax.config import require
from mfa_jax.presets import attention_shape, published

COLORS = {"mha": "C7", "gqa": "C0", "mqa": "C9", "mla": "C1", "mfa": "C2", "mfa_kr": "C3"}
"""Of the variants, in every picture."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What attention costs and can express, in closed form: cache, FLOPs, parameters, ranks."""

    model: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A published model (step3, deepseek-v3, kimi-k2, qwen3-235b, qwen3-32b, paper-7b-{mha,mla,mfa,mfa-kr}) or one of
    our presets ({tiny,nano,small,base}-{mha,gqa,mqa,mla,mfa,mfa-kr}); may be given several times. `all`, or none:
    every published model."""
    context: int = 8192
    """Tokens in the cache when the next one is decoded."""
    cache_dtype: str = "bfloat16"
    """What the cache holds: float32, bfloat16, float16, float8_e4m3fn or int8 (scales are not counted)."""
    json: bool = False
    """Print JSON instead of a table: one object, for several models keyed by their names."""
    plot: str | None = None
    """File for a picture (png, pdf or svg, by its ending)."""


def reports(arguments: Arguments) -> dict[str, Report]:
    """The report of each model, in the order given.

    Raises:
      ValueError: an unknown model or cache dtype, or a context below 1.
    """
    names: list[str] = []
    for name in arguments.model or ("all",):
        names += published if name == "all" else [name]
    shapes = [attention_shape(name) for name in dict.fromkeys(names)]
    return {
        s.name: analyse(s.attention, s.model_dim, s.num_layers, context=arguments.context,
                        cache_dtype=arguments.cache_dtype)
        for s in shapes
    }


def to_json(found: dict[str, Report]) -> str:
    """One JSON object: the report of the one model, or the reports by name."""
    objects = {
        name: {"model": name, **dataclasses.asdict(report), "source": attention_shape(name).source}
        for name, report in found.items()
    }
    return json_format.dumps(next(iter(objects.values())) if len(objects) == 1 else objects, indent=2)


def to_table(found: dict[str, Report]) -> Table:
    """A row a model, within 80 columns; three digits, k, M, G and T are powers of 1000."""
    first = next(iter(found.values()))
    table = Table(title=f"Decoding one token at context {first.context}, cache in {first.cache_dtype}",
                  box=box.SIMPLE_HEAD, padding=0, title_justify="left",
                  caption_justify="left",
                  caption="L layers, N query heads. Of one layer: N, FRH, SLSD, TER, parameters. "
                          "Of all layers: cache and read in bytes, attention and projection FLOPs.")
    table.add_column("model", no_wrap=True)
    for heading in ("L", "N", "FRH", "SLSD", "TER", "param\n/layer", "cache\n/token", "read\n/token", "attn\nFLOPs",
                    "proj\nFLOPs", "FLOPs\n/byte"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, r in found.items():
        table.add_row(name, str(r.layers), str(r.heads), str(r.frh), str(r.slsd), str(r.ter),
                      _si(r.parameters_per_layer), _si(r.cache_bytes_per_token), _si(r.bytes_read_per_decoded_token),
                      _si(r.attention_flops), _si(r.projection_flops), _si(r.arithmetic_intensity))
    return table


def _si(value: float) -> str:
    rounded = float(f"{value:.3g}")
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if rounded >= factor:
            return f"{rounded / factor:g}{prefix}"
    return f"{rounded:g}"


def save_plot(found: dict[str, Report], path: str) -> None:
    """Four panels with a common axis of models: cache, attention FLOPs, arithmetic intensity, rank.

    Raises:
      ValueError: a file that cannot be written, or an ending that names no picture format.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch
    from matplotlib.ticker import NullFormatter

    first = next(iter(found.values()))
    panels: tuple[tuple[str, list[float]], ...] = (
        ("cache per token [bytes]", [r.cache_bytes_per_token for r in found.values()]),
        ("attention per decoded token [FLOPs]", [r.attention_flops for r in found.values()]),
        ("arithmetic intensity [FLOPs / byte]", [r.arithmetic_intensity for r in found.values()]),
        ("total effective rank of a layer", [r.ter for r in found.values()]),
    )
    figure, axes = plt.subplots(1, 4, sharey=True, figsize=(15, 1.8 + 0.34 * len(found)), layout="constrained")
    for axis, (label, values) in zip(axes, panels, strict=True):
        # Points: a bar on a logarithmic axis would have a length that means nothing.
        axis.scatter(values, list(found), color=[COLORS[r.variant] for r in found.values()], zorder=3)
        for name, value in zip(found, values, strict=True):
            axis.annotate(_si(value), (value, name), (7, 0), textcoords="offset points", va="center", fontsize=8)
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlim(min(values) / 3, max(values) * 6)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
    axes[0].invert_yaxis()
    present = dict.fromkeys(r.variant for r in found.values())
    handles = [Patch(color=COLORS[v]) for v in present]
    figure.legend(handles, [v.upper().replace("_", "-") for v in present], loc="outside lower center", ncols=6)
    figure.suptitle(f"Decoding one token at context {first.context}, cache in {first.cache_dtype}")
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise ValueError(f"plot={path!r}: cannot be written ({error.strerror})") from error
    finally:
        plt.close(figure)


def main() -> None:
    arguments = parse(Arguments)
    found = reports(arguments)
    if arguments.plot is not None:
        require(Path(arguments.plot).suffix in (".png", ".pdf", ".svg"), "plot", arguments.plot,
                "must end in .png, .pdf or .svg")
        save_plot(found, arguments.plot)
    if arguments.json:
        print(to_json(found))
    else:
        Console().print(to_table(found))


if __name__ == "__main__":
    run(main)
