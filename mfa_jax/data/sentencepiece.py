"""The sentencepiece BPE table that llama2.c keeps in a `.bin` file.

File format (little-endian): int32 longest token in bytes, then for each id float32 score, int32 length, the bytes.
Id 0 is unknown, 1 begins and 2 ends a document (models trained by llama2.c end it with 1, too), 3..258 are the 256
bytes (spelt `<0x00>`..`<0xFF>`), the rest are pieces.

Encoding: a space is put before a text that is not empty; each character is its piece, or its bytes where it has none;
then, again and again, the two neighbours whose concatenation is the piece with the best score become one (the
leftmost of equals). Reference: llama2.c, `run.c`; Sennrich et al., arXiv 1508.07909 (byte pair encoding).
"""

from __future__ import annotations

import hashlib
import heapq
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from mfa_jax.config import require
from mfa_jax.data.tokenizer_files import checked_ids, save_files

FIRST_BYTE = 3
FIRST_PIECE = FIRST_BYTE + 256


class SentencePieceTokenizer:
    """Encodes and decodes with such a table; all of it is kept by `save`.

    `decode` drops the space that leads the text after the begin token, and only there: a continuation keeps its own.
    """

    FILE = "tokenizer.bin"
    eos_id = 2
    stop_ids = (2, 1)
    bos_id = 1

    def __init__(self, content: bytes, where: str) -> None:
        """Args: the bytes of the file, and its name for messages.

        Raises:
          ValueError: the file is cut short, or its first 259 tokens are not the special ones and the bytes.
        """
        self._content = content
        self._pieces, self._scores = _parse(content, where)
        spelt = [f"<0x{value:02X}>".encode() for value in range(256)]
        require(self._pieces[FIRST_BYTE:FIRST_PIECE] == spelt, "tokenizer", where,
                "must be a sentencepiece table with the 256 bytes at ids 3..258")
        self._pieces[:FIRST_PIECE] = [b"", b"", b"", *(bytes([value]) for value in range(256))]
        self._ids: dict[bytes, int] = {}
        for i, piece in enumerate(self._pieces[FIRST_PIECE:], start=FIRST_PIECE):
            self._ids.setdefault(piece, i)
        self.vocab_size = len(self._pieces)
        self.fingerprint = self.encoding = hashlib.sha256(content).hexdigest()

    def encode(self, text: str) -> Int32[np.ndarray, " T"]:
        ids: list[int] = []
        for character in f" {text}" if text else "":
            raw = character.encode("utf-8")
            ids.extend([self._ids[raw]] if raw in self._ids else (value + FIRST_BYTE for value in raw))
        return np.asarray(self._merge(ids), np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        parts, previous = [], None
        for i in checked_ids(ids, self.vocab_size):
            piece = self._pieces[i]
            parts.append(piece[1:] if previous == self.bos_id and piece.startswith(b" ") else piece)
            previous = i
        return b"".join(parts).decode("utf-8", errors="replace")

    def special_id(self, text: str) -> int | None:
        return {"<s>": self.bos_id, "</s>": self.eos_id}.get(text)

    def save(self, folder: str | Path) -> None:
        save_files(folder, "sentencepiece", self.fingerprint, {self.FILE: self._content})

    def _merge(self, ids: list[int]) -> list[int]:
        """Merges neighbours, best score first, leftmost of equals: a heap of candidates over a linked list."""
        after = [*range(1, len(ids)), -1] if ids else []
        before = list(range(-1, len(ids) - 1))
        heap: list[tuple[float, int, int, int, int]] = []

        def offer(left: int) -> None:
            if left >= 0 and after[left] >= 0:
                pair = ids[left], ids[after[left]]
                merged = self._merged(*pair)
                if merged is not None:
                    heapq.heappush(heap, (-self._scores[merged], left, *pair, merged))

        for left in range(len(ids)):
            offer(left)
        while heap:
            _, left, first, second, merged = heapq.heappop(heap)
            right = after[left]
            if ids[left] != first or right < 0 or ids[right] != second:
                continue  # one of the two was merged since
            ids[left], ids[right] = merged, -1
            after[left] = after[right]
            if after[left] >= 0:
                before[after[left]] = left
            offer(left)
            offer(before[left])
        return [i for i in ids if i >= 0]

    def _merged(self, first: int, second: int) -> int | None:
        # A byte stands for a character without a piece, so it is no part of one.
        if first < FIRST_PIECE or second < FIRST_PIECE:
            return None
        return self._ids.get(self._pieces[first] + self._pieces[second])


def _parse(content: bytes, where: str) -> tuple[list[bytes], list[float]]:
    pieces: list[bytes] = []
    scores: list[float] = []
    position = 4
    while position < len(content):
        length = struct.unpack_from("<i", content, position + 4)[0] if position + 8 <= len(content) else -1
        end = position + 8 + length
        require(length >= 0 and end <= len(content), "tokenizer", where,
                f"is cut short or not a sentencepiece table: token {len(pieces)} at byte {position} does not fit")
        scores.append(struct.unpack_from("<f", content, position)[0])
        pieces.append(content[position + 8:end])
        position = end
    return pieces, scores
