"""What a model is asked in long windows, made from a seed: rows of tokens, and which of them count.

With the byte tokenizer a token is a byte. With others a row is a little longer or shorter than the next where pairs are
told, and what counts is reported for each byte that was asked for, so that tokenizers can be compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int, UInt8

from mfa_jax.config import require
from mfa_jax.data import ByteTokenizer, Prepared, Tokenizer, documents

LONG_DOCUMENT = 256 * 1000
"""Bytes of a document that counts as long."""
BYTES = ByteTokenizer()


@dataclasses.dataclass(frozen=True)
class Task:
    """Rows of `T + 1` tokens; a model is given the first `T` of each and judged by some of the last `T`."""

    tokens: Int[np.ndarray, "B S"]
    asked: Bool[np.ndarray, "B T"]
    """Targets that count."""
    asked_bytes: int
    """Bytes that these stand for, in all rows."""
    lengths: Int[np.ndarray, " B"]
    """Tokens of each row; what is behind them pads it."""


def long_documents(test: Prepared) -> list[np.ndarray]:
    """Tokens of each test book of 256 KB or more, without the end token.

    Raises:
      ValueError: there is none.
    """
    tokens, offsets = test.tokens("held_out"), test.offsets("held_out")
    found = [tokens[a:b - 1] for a, b in zip(offsets, offsets[1:], strict=False) if b - 1 - a >= LONG_DOCUMENT]
    require(bool(found), "corpus", str(test.folder), f"no test document has {LONG_DOCUMENT} bytes")
    return found


def read_long_documents(source: str, tokenizer: Tokenizer, most: int) -> list[np.ndarray]:
    """Tokens of the first documents of a source (a file, a folder, `hf:NAME`) that have 256 KB, `most` at most.

    Raises:
      ValueError: no such source, or none has.
    """
    found: list[np.ndarray] = []
    for document in documents(source):
        if len(document.text.encode()) >= LONG_DOCUMENT:
            found.append(tokenizer.encode(document.text))
            if len(found) == most:
                break
    require(bool(found), "text", source, f"no document has {LONG_DOCUMENT} bytes")
    return found


def text_bytes(tokenizer: Tokenizer, ids: Sequence[int]) -> int:
    """Bytes of UTF-8 that some tokens stand for; a character that is cut off counts as U+FFFD, but for byte tokens."""
    return len(ids) if isinstance(tokenizer, ByteTokenizer) else len(tokenizer.decode(ids).encode())


def windows(source: list[np.ndarray], rows: int, length: int, tokenizer: Tokenizer = BYTES) -> Task:
    """`rows` windows, the documents in turn, spread over each; everything is asked.

    Each part of a document is cut in its middle. None begins with the document: title pages cost more than prose, and
    would make the loss fall with position.
    """
    per_document = -(-rows // len(source))
    found = []
    for row in range(rows):
        document, part = source[row % len(source)], row // len(source)
        require(len(document) > length, "length", length, f"a document has {len(document)} tokens")
        start = round((part + 0.5) * (len(document) - length - 1) / per_document)
        found.append(document[start:start + length + 1])
    asked_bytes = sum(text_bytes(tokenizer, row[1:].tolist()) for row in found)
    return Task(np.stack(found).astype(np.int32), np.ones((rows, length), bool), asked_bytes,
                np.full(rows, length + 1))


def needle(source: list[np.ndarray], rows: int, length: int, depth: float, seed: int,
           tokenizer: Tokenizer = BYTES) -> Task:
    """Books with `The secret number of NAME is 12345.` at `depth` (0 begin, 1 end), asked for at the end.

    The five digits after the question count.

    Raises:
      ValueError: a length that needle and question do not fit into.
    """
    r = np.random.default_rng(seed)
    hay = windows(source, rows, length, tokenizer).tokens
    asked = np.zeros((rows, length), bool)
    for row in range(rows):
        name = "".join(r.choice(list("BCDFGKLMNPRST"), 1)) + "".join(r.choice(list("aeioulnrst"), 5))
        number = "".join(r.choice(list("0123456789"), 5))
        fact = tokenizer.encode(f" The secret number of {name} is {number}. ")
        question = tokenizer.encode(f" The secret number of {name} is {number}")
        room = length + 1 - len(question) - len(fact)
        require(room >= 0, "length", length, f"the needle and its question take {len(question) + len(fact)} tokens")
        at = round(depth * room)
        hay[row, at:at + len(fact)] = fact
        hay[row, -len(question):] = question
        asked[row, -tokens_of_end(tokenizer, question, number):] = True
    return Task(hay, asked, 5 * rows, np.full(rows, length + 1))


def tokens_of_end(tokenizer: Tokenizer, ids: np.ndarray, text: str) -> int:
    """How many of the last tokens it takes to spell the text that they end with."""
    return next(count for count in range(1, len(ids) + 1) if text in tokenizer.decode(ids[-count:].tolist()))


def pairs(rows: int, count: int, seed: int, tokenizer: Tokenizer = BYTES) -> tuple[Task, Task, Task]:
    """Multi-query associative recall: `count` pairs `key=value;`, then as many again; the values count.

    Keys and values are two letters, keys differ within a row. The tasks are alike but for the second half and for
    which half is asked. The first asks for the values when they are first told, which nobody can know. In the second
    task other keys follow, made of the letters of those told, with the values that were told in another order: who has
    learned the format and which values occur does better at these, too. In the third the pairs that were told follow
    in another order, so that only which value is whose tells it from the second. Key, value and what stands between
    are made tokens of one by one, so that a pair is the same tokens wherever it is.

    Raises:
      ValueError: more pairs than such keys are found for by trial.
    """
    require(count <= 32, "count", count, "must be at most 32")
    r = np.random.default_rng(seed)
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)
    fresh, again = [], []
    for _ in range(rows):
        keys, values = r.choice(letters, (2, count, 2))
        other_keys = r.permuted(keys.reshape(-1)).reshape(count, 2)
        while len({bytes(key) for key in (*keys, *other_keys)}) < 2 * count:
            keys = r.choice(letters, (count, 2))
            other_keys = r.permuted(keys.reshape(-1)).reshape(count, 2)
        other_values, order = values[r.permutation(count)], r.permutation(count)
        told = _spelled(keys, values, tokenizer)
        fresh.append((told, _spelled(other_keys, other_values, tokenizer)))
        again.append((told, _spelled(keys[order], values[order], tokenizer)))
    asked_bytes = 2 * count * rows
    return (_recall(again, 0, asked_bytes, tokenizer), _recall(fresh, 1, asked_bytes, tokenizer),
            _recall(again, 1, asked_bytes, tokenizer))


_Spelled = list[tuple[int, bool]]
"""Tokens, and whether each is of a value."""


def _spelled(keys: UInt8[np.ndarray, "n 2"], values: UInt8[np.ndarray, "n 2"], tokenizer: Tokenizer) -> _Spelled:
    """The tokens of `key=value;` of each pair."""
    found: _Spelled = []
    for key, value in zip(keys, values, strict=True):
        for text, is_value in ((f"{bytes(key).decode()}=", False), (bytes(value).decode(), True), (";", False)):
            found += [(token, is_value) for token in tokenizer.encode(text).tolist()]
    return found


def _recall(rows: list[tuple[_Spelled, _Spelled]], half: int, asked_bytes: int, tokenizer: Tokenizer) -> Task:
    """Rows of two halves behind a line feed; the values of one half are asked."""
    begin = tokenizer.encode("\n").tolist()
    lengths = np.array([len(begin) + len(first) + len(second) for first, second in rows])
    tokens, asked = np.zeros((len(rows), lengths.max()), np.int32), np.zeros((len(rows), lengths.max()), bool)
    for row, halves in enumerate(rows):
        marked = [*((token, False) for token in begin),
                  *((token, is_value and part == half) for part in (0, 1) for token, is_value in halves[part])]
        tokens[row, :len(marked)], asked[row, :len(marked)] = zip(*marked, strict=True)
    return Task(tokens, asked[:, 1:], asked_bytes, lengths)
