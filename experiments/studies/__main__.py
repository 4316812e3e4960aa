"""Runs a study, or rebuilds its report from its metrics.

    python -m experiments.studies NAME run --scale {tiny,nano,small}
    python -m experiments.studies NAME report

A run that was cut off goes on where it was, and what is done is skipped. `NAME run --help` lists the settings.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path

from experiments import cli
from experiments.studies import corpus, report, runner
from experiments.studies.catalog import STUDIES
from experiments.studies.study import SCALES, scale_named
from mfa_jax.config import require

HERE = Path(__file__).parent
ACTIONS = ("run", "report")


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Tables and pictures of a study, of all scales that it has metrics of."""

    results: str = str(HERE)
    """Folder of the studies' folders, each with its `metrics.jsonl`, README and pictures."""


@dataclasses.dataclass(frozen=True)
class StudyConfig(ReportConfig):
    """The training runs of a study at a scale."""

    scale: str = "tiny"
    """tiny (minutes on a CPU, no evidence), nano (1 M parameters) or small (30 M)."""
    workers: int = 1
    """Processes that share a device: several keep a GPU busy with models that are small for it."""
    devices: int = 1
    """GPUs to use, each with its own workers."""
    workdir: str = "runs/studies"
    """Folder of prepared text and unfinished runs."""
    keep_runs: bool = False
    """Leave each finished run, with its last checkpoint, in the workdir."""

    def __post_init__(self) -> None:
        for name in ("workers", "devices"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{__doc__}\nstudies: {', '.join(STUDIES)}\nscales: {', '.join(SCALES)}")
        return
    name, action, *flags = [*arguments, ""][:2] + arguments[2:]
    require(name in STUDIES, "study", name, f"must be one of {', '.join(STUDIES)}")
    require(action in ACTIONS, "action", action, f"must be one of {', '.join(ACTIONS)}")
    study = STUDIES[name]
    if action == "report":
        folder = Path(cli.parse(ReportConfig, flags).results) / name
        print(f"written: {report.write(study, folder, HERE / name)}")
        return
    config = cli.parse(StudyConfig, flags)
    folder = Path(config.results) / name
    scale = scale_named(config.scale)
    corpus.find_all(scale.train)  # here already, so that not each worker says what is missing
    if config.workers * config.devices > 1:
        single = [name, "run", "--scale", config.scale, "--results", config.results, "--workdir", config.workdir]
        single += ["--keep-runs"] if config.keep_runs else []
        if any(codes := runner.start_workers(single, config.workers, config.devices)):
            raise SystemExit(f"error: workers ended with codes {codes}; the same command goes on")
    else:
        runner.keep_compiled_programs(Path(config.workdir) / "compiled")
        folders = runner.Folders(folder, Path(config.workdir), config.keep_runs)
        runner.work_through(study, scale, folders)
    print(f"done; `python -m experiments.studies {name} report` writes tables and pictures")


if __name__ == "__main__":
    cli.run(main)
