"""GGUF files: toy ones that are written here, and SmolLM2-135M-Instruct, four bits a weight, against golden losses."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest
import tokenizers

from mfa_jax.config import ModelConfig, RopeScaling
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


def test_factors_of_llama3_are_its_scaling(tmp_path: Path) -> None:
    """So that the model can be written back. Of other factors a config.json has no name."""
    def read(factors: np.ndarray) -> ModelConfig:
        def more(writer: Any) -> None:
            del writer.kv_data[0]["llama.rope.freq_base"]
            writer.add_rope_freq_base(5e5)
            writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))

        return load_pretrained(write_gguf(tmp_path / "toy.gguf", make_tensors(), more))[0]

    wavelengths = 2 * np.pi * 5e5 ** (2 * np.arange(4) / 8)
    smooth = np.clip((8192 / wavelengths - 1) / (4 - 1), 0, 1)
    factors = 1 / ((1 - smooth) / 32 + smooth)
    assert factors.tolist()[:2] == [1, 1] and factors[3] == 32
    config = read(factors)
    assert config.inv_freq is None and config.position.scaling == RopeScaling("llama3", 32.0, 8192, 1.0, 4.0)
    assert read(np.ones(4)).position.scaling is None and read(np.ones(4)).inv_freq is None
    own = read(np.array([1.0, 2.0, 3.0, 4.0]))
    assert own.position.scaling is None
    np.testing.assert_allclose(own.inv_freq[1], 1 / (wavelengths / (2 * np.pi)) / [1, 2, 3, 4], rtol=1e-6)


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
    def read(*settings: tuple[Any, ...]) -> ModelConfig:
        def more(writer: Any) -> None:
            for name, *values in settings:
                getattr(writer, name)(*values)

        return load_pretrained(write_gguf(tmp_path / "toy.gguf", make_tensors(), more))[0]

    assert read(("add_rope_scaling_type", gguf.RopeScalingType.NONE)).position.scaling is None
    linear = read(("add_rope_scaling_type", gguf.RopeScalingType.LINEAR), ("add_rope_scaling_factor", 2.0))
    assert (linear.position.scaling.kind, linear.position.scaling.factor) == ("linear", 2.0)
    yarn = read(("add_rope_scaling_type", gguf.RopeScalingType.YARN), ("add_rope_scaling_factor", 4.0),
                ("add_rope_scaling_orig_ctx_len", 64))
    assert (yarn.position.scaling.kind, yarn.position.scaling.original_max_positions) == ("yarn", 64)
    assert read(("add_rope_scaling_factor", 4.0)).position.scaling == RopeScaling("linear", 4.0)
    old = ("add_float32", "llama.rope.scale_linear")
    assert read((*old, 4.0)).position.scaling == RopeScaling("linear", 4.0)
    assert read((*old, 4.0), ("add_rope_scaling_factor", 2.0)).position.scaling == RopeScaling("linear", 2.0)
    for same in ((*old, 1.0), (*old, 0.0), ("add_rope_scaling_factor", 1.0), ("add_rope_scaling_factor", 0.0),
                 ("add_rope_scaling_type", gguf.RopeScalingType.LINEAR)):
        assert read(same).position.scaling is None
    none = ("add_rope_scaling_type", gguf.RopeScalingType.NONE)
    assert read(none, ("add_rope_scaling_factor", 4.0)).position.scaling is None
    with pytest.raises(NotImplementedError, match=r"rope_freqs.weight beside rope_scaling=.*4.0"):
        read(("add_rope_scaling_factor", 4.0), ("add_tensor", "rope_freqs.weight", np.ones(4, np.float32)))
    assert read(("add_rope_dimension_count", 8)).attention.head_dim == 8
    with pytest.raises(NotImplementedError, match="llama.rope.dimension_count=4: rope turns whole heads only, of 8 "):
        read(("add_rope_dimension_count", 4))
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
    with pytest.raises(NotImplementedError, match="tokenizer.ggml.model=None.*name a tokenizer.json"):
        pretrained_tokenizer(write_gguf(tmp_path / "toy.gguf", tensors))
    with pytest.raises(ValueError, match=r"tokenizer='.*tokenizer.json': no such file"):
        pretrained_tokenizer(tmp_path / "toy.gguf", "tokenizer.json")
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "</s>": 1}, [])).save(str(tmp_path / "tokenizer.json"))
    assert pretrained_tokenizer(tmp_path / "toy.gguf", "tokenizer.json").encode("a").tolist() == [0]
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"'missing: model.layers.1.mlp.up_proj.weight \(24, 16\)'"):
        load_pretrained(write_gguf(tmp_path / "toy.gguf", tensors))


def test_a_file_that_is_cut_short(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "toy.gguf", make_tensors()).read_bytes()
    header = whole.index(b"output_norm.weight") + 100
    for size in (*range(0, header, 5), len(whole) - 100):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"checkpoint='.*cut.gguf': is not a GGUF file, or is cut short"):
            load_pretrained(tmp_path / "cut.gguf")


@pytest.mark.parametrize(("name", "shape"), [("self_attn.q_proj", (30, 16)), ("self_attn.k_proj", (9, 16))])
def test_rows_that_heads_do_not_divide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, shape: tuple[int, ...]
) -> None:
    name = f"model.layers.1.{name}.weight"
    expected = make_tensors()[name].shape
    monkeypatch.setattr("tests.test_convert_gguf.pairs", lambda name, tensor: tensor)
    path = write_gguf(tmp_path / "toy.gguf", make_tensors() | {name: np.ones(shape)})
    with pytest.raises(ValueError, match=re.escape(f"'of another shape: {name} {shape} instead of {expected}'")):
        load_pretrained(path)


def test_settings_that_are_refused(tmp_path: Path) -> None:
    def read(*settings: tuple[Any, ...]) -> ModelConfig:
        def more(writer: Any) -> None:
            for name, *values in settings:
                if values[0] in writer.kv_data[0]:
                    del writer.kv_data[0][values[0]]
                getattr(writer, name)(*values)

        return load_pretrained(write_gguf(tmp_path / "toy.gguf", make_tensors(), more))[0]

    heads = "llama.attention.head_count_kv"
    assert read(("add_array", heads, [2, 2])) == read()
    with pytest.raises(NotImplementedError, match=rf"{heads}=\[2, 1\]: differs by layer"):
        read(("add_array", heads, [2, 1]))
    with pytest.raises(ValueError, match="llama.attention.head_count='four': must be in the file, an integer"):
        read(("add_string", "llama.attention.head_count", "four"))
    assert read(("add_uint16", "split.count", 1)) == read()
    with pytest.raises(NotImplementedError, match=r"split.count=3: .*toy.gguf is a part of a file"):
        read(("add_uint16", "split.count", 3))
    with pytest.raises(NotImplementedError, match="split.count=3"):
        pretrained_tokenizer(tmp_path / "toy.gguf")


def toy_tokenizer(path: Path, rules: str = "gpt-2", **change: Any) -> Any:
    """Of `abc`, which merges don't reach, and an end token; `change` replaces a list, or leaves it out."""
    lists = {"token_list": ["a", "b", "c", "bc", "ab", "abc", "<end>"], "token_merges": ["b c", "a b", "ab c"],
             "token_types": [1] * 6 + [3], **change}

    def more(writer: Any) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(rules)
        writer.add_eos_token_id(lists.pop("eos", 6))
        for name, values in lists.items():
            if values is not None:
                getattr(writer, f"add_{name}")(values)

    return pretrained_tokenizer(write_gguf(path, make_tensors(), more))


@pytest.mark.parametrize("rules", ["gpt-2", "smollm", "llama-bpe", "llama3", "qwen2", "deepseek-r1-qwen"])
def test_words_of_the_vocabulary_before_merges(tmp_path: Path, rules: str) -> None:
    """As in llama.cpp, and in Llama 3's tokenizer.json: `b c` comes first, and no merge makes `abc` of `a bc`."""
    tokenizer = toy_tokenizer(tmp_path / "toy.gguf", rules)
    assert tokenizer.encode("abc").tolist() == ([5] if rules.startswith("llama") else [0, 3])
    assert tokenizer.encode("abcc").tolist() == [0, 3, 2] and tokenizer.eos_id == 6


@pytest.mark.parametrize(("change", "message"), [
    ({"token_list": None}, "tokenizer.ggml.tokens=None: is missing from the file"),
    ({"token_merges": None}, "tokenizer.ggml.merges=None: is missing"),
    ({"token_types": None}, "tokenizer.ggml.token_type=None: is missing .*; name a tokenizer.json"),
    ({"token_types": [1] * 6}, "tokenizer.ggml.token_type='6 types': must have one for each of 7 tokens"),
    ({"token_merges": ["a x"]}, "tokenizer.ggml.merges='a x': must be two tokens that together are a third"),
    ({"token_merges": ["a c"]}, "tokenizer.ggml.merges='a c'"),
    ({"token_merges": ["abc"]}, "tokenizer.ggml.merges='abc "),
    ({"token_merges": ["a b c"]}, "tokenizer.ggml.merges='a b c'"),
    ({"eos": 7}, "tokenizer.ggml.eos_token_id=7: must be below 7 tokens"),
])
def test_tokenizers_that_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        toy_tokenizer(tmp_path / "toy.gguf", **change)


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
