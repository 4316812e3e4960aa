"""Tensors of a folder of safetensors files, read in parts: what every Hugging Face checkpoint needs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from mfa_jax.config import from_dict, load_json, require

Merged = tuple[tuple[int, ...], ...]
"""For each axis of a stored tensor, the axes of our array that it is made of, outermost first."""


def open_tensors(folder: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """A lazy view of every tensor of the folder, by name, open as long as `stack` is.

    The files are those of `model.safetensors.index.json`, else `model.safetensors`, else every `*.safetensors`.

    Raises:
      ValueError: no such file, one that cannot be read, or a name that two of them hold.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        weight_map = from_dict(dict, load_json(dict, index).get("weight_map"), f"weight_map of {index.name}")
        files = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    require(bool(files), "folder", str(folder), "must hold *.safetensors")
    tensors: dict[str, Any] = {}
    for path in files:
        try:
            file = stack.enter_context(safe_open(path, framework="numpy"))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"checkpoint={str(path)!r}: cannot be read ({error})") from error
        names = set(file.keys())
        require(not names & set(tensors), "checkpoint", str(path), f"holds {shorten(names & set(tensors))} once more")
        tensors.update((name, file.get_slice(name)) for name in names)
    return tensors


def shorten(names: set[str]) -> str:
    """Some of many names, for a message."""
    return ", ".join(sorted(names)[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def equal(left: Any, right: Any, rows: int = 4096) -> bool:
    """Whether two tensors hold the same, read a block of rows at a time."""
    if left.get_shape() != right.get_shape():
        return False
    size = left.get_shape()[0]
    blocks = (slice(start, min(start + rows, size)) for start in range(0, size, rows))
    return all(np.array_equal(left[block], right[block]) for block in blocks)


def read_part(tensor: Any, merged: Merged, shape: Sequence[int], index: Sequence[slice]) -> np.ndarray:
    """`array[index]` of an array of this shape that is stored as `merged` says, reading only that part of the file.

    A part of a merged axis is read for its outermost factor, and cut to the inner ones in memory.
    """
    taken, split, inner = [], [], []
    for first, *rest in merged:
        width = math.prod(shape[axis] for axis in rest)
        start, stop, _ = index[first].indices(shape[first])
        taken.append(slice(start * width, stop * width))
        split += [stop - start, *(shape[axis] for axis in rest)]
        inner += [slice(None), *(index[axis] for axis in rest)]
    order = [axis for group in merged for axis in group]
    return tensor[tuple(taken)].reshape(split)[tuple(inner)].transpose(np.argsort(order))
