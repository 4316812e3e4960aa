"""A conversion layer by layer that can be interrupted and goes on: what is kept on disk between two layers."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from mfa_jax.config import load_json, require

Arrays = dict[str, np.ndarray]


class Progress:
    """A folder with a file for each layer that is done and, after the last of them, the state that follows it.

    Raises:
      ValueError: the folder holds another conversion.
    """

    def __init__(self, folder: Path, what: dict[str, Any]) -> None:
        """Args: the folder, made where it is missing, and what is converted how: JSON."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "conversion.json"
        if path.exists():
            require(load_json(dict, path) == what, "folder", str(folder),
                    "holds another conversion that was interrupted; repeat it with the same settings, or remove it")
        else:
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(what))
            partial.rename(path)
        states = (int(path.stem.removeprefix("state-")) for path in folder.glob("state-*.npz"))
        self.layers = max(states, default=-1) + 1
        """How many layers are done."""

    def layer(self, number: int) -> Arrays:
        """The arrays of a layer that is done."""
        return _read(self.folder / f"layer-{number}.npz")

    def state(self) -> Arrays:
        """What follows the last layer that is done."""
        return _read(self.folder / f"state-{self.layers - 1}.npz")

    def save(self, layer: Arrays, state: Arrays) -> None:
        """Notes the next layer as done."""
        number = self.layers
        _write(self.folder / f"layer-{number}.npz", layer)
        # Only with its state is a layer done; the one before it is of no use from here on.
        _write(self.folder / f"state-{number}.npz", state)
        (self.folder / f"state-{number - 1}.npz").unlink(missing_ok=True)
        self.layers = number + 1


def _read(path: Path) -> Arrays:
    try:
        with path.open("rb") as stored, np.load(stored) as file:
            return {name: file[name] for name in file.files}
    except (EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"folder={str(path.parent)!r}: {path.name} is damaged ({error}); remove the folder to begin "
                         f"the conversion anew") from error


def _write(path: Path, arrays: Arrays) -> None:
    partial = path.with_name(f"{path.stem}.partial")
    with partial.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())  # a rename may reach the disk before what it renames
    partial.rename(path)
