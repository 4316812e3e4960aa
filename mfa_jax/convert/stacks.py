"""Leaves that are stacked layer by layer, in memory or on disk: a model larger than the memory passes through here."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np


class Stacks:
    """Layers as they come, and in the end, of each name, one array `[L, ...]` of them."""

    def __init__(self, folder: Path | None) -> None:
        """Args: where files without a name hold the arrays, which are mapped from there; None for memory.

        Such a file goes with its array, or with the process, however that ends.
        """
        self._folder = folder
        self._kept: dict[str, list[np.ndarray]] = {}
        self._files: dict[str, IO[bytes]] = {}
        self._of_one: dict[str, tuple[Any, tuple[int, ...]]] = {}
        self._count = 0

    def append(self, layer: Mapping[str, np.ndarray]) -> None:
        """The next layer. Raises: OSError: the disk is full."""
        self._count += 1
        for name, array in layer.items():
            if self._folder is None:
                self._kept.setdefault(name, []).append(array)
                continue
            if name not in self._files:
                # Written and not mapped as yet: a full disk is an error here, where a write to a mapping is a crash.
                self._files[name] = tempfile.TemporaryFile(dir=self._folder, buffering=0)
                self._of_one[name] = array.dtype, array.shape
            left = memoryview(np.ascontiguousarray(array).tobytes())
            while left:
                left = left[self._files[name].write(left):]

    def arrays(self) -> dict[str, np.ndarray]:
        """What was appended; those on disk can be read only, and nothing can be appended any more."""
        found = {name: np.stack(layers) for name, layers in self._kept.items()}
        for name, file in self._files.items():
            dtype, shape = self._of_one[name]
            with file:  # what is mapped stays
                found[name] = np.asarray(np.memmap(file, dtype, "r", shape=(self._count, *shape)))
        return found
