"""Toy checkpoints of each family against `transformers`, both ways; skipped where torch is not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from mfa_jax.convert import load_pretrained, save_pretrained
from mfa_jax.model.transformer import Transformer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.slow,
    # Both come from inside transformers and torch, whatever is asked of them.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore::FutureWarning"),
]

SIZES: dict[str, Any] = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16, "rope_theta": 5e5}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
CASES = [
    ("Llama", "llama", PLAIN, {"tie_word_embeddings": True}), ("Llama", "llama", LLAMA3, {}),
    ("Llama", "llama", LINEAR, {"num_key_value_heads": 1}), ("Mistral", "mistral", PLAIN, {"sliding_window": None}),
    ("Mistral", "mistral", YARN, {"sliding_window": None, "num_key_value_heads": 4}),
    ("Qwen2", "qwen2", YARN, {"head_dim": 8}), ("Qwen2", "qwen2", PLAIN, {"tie_word_embeddings": True, "head_dim": 8}),
    ("Qwen3", "qwen3", PLAIN, {}), ("Qwen3", "qwen3", YARN, {"tie_word_embeddings": True}),
]
TOKENS = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, 60))


def theirs(folder: Path) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.parametrize(("name", "model_type", "rope", "changes"), CASES)
def test_both_ways(tmp_path: Path, name: str, model_type: str, rope: dict[str, Any], changes: dict[str, Any]) -> None:
    """Theirs read by ours gives their logits; ours written gives their tensors, bit for bit, and their logits."""
    torch.manual_seed(0)
    sizes = {**SIZES, **changes, "rope_parameters": rope}
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes))
    with torch.no_grad():
        # As they are made, biases are zero and scales one.
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    expected = theirs(tmp_path / "theirs")

    config, params = load_pretrained(tmp_path / "theirs")
    logits, _ = jax.jit(Transformer(config).apply)({"params": params}, TOKENS)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())

    save_pretrained(tmp_path / "ours", config, params, context_length=128, model_type=model_type, shard_bytes=20_000)
    files = [{key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
             for folder in (tmp_path / "theirs", tmp_path / "ours")]
    assert set(files[0]) == set(files[1])
    for key in files[0]:
        np.testing.assert_array_equal(files[0][key], files[1][key], err_msg=key)
    np.testing.assert_array_equal(theirs(tmp_path / "ours"), expected)
    assert load_pretrained(tmp_path / "ours")[0] == config
