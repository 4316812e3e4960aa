"""The text of the studies: books that are trained on, books that settings are chosen on, books that are reported on."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
from pathlib import Path
from typing import Any

from experiments.studies.records import lock
from mfa_jax.config import DataConfig, require
from mfa_jax.data import Prepared, load_tokenizer, prepare
from mfa_jax.data.shards import Split

VARIABLE = "MFA_JAX_DATA"
VALID, TEST = "books-valid", "books-test"
_ENDINGS = (".txt.bz2", ".txt", ".txt.gz", ".txt.xz", ".txt.zst")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Prepared text: what a run trains and is tuned on, and the books that it is judged by."""

    data: DataConfig
    """Source, held-out source (the validation books) and shards, for runs to take over."""
    test: Prepared
    """The test books, as the held-out split of these shards."""
    text: dict[str, Any]
    """Bytes of training, validation and test text, and a digest of all their tokens: the same for the same text."""


def data_folder() -> Path:
    """The folder of external data: MFA_JAX_DATA, or `data` in this repository."""
    return Path(os.environ.get(VARIABLE, Path(__file__).parents[2] / "data")).resolve()


def find(name: str) -> Path:
    """The file of a text in the folder `text` of the data folder.

    Raises:
      ValueError: it is not there; says where it was looked for.
    """
    tried = [data_folder() / "text" / f"{name}{ending}" for ending in _ENDINGS]
    found = next((path for path in tried if path.is_file()), None)
    if found is None:
        given = f"{VARIABLE}={os.environ[VARIABLE]!r}" if VARIABLE in os.environ else f"{VARIABLE} is not set"
        raise ValueError(f"corpus: no text {name!r}; looked for {tried[0]} (or ending {', '.join(_ENDINGS[1:])}); "
                         f"{given}; experiments/studies/README.md says what the folder holds")
    return found


def find_all(train: str) -> dict[str, str]:
    """The files of a training text, the validation books and the test books. Raises: ValueError: one is missing."""
    return {name: str(find(name)) for name in (train, VALID, TEST)}


def prepared(train: str, folder: Path) -> Corpus:
    """The shards of a training text, with the validation books held out, and of the test books; written once.

    Raises:
      ValueError: a text is missing, or a book is in two of them.
    """
    texts = find_all(train)
    data = DataConfig(source=texts[train], held_out_source=texts[VALID], prepared=str(folder / train))
    # Of these shards the held-out split alone is used.
    test = DataConfig(source=texts[VALID], held_out_source=texts[TEST])
    tokenizer = load_tokenizer(data.tokenizer)
    with lock(folder / "lock", wait=True):
        tested, shards = prepare(test, folder / TEST, tokenizer), prepare(data, folder / train, tokenizer)
    shared = len(_documents(shards, "train") & _documents(tested, "held_out"))
    require(shared == 0, "corpus", texts[TEST], f"shares {shared} books with {texts[train]}")
    return Corpus(data, tested, _description(
        {"train": (shards, "train"), "valid": (shards, "held_out"), "test": (tested, "held_out")}))


def _description(parts: dict[str, tuple[Prepared, Split]]) -> dict[str, Any]:
    """Bytes of each text, and a digest of the tokens and document ends of all."""
    digest = hashlib.blake2b(digest_size=8)
    for shards, split in parts.values():
        digest.update(shards.tokens(split).data)
        digest.update(shards.offsets(split).data)
    sizes = {f"{name}_bytes": shards.size(split).text_bytes for name, (shards, split) in parts.items()}
    return {**sizes, "digest": digest.hexdigest()}


def _documents(shards: Prepared, split: Split) -> set[bytes]:
    """A hash of each document of a split."""
    tokens, offsets = shards.tokens(split), shards.offsets(split)
    return {hashlib.blake2b(tokens[a:b].tobytes()).digest() for a, b in itertools.pairwise(offsets)}
