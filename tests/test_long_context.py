"""Long context on any model: tasks with a tokenizer that merges bytes, figures by their definition, refusals."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from experiments.long_context import LongContextConfig, main, measure
from experiments.studies.long_context import measurements, tasks
from experiments.studies.long_context.measurements import Judge
from mfa_jax.convert import save_run
from mfa_jax.data import ByteTokenizer, HuggingFaceTokenizer
from tests.contract import compiled, model_config

C = compiled(model_config("mfa_kr", vocab_size=264))
TEXT = "The secret number of the old man was 12 and 345 and 678; he told nobody of ab=cd or ef=gh. " * 20


@pytest.fixture(scope="module")
def merging() -> HuggingFaceTokenizer:
    """A byte-level BPE whose tokens have several letters or digits."""
    found = tokenizers.Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    r = np.random.default_rng(0)
    words = [f"{''.join(r.choice(list('abcdefghijklm'), 2))} {r.integers(1000)}" for _ in range(1000)]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["</s>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    found.train_from_iterator([TEXT, *words], trainer)
    return HuggingFaceTokenizer(found.to_str().encode(), "test")


def test_the_needle_counts_its_digits_in_any_tokens(merging: HuggingFaceTokenizer) -> None:
    books = [merging.encode(TEXT * 5)]
    task = tasks.needle(books, 8, 120, 0.5, 1, merging)
    assert task.tokens.shape == (8, 121) and task.asked_bytes == 40
    for tokens, asked in zip(task.tokens, task.asked, strict=True):
        text = merging.decode(tokens.tolist())
        (name, number), (again, answer) = re.findall(r"The secret number of ([A-Z]\w+) is (\d{5})", text)
        assert (name, number) == (again, answer) and text.endswith(answer)
        asked_text = merging.decode(tokens[1:][asked].tolist())
        assert answer in asked_text and answer not in merging.decode(tokens[1:][asked][1:].tolist())
    assert len({int(asked.sum()) for asked in task.asked}) > 1  # some numbers take fewer tokens than digits


def test_pairs_are_asked_in_any_tokens(merging: HuggingFaceTokenizer) -> None:
    told, fresh, again = tasks.pairs(6, 5, 1, merging)
    assert told.asked_bytes == fresh.asked_bytes == again.asked_bytes == 60
    assert len(set(again.lengths.tolist())) > 1  # rows differ in tokens
    for row in range(6):
        pairs, others = (re.findall(r"(\w\w)=(\w\w);", merging.decode(task.tokens[row, :task.lengths[row]].tolist()))
                         for task in (again, fresh))
        assert sorted(pairs[:5]) == sorted(pairs[5:]) and others[:5] == pairs[:5]
        for task, part in ((told, pairs[:5]), (fresh, others[5:]), (again, pairs[5:])):
            asked = task.tokens[row, 1:][task.asked[row]].tolist()
            assert merging.decode(asked) == "".join(value for _, value in part)
        assert not again.asked[row, again.lengths[row] - 1:].any()


def test_windows_count_the_bytes_of_their_tokens(merging: HuggingFaceTokenizer) -> None:
    task = tasks.windows([merging.encode(TEXT)], 3, 50, merging)
    assert task.asked_bytes == sum(len(merging.decode(row[1:].tolist())) for row in task.tokens) > 150
    with pytest.raises(ValueError, match="length=9000: a document has"):
        tasks.windows([merging.encode(TEXT)], 3, 9000, merging)


def test_windows_lie_in_the_middle_of_the_parts_of_a_document() -> None:
    task = tasks.windows([np.arange(101), np.arange(1000, 1201)], 4, 20)
    assert task.tokens[:, 0].tolist() == [20, 1045, 60, 1135]


def test_a_model_of_no_numbers_is_not_a_perfect_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurements, "_losses", lambda _, __, tokens: np.full(tokens[:, 1:].shape, np.nan))
    assert math.isnan(Judge(C.model, C.params, ByteTokenizer(), rows=2).bits_per_byte(tasks.pairs(2, 2, 1)[0]))


def test_bits_are_those_of_the_definition() -> None:
    judge = Judge(C.model, C.params, ByteTokenizer(), rows=2)
    book = [np.frombuffer(TEXT.encode(), np.uint8).astype(np.int32)]
    task = tasks.needle(book, 3, 160, 0.5, 1)
    logits = np.asarray(C.full(C.params, task.tokens[:, :-1]), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    bits = -np.take_along_axis(log_p, task.tokens[:, 1:, None], -1)[..., 0] / math.log(2)
    np.testing.assert_allclose(judge.bits(task), np.where(task.asked, bits, np.nan), atol=1e-4)
    assert judge.bits_per_byte(task) == pytest.approx(bits[task.asked].mean(), abs=1e-4)
    found = measurements.by_position(judge, book, 3, 40)
    assert found["position_edges"] == [0, 16, 32, 40] and len(found["position_bits"]) == 3
    everything = judge.bits(tasks.windows(book, 3, 40))
    assert found["position_bits"][2] == pytest.approx(everything[:, 32:].mean(), abs=1e-4)


def test_a_begin_token_comes_before_every_row_and_is_not_asked_for() -> None:
    task, begin = tasks.pairs(3, 2, 1)[2], ByteTokenizer.bos_id
    logits = C.full(C.params, np.insert(task.tokens, 0, begin, axis=1)[:, :-1])[:, 1:]
    log_p = np.asarray(jax.nn.log_softmax(logits))
    bits = -np.take_along_axis(log_p, task.tokens[:, 1:, None], -1)[..., 0] / math.log(2)
    found = Judge(C.model, C.params, ByteTokenizer(), rows=2, begin=begin).bits(task)
    np.testing.assert_allclose(found, np.where(task.asked, bits, np.nan), atol=1e-4)


def test_pairs_that_do_not_fit_are_left_out() -> None:
    found = measurements.recall(Judge(C.model, C.params, ByteTokenizer(), rows=4), 4, (2, 4), 24, 7)
    assert {len(found[name]) for name in measurements.RECALL} == {1}
    held = measurements.held_bits(2, found["fresh_bits"][0], found["again_bits"][0])
    assert found["held_bits"] == [held]


@pytest.mark.slow
def test_a_run_is_measured_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_run(tmp_path / "run", C.config, C.params, ByteTokenizer())
    (tmp_path / "books.txt").write_text("short\0" + TEXT * 200)
    main(LongContextConfig(workdir=str(tmp_path / "run"), text=str(tmp_path / "books.txt"), length=160, rows=4,
                           output=str(tmp_path / "found.json")))
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == json.loads(capsys.readouterr().out)
    assert found["attention"] == "mfa_kr" and found["position_edges"][-1] == 160
    assert np.shape(found["needle_bits"]) == (3, 5) and found["needle_lengths"] == [80, 120, 160]
    assert len(found["again_bits"]) == 3 and all(np.isfinite(found["held_bits"]))


@pytest.mark.parametrize(("changes", "message"), [
    ({"tasks": "loss,ruler"}, "tasks='loss,ruler': must name some of loss, needle, recall"),
    ({"tasks": ""}, "tasks='': must name some of"),
    ({"text": None}, "text=None: must name long documents"),
    ({"length": 10}, "length=10: must be at least 64"),
    ({"rows": 0}, "rows=0: must be at least 1"),
])
def test_bad_flags_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LongContextConfig(**{"hf": "x", "text": "books.txt", **changes})
    LongContextConfig(hf="x", tasks="recall")


@pytest.mark.slow
def test_a_length_without_room_is_told_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_run(tmp_path / "run", C.config, C.params, ByteTokenizer())
    (tmp_path / "books.txt").write_text(TEXT * 200)
    monkeypatch.setattr(Judge, "bits", lambda *_: pytest.fail("measured"))
    with pytest.raises(ValueError, match="length=32: the needle and its question take"):
        measure(LongContextConfig(workdir=str(tmp_path / "run"), text=str(tmp_path / "books.txt"), length=64, rows=2))


def test_short_documents_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(ValueError, match="text=.*no document has 256000 bytes"):
        tasks.read_long_documents(str(tmp_path / "text.txt"), ByteTokenizer(), 2)
