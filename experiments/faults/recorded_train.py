"""`experiments.train` that also writes down which rows each process draws, to `<workdir>/rows-<process>.jsonl`.

    python -m experiments.launch --processes 4 -- -m experiments.faults.recorded_train --workdir runs/a ...

A line a batch: the start it belongs to, its number, which part of it, and a digest of each row. With
`MFA_JAX_NO_ROOM=PROCESS:STEP` that process can write no file of more than 60 kB from that step's save on.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments import train
from experiments.cli import run
from mfa_jax.config import DataConfig, TrainConfig, load_json
from mfa_jax.data import Batches, Prepared, make_loader
from mfa_jax.data.shards import open_prepared
from mfa_jax.train import cluster, loop
from mfa_jax.train.checkpoint import Checkpoints
from mfa_jax.train.run import CONFIG, DATA


class RecordedBatches(Iterator[Any]):
    """Batches that are written down as they are drawn."""

    def __init__(self, batches: Batches, file: Path, labels: dict[str, Any]) -> None:
        self._batches, self._file, self._labels = batches, file, labels
        self.get_state, self.set_state, self.close = batches.get_state, batches.set_state, batches.close

    def __next__(self) -> Any:
        number = self.get_state()["next_index"]
        batch = next(self._batches)
        with self._file.open("a") as file:
            file.write(json.dumps({**self._labels, "batch": number, "rows": digests(batch)}) + "\n")
        return batch


def digests(batch: Any) -> list[str]:
    """One for each row: of its tokens, and of where its documents begin."""
    return [hashlib.blake2b(row.tobytes() + at.tobytes(), digest_size=8).hexdigest()
            for row, at in zip(batch["inputs"], batch["positions"], strict=True)]


def recording(prepared: Prepared, config: DataConfig, split: Any, index: int, count: int) -> RecordedBatches:
    """What `make_loader` makes, recorded."""
    labels = {"start": os.environ.get(cluster.ADDRESS, "alone"), "process": jax.process_index(), "part": index,
              "parts": count}
    file = prepared.folder.parent / f"rows-{jax.process_index()}.jsonl"
    return RecordedBatches(make_loader(prepared, config, split, index, count), file, labels)


def wrong_batches(workdir: Path, resumed_at: Sequence[int]) -> list[str]:
    """What the records have against one process that draws the same batches without a stop; empty if all is well.

    Args:
      resumed_at: the step that each start went on from, in the order of the starts.
    """
    config = load_json(TrainConfig, workdir / CONFIG)
    files = sorted(workdir.glob("rows-*.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    last = max(line["batch"] for line in lines)
    loader = make_loader(open_prepared(workdir / DATA), config.data)
    expected = [sorted(digests(next(loader))) for _ in range(last + 1)]
    loader.close()
    starts = list(dict.fromkeys(line["start"] for line in lines if line["process"] == 0))
    wrong = [] if len(starts) == len(resumed_at) else [f"{len(starts)} starts drew batches, not {len(resumed_at)}"]
    for start, first in zip(starts, resumed_at, strict=False):
        mine = [line for line in lines if line["start"] == start]
        for process in {line["process"] for line in mine}:
            drawn = [line["batch"] for line in mine if line["process"] == process]
            if drawn != list(range(first, first + len(drawn))):
                wrong.append(f"process {process} of {start} drew {drawn}, and resumed at step {first}")
        # Of batches beyond the last one of the process that came least far, which may have been killed, parts may lack.
        everyone = min(max(line["batch"] for line in mine if line["process"] == process)
                       for process in {line["process"] for line in mine})
        for number in sorted({*range(first, everyone + 1), *(line["batch"] for line in mine)}):
            parts = {line["part"]: line["rows"] for line in mine if line["batch"] == number}
            if len(parts) < mine[0]["parts"]:
                if number <= everyone:
                    wrong.append(f"batch {number} of {start}: only parts {sorted(parts)} of {mine[0]['parts']} are "
                                 f"recorded")
            elif sorted(sum(parts.values(), [])) != expected[number]:
                wrong.append(f"batch {number} of {start} has other rows")
            if any(line["rows"] != parts[line["part"]] for line in mine if line["batch"] == number):
                wrong.append(f"batch {number} of {start}: processes that share a part differ")
    return wrong


def running_out(process: int, step: int) -> Callable[..., None]:
    """`Checkpoints.save`, of which one process finds no room from a step on: files end at 60 kB."""
    save = Checkpoints.save

    def saving(self: Checkpoints, at: int, *args: Any, **more: Any) -> None:
        if at >= step and jax.process_index() == process:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        save(self, at, *args, **more)

    return saving


if __name__ == "__main__":
    if no_room := os.environ.get("MFA_JAX_NO_ROOM"):
        Checkpoints.save = running_out(*map(int, no_room.split(":")))  # type: ignore[method-assign]
    loop.make_loader = recording  # type: ignore[assignment]
    with cluster.leaving_at_once():
        run(train.main, label=cluster.label)
