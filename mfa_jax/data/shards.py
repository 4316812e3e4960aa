"""The token shards of a corpus on disk, memory-mapped.

A prepared folder holds, per split (`train`, `held_out`), `<split>.bin` (all tokens, flat, uint16 or uint32, each
document followed by the end token), `<split>.offsets.npy` (int64; document i is tokens `offsets[i]:offsets[i+1]`),
and `meta.json`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int64, Integer

from mfa_jax.config import from_dict, require

FORMAT = 1
META = "meta.json"

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")
HeldOutBy = Literal["hash", "smallest hash", "tail of the only document", "source of its own", "nothing"]


@dataclasses.dataclass(frozen=True)
class SplitSize:
    """How much a split holds; `tokens` counts the end tokens, `text_bytes` the UTF-8 of the text."""

    documents: int
    tokens: int
    text_bytes: int

    @property
    def bytes_per_token(self) -> float:
        """Turns a loss in nats per token into bits per byte: `loss / ln 2 / bytes_per_token`."""
        return self.text_bytes / self.tokens if self.tokens else 0.0


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the shards depend on: a folder is reused only where all of it is the same."""

    source: str
    text_field: str
    held_out: float
    fingerprint: str
    held_out_source: str | None = None
    format: int = FORMAT


@dataclasses.dataclass(frozen=True)
class Meta:
    """The content of `meta.json`."""

    settings: Settings
    signature: str | None
    vocab_size: int
    eos_id: int
    dtype: Literal["uint16", "uint32"]
    held_out_by: HeldOutBy
    train: SplitSize
    held_out: SplitSize


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A finished folder of token shards."""

    folder: Path
    meta: Meta

    def size(self, split: Split) -> SplitSize:
        return self.meta.train if split == "train" else self.meta.held_out

    def tokens(self, split: Split) -> Integer[np.ndarray, " tokens"]:
        """The flat tokens of a split, memory-mapped."""
        if not self.size(split).tokens:
            return np.zeros(0, self.meta.dtype)
        return np.asarray(np.memmap(self.folder / f"{split}.bin", self.meta.dtype, "r"))

    def offsets(self, split: Split) -> Int64[np.ndarray, " ends"]:
        """Where each document begins, and where the last one ends, memory-mapped."""
        return np.asarray(np.load(self.folder / f"{split}.offsets.npy", mmap_mode="r"))


def open_prepared(folder: str | Path) -> Prepared:
    """Opens what `prepare` wrote.

    Raises:
      ValueError: no prepared folder, or one whose files are not as `meta.json` says.
    """
    folder = Path(folder)
    try:
        content = json.loads((folder / META).read_text())
    except OSError as error:
        raise ValueError(f"prepared={str(folder)!r}: {META} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"prepared={str(folder)!r}: {META} is not JSON ({error})") from error
    prepared = Prepared(folder, from_dict(Meta, content, str(folder / META)))
    for split in SPLITS:
        _check_files(prepared, split)
    return prepared


def _check_files(prepared: Prepared, split: Split) -> None:
    size, path = prepared.size(split), prepared.folder / f"{split}.bin"
    expected = size.tokens * np.dtype(prepared.meta.dtype).itemsize
    try:
        found = path.stat().st_size
        offsets = prepared.offsets(split)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"prepared={str(prepared.folder)!r}: the files of {split} cannot be read ({error})") from error
    require(found == expected, "prepared", str(path), f"must have {expected} bytes, has {found}")
    require(len(offsets) == size.documents + 1 and int(offsets[-1]) == size.tokens, "prepared", str(path),
            f"its offsets must be of {size.documents} documents and end at {size.tokens}")
