"""Batches against a slow definition; the order, its state, and its split over processes."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from pathlib import Path

import chex
import numpy as np
import pytest

from mfa_jax.config import DataConfig
from mfa_jax.data.pipeline import eval_batches, make_loader
from mfa_jax.data.prepare import prepare
from mfa_jax.data.shards import CHUNK, DamagedShardError, Prepared
from mfa_jax.data.tokenizers import ByteTokenizer

T = 8
LENGTHS = (1, 2, 3, 6, 7, 8, 9, 15, 16, 17, 30, 64)
FIELDS = {"inputs": np.int32, "targets": np.int32, "positions": np.int32, "segments": np.int32, "mask": np.float32}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[Prepared, DataConfig]:
    """About 1900 training tokens in documents from much shorter to much longer than a row; every window differs."""
    folder = tmp_path_factory.mktemp("pipeline")
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(97, 123, length))) for length in LENGTHS * 12]
    (folder / "corpus.txt").write_text("\0".join(texts))
    config = DataConfig(source=str(folder / "corpus.txt"), sequence_length=T, batch_size=4, held_out=0.1, seed=3)
    return prepare(config, folder / "data", ByteTokenizer()), config


def slow_rows(prepared: Prepared, split: str, separate: bool, begin: int | None = None) -> list[dict[str, list[int]]]:
    """Every window of a split, token by token, the last one padded; `begin` stands before rows and documents."""
    tokens, offsets = prepared.tokens(split).tolist(), prepared.offsets(split).tolist()
    document_of = [number for number, (a, b) in enumerate(itertools.pairwise(offsets)) for _ in range(a, b)]
    rows = []
    for start in range(0, len(tokens) - 1, T):
        row: dict[str, list[int]] = {name: [] for name in FIELDS}
        position, segment = 0, 1
        for i in range(start, start + T):
            if i + 1 >= len(tokens):
                values = (0, 0, 0, 0, 0)
            else:
                last = separate and document_of[i] != document_of[i + 1]
                begins = separate and document_of[i] != document_of[i - 1] if begin is None else last
                if begins and i > start:
                    position, segment = 0, segment + 1
                if begin is None:
                    values = (tokens[i], tokens[i + 1], position, segment, int(not last))
                else:
                    values = (begin if last or i == start else tokens[i], tokens[i + 1], position, segment, 1)
                position += 1
            for name, value in zip(FIELDS, values, strict=True):
                row[name].append(value)
        rows.append(row)
    return rows


def key(batch, row: int) -> tuple[int, ...]:
    return (*batch["inputs"][row].tolist(), int(batch["targets"][row][-1]))


def take(loader, count: int) -> list[dict[str, np.ndarray]]:
    return [next(loader) for _ in range(count)]


def epoch_keys(loader, windows: int) -> list[tuple[int, ...]]:
    return [key(next(loader), 0) for _ in range(windows)]


@pytest.mark.parametrize("separate, begin", [(True, None), (False, None), (True, 257), (False, 257)])
def test_an_epoch_holds_every_window_once_as_defined(corpus, separate, begin):
    prepared, config = corpus
    config = dataclasses.replace(config, separate_documents=separate, batch_size=1, add_bos_token=begin is not None)
    expected = slow_rows(prepared, "train", separate, begin)
    if expected[-1]["segments"][-1] == 0:
        expected.pop()
    by_key = {(*row["inputs"], row["targets"][-1]): row for row in expected}
    assert len(by_key) == len(expected), "windows must differ for this test to tell them apart"
    assert separate == (max(row["segments"][-1] for row in expected) > 2)
    loader = make_loader(prepared, config)
    seen = []
    for batch in take(loader, len(expected)):
        seen.append(key(batch, 0))
        for name, dtype in FIELDS.items():
            assert batch[name].shape == (1, T) and batch[name].dtype == dtype
            np.testing.assert_array_equal(batch[name][0], by_key[seen[-1]][name], err_msg=name)
    loader.close()
    assert Counter(seen) == Counter(by_key.keys())


def test_each_epoch_is_shuffled_anew_by_the_seed(corpus):
    prepared, config = corpus
    config = dataclasses.replace(config, batch_size=1)
    windows = (prepared.size("train").tokens - 1) // T
    loader = make_loader(prepared, config)
    first, second = epoch_keys(loader, windows), epoch_keys(loader, windows)
    again = epoch_keys(make_loader(prepared, config), windows)
    other = epoch_keys(make_loader(prepared, dataclasses.replace(config, seed=4)), windows)
    assert first == again
    assert sorted(first) == sorted(second) == sorted(other)
    assert first != second and first != other
    assert sum(a == b for a, b in zip(first, second, strict=True)) < windows / 4


@pytest.mark.parametrize("done", [0, 1, 7, 150])
def test_resume_is_exact_from_any_place(corpus, done):
    prepared, config = corpus
    loader = make_loader(prepared, config)
    take(loader, done)
    state = json.loads(json.dumps(loader.get_state()))
    expected = take(loader, 5)
    assert state["next_index"] == done
    fresh = make_loader(prepared, config)
    fresh.set_state(state)
    chex.assert_trees_all_equal(take(fresh, 5), expected)
    used = make_loader(prepared, config)
    take(used, 3)
    used.set_state(state)
    assert used.get_state() == state
    chex.assert_trees_all_equal(take(used, 5), expected)


def test_reading_ahead_is_not_in_the_state(corpus):
    loader = make_loader(*corpus)
    assert [loader.get_state()["next_index"] for _ in take(loader, 1)] == [1]
    assert [(next(loader), loader.get_state()["next_index"])[1] for _ in range(4)] == [2, 3, 4, 5]


def test_processes_share_the_batch_and_the_state(corpus):
    prepared, config = corpus
    whole = make_loader(prepared, config)
    take(whole, 3)
    state = whole.get_state()
    expected = take(whole, 4)
    for count in (2, 4):
        parts = [make_loader(prepared, config, "train", index, count) for index in range(count)]
        for part in parts:
            part.set_state(state)
            assert part.get_state() == state
        for batch in expected:
            rows = [next(part) for part in parts]
            for name in FIELDS:
                joined = np.stack([row[name] for row in rows], axis=1).reshape(config.batch_size, T)
                np.testing.assert_array_equal(joined, batch[name], err_msg=name)


@pytest.mark.parametrize("change", [{"batch_size": 2}, {"sequence_length": 4}, {"seed": 9}])
def test_a_state_of_another_order_is_refused(corpus, change):
    prepared, config = corpus
    ((name, value),) = change.items()
    state = make_loader(prepared, config).get_state()
    with pytest.raises(ValueError, match=f"{name}={value}: must be {getattr(config, name)} as in the saved state"):
        make_loader(prepared, dataclasses.replace(config, **change)).set_state(state)


@pytest.mark.parametrize("state", [{}, {"next_index": -1}, {"next_index": "3"}])
def test_a_state_that_is_none_is_refused(corpus, state):
    loader = make_loader(*corpus)
    with pytest.raises(ValueError, match="next_index=.*must be the number of the next batch"):
        loader.set_state(state)


def test_training_never_meets_a_held_out_document(corpus):
    prepared, config = corpus
    windows = (prepared.size("train").tokens - 1) // T
    trained = set(epoch_keys(make_loader(prepared, dataclasses.replace(config, batch_size=1)), windows))
    held_out = {key(batch, row) for batch in eval_batches(prepared, config, 10**6) for row in range(config.batch_size)}
    assert held_out and not trained & held_out


# ---- evaluation ------------------------------------------------------------------------------------------------


def test_evaluation_of_everything_pads_the_end(corpus):
    prepared, config = corpus
    config = dataclasses.replace(config, batch_size=7)
    expected = slow_rows(prepared, "held_out", True)
    assert expected[-1]["segments"][-1] == 0 and len(expected) % 7, "the last window and the last batch are not full"
    batches = list(eval_batches(prepared, config, 10**6))
    assert len(batches) == -(-len(expected) // 7)
    for name, dtype in FIELDS.items():
        found = np.concatenate([batch[name] for batch in batches])
        assert found.dtype == dtype
        np.testing.assert_array_equal(found[:len(expected)], [row[name] for row in expected], err_msg=name)
        assert not found[len(expected):].any(), "padding rows are zero, and so is their mask"


def test_some_batches_are_spread_evenly_and_the_same_each_time(corpus):
    prepared, config = corpus
    expected = slow_rows(prepared, "held_out", True)
    batches = list(eval_batches(prepared, config, 2))
    chex.assert_trees_all_equal(batches, list(eval_batches(prepared, config, 2)))
    assert len(batches) == 2
    numbers = [i * len(expected) // 8 for i in range(8)]
    assert len(set(numbers)) == 8 and numbers[-1] > len(expected) // 2
    for name in FIELDS:
        np.testing.assert_array_equal(np.concatenate([batch[name] for batch in batches]),
                                      [expected[number][name] for number in numbers], err_msg=name)


def test_processes_share_the_evaluation(corpus):
    prepared, config = corpus
    whole = list(eval_batches(prepared, config, 10**6))
    parts = [list(eval_batches(prepared, config, 10**6, index, 2)) for index in range(2)]
    assert len(parts[0]) == len(parts[1]) == len(whole)
    for batch, *rows in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(np.stack([row["inputs"] for row in rows], 1).reshape(4, T), batch["inputs"])


# ---- bad input -------------------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_refused(corpus, tmp_path):
    prepared, config = corpus
    tokens = prepared.size("train").tokens
    longest = dataclasses.replace(config, sequence_length=tokens - 1, batch_size=1)
    assert next(make_loader(prepared, longest))["inputs"].shape == (1, tokens - 1)
    with pytest.raises(ValueError, match=f"sequence_length={tokens}: must be below the {tokens} tokens of the train"):
        make_loader(prepared, dataclasses.replace(longest, sequence_length=tokens))
    with pytest.raises(ValueError, match="batch_size=4: must be a multiple of process_count=3"):
        make_loader(prepared, config, "train", 0, 3)
    with pytest.raises(ValueError, match="process_index=2: must be in 0 .. process_count - 1, with process_count=2"):
        eval_batches(prepared, config, 1, 2, 2)
    with pytest.raises(ValueError, match="eval_batches=0: must be at least 1"):
        eval_batches(prepared, config, 0)
    with pytest.raises(ValueError, match="add_bos_token=True: needs a tokenizer with a begin token"):
        make_loader(dataclasses.replace(prepared, bos_id=None), dataclasses.replace(config, add_bos_token=True))
    all_train = dataclasses.replace(config, held_out=0.0)
    nothing = prepare(all_train, Path(tmp_path) / "data", ByteTokenizer())
    with pytest.raises(ValueError, match="held_out=0.0: the held-out split has 0 tokens; nothing to evaluate on"):
        eval_batches(nothing, all_train, 1)


@pytest.mark.parametrize("byte", [0, 70_000, -1])
def test_a_flipped_bit_of_a_shard_is_named_where_it_is_read(tmp_path, byte):
    """Three chunks of tokens: batches of the two that are whole are served, the damaged one is not."""
    (tmp_path / "corpus.txt").write_text("abcdefgh" * 8192 + "\0tail")
    config = DataConfig(source=str(tmp_path / "corpus.txt"), sequence_length=2048, batch_size=1, held_out=0.0)
    prepared = prepare(config, tmp_path / "data", ByteTokenizer())
    path = prepared.folder / "train.bin"
    content = bytearray(path.read_bytes())
    assert len(content) > 2 * CHUNK
    content[byte] ^= 4
    path.write_bytes(content)
    place = range(len(content))[byte] // CHUNK * CHUNK
    loader = make_loader(prepared, config)
    served = 0
    with pytest.raises(DamagedShardError, match=rf"train.bin': bytes {place} to \d+ are not what was written"):
        while True:
            batch = next(loader)
            assert batch["inputs"].max() <= ord("t")
            served += 1
            assert served < 32, "an epoch without the damaged rows"
    loader.close()
    prepared_again = dataclasses.replace(prepared, folder=tmp_path / "again")
    with pytest.raises(DamagedShardError, match="again/train.bin': it or its checksums cannot be read"):
        next(make_loader(prepared_again, config))
