"""What a smaller cache costs a trained model, row by row, and the tables and pictures of it.

    python -m experiments.conversion run --from model.gguf --model SmolLM2-135M
    python -m experiments.conversion run --from model.gguf --model SmolLM2-135M --only original mfa_kr-1.5
    python -m experiments.conversion run --from model.gguf --model SmolLM2-135M --healed mfa_kr-1.5=runs/healed
    python -m experiments.conversion run --tiny --results runs/table
    python -m experiments.conversion report

Rows that are there with the same settings are skipped. Texts and tasks are read in the folder that MFA_JAX_DATA names;
tasks need the extra: pip install "mfa_jax[evaluate]".
"""

from __future__ import annotations

import dataclasses
import logging
import sys

from experiments import cli
from experiments.conversion import report, runner
from mfa_jax.config import require

ACTIONS = ("run", "report")


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Tables and pictures of all rows that were measured."""

    results: str = str(runner.RESULTS)
    """Folder of `metrics.jsonl`, the README and the pictures."""


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    action, *flags = sys.argv[1:] or ["--help"]
    if action in ("-h", "--help"):
        print(__doc__)
        return
    require(action in ACTIONS, "action", action, f"must be one of {', '.join(ACTIONS)}")
    if action == "report":
        print(f"written: {report.write(cli.parse(ReportConfig, flags).results)}")
    else:
        runner.run(cli.parse(runner.RunConfig, flags))


if __name__ == "__main__":
    cli.run(main)
