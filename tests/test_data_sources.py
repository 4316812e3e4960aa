"""What is read, in which order, what is left out and said, and what is refused."""

from __future__ import annotations

import ast
import bz2
import gzip
import json
import logging
import lzma
import sys
import sysconfig
import types
from pathlib import Path

import pytest
import zstandard

from mfa_jax.data.sources import documents, signature

COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}
TEXT = "Füße, 中文, 🙂\r\nsecond line\n" * 3


def texts(source: Path | str, **more: str) -> list[str]:
    return [document.text for document in documents(str(source), **more)]


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("suffix", COMPRESS)
def test_text_and_json_lines_in_every_compression(tmp_path, suffix):
    compress = COMPRESS[suffix]
    plain = write(tmp_path / f"a.txt{suffix}", compress(f"{TEXT}\0other\0".encode()))
    assert texts(plain) == [TEXT, "other"]
    rows = "\n".join(json.dumps({"id": 1, "body": text}) for text in (TEXT, "a\0b"))
    lines = write(tmp_path / f"b.jsonl{suffix}", compress(f"{rows}\n\n".encode()))
    assert texts(lines, text_field="body") == [TEXT, "a\0b"], "a NUL inside a JSON string is part of the document"


def test_a_long_window_of_zstandard_is_read(tmp_path):
    """As `zstd --long=28` makes it; readers refuse such a file by default."""
    settings = zstandard.ZstdCompressionParameters(window_log=28)
    compressor = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    raw = compressor.compress(b"long ago") + compressor.flush()
    assert zstandard.get_frame_parameters(raw).window_size == 1 << 28
    assert texts(write(tmp_path / "a.zst", raw)) == ["long ago"]


@pytest.mark.parametrize("suffix", [suffix for suffix in COMPRESS if suffix])
@pytest.mark.parametrize("damage", [lambda raw: raw[:-10], lambda raw: b"not compressed" + raw])
def test_a_damaged_compressed_file_is_an_error(tmp_path, suffix, damage):
    raw = COMPRESS[suffix](bytes(range(32, 127)) * 500)
    path = write(tmp_path / f"a.txt{suffix}", damage(raw))
    with pytest.raises(ValueError, match=f"{path}: cannot be read"):
        texts(path)


@pytest.mark.parametrize("suffix", [suffix for suffix in COMPRESS if suffix])
def test_concatenated_streams_are_read_to_the_end(tmp_path, suffix):
    compress = COMPRESS[suffix]
    assert texts(write(tmp_path / f"a{suffix}", compress(b"one ") + compress(b"two"))) == ["one two"]


def test_characters_across_read_chunks(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "\ufeff" + TEXT + "\0" + TEXT)
    rows = write(tmp_path / "b.jsonl", "\ufeff" + json.dumps({"text": TEXT}, ensure_ascii=False))
    monkeypatch.setattr("mfa_jax.data.sources.CHUNK_BYTES", 2)
    assert texts(path) == [TEXT, TEXT], "the byte order mark is dropped, nothing else is"
    assert texts(rows) == [TEXT]


def test_a_folder_in_sorted_order_and_what_it_leaves_out(tmp_path, caplog):
    write(tmp_path / "b.md", "b")
    write(tmp_path / "a.txt", "a\x01 control characters do not make a .txt binary")
    write(tmp_path / "sub" / "c.py", "c\0d")
    write(tmp_path / "sub" / "e.jsonl", '{"text": "e"}')
    write(tmp_path / "picture.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    write(tmp_path / "all.tar.gz", gzip.compress(b"whatever"))
    write(tmp_path / ".hidden" / "x.txt", "x")
    write(tmp_path / ".secret", "y")
    write(tmp_path / "blank.txt", " \n")
    (tmp_path / "again").symlink_to(tmp_path / "sub")
    with caplog.at_level(logging.WARNING):
        assert texts(tmp_path) == ["a\x01 control characters do not make a .txt binary", "b", "c", "d", "e"]
    (record,) = caplog.records
    for part in ("1 .png binary files", "1 .tar archives", "2 hidden files or folders", "1 blank documents",
                 "1 links to folders"):
        assert part in record.getMessage()


def test_every_document_knows_where_it_is_from(tmp_path):
    write(tmp_path / "a.txt", "one\0two")
    write(tmp_path / "b.jsonl", '\n{"text": "three"}')
    names = [document.name.removeprefix(f"{tmp_path}/") for document in documents(str(tmp_path))]
    assert names == ["a.txt#0", "a.txt#1", "b.jsonl:2"]


def test_bytes_that_are_not_text_are_named_with_their_offset(tmp_path):
    inside = write(tmp_path / "latin.tex", "naïve café".encode() + b" caf\xe9 au lait")
    with pytest.raises(ValueError, match=f"{inside}: not UTF-8 at byte 16"):
        texts(tmp_path)
    cut = write(tmp_path / "cut.txt.gz", gzip.compress("ab€".encode()[:-1]))
    with pytest.raises(ValueError, match=f"{cut}: not UTF-8 at byte 2"):
        texts(cut)


def test_the_offset_holds_across_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("mfa_jax.data.sources.CHUNK_BYTES", 4)
    path = write(tmp_path / "a.txt", "abc€".encode()[:-1] + b"xyz")
    with pytest.raises(ValueError, match="not UTF-8 at byte 3"):
        texts(path)


@pytest.mark.parametrize("line, message", [
    ('{"body": "x"}', r"line 2 at byte 14: text_field='text': must name a text field of the row, which has \['body'\]"),
    ('{"text": 3}', "line 2 at byte 14: text_field='text'"),
    ("null", "which has NoneType"),
    ('{"text": ', "line 2 at byte 14: not a line of JSON"),
    (r'{"text": "\ud800"}', "character 0 is half of a surrogate pair"),
    (b'{"text": "\xff"}', "line 2 at byte 14: not a line of JSON in UTF-8"),
])
def test_a_bad_row_is_named(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", b'{"text": "a"}\n' + (line if isinstance(line, bytes) else line.encode()))
    with pytest.raises(ValueError, match=message):
        texts(path)


def test_no_source_and_no_text_are_errors(tmp_path):
    with pytest.raises(ValueError, match="source='/no/such': no such file or folder; accepted: stdlib"):
        documents("/no/such")
    with pytest.raises(ValueError, match="must hold text, and has none"):
        texts(tmp_path)
    with pytest.raises(ValueError, match="must hold text, and has none .left out: 1 blank documents"):
        texts(write(tmp_path / "empty.txt", ""))
    with pytest.raises(ValueError, match="is a tar archive; unpack it"):
        texts(write(tmp_path / "all.tar", "x"))


def test_stdlib_is_python_text_of_this_python():
    found = list(documents("stdlib"))
    names = [document.name for document in found]
    assert len(names) == len(set(names)) > 300
    assert not [name for name in names if "site-packages" in name or not name.endswith(".py")]
    by_name = {document.name: document.text for document in found}
    assert by_name["json/decoder.py"] == (Path(sysconfig.get_path("stdlib")) / "json/decoder.py").read_text("utf-8")
    for name in ("argparse.py", "json/decoder.py", "asyncio/base_events.py"):
        assert ast.parse(by_name[name]).body
    assert sum(len(document.text) for document in found) > 5_000_000
    assert names == [document.name for document in documents("stdlib")]


def test_hugging_face_rows(monkeypatch):
    asked = []

    def load_dataset(name, split, streaming):
        asked.append((name, split, streaming))
        if name == "absent":
            raise FileNotFoundError("no dataset absent")
        return iter([{"body": "one"}, {"body": "two"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert texts("hf:owner/name:test", text_field="body") == ["one", "two"]
    assert texts("hf:owner/name", text_field="body") == ["one", "two"]
    assert asked == [("owner/name", "test", True), ("owner/name", "train", True)]
    with pytest.raises(ValueError, match="row 0: text_field='text'"):
        texts("hf:owner/name")
    with pytest.raises(ValueError, match="source='hf:absent': cannot be read .no dataset absent"):
        texts("hf:absent")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r'pip install "mfa_jax\[hf\]"'):
        texts("hf:owner/name")


def test_signature_sees_a_change(tmp_path):
    path = write(tmp_path / "a.txt", "one")
    assert signature(str(path)) == "1 files, 3 bytes"
    write(tmp_path / "sub" / "b.txt", "four")
    assert signature(str(tmp_path)) == "2 files, 7 bytes"
    assert signature("hf:name") is None and signature(str(tmp_path / "gone")) is None
    assert "Python" in signature("stdlib")
