"""Token shards become batches, with grain: windows of the flat stream, shuffled, repeated, split over processes.

Window i is tokens `i*T .. i*T+T` of the split (T inputs and, one to the right, T targets), so consecutive windows share
one token and each token but the first is a target once an epoch. Training never reads what lies behind the last whole
window, fewer than T tokens. Every epoch is shuffled anew, by `config.seed` plus its number.
The global batch of a step is the same for any number of processes, each of which reads its own rows of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from jaxtyping import Integer, Shaped

from mfa_jax.config import DataConfig, require
from mfa_jax.data.shards import Prepared, Split, Verified

Batch = dict[str, Shaped[np.ndarray, "B T"]]
"""`inputs`, `targets`, `positions`, `segments` (int32) and `mask` (float32), each `[B, T]`.

* `positions` count from 0 in each document of the row, `segments` number its documents from 1; 0 is padding.
* `mask` is 1 where the target counts: not where it begins another document than its input is of, not in padding.
* Without `separate_documents` a row is one segment, and every target but padding counts.
* With `add_bos_token` the first input of a row is the begin token; with `separate_documents` so is the input before
  each document, whose first token is then a target that counts, too.
"""

READ = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)


class Windows:
    """The windows of a split by number, as grain reads them; the files are mapped when the first is read."""

    def __init__(self, prepared: Prepared, split: Split, config: DataConfig,
                 rows: Integer[np.ndarray, " rows"] | None = None) -> None:
        """Args: `rows`: the windows to take, -1 for a row of padding; None takes each whole window once."""
        self._prepared, self._split = prepared, split
        self._length, self._separate = config.sequence_length, config.separate_documents
        require(not config.add_bos_token or prepared.bos_id is not None, "add_bos_token", True,
                "needs a tokenizer with a begin token (`Prepared.bos_id` is None)")
        self._begin = prepared.bos_id if config.add_bos_token else None
        whole = max(prepared.size(split).tokens - 1, 0) // self._length
        self._rows = range(whole) if rows is None else rows
        self._maps: tuple[Verified, np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"Windows({self._prepared.folder}, {self._split}, {self._length})"

    def __getitem__(self, index: Any) -> dict[str, Shaped[np.ndarray, " T"]]:
        row = {name: np.zeros(self._length, np.int32) for name in ("inputs", "targets", "positions", "segments")}
        row["mask"] = np.zeros(self._length, np.float32)
        number = int(self._rows[index])
        if number >= 0:
            self._fill(row, number * self._length)
        return row

    def _fill(self, row: dict[str, Shaped[np.ndarray, " T"]], start: int) -> None:
        if self._maps is None:
            verified = Verified(self._prepared.folder / f"{self._split}.bin")
            self._maps = verified, self._prepared.tokens(self._split), self._prepared.offsets(self._split)
        verified, tokens, offsets = self._maps
        window = tokens[start:start + self._length + 1]
        verified.check(start * tokens.itemsize, (start + len(window)) * tokens.itemsize)
        count = len(window) - 1
        row["inputs"][:count], row["targets"][:count] = window[:-1], window[1:]
        row["positions"][:count] = np.arange(count)
        row["segments"][:count] = 1
        row["mask"][:count] = 1
        if self._separate:
            # Documents that begin at tokens 1 .. count of the window; the last of these is a target only.
            low, high = np.searchsorted(offsets, [start, start + count], side="right")
            begins = offsets[low:high] - start
            if self._begin is None:
                row["mask"][begins - 1] = 0
            else:
                begins -= 1
                row["inputs"][begins] = self._begin
            begins = begins[(begins > 0) & (begins < count)]
            row["segments"][begins] += 1
            row["segments"][:count] = 1 + np.cumsum(row["segments"][:count] - 1)
            row["positions"][:count] -= np.append(0, begins)[row["segments"][:count] - 1].astype(np.int32)
        if self._begin is not None:
            row["inputs"][0] = self._begin


class Batches(Iterator[Batch]):
    """Endless batches of one process, whose place can be saved and set.

    The state is a dict for JSON, the same on every process and for any number of them.
    """

    def __init__(self, iterator: Any, identity: dict[str, int | str]) -> None:
        self._iterator = iterator
        self._identity = identity

    def __next__(self) -> Batch:
        batch: Batch = next(self._iterator)
        return batch

    def get_state(self) -> dict[str, int | str]:
        """Where the next batch is, and what the order of batches depends on."""
        return {"next_index": int(self._iterator.get_state()["next_index"]), **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where the state was taken.

        Raises:
          ValueError: the state is of other data, or of another order of them.
        """
        place = state.get("next_index")
        require(isinstance(place, int) and place >= 0, "next_index", place, "must be the number of the next batch")
        require_same_order(state, self._identity)
        self._iterator.set_state({"next_index": place})

    def close(self) -> None:
        """Stops the reading ahead."""
        self._iterator.close()


def identity(prepared: Prepared, config: DataConfig, split: Split = "train") -> dict[str, int | str]:
    """What the order of batches depends on.

    Raises:
      DamagedShardError: the checksums of the split cannot be read.
    """
    return {"split": split, "tokens": prepared.size(split).tokens, "fingerprint": prepared.meta.settings.fingerprint,
            "sequence_length": config.sequence_length, "batch_size": config.batch_size, "seed": config.seed,
            "digest": Verified(prepared.folder / f"{split}.bin").digest}


def require_same_order(saved: dict[str, Any], found: dict[str, int | str]) -> None:
    """Raises `ValueError` where batches would come in another order, or be others, than those of a saved state."""
    for name, value in found.items():
        before = saved.get(name, value if name == "digest" else None)  # states of the first version have none
        require(before == value, name, value,
                f"must be {before!r} as in the saved state, so that the data go on where they were")


def require_windows(prepared: Prepared, config: DataConfig, split: Split) -> None:
    """Raises `ValueError` for windows longer than the split."""
    tokens = prepared.size(split).tokens
    require(tokens > config.sequence_length, "sequence_length", config.sequence_length,
            f"must be below the {tokens} tokens of the {split} split")


def make_loader(prepared: Prepared, config: DataConfig, split: Split = "train", process_index: int = 0,
                process_count: int = 1) -> Batches:
    """Shuffled batches without end: rows `process_index::process_count` of each global batch of `config.batch_size`.

    Raises:
      ValueError: the split has less than one window, or the batch does not divide over the processes.
    """
    rows = _rows_per_process(config, process_index, process_count)
    require_windows(prepared, config, split)
    dataset = grain.MapDataset.source(Windows(prepared, split, config))
    dataset = dataset.shuffle(seed=config.seed).repeat(reseed_each_epoch=True)
    # Nothing is dropped of an endless dataset; without drop_remainder its length overflows where rows is 1.
    dataset = dataset[process_index::process_count].batch(rows, drop_remainder=True)
    return Batches(iter(dataset.to_iter_dataset(READ)), identity(prepared, config, split))


def eval_batches(prepared: Prepared, config: DataConfig, count: int, process_index: int = 0,
                 process_count: int = 1) -> Iterator[Batch]:
    """The same `count` batches of the held-out split each time: its windows in order, evenly spread over it.

    Where the split has no more than `count` batches, all of it is taken, the last window and the last batch padded.

    Raises:
      ValueError: nothing was held out, or the batch does not divide over the processes.
    """
    rows = _rows_per_process(config, process_index, process_count)
    require(count >= 1, "eval_batches", count, "must be at least 1")
    tokens = prepared.size("held_out").tokens
    require(tokens > 1, "held_out", config.held_out, f"the held-out split has {tokens} tokens; nothing to evaluate on")
    windows = math.ceil((tokens - 1) / config.sequence_length)
    batches = min(count, math.ceil(windows / config.batch_size))
    taken = min(windows, batches * config.batch_size)
    numbers = np.full(batches * config.batch_size, -1)
    numbers[:taken] = np.arange(taken) * windows // taken
    dataset = grain.MapDataset.source(Windows(prepared, "held_out", config, numbers))
    dataset = dataset[process_index::process_count].batch(rows)
    return (dataset[i] for i in range(batches))


def _rows_per_process(config: DataConfig, process_index: int, process_count: int) -> int:
    require(process_count >= 1 and 0 <= process_index < process_count, "process_index", process_index,
            f"must be in 0 .. process_count - 1, with process_count={process_count} at least 1")
    require(config.batch_size % process_count == 0, "batch_size", config.batch_size,
            f"must be a multiple of process_count={process_count}")
    return config.batch_size // process_count
