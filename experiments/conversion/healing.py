r"""How much of a conversion's loss healing takes back, against the tokens that it was healed on.

    python -m experiments.conversion.healing texts --out runs/heal-text
    python -m experiments.heal --teacher model.gguf --student runs/converted --workdir runs/healed \
        --data.source runs/heal-text/train --data.held-out-source runs/heal-text/valid --eval-batches 100 --steps 500
    python -m experiments.conversion.healing curve --run "MFA-KR, 192"=runs/healed --name healing-MODEL

`texts` makes the text of such runs from the validation text of WikiText-2, of which the end is held out, and from
training books, with pieces of validation books held out; no test text is read. `curve` writes `NAME.json` and
`NAME.png` from the `metrics.jsonl` of runs. Texts are read in the folder that MFA_JAX_DATA names.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import tyro
from matplotlib.figure import Figure

from experiments import cli
from experiments.capacity import COLORS
from experiments.studies import corpus
from mfa_jax.config import TrainConfig, load_json, require, to_dict
from mfa_jax.convert.files import appearing, require_free
from mfa_jax.data import documents
from mfa_jax.train.run import CONFIG

RESULTS = Path(__file__).parents[1] / "results" / "conversion"
WIKI, VALID = "wikitext2-valid", "books-valid"
_MEASURES = ("kl", "loss", "teacher_loss", "bits_per_byte")


@dataclasses.dataclass(frozen=True)
class TextsConfig:
    """The text that runs are healed on, and what they are evaluated on in between."""

    out: str
    """Folder that is written, with `train` and `valid` in it; must not exist yet, or be empty."""
    books: str = "books-train-xs"
    """Name of the text with the training books."""
    characters: int = 90_000
    """So much of each training book, from its beginning."""
    held_out: int = 4
    """Pieces of each kind of text that are held out."""
    piece: int = 4_500
    """Characters of such a piece, about a thousand tokens."""

    def __post_init__(self) -> None:
        for name in ("characters", "held_out", "piece"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")


@dataclasses.dataclass(frozen=True)
class CurveConfig:
    """The runs of a picture."""

    run: Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
    """NAME=FOLDER of a healing run; may be given several times."""
    results: str = str(RESULTS)
    """Folder that is written to."""
    name: str = "healing"
    """Of the two files there, without their endings."""

    def __post_init__(self) -> None:
        require(bool(self.name) and Path(self.name).name == self.name, "name", self.name,
                "must be the name of a file, without a folder")


def texts(config: TextsConfig) -> Path:
    """Writes the folder; it appears when it is complete.

    Raises:
      ValueError: the folder is taken, a text is missing, or there is too little of one.
    """
    out = Path(config.out)
    require_free(out)
    wiki = "\n".join(document.text for document in documents(str(corpus.find(WIKI))))
    held = config.held_out * config.piece
    require(len(wiki) >= 5 * held, "held_out", config.held_out, f"{WIKI} has {len(wiki)} characters, of which a fifth")
    cut = len(wiki) - len(wiki) // 5
    span = (len(wiki) - cut) // config.held_out
    pieces = [wiki[cut + i * span :][: config.piece] for i in range(config.held_out)]
    # From the middle: conversions are calibrated on beginnings.
    books = [document.text[len(document.text) // 2 :][: config.piece]
             for document in documents(str(corpus.find(VALID)))][: config.held_out]
    require(len(books) == config.held_out, "held_out", config.held_out, f"{VALID} has {len(books)} books")
    train = [document.text[: config.characters] for document in documents(str(corpus.find(config.books)))]
    with appearing(out) as partial:
        for folder, parts in (("train", [*train, wiki[:cut]]), ("valid", [*pieces, *books])):
            (partial / folder).mkdir()
            (partial / folder / "text.txt").write_text("\0".join(parts), encoding="utf-8")
    return out


def read_curve(folder: str) -> dict[str, Any]:
    """The settings of a run, and its held-out measures against the tokens that it had trained on.

    Raises:
      ValueError: no healing run there, or it evaluated nothing.
    """
    config = load_json(TrainConfig, Path(folder) / CONFIG)
    require(config.distillation is not None, "run", folder, "is no healing run: its config has no distillation")
    metrics = Path(folder) / "metrics.jsonl"
    require(metrics.is_file(), "run", folder, "has no metrics.jsonl")
    lines = list(_records(metrics))
    a_step = config.data.batch_size * config.data.sequence_length
    points = [{"tokens": line["step"] * a_step, **{name: line[f"eval_{name}"] for name in _MEASURES}}
              for line in lines if "eval_kl" in line]
    require(len(points) >= 2, "run", folder, f"evaluated {len(points)} times; a curve takes two")
    rates = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    require(bool(rates), "run", folder, "has no tokens_per_second in metrics.jsonl")
    model = config.model
    return {"attention": to_dict(model.attention), "optimizer": to_dict(config.optimizer),
            "distillation": {name: value for name, value in to_dict(config.distillation).items() if name != "teacher"},
            "batch_size": config.data.batch_size, "sequence_length": config.data.sequence_length,
            "steps": config.steps, "dtype": model.dtype, "tokens_per_second": sorted(rates)[len(rates) // 2],
            "points": points}


def _records(metrics: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(metrics.read_text().splitlines(), 1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"run: line {number} of {str(metrics)!r} is not JSON, half-written maybe ({error})"
                             ) from error


def read_curves(run: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """The curves of NAME=FOLDER, ..., by name.

    Raises:
      ValueError: none, a name twice, what `read_curve` refuses, or runs whose teachers or held-out texts differ.
    """
    require(bool(run), "run", run, "give at least one --run NAME=FOLDER")
    runs: dict[str, dict[str, Any]] = {}
    for item in run:
        name, _, workdir = item.rpartition("=")
        require(bool(name), "run", workdir, "must be NAME=FOLDER")
        require(name not in runs, "run", item, "must have a name of its own")
        runs[name] = read_curve(workdir)
    losses = {name: found["points"][0]["teacher_loss"] for name, found in runs.items()}
    first = next(iter(losses.values()))
    # Another batch or mesh sums in another order.
    require(all(math.isclose(loss, first, rel_tol=1e-3) for loss in losses.values()), "teacher_loss", losses,
            "must be the same for all runs of a picture: one teacher, one held-out text")
    return runs


def curve(config: CurveConfig) -> Path:
    """Writes `NAME.json` and `NAME.png`; each appears when it is complete. Raises: ValueError: see `read_curves`."""
    runs = read_curves(config.run)
    folder = Path(config.results)
    folder.mkdir(parents=True, exist_ok=True)
    figure = draw(runs, config.name)
    picture, numbers = (folder / f".{config.name}.{ending}.partial" for ending in ("png", "json"))
    figure.savefig(picture, dpi=120, format="png")
    numbers.write_text(json.dumps(runs, indent=1) + "\n")
    picture.replace(folder / f"{config.name}.png")
    numbers.replace(folder / f"{config.name}.json")
    return folder


def draw(runs: dict[str, dict[str, Any]], title: str) -> Figure:
    """Divergence and held-out loss against tokens; colours are those of variants, a second run of one is dashed."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    divergence, loss = figure.subplots(1, 2)
    drawn: list[str] = []
    for name, found in runs.items():
        tokens, kind = [point["tokens"] / 1000 for point in found["points"]], found["attention"]["kind"]
        look = {"color": COLORS[kind], "linestyle": ("-", "--", ":", "-.")[drawn.count(kind) % 4], "label": name}
        drawn.append(kind)
        divergence.plot(tokens, [point["kl"] for point in found["points"]], marker="o", markersize=3, **look)
        loss.plot(tokens, [point["loss"] for point in found["points"]], marker="o", markersize=3, **look)
    loss.axhline(next(iter(runs.values()))["points"][0]["teacher_loss"], color="black", linewidth=1)
    divergence.set(xlabel="thousand tokens", ylabel="KL from the original, nats a token", ylim=(0, None))
    loss.set(xlabel="thousand tokens", ylabel="held-out loss, nats a token", title="black: the original")
    for axes in (divergence, loss):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(title)
    return figure


def main() -> None:
    action, *flags = sys.argv[1:] or ["--help"]
    if action in ("-h", "--help"):
        print(__doc__)
        return
    require(action in ("texts", "curve"), "action", action, "must be texts or curve")
    if action == "texts":
        print(f"written: {texts(cli.parse(TextsConfig, flags))}")
    else:
        print(f"written: {curve(cli.parse(CurveConfig, flags))}")


if __name__ == "__main__":
    cli.run(main)
