"""What several processes that train together agree on: texts, failures, the step to stop at.

With one process each of these is what it is without others. None of it uses a device.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import itertools
import logging
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

import jax
from etils import epath
from jax._src import distributed  # the coordinator's key-value store has no public name
from jax.experimental import multihost_utils

from mfa_jax.config import require

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 30
"""A process that was not heard of for so long is lost. JAX's coordinator then ends the others, and names it to them."""
_PATIENCE_MS = 7 * 24 * 3600 * 1000  # preparing a corpus takes what it takes; a process that is lost ends the waiting
# What the devices or the coordinator of a job say. JAX makes it a JaxRuntimeError here, and a ValueError there.
_STATUS = re.compile("(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): ")
_T = TypeVar("_T")
_turn = itertools.count()

LOCK = "lock"
"""Name of the file that says who writes to a folder."""


@contextlib.contextmanager
def naming_the_lost() -> Iterator[None]:
    """Waits, where devices fail because another process is gone, for the coordinator to say which.

    It ends this process with that line, so the wait is over only where the failure was this process's own.
    """
    try:
        yield
    except Exception as error:
        failure = _device_failure(error)
        if failure is not None and jax.process_count() > 1:
            log.error("devices failed (%s); if that is for a lost process, its number follows within %d s",
                      str(failure).splitlines()[0][:200], HEARTBEAT_SECONDS)
            time.sleep(1.2 * HEARTBEAT_SECONDS)
        raise


def _device_failure(error: BaseException | None) -> BaseException | None:
    """What JAX raised first, whatever was made of it since: a checkpoint that was not written, say."""
    while error is not None and not _STATUS.match(str(error)):
        error = error.__cause__ or error.__context__
    return error


def gather(text: str) -> list[str]:
    """The text that each process gives, in their order. All of them call it, in the same order of calls."""
    if jax.process_count() == 1:
        return [text]
    client: Any = distributed.global_state.client
    turn = f"mfa_jax/{next(_turn)}"
    client.key_value_set(f"{turn}/{jax.process_index()}", f".{text}")  # an empty value counts as none
    return [client.blocking_key_value_get(f"{turn}/{i}", _PATIENCE_MS)[1:] for i in range(jax.process_count())]


def leader_first(action: Callable[[], _T]) -> _T:
    """`action()` on process 0, and then on the others, which find what it left where they share a folder.

    Raises:
      ValueError: it failed on process 0, and why; process 0 itself raises what it raised.
    """
    if jax.process_index() == 0:
        try:
            found = action()
        except (ValueError, OSError) as error:
            gather(f"failed: {error}")
            raise
        gather("")
        return found
    failure = gather("")[0]
    if failure:
        raise ValueError(f"process 0 {failure}")
    return action()


def agreeing(read: Callable[[], _T], kind: type[Exception]) -> _T:
    """`read()` on each process; where an error of this kind stops one of them, all of them have it."""
    found: _T | None = None
    own: Exception | None = None
    try:
        found = read()
    except kind as error:
        own = error
    failures = {i: text for i, text in enumerate(gather("" if own is None else str(own) or kind.__name__)) if text}
    if not failures:
        assert found is not None
        return found
    if own is not None and len(failures) == jax.process_count():
        raise own
    raise kind("; ".join(f"process {i}: {text}" for i, text in failures.items())) from own


def require_same(what: str, text: str) -> None:
    """Refuses to go on where processes differ in what must be one.

    Raises:
      ValueError: which processes, and the first place where they differ.
    """
    every = gather(text)
    others = [i for i, found in enumerate(every) if found != every[0]]
    if others:
        theirs = every[others[0]]
        at = next((i for i, (a, b) in enumerate(zip(every[0], theirs, strict=False)) if a != b), min(map(len, every)))
        at = max(at - 40, 0)
        raise ValueError(f"{what}: process {', '.join(map(str, others))} has another than process 0: "
                         f"...{theirs[at:at + 80]!r}, not ...{every[0][at:at + 80]!r}")


def require_shared(folder: epath.Path) -> None:
    """Makes a folder, and refuses it where it is not one and the same for all processes.

    Raises:
      ValueError: this process does not see what process 0 wrote there, or process 0 could not write.
      OSError: this process cannot write there.
    """
    mine = folder / f".write-test-{jax.process_index()}-{os.getpid()}"
    first = folder / gather(mine.name)[0]

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        require(mine == first or first.exists(), "folder", str(folder),
                "must be one that all processes share; what process 0 wrote there is not seen here")
        mine.write_text("")

    leader_first(write)
    gather("seen")
    mine.unlink()


@contextlib.contextmanager
def sole_writer(folder: epath.Path) -> Iterator[None]:
    """Inside, no other job writes to a folder: process 0 holds its lock, which ends with the process, however it ends.

    Where files cannot be locked that is a warning, and nothing keeps others out.

    Raises:
      ValueError: another writer holds it: which, where that is known.
      OSError: the lock file cannot be made.
    """
    mine = jax.process_index() == 0 and "://" not in os.fspath(folder)  # a bucket has no locks
    with contextlib.ExitStack() as held:
        leader_first(lambda: held.enter_context(_locked(folder / LOCK)) if mine else None)
        yield


@contextlib.contextmanager
def _locked(path: epath.Path) -> Iterator[None]:
    # Unbuffered: what a full disk refuses would be tried again where the file is closed.
    with open(path, "a+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200).decode(errors="replace") or "another process"
            raise ValueError(f"folder={str(path.parent)!r}: {holder} writes there; accepted: a folder that no other "
                             f"run writes to, or this one once that has ended (where its host is gone, and a file "
                             f"server still holds its lock: once {path.name} is removed there)") from None
        except OSError as error:  # by the file system
            log.warning("%s: cannot be locked (%s), so nothing keeps a second run from writing there", path.parent,
                        error.strerror)
        with contextlib.suppress(OSError):  # a full disk: then it is not known who
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                file.truncate(0)


_LIBC = ctypes.CDLL(None)
_of_jax = ctypes.create_string_buffer(1024)
"""JAX's action for SIGTERM, a `struct sigaction`: Python knows none but its own, and could not put it back."""


def let_sigterm_end() -> None:
    """Until `stop_signals`, SIGTERM ends a process of several at once, as it does a process of its own.

    JAX takes it as soon as processes are joined, and nobody asks JAX before the first step: preparing data and
    compiling, which may take hours, would go on.
    """
    _LIBC.sigaction(signal.SIGTERM, None, _of_jax)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[int], bool]]:
    """Notes SIGTERM and Ctrl-C in place of dying of them; a second Ctrl-C acts as it always does, a second SIGTERM, as
    some schedulers send it while the run saves, does nothing.

    Gives what to ask at each step whether to stop. Of several processes one that is told is enough: all of them, which
    must ask at every step, are then told to stop at the same one.
    """
    received: list[int] = []
    previous: dict[int, Any] = {}
    together = jax.distributed.is_initialized()
    if together and any(_of_jax.raw):
        _LIBC.sigaction(signal.SIGTERM, _of_jax, None)

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(number, previous[number])
        if together:  # JAX has taken SIGTERM, and lets all processes know
            os.kill(os.getpid(), signal.SIGTERM)

    for number in (signal.SIGINT,) if together else (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(ValueError):  # not the main thread: the caller's own business
            previous[number] = signal.signal(number, note)
    try:
        yield multihost_utils.reached_preemption_sync_point if together else lambda step: bool(received)
    finally:
        for caught, handler in previous.items():
            signal.signal(caught, handler)
