"""Checkpoints read: a trained Llama against its float64 logits and golden text, synthetic ones against numpy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import chex
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mfa_jax import axes
from mfa_jax.config import GQAConfig, RopeScaling
from mfa_jax.convert import config_from_hf, load_pretrained
from mfa_jax.data import load_tokenizer
from mfa_jax.generate import SamplingConfig, generate
from mfa_jax.model.transformer import Transformer

D, N, K, H, F, V, L = 16, 4, 2, 8, 24, 40, 2
CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": D, "num_attention_heads": N, "num_key_value_heads": K, "head_dim": H,
    "intermediate_size": F, "vocab_size": V, "num_hidden_layers": L, "rms_norm_eps": 1e-4, "hidden_act": "silu",
    "tie_word_embeddings": False, "max_position_embeddings": 256, "attention_bias": False, "mlp_bias": False,
    "rope_theta": 100.0,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 32},
}
SHAPES = {
    "model.embed_tokens.weight": (V, D), "lm_head.weight": (V, D), "model.norm.weight": (D,),
    **{f"model.layers.{i}.{name}.weight": shape for i in range(L) for name, shape in {
        "input_layernorm": (D,), "post_attention_layernorm": (D,), "self_attn.q_proj": (N * H, D),
        "self_attn.k_proj": (K * H, D), "self_attn.v_proj": (K * H, D), "self_attn.o_proj": (D, N * H),
        "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}.items()},
}


def make_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: (rng.standard_normal(shape) * 0.3 + (len(shape) == 1)).astype(ml_dtypes.bfloat16)
            for name, shape in SHAPES.items()}


def write(folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any] = CONFIG, shards: int = 1) -> Path:
    """A checkpoint folder as Hugging Face writes it: one file, or shards and their index."""
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    files = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def forward(tensors: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Logits [T, V] of one row by the published formulas, in float64, head by head, with the scaling of `CONFIG`."""
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-4) * w[name]

    def frequency(j: int) -> float:
        wavelength = 2 * math.pi * 100.0 ** (2 * j / H)
        if wavelength < 32 / 4:
            return 2 * math.pi / wavelength
        if wavelength > 32 / 1:
            return 2 * math.pi / wavelength / 8
        smooth = (32 / wavelength - 1) / (4 - 1)
        return 2 * math.pi / wavelength * ((1 - smooth) / 8 + smooth)

    def turn(x: np.ndarray) -> np.ndarray:
        angles = np.arange(len(x))[:, None] * np.array([frequency(j) for j in range(H // 2)])
        turned = (x[:, : H // 2] + 1j * x[:, H // 2 :]) * np.exp(1j * angles)
        return np.concatenate([turned.real, turned.imag], axis=1)

    x = w["model.embed_tokens.weight"][tokens]
    for i in range(L):
        at = f"model.layers.{i}."
        h = norm(x, at + "input_layernorm.weight")
        q, k, v = (h @ w[f"{at}self_attn.{name}_proj.weight"].T for name in "qkv")
        heads = []
        for n in range(N):
            own, shared = slice(n * H, n * H + H), slice(n // (N // K) * H, n // (N // K) * H + H)
            scores = turn(q[:, own]) @ turn(k[:, shared]).T / math.sqrt(H)
            scores[np.triu_indices(len(x), 1)] = -np.inf
            a = np.exp(scores - scores.max(1, keepdims=True))
            heads.append(a / a.sum(1, keepdims=True) @ v[:, shared])
        x = x + np.concatenate(heads, 1) @ w[at + "self_attn.o_proj.weight"].T
        h = norm(x, at + "post_attention_layernorm.weight")
        gate, up = (h @ w[f"{at}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[at + "mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ w["lm_head.weight"].T


@pytest.fixture(scope="module")
def stories(data_dir: Path) -> Path:
    path = data_dir / "models" / "stories260K"
    if not path.is_dir():
        pytest.skip(f"no checkpoint at {path}")
    return path


def test_logits_of_a_trained_model(stories: Path) -> None:
    config, params = load_pretrained(stories)
    golden = np.load(stories / "golden_stories260K_fp64.npz")
    logits, _ = jax.jit(Transformer(config).apply)({"params": params}, golden["ids"][None])
    assert golden["logits"].shape == logits.shape[1:] == (100, 512)
    np.testing.assert_allclose(np.asarray(logits[0], np.float64), golden["logits"], rtol=0, atol=1e-4)


def test_greedy_decoding_continues_the_golden_text(stories: Path) -> None:
    """256 tokens after the begin token, which is where llama2.c stops by itself."""
    config, params = load_pretrained(stories)
    tokenizer = load_tokenizer(stories / "tok512.bin")
    golden = (stories / "stories260K.md").read_text().split("-t 0.0\n")[1].split("\n```")[0]
    assert golden.startswith("Once upon a time") and len(golden) > 500
    assert tokenizer.bos_id == 1
    found = generate(Transformer(config), params, [[tokenizer.bos_id]], [1], SamplingConfig(temperature=0),
                     jax.random.key(0), max_new_tokens=256, stop_tokens=[tokenizer.bos_id, tokenizer.eos_id])
    assert tokenizer.decode([tokenizer.bos_id, *np.asarray(found.tokens)[0].tolist()]) == golden


def test_sharded_bfloat16_checkpoint_against_numpy(tmp_path: Path) -> None:
    tensors = make_tensors()
    config, params = load_pretrained(write(tmp_path, tensors, shards=3))
    tokens = np.random.default_rng(1).integers(0, V, 40)
    logits, _ = jax.jit(Transformer(config).apply)({"params": params}, tokens[None])
    np.testing.assert_allclose(logits[0], forward(tensors, tokens), rtol=0, atol=2e-5)


def test_each_leaf_lands_where_it_belongs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a mesh: the same numbers, each leaf with the sharding of the rules, no device's read larger than its part."""
    write(tmp_path, make_tensors(), shards=2)
    _, whole = load_pretrained(tmp_path)
    mesh = axes.make_mesh((2, 2, 1, 1, 2))
    sizes: dict[tuple[int, ...], set[int]] = {}
    make = jax.make_array_from_callback

    def watched(shape: Any, where: Any, callback: Any) -> jax.Array:
        def noted(index: Any) -> Any:
            part = callback(index)
            sizes.setdefault(shape, set()).add(part.size)
            return part

        return make(shape, where, noted)

    monkeypatch.setattr(jax, "make_array_from_callback", watched)
    _, params = load_pretrained(tmp_path, param_dtype="bfloat16", mesh=mesh)
    chex.assert_trees_all_equal(jax.tree.map(lambda x: np.asarray(x, np.float32), params),
                                jax.tree.map(np.asarray, whole))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    attention = params["layers"]["attention"]
    assert attention["W_Q"].sharding.spec == axes.RULES.spec("layers", "embed", "heads", "head_dim")
    assert attention["W_O"].sharding.shard_shape(attention["W_O"].shape) == (L, N // 2, H, D // 2)
    assert params["unembed"].sharding.shard_shape((V, D)) == (V // 2, D // 2)
    assert sizes[(L, D, N, H)] == {L * D * N * H // 4} and sizes[(L, F, D)] == {L * F * D // 4}


def test_tied_and_old_checkpoints(tmp_path: Path) -> None:
    """Tied embeddings with or without a copy of the table; rope frequencies in the file; files of any name."""
    tensors = make_tensors()
    tied = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"],
            "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(H // 2, np.float32)}
    write(tmp_path, tied, {**CONFIG, "tie_word_embeddings": True})
    (tmp_path / "model.safetensors").rename(tmp_path / "tiny.hf.safetensors")
    config, params = load_pretrained(tmp_path, dtype="bfloat16")
    assert config.tie_embeddings and "unembed" not in params and config.dtype == "bfloat16"
    np.testing.assert_array_equal(params["embed"], tensors["model.embed_tokens.weight"].astype(np.float32))
    del tied["lm_head.weight"]
    write(tmp_path, tied, {**CONFIG, "tie_word_embeddings": True})
    chex.assert_trees_all_equal(load_pretrained(tmp_path)[1], params)
    write(tmp_path, tensors, {**CONFIG, "tie_word_embeddings": True})
    with pytest.raises(ValueError, match=r"tie_word_embeddings=True: must be false, lm_head.weight differs"):
        load_pretrained(tmp_path)


def test_what_a_config_may_leave_out() -> None:
    required = ("model_type", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size",
                "num_hidden_layers")
    config = config_from_hf({name: CONFIG[name] for name in required})
    assert config.attention == GQAConfig(num_heads=N, num_kv_heads=N, head_dim=D // N)
    assert (config.position.base, config.position.scaling) == (10000.0, None)
    assert (config.norm_eps, config.tie_embeddings) == (1e-6, False)
    for name in required[1:]:
        with pytest.raises(ValueError, match=f"{name}=None: is missing"):
            config_from_hf({key: CONFIG[key] for key in required if key != name})


def test_qwen_families() -> None:
    """Qwen2 has biases and Qwen3 norms of heads, whatever the file says; both have a window only where it is used."""
    qwen2 = config_from_hf({**CONFIG, "model_type": "qwen2", "sliding_window": 128})
    assert qwen2.attention == GQAConfig(num_heads=N, num_kv_heads=K, head_dim=H, qkv_bias=True)
    given = {**CONFIG, "model_type": "qwen3", "use_sliding_window": False, "layer_types": ["full_attention"] * L}
    qwen3 = config_from_hf({key: value for key, value in given.items() if key != "head_dim"})
    assert qwen3.attention == GQAConfig(num_heads=N, num_kv_heads=K, head_dim=128, qk_norm=True, norm_eps=1e-4)
    for change in ({"use_sliding_window": True, "sliding_window": 8}, {"layer_types": ["sliding_attention"] * L}):
        with pytest.raises(NotImplementedError, match="sliding_window"):
            config_from_hf({**given, **change})
    with pytest.raises(NotImplementedError, match="attention_bias=True"):
        config_from_hf({**given, "attention_bias": True})


def test_mistral_without_a_window_is_a_llama() -> None:
    mistral = {**CONFIG, "model_type": "mistral"}
    assert config_from_hf({**mistral, "sliding_window": None}) == config_from_hf(CONFIG)
    with pytest.raises(NotImplementedError, match="sliding_window=4096"):  # the value that Mistral configs leave out
        config_from_hf(mistral)
    with pytest.raises(NotImplementedError, match="sliding_window=128"):  # a field that Mistral does not have
        config_from_hf({**mistral, "sliding_window": 128, "use_sliding_window": False})


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("rope", "base", "scaling"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
        ({"rope_theta": 1e6, "rope_scaling": None}, 1e6, None),
        ({"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2}}, 1e6, RopeScaling("linear", 2.0)),
        ({"rope_theta": 5e5, "rope_scaling": CONFIG["rope_scaling"]}, 5e5, RopeScaling("llama3", 8.0, 32)),
        ({"rope_parameters": {**YARN, "rope_theta": 7.0, "finetuned": True}}, 7.0, RopeScaling("yarn", 4.0, 64)),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, 1e4, RopeScaling("yarn", 4.0, 256)),
        ({"rope_scaling": {**YARN, "factor": None}}, 1e4, RopeScaling("yarn", 4.0, 64)),
        ({"rope_scaling": {**YARN, "beta_fast": 16, "beta_slow": 2, "attention_factor": 1.5}}, 1e4,
         RopeScaling("yarn", 4.0, 64, beta_fast=16.0, beta_slow=2.0, attention_factor=1.5)),
        # transformers 5.23.0 computes this magnitude for factor 40, mscale 1, mscale_all_dim 0.5.
        ({"rope_scaling": {**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.5}}, 1e4,
         RopeScaling("yarn", 40.0, 64, attention_factor=1.1557219901962608)),
    ],
)
def test_rope_settings(rope: dict[str, Any], base: float, scaling: RopeScaling | None) -> None:
    plain = {key: value for key, value in CONFIG.items() if not key.startswith("rope_")}
    position = config_from_hf({**plain, **rope}).position
    assert (position.base, position.scaling) == (base, scaling)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model_type": "gemma"}, NotImplementedError, "model_type='gemma'"),
        ({"model_type": None}, NotImplementedError, "model_type=None"),
        ({"attention_bias": True}, NotImplementedError, "attention_bias=True"),
        ({"mlp_bias": True}, NotImplementedError, "mlp_bias=True"),
        ({"sliding_window": 128}, NotImplementedError, "sliding_window=128"),
        ({"quantization_config": {"bits": 4}}, NotImplementedError, "quantization_config"),
        ({"is_causal": False}, NotImplementedError, "is_causal=False: every layer here is causal"),
        ({"hidden_act": "gelu"}, NotImplementedError, "hidden_act='gelu'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, NotImplementedError, "'dynamic'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, NotImplementedError, "'longrope'"),
        ({"rope_scaling": {**YARN, "truncate": False}}, NotImplementedError, "truncate"),
        ({"rope_scaling": {**YARN, "short_factor": [1.0]}}, NotImplementedError, "short_factor"),
        ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, NotImplementedError, "partial"),
        ({"partial_rotary_factor": 0.5}, NotImplementedError, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "linear"}}, ValueError, "factor=None: is missing"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ValueError, "low_freq_factor=None: is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, ValueError, "factor=0.5"),
        ({"hidden_size": "16"}, ValueError, "hidden_size='16'"),
        ({"head_dim": 7}, ValueError, "head_dim=7"),
        ({"head_dim": None, "num_attention_heads": 3}, ValueError, "num_attention_heads=3: must divide hidden_size=16"),
        ({"num_key_value_heads": 3}, ValueError, "num_kv_heads=3"),
        ({"num_hidden_layers": 0}, ValueError, "num_layers=0"),
    ],
)
def test_configs_that_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        config_from_hf({**CONFIG, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model.norm.weight": None}, ValueError, r"'missing: model.norm.weight \(16,\)': must hold"),
        ({"lm_head.weight": None}, ValueError, r"'missing: lm_head.weight \(40, 16\)': must hold"),
        ({"model.layers.2.mlp.up_proj.weight": np.ones((F, D))}, ValueError, r"'left over: .*layers.2.*\(24, 16\)'"),
        ({"model.layers.1.self_attn.q_proj.bias": np.ones(N * H)}, ValueError, r"'left over: .*q_proj.bias"),
        ({"model.layers.1.self_attn.k_proj.weight": np.ones((N * H, D))}, ValueError,
         r"'of another shape: model.layers.1.self_attn.k_proj.weight \(32, 16\) instead of \(16, 16\)': must"),
        ({"model.layers.0.mlp.up_proj.weight": np.ones((D, F))}, ValueError,
         r"layers.0.mlp.up_proj.weight \(16, 24\) instead of \(24, 16\) \(it is transposed\)"),
        ({"model.norm.weight": np.ones(D, np.int8)}, NotImplementedError, "model.norm.weight is stored as I8"),
    ],
)
def test_tensors_that_are_refused(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    tensors = {name: tensor for name, tensor in {**make_tensors(), **change}.items() if tensor is not None}
    with pytest.raises(error, match=message):
        load_pretrained(write(tmp_path, tensors))


def test_all_that_is_wrong_is_named_at_once(tmp_path: Path) -> None:
    at = "model.layers.{}.self_attn.{}_proj.{}"
    gone = [at.format(i, name, "weight") for i in range(L) for name in "qko"]
    more = {at.format(i, name, "bias"): np.ones(3) for i in range(L) for name in "qkv"}
    misshapen = [at.format(i, "v", "weight") for i in range(L)]
    tensors = {name: tensor for name, tensor in make_tensors().items() if name not in gone}
    tensors |= more | dict.fromkeys(misshapen, np.ones((2, 3)))
    with pytest.raises(ValueError, match="^checkpoint='missing: .*; left over: .*; of another shape: ") as caught:
        load_pretrained(write(tmp_path, tensors))
    missing, left, shapes = str(caught.value).split(";")
    assert all(f"{name} {SHAPES[name]}" in missing for name in gone) and missing.count("model.") == 6
    assert all(f"{name} (3,)" in left for name in more) and left.count("model.") == 6
    assert all(f"{name} (2, 3) instead of (16, 16)" in shapes for name in misshapen) and shapes.count("model.") == 2
    write(tmp_path, {**make_tensors(), **{f"more.{i:02}": np.ones(1) for i in range(24)}})
    with pytest.raises(ValueError, match=r"left over: more.00 \(1,\), .* more.19 \(1,\) and 4 more'"):
        load_pretrained(tmp_path)


def test_indices_that_are_refused(tmp_path: Path) -> None:
    write(tmp_path, make_tensors(), shards=2)
    path = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    head, embed = "lm_head.weight", "model.embed_tokens.weight"
    assert (weight_map[head], weight_map[embed]) == (first, second)
    where = "weight_map of model.safetensors.index.json"
    swapped = rf"{head} in {second} \(it lies in {first}\), {embed} in {first} \(it lies in {second}\)"
    for given, message in (
            ({}, f"{where}={{}}: must name the file of each tensor"),
            ([], rf"{where}=\[\]: must be of type dict"),
            ({**weight_map, head: 1}, f"{where}: {head}=1: must be of type str"),
            ({**weight_map, head: None}, f"{where}: {head}=None: must be of type str"),
            ({**weight_map, head: second, embed: first}, f"{where}='{swapped}': must name the file that")):
        path.write_text(json.dumps({"weight_map": given}))
        with pytest.raises(ValueError, match=message):
            load_pretrained(tmp_path)
    path.write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "model.safetensors").write_bytes((tmp_path / first).read_bytes())  # transformers takes this one
    with pytest.raises(ValueError, match=r"must hold model.safetensors or model.safetensors.index.json .*, not both"):
        load_pretrained(tmp_path)


def test_folders_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json.*cannot be read"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ValueError, match=r"must hold \*\.safetensors"):
        load_pretrained(tmp_path)
    with pytest.raises(ValueError, match="dtype='float16'"):
        load_pretrained(tmp_path, dtype="float16")
    write(tmp_path, make_tensors(), shards=2)
    first = tmp_path / "model-00001-of-00002.safetensors"
    tensors = load_file(tmp_path / "model-00002-of-00002.safetensors")
    content = first.read_bytes()
    save_file(tensors, first)
    with pytest.raises(ValueError, match="00002-of-00002.*once more"):
        load_pretrained(tmp_path)
    first.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="model-00001-of-00002.*cannot be read"):
        load_pretrained(tmp_path)
    first.unlink()
    with pytest.raises(ValueError, match="model-00001-of-00002.*cannot be read"):
        load_pretrained(tmp_path)
    first.write_bytes(content)
    with pytest.raises(ValueError, match="does not divide over"):
        load_pretrained(tmp_path, mesh=axes.make_mesh((1, 1, 1, 1, 8)))
