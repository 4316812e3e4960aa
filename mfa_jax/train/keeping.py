"""Which checkpoints stay in their folder, and what is moved or removed from it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from mfa_jax.train import processes

log = logging.getLogger(__name__)

_UNFINISHED = re.compile(r"(\d+)\.orbax-checkpoint-tmp")


@dataclasses.dataclass(frozen=True)
class Keep:
    """Preservation policy of orbax: the `last` newest steps and the one with the lowest metric.

    Orbax's own `BestN` keeps every checkpoint without a metric for ever, and its `best_fn` drops the newest steps in
    favour of the best.
    """

    last: int
    metrics: dict[int, float]

    def kept(self, steps: Sequence[int]) -> set[int]:
        """Of steps in ascending order."""
        scored = [(self.metrics[step], step) for step in steps if step in self.metrics]
        return {*steps[-self.last:], *(step for _, step in sorted(scored)[:1])}

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        keep = self.kept(sorted(info.step for info in checkpoints))
        return [info.step in keep for info in checkpoints]

    def remove_others(self, folder: epath.Path, steps: Sequence[int]) -> None:
        """Each alone: one that cannot be removed leaves the others to be."""
        for step in sorted({*steps} - self.kept(sorted(steps))) if jax.process_index() == 0 else []:
            with contextlib.suppress(OSError):
                (folder / str(step)).rmtree()


def unfinished(folder: epath.Path) -> dict[int, epath.Path]:
    """Folders of saves that were cut off, by step; orbax would delete one when it saves that step again."""
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    # As process 0 saw them: it may move them away before another has looked.
    names = json.loads(processes.gather(json.dumps(names))[0])
    return {int(match[1]): folder / name for name in names if (match := _UNFINISHED.fullmatch(name))}


def remove_unfinished(folder: epath.Path, step: int) -> None:
    """What is left of a save that failed takes the room of the next one."""
    with contextlib.suppress(OSError):
        if jax.process_index() == 0:
            (folder / f"{step}.orbax-checkpoint-tmp").rmtree(missing_ok=True)


def move_aside(folder: epath.Path, damaged: Mapping[int, epath.Path], cut_off: Mapping[int, epath.Path]) -> None:
    """Moves checkpoints to `<folder>-damaged`, so that their steps can be saved again.

    Of saves that were cut off only the last stays there, as `unfinished`: none was ever a checkpoint, and a machine
    that is taken away again and again would fill the disk with them.
    """
    target = folder.parent / f"{folder.name}-damaged"
    if jax.process_index() == 0:
        target.mkdir(parents=True, exist_ok=True)
        for step, path in damaged.items():
            names = itertools.chain([str(step)], (f"{step}.{n}" for n in itertools.count(1)))
            path.rename(next(place for name in names if not (place := target / name).exists()))
        for _, path in sorted(cut_off.items()):
            (target / "unfinished").rmtree(missing_ok=True)
            path.rename(target / "unfinished")
    processes.gather("moved aside")
    log.warning("%s: moved steps %s to %s", folder, sorted([*damaged, *cut_off]), target)
