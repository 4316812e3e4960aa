"""Losses through a cache of each type, of a trained model."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.cache_precision import CachePrecisionConfig, bits_per_byte, cached_losses
from mfa_jax.convert import load_pretrained
from mfa_jax.data import load_tokenizer
from mfa_jax.model.transformer import Transformer


@pytest.fixture(scope="module")
def stories(data_dir: Path) -> Path:
    path = data_dir / "models" / "stories260K"
    if not path.is_dir():
        pytest.skip(f"no checkpoint at {path}")
    return path


def test_a_float32_cache_gives_the_losses_of_the_full_forward(stories: Path) -> None:
    config, params = load_pretrained(stories)
    tokens = jnp.asarray(np.load(stories / "golden_stories260K_fp64.npz")["ids"][None, :97], jnp.int32)
    logits, _ = Transformer(config).apply({"params": params}, tokens[:, :-1])
    wanted = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)[..., 0]
    found = cached_losses(Transformer(config), params, tokens, "float32")
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


def test_eight_bits_cost_a_trained_model_hundredths_of_a_bit(stories: Path) -> None:
    """Heads of width 8 are the worst case of a scale a token; bfloat16 is another three times closer than int8.

    float8_e4m3fn has 3 bits of fraction: off by 2 ** -4 at most, where int8 is by 2 ** -8 of the largest.
    """
    config, params = load_pretrained(stories)
    tokenizer = load_tokenizer(stories / "tok512.bin")
    text = (stories / "stories260K.md").read_text().split("-t 0.0\n")[1].split("\n```")[0]
    bits = {name: bits_per_byte(Transformer(config), params, tokenizer, text, window=64, windows=3, cache_dtype=name)
            for name in ("float32", "bfloat16", "int8", "float8_e4m3fn")}
    assert 0 < bits["float32"] < 2
    assert abs(bits["bfloat16"] - bits["float32"]) < 0.003 and abs(bits["int8"] - bits["float32"]) < 0.01
    assert abs(bits["float8_e4m3fn"] - bits["float32"]) < 0.02
    assert len(set(bits.values())) == 4


@pytest.mark.parametrize(("changes", "message"), [
    ({}, "workdir=None: give either"), ({"workdir": "a", "llama": "b"}, "workdir='a': give either"),
    ({"workdir": "a", "window": 12}, "window=12: must be a positive multiple of 8"),
    ({"workdir": "a", "windows": 0}, "windows=0: must be positive"),
])
def test_bad_input_is_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CachePrecisionConfig(text="x", **changes)


def test_a_text_shorter_than_a_row_is_refused(stories: Path) -> None:
    config, params = load_pretrained(stories)
    with pytest.raises(ValueError, match="must have more than 64 tokens"):
        bits_per_byte(Transformer(config), params, load_tokenizer(stories / "tok512.bin"), "Once", window=64,
                      windows=1, cache_dtype="int8")
