"""Rehearse a run of several hosts on one machine: starts a command several times, as processes that know each other.

    python -m experiments.launch --processes 4 --devices-per-process 2 -- python -m experiments.train --steps 50
    python -m experiments.launch --processes 4 -- -m experiments.train --steps 50

Each process gets CPU devices of its own, which exchange data over gloo; the command finds the others through
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, as on hosts without a scheduler. Lines of output begin
with the number of their process. SIGTERM and Ctrl-C go on to all processes; a second one kills them. When one fails,
the others are stopped, and its exit code is the launcher's (128 + the number of a signal that ended it).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any

from experiments.cli import parse, run
from mfa_jax.config.checks import require, require_positive
from mfa_jax.train.cluster import ADDRESS, CLUSTER, COUNT, INDEX

OWN_END_SECONDS, STOP_SECONDS = 2.0, 10.0
"""After a failure: for how long the others may end by themselves, and then after SIGTERM."""
_STOP = ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, None))


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """Starts the command that follows `--` as several processes on this machine."""

    processes: int = 2
    """How many."""
    devices_per_process: int = 1
    """CPU devices of each."""
    stop_others: bool = True
    """When one fails. Otherwise the others are left to notice by themselves, as on hosts where nothing stops them."""

    def __post_init__(self) -> None:
        require_positive(self, "processes", "devices_per_process")


def main(arguments: Sequence[str]) -> int:
    """The exit code of the first process that failed, 0 if none did.

    Raises:
      ValueError: no command, or one that is not there.
    """
    split = list(arguments).index("--") if "--" in arguments else len(arguments)
    config = parse(LaunchConfig, arguments[:split])
    command = _command(list(arguments[split + 1:]))
    address = f"127.0.0.1:{_free_port()}"
    early: list[int] = []
    with _on_signals(early.append):  # none may end the launcher between two starts: who would end the others?
        children = _start_all(command, [_environment(config, address, index) for index in range(config.processes)])
        for index, child in enumerate(children):
            _say(f"process {index} of {config.processes} is pid {child.pid}")
        unread = threading.Lock()
        threads = [_forward(child, index, unread) for index, child in enumerate(children)]
        pass_on = functools.partial(_pass_on, children, list[int]())
        with _on_signals(pass_on):
            for number in early:
                pass_on(number)
            code = _wait(children, config.stop_others)
    for thread in threads:
        thread.join()
    return code


def _command(words: list[str]) -> list[str]:
    require(bool(words), "command", words, "must follow `--`: -- python -m experiments.train ...")
    if words[0] == "-m":
        return [sys.executable, *words]
    found = shutil.which(words[0], path=_path())
    require(found is not None, "command", words[0], "is not there; a module is started by -m NAME")
    return [str(found), *words[1:]]


def _path() -> str:
    """PATH with the folder of this Python first: `python` is this one."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _environment(config: LaunchConfig, address: str, index: int) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name != CLUSTER}
    return {
        "PYTHONUNBUFFERED": "1", **inherited, "PATH": _path(), "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(config.devices_per_process), "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        ADDRESS: address, COUNT: str(config.processes), INDEX: str(index)}


def _start_all(command: list[str], environments: Sequence[dict[str, str]]) -> list[subprocess.Popen[bytes]]:
    children: list[subprocess.Popen[bytes]] = []
    try:
        for environment in environments:
            children.append(_start(command, environment))
    except BaseException:
        _end(children, _STOP)
        raise
    return children


def _start(command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    # A session of its own: the terminal's Ctrl-C comes to us alone, and once to each process through us.
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, start_new_session=True)


def _forward(child: subprocess.Popen[bytes], index: int, unread: threading.Lock) -> threading.Thread:
    """Copies what a process says, line by line, until both its outputs end.

    Args:
      unread: taken by the first of them all that finds that nobody reads it.
    """
    def copy(source: IO[bytes], target: IO[bytes]) -> None:
        reader = True
        for line in source:
            try:
                if reader:  # one write a line, so that none are mixed
                    target.write(b"[%d] %s\n" % (index, line.removesuffix(b"\n")))
                    target.flush()
            except BrokenPipeError:  # nobody reads any more: all are told to end, and what they still say is dropped
                reader = False
                if unread.acquire(blocking=False):
                    os.kill(os.getpid(), signal.SIGTERM)

    def both() -> None:
        assert child.stdout is not None and child.stderr is not None
        errors = threading.Thread(target=copy, args=(child.stderr, sys.stderr.buffer), daemon=True)
        errors.start()
        copy(child.stdout, sys.stdout.buffer)
        errors.join()

    thread = threading.Thread(target=both, daemon=True)
    thread.start()
    return thread


@contextlib.contextmanager
def _on_signals(handle: Callable[[int], None]) -> Iterator[None]:
    """What SIGTERM, Ctrl-C and the end of the terminal do meanwhile."""
    def handler(number: int, frame: FrameType | None) -> None:
        handle(number)

    previous: dict[int, Any] = {n: signal.signal(n, handler)
                                for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _pass_on(children: Sequence[subprocess.Popen[bytes]], received: list[int], number: int) -> None:
    """A second signal means it: what does not end by itself is killed."""
    received.append(number)
    again = len(received) > 1
    _say("killing all processes" if again else f"passing {signal.Signals(number).name} on to all processes")
    _send(children, signal.SIGKILL if again else number)


def _wait(children: Sequence[subprocess.Popen[bytes]], stop_others: bool) -> int:
    while True:
        codes = [child.poll() for child in children]
        failed = [index for index, code in enumerate(codes) if code]
        if failed:
            break
        if None not in codes:
            return 0
        time.sleep(0.05)
    code = codes[failed[0]]
    assert code is not None
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
    _say(f"process {failed[0]} {how}; {'stopping' if stop_others else 'waiting for'} the others")
    _end(children, ((None, OWN_END_SECONDS), *_STOP) if stop_others else ((None, None),))
    return 128 - code if code < 0 else code


def _end(children: Sequence[subprocess.Popen[bytes]], stages: Sequence[tuple[int | None, float | None]]) -> None:
    """Sends each signal in turn and waits for so many seconds, until all have ended."""
    for number, patience in stages:
        if number is not None:
            _send(children, number)
        if _all_end(children, patience):
            break
    if any(number == signal.SIGKILL for number, _ in stages):  # of a process that has ended others may be left
        _send(children, signal.SIGKILL)


def _send(children: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for child in children:  # each leads a group of its own: what a shell has started is ended with it
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)


def _all_end(children: Sequence[subprocess.Popen[bytes]], patience: float | None) -> bool:
    end = None if patience is None else time.monotonic() + patience
    while any(child.poll() is None for child in children):
        if end is not None and time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def _say(message: str) -> None:
    print(f"launch: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(lambda: sys.exit(main(sys.argv[1:])))
