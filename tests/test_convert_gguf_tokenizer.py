"""SentencePiece tables inside GGUF files, against a slow definition, and against the reading of a table in a `.bin`."""

from __future__ import annotations

import bz2
import functools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfa_jax.convert import pretrained_tokenizer
from mfa_jax.convert.tokenizer import save_tokenizer
from mfa_jax.data import HuggingFaceTokenizer, StreamDecoder, load_tokenizer
from mfa_jax.data.sentencepiece import FIRST_PIECE, SentencePieceTokenizer

gguf = pytest.importorskip("gguf", reason="reading .gguf files needs gguf: pip install 'mfa_jax[gguf]'")
NORMAL, UNKNOWN, CONTROL, DEFINED, UNUSED, BYTE = range(1, 7)
Table = list[tuple[str, float, int]]
BASE: Table = [("<unk>", 0, UNKNOWN), ("<s>", 0, CONTROL), ("</s>", 0, CONTROL),
               *((f"<0x{value:02X}>", 0, BYTE) for value in range(256))]
# Each with a score of its own, in no order: longer ones before their parts, and several ways to most of them.
PIECES = ["▁▁", "ab", "▁a", "aba", "ba", "aa", "▁▁▁▁", "aaa", "ca", "bc", "abc", "cabc", "the", "th", "he", "▁the",
          "中文", "é▁", "/s", "s>", "</s", "0x", "x0", "0A", "▁ab", "b▁", "bab", "abab", "🙂🙂", "\n\n", "▁\n"]
TABLE: Table = [*BASE, *((piece, -float(score), NORMAL) for piece, score in
                         zip(PIECES, np.random.default_rng(3).permutation(len(PIECES)), strict=True)),
                *((piece, -1000.0 - i, NORMAL) for i, piece in enumerate("▁abcthe中文é🙂\ns<>/0xA"))]
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=30)
SAMPLES = ("", " ", "   ", "\n", "\n\n\n", " a", "a ", "a  b   c    d", "the theme\r\n\tof", "naïve é e\u0301",
           "中文分词 日本語", "🙂🙂🙂 👩\u200d👩\u200d👧", "<s></s><unk><0x0A>", "\u00a0\u200b\ufeff\0",
           "aaaaaaaa ababab cabcabc", "  \n  \n")


def write_table(path: Path, table: Sequence[tuple[str, float, int]], model: str = "llama", **more: Any) -> Path:
    """`more` is added to the fields of the tokenizer, or takes one's place; None leaves one out."""
    writer = gguf.GGUFWriter(path, "llama")
    tokens, scores, kinds = zip(*table, strict=True)
    name = more.pop("name", None)
    fields = {"model": model, "tokens": list(tokens), "scores": [float(score) for score in scores],
              "token_type": list(kinds), "bos_token_id": 1, "eos_token_id": 2, **more}
    if name is not None:
        writer.add_name(name)
    for field, value in fields.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}.get(type(value), writer.add_array)
        if value is not None:
            add(f"tokenizer.ggml.{field}", value)
    writer.add_chat_template("{{ messages }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def slow(table: Table, text: str, *, prefix: bool = True, marked: bool = False) -> list[int]:
    """By the definition: cut out the longest added tokens, then merge the neighbours of the highest score."""
    ids = {piece: i for i, (piece, _, _) in enumerate(table)}
    added = [piece for piece, _, kind in table if kind == DEFINED or marked and kind in (CONTROL, UNKNOWN)]
    for piece in sorted(added, key=len, reverse=True):
        if piece in text:
            left, _, right = text.partition(piece)
            rest = functools.partial(slow, table, prefix=prefix, marked=marked)
            return [*rest(left), ids[piece], *rest(right)]
    scores = {piece: score for piece, score, kind in table if kind in (NORMAL, DEFINED)}
    parts = list((" " + text if prefix and text else text).replace(" ", "▁"))
    while True:
        pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in scores]
        if not pairs:
            break
        i = -max(pairs)[1]
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return [i for part in parts for i in ([ids[part]] if part in ids else [value + 3 for value in part.encode()])]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTokenizer:
    return pretrained_tokenizer(write_table(tmp_path_factory.mktemp("toy") / "toy.gguf", TABLE))


def check(tokenizer: Any, table: Table, text: str, *, prefix: bool = True) -> None:
    ids = tokenizer.encode(text).tolist()
    assert ids == slow(table, text, prefix=prefix)
    assert tokenizer.decode(ids) == tokenizer.decode([1, *ids, 2]) == text


@given(text=TEXT | st.text("abc the中é🙂\n<s>/0xA", max_size=40))
def test_ids_and_text_by_the_slow_definition(toy: HuggingFaceTokenizer, text: str) -> None:
    check(toy, TABLE, text)


@pytest.mark.parametrize("text", SAMPLES)
def test_samples_by_the_slow_definition(toy: HuggingFaceTokenizer, text: str) -> None:
    check(toy, TABLE, text)


def test_what_a_file_says_of_its_tokenizer(toy: HuggingFaceTokenizer, tmp_path: Path) -> None:
    assert (toy.vocab_size, toy.bos_id, toy.eos_id, toy.stop_ids) == (len(TABLE), 1, 2, (2,))
    assert toy.chat_template == "{{ messages }}"
    assert [toy.special_id(text) for text in ("<s>", "</s>", "<unk>", "<0x0A>", "ab")] == [1, 2, 0, None, None]
    toy.save(tmp_path / "saved")
    save_tokenizer(tmp_path, toy, 64, add_bos_token=True)
    for folder in (tmp_path / "saved", tmp_path):
        assert load_tokenizer(folder).encode("the abc").tolist() == toy.encode("the abc").tolist()


@settings(max_examples=40)
@given(texts=st.lists(TEXT | st.text("ab \n", max_size=8), max_size=4))
def test_streamed_text_is_the_text(toy: HuggingFaceTokenizer, texts: list[str]) -> None:
    ids = toy.encode("".join(texts)).tolist()
    stream = StreamDecoder(toy, context=[1])
    assert "".join([*map(stream.feed, ids), stream.flush()]) == "".join(texts)


def test_tables_at_random_by_the_slow_definition(tmp_path: Path) -> None:
    """Distinct scores, without the order that training gives them: every split of a token may be the one that counts,
    most tokens are never reached."""
    draw = random.Random(0)
    for trial in range(16):
        letters = "ab▁é中"[: draw.randint(1, 5)]
        pieces = {"".join(draw.choices(letters, k=draw.randint(2, 7))) for _ in range(draw.randint(3, 40))}
        scores = draw.sample(range(1000), len(pieces) + 5)
        table = [*BASE, *((piece, float(score), NORMAL)
                          for piece, score in zip([*sorted(pieces), *"ab▁é中"], scores, strict=True))]
        tokenizer = pretrained_tokenizer(write_table(tmp_path / f"{trial}.gguf", table))
        for _ in range(40):
            check(tokenizer, table, "".join(draw.choices(letters.replace("▁", " "), k=draw.randint(0, 24))))


def test_the_real_table(data_dir: Path, tmp_path: Path) -> None:
    """512 pieces of llama2.c, as a `.gguf` file has them: spaces as U+2581, the special tokens by their usual names."""
    folder = data_dir / "models" / "stories260K"
    expected = load_tokenizer(folder / "tok512.bin")
    assert isinstance(expected, SentencePieceTokenizer)
    pieces = [piece.decode().replace(" ", "▁") for piece in expected._pieces[FIRST_PIECE:]]
    table = [*BASE, *((piece, score, NORMAL) for piece, score in
                      zip(pieces, expected._scores[FIRST_PIECE:], strict=True))]
    tokenizer = pretrained_tokenizer(write_table(tmp_path / "stories.gguf", table))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (512, 1, 2)
    golden = np.load(folder / "golden_stories260K_fp64.npz")
    np.testing.assert_array_equal([1, *tokenizer.encode(str(golden["text"]))][:100], golden["ids"])

    @settings(max_examples=40)
    @given(text=TEXT | st.text("Once upon a time, Lily's mom\nsaid: \"No!\" 🙂é", max_size=60))
    def same(text: str) -> None:
        check(tokenizer, table, text)
        assert tokenizer.encode(text).tolist() == expected.encode(text).tolist()

    same()
    with bz2.open(data_dir / "text" / "books-valid.txt.bz2", "rt", encoding="utf-8") as file:
        long = file.read(5000)
    ids = tokenizer.encode(long)
    np.testing.assert_array_equal(ids, expected.encode(long))
    assert tokenizer.decode(ids) == long


def test_without_a_space_before_a_text(tmp_path: Path) -> None:
    tokenizer = pretrained_tokenizer(write_table(tmp_path / "toy.gguf", TABLE, add_space_prefix=False))
    for text in SAMPLES:
        check(tokenizer, TABLE, text, prefix=False)
    assert tokenizer.encode("a")[0] == [piece for piece, *_ in TABLE].index("a")


ADDED: Table = [*TABLE, ("<|im_end|>", -1000.0, DEFINED), ("[INST]", 0, CONTROL), ("  ", 0, DEFINED),
                ("\n\n\n", 0, DEFINED), ("   ", 0, DEFINED), ("<tag>", 0, DEFINED), ("▁<PRE>", 0, DEFINED),
                ("[PAD7]", -1e4, UNUSED)]


@pytest.mark.parametrize("prefix", [True, False])
def test_added_tokens(tmp_path: Path, prefix: bool) -> None:
    """A space is put behind each added token, as in llama.cpp."""
    tokenizer = pretrained_tokenizer(write_table(tmp_path / "toy.gguf", ADDED, add_space_prefix=prefix))
    draw = random.Random(1)
    words = ["<s>", "</s>", "<unk>", "<0x0A>", "[INST]", "<|im_end|>", "<tag>", "<PRE>", "[PAD7]", *" \naéb", "the"]
    for _ in range(300):
        text = "".join(draw.choices(words, k=draw.randint(0, 9)))
        ids = tokenizer.encode(text).tolist()
        assert ids == slow(ADDED, text, prefix=prefix)
        assert tokenizer.encode_marked(text).tolist() == slow(ADDED, text, prefix=prefix, marked=True)
        assert prefix or tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode("a<tag>b")) == ("a<tag> b" if prefix else "a<tag>b")
    assert tokenizer.special_id("[INST]") == len(TABLE) + 1 and tokenizer.special_id("<tag>") is None


def test_the_end_of_a_turn_is_special_whatever_its_type(tmp_path: Path) -> None:
    end = len(TABLE)
    tokenizer = pretrained_tokenizer(write_table(tmp_path / "toy.gguf", ADDED, eot_token_id=end))
    assert tokenizer.stop_ids == (2, end) and tokenizer.special_id("<|im_end|>") == end
    text = "a<|im_end|>"
    assert end not in tokenizer.encode(text) and tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_marked(text).tolist() == [*tokenizer.encode("a"), end]


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"model": "bert"}, NotImplementedError, "model='bert', pre=None: only .*gpt2.*llama.*; name a tokenizer.json"),
    ({"model": "t5"}, NotImplementedError, "tokenizer.ggml.model='t5'"),
    ({"model": "rwkv"}, NotImplementedError, "tokenizer.ggml.model='rwkv'"),
    ({"remove_extra_whitespaces": True}, NotImplementedError, "remove_extra_whitespaces=True: .*not normalised"),
    ({"precompiled_charsmap": [1, 2]}, NotImplementedError, "precompiled_charsmap=2 bytes: .*not normalised"),
    ({"name": "Phi 3 mini"}, None, ""),
    ({"name": "Phi-3-mini"}, NotImplementedError, "general.name='Phi-3-mini': .*white space behind special tokens"),
    ({"tokens": None}, ValueError, "tokenizer.ggml.tokens=None: is missing"),
    ({"scores": None}, ValueError, "tokenizer.ggml.scores=None: is missing .*; name a tokenizer.json"),
    ({"token_type": None}, ValueError, "tokenizer.ggml.token_type=None: is missing"),
    ({"scores": [0.0] * 5}, ValueError, "tokenizer.ggml.scores='5 scores': must have one for each of"),
    ({"token_type": [1] * 5}, ValueError, "tokenizer.ggml.token_type='5 types': must have one for each of"),
    ({"eos_token_id": 10**6}, ValueError, "tokenizer.ggml.eos_token_id=1000000: must be below"),
    ({"add_space_prefix": True, "remove_extra_whitespaces": False, "pre": "default"}, None, ""),
])
def test_fields_that_are_refused(tmp_path: Path, change: dict[str, Any], error: Any, message: str) -> None:
    path = write_table(tmp_path / "toy.gguf", TABLE, **change)
    if error is None:
        check(pretrained_tokenizer(path), TABLE, "the abc")
    else:
        with pytest.raises(error, match=message):
            pretrained_tokenizer(path)


@pytest.mark.parametrize(("more", "error", "message"), [
    ([("the▁", -5.0, NORMAL)], NotImplementedError, "scores=-5.0: both .* and 'the▁' have it; only tables"),
    ([("unreached", -5.0, NORMAL), ("z", -5.0, NORMAL)], None, ""),
    ([("ñb", -50.0, NORMAL)], NotImplementedError, "tokens='ñb': 'ñ' in it is no token: .*; name a tokenizer.json"),
    ([("ac", -50.0, UNUSED)], NotImplementedError, "tokens='ac': is of type UNUSED, and merges make it"),
    ([("ab", -50.0, NORMAL)], ValueError, r"tokenizer.ggml.tokens=\['ab'\]: must all differ"),
    ([("ac", float("nan"), NORMAL)], ValueError, "tokenizer.ggml.scores=nan: must be a finite number"),
    ([("ac", -50.0, 7)], ValueError, "tokenizer.ggml.token_type=7: must be 1 .. 6"),
    ([("#", -50.0, CONTROL)], ValueError, "tokens='#': must be longer than a character, as a control"),
    ([("<0x0a>", -50.0, BYTE)], ValueError, r"tokens=\['<0x0a>'\]: must be exactly those of type BYTE"),
    ([("[a", 0, DEFINED), ("a]]", 0, DEFINED)], NotImplementedError, r"'\[a\]\]' holds .*overlap \('\[a', ...\)"),
    ([("[a", 0, DEFINED), ("[a]", 0, CONTROL)], NotImplementedError, r"tokens: '\[a\]' holds special or user-defined"),
    ([("[a]", 0, DEFINED), ("[a", 0, CONTROL)], None, ""),
])
def test_tables_that_are_refused(tmp_path: Path, more: Table, error: Any, message: str) -> None:
    path = write_table(tmp_path / "toy.gguf", [*TABLE, *more])
    if error is None:
        check(pretrained_tokenizer(path), [*TABLE, *more], "the abc")
    else:
        with pytest.raises(error, match=message):
            pretrained_tokenizer(path)


@pytest.mark.parametrize(("gone", "message"), [
    ("<0x41>", r"tokens=\['<0x41>'\]: must be exactly those of type BYTE"),
    ("▁", "tokens='▁': must be a token, which stands for a space"),
])
def test_tables_without_what_text_needs(tmp_path: Path, gone: str, message: str) -> None:
    table = [row for row in TABLE if row[0] != gone]
    with pytest.raises(ValueError, match=message):
        pretrained_tokenizer(write_table(tmp_path / "toy.gguf", table))
