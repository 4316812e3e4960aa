"""GGUF files: toy ones that are written here, and SmolLM2-135M-Instruct, four bits a weight, against golden losses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest

from mfa_jax.config import ModelConfig
from mfa_jax.convert import load_pretrained, pretrained_tokenizer
from mfa_jax.model.transformer import Transformer
from tests.smollm2 import smollm2
from tests.test_convert_checkpoint import CONFIG, L, N, forward, make_tensors, write

gguf = pytest.importorskip("gguf", reason="reading .gguf files needs gguf: pip install 'mfa_jax[gguf]'")
TOKENS = np.random.default_rng(1).integers(0, CONFIG["vocab_size"], 40)
NAMES = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
         "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
         "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


def pairs(name: str, tensor: np.ndarray) -> np.ndarray:
    """As llama.cpp keeps queries and keys: a head's rows in pairs that turn together."""
    heads = {"q_proj": N, "k_proj": CONFIG["num_key_value_heads"]}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    return tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)


def write_gguf(path: Path, tensors: dict[str, np.ndarray], more: Any = None, architecture: str = "llama",
               names: dict[str, str] = NAMES) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(L)
    writer.add_embedding_length(CONFIG["hidden_size"])
    writer.add_feed_forward_length(CONFIG["intermediate_size"])
    writer.add_head_count(N)
    writer.add_head_count_kv(CONFIG["num_key_value_heads"])
    writer.add_key_length(CONFIG["head_dim"])
    writer.add_layer_norm_rms_eps(CONFIG["rms_norm_eps"])
    writer.add_rope_freq_base(CONFIG["rope_theta"])
    writer.add_context_length(256)
    if more is not None:
        more(writer)
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
             "lm_head.weight": "output.weight"}
    for name, tensor in tensors.items():
        parts = name.split(".")
        theirs = whole.get(name) or f"blk.{parts[2]}.{names['.'.join(parts[3:-1])]}.{parts[-1]}"
        tensor = tensor.astype(np.float32)
        writer.add_tensor(theirs, pairs(name, tensor) if architecture == "llama" else tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama3_factors(writer: Any) -> None:
    """The scaling of `CONFIG` as such files keep it: what each frequency is divided by."""
    wavelengths = 2 * np.pi * 100.0 ** (2 * np.arange(4) / 8)
    smooth = np.clip((32 / wavelengths - 1) / (4 - 1), 0, 1)
    writer.add_tensor("rope_freqs.weight", (1 / ((1 - smooth) / 8 + smooth)).astype(np.float32))


def test_a_toy_file_against_numpy(tmp_path: Path) -> None:
    tensors = make_tensors()
    config, params = load_pretrained(write_gguf(tmp_path / "toy.gguf", tensors, llama3_factors))
    logits, _ = jax.jit(Transformer(config).apply)({"params": params}, TOKENS[None])
    np.testing.assert_allclose(logits[0], forward(tensors, TOKENS), rtol=0, atol=2e-5)
    folder = tmp_path / "hf"
    folder.mkdir()
    plain = {key: value for key, value in CONFIG.items() if key != "rope_scaling"}
    expected, _ = load_pretrained(write(folder, tensors, plain))
    assert dataclasses.replace(config, inv_freq=None) == expected


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_qwen_files_keep_halves_biases_and_norms(tmp_path: Path, family: str) -> None:
    plain = {key: value for key, value in CONFIG.items() if key != "rope_scaling"}
    rng = np.random.default_rng(0)
    added = {"qwen2": {f"{name}.bias": (size,) for name, size in (("q_proj", 32), ("k_proj", 16), ("v_proj", 16))},
             "qwen3": {"q_norm.weight": (8,), "k_norm.weight": (8,)}}[family]
    tensors = make_tensors() | {f"model.layers.{i}.self_attn.{name}": rng.normal(size=size).astype(np.float32)
                                for i in range(L) for name, size in added.items()}
    norms = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
    path = write_gguf(tmp_path / "toy.gguf", tensors, architecture=family, names=NAMES | norms)
    folder = tmp_path / "hf"
    folder.mkdir()
    expected = load_pretrained(write(folder, tensors, {**plain, "model_type": family}))
    config, params = load_pretrained(path)
    assert config == expected[0]
    chex.assert_trees_all_equal(params, expected[1])


def test_rope_scaling_of_a_file(tmp_path: Path) -> None:
    def read(*settings: tuple[str, Any]) -> ModelConfig:
        def more(writer: Any) -> None:
            for name, value in settings:
                getattr(writer, name)(value)

        return load_pretrained(write_gguf(tmp_path / "toy.gguf", make_tensors(), more))[0]

    assert read(("add_rope_scaling_type", gguf.RopeScalingType.NONE)).position.scaling is None
    linear = read(("add_rope_scaling_type", gguf.RopeScalingType.LINEAR), ("add_rope_scaling_factor", 2.0))
    assert (linear.position.scaling.kind, linear.position.scaling.factor) == ("linear", 2.0)
    yarn = read(("add_rope_scaling_type", gguf.RopeScalingType.YARN), ("add_rope_scaling_factor", 4.0),
                ("add_rope_scaling_orig_ctx_len", 64))
    assert (yarn.position.scaling.kind, yarn.position.scaling.original_max_positions) == ("yarn", 64)
    with pytest.raises(NotImplementedError, match="longrope"):
        read(("add_rope_scaling_type", gguf.RopeScalingType.LONGROPE))
    with pytest.raises(NotImplementedError, match="sliding_window=7"):
        read(("add_sliding_window", 7))


def test_files_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        load_pretrained(tmp_path / "absent.gguf")
    (tmp_path / "other.gguf").write_bytes(b"not one of them, whatever its name")
    with pytest.raises(ValueError, match="is not a GGUF file"):
        load_pretrained(tmp_path / "other.gguf")
    tensors = make_tensors()
    with pytest.raises(NotImplementedError, match="general.architecture='gemma'"):
        load_pretrained(write_gguf(tmp_path / "gemma.gguf", tensors, architecture="gemma"))
    with pytest.raises(NotImplementedError, match="tokenizer.ggml.model=None.*give the tokenizer.json"):
        pretrained_tokenizer(write_gguf(tmp_path / "toy.gguf", tensors))
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight \(.*\)'?: these tensors are missing"):
        load_pretrained(write_gguf(tmp_path / "toy.gguf", tensors))


@pytest.mark.slow
def test_smollm2_against_golden_losses(data_dir: Path) -> None:
    """Golden: `transformers` in float32 on the same weights, dequantised."""
    path = smollm2()
    golden = np.load(data_dir / "models" / "smollm2-135m" / "golden_hf_fp32.npz")
    ids = golden["ids"]
    config, params = load_pretrained(path)
    logits, _ = jax.jit(Transformer(config).apply)({"params": params}, ids[None])
    log_p = np.asarray(jax.nn.log_softmax(logits[0]), np.float64)
    np.testing.assert_allclose(-log_p[np.arange(511), ids[1:]], golden["nll"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits[0, :8], golden["logits_first8"], rtol=0, atol=2e-4)
    tokenizer = pretrained_tokenizer(path)
    assert tokenizer.encode(tokenizer.decode(ids)).tolist() == ids.tolist()
    assert tokenizer.chat_template is not None and "<|im_start|>" in tokenizer.chat_template
