"""What the tokenizers share: reading and writing their files, and the check of ids."""

from __future__ import annotations

import contextlib
import json
import operator
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mfa_jax.config import require

SAVED = "mfa_tokenizer.json"
"""Written beside the files of a saved tokenizer, as the last of them: its kind and fingerprint."""


def checked_ids(ids: Iterable[int], vocab_size: int) -> list[int]:
    """The ids as Python integers.

    Raises:
      ValueError: an id outside the vocabulary.
    """
    checked = [operator.index(i) for i in ids]
    for i in checked:
        require(0 <= i < vocab_size, "token", i, f"must be in 0 .. {vocab_size - 1}")
    return checked


def save_files(folder: str | Path, kind: str, fingerprint: str, files: dict[str, bytes], **more: Any) -> None:
    """Writes the files of a tokenizer, and what it is: each appears when it is complete, and `SAVED` as the last.

    A folder without `SAVED` is one where that was cut off; it can be saved to again.

    Raises:
      ValueError: the folder cannot be written to.
    """
    folder = Path(folder)
    saved = json.dumps({"kind": kind, "fingerprint": fingerprint, **more}, indent=2).encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in {**files, SAVED: saved}.items():
            _write_whole(folder / name, content)
    except OSError as error:
        raise ValueError(f"tokenizer: cannot be saved to {str(folder)!r} ({error.strerror})") from error


def _write_whole(path: Path, content: bytes) -> None:
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"tokenizer={str(path)!r}: cannot be read ({error.strerror})") from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(read_bytes(path))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"tokenizer={str(path)!r}: is not JSON ({error})") from error
    require(isinstance(value, dict), "tokenizer", str(path), "must hold a JSON object")
    return dict(value)
