"""Which devices take part in a collective, read from its attributes."""

from __future__ import annotations

import re

import numpy as np


def first_group(attributes: str) -> tuple[int, ...]:
    """Partitions of the first group of a collective that has more than one; empty where the text is not understood.

    XLA writes groups as lists (`{{0,1},{2,3}}`), as an iota that is reshaped and transposed (`[2,2]<=[2,2]T(1,0)`), or
    as axes of a mesh (`mesh['a'=2,'b'=2] {'b'}`, parts of an axis as `'b':(1)2`, another order of devices as
    `mesh[...], device_ids=([2,2]T(1,0)) {'b'}`), and those of a permutation as pairs of source and target, of which
    the first that moves is taken.
    """
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)
    if pairs:
        moved = [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)", pairs[0]) if a != b]
        return moved[0] if moved else ()
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if listed:
        return tuple(int(i) for i in listed[1].split(","))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        return tuple(_iota(iota[2], iota[3]).reshape(_numbers(iota[1]))[0].tolist())
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? ?\{([^}]*)\}", attributes)
    return _of_mesh(mesh[1], mesh[2], mesh[3]) if mesh else ()


def _numbers(text: str) -> list[int]:
    return [int(i) for i in text.split(",")]


def _iota(dims: str, order: str | None) -> np.ndarray:
    ids = np.arange(np.prod(_numbers(dims))).reshape(_numbers(dims))
    return ids.transpose(_numbers(order)) if order else ids


def _of_mesh(mesh: str, order: str | None, axes: str) -> tuple[int, ...]:
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    ids = np.arange(np.prod(list(sizes.values())))
    if order is not None:
        iota = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order)
        ids = _iota(iota[1], iota[2]) if iota else np.array(_numbers(order))
    ids = ids.reshape(list(sizes.values()))
    taken: list[int] = []
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
        axis = list(sizes).index(name)
        if axis in taken:  # two parts of one axis: no program was seen to have that
            return ()
        members = np.arange(sizes[name])
        if size:
            after = sizes[name] // (int(before) * int(size))
            members = np.arange(int(size)) * after
        ids = np.moveaxis(np.moveaxis(ids, axis, 0)[members], 0, axis)
        taken.append(axis)
    rest = tuple(0 if axis not in taken else slice(None) for axis in range(ids.ndim))
    return tuple(ids[rest].ravel().tolist())
