"""Folders that appear when they are complete."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from mfa_jax.config import require


def require_free(folder: Path) -> None:
    """Raises `ValueError` unless the folder does not exist yet, or is empty."""
    require(not folder.exists() or (folder.is_dir() and not any(folder.iterdir())), "folder", str(folder),
            "must not exist yet, or be empty")


@contextlib.contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write to; it becomes `folder` at the end, and is removed after an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
