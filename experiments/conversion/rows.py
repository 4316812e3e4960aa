"""The rows of the table: which conversions there are, and what makes two of them the same."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any

from experiments.convert import ConvertConfig, pooled_heads, unread, width_of
from mfa_jax.config import GQAConfig, ModelConfig, require

ORIGINAL = "original"
KINDS: dict[str, dict[str, Any]] = {
    "mfa_kr": {"to": "mfa_kr"},
    "mfa": {"to": "mfa"},
    "key_pca": {"to": "mfa", "method": "key_pca"},
    "mean_pool": {"to": "gqa", "method": "mean_pool"},
}
"""Settings of `experiments.convert` for each kind of row."""
PLAIN = ("key_pca", "mean_pool")
"""Kinds that are there to compare with; without one of ratio 1, which would be the original."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much text a conversion is given, and how much a model is measured on."""

    calibration_rows: int = 24
    """Rows of calibration text, half of each file."""
    calibration_tokens: int = 512
    """Tokens of such a row."""
    calibration_spread: bool = False
    """Rows over the whole of each file, not from its beginning."""
    text_rows: int = 24
    """Rows of each test text, evenly spread over the whole of it."""
    text_tokens: int = 512
    """Tokens of such a row that are predicted."""
    items: int = 50
    """The first so many items of each task."""
    tasks: tuple[str, ...] = ("local_hellaswag", "local_piqa", "local_openbookqa", "local_siqa")

    def __post_init__(self) -> None:
        for name in ("calibration_rows", "calibration_tokens", "text_tokens"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        for name in ("text_rows", "items"):
            require(getattr(self, name) >= 2, name, getattr(self, name),
                    "must be at least 2: errors are estimated from them")


TINY = Sizes(calibration_rows=8, calibration_tokens=128, text_rows=4, text_tokens=96, items=6)


@dataclasses.dataclass(frozen=True)
class Row:
    """One model of the table."""

    name: str
    kind: str
    """A key of `KINDS`, or `original`."""
    ratio: float
    healed: str | None = None
    """Folder of the run that trained it after the conversion; None for a model as it was converted."""


def plan(ratios: tuple[float, ...], kinds: tuple[str, ...], num_kv_heads: int, healed: tuple[str, ...]) -> list[Row]:
    """The original, then for each ratio in turn every kind that can have it, then what was healed.

    Args:
      ratios: of the original's cached elements over the new ones.
      healed: `KIND-RATIO=FOLDER`, such as `mfa_kr-1.5=runs/healed`.

    Raises:
      ValueError: an unknown kind, a ratio below 1, or a healed model of another form.
    """
    for kind in kinds:
        require(kind in KINDS, "kinds", kind, f"must be among {', '.join(KINDS)}")
    for ratio in ratios:
        require(ratio >= 1, "ratios", ratio, "must be at least 1")
    rows = [Row(ORIGINAL, ORIGINAL, 1.0)]
    rows += [Row(f"{kind}-{ratio:g}", kind, ratio) for ratio in ratios for kind in kinds
             if _possible(kind, ratio, num_kv_heads)]
    return rows + [_healed(given) for given in healed]


def _possible(kind: str, ratio: float, num_kv_heads: int) -> bool:
    if kind == "mean_pool":
        return ratio > 1 and ratio.is_integer() and num_kv_heads % ratio == 0
    return ratio > 1 or kind not in PLAIN


def _healed(given: str) -> Row:
    name, _, folder = given.partition("=")
    kind, _, ratio = name.rpartition("-")
    require(bool(folder) and kind in KINDS and ratio.replace(".", "", 1).isdigit(), "healed", given,
            "must be KIND-RATIO=FOLDER, such as mfa_kr-1.5=runs/healed")
    require(float(ratio) >= 1, "healed", given, "must have a ratio of at least 1")
    return Row(f"{kind}-{float(ratio):g}-healed", kind, float(ratio), folder)


def conversion(row: Row, sizes: Sizes, source: str, tokenizer: str | None, calibration: tuple[str, ...],
               out: str) -> ConvertConfig:
    """What `experiments.convert` is asked for."""
    needs = row.ratio > 1 and row.kind != "mean_pool"
    text: dict[str, Any] = {"calibration": calibration, "rows": sizes.calibration_rows,
                            "context": sizes.calibration_tokens, "spread": sizes.calibration_spread}
    return ConvertConfig(source, out, cache_ratio=row.ratio, tokenizer=tokenizer, **KINDS[row.kind],
                         **(text if needs else {}))


def cached_elements(row: Row, model: ModelConfig) -> int:
    """What a row's model must cache, of a token and layer."""
    to = KINDS[row.kind]["to"]
    if to == "gqa":
        assert isinstance(model.attention, GQAConfig)
        return 2 * pooled_heads(model, row.ratio) * model.attention.head_dim
    return width_of(model, to, row.ratio) * (1 if to == "mfa_kr" else 2)


def conversion_settings(config: ConvertConfig) -> dict[str, Any]:
    """A conversion without its places: what it makes of which bytes."""
    found = dataclasses.asdict(config)
    for name in ("out", "report"):
        del found[name]
    digests = [text_digest(path) for path in config.calibration]
    return {**found, "source": model_digest(config.source), "calibration": digests}


def same_conversion(recorded: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether two conversions have the same settings: one that was written without a field has its default."""
    defaults = {field.name: field.default for field in dataclasses.fields(ConvertConfig)}
    names = {*recorded, *wanted} - {*unread(wanted.get("method", ""), wanted.get("cache_ratio", 1.0))}
    return all(recorded.get(name, defaults.get(name)) == wanted.get(name, defaults.get(name)) for name in names)


@functools.cache
def text_digest(path: str) -> str:
    """The name of a file and eight bytes of its digest."""
    return f"{Path(path).name} {_digest(Path(path))}"


@functools.cache
def model_digest(path: str) -> str:
    """A digest of the weights in a file or folder."""
    found = Path(path)
    files = sorted(found.glob("*.safetensors")) if found.is_dir() else [found]
    require(bool(files) and all(file.is_file() for file in files), "from", path,
            "must be a .gguf file or a folder with safetensors")
    return " ".join(_digest(file) for file in files)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, functools.partial(hashlib.blake2b, digest_size=8)).hexdigest()
