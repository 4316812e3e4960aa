r"""Train a language model, or go on with a run that was started before.

    python -m experiments.train --preset tiny-mfa --data.source stdlib --steps 50 --workdir runs/tiny \
        --optimizer.schedule-steps 80
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
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from experiments import cli
from mfa_jax.config import TrainConfig, load_json
from mfa_jax.presets import model_preset
from mfa_jax.train import cluster
from mfa_jax.train.loop import train
from mfa_jax.train.losses import Teacher
from mfa_jax.train.run import CHECKPOINTS


def parse(argv: Sequence[str] | None = None, **options: Any) -> TrainConfig:
    """`cli.parse` of a run's config.

    Raises:
      ValueError: what that refuses; a file of `--config` that lies in the folder of a run and names another as workdir
        (the folder was moved or copied, or named from elsewhere), where no `--workdir` says which is meant.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    rest, path = cli.take(args, "--config")
    if path is not None and cli.take(rest, "--workdir")[1] is None:
        folder, said = Path(path).parent, load_json(dict, path).get("workdir")
        if (folder / CHECKPOINTS).is_dir() and isinstance(said, str) and Path(said).resolve() != folder.resolve():
            raise ValueError(f"workdir={said!r}: the file of --config lies in the folder of another run (moved, or "
                             f"copied); accepted: --workdir {folder} to go on with that, or --workdir with another")
    return cli.parse(TrainConfig, args, **options)


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
    config = parse(presets=model_preset)
    start(lambda: config)


if __name__ == "__main__":
    with cluster.leaving_at_once():
        cli.run(main, label=cluster.label)
