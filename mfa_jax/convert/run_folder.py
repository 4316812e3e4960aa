"""A converted model as the folder of a run: what `load_trained`, and with it every script, reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mfa_jax.config import DataConfig, ModelConfig, TrainConfig, require, to_dict, to_json
from mfa_jax.convert.files import appearing, require_free
from mfa_jax.data import Tokenizer
from mfa_jax.train.checkpoint import Checkpoints
from mfa_jax.train.run import CHECKPOINTS, CONFIG, TOKENIZER


def save_run(folder: str | Path, config: ModelConfig, params: Any, tokenizer: Tokenizer) -> None:
    """Writes a model as step 0 of a run that has not been trained; the folder appears when it is complete.

    Args:
      params: arrays, layers stacked.

    Raises:
      ValueError: the folder is taken, or a tokenizer larger than the vocabulary.
    """
    folder = Path(folder)
    require_free(folder)
    require(tokenizer.vocab_size <= config.vocab_size, "tokenizer.vocab_size", tokenizer.vocab_size,
            f"must be at most the model's vocab_size={config.vocab_size}")
    train = TrainConfig(workdir=str(folder), model=config, data=DataConfig(tokenizer=str(folder / TOKENIZER)))
    with appearing(folder) as partial:
        tokenizer.save(partial / TOKENIZER)
        (partial / CONFIG).write_text(to_json(train))
        with Checkpoints(partial / CHECKPOINTS) as checkpoints:
            checkpoints.save(0, {"params": jax.tree.map(jnp.asarray, params)}, {"config": to_dict(train)}, wait=True)
