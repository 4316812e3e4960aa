"""DS-1000 (Lai et al., arXiv 2211.11501): problems of data science, judged by running what a model writes.

`ds1000.jsonl.gz` is the file that its authors distribute, in their simplified format: an object a line with `prompt`,
`reference_code`, `metadata` (with `library`) and `code_context`, a program that defines `test_execution(code)` and for
some problems `test_string(code)`; these raise for a wrong solution.

A program runs in a process of its own, in an empty folder, with a time limit. **That is no sandbox**: what it does to
files, the network or the machine is not held back. Run it where nothing is to be lost.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import datasets

from mfa_jax.config import require
from mfa_jax.evaluate.tasks import local

SECONDS = 120
"""Of a program."""
MODULES = {"Matplotlib": "matplotlib", "Numpy": "numpy", "Pandas": "pandas", "Pytorch": "torch", "Scipy": "scipy",
           "Sklearn": "sklearn", "Tensorflow": "tensorflow"}
"""What a library of the problems is imported as."""
_RUN = "def test_execution(code):\n    exec(code)\n"


def rows(file: str, fields: list[str], local_data: str | None = None, **options: Any) -> dict[str, datasets.Dataset]:
    """The problems.

    Raises:
      ValueError: no folder, no such file, a line that cannot be read; a library of some problem that a program cannot
        import, for without it every solution would count as wrong.
    """
    found = local.rows(file, fields, local_data, **options)
    wanted = sorted({str(row["metadata"]["library"]) for row in found["test"]})
    # As solutions are run, not here: their environment is another.
    missing = [name for name in wanted if not passes(_RUN, f"import {MODULES.get(name, name)}")]
    require(not missing, "library", missing, "must be installed: DS-1000's problems use them")
    return found


def results(row: dict[str, Any], results: list[str]) -> dict[str, int]:
    return {"pass@1": int(passes(row["code_context"], solution(results[0])))}


def solution(text: str) -> str:
    """The code in an answer: up to a mark that ends it, without marks that begin it."""
    text = text.split("</code>")[0].replace("```python", "").split("```")[0]
    return text.split("\nEND SOLUTION")[0].replace("<code>", "")


def passes(code_context: str, code: str, seconds: float = SECONDS) -> bool:
    """Whether the tests of a problem accept a solution within a time."""
    program = f"{code_context}\ncode = {code!r}\ntest_execution(code)\n"
    if "test_string(" in code_context:
        program += "test_string(code)\n"
    # Who calls sys.exit(0) does not get here.
    reached = secrets.token_hex()
    program += f"open({reached!r}, 'w').close()\n"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.py"
        path.write_text(program)
        environment = {"PATH": os.environ.get("PATH", ""), "HOME": folder, "TMPDIR": folder, "MPLBACKEND": "Agg",
                       "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
        # Where libraries are found.
        environment |= {name: os.environ[name] for name in ("PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ}
        # A group of its own, so that what it starts ends with it.
        process = subprocess.Popen([sys.executable, str(path)], cwd=folder, env=environment, start_new_session=True,
                                   stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(seconds)
            return (Path(folder) / reached).exists()
        except subprocess.TimeoutExpired:
            return False
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:  # all of it has ended
                pass
            process.wait()
