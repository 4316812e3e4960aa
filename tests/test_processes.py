"""Several processes, started for real: one history over four, two and one of them equals a run of one process."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.faults import elastic
from experiments.faults.recorded_train import wrong_batches
from experiments.faults.runs import LONG, ROOT, SmallRun, names_the_lost, write_corpus
from mfa_jax.config import MeshConfig, TrainConfig, load_json
from mfa_jax.convert import save_run
from mfa_jax.data import ByteTokenizer
from mfa_jax.generate import SamplingConfig, complete
from mfa_jax.train.checkpoint import Checkpoints
from mfa_jax.train.loop import train
from mfa_jax.train.run import CONFIG
from tests.contract import compiled, model_config

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes")]
STEPS = 24


def flip(folder: Path) -> None:
    """One bit of the largest file of an item."""
    path = max((p for p in folder.glob("params/**/d/*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_four_processes_then_two_then_one_are_one_run(tmp_path: Path) -> None:
    """SIGTERM to one of four, SIGKILL to one of four, a flipped bit, two processes, one."""
    run = SmallRun(tmp_path / "run", write_corpus(tmp_path / "corpus"), tmp_path / "cache", save_every=4,
                   flags=("--preset", "tiny-mfa", "--keep-checkpoints", "9"))
    four = ("--mesh.data", "1", "--mesh.fsdp", "2", "--mesh.tensor", "2")

    first = run.start(STEPS, *four, processes=4)
    assert first.until(lambda: first.last_step() >= 5), first.said()
    first.tell(2, signal.SIGTERM)
    assert first.wait()[0] == 0, first.said()
    stopped = run.saved()[-1]
    assert f"stopped at step {stopped};" in first.said(0) and 5 <= stopped < STEPS - 8, first.said()

    second = run.start(STEPS, *four, processes=4, launch=("--no-stop-others",))
    assert second.until(lambda: second.last_step() >= stopped + 6), second.said()
    second.tell(1, signal.SIGKILL)
    assert second.wait()[0] == 128 + signal.SIGKILL
    assert second.resumed_at() == stopped
    for other in (0, 2, 3):
        assert names_the_lost(second.said(other), 1), second.said(other)
    newest, before = run.saved()[-1], run.saved()[-2]
    flip(run.checkpoints / str(newest))

    third = run.finish(STEPS - 2, "--mesh.data", "1", "--mesh.tensor", "2", processes=2)
    assert third.resumed_at() == before
    for process in (0, 1):
        assert f"process {process} of 2: WARNING" in third.said(process)
        assert f"step {newest} is skipped: checksum differs" in third.said(process)
    assert wrong_batches(run.workdir, [0, stopped, before]) == []

    config = dataclasses.replace(load_json(TrainConfig, run.workdir / CONFIG), steps=STEPS, mesh=MeshConfig(data=1))
    assert train(config, progress=False, devices=jax.devices()[:1]).step == STEPS
    alone = dataclasses.replace(config, workdir=str(tmp_path / "alone"))
    train(alone, progress=False, devices=jax.devices()[:1])
    found, expected = run.losses(), run.beside("alone").losses()
    assert list(found) == list(expected) == list(range(1, STEPS + 1)), "each step is told once"
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)


@pytest.mark.parametrize("process", [0, 1])
def test_a_save_that_fails_in_one_process_ends_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process: int
) -> None:
    """Not after the 20 minutes for which orbax would have the others wait, and what was saved before is whole."""
    run = SmallRun(tmp_path / "run", write_corpus(tmp_path / "corpus"), tmp_path / "cache", save_every=4,
                   flags=("--preset", "tiny-mfa", "--mesh.data", "1", "--mesh.fsdp", "2"))
    monkeypatch.setenv("MFA_JAX_NO_ROOM", f"{process}:8")
    job = run.start(1000, processes=2, launch=("--no-stop-others",))
    code, said = job.wait()
    assert code == 2, said
    assert "checkpoint of step 8 was not written: File too large" in job.said(process), said
    assert names_the_lost(job.said(1 - process), process), said
    assert run.saved() == [4]
    monkeypatch.delenv("MFA_JAX_NO_ROOM")
    assert run.finish(10, processes=2).resumed_at() == 4


def test_before_the_first_step_a_process_ends_at_once(tmp_path: Path) -> None:
    """As long as data are prepared and programs compiled nobody asks JAX, which takes SIGTERM, and nothing is lost."""
    run = SmallRun(tmp_path / "run", write_corpus(tmp_path / "corpus"), tmp_path / "cache")
    job = run.start(LONG, "--mesh.data", "1", "--mesh.fsdp", "2", processes=2, launch=("--no-stop-others",))
    assert job.until(lambda: "joined by" in job.said(1)), job.said()
    job.tell(1, signal.SIGTERM)
    assert job.wait()[0] == 128 + signal.SIGTERM, job.said()
    assert "process 1 was ended by SIGTERM" in job.said() and names_the_lost(job.said(0), 1), job.said()
    assert run.saved() == []


def test_two_processes_decode_what_one_does(tmp_path: Path) -> None:
    """Behind the begin token, as the run says."""
    c = compiled(model_config("mfa", vocab_size=264))
    save_run(tmp_path / "run", c.config, c.params, ByteTokenizer(), add_bos_token=True)
    prompts = ("some text", "other")
    flags = [flag for prompt in prompts for flag in ("--prompt", prompt)]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.launch", "--processes", "2", "--devices-per-process", "2", "--", "-m",
         "experiments.decode", "--workdir", str(tmp_path / "run"), "--temperature", "0", "--max-new-tokens", "12",
         "--mesh.fsdp", "2", "--mesh.tensor", "2", *flags], cwd=ROOT, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    texts = complete(c.model, c.params, ByteTokenizer(), prompts, SamplingConfig(temperature=0), jax.random.key(0),
                     max_new_tokens=12, add_bos_token=True)
    expected = "".join(f"{prompt}{text}\n{'-' * 20}\n" for prompt, text in zip(prompts, texts, strict=True))
    lines = done.stdout.decode().split("\n")  # gloo says there, too, when it is connected
    written = "".join(f"{line.removeprefix('[0] ')}\n" for line in lines if line.startswith("[0] "))
    assert written.endswith(expected) and not any("some text" in line for line in lines if line.startswith("[1] "))


def test_no_host_reads_a_whole_large_array(tmp_path: Path) -> None:
    """One process saves; four read a quarter each, save it again, and two read a half each.

    What comes to a host beside its own part is the rest of the chunks of 64 MiB that the part touches.
    """
    def launch(processes: int, *flags: str) -> list[dict]:
        done = subprocess.run(
            [sys.executable, "-m", "experiments.launch", "--processes", str(processes), "--", "-m",
             "experiments.faults.elastic", *flags], cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        found = [json.loads(line.partition(" ")[2]) for line in done.stdout.splitlines() if '{"process"' in line]
        assert sorted(report["process"] for report in found) == list(range(processes)), done.stdout
        return found

    with Checkpoints(tmp_path / "one") as checkpoints:
        wanted = elastic.array_at(jax.sharding.Mesh(jax.devices()[:1], ("x",)))
        checkpoints.save(1, {"large": {"w": wanted}}, {})
    for report in launch(4, "--folder", str(tmp_path / "one"), "--again", str(tmp_path / "four")):
        assert report["part"] == report["array"] // 4
        assert report["part"] // 2 < report["read"] <= report["array"] // 2
    for report in launch(2, "--folder", str(tmp_path / "four")):
        assert report["part"] == report["array"] // 2
        assert report["part"] // 2 < report["read"] <= report["array"] // 2
    found, report = elastic.restore(tmp_path / "four")
    np.testing.assert_array_equal(found, wanted)
    assert report["read"] > report["array"] // 2, "the count must tell a whole array from a part"
