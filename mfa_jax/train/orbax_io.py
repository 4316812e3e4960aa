"""What `checkpoint` asks of orbax: a manager that never waits for ever, what a save is given, trees read back."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from mfa_jax.train import integrity
from mfa_jax.train.integrity import META, DamagedCheckpointError
from mfa_jax.train.keeping import Keep

CHUNK = 64 << 20
"""Bytes of a chunk at most: on another mesh a process reads up to a chunk beside its own parts of an array."""


class Manager:
    """Orbax's manager of one folder, and whether its last save failed."""

    def __init__(self, folder: epath.Path, keep: Keep, *, read_only: bool, file_bytes: int | None) -> None:
        self._failed, self._caller, self._file_bytes = False, threading.get_ident(), file_bytes
        # Directories made asynchronously: a read-only folder would block the process for five minutes at exit.
        self.orbax = ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(
            create=not read_only, preservation_policy=keep, async_options=ocp.AsyncOptions(
                create_directories_asynchronously=False, barrier_sync_fn=self._meet)))

    def _meet(self, *, key: str, timeout_ms: int) -> None:
        """Waits for the other processes, but not where this one's save has failed: a process whose save failed tells
        them all that no save goes on, and those whose save did not are where they wait for it to be written. Both
        would stand there for 20 minutes. As it is the first ends with its error, and the others are told of that."""
        error = sys.exception()  # orbax tells them in a `finally` of a thread of its own
        if error is not None and threading.get_ident() != self._caller:  # who may handle another error by saving
            self._failed = True
            raise error
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

    def save(self, step: int, items: Mapping[str, Any], document: Mapping[str, Any]) -> None:
        """Starts to write trees of arrays and the JSON about them."""
        self._failed, self._caller = False, threading.get_ident()
        chunked = ocp.SaveArgs(chunk_byte_size=CHUNK)
        trees = {name: ocp.args.PyTreeSave(tree, jax.tree.map(lambda _: chunked, tree),
                                           ocdbt_target_data_file_size=self._file_bytes)
                 for name, tree in items.items()}
        args = ocp.args.Composite(**trees, **{META: ocp.args.JsonSave(integrity.sealed(document))})
        if not self.orbax.save(step, args=args, force=True):
            raise RuntimeError(f"orbax did not save step {step}")

    def is_over(self) -> bool:
        """Whether the last save has ended, or has failed."""
        return self._failed or not self.orbax.is_saving_in_progress()


def read(folder: epath.Path, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """The trees of one checkpoint, each process its own parts.

    Not the manager's own restore: it waits for all processes once it is done, and those that found no damage would wait
    for one that did.

    Raises:
      DamagedCheckpointError: a tree cannot be read; UnreadableCheckpointError: which says nothing about it.
    """
    handler = ocp.StandardCheckpointHandler()
    try:
        return {name: handler.restore(folder / name, args=ocp.args.StandardRestore(tree))
                for name, tree in abstract.items()}
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise  # says nothing about the checkpoint
    except Exception as error:  # orbax raises ValueError, KeyError, FileNotFoundError, bare Exception
        reason = str(error).splitlines()[0][:200] if str(error) else ""
        raise integrity.unreadable(error, str(folder)) or DamagedCheckpointError(
            f"cannot be read ({type(error).__name__}: {reason})") from error
    finally:
        handler.close()
