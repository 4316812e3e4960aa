"""Train a language model, or go on with a run that was started before.

    python -m experiments.train --preset tiny-mfa --data.source stdlib --steps 50 --workdir runs/tiny
    python -m experiments.train --preset tiny-mfa --data.source stdlib --steps 80 --workdir runs/tiny

Settings come from the defaults, then `--preset NAME` (the model), then `--config FILE.json`, then the flags.

On several hosts the same command runs on each, with the same flags and a workdir that they share: under Slurm (srun),
Open MPI, on the TPU VMs of a slice and on GKE the processes find each other; anywhere else JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES and JAX_PROCESS_ID say what there is. `mfa_jax.train.cluster` has the rule, and
`python -m experiments.launch` rehearses it on one machine.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from experiments.cli import parse, run
from mfa_jax.config import TrainConfig
from mfa_jax.presets import model_preset
from mfa_jax.train import cluster
from mfa_jax.train.loop import train
from mfa_jax.train.losses import Teacher


def start(
    parsed: Callable[[], TrainConfig], read_teacher: Callable[[TrainConfig, Mesh], Teacher] | None = None
) -> None:
    """Joins the other processes, if there are any, trains, and says how it ended.

    Args:
      parsed: the config, once the processes have met.
      read_teacher: of a config that has one.
    """
    with cluster.joined():
        logging.basicConfig(level=logging.WARNING, format=f"{cluster.label()}%(levelname)s %(message)s",
                            force=True)  # JAX has logged by now, which set up logging in its own way
        config = parsed()
        result = train(config, teacher=read_teacher and functools.partial(read_teacher, config))
        state = "stopped at" if result.interrupted else "done:"
        if jax.process_index() == 0:
            print(f"{state} step {result.step}; checkpoints and metrics are in {config.workdir}")


def main() -> None:
    config = parse(TrainConfig, presets=model_preset)
    start(lambda: config)


if __name__ == "__main__":
    with cluster.leaving_at_once():
        run(main, label=cluster.label)
