"""Where text comes from: a stream of documents, read one at a time, in an order that is the same every time.

* `stdlib`: every `*.py` of the running Python's standard library, tests included, installed packages excluded.
* a file, or a folder read recursively in sorted order: `.jsonl` and `.ndjson` hold one document a line (in a field),
  everything else is text in which a NUL character separates documents; each plain, `.gz`, `.bz2`, `.xz` or `.zst`.
* `hf:NAME[:SPLIT]`: a Hugging Face dataset, streamed; needs the optional package `datasets`.

Text must be UTF-8 and is taken byte for byte (newlines included) but for a byte order mark at the start. In a folder,
hidden entries, links to folders, binary files (control characters in the first 8 KiB, unless the name ends as text
does) and tar archives are left out; so are the few standard library files that are not UTF-8, and blank documents.
What was left out is logged, counted by kind. Anything else that cannot be read is an error.
"""

from __future__ import annotations

import bz2
import codecs
import dataclasses
import gzip
import importlib
import itertools
import json
import logging
import lzma
import os
import platform
import re
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import zstandard

from mfa_jax.config import require

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
_LARGEST_WINDOW = 1 << 31
"""Bytes that a .zst file may have its reader remember: `zstd --long=31`, the most there is."""
OPENERS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)
JSON_LINES = (".jsonl", ".ndjson")
TEXT = (*JSON_LINES, ".txt", ".text", ".md", ".rst")
CONTROL = re.compile(rb"[\x01-\x08\x0e-\x1a\x1c-\x1f]")
INSTALLED = frozenset({"site-packages", "dist-packages"})


@dataclasses.dataclass(frozen=True)
class Document:
    """One text, and where it was found."""

    name: str
    text: str


def documents(source: str, text_field: str = "text") -> Iterator[Document]:
    """The documents of a source, none of them blank.

    Args:
      source: `stdlib`, a path, or `hf:NAME[:SPLIT]` (split `train` unless named).
      text_field: field of a JSONL or Hugging Face row that holds the document.

    Raises:
      ValueError: no such source, nothing to read in it, or a file that cannot be read or decoded; the message names
        the file and the byte offset (in the decompressed stream).
    """
    skipped: Counter[str] = Counter()
    if source.startswith("hf:"):
        found = _hugging_face(source, text_field)
    elif source == "stdlib":
        found = _stdlib(skipped)
    else:
        path = _existing(source)
        found = _folder(path, text_field, skipped) if path.is_dir() else _file(path, text_field)
    return _not_blank(source, found, skipped)


def signature(source: str) -> str | None:
    """What the source looks like now, to notice that it changed; None where that cannot be told cheaply."""
    if source == "stdlib":
        return f"Python {platform.python_version()}"
    if source.startswith("hf:") or not Path(source).expanduser().exists():
        return None
    path = Path(source).expanduser()
    sizes = [file.stat().st_size for file in (_files(path, Counter()) if path.is_dir() else [path])]
    return f"{len(sizes)} files, {sum(sizes)} bytes"


def _existing(source: str) -> Path:
    path = Path(source).expanduser()
    require(path.exists(), "source", source, "no such file or folder; accepted: stdlib, a path, hf:NAME[:SPLIT]")
    return path


def _not_blank(source: str, found: Iterable[Document], skipped: Counter[str]) -> Iterator[Document]:
    count = 0
    for document in found:
        if document.text.strip():
            count += 1
            yield document
        else:
            skipped["blank documents"] += 1
    summary = ", ".join(f"{number} {kind}" for kind, number in sorted(skipped.items()) if number)
    if summary:
        log.warning("source %s: left out %s", source, summary)
    require(count > 0, "source", source, f"must hold text, and has none (left out: {summary or 'nothing'})")


# ---- folders ---------------------------------------------------------------------------------------------------


def _files(root: Path, skipped: Counter[str], without: frozenset[str] = frozenset()) -> Iterator[Path]:
    """The regular files under a folder, in sorted order, but for what is hidden and the folders of these names."""
    def fail(error: OSError) -> None:
        raise ValueError(f"source: {error.filename}: cannot be read ({error.strerror})") from error

    for folder, names, files in os.walk(root, onerror=fail):
        here = Path(folder)
        hidden = {name for name in (*names, *files) if name.startswith(".")}
        links = {name for name in names if (here / name).is_symlink()} - hidden
        skipped["hidden files or folders"] += len(hidden)
        skipped["links to folders"] += len(links)
        names[:] = sorted(set(names) - hidden - links - without)
        for name in sorted(set(files) - hidden):
            if (here / name).is_file():
                yield here / name
            else:
                skipped["entries that are not files"] += 1


def _folder(root: Path, text_field: str, skipped: Counter[str]) -> Iterator[Document]:
    for path in _files(root, skipped):
        name = _uncompressed_name(path)
        if name.endswith(".tar"):
            skipped[".tar archives"] += 1
        elif not name.endswith(TEXT) and CONTROL.search(next(_chunks(path), b"")[:8192]):
            skipped[f"{path.suffix or 'nameless'} binary files"] += 1
        else:
            yield from _file(path, text_field)


def _stdlib(skipped: Counter[str]) -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in _files(root, Counter(), INSTALLED):
        if path.suffix == ".py":
            try:
                text = path.read_bytes().decode("utf-8")
            except UnicodeDecodeError:
                skipped[".py files that are not UTF-8"] += 1
            except OSError as error:
                raise ValueError(f"source: {path}: cannot be read ({error.strerror})") from error
            else:
                yield Document(path.relative_to(root).as_posix(), text.removeprefix("\ufeff"))


# ---- files -----------------------------------------------------------------------------------------------------


def _uncompressed_name(path: Path) -> str:
    name = path.name.lower()
    return name.removesuffix(path.suffix.lower()) if path.suffix.lower() in (*OPENERS, ".zst") else name


def _file(path: Path, text_field: str) -> Iterator[Document]:
    name = _uncompressed_name(path)
    require(not name.endswith(".tar"), "source", str(path), "is a tar archive; unpack it and give the folder")
    return _json_lines(path, text_field) if name.endswith(JSON_LINES) else _text(path)


def _chunks(path: Path) -> Iterator[bytes]:
    """The decompressed content in pieces, none of them empty."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".zst":
            yield from _zstandard_chunks(path)
            return
        with OPENERS.get(suffix, open)(path, "rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk
    except DAMAGE as error:
        raise ValueError(f"source: {path}: cannot be read ({error})") from error


def _zstandard_chunks(path: Path) -> Iterator[bytes]:
    # Not zstandard.open: its reader takes a file that was cut short for a file that has ended.
    with open(path, "rb") as stream:
        frame, data = None, b""
        while data := data or stream.read(CHUNK_BYTES):
            frame = frame or zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj()
            if piece := frame.decompress(data):
                yield piece
            data = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("compressed file ended before the end-of-stream marker was reached")


def _text(path: Path) -> Iterator[Document]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    parts: list[str] = []
    offset, count = 0, 0
    for chunk in itertools.chain(_chunks(path), [b""]):
        waiting = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise ValueError(f"source: {path}: not UTF-8 at byte {offset - waiting + error.start} "
                             f"({error.reason})") from error
        offset += len(chunk)
        first, *others = text.split("\0")
        parts.append(first)
        for other in others:
            yield _part(path, count, parts)
            parts, count = [other], count + 1
    if any(parts) or not count:
        yield _part(path, count, parts)


def _part(path: Path, count: int, parts: list[str]) -> Document:
    text = "".join(parts)
    return Document(f"{path}#{count}", text if count else text.removeprefix("\ufeff"))


def _json_lines(path: Path, text_field: str) -> Iterator[Document]:
    offset = 0
    for number, line in enumerate(_lines(_chunks(path)), start=1):
        where = f"source: {path}: line {number} at byte {offset}"
        offset += len(line) + 1
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except ValueError as error:
            raise ValueError(f"{where}: not a line of JSON in UTF-8 ({error})") from error
        yield Document(f"{path}:{number}", _field(row, text_field, where))


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    parts: list[bytes] = []
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        parts.append(first)
        for other in others:
            yield b"".join(parts)
            parts = [other]
    yield b"".join(parts)


def _field(row: Any, text_field: str, where: str) -> str:
    fields = sorted(row) if isinstance(row, dict) else type(row).__name__
    if not isinstance(row, dict) or not isinstance(row.get(text_field), str):
        raise ValueError(f"{where}: text_field={text_field!r}: must name a text field of the row, which has {fields}")
    text: str = row[text_field]
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: character {error.start} is half of a surrogate pair, not text") from error
    return text


# ---- Hugging Face ----------------------------------------------------------------------------------------------


def _hugging_face(source: str, text_field: str) -> Iterator[Document]:
    for number, row in enumerate(_rows(source)):
        yield Document(f"{source}:{number}", _field(row, text_field, f"source: {source}: row {number}"))


def _rows(source: str) -> Iterator[Any]:
    name, _, split = source.removeprefix("hf:").partition(":")
    require(bool(name), "source", source, "must be hf:NAME or hf:NAME:SPLIT")
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ValueError(f'source={source!r}: needs the package datasets: pip install "mfa_jax[hf]"') from error
    try:
        yield from datasets.load_dataset(name, split=split or "train", streaming=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"source={source!r}: cannot be read ({error})") from error
