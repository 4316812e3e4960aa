"""Rows of text that a conversion is fitted to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from mfa_jax.config import require
from mfa_jax.data import Tokenizer, documents

_CHARACTERS = 16
"""A token is hardly longer."""


def calibration_rows(
    files: Sequence[str], tokenizer: Tokenizer, *, rows: int, context: int, add_bos_token: bool = False,
    spread: bool = False,
) -> np.ndarray:
    """`[rows, context]` tokens, the files in turn; of each, rows from its beginning or over the whole of it.

    Args:
      add_bos_token: begin each row with the begin token.
      spread: evenly over the whole text, which is in memory then.

    Raises:
      ValueError: a file that is too short.
    """
    begin = [tokenizer.bos_id] if add_bos_token else []
    per_file, length = -(-rows // len(files)), context - len(begin)
    found = []
    for path in files:
        pieces = _spread(path, per_file, length) if spread else _beginning(path, per_file * length)
        wanted = length if spread else per_file * length
        cut = []
        for piece in pieces:
            ids = np.empty(0, np.int32)
            for text in piece:
                ids = np.append(ids, tokenizer.encode(text))
                if len(ids) >= wanted:
                    break
            require(len(ids) >= wanted, "calibration", path,
                    f"has {len(ids)} tokens{' where a row begins' * spread}, {wanted} are asked of it "
                    f"({per_file} rows of {length})")
            cut.append(ids[:wanted].reshape(-1, length))
        found.append(np.concatenate([np.full((per_file, len(begin)), begin, np.int32), np.concatenate(cut)], axis=1))
    return np.stack(found, axis=1).reshape(-1, context)[:rows]


def _beginning(path: str, tokens: int) -> Iterator[Iterator[str]]:
    """One piece, document by document, none longer than could be needed."""
    yield (document.text[: _CHARACTERS * tokens] for document in documents(path))


def _spread(path: str, count: int, tokens: int) -> Iterator[Iterator[str]]:
    """So many pieces, each long enough where the text does not end."""
    whole = "".join(document.text for document in documents(path))
    for i in range(count):
        start = len(whole) * i // count
        yield iter([whole[start : start + _CHARACTERS * tokens]])
