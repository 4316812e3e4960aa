"""A converted model as the folder of a run: what `load_trained`, and with it every script, reads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax

from mfa_jax.config import DataConfig, ModelConfig, TrainConfig, require, to_dict, to_json
from mfa_jax.convert.files import appearing, require_free
from mfa_jax.data import Tokenizer
from mfa_jax.train.checkpoint import Checkpoints
from mfa_jax.train.orbax_io import CHUNK
from mfa_jax.train.run import CHECKPOINTS, CONFIG, TOKENIZER


def host() -> jax.Device:
    """Where a whole model lies while it is converted: in memory of the host, whatever accelerator there is.

    Raises:
      ValueError: JAX was told to do without its CPU.
    """
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise ValueError(f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')!r}: must have cpu besides, where a model "
                         f"lies while it is converted ({error})") from error


def save_run(
    folder: str | Path, config: ModelConfig, params: Any, tokenizer: Tokenizer, *, add_bos_token: bool = False
) -> None:
    """Writes a model as step 0 of a run that has not been trained; the folder appears when it is complete.

    Memory: a few chunks of the checkpoint, beside the parameters; those that are mapped from files stay there.

    Args:
      params: arrays, layers stacked.
      add_bos_token: say of the model that it expects the begin token before each text (`DataConfig.add_bos_token`).

    Raises:
      ValueError: the folder is taken, a tokenizer larger than the vocabulary, or one without a begin token that is
        asked for.
    """
    folder = Path(folder)
    require_free(folder)
    require(tokenizer.vocab_size <= config.vocab_size, "tokenizer.vocab_size", tokenizer.vocab_size,
            f"must be at most the model's vocab_size={config.vocab_size}")
    require(not add_bos_token or tokenizer.bos_id is not None, "add_bos_token", True,
            "the tokenizer has no begin token")
    data = DataConfig(tokenizer=str(folder / TOKENIZER), add_bos_token=add_bos_token)
    train = TrainConfig(workdir=str(folder), model=config, data=data)
    with appearing(folder) as partial:
        tokenizer.save(partial / TOKENIZER)
        (partial / CONFIG).write_text(to_json(train))
        with Checkpoints(partial / CHECKPOINTS, file_bytes=CHUNK) as checkpoints:
            checkpoints.save(0, {"params": jax.device_put(params, host())}, {"config": to_dict(train)}, wait=True)
