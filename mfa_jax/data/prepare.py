"""Text becomes token shards, written once (`shards` says what they are).

The folder appears under its name only when it is complete: it is written beside it as `.NAME.partial-*`, which a
killed run leaves behind. Several processes may prepare the same folder at once; the first to finish wins.

A document is held out when the hash of its text, a number in [0, 1), is below `held_out`, so identical documents are
always in one split. Where none is, in a small corpus, the one with the smallest hash is; a corpus that is one
document gives its tail. With a `held_out_source` all of that one is held out and nothing else. `meta.json` says which
(`held_out_by`).
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
import itertools
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Integer

from mfa_jax.config import DataConfig, require, to_json
from mfa_jax.data.shards import (
    META,
    HeldOutBy,
    Meta,
    Prepared,
    Settings,
    Split,
    SplitSize,
    open_prepared,
    write_checksums,
)
from mfa_jax.data.sources import Document, documents, signature
from mfa_jax.data.tokenizers import Tokenizer

log = logging.getLogger(__name__)

PROGRESS_BYTES = 8 << 20

Progress = Callable[[int, int], None]


def log_progress(done: int, text_bytes: int) -> None:
    """The default progress: a line in the log."""
    log.info("prepared %d documents, %.1f MB of text", done, text_bytes / 1e6)


def telling(say: Callable[[str], object], seconds: float = 10.0) -> Progress:
    """Says how far it is, no more often than every so many seconds."""
    last = time.monotonic()

    def progress(done: int, text_bytes: int) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            say(f"preparing data: {done:,} documents, {text_bytes / 1e6:,.0f} MB of text so far")

    return progress


def prepare(config: DataConfig, folder: str | Path, tokenizer: Tokenizer,
            progress: Progress = log_progress) -> Prepared:
    """Writes the shards of `config.source` to `folder`, or opens them where they are there already.

    Args:
      progress: called with the documents and bytes of text done so far, every few megabytes and at the end.

    Raises:
      ValueError: the source cannot be read; the folder holds something else, or shards of other settings (they are
        named); or it cannot be written (disk full, read-only): what was there before is untouched.
    """
    folder = Path(folder)
    settings = Settings(config.source, config.text_field, config.held_out, tokenizer.fingerprint,
                        config.held_out_source)
    if _taken(folder):
        return _reuse(folder, settings, tokenizer)
    staging = folder.with_name(f".{folder.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        staging.mkdir(parents=True)
        _write(staging, settings, tokenizer, progress)
        try:
            staging.rename(folder)
        except OSError:
            if not _taken(folder):
                raise
            return _reuse(folder, settings, tokenizer)  # another process was faster
    except OSError as error:
        raise ValueError(f"prepared={str(folder)!r}: cannot be written ({error.strerror or error}); "
                         f"nothing that was there before was changed") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return open_prepared(folder, tokenizer.bos_id)


def _taken(folder: Path) -> bool:
    require(folder.is_dir() or not folder.exists(), "prepared", str(folder), "must be a folder, and is a file")
    try:
        return folder.is_dir() and any(folder.iterdir())
    except OSError as error:
        raise ValueError(f"prepared={str(folder)!r}: cannot be read ({error.strerror})") from error


def _reuse(folder: Path, settings: Settings, tokenizer: Tokenizer) -> Prepared:
    require((folder / META).exists(), "prepared", str(folder),
            f"must be empty or prepared before; it holds other files and no {META}")
    prepared = open_prepared(folder, tokenizer.bos_id)
    before, now = dataclasses.asdict(prepared.meta.settings), dataclasses.asdict(settings)
    different = [f"{name}={before[name]!r}, now {now[name]!r}" for name in now if before[name] != now[name]]
    require(not different, "prepared", str(folder),
            f"was prepared with {'; '.join(different)}; give another folder or the same settings, or remove it")
    for what, then, found in (
            ("source", prepared.meta.signature, signature(settings.source)),
            ("held-out source", prepared.meta.held_out_signature, _held_out_signature(settings))):
        if then != found and None not in (then, found):
            log.warning("prepared %s: the %s was %s, is now %s; the tokens prepared then are used",
                        folder, what, then, found)
    return prepared


def _held_out_signature(settings: Settings) -> str | None:
    return None if settings.held_out_source is None else signature(settings.held_out_source)


# ---- writing ---------------------------------------------------------------------------------------------------


class _SplitWriter:
    """Appends documents to one split."""

    def __init__(self, folder: Path, split: Split, dtype: str) -> None:
        self.path = folder / f"{split}.bin"
        self.dtype = dtype
        self.text_bytes = 0
        self.ends = array.array("q", [0])
        self.file = open(self.path, "wb")

    def add(self, tokens: Integer[np.ndarray, " T"], text_bytes: int) -> None:
        self.file.write(tokens.astype(self.dtype).tobytes())
        self.ends.append(self.ends[-1] + len(tokens))
        self.text_bytes += text_bytes

    def finish(self) -> SplitSize:
        self.file.flush()
        os.fsync(self.file.fileno())
        offsets = self.path.with_suffix(".offsets.npy")
        np.save(offsets, np.asarray(self.ends, np.int64))
        write_checksums(self.path)
        write_checksums(offsets)
        return SplitSize(len(self.ends) - 1, self.ends[-1], self.text_bytes)


def _write(folder: Path, settings: Settings, tokenizer: Tokenizer, progress: Progress) -> None:
    dtype: Literal["uint16", "uint32"] = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    writers = _SplitWriter(folder, "train", dtype), _SplitWriter(folder, "held_out", dtype)
    with writers[0].file, writers[1].file:
        held_out_by, smallest = _write_documents(writers, settings, tokenizer, progress)
        train, held_out = writers[0].finish(), writers[1].finish()
    if held_out_by == "hash" and not held_out.documents:
        train, held_out = _hold_out(folder, dtype, train, smallest)
        held_out_by = "smallest hash"
        share = 100 * held_out.tokens / (held_out.tokens + train.tokens)
        log.warning("held_out=%s: no document has a hash below; the one with the smallest is held out, %.1f %% of the "
                    "tokens", settings.held_out, share)
    require(train.documents > 0, "held_out", settings.held_out,
            f"leaves no document for training (the source has {held_out.documents}); give less, or more documents")
    meta = Meta(settings, signature(settings.source), tokenizer.vocab_size, tokenizer.eos_id, dtype, held_out_by,
                train, held_out, _held_out_signature(settings))
    (folder / META).write_text(to_json(meta))


@dataclasses.dataclass
class _Smallest:
    """The training documents with the smallest hash (more than one where they are identical)."""

    number: float = 1.0
    rows: list[int] = dataclasses.field(default_factory=list)
    text_bytes: int = 0

    def offer(self, number: float, row: int, text_bytes: int) -> None:
        if number < self.number:
            self.number, self.rows, self.text_bytes = number, [], 0
        if number == self.number:
            self.rows.append(row)
            self.text_bytes += text_bytes


def _write_documents(writers: tuple[_SplitWriter, _SplitWriter], settings: Settings, tokenizer: Tokenizer,
                     progress: Progress) -> tuple[HeldOutBy, _Smallest]:
    train, held_out = writers
    if settings.held_out_source is None:
        numbered, held_out_by = _numbered(documents(settings.source, settings.text_field), settings)
    else:
        numbered, held_out_by = _two_sources(settings, settings.held_out_source), "source of its own"
    smallest = _Smallest()
    done, text_bytes, reported = 0, 0, 0
    for text, number in numbered:
        size = len(text.encode("utf-8"))
        writer = held_out if number < settings.held_out else train
        writer.add(np.append(tokenizer.encode(text), tokenizer.eos_id), size)
        if writer is train:
            smallest.offer(number, len(train.ends) - 2, size)
        done, text_bytes = done + 1, text_bytes + size
        if text_bytes - reported >= PROGRESS_BYTES:
            progress(done, text_bytes)
            reported = text_bytes
    progress(done, text_bytes)
    return held_out_by, smallest


def _numbered(found: Iterator[Document], settings: Settings) -> tuple[Iterator[tuple[str, float]], HeldOutBy]:
    """Each text with its number in [0, 1): its hash, but for a corpus of one document, which is cut in two."""
    first, second = next(found), next(found, None)
    if settings.held_out and second is None:
        tail = max(1, round(len(first.text) * settings.held_out))
        require(tail < len(first.text), "source", settings.source,
                f"its only document has {len(first.text)} characters; too few to hold out {settings.held_out} of them")
        return iter([(first.text[:-tail], 1.0), (first.text[-tail:], 0.0)]), "tail of the only document"
    every = itertools.chain([first], [] if second is None else [second], found)
    return ((document.text, _hash(document.text)) for document in every), "hash" if settings.held_out else "nothing"


def _two_sources(settings: Settings, held_out_source: str) -> Iterator[tuple[str, float]]:
    """The texts of the held-out source with 0, then those of the source with 1; no text may be in both."""
    seen = set()
    for document in documents(held_out_source, settings.text_field):
        seen.add(_digest(document.text, 16))
        yield document.text, 0.0
    for document in documents(settings.source, settings.text_field):
        require(_digest(document.text, 16) not in seen, "source", document.name,
                f"is held out by held_out_source={held_out_source!r}; a document may be in one of them only")
        yield document.text, 1.0


def _hash(text: str) -> float:
    return int.from_bytes(_digest(text, 6)) / 2**48


def _digest(text: str, size: int) -> bytes:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=size).digest()


def _hold_out(folder: Path, dtype: str, written: SplitSize, smallest: _Smallest) -> tuple[SplitSize, SplitSize]:
    """Moves some documents from a finished training split to the held-out one."""
    both = folder / "both.bin"
    (folder / "train.bin").rename(both)
    tokens = np.memmap(both, dtype, "r")
    offsets = np.load(folder / "train.offsets.npy")
    train, held_out = _SplitWriter(folder, "train", dtype), _SplitWriter(folder, "held_out", dtype)
    chosen = set(smallest.rows)
    with train.file, held_out.file:
        for row in range(written.documents):
            (held_out if row in chosen else train).add(tokens[offsets[row]:offsets[row + 1]], 0)
        held_out.text_bytes = smallest.text_bytes
        train.text_bytes = written.text_bytes - smallest.text_bytes
        both.unlink()
        return train.finish(), held_out.finish()
