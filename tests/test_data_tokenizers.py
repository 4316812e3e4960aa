"""Round trips, the published ids of a real table, text as it comes, and tokenizers that travel with a run."""

from __future__ import annotations

import errno
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from mfa_jax.data.sentencepiece import SentencePieceTokenizer
from mfa_jax.data.streaming import StreamDecoder, decode_after
from mfa_jax.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer, load_tokenizer

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
SAMPLE = ("the theme of these three, then: ab abab", "Füße, 中文, 🙂", " leading and  double spaces\n\n", "</s><s>")


def hugging_face_json(**more) -> dict:
    """A byte-level BPE trained on a few words; every text round-trips."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model.train_from_iterator(SAMPLE, trainer)
    return {**json.loads(model.to_str()), **more}


# Equal scores, and pieces that overlap.
PIECES = [("<unk>", 0.0), ("\n<s>\n", 0.0), ("\n</s>\n", 0.0), *((f"<0x{i:02X}>", 0.0) for i in range(256)),
          *((c, -100.0) for c in " abcthe"), ("ab", -1.0), ("ba", -1.0), ("aba", -0.5), ("th", -3.0), ("the", -2.0),
          (" the", -4.0), (" a", -1.5), ("aa", -1.0), ("aaa", -1.0), ("中", -9.0)]


def table_bytes() -> bytes:
    raw = b"".join(struct.pack("<fi", score, len(text.encode())) + text.encode() for text, score in PIECES)
    return struct.pack("<i", max(len(text) for text, _ in PIECES)) + raw


@pytest.fixture(scope="module")
def json_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    path.write_text(json.dumps(hugging_face_json()))
    return path


@pytest.fixture(scope="module")
def every(json_file) -> dict:
    return {"bytes": ByteTokenizer(), "huggingface": load_tokenizer(json_file),
            "sentencepiece": SentencePieceTokenizer(table_bytes(), "table")}


KINDS = ("bytes", "huggingface", "sentencepiece")


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=60)
@given(text=TEXT | st.text("abcthe 中", max_size=30))
def test_round_trip(every, kind, text):
    tokenizer = every[kind]
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ((ids >= 0) & (ids < tokenizer.vocab_size)).all()
    assert not set(ids.tolist()) & {tokenizer.eos_id, tokenizer.bos_id}
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == text


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_streamed_text_is_the_decoded_text(every, kind, data):
    tokenizer = every[kind]
    anything = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30)
    ids = data.draw(anything | TEXT.map(lambda text: [tokenizer.bos_id, *tokenizer.encode(text).tolist()]))
    stream = StreamDecoder(tokenizer)
    pieces = [stream.feed(i) for i in ids]
    assert not [piece for piece in pieces if piece.endswith("\ufffd")], "never half of a character"
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)
    assert stream.flush() == ""


def test_stream_holds_back_exactly_the_incomplete_character():
    stream = StreamDecoder(ByteTokenizer())
    assert [stream.feed(i) for i in "a€".encode()] == ["a", "", "", "€"]
    assert [stream.feed(i) for i in (0xE2, 0x82)] == ["", ""] and stream.flush() == "\ufffd"
    assert stream.feed(0xFF) == "" and stream.feed(ord("b")) == "\ufffdb"


def test_a_stream_after_a_prompt_keeps_its_leading_space(every):
    tokenizer = every["sentencepiece"]
    prompt, reply = [1, *tokenizer.encode("ab").tolist()], tokenizer.encode("the").tolist()
    assert tokenizer.decode([1, *reply]) == "the"
    stream = StreamDecoder(tokenizer, context=prompt)
    assert "".join(map(stream.feed, reply)) + stream.flush() == " the"


def test_byte_ids_are_utf8():
    tokenizer = ByteTokenizer()
    np.testing.assert_array_equal(tokenizer.encode("aé"), [97, 0xC3, 0xA9])
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id) == (264, 256, 257)
    assert tokenizer.decode([257, 104, 105, 0xFF, *range(258, 264), 256]) == "hi\ufffd"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("token", [-1, 10**6])
def test_ids_outside_the_vocabulary(every, kind, token):
    with pytest.raises(ValueError, match=f"token={token}: must be in 0 .. {every[kind].vocab_size - 1}"):
        every[kind].decode([1, token])


# ---- the sentencepiece table -----------------------------------------------------------------------------------


def test_real_table_gives_the_published_ids(data_dir):
    folder = data_dir / "models" / "stories260K"
    tokenizer = load_tokenizer(folder / "tok512.bin")
    golden = np.load(folder / "golden_stories260K_fp64.npz")
    text = str(golden["text"])
    ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    np.testing.assert_array_equal(ids[:100], golden["ids"])
    assert tokenizer.vocab_size == 512
    assert tokenizer.decode(ids) == text


@settings(deadline=None, max_examples=100)
@given(text=st.text("abcthe 中é", max_size=40))
def test_merging_equals_the_slow_definition(every, text):
    tokenizer = every["sentencepiece"]
    pieces, scores = zip(*PIECES, strict=True)
    parts = [part for c in (" " + text if text else "")
             for part in ([c] if c in pieces else [f"<0x{b:02X}>" for b in c.encode()])]
    while True:
        scored = [(scores[pieces.index(a + b)], -i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
                  if a + b in pieces]
        if not scored:
            break
        i = -max(scored)[1]
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    assert tokenizer.encode(text).tolist() == [pieces.index(part) for part in parts]


@pytest.mark.parametrize("content, message", [
    (table_bytes()[:-1], "is cut short or not a sentencepiece table: token 275"),
    (table_bytes()[:20], "is cut short"),
    (b"", "must be a sentencepiece table with the 256 bytes"),
    (b"\xff" * 64, "is cut short or not a sentencepiece table: token 0 at byte 4"),
])
def test_a_damaged_table_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        SentencePieceTokenizer(content, "table")


# ---- tokenizer.json --------------------------------------------------------------------------------------------


def test_special_tokens_spelt_in_a_text_stay_text(every):
    ids = every["huggingface"].encode("a</s>b")
    assert every["huggingface"].eos_id not in ids and every["huggingface"].decode(ids) == "a</s>b"


def test_truncation_and_padding_of_the_file_do_not_cut_documents(tmp_path):
    more = {"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
            "padding": {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                        "pad_type_id": 0, "pad_token": "<s>"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(hugging_face_json(**more)))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("z" * 30)) == "z" * 30 and len(tokenizer.encode("z" * 30)) == 30


def test_the_end_token_is_given_configured_or_found(tmp_path, json_file):
    assert load_tokenizer(json_file).eos_id == 1
    assert load_tokenizer(json_file, eos_token="<s>").eos_id == 0
    (tmp_path / "tokenizer.json").write_bytes(json_file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<s>"}}))
    assert load_tokenizer(tmp_path).eos_id == 0
    with pytest.raises(ValueError, match="eos_token='<none>': must be a token of the vocabulary"):
        load_tokenizer(json_file, eos_token="<none>")
    renamed = json.dumps(hugging_face_json()).replace('"</s>"', '"<finis>"')
    with pytest.raises(ValueError, match="has no end-of-document token; give eos_token"):
        HuggingFaceTokenizer(renamed.encode(), "renamed")


# ---- load and save ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_is_the_same_one(every, kind, tmp_path):
    every[kind].save(tmp_path / "tokenizer")
    again = load_tokenizer(tmp_path / "tokenizer")
    for name in ("vocab_size", "eos_id", "bos_id", "stop_ids", "fingerprint"):
        assert getattr(again, name) == getattr(every[kind], name)
    for text in SAMPLE:
        np.testing.assert_array_equal(again.encode(text), every[kind].encode(text))


def test_the_chosen_end_token_is_saved(json_file, tmp_path):
    tokenizer = load_tokenizer(json_file, eos_token="<s>")
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).eos_id == 0
    assert tokenizer.fingerprint != load_tokenizer(json_file).fingerprint


def test_what_makes_the_same_ids_is_known_however_it_is_written(json_file, tmp_path):
    given = load_tokenizer(json_file)
    (tmp_path / "indented.json").write_text(json.dumps(json.loads(json_file.read_text()), indent=3))
    other = load_tokenizer(tmp_path / "indented.json")
    assert other.encoding == given.encoding and other.fingerprint != given.fingerprint
    assert load_tokenizer(json_file, eos_token="<s>").encoding == given.encoding, "whatever ends a document"
    changed = json.loads(json_file.read_text())
    changed["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "changed.json").write_text(json.dumps(changed))
    assert load_tokenizer(tmp_path / "changed.json").encoding != given.encoding


def test_of_several_chat_templates_the_default_is_taken(json_file, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(json_file.read_bytes())
    named = [{"name": "tools", "template": "a"}, {"name": "default", "template": "b"}]
    for templates, found in ((named, "b"), (named[:1], None), ("c", "c")):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
        assert load_tokenizer(tmp_path).chat_template == found
    load_tokenizer(json_file).save(tmp_path / "saved")
    (tmp_path / "saved" / "tokenizer_config.json").write_text(json.dumps({"chat_template": "d"}))
    assert load_tokenizer(tmp_path / "saved").chat_template == "d", "where none was saved, one can be added"


def test_what_ends_a_text_is_what_the_files_beside_it_say(json_file, tmp_path):
    """Chat models end their turns with another token than documents, and name both."""
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        path = tmp_path / "tokenizer.json"
        path.write_bytes(json_file.read_bytes())
        (tmp_path / name).write_text(json.dumps({
            "config.json": {"eos_token_id": 0}, "generation_config.json": {"eos_token_id": [5, 0]},
            "tokenizer_config.json": {"eos_token": "</s>"}}[name]))
        found = load_tokenizer(tmp_path)
        assert found.stop_ids == {"config.json": (0,), "generation_config.json": (5, 0),
                                  "tokenizer_config.json": (1, 5, 0)}[name]
        assert found.eos_id == found.stop_ids[0]
    found.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").stop_ids == (1, 5, 0)
    assert load_tokenizer(json_file).stop_ids == (1,)
    for wrong, message in ((999, "eos_token_id=999: must be a token of the vocabulary"),
                           ([0, "</s>"], r"eos_token_id=\[0, '</s>'\]: of .*generation_config.json must be ids")):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path)


def test_special_tokens_are_known_by_their_spelling(every):
    assert [every[kind].special_id("</s>") for kind in KINDS] == [None, 1, 2]
    assert [every[kind].special_id("the") for kind in KINDS] == [None, None, None]


def test_text_depends_on_what_was_before_it(every):
    """`decode_after` continues a text: after the begin token alone sentencepiece drops a space."""
    tokenizer = every["sentencepiece"]
    ids = tokenizer.encode("the").tolist()
    assert decode_after(tokenizer, [tokenizer.bos_id], ids) == "the"
    assert decode_after(tokenizer, [tokenizer.bos_id, *ids], ids) == " the"


@pytest.mark.parametrize("cut", [0, 1, 2, 3])
@pytest.mark.parametrize("before", ["a", "a😀😁"])
def test_a_cut_off_character_spoils_no_other_where_bytes_spell_them(before, cut):
    """As in Llama 2 and Mistral: of bytes in a row that spell no text, the decoder makes U+FFFD one for one."""
    alphabet = {"<unk>": 0, "</s>": 1, **{f"<0x{i:02X}>": 2 + i for i in range(256)}, "a": 258}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(alphabet, [], unk_token="<unk>", byte_fallback=True))
    model.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    model.add_special_tokens(["</s>"])
    tokenizer = HuggingFaceTokenizer(model.to_str().encode(), "bytes in a row")
    context, ids = tokenizer.encode(before).tolist(), tokenizer.encode("😂😃").tolist()
    if cut:
        ids = ids[:-4] + ids[-4:-cut]
    decoder = StreamDecoder(tokenizer, context)
    text = "".join([*map(decoder.feed, ids), decoder.flush()])
    assert text == ("😂😃" if cut == 0 else "😂" + "\ufffd" * (4 - cut))
    if cut:
        assert decode_after(tokenizer, context, ids[4:]) == "\ufffd" * (4 - cut)


def test_a_changed_or_missing_file_is_refused(every, tmp_path):
    with pytest.raises(ValueError, match="tokenizer='/no/such': no such file; accepted: bytes"):
        load_tokenizer("/no/such")
    with pytest.raises(ValueError, match="a folder must hold tokenizer.json or mfa_tokenizer.json"):
        load_tokenizer(tmp_path)
    every["huggingface"].save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(ValueError, match="was changed since it was saved; its fingerprint differs"):
        load_tokenizer(tmp_path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizer.json"):
        load_tokenizer(path)
    (tmp_path / "mfa_tokenizer.json").write_text('{"kind": "words"}')
    with pytest.raises(ValueError, match="kind='words' in mfa_tokenizer.json: must be one of bytes"):
        load_tokenizer(tmp_path)
    (tmp_path / "mfa_tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("cut", range(4))
def test_a_save_that_is_cut_off_is_no_tokenizer_and_can_be_made_again(every, tmp_path, monkeypatch, cut):
    """The disk is full, or the process is killed, at each step of it; either way nothing counts before all is there."""
    tokenizer, steps, folder = every["huggingface"], [], tmp_path / "tokenizer"
    write, replace = Path.write_bytes, Path.replace

    def step(function, half):
        def stepped(path, given):
            if len(steps) == cut:
                half(path)
                raise OSError(errno.ENOSPC, "No space left on device")
            steps.append(path.name)
            return function(path, given)
        return stepped

    with monkeypatch.context() as full:
        full.setattr(Path, "write_bytes", step(write, lambda path: write(path, b"{")))
        full.setattr(Path, "replace", step(replace, lambda path: None))
        with pytest.raises(ValueError, match=r"cannot be saved to '.*' \(No space left on device\)"):
            tokenizer.save(folder)
    assert {path.name for path in folder.iterdir()} <= {"tokenizer.json"}, "neither half a file nor what says all"
    tokenizer.save(folder)
    assert load_tokenizer(folder).fingerprint == tokenizer.fingerprint
    assert sorted(path.name for path in folder.iterdir()) == ["mfa_tokenizer.json", "tokenizer.json"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="tokenizer: cannot be saved to"):
        ByteTokenizer().save(tmp_path / "file")
