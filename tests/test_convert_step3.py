"""Step-3's text model: names, config, and parity with models written here, in NumPy and in PyTorch, from the published
description."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn

from mfa_jax.config import GQAConfig, MFAConfig, MoEConfig, RopeScaling
from mfa_jax.convert import config_from_hf, load_pretrained, save_pretrained, step3
from mfa_jax.data import ByteTokenizer
from mfa_jax.layers import RMSNorm
from mfa_jax.model.moe import MoE
from mfa_jax.model.transformer import Transformer
from mfa_jax.presets import language_models
from tests.contract import compiled, model_config
from tests.test_convert_checkpoint import write
from tests.test_convert_save import equal_bits, tensors_of

D, N, C, Q, F, V, L = 16, 4, 8, 12, 24, 40, 4
E, A, EXPERT, SHARED = 5, 2, 8, 10
DENSE: dict[str, Any] = {
    "architectures": ["Step3TextForCausalLM"], "model_type": "step3_text", "hidden_size": D, "intermediate_size": F,
    "num_attention_heads": N, "num_attention_groups": 1, "num_hidden_layers": L, "vocab_size": V, "head_dim": C,
    "share_q_dim": Q, "rms_norm_eps": 1e-4, "rope_theta": 100.0, "rope_scaling": None, "max_position_embedding": 256,
    "moe_layers_enum": "-1",
}
CONFIG = {**DENSE, "moe_layers_enum": "1,2", "moe_num_experts": E, "moe_top_k": A, "moe_intermediate_size": EXPERT,
          "share_expert_dim": SHARED, "norm_expert_weight": False}
FOLDED = {**CONFIG, "moe_layers_enum": "0,1,2,3", "norm_expert_weight": True}
KINDS = pytest.mark.parametrize("given", [DENSE, CONFIG, FOLDED], ids=["dense", "experts", "all_experts"])
ATTENTION = {"q_proj": (Q, D), "k_proj": (C, D), "v_proj": (C, D), "inter_norm": (Q,), "wq": (N * C, Q),
             "o_proj": (D, N * C)}


def swiglu(module: str, width: int, experts: tuple[int, ...] = ()) -> dict[str, tuple[int, ...]]:
    return {f"{module}.gate_proj": (*experts, width, D), f"{module}.up_proj": (*experts, width, D),
            f"{module}.down_proj": (*experts, D, width)}


def make_tensors(given: dict[str, Any], dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Under the names, and with the shapes, of the released checkpoint."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (V, D), "lm_head": (V, D), "model.norm": (D,)}
    for i in range(given["num_hidden_layers"]):
        layer = {"input_layernorm": (D,), "post_attention_layernorm": (D,),
                 **{f"self_attn.{name}": shape for name, shape in ATTENTION.items()}}
        if str(i) in given["moe_layers_enum"].split(","):
            layer |= {"moe.gate": (E, D), **swiglu("moe", EXPERT, (E,)), **swiglu("share_expert", SHARED)}
        else:
            layer |= swiglu("mlp", F)
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    rng = np.random.default_rng(0)
    return {f"{name}.weight": (rng.standard_normal(shape) * 0.3 + (len(shape) == 1)).astype(dtype)
            for name, shape in shapes.items()}


def softmax(scores: np.ndarray) -> np.ndarray:
    """In the type of the scores."""
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def published(
    given: dict[str, Any], tensors: dict[str, np.ndarray], tokens: np.ndarray, dtype: Any = np.float32, wrong: str = "",
) -> np.ndarray:
    """Logits [T, V] of one row, token by token, head by head and expert by expert, from arXiv 2507.19427 and the
    released checkpoint's names: products are of `dtype` with sums in float32; a norm computes in float32 and is scaled
    after the cast back; softmax is float32, over all experts before the best are taken. `wrong` plants an error: norms
    that are cast back after they are scaled ("norm"), attention whose softmax is of `dtype` ("attention")."""
    w = {name: tensor.astype(dtype) for name, tensor in tensors.items()}

    def wide(x: np.ndarray) -> np.ndarray:
        return x.astype(np.float32)

    def product(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (wide(x) @ wide(y)).astype(dtype)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        scale, x = w[f"{name}.weight"], wide(x)
        normed = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(1e-4))
        return (normed * wide(scale)).astype(dtype) if wrong == "norm" else normed.astype(dtype) * scale

    def feed_forward(x: np.ndarray, module: str, expert: Any = ...) -> np.ndarray:
        gate, up, down = (w[f"{module}.{name}_proj.weight"][expert] for name in ("gate", "up", "down"))
        gated = wide(product(x, gate.T))
        return product((gated / (1 + np.exp(-gated))).astype(dtype) * product(x, up.T), down.T)

    def experts(x: np.ndarray, at: str) -> np.ndarray:
        scores = softmax(wide(x) @ wide(w[f"{at}moe.gate.weight"]).T)
        rows = []
        for t in range(len(x)):
            chosen = np.argsort(-scores[t], kind="stable")[:A]
            weights = scores[t, chosen] / (scores[t, chosen].sum() if given["norm_expert_weight"] else 1)
            rows.append(sum(wide(weight.astype(dtype)) * wide(feed_forward(x[t], f"{at}moe", e))
                            for weight, e in zip(weights, chosen, strict=True)).astype(dtype))
        return np.stack(rows) + feed_forward(x, f"{at}share_expert")

    angles = np.arange(len(tokens))[:, None] * 100.0 ** (-np.arange(0, C, 2) / C)
    cos, sin = wide(np.cos(angles)), wide(np.sin(angles))

    def turn(x: np.ndarray, t: int) -> np.ndarray:
        first, second = wide(x[: C // 2]), wide(x[C // 2 :])
        return np.concatenate([first * cos[t] - second * sin[t], second * cos[t] + first * sin[t]]).astype(dtype)

    x = w["model.embed_tokens.weight"][tokens]
    for i in range(given["num_hidden_layers"]):
        at = f"model.layers.{i}."
        a = norm(x, f"{at}input_layernorm")
        q, k, v = (product(a, w[f"{at}self_attn.{name}_proj.weight"].T) for name in "qkv")
        q = product(norm(q, f"{at}self_attn.inter_norm"), w[f"{at}self_attn.wq.weight"].T).reshape(-1, N, C)
        keys = np.stack([turn(k[t], t) for t in range(len(x))])
        rows = []
        for t in range(len(x)):
            scores = [wide(keys[: t + 1]) @ wide(turn(q[t, n], t)) * C**-0.5 for n in range(N)]
            heads = [softmax(s.astype(dtype if wrong == "attention" else np.float32)) for s in scores]
            rows.append(np.concatenate([product(p.astype(dtype), v[: t + 1]) for p in heads]))
        x = x + product(np.stack(rows), w[f"{at}self_attn.o_proj.weight"].T)
        a = norm(x, f"{at}post_attention_layernorm")
        x = x + (experts(a, at) if f"{at}moe.gate.weight" in w else feed_forward(a, f"{at}mlp"))
    return wide(norm(x, "model.norm")) @ wide(w["lm_head.weight"]).T


def in_torch(torch: Any, given: dict[str, Any], tensors: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """`published` in float32, in the language of the released models and with its operations."""
    w = {name: torch.tensor(tensor) for name, tensor in tensors.items()}

    def norm(x: Any, name: str) -> Any:
        wide = x.to(torch.float32)
        return w[f"{name}.weight"] * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-4)).to(x.dtype)

    def feed_forward(x: Any, module: str, expert: Any = ...) -> Any:
        gate, up, down = (w[f"{module}.{name}_proj.weight"][expert] for name in ("gate", "up", "down"))
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def experts(x: Any, at: str) -> Any:
        scores = torch.softmax((x @ w[f"{at}moe.gate.weight"].T).to(torch.float32), dim=-1)
        rows = []
        for t in range(len(x)):
            weights, chosen = torch.topk(scores[t], A)
            if given["norm_expert_weight"]:
                weights = weights / weights.sum()
            rows.append(sum(weight.to(x.dtype) * feed_forward(x[t], f"{at}moe", int(e))
                            for weight, e in zip(weights, chosen, strict=True)))
        return torch.stack(rows) + feed_forward(x, f"{at}share_expert")

    angles = torch.arange(len(tokens))[:, None] * 100.0 ** (-torch.arange(0, C, 2) / C)
    cos, sin = torch.cos(angles), torch.sin(angles)

    def turn(x: Any, t: int) -> Any:
        first, second = x[: C // 2], x[C // 2 :]
        return torch.cat([first * cos[t] - second * sin[t], second * cos[t] + first * sin[t]])

    x = w["model.embed_tokens.weight"][torch.tensor(tokens)]
    for i in range(L):
        at = f"model.layers.{i}."
        a = norm(x, f"{at}input_layernorm")
        q, k, v = (a @ w[f"{at}self_attn.{name}_proj.weight"].T for name in "qkv")
        q = (norm(q, f"{at}self_attn.inter_norm") @ w[f"{at}self_attn.wq.weight"].T).reshape(-1, N, C)
        keys = torch.stack([turn(k[t], t) for t in range(len(x))])
        rows = []
        for t in range(len(x)):
            heads = [torch.softmax((keys[: t + 1] @ turn(q[t, n], t) * C**-0.5).to(torch.float32), dim=0).to(x.dtype)
                     @ v[: t + 1] for n in range(N)]
            rows.append(torch.cat(heads))
        x = x + torch.stack(rows) @ w[f"{at}self_attn.o_proj.weight"].T
        a = norm(x, f"{at}post_attention_layernorm")
        x = x + (experts(a, at) if f"{at}moe.gate.weight" in w else feed_forward(a, f"{at}mlp"))
    return (norm(x, "model.norm") @ w["lm_head.weight"].T).numpy()


def ours(folder: Path, given: dict[str, Any], tokens: np.ndarray, dtype: str) -> np.ndarray:
    config, params = load_pretrained(write(folder, make_tensors(given), given, shards=2), dtype=dtype)
    return np.asarray(jax.jit(Transformer(config).apply)({"params": params}, tokens[None])[0])[0]


@KINDS
def test_parity_with_the_published_description(tmp_path: Path, given: dict[str, Any]) -> None:
    tokens = np.random.default_rng(1).integers(0, V, 30)
    expected = published(given, make_tensors(given), tokens)
    np.testing.assert_allclose(ours(tmp_path, given, tokens, "float32"), expected, rtol=0,
                               atol=1e-5 * np.abs(expected).max())


@KINDS
def test_parity_with_a_pytorch_model(tmp_path: Path, given: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch", reason="an independent model in PyTorch: pip install 'mfa_jax[bench]'")
    tokens = np.random.default_rng(1).integers(0, V, 30)
    expected = in_torch(torch, given, make_tensors(given), tokens)
    np.testing.assert_allclose(ours(tmp_path, given, tokens, "float32"), expected, rtol=0,
                               atol=1e-5 * np.abs(expected).max())


def test_roundings_are_where_the_published_description_has_them(tmp_path: Path) -> None:
    """In bfloat16, of one layer, where few roundings have met: what is left is those of sums in another order, and an
    error of place adds more than all of them. In float32 no such error would show."""
    given, tokens = {**DENSE, "num_hidden_layers": 1}, np.random.default_rng(1).integers(0, V, 64)
    found = ours(tmp_path, given, tokens, "bfloat16")
    right, *others = (np.abs(found - published(given, make_tensors(given), tokens, ml_dtypes.bfloat16, wrong)).mean()
                      for wrong in ("", "norm", "attention"))
    assert all(right < 0.6 * other for other in others), (right, others)


def test_a_norm_is_rounded_before_it_is_scaled() -> None:
    """Bit for bit, but for means on the edge of a rounding; after the scale a quarter would be rounded otherwise."""
    rng = np.random.default_rng(0)
    x, scale = (a.astype(ml_dtypes.bfloat16) for a in (rng.standard_normal((200, 64)), 1 + rng.standard_normal(64)))
    found = jax.jit(RMSNorm(1e-4, jnp.bfloat16, jnp.bfloat16).apply)({"params": {"scale": scale}}, x)
    wide = x.astype(np.float32)
    normed = wide / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + np.float32(1e-4))
    assert np.mean(found != normed.astype(x.dtype) * scale) < 0.01
    assert np.mean(found != (normed * scale.astype(np.float32)).astype(x.dtype)) > 0.1


def test_the_router_is_float32_in_a_model_of_bfloat16() -> None:
    """By the entropy of its scores: with a softmax in bfloat16 it is more than a hundred tolerances off."""
    rng, config = np.random.default_rng(0), config_from_hf(FOLDED).moe
    x = jnp.asarray(3 * rng.standard_normal((1, 64, D)), jnp.bfloat16)
    moe = MoE(config, dtype=jnp.bfloat16)
    params = nn.unbox(moe.init(jax.random.key(0), x))["params"]
    _, routing = jax.jit(moe.apply)({"params": params}, x)
    logits = np.asarray(x, np.float64)[0] @ np.asarray(params["router"], np.float64)

    def entropy(dtype: Any) -> float:
        scores = softmax(logits.astype(dtype)).astype(np.float64)
        return float(-(scores * np.log(scores)).sum())

    np.testing.assert_allclose(routing.entropy, entropy(np.float64), rtol=1e-6)
    assert abs(entropy(ml_dtypes.bfloat16) / entropy(np.float64) - 1) > 1e-4


@KINDS
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_bits_come_back(tmp_path: Path, dtype: Any, given: dict[str, Any]) -> None:
    tensors = make_tensors(given, dtype)
    (tmp_path / "given").mkdir()
    config, params = load_pretrained(write(tmp_path / "given", tensors, given), param_dtype=np.dtype(dtype).name)
    assert config.attention == MFAConfig(num_heads=N, latent_dim=C, query_rank=Q, norm_eps=1e-4)
    save_pretrained(tmp_path / "out", config, params, context_length=256)
    equal_bits(tensors, tensors_of(tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {name: written[name] for name in given} == given
    assert load_pretrained(tmp_path / "out", param_dtype=np.dtype(dtype).name)[0] == config


def test_a_model_trained_here_as_engines_read_it(tmp_path: Path) -> None:
    """They keep two tables and take the query latent's width, the context length and the layers with experts."""
    config = model_config("mfa", tie_embeddings=True, vocab_size=264)
    c = compiled(config)
    save_pretrained(tmp_path / "out", config, c.params, context_length=64, tokenizer=ByteTokenizer())
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == ["Step3TextForCausalLM"]
    assert (written["share_q_dim"], written["head_dim"], written["num_attention_heads"]) == (12, 16, 4)
    assert (written["moe_layers_enum"], written["max_position_embedding"], written["eos_token_id"]) == ("-1", 64, 256)
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"tokenizer.json", "tokenizer_config.json"}
    again, params = load_pretrained(tmp_path / "out")
    assert again == dataclasses.replace(config, tie_embeddings=False)
    chex.assert_trees_all_equal({**params, "unembed": None}, {**c.params, "unembed": None})
    chex.assert_trees_all_equal(params["unembed"], c.params["embed"])


def test_the_whole_checkpoint_by_names_and_shapes() -> None:
    """Step-3's 61 layers, 56 of them with experts, without one array: 316B parameters, each where engines look."""
    config = language_models["step3"].config
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    shapes = nn.unbox(shapes)
    table = step3.sources(config, shapes["layers"])
    stored = {name: table[key].stored_shape(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
              for key in [jax.tree_util.keystr(path, simple=True, separator="/")] for name in table[key].names}
    attention = 2048 * 7168 + 2 * 256 * 7168 + 2048 + 64 * 256 * 2048 + 7168 * 64 * 256
    moe = 48 * 7168 + 48 * 3 * 7168 * 5120 + 3 * 7168 * 5120
    counted = (2 * 128815 * 7168 + 7168 + 61 * (attention + 2 * 7168) + 5 * 3 * 7168 * 18432 + 56 * moe)
    assert sum(math.prod(shape) for shape in stored.values()) == counted == 316_294_538_240
    assert len(stored) == 3 + 61 * 8 + 5 * 3 + 56 * 7
    at = "model.layers.59."
    assert stored[f"{at}moe.down_proj.weight"] == (48, 7168, 5120)
    assert stored[f"{at}moe.gate.weight"] == (48, 7168) and stored[f"{at}share_expert.up_proj.weight"] == (5120, 7168)
    assert stored[f"{at}self_attn.wq.weight"] == (16384, 2048)
    assert stored["model.layers.60.mlp.gate_proj.weight"] == (18432, 7168)
    written = step3.write_config(config, "step3_text", 65536)
    assert written["moe_layers_enum"] == ",".join(map(str, range(4, 60)))
    assert dataclasses.replace(config_from_hf(written), dtype=config.dtype) == config


def test_rope_scaling_comes_back(tmp_path: Path) -> None:
    position = dataclasses.replace(model_config("mfa").position, scaling=RopeScaling("yarn", 4.0, 64))
    config = model_config("mfa", position=position, tie_embeddings=False)
    save_pretrained(tmp_path / "out", config, compiled(config).params, context_length=256)
    assert load_pretrained(tmp_path / "out")[0] == config


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"num_attention_groups": 8}, NotImplementedError, "num_attention_groups=8"),
    ({"quantization_config": {"bits": 8}}, NotImplementedError, "quantization_config"),
    ({"is_causal": False}, NotImplementedError, "is_causal=False: every layer here is causal"),
    ({"moe_num_experts": None}, ValueError, "moe_num_experts=None: is missing"),
    ({"moe_layers_enum": "1,x"}, ValueError, "moe_layers_enum='1,x': must be numbers"),
    ({"head_dim": None}, ValueError, "head_dim=None: is missing"),
])
def test_configs_that_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        config_from_hf({**CONFIG, **change})


@pytest.mark.parametrize(("change", "message"), [
    ({"attention": MFAConfig(num_heads=4, latent_dim=16, query_rank=12, query_norm=False)},
     "query_norm=False: Step3Text"),
    ({"attention": MFAConfig(num_heads=4, latent_dim=16, query_rank=12, norm_eps=1e-6)},
     "attention.norm_eps=1e-06: Step3Text"),
    ({"moe": MoEConfig(shared_dim=8, scores="sigmoid")}, "moe.scores='sigmoid': Step3Text.*'softmax'"),
    ({"moe": MoEConfig(shared_dim=8, output_scale=2.0)}, "moe.output_scale=2.0"),
    ({"moe": MoEConfig(shared_dim=8, bias_update_rate=0.0)}, "moe.bias_update_rate=0.0"),
    ({"moe": MoEConfig()}, "moe.shared_dim=0: Step3Text"),
    ({"attention": GQAConfig(num_heads=4, num_kv_heads=2, head_dim=8), "moe": MoEConfig(shared_dim=8)},
     "moe: LlamaForCausalLM is dense"),
])
def test_models_that_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    config = model_config("mfa", **change)
    with pytest.raises(NotImplementedError, match=message):
        save_pretrained(tmp_path / "out", config, compiled(config).params, context_length=64)
    assert not list(tmp_path.iterdir())
