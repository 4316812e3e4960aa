"""The token shards of a corpus on disk, memory-mapped.

A prepared folder holds, per split (`train`, `held_out`), `<split>.bin` (all tokens, flat, uint16 or uint32, each
document followed by the end token), `<split>.offsets.npy` (int64; document i is tokens `offsets[i]:offsets[i+1]`),
for each of the two a `<file>.crc32.npy` (uint32, the CRC-32 of every 64 KiB of it), and `meta.json`.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int64, Integer, UInt32

from mfa_jax.config import from_dict, require

FORMAT = 2
META = "meta.json"
CHUNK = 1 << 16
"""Bytes that a checksum is of: few enough to be read along with a row of a batch."""

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")
HeldOutBy = Literal["hash", "smallest hash", "tail of the only document", "source of its own", "nothing"]


class DamagedShardError(ValueError):
    """A token shard is not what was written."""


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
    held_out_signature: str | None = None
    """Of the held-out source, as `signature` is of the source."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A finished folder of token shards."""

    folder: Path
    meta: Meta
    bos_id: int | None = None
    """The begin token of the tokenizer that it is read with; it is in no shard."""

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


# ---- checksums -------------------------------------------------------------------------------------------------


def _sums_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.crc32.npy")


def write_checksums(path: Path) -> None:
    """Writes the checksums of a finished file beside it."""
    with path.open("rb") as file:
        sums = [zlib.crc32(chunk) for chunk in iter(lambda: file.read(CHUNK), b"")]
    np.save(_sums_of(path), np.asarray(sums, np.uint32))


class Verified:
    """Checks a file against its checksums, each chunk when it is first asked for: a corpus need not be read twice.

    Raises:
      DamagedShardError: the checksums cannot be read, or are not of a file of this size.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            size = path.stat().st_size
            self._bytes = np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)
            self._sums: UInt32[np.ndarray, " chunks"] = np.load(_sums_of(path))
        except (OSError, ValueError, EOFError) as error:
            raise DamagedShardError(f"prepared={str(path)!r}: it or its checksums cannot be read ({error})") from error
        chunks = -(-size // CHUNK)
        if self._sums.shape != (chunks,):
            raise DamagedShardError(f"prepared={str(path)!r}: has {size} bytes, which are {chunks} chunks, and "
                                    f"{self._sums.size} checksums; one of the two is not what was written")
        self._checked = np.zeros(chunks, bool)

    @property
    def digest(self) -> int:
        """Of the whole file, as its checksums have it."""
        return zlib.crc32(self._sums.tobytes())

    def check(self, start: int, stop: int) -> None:
        """Raises `DamagedShardError`, with the place, unless bytes `start` to `stop` are those that were written."""
        for chunk in range(start // CHUNK, -(-stop // CHUNK)):
            if self._checked[chunk]:
                continue
            begin = chunk * CHUNK
            if zlib.crc32(self._bytes[begin:begin + CHUNK].tobytes()) != self._sums[chunk]:
                raise DamagedShardError(
                    f"prepared={str(self._path)!r}: bytes {begin} to {min(begin + CHUNK, len(self._bytes))} are not "
                    f"what was written (checksum differs); restore the file, or remove the folder to prepare it again")
            self._checked[chunk] = True

    def check_all(self) -> None:
        """Raises `DamagedShardError`, with the first place, unless the whole file is what was written."""
        self.check(0, len(self._bytes))


# ---- opening ---------------------------------------------------------------------------------------------------


def open_prepared(folder: str | Path, bos_id: int | None = None) -> Prepared:
    """Opens what `prepare` wrote. Offsets are checked whole; tokens are where they are read (`Verified`).

    Args:
      bos_id: the tokenizer's begin token, for rows that begin with it.

    Raises:
      ValueError: no prepared folder, one of another format, or one whose files are not as `meta.json` says.
    """
    folder = Path(folder)
    try:
        content = json.loads((folder / META).read_text())
    except OSError as error:
        raise ValueError(f"prepared={str(folder)!r}: {META} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"prepared={str(folder)!r}: {META} is not JSON ({error})") from error
    prepared = Prepared(folder, from_dict(Meta, content, str(folder / META)), bos_id)
    found = prepared.meta.settings.format
    require(found == FORMAT, "prepared", str(folder), f"is of format {found}, this is {FORMAT}; remove the folder, and "
            "the data are prepared again")
    for split in SPLITS:
        _check_files(prepared, split)
    return prepared


def _check_files(prepared: Prepared, split: Split) -> None:
    Verified(prepared.folder / f"{split}.offsets.npy").check_all()
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
