"""Effective ranks of the shapes before training, for the report to put beside the trained ones.

    python -m experiments.studies.factorization.start

Training keeps nothing of step 0, but its parameters are made of config and seed alone. So they are made again for each
recorded run, all seeds of the best rates, and measured as the trained ones are.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
from flax import linen as nn

from experiments.studies import records, report
from experiments.studies.factorization import START, effective_ranks
from experiments.studies.records import Record
from experiments.studies.study import SCALES
from mfa_jax.config import TrainConfig, from_dict
from mfa_jax.model.transformer import Transformer, init_params

HERE = Path(__file__).parent


def starting_ranks(runs: list[Record]) -> dict[str, dict[str, float]]:
    """By run; the runs differ in their seeds alone."""
    model = from_dict(TrainConfig, runs[0].config).model
    start = jax.jit(lambda key: nn.unbox(init_params(Transformer(model), key)))
    found = {run.run: effective_ranks(start(jax.random.key(run.config["seed"])), model.num_layers) for run in runs}
    return {name: {rank: round(value, 4) for rank, value in ranks.items()} for name, ranks in found.items()}


def main() -> None:
    found: dict[str, dict[str, dict[str, float]]] = {}
    for scale in SCALES:
        runs = [record for record in records.read(HERE) if record.scale == scale]
        for same in report.groups(runs).values():
            if chosen := report.at_best_rate(same):
                found.setdefault(scale, {}).update(starting_ranks(chosen))
    made = {"command": "python -m experiments.studies.factorization.start", "jax": jax.__version__, "ranks": found}
    (HERE / START).write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
