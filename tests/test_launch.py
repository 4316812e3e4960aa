"""The launcher of rehearsals: whose output, whose exit code, and who is stopped."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from experiments import launch

ROOT = Path(__file__).resolve().parent.parent
ME = "import os, signal, sys, time; me = int(os.environ['JAX_PROCESS_ID'])\n"


def start(tmp_path: Path, program: str, *flags: str) -> subprocess.Popen[str]:
    file = tmp_path / "program.py"
    file.write_text(ME + textwrap.dedent(program))
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.launch", *flags, "--", "python", str(file)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "MFA_JAX_CLUSTER": "none"})


def test_each_process_knows_its_number_and_all_are_heard(tmp_path: Path) -> None:
    program = """
        names = ("JAX_NUM_PROCESSES", "JAX_NUM_CPU_DEVICES", "JAX_PLATFORMS", "JAX_COORDINATOR_ADDRESS")
        print(*(os.environ[name] for name in names), "MFA_JAX_CLUSTER" in os.environ, sys.executable)
        print("without an end", file=sys.stderr, end="")
    """
    child = start(tmp_path, program, "--processes", "3", "--devices-per-process", "2")
    out, errors = child.communicate(timeout=100)
    assert child.returncode == 0
    lines = sorted(out.splitlines())
    assert [line[:4] for line in lines] == ["[0] ", "[1] ", "[2] "]
    said = {line[4:] for line in lines}
    assert len(said) == 1, "all have the same coordinator"
    words = said.pop().split()
    assert words[:3] == ["3", "2", "cpu"] and words[3].startswith("127.0.0.1:") and words[4] == "False"
    assert Path(words[5]).parent == Path(sys.executable).parent, "python is the Python of the launcher"
    assert sorted(line for line in errors.splitlines() if line.startswith("[")) == [
        f"[{i}] without an end" for i in range(3)]


@pytest.mark.parametrize(("program", "code", "how"), [
    ("sys.exit(7) if me == 1 else time.sleep(1000)", 7, "process 1 failed with exit code 7; stopping the others"),
    ("os.kill(os.getpid(), 9) if me == 2 else time.sleep(1000)", 137, "process 2 was ended by SIGKILL; stopping"),
])
def test_the_first_failure_ends_all(tmp_path: Path, program: str, code: int, how: str) -> None:
    child = start(tmp_path, program, "--processes", "3")
    _, errors = child.communicate(timeout=100)
    assert child.returncode == code and how in errors


def test_signals_reach_every_process(tmp_path: Path) -> None:
    program = """
        def told(number, frame):
            print("told", number, flush=True)
            sys.exit(0)
        signal.signal(signal.SIGTERM, told)
        signal.signal(signal.SIGINT, told)
        print("ready", flush=True)
        while True:  # a signal that comes just before Python sleeps is handled only when it wakes
            time.sleep(0.1)
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        child = start(tmp_path, program, "--processes", "2")
        assert child.stdout is not None
        ready = sorted(child.stdout.readline() for _ in range(2))
        assert ready == ["[0] ready\n", "[1] ready\n"]
        child.send_signal(number)
        out, _ = child.communicate(timeout=100)
        assert child.returncode == 0 and sorted(out.splitlines()) == [f"[{i}] told {int(number)}" for i in range(2)]


def test_a_second_signal_kills(tmp_path: Path) -> None:
    child = start(tmp_path, """
        signal.signal(signal.SIGTERM, lambda *_: print("told", flush=True))
        print("ready", flush=True)
        while True:
            time.sleep(0.1)
    """, "--processes", "2")
    assert child.stdout is not None
    for _ in range(2):
        assert {child.stdout.readline()[4:] for _ in range(2)} <= {"ready\n", "told\n"}
        child.send_signal(signal.SIGTERM)
    _, errors = child.communicate(timeout=100)
    assert child.returncode == 128 + signal.SIGKILL and "killing all processes" in errors


@pytest.mark.parametrize("failure", ["no second process", "a signal"])
def test_what_goes_wrong_between_two_starts_leaves_no_process(failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    children: list[subprocess.Popen[bytes]] = []
    start = launch._start

    def start_badly(*arguments: Any) -> subprocess.Popen[bytes]:
        if children and failure == "no second process":
            raise BlockingIOError(errno.EAGAIN, "no process is free")
        children.append(start(*arguments))
        if failure == "a signal" and len(children) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return children[-1]

    def unhandled(number: int, frame: object) -> None:
        raise AssertionError("this would have ended the launcher")

    monkeypatch.setattr(launch, "_start", start_badly)
    before = signal.signal(signal.SIGTERM, unhandled)
    arguments = ["--processes", "3", "--", sys.executable, "-c", "import time; time.sleep(1000)"]
    try:
        if failure == "a signal":
            assert launch.main(arguments) == 128 + signal.SIGTERM and len(children) == 3
        else:
            with pytest.raises(BlockingIOError):
                launch.main(arguments)
        assert [child.poll() for child in children] == [-signal.SIGTERM] * len(children)
        assert signal.getsignal(signal.SIGTERM) is unhandled
    finally:
        signal.signal(signal.SIGTERM, before)
        for child in children:
            with child:  # closes its pipes
                child.kill()


@pytest.mark.parametrize(("arguments", "message"), [
    (["--processes", "2"], "must follow `--`"),
    (["--processes", "2", "--", "experiments.train"], "command='experiments.train': is not there; a module is started"),
    (["--processes", "0", "--", "python"], "processes=0: must be at least 1"),
])
def test_what_cannot_be_started_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch.main(arguments)


def shell(command: str, *flags: str, **where: Any) -> subprocess.Popen[str]:
    """A shell that starts others, as a script around training does."""
    return subprocess.Popen([sys.executable, "-m", "experiments.launch", *flags, "--", "bash", "-c", command], cwd=ROOT,
                            text=True, stderr=subprocess.PIPE, **{"stdout": subprocess.PIPE, **where})


def test_what_a_process_has_started_ends_with_it() -> None:
    child = shell("if [ $JAX_PROCESS_ID = 1 ]; then exit 3; fi; sleep 1000; echo still here", "--processes", "2")
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 3 and out == ""


def test_the_end_of_the_terminal_ends_all() -> None:
    child = shell("echo ready; sleep 1000; true", "--processes", "2")
    assert child.stdout is not None
    assert sorted(child.stdout.readline() for _ in range(2)) == ["[0] ready\n", "[1] ready\n"]
    child.send_signal(signal.SIGHUP)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGHUP and "passing SIGHUP on" in errors


def test_where_nobody_reads_any_more_all_are_ended() -> None:
    child = shell("yes", "--processes", "1")
    assert child.stdout is not None
    assert child.stdout.readline() == "[0] y\n"
    child.stdout.close()
    assert child.wait(timeout=60) == 128 + signal.SIGTERM
    assert child.stderr is not None
    child.stderr.close()
