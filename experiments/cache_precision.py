"""What the type of the cache costs a trained model, in bits per byte: `python -m experiments.cache_precision`.

A text is read through the cache, a few tokens at a time as decoding does, and each token is predicted from what the
cache holds of those before it: the loss of decoding, not of training. A JSON object a type is printed.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from experiments import cli
from mfa_jax.config import require
from mfa_jax.convert import load_pretrained
from mfa_jax.data import load_tokenizer
from mfa_jax.kernels import MAX_QUERIES
from mfa_jax.model.transformer import Transformer, init_cache
from mfa_jax.train.run import load_trained


@dataclasses.dataclass(frozen=True)
class CachePrecisionConfig:
    """What is compared."""

    text: str
    """A text file that the model was not trained on."""
    workdir: str | None = None
    """The run that was trained; or"""
    llama: str | None = None
    """the folder of a Hugging Face Llama checkpoint, with a tokenizer in it."""
    tokenizer: str = "tokenizer.json"
    """Name of the tokenizer in that folder."""
    window: int = 256
    """Tokens of a row of the cache, a multiple of 8; each row starts anew."""
    windows: int = 64
    """At most so many rows."""
    cache_dtypes: tuple[str, ...] = ("float32", "bfloat16", "int8")
    """Types to compare."""

    def __post_init__(self) -> None:
        require((self.workdir is None) != (self.llama is None), "workdir", self.workdir,
                "give either --workdir or --llama")
        require(self.window > 0 and self.window % MAX_QUERIES == 0, "window", self.window,
                f"must be a positive multiple of {MAX_QUERIES}")
        require(self.windows > 0, "windows", self.windows, "must be positive")


@functools.partial(jax.jit, static_argnames=("model", "cache_dtype"))
def cached_losses(
    model: Transformer, params: Any, tokens: Int[Array, "B T"], cache_dtype: str
) -> Float[Array, "B U"]:
    """Nats of each token but the first, given the ones before it as a cache of `cache_dtype` holds them.

    Args:
      tokens: `T - 1` is a multiple of `MAX_QUERIES`.
    """
    B, T = tokens.shape
    require((T - 1) % MAX_QUERIES == 0, "tokens.shape", tokens.shape, f"must be 1 + a multiple of {MAX_QUERIES} long")
    inputs = tokens[:, :-1].reshape(B, -1, MAX_QUERIES).swapaxes(0, 1)
    targets = tokens[:, 1:].reshape(B, -1, MAX_QUERIES).swapaxes(0, 1)

    def step(cache: Any, chunk: tuple[Array, Array]) -> tuple[Any, Array]:
        logits, cache = model.apply({"params": params}, chunk[0], cache=cache)
        log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
        return cache, -jnp.take_along_axis(log_p, chunk[1][..., None], axis=-1)[..., 0]

    _, losses = jax.lax.scan(step, init_cache(model.config, B, T - 1, cache_dtype), (inputs, targets))
    return losses.swapaxes(0, 1).reshape(B, T - 1)


def bits_per_byte(
    model: Transformer, params: Any, tokenizer: Any, text: str, *, window: int, windows: int, cache_dtype: str
) -> float:
    """Bits a byte of `text`, of at most `windows` rows of `window` predicted tokens.

    Raises:
      ValueError: the text is shorter than a row.
    """
    tokens = np.asarray(tokenizer.encode(text))
    rows = min(windows, (len(tokens) - 1) // window)
    require(rows >= 1, "text", len(tokens), f"must have more than {window} tokens, --window")
    batch = np.stack([tokens[i * window : (i + 1) * window + 1] for i in range(rows)])
    size = sum(len(tokenizer.decode(row.tolist()).encode()) - len(tokenizer.decode(row[:1].tolist()).encode())
               for row in batch)
    losses = np.asarray(cached_losses(model, params, jnp.asarray(batch), cache_dtype), np.float64)
    return float(losses.sum()) / math.log(2) / size


def main(config: CachePrecisionConfig) -> None:
    if config.workdir is not None:
        trained = load_trained(config.workdir)
        model, params, tokenizer = trained.model, trained.params, trained.tokenizer
    else:
        folder = Path(str(config.llama))
        model_config, params = load_pretrained(folder)
        model, tokenizer = Transformer(model_config), load_tokenizer(folder / config.tokenizer)
    text = Path(config.text).read_text()
    for cache_dtype in config.cache_dtypes:
        found = bits_per_byte(model, params, tokenizer, text, window=config.window, windows=config.windows,
                              cache_dtype=cache_dtype)
        print(json.dumps({"variant": model.config.attention.variant, "cache_dtype": cache_dtype,
                          "bits_per_byte": round(found, 5)}), flush=True)


if __name__ == "__main__":
    cli.run(lambda: main(cli.parse(CachePrecisionConfig)))
