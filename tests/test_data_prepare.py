"""Token shards: what they hold, what is held out, when they are reused, and what is refused."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfa_jax.config import DataConfig
from mfa_jax.data.prepare import _hash, prepare
from mfa_jax.data.shards import META, SPLITS, Prepared, open_prepared, write_checksums
from mfa_jax.data.tokenizers import ByteTokenizer

BYTES = ByteTokenizer()


def config_of(folder: Path, texts: list[str], **more) -> DataConfig:
    path = folder / "corpus.txt"
    path.write_bytes("\0".join(texts).encode())
    return DataConfig(source=str(path), **more)


def texts_of(prepared: Prepared, split: str) -> list[str]:
    tokens, offsets = prepared.tokens(split), prepared.offsets(split)
    rows = [tokens[a:b] for a, b in zip(offsets, offsets[1:], strict=False)]
    assert all(row[-1] == BYTES.eos_id for row in rows) and (tokens == BYTES.eos_id).sum() == len(rows)
    return [BYTES.decode(row) for row in rows]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_document_once_in_order_with_its_end(tmp_path):
    texts = [f"document {i} é" * (i % 5 + 1) for i in range(200)]
    reports = []
    prepared = prepare(config_of(tmp_path, texts, held_out=0.2), tmp_path / "data", BYTES,
                       progress=lambda *numbers: reports.append(numbers))
    train, held_out = texts_of(prepared, "train"), texts_of(prepared, "held_out")
    assert sorted(train + held_out) == sorted(texts) and not set(train) & set(held_out)
    assert train == [text for text in texts if text in set(train)]
    assert 20 <= len(held_out) <= 60, "200 fair draws at 0.2"
    assert prepared.meta.held_out_by == "hash"
    assert reports == [(200, sum(len(text.encode()) for text in texts))]
    for split, found in zip(SPLITS, (train, held_out), strict=True):
        size = prepared.size(split)
        text_bytes = sum(len(text.encode()) for text in found)
        assert (size.documents, size.text_bytes, size.tokens) == (len(found), text_bytes, text_bytes + len(found))
        assert size.bytes_per_token == text_bytes / size.tokens
        assert prepared.tokens(split).dtype == np.uint16
    assert {path.name for path in tmp_path.iterdir()} == {"corpus.txt", "data"}, "no staging folder is left"


@settings(deadline=None, max_examples=25)
@given(texts=st.lists(st.text("ab", min_size=1, max_size=3), min_size=2, max_size=30), share=st.floats(0.01, 0.5))
def test_identical_documents_are_never_in_both_splits(tmp_path_factory, texts, share):
    folder = tmp_path_factory.mktemp("data")
    config = config_of(folder, texts, held_out=share)
    try:
        prepared = prepare(config, folder / "data", BYTES)
    except ValueError as error:
        assert "leaves no document for training" in str(error)
        return
    train, held_out = texts_of(prepared, "train"), texts_of(prepared, "held_out")
    assert train and held_out and sorted(train + held_out) == sorted(texts)
    assert not set(train) & set(held_out)
    for split, found in zip(SPLITS, (train, held_out), strict=True):
        assert prepared.size(split).text_bytes == sum(map(len, found))


def test_the_choice_depends_on_the_text_alone(tmp_path):
    texts = [f"document {i}" for i in range(100)]
    for name, order in (("a", texts), ("b", texts[::-1] + ["more"])):
        (tmp_path / name).mkdir()
        prepare(config_of(tmp_path / name, order, held_out=0.1, seed=len(name)), tmp_path / name / "data", BYTES)
    first, second = (set(texts_of(open_prepared(tmp_path / name / "data"), "held_out")) for name in "ab")
    assert first == second - {"more"} and first


def test_a_small_corpus_holds_out_the_document_of_the_smallest_hash(tmp_path, caplog):
    texts = [f"novel {i}" for i in range(5)]
    with caplog.at_level(logging.WARNING):
        prepared = prepare(config_of(tmp_path, texts, held_out=1e-6), tmp_path / "data", BYTES)
    (held_out,) = texts_of(prepared, "held_out")
    assert texts_of(prepared, "train") == [text for text in texts if text != held_out]
    assert prepared.meta.held_out_by == "smallest hash" and "the one with the smallest is held out" in caplog.text
    assert {path.name for path in (tmp_path / "data").iterdir()} == {
        META, *(f"{split}{suffix}" for split in SPLITS for file in (".bin", ".offsets.npy")
                for suffix in (file, f"{file}.crc32.npy"))}


def test_a_single_document_gives_its_tail(tmp_path):
    text = "".join(chr(0xE9 + i) for i in range(1000))
    prepared = prepare(config_of(tmp_path, [text], held_out=0.1), tmp_path / "data", BYTES)
    assert texts_of(prepared, "train") == [text[:900]] and texts_of(prepared, "held_out") == [text[900:]]
    assert prepared.meta.held_out_by == "tail of the only document"


def test_nothing_held_out(tmp_path):
    prepared = prepare(config_of(tmp_path, ["one"], held_out=0.0), tmp_path / "data", BYTES)
    assert texts_of(prepared, "train") == ["one"] and texts_of(prepared, "held_out") == []
    assert prepared.meta.held_out_by == "nothing"


def test_a_held_out_source_is_held_out_and_nothing_else(tmp_path):
    config = config_of(tmp_path, ["one", "two", "three"], held_out=0.9)
    other = tmp_path / "other.txt"
    other.write_text("four\0five")
    prepared = prepare(dataclasses.replace(config, held_out_source=str(other)), tmp_path / "data", BYTES)
    assert texts_of(prepared, "train") == ["one", "two", "three"]
    assert texts_of(prepared, "held_out") == ["four", "five"]
    assert prepared.meta.held_out_by == "source of its own"
    with pytest.raises(ValueError, match="was prepared with held_out_source="):
        prepare(config, tmp_path / "data", BYTES)


def test_a_document_of_both_sources_is_refused(tmp_path):
    config = config_of(tmp_path, ["one", "two"])
    other = tmp_path / "other.txt"
    other.write_text("two")
    with pytest.raises(ValueError, match="#1': is held out by held_out_source="):
        prepare(dataclasses.replace(config, held_out_source=str(other)), tmp_path / "data", BYTES)
    assert not (tmp_path / "data").exists()


def test_documents_of_both_sources_are_told_apart_by_more_than_the_number_that_splits(tmp_path):
    """Two texts whose 48 bits are the same, of which a hundred million documents have some."""
    mine, other = "17612872", tmp_path / "other.txt"
    other.write_text("18158534")
    assert _hash(mine) == _hash(other.read_text())
    config = config_of(tmp_path, [mine], held_out_source=str(other))
    prepared = prepare(config, tmp_path / "data", BYTES)
    assert (texts_of(prepared, "train"), texts_of(prepared, "held_out")) == ([mine], [other.read_text()])


@pytest.mark.parametrize("texts, share, message", [
    (["x"], 0.5, "its only document has 1 characters; too few to hold out 0.5"),
    (["same", "same"], 0.01, "held_out=0.01: leaves no document for training .the source has 2"),
])
def test_too_little_to_split(tmp_path, texts, share, message):
    with pytest.raises(ValueError, match=message):
        prepare(config_of(tmp_path, texts, held_out=share), tmp_path / "data", BYTES)
    assert not (tmp_path / "data").exists()


def test_a_wide_vocabulary_takes_four_bytes(tmp_path):
    class Wide(ByteTokenizer):
        vocab_size = 1 << 17

        def encode(self, text):
            return super().encode(text) + 70000

    prepared = prepare(config_of(tmp_path, ["abc"], held_out=0.0), tmp_path / "data", Wide())
    assert prepared.tokens("train").tolist() == [70097, 70098, 70099, 256]
    assert prepared.meta.dtype == "uint32"


# ---- reuse -----------------------------------------------------------------------------------------------------


def test_a_finished_folder_is_reused_without_reading_the_source(tmp_path, caplog):
    config = config_of(tmp_path, ["one", "two", "three"], held_out=0.3)
    first = prepare(config, tmp_path / "data", BYTES)
    before = contents(tmp_path / "data")
    other_shape = dataclasses.replace(config, sequence_length=7, batch_size=3, seed=5, separate_documents=False)
    with caplog.at_level(logging.WARNING):
        assert prepare(other_shape, tmp_path / "data", BYTES) == first
        assert not caplog.records
        (tmp_path / "corpus.txt").write_text("changed since")
        assert prepare(config, tmp_path / "data", BYTES) == first
        assert "the source was 1 files, 13 bytes, is now 1 files, 13 bytes" not in caplog.text
    (tmp_path / "corpus.txt").write_text("changed and longer")
    with caplog.at_level(logging.WARNING):
        assert prepare(config, tmp_path / "data", BYTES) == first
    assert "the source was 1 files, 13 bytes, is now 1 files, 18 bytes" in caplog.text
    (tmp_path / "corpus.txt").unlink()
    assert prepare(config, tmp_path / "data", BYTES) == first
    assert contents(tmp_path / "data") == before


def test_a_held_out_source_that_changed_is_told(tmp_path, caplog):
    other = tmp_path / "other.txt"
    other.write_text("four")
    config = config_of(tmp_path, ["one"], held_out_source=str(other))
    first = prepare(config, tmp_path / "data", BYTES)
    other.write_text("four\0five")
    with caplog.at_level(logging.WARNING):
        assert prepare(config, tmp_path / "data", BYTES) == first
    assert "the held-out source was 1 files, 4 bytes, is now 1 files, 9 bytes" in caplog.text
    assert "the source was" not in caplog.text


@pytest.mark.parametrize("change, message", [
    ({"held_out": 0.1}, "was prepared with held_out=0.3, now 0.1; give another folder"),
    ({"source": "stdlib", "text_field": "body"}, "source='.*corpus.txt', now 'stdlib'; text_field='text', now 'body'"),
])
def test_other_settings_are_refused_and_named(tmp_path, change, message):
    config = config_of(tmp_path, ["one", "two"], held_out=0.3)
    prepare(config, tmp_path / "data", BYTES)
    before = contents(tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        prepare(dataclasses.replace(config, **change), tmp_path / "data", BYTES)
    assert contents(tmp_path / "data") == before


def test_another_tokenizer_is_refused(tmp_path):
    class Other(ByteTokenizer):
        fingerprint = "other"

    config = config_of(tmp_path, ["one", "two"])
    prepare(config, tmp_path / "data", BYTES)
    with pytest.raises(ValueError, match="fingerprint='bytes-1', now 'other'"):
        prepare(config, tmp_path / "data", Other())


def test_a_folder_of_something_else_is_refused_and_kept(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.tex").write_text("precious")
    config = config_of(tmp_path, ["one", "two"])
    with pytest.raises(ValueError, match="must be empty or prepared before; it holds other files"):
        prepare(config, tmp_path / "data", BYTES)
    assert contents(tmp_path / "data") == {"thesis.tex": b"precious"}
    with pytest.raises(ValueError, match="must be a folder, and is a file"):
        prepare(config, tmp_path / "corpus.txt", BYTES)
    (tmp_path / "empty").mkdir()
    assert prepare(config, tmp_path / "empty", BYTES).size("train").documents == 1


def older_format(folder: Path) -> None:
    meta = json.loads((folder / META).read_text())
    meta["settings"]["format"] = 1
    (folder / META).write_text(json.dumps(meta))


def other_offsets(folder: Path) -> None:
    np.save(folder / "train.offsets.npy", np.arange(9))
    write_checksums(folder / "train.offsets.npy")


@pytest.mark.parametrize("damage, message", [
    (lambda folder: (folder / "train.bin").write_bytes(b"12"), "must have 8 bytes, has 2"),
    (lambda folder: (folder / "train.bin").unlink(), "the files of train cannot be read"),
    (lambda folder: (folder / "held_out.offsets.npy").write_bytes(b""),
     "held_out.offsets.npy': has 0 bytes, which are 0 chunks, and 1 checksums"),
    (lambda folder: np.save(folder / "train.offsets.npy", np.arange(9)),
     "train.offsets.npy': bytes 0 to 200 are not what was written"),
    (other_offsets, "its offsets must be of 1 documents"),
    (lambda folder: np.save(folder / "train.offsets.npy", [1, 4]),
     "train.offsets.npy': bytes 0 to 144 are not what was written"),
    (lambda folder: (folder / "train.offsets.npy.crc32.npy").unlink(), "its checksums cannot be read"),
    (lambda folder: np.save(folder / "train.offsets.npy.crc32.npy", np.zeros(2, np.uint32)),
     "1 chunks, and 2 checksums"),
    (older_format, "is of format 1, this is 2; remove the folder"),
    (lambda folder: (folder / META).write_text("{"), "meta.json is not JSON"),
    (lambda folder: (folder / META).write_text("{}"), "meta.json=.*missing field"),
    (lambda folder: (folder / META).write_text(json.dumps({"who": 1})), "unknown field"),
])
def test_a_damaged_folder_is_refused(tmp_path, damage, message):
    prepare(config_of(tmp_path, ["one", "two"], held_out=0.3), tmp_path / "data", BYTES)
    damage(tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        open_prepared(tmp_path / "data")


def test_nothing_prepared(tmp_path):
    with pytest.raises(ValueError, match="meta.json cannot be read .No such file"):
        open_prepared(tmp_path / "data")


# ---- what goes wrong while writing -----------------------------------------------------------------------------


def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="data': cannot be written .No space left on device.; nothing that was there"):
        prepare(config_of(tmp_path, ["one", "two"]), tmp_path / "data", BYTES)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.txt"]


def test_a_folder_that_cannot_be_made(tmp_path):
    config = config_of(tmp_path, ["one", "two"])
    with pytest.raises(ValueError, match="cannot be written"):
        prepare(config, tmp_path / "corpus.txt" / "data", BYTES)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_preparation_leaves_nothing_and_can_be_repeated(tmp_path, error):
    def stop(*_):
        raise error

    config = config_of(tmp_path, ["one", "two"])
    with pytest.raises(error):
        prepare(config, tmp_path / "data", BYTES, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.txt"]
    assert prepare(config, tmp_path / "data", BYTES).size("train").documents == 1


def test_an_undecodable_document_in_the_middle_leaves_nothing(tmp_path):
    config = config_of(tmp_path, ["one", "two"])
    Path(config.source).write_bytes(b"one\0two\0\xff")
    with pytest.raises(ValueError, match="corpus.txt: not UTF-8 at byte 8"):
        prepare(config, tmp_path / "data", BYTES)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.txt"]


def test_the_first_of_two_processes_wins(tmp_path):
    config = config_of(tmp_path, ["one", "two", "three"])
    winner = []

    def meanwhile(*_):
        if not winner:
            winner.append(None)
            winner[0] = prepare(config, tmp_path / "data", BYTES)

    assert prepare(config, tmp_path / "data", BYTES, progress=meanwhile) == winner[0]
    assert {path.name for path in tmp_path.iterdir()} == {"corpus.txt", "data"}
