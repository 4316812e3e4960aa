"""How long each notebook takes from top to bottom: `python -m experiments.bench_notebooks --json > FILE`.

Each runs from its stored form in a kernel of its own, in a folder that is thrown away, at the size that it picks for
this device or that `MFA_JAX_NOTEBOOK_SIZE` names. A cell that raises ends the run with its error. It needs
`pip install "mfa_jax[notebooks]"`.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

from experiments.benchmark import machine, show
from experiments.cli import parse, run
from experiments.notebook import size
from mfa_jax.config import require

FOLDER = Path(__file__).parents[1] / "notebooks"


@dataclasses.dataclass(frozen=True)
class BenchNotebooksConfig:
    """Seconds of each notebook."""

    only: tuple[str, ...] = ()
    """Names, such as 2_train_and_decode; none for all."""
    timeout: int = 3600
    """Seconds that a cell may take."""
    json: bool = False
    """Print one JSON object instead of a table."""

    def __post_init__(self) -> None:
        require(self.timeout >= 1, "timeout", self.timeout, "must be at least 1")
        names = [path.stem for path in notebooks()]
        for name in self.only:
            require(name in names, "only", name, f"must be among {', '.join(names)}")


def notebooks() -> list[Path]:
    """The stored forms, in their order. Raises: NotImplementedError: there is no clone of the repository."""
    found = sorted(FOLDER.glob("*.ipynb"))
    if not found:
        raise NotImplementedError(f"{FOLDER} holds no notebooks: run this from a clone of the repository")
    return found


def seconds(path: Path, timeout: int) -> float:
    """Wall time of one notebook, with the start of its kernel.

    Raises:
      NotImplementedError: nbclient is not installed.
      nbclient.exceptions.CellExecutionError: a cell raised.
    """
    try:
        import nbclient
        import nbformat
    except ImportError as error:
        raise NotImplementedError('running notebooks needs nbclient: pip install "mfa_jax[notebooks]"') from error
    loaded = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = nbclient.NotebookClient(loaded, timeout=timeout, kernel_name="python3",
                                         resources={"metadata": {"path": folder}})
        # Of whatever a kernel inherits: this clone, and a place for its files that goes with it.
        given = {**os.environ, "TMPDIR": folder, "PYTHONPATH": str(FOLDER.parent)}
        start = time.perf_counter()
        client.execute(env=given)
        return time.perf_counter() - start


def measure(config: BenchNotebooksConfig) -> dict[str, Any]:
    """The record, ready for `json.dumps`. Raises: as `seconds`."""
    found = machine(os.cpu_count() or 1)
    taken = {path.stem: seconds(path, config.timeout) for path in notebooks()
             if not config.only or path.stem in config.only}
    return {"benchmark": "notebooks", "size": size(), "device": jax.local_devices()[0].device_kind,
            "machine": {**found, "load_after": os.getloadavg()}, "seconds": taken}


def to_table(record: dict[str, Any]) -> Table:
    """A row a notebook."""
    table = Table(title=f"Notebooks at size {record['size']} on {record['device']}", title_justify="left")
    table.add_column("")
    table.add_column("seconds", justify="right")
    for name, taken in record["seconds"].items():
        table.add_row(name, f"{taken:.0f}")
    return table


def main() -> None:
    config = parse(BenchNotebooksConfig)
    show(measure(config), to_table, as_json=config.json)


if __name__ == "__main__":
    run(main)
