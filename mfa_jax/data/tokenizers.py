"""Text to token ids and back: bytes, any `tokenizer.json`, or a sentencepiece table in a `.bin` file.

`load_tokenizer` takes what `DataConfig.tokenizer` says, or a folder that `save` wrote: a run keeps its tokenizer with
it and is read without the file it came from. `encode` never yields a special token, whatever the text spells.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers
from jaxtyping import Int32

from mfa_jax.config import require
from mfa_jax.data.sentencepiece import SentencePieceTokenizer
from mfa_jax.data.tokenizer_files import SAVED, checked_ids, read_bytes, read_json, save_files

END_TOKENS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|im_end|>", "<|eot_id|>", "[SEP]")
BEGIN_TOKENS = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "[CLS]")
_PROBE = (
    "It's we'll I'VE don't; 1 23 456 7890 3.14e-5 1st\tdef f(x):\n        return x**2  # note\r\n\n\n   a  b\n"
    "naïve Ünïcödé e\u0301 中文分词 日本語テスト 한국어 العربية हिन्दी Русский 🙂 ₂½ \ufb01 \u00a0\u200b<b>&amp;</b> "
    "https://example.org/a_b?c=d&e=%20 --- ... \"quoted\" 'single' (x) [y] {z} | ~ ^ $5 €6 @me #tag snake_case MiXed")
"""Text with what tokenizers treat differently: contractions, digits, white space, scripts, accents, marks."""


class Tokenizer(Protocol):
    """What the library asks of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Ids are 0 .. vocab_size - 1."""

    @property
    def eos_id(self) -> int:
        """The end of a document."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """What ends a text that a model writes: `eos_id`, and what else the tokenizer's files say does, as the end of a
        turn."""

    @property
    def bos_id(self) -> int | None:
        """The beginning of a document, None where the tokenizer has none."""

    @property
    def fingerprint(self) -> str:
        """Equal fingerprints: the same files and the same end of a document, and so equal ids for every text."""

    @property
    def encoding(self) -> str:
        """Equal for tokenizers whose ids are the same tokens, and that cut a text of many kinds alike, however their
        files are written and whatever ends a document. Those of two kinds differ."""

    def encode(self, text: str) -> Int32[np.ndarray, " T"]:
        """The ids of a text, without special tokens."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; special tokens are left out, bytes that are not UTF-8 become U+FFFD."""

    def special_id(self, text: str) -> int | None:
        """The special token that is spelt so, which `decode` leaves out; None where there is none."""

    def save(self, folder: str | Path) -> None:
        """Writes all that `load_tokenizer(folder)` needs to make the same tokenizer."""


class ByteTokenizer:
    """The bytes of UTF-8: ids 0..255 are bytes, 256 ends a document, 257 begins one, 258..263 are kept free."""

    vocab_size = 264
    eos_id = 256
    stop_ids = (256,)
    bos_id = 257
    fingerprint = encoding = "bytes-1"

    def encode(self, text: str) -> Int32[np.ndarray, " T"]:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in checked_ids(ids, self.vocab_size) if i < 256).decode("utf-8", errors="replace")

    def special_id(self, text: str) -> int | None:
        return None  # They have no spelling.

    def save(self, folder: str | Path) -> None:
        save_files(folder, "bytes", self.fingerprint, {})


class HuggingFaceTokenizer:
    """A `tokenizer.json`, read by the `tokenizers` package.

    Truncation and padding that the file may ask for are turned off: a document is encoded whole.
    """

    FILE = "tokenizer.json"

    def __init__(self, content: bytes, where: str, eos_token: str | None = None, bos_token: str | None = None,
                 chat_template: str | None = None, end_ids: Sequence[int] = (), pad_token: str | None = None) -> None:
        """Args:
          content: the bytes of the file.
          where: its name, for messages.
          eos_token, bos_token: the special tokens; None for the first of `end_ids`, or what is found by its name.
          chat_template: the Jinja template that a chat is written with.
          end_ids: what ends a text that the model writes, the end of a document or not.
          pad_token: what others fill a batch with; handed on, and not read here.

        Raises:
          ValueError: not a tokenizer, no end-of-document token in its vocabulary, or an id outside it.
        """
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except ValueError as error:
            raise ValueError(f"tokenizer={where!r}: is not a tokenizer.json ({error})") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.content = content
        self.chat_template, self.pad_token = chat_template, pad_token
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        for i in end_ids:
            require(self._tokenizer.id_to_token(i) is not None, "eos_token_id", i,
                    f"must be a token of the vocabulary of {where}")
        first = self._tokenizer.id_to_token(end_ids[0]) if end_ids else None
        self.eos_token = _special(vocabulary, eos_token or first, END_TOKENS, "eos_token")
        self.bos_token = _special(vocabulary, bos_token, BEGIN_TOKENS, "bos_token")
        if self.eos_token is None:
            raise ValueError(f"tokenizer={where!r}: has no end-of-document token; give eos_token, "
                             f"or a tokenizer with one of {', '.join(END_TOKENS)}")
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.eos_id: int = vocabulary[self.eos_token]
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys([self.eos_id, *end_ids]))
        self.bos_id: int | None = None if self.bos_token is None else vocabulary[self.bos_token]
        self.fingerprint = hashlib.sha256(content + f"{self.eos_id}".encode()).hexdigest()

    @functools.cached_property
    def encoding(self) -> str:
        tokens = sorted(self._tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda token: token[1])
        return hashlib.sha256(json.dumps([tokens, self.encode(_PROBE).tolist()]).encode()).hexdigest()

    @classmethod
    def from_file(cls, path: str | Path, eos_token: str | None = None,
                  bos_token: str | None = None) -> HuggingFaceTokenizer:
        """Reads a file, and what lies beside it.

        Special tokens not given come from `tokenizer_config.json`, then from their names; what else ends a text, from
        `eos_token_id` of `generation_config.json`, or else of `config.json`; the chat template from
        `chat_template.jinja`, or else from `tokenizer_config.json` (of several, that named `default`).
        """
        path = Path(path)
        named = _named(path.parent)
        return cls(read_bytes(path), str(path), eos_token or _token_text(named.get("eos_token")),
                   bos_token or _token_text(named.get("bos_token")), _chat_template(path.parent),
                   _end_ids(path.parent), _token_text(named.get("pad_token")))

    def encode(self, text: str) -> Int32[np.ndarray, " T"]:
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_marked(self, text: str) -> Int32[np.ndarray, " T"]:
        """As `encode`, but what spells a special token is that token: for text that a chat template made."""
        return np.asarray(self._marking.encode(text, add_special_tokens=False).ids, np.int32)

    @functools.cached_property
    def _marking(self) -> tokenizers.Tokenizer:
        """One of its own: a tokenizer that was told to spell special tokens is told so for all who use it."""
        marking = tokenizers.Tokenizer.from_buffer(self.content)
        marking.no_truncation()
        marking.no_padding()
        return marking

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(checked_ids(ids, self.vocab_size), skip_special_tokens=True)

    def special_id(self, text: str) -> int | None:
        return self._special_ids.get(text)

    @functools.cached_property
    def _special_ids(self) -> dict[str, int]:
        return {token.content: i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}

    def save(self, folder: str | Path) -> None:
        save_files(folder, "huggingface", self.fingerprint, {self.FILE: self.content},
                   eos_token=self.eos_token, bos_token=self.bos_token, chat_template=self.chat_template,
                   end_ids=list(self.stop_ids), pad_token=self.pad_token)


def load_tokenizer(spec: str | Path, eos_token: str | None = None) -> Tokenizer:
    """The tokenizer that a config names.

    Args:
      spec: `bytes`; a `tokenizer.json` or a folder that holds one; a sentencepiece table (`.bin`); or a folder that
        `save` wrote.
      eos_token: the end-of-document token of a `tokenizer.json`, where it cannot be found by itself.

    Raises:
      ValueError: no such file, a file of another kind, or a saved tokenizer that was changed since.
    """
    if str(spec) == "bytes":
        return ByteTokenizer()
    path = Path(spec).expanduser()
    require(path.exists(), "tokenizer", str(spec), "no such file; accepted: bytes, a tokenizer.json, or its folder")
    if path.is_file():
        return (SentencePieceTokenizer(read_bytes(path), str(path)) if path.suffix == ".bin"
                else HuggingFaceTokenizer.from_file(path, eos_token))
    if not (path / SAVED).exists():
        require((path / HuggingFaceTokenizer.FILE).exists(), "tokenizer", str(spec),
                f"a folder must hold {HuggingFaceTokenizer.FILE} or {SAVED}")
        return HuggingFaceTokenizer.from_file(path / HuggingFaceTokenizer.FILE, eos_token)
    return _load_saved(path)


def _load_saved(folder: Path) -> Tokenizer:
    saved = read_json(folder / SAVED)
    tokenizer: Tokenizer
    if saved.get("kind") == "bytes":
        tokenizer = ByteTokenizer()
    elif saved.get("kind") == "sentencepiece":
        path = folder / SentencePieceTokenizer.FILE
        tokenizer = SentencePieceTokenizer(read_bytes(path), str(path))
    elif saved.get("kind") == "huggingface":
        path = folder / HuggingFaceTokenizer.FILE
        tokenizer = HuggingFaceTokenizer(read_bytes(path), str(path), saved.get("eos_token"), saved.get("bos_token"),
                                         saved.get("chat_template") or _chat_template(folder),
                                         saved.get("end_ids", ()), saved.get("pad_token"))
    else:
        raise ValueError(f"tokenizer={str(folder)!r}: kind={saved.get('kind')!r} in {SAVED}: "
                         f"must be one of bytes, huggingface, sentencepiece")
    require(tokenizer.fingerprint == saved.get("fingerprint"), "tokenizer", str(folder),
            "was changed since it was saved; its fingerprint differs")
    return tokenizer


def _named(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.exists() else {}


def _chat_template(folder: Path) -> str | None:
    template = folder / "chat_template.jinja"
    found = read_bytes(template).decode() if template.exists() else _named(folder).get("chat_template")
    if isinstance(found, list):
        found = next((entry.get("template") for entry in found if entry.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def _token_text(value: Any) -> str | None:
    """A special token of `tokenizer_config.json`: its text, or an object with it."""
    return value.get("content") if isinstance(value, dict) else value


def _end_ids(folder: Path) -> list[int]:
    """What ends a text, by the files of a checkpoint: none, one or several ids."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).exists() and (value := read_json(folder / name).get("eos_token_id")) is not None:
            ids = value if isinstance(value, list) else [value]
            require(all(type(i) is int for i in ids), "eos_token_id", value, f"of {folder / name} must be ids")
            return ids
    return []


def _special(vocabulary: dict[str, int], given: str | None, names: tuple[str, ...], field: str) -> str | None:
    require(given is None or given in vocabulary, field, given, "must be a token of the vocabulary")
    return given if given is not None else next((name for name in names if name in vocabulary), None)
