"""The scripts as they are run: bad input is one line and exit code 2, no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run_script(*arguments: str, lines: str = "") -> subprocess.CompletedProcess[str]:
    """Args: the module and its arguments, and what it reads from the terminal."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, env=environment, input=lines,
                          capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "message"), [
    (("experiments.train", "--preset", "tiny-mfq"), "tiny-mfq"),
    (("experiments.train", "--stepz", "3"), "--stepz"),
    (("experiments.train", "--preset", "tiny-mfa", "--model.attention.latent-dim", "7"), "latent_dim=7"),
    (("experiments.train", "--config", "/nonexistent.json"), "/nonexistent.json"),
    (("experiments.train", "--workdir", "/dev/null/x", "--steps", "1"), "/dev/null/x"),
    (("experiments.decode", "--workdir", "/nonexistent", "--prompt", "a"), "workdir='/nonexistent'"),
    (("experiments.decode", "--workdir", "x", "--prompt", "a", "--top-p", "1.5"), "top_p=1.5: must be in (0, 1]"),
    (("experiments.capacity", "--model", "step4"), "step4"),
    (("experiments.evaluate", "--tasks", "local_bbh", "--workdir", "x"), "local_data=None: must name the folder"),
    (("experiments.chat",), "workdir=None: give the folder of a run"),
])
def test_bad_input_is_one_line_and_exit_code_2(arguments: tuple[str, ...], message: str) -> None:
    done = run_script(*arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error:")]) == 1


@pytest.mark.slow
def test_train_resume_and_decode_as_the_readme_says(tmp_path: Path) -> None:
    train = ("experiments.train", "--preset", "tiny-mfa", "--data.source", str(ROOT / "mfa_jax"), "--workdir",
             str(tmp_path), "--data.sequence-length", "64")
    assert run_script(*train, "--steps", "4").returncode == 0
    resumed = run_script(*train, "--steps", "6")
    assert resumed.returncode == 0 and "resumed at step 4" in resumed.stderr
    decode = ("experiments.decode", "--workdir", str(tmp_path), "--prompt", "def ", "--max-new-tokens", "8")
    greedy = [run_script(*decode, "--temperature", "0") for _ in range(2)]
    assert greedy[0].returncode == 0 and greedy[0].stdout.startswith("def ")
    assert greedy[0].stdout == greedy[1].stdout
    assert "decode attention by xla" in greedy[0].stderr
    named = run_script(*decode, "--temperature", "0", "--implementation", "reference", "--cache-dtype", "int8")
    assert named.returncode == 0 and "decode attention by reference" in named.stderr
    for refused in (("--capacity", "10"), ("--top-k", "300")):
        done = run_script(*decode, *refused)
        assert done.returncode == 2 and done.stdout == "", "the prompt is written once something follows"
    both = run_script(*decode, "--prompt", "class ")
    assert both.returncode == 0 and "class " in both.stdout
    asked = run_script("experiments.decode", "--workdir", str(tmp_path), "--max-new-tokens", "8", "--temperature", "0",
                       "--capacity", "12", lines=f"{'x' * 20}\n\ndef \n")
    assert asked.returncode == 0 and asked.stdout == greedy[0].stdout, "the line that is too long ends nothing"
    assert asked.stderr.count("error: ") == 1 and "capacity=12" in asked.stderr
