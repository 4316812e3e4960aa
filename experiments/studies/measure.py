"""What is measured of every trained model: its loss on the test books, its size, and the bytes that it caches."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from experiments.studies.study import Scale
from mfa_jax import capacity
from mfa_jax.config import DataConfig, ModelConfig
from mfa_jax.data import Prepared, eval_batches
from mfa_jax.model.transformer import init_cache
from mfa_jax.train.losses import batch_loss
from mfa_jax.train.run import Trained

CACHE_DTYPE = "bfloat16"
"""Of the caches whose bytes are counted."""


def measure(scale: Scale, trained: Trained, test: Prepared) -> dict[str, Any]:
    """The measurements that all studies share, by name."""
    model = trained.config.model
    return {
        "test_bits_per_byte": bits_per_byte(trained, test, trained.config.data, scale.test_batches),
        "parameters": capacity.model_parameters(model).total,
        "cache_bytes_per_token": cache_bytes_per_token(model),
    }


def bits_per_byte(trained: Trained, test: Prepared, data: DataConfig, batches: int) -> float:
    """Mean loss over windows of the test books, evenly spread: `nats / targets / ln 2 / (bytes per token)`.

    It is the loss that training minimises, without a z term; `data` says how long windows are and how many a batch.
    """
    config = dataclasses.replace(trained.config, z_loss=0.0)
    evaluate = jax.jit(lambda params, batch: batch_loss(config, trained.model, params, batch))
    nll = tokens = 0.0
    for batch in eval_batches(test, data, batches):
        sums = evaluate(trained.params, batch)
        nll, tokens = nll + float(sums.nll), tokens + float(sums.tokens)
    return nll / tokens / math.log(2) / test.size("held_out").bytes_per_token


def cache_bytes_per_token(model: ModelConfig, tokens: int = 64) -> float:
    """Bytes of the arrays that decoding stores for a token, over all layers: of an allocated cache, not a formula."""
    rows = 2
    cache = init_cache(model, rows, tokens, CACHE_DTYPE)
    return cache.nbytes / (rows * tokens)
