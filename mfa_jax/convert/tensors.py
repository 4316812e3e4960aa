"""Tensors of other people's checkpoints: where ours lie in them, read in parts, written in shards."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mfa_jax.config import from_dict, load_json, require

Merged = tuple[tuple[int, ...], ...]
"""For each axis of a stored tensor, the axes of our array that it is made of, outermost first."""
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_MOST = 20


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a leaf of ours lies in a checkpoint."""

    name: str
    """The tensor's name; `{}` stands for the number of the layer."""
    merged: Merged
    """How the axes of one layer are merged in it."""
    layers: tuple[int, ...] | None = None
    """The layers that our leaf stacks on its first axis; None for a leaf that belongs to no layer."""

    @property
    def names(self) -> list[str]:
        """The tensors, one a layer."""
        return [self.name] if self.layers is None else [self.name.format(layer) for layer in self.layers]

    def own_shape(self, leaf: Sequence[int]) -> tuple[int, ...]:
        """The shape of one layer of a leaf."""
        return tuple(leaf if self.layers is None else leaf[1:])

    def stored_shape(self, leaf: Sequence[int]) -> tuple[int, ...]:
        """The shape that a leaf's tensors have in the checkpoint."""
        return tuple(math.prod(self.own_shape(leaf)[axis] for axis in group) for group in self.merged)

    def merge(self, array: np.ndarray) -> np.ndarray:
        """One layer of a leaf as it is stored."""
        order = [axis for group in self.merged for axis in group]
        shape = [math.prod(array.shape[axis] for axis in group) for group in self.merged]
        return np.ascontiguousarray(array.transpose(order).reshape(shape))


def open_tensors(folder: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """A lazy view of every tensor of the folder, by name, open as long as `stack` is.

    The files are those of `model.safetensors.index.json`, else `model.safetensors`, else every `*.safetensors`.

    Raises:
      ValueError: no such file, one that cannot be read, a name that two of them hold, an index that is broken or
        puts a tensor in another file than it lies in, or one beside a `model.safetensors` that it does not name.
    """
    weight_map = _weight_map(folder / INDEX) if (folder / INDEX).exists() else {}
    if weight_map:
        files = sorted(set(weight_map.values()))
        # Engines differ in which they take.
        require(SINGLE in files or not (folder / SINGLE).exists(), "checkpoint", str(folder),
                f"must hold {SINGLE} or {INDEX} and its shards, not both: remove those that are not the model")
    elif (folder / SINGLE).exists():
        files = [SINGLE]
    else:
        files = sorted(path.name for path in folder.glob("*.safetensors"))
    require(bool(files), "folder", str(folder), "must hold *.safetensors")
    tensors: dict[str, Any] = {}
    misplaced: list[str] = []
    for name_of_file in files:
        path = folder / name_of_file
        try:
            file = stack.enter_context(safe_open(path, framework="numpy"))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"checkpoint={str(path)!r}: cannot be read ({error})") from error
        names = set(file.keys())
        require(not names & set(tensors), "checkpoint", str(path), f"holds {shorten(names & set(tensors))} once more")
        tensors.update((name, file.get_slice(name)) for name in names)
        misplaced += [f"{name} in {weight_map[name]} (it lies in {name_of_file})" for name in names
                      if weight_map.get(name, name_of_file) != name_of_file]
    require(not misplaced, f"weight_map of {INDEX}", shorten(misplaced), "must name the file that a tensor lies in")
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor."""
    where = f"weight_map of {index.name}"
    found = from_dict(dict, load_json(dict, index).get("weight_map"), where)
    require(bool(found), where, found, "must name the file of each tensor")
    return {name: from_dict(str, file, f"{where}: {name}") for name, file in found.items()}


def write_tensors(
    folder: Path, tensors: Mapping[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]], dtype: np.dtype,
    shard_bytes: int,
) -> None:
    """Writes `model.safetensors`, or shards of at most about `shard_bytes` and their index; a shard is in memory at
    a time.

    Args:
      tensors: shape, and what makes the array, by name.
      dtype: what every tensor is stored as.

    Raises:
      ValueError: a number that is finite and would not be as `dtype`.
      OSError: a file could not be written.
    """
    shards: list[list[str]] = [[]]
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, _) in tensors.items()}
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    files = [SINGLE] if len(shards) == 1 else [
        f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for file, names in zip(files, shards, strict=True):
        arrays = {name: _cast(name, tensors[name][1](), dtype) for name in names}
        try:
            save_file(arrays, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))  # of a full disk, say
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder / file)) from error
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2))


def _cast(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):  # told below, with the name
        cast = array.astype(dtype)
    lost = np.isfinite(array) & ~np.isfinite(cast)
    require(not lost.any(), "dtype", str(dtype), f"{name} has {lost.sum()} numbers too large for it, up to "
                                                 f"{np.abs(array[lost]).max(initial=0):g}; bfloat16 holds them")
    return cast


def shorten(names: Iterable[str]) -> str:
    """Names, for a message: all of them, unless they are very many."""
    ordered = sorted(names)
    return ", ".join(ordered[:_MOST]) + (f" and {len(ordered) - _MOST} more" if len(ordered) > _MOST else "")


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
