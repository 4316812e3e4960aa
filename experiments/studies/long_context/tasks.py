"""What a model is asked in long windows, made from a seed: rows of bytes, and which of them count."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Int, UInt8

from mfa_jax.config import require
from mfa_jax.data import Prepared

LONG_DOCUMENT = 256 * 1000
"""Bytes of a document that counts as long."""


@dataclasses.dataclass(frozen=True)
class Task:
    """Rows of `T + 1` tokens; a model is given the first `T` of each and judged by some of the last `T`."""

    tokens: Int[np.ndarray, "B S"]
    asked: Bool[np.ndarray, "B T"]
    """Targets that count."""


def long_documents(test: Prepared) -> list[np.ndarray]:
    """Tokens of each test book of 256 KB or more, without the end token.

    Raises:
      ValueError: there is none.
    """
    tokens, offsets = test.tokens("held_out"), test.offsets("held_out")
    found = [tokens[a:b - 1] for a, b in zip(offsets, offsets[1:], strict=False) if b - 1 - a >= LONG_DOCUMENT]
    require(bool(found), "corpus", str(test.folder), f"no test document has {LONG_DOCUMENT} bytes")
    return found


def windows(documents: list[np.ndarray], rows: int, length: int) -> Task:
    """`rows` windows, the documents in turn, spread over each; everything is asked."""
    per_document = -(-rows // len(documents))
    found = []
    for row in range(rows):
        document, part = documents[row % len(documents)], row // len(documents)
        start = part * (len(document) - length - 1) // per_document
        found.append(document[start:start + length + 1])
    return Task(np.stack(found).astype(np.int32), np.ones((rows, length), bool))


def needle(documents: list[np.ndarray], rows: int, length: int, depth: float, seed: int) -> Task:
    """Books with `The secret number of NAME is 12345.` at `depth` (0 begin, 1 end), asked for at the end.

    The five digits after the question count.

    Raises:
      ValueError: a length that needle and question do not fit into.
    """
    r = np.random.default_rng(seed)
    hay = windows(documents, rows, length).tokens
    asked = np.zeros((rows, length), bool)
    for row in range(rows):
        name = "".join(r.choice(list("BCDFGKLMNPRST"), 1)) + "".join(r.choice(list("aeioulnrst"), 5))
        number = "".join(r.choice(list("0123456789"), 5))
        fact = np.frombuffer(f" The secret number of {name} is {number}. ".encode(), np.uint8)
        question = np.frombuffer(f" The secret number of {name} is {number}".encode(), np.uint8)
        room = length + 1 - len(question) - len(fact)
        require(room >= 0, "length", length, f"the needle and its question take {len(question) + len(fact)} bytes")
        at = round(depth * room)
        hay[row, at:at + len(fact)] = fact
        hay[row, -len(question):] = question
        asked[row, -5:] = True
    return Task(hay, asked)


def pairs(rows: int, count: int, seed: int) -> tuple[Task, Task, Task]:
    """Multi-query associative recall: `count` pairs `key=value;`, then as many again; the values count.

    Keys and values are two letters, keys differ within a row. The tasks are alike but for the second half and for
    which half is asked. The first asks for the values when they are first told, which nobody can know. In the second
    task other pairs follow, whose keys and values are made of the letters of those told: who has learned the format
    and which letters occur does better at these, too. In the third the pairs that were told follow in another order.

    Raises:
      ValueError: more pairs than such keys are found for by trial.
    """
    require(count <= 32, "count", count, "must be at most 32")
    r = np.random.default_rng(seed)
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)
    fresh, again = np.zeros((2, rows, 2 * count * 6 + 1), np.int32)
    for row in range(rows):
        keys, values = r.choice(letters, (2, count, 2))
        other_keys = r.permuted(keys.reshape(-1)).reshape(count, 2)
        while len({bytes(key) for key in (*keys, *other_keys)}) < 2 * count:
            keys = r.choice(letters, (count, 2))
            other_keys = r.permuted(keys.reshape(-1)).reshape(count, 2)
        other_values = r.permuted(values.reshape(-1)).reshape(count, 2)
        order = r.permutation(count)
        told = _spelled(keys, values)
        fresh[row] = [ord("\n"), *told, *_spelled(other_keys, other_values)]
        again[row] = [ord("\n"), *told, *_spelled(keys[order], values[order])]
    inside = np.arange(2 * count * 6)
    is_value = np.isin(inside % 6, (3, 4))
    first, second = (np.broadcast_to(is_value & half, (rows, 2 * count * 6))
                     for half in (inside < count * 6, inside >= count * 6))
    return Task(again, first), Task(fresh, second), Task(again, second)


def _spelled(keys: UInt8[np.ndarray, "n 2"], values: UInt8[np.ndarray, "n 2"]) -> list[int]:
    """The bytes of `key=value;` of each pair."""
    return [byte for key, value in zip(keys, values, strict=True) for byte in (*key, ord("="), *value, ord(";"))]
