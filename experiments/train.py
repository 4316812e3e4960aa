"""Train a language model, or go on with a run that was started before.

    python -m experiments.train --preset tiny-mfa --data.source stdlib --steps 50 --workdir runs/tiny
    python -m experiments.train --preset tiny-mfa --data.source stdlib --steps 80 --workdir runs/tiny

Settings come from the defaults, then `--preset NAME` (the model), then `--config FILE.json`, then the flags.
"""

from __future__ import annotations

import logging

from experiments.cli import parse, run
from mfa_jax.config import TrainConfig
from mfa_jax.presets import model_preset
from mfa_jax.train.loop import train


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    config = parse(TrainConfig, presets=model_preset)
    result = train(config)
    state = "stopped at" if result.interrupted else "done:"
    print(f"{state} step {result.step}; checkpoints and metrics are in {config.workdir}")


if __name__ == "__main__":
    run(main)
