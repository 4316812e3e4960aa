"""The tokenizer inside a GGUF file as a `tokenizer.json`: byte-level BPE (`gpt2`) and SentencePiece BPE (`llama`).

SentencePiece BPE: U+2581 stands for a space, and for one that is put before a text; each character is a token, or its
bytes where it is none; then, again and again, of all neighbours whose concatenation is a token those of the highest
score become one, the leftmost of equals. Reference: Kudo and Richardson, arXiv 1808.06226; llama.cpp, by whose rules
such files are read.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from mfa_jax.config import require
from mfa_jax.convert.gguf_file import open_reader, read_value
from mfa_jax.data import HuggingFaceTokenizer

# What stands before BPE, by the file's name for it: llama.cpp keeps these rules in its code, not in the file.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_PRE_TOKENIZERS: dict[str, list[pre_tokenizers.PreTokenizer]] = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": [pre_tokenizers.Split(Regex(_WORDS % r"\p{N}{1,3}"), "isolated"), _BYTES],
    "qwen2": [pre_tokenizers.Split(Regex(_WORDS % r"\p{N}"), "isolated"), _BYTES],
}
# Other names that llama.cpp has for the same rules.
_SAME_RULES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "falcon3": "llama-bpe", "pixtral": "llama-bpe",
               "deepseek-r1-qwen": "qwen2"}
# Rules whose words are looked up in the vocabulary before any merge.
_WHOLE_WORDS_FIRST = ("llama-bpe",)
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_NAME_ONE = "name a tokenizer.json (--tokenizer)"
_SPACE = "\u2581"
_SPELT_BYTES = {f"<0x{value:02X}>" for value in range(256)}


def read_tokenizer(path: Path) -> HuggingFaceTokenizer:
    """The tokenizer in a file.

    Ids of SentencePiece BPE are those of llama.cpp, which puts a space before what follows a control or a user-defined
    token, too: decoded, it is there. Unlike in llama.cpp, no merge makes a control, unknown or byte token (as in
    SentencePiece), and types are the file's, whatever a token is called; but what ends or begins a text is special.
    U+2581 in a text becomes a space.

    Raises:
      ValueError: not a GGUF file, or one that is cut short; or tokens, their types, merges or scores are missing or
        don't belong together.
      NotImplementedError: a part of a split file, another kind of tokenizer, rules before BPE that are not known here,
        or a SentencePiece table that a `tokenizer.json` does not cut alike.
    """
    reader = open_reader(path)
    kind, rules = (_field(reader, name) for name in ("model", "pre"))
    rules = _SAME_RULES.get(rules, rules)
    if kind != "llama" and (kind != "gpt2" or rules not in _PRE_TOKENIZERS):
        raise NotImplementedError(f"tokenizer.ggml.model={kind!r}, pre={rules!r}: only byte-level BPE (gpt2) with the "
                                  f"rules {', '.join([*_PRE_TOKENIZERS, *_SAME_RULES])}, and SentencePiece BPE (llama) "
                                  f"can be rebuilt; {_NAME_ONE}")
    # Without types llama.cpp guesses from the spelling which tokens are special.
    names = ("tokens", "merges" if kind == "gpt2" else "scores", "token_type")
    tokens, order, kinds = (_field(reader, name) for name in names)
    for name, found in zip(names, (tokens, order, kinds), strict=True):
        require(found is not None, f"tokenizer.ggml.{name}", None, f"is missing from the file; {_NAME_ONE}")
    require(len(kinds) == len(tokens), "tokenizer.ggml.token_type", f"{len(kinds)} types",
            f"must have one for each of {len(tokens)} tokens")
    special: dict[str, int] = {}
    for name in ("eos", "eot", "bos"):  # the end of a document, of a turn in a chat, and the beginning
        if (i := _field(reader, f"{name}_token_id")) is not None:
            require(0 <= i < len(tokens), f"tokenizer.ggml.{name}_token_id", i, f"must be below {len(tokens)} tokens")
            special[name] = i
    if kind == "llama":
        # Older converters wrote all tokens that a fine-tuned model had added as user-defined, the end of a turn, too.
        ends = special.values()
        kinds = [_CONTROL if i in ends and each == _USER_DEFINED else each for i, each in enumerate(kinds)]
        tokenizer = _sentencepiece(reader, tokens, order, kinds)
    else:
        tokenizer = _byte_level(tokens, order, rules)
    marks = (_CONTROL,) if kind == "gpt2" else (_CONTROL, _UNKNOWN)
    tokenizer.add_tokens([AddedToken(token, special=kind in marks, normalized=False)
                          for token, kind in zip(tokens, kinds, strict=True) if kind in (*marks, _USER_DEFINED)])
    eos, bos = (tokens[special[name]] if name in special else None for name in ("eos", "bos"))
    return HuggingFaceTokenizer(tokenizer.to_str().encode(), str(path), eos, bos,
                                read_value(reader, "tokenizer.chat_template"),
                                [special[name] for name in ("eos", "eot") if name in special])


def _field(reader: Any, name: str) -> Any:
    return read_value(reader, f"tokenizer.ggml.{name}")


def _byte_level(tokens: Sequence[str], merges: Sequence[str], rules: str) -> tokenizers.Tokenizer:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(
        vocabulary, _merges(merges, vocabulary), ignore_merges=rules in _WHOLE_WORDS_FIRST))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_PRE_TOKENIZERS[rules])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _merges(merges: Sequence[str], vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    pairs = [(left, right) for left, _, right in (pair.partition(" ") for pair in merges)]
    for left, right in pairs:
        require({left, right, left + right} <= vocabulary.keys(), "tokenizer.ggml.merges", f"{left} {right}",
                "must be two tokens that together are a third, all in tokenizer.ggml.tokens")
    return pairs


def _sentencepiece(
    reader: Any, tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int]
) -> tokenizers.Tokenizer:
    _require_table(reader, tokens, scores, kinds)
    _require_cut_alike(tokens, kinds)
    unknown = next((token for token, kind in zip(tokens, kinds, strict=True) if kind == _UNKNOWN), None)
    tokenizer = tokenizers.Tokenizer(models.BPE(
        {token: i for i, token in enumerate(tokens)}, _merges_by_score(tokens, scores, kinds), unk_token=unknown,
        fuse_unk=True, byte_fallback=True))
    prefix = _field(reader, "add_space_prefix") in (None, True)
    # Applied to each part between added tokens, and not to an empty one.
    before = [normalizers.Prepend(_SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", _SPACE)])
    after = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
                                           *after])
    return tokenizer


def _require_table(reader: Any, tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int]) -> None:
    name = str(read_value(reader, "general.name") or "")
    if any(spelt in name.lower() for spelt in ("phi-3", "phi3")):
        raise NotImplementedError(f"general.name={name!r}: of models of that name llama.cpp drops white space behind "
                                  f"special tokens, which is not written in the file; {_NAME_ONE}")
    for field in ("remove_extra_whitespaces", "precompiled_charsmap"):
        if (found := _field(reader, field)) not in (None, False, []):
            shown = found if isinstance(found, bool) else f"{len(found)} bytes"
            raise NotImplementedError(f"tokenizer.ggml.{field}={shown}: only tables whose text is not normalised can "
                                      f"be rebuilt (llama.cpp ignores the field, SentencePiece does not); {_NAME_ONE}")
    require(len(scores) == len(tokens), "tokenizer.ggml.scores", f"{len(scores)} scores",
            f"must have one for each of {len(tokens)} tokens")
    twice = [token for token, count in collections.Counter(tokens).items() if count > 1]
    require(not twice, "tokenizer.ggml.tokens", twice[:3], "must all differ")
    spelt_bytes = set()
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        require(math.isfinite(score), "tokenizer.ggml.scores", score, f"must be a finite number ({token!r} has it)")
        require(_NORMAL <= kind <= _BYTE, "tokenizer.ggml.token_type", kind, f"must be 1 .. 6 ({token!r} has it)")
        if kind == _BYTE:
            spelt_bytes.add(token)
        # A character is the token that is spelt so, whatever its type.
        require(len(token) != 1 or kind not in (_CONTROL, _UNKNOWN), "tokenizer.ggml.tokens", token,
                "must be longer than a character, as a control or unknown token")
    missing = sorted(_SPELT_BYTES ^ spelt_bytes)
    require(not missing, "tokenizer.ggml.tokens", missing[:3], "must be exactly those of type BYTE, <0x00> .. <0xFF>")
    require(_SPACE in tokens, "tokenizer.ggml.tokens", _SPACE, "must be a token, which stands for a space")


def _merges_by_score(tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int]) -> list[tuple[str, str]]:
    """Every split of each token into two tokens: highest score first, then shortest left part first.

    BPE takes the pair that comes first in this list, SentencePiece that of the highest score. These are the same where
    no two tokens share a score. Of several splits of one token only one ever stands side by side in a text: two symbols
    are what their joint text by itself was merged to, as merges across its ends would have torn it. So the order among
    them is of no consequence.

    Raises:
      NotImplementedError: tokens with equal scores, of which the leftmost in the text would be merged first; a token
        that is merged from a character that is none, or one of type UNUSED, which is cut up again by SentencePiece and
        not by llama.cpp.
    """
    types = dict(zip(tokens, kinds, strict=True))
    parts = {token for token, kind in types.items() if kind in (_NORMAL, _USER_DEFINED, _UNUSED)}
    by_score: dict[float, list[tuple[str, str]]] = {}
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        # A user-defined token is cut out of the text before any merge, unless it is only there when spaces are U+2581.
        if token not in parts or kind == _USER_DEFINED and _SPACE not in token:
            continue
        halves = [(token[:at], token[at:]) for at in range(1, len(token))]
        splits = [pair for pair in halves if all(half in parts or len(half) == 1 for half in pair)]
        if not splits:
            continue
        strange = [half for pair in splits for half in pair if half not in parts]
        if strange or kind == _UNUSED:
            reason = f"{strange[0]!r} in it is no token" if strange else "is of type UNUSED, and merges make it"
            raise NotImplementedError(f"tokenizer.ggml.tokens={token!r}: {reason}: tokens are rebuilt only of tokens, "
                                      f"into ones that are in use; {_NAME_ONE}")
        if score in by_score:
            raise NotImplementedError(f"tokenizer.ggml.scores={score}: both {''.join(by_score[score][0])!r} and "
                                      f"{token!r} have it; only tables whose merged tokens have different scores can "
                                      f"be rebuilt, as a tokenizer.json keeps an order of merges; {_NAME_ONE}")
        by_score[score] = splits
    return [pair for score in sorted(by_score, reverse=True) for pair in by_score[score]]


def _require_cut_alike(tokens: Sequence[str], kinds: Sequence[int]) -> None:
    """Control, unknown and user-defined tokens are cut out of a text: by llama.cpp the longest first, by `tokenizers`
    from left to right, the longest at each place. Where special tokens are to stay text, llama.cpp looks for the others
    alone, `tokenizers` passes over what it finds of them.

    Two tokens that overlap show it, or one in another: where no two differ, no text does.
    """
    ranked = sorted((token for token, kind in zip(tokens, kinds, strict=True)
                     if kind in (_CONTROL, _UNKNOWN, _USER_DEFINED) and token), key=lambda token: -len(token.encode()))
    if not ranked:
        return
    special = {token for token, kind in zip(tokens, kinds, strict=True) if kind in (_CONTROL, _UNKNOWN)}
    defined = [token for token in ranked if token not in special]
    pattern = re.compile("|".join(map(re.escape, ranked)))
    for text in _meetings(ranked):
        ours = pattern.findall(text)
        if ours != _longest_first(text, ranked) or (
                [token for token in ours if token not in special] != _longest_first(text, defined)):
            raise NotImplementedError(f"tokenizer.ggml.tokens: {text!r} holds special or user-defined tokens that "
                                      f"overlap ({', '.join(map(repr, ours))}, ...), of which llama.cpp takes the "
                                      f"longest and a tokenizer.json the first; {_NAME_ONE}")


def _meetings(tokens: Sequence[str]) -> Iterator[str]:
    """Each text that two of these tokens overlap to, and each token that holds another."""
    starts: dict[str, list[str]] = collections.defaultdict(list)
    for token in tokens:
        for size in range(1, len(token)):
            starts[token[:size]].append(token)
    for token in tokens:
        if any(other in token for other in tokens if other != token):
            yield token
        for at in range(1, len(token)):
            yield from (token + other[len(token) - at:] for other in starts.get(token[at:], ()))


def _longest_first(text: str, ranked: Sequence[str]) -> list[str]:
    for rank, token in enumerate(ranked):
        left, found, right = text.partition(token)
        if found:
            return [*_longest_first(left, ranked[rank + 1:]), token, *_longest_first(right, ranked[rank:])]
    return []
