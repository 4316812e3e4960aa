"""Step-3's text model: names, config, and parity with a PyTorch model written here from the published description."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import chex
import jax
import ml_dtypes
import numpy as np
import pytest

from mfa_jax.config import MFAConfig, RopeScaling
from mfa_jax.convert import config_from_hf, load_pretrained, save_pretrained
from mfa_jax.data import ByteTokenizer
from mfa_jax.model.transformer import Transformer
from tests.contract import compiled, model_config
from tests.test_convert_checkpoint import write
from tests.test_convert_save import equal_bits, tensors_of

D, N, C, Q, F, V, L = 16, 4, 8, 12, 24, 40, 2
CONFIG: dict[str, Any] = {
    "architectures": ["Step3TextForCausalLM"], "model_type": "step3_text", "hidden_size": D, "intermediate_size": F,
    "num_attention_heads": N, "num_attention_groups": 1, "num_hidden_layers": L, "vocab_size": V, "head_dim": C,
    "share_q_dim": Q, "rms_norm_eps": 1e-4, "rope_theta": 100.0, "rope_scaling": None, "max_position_embedding": 256,
    "moe_layers_enum": "-1",
}
SHAPES = {
    "model.embed_tokens.weight": (V, D), "lm_head.weight": (V, D), "model.norm.weight": (D,),
    **{f"model.layers.{i}.{name}.weight": shape for i in range(L) for name, shape in {
        "input_layernorm": (D,), "post_attention_layernorm": (D,), "self_attn.q_proj": (Q, D),
        "self_attn.k_proj": (C, D), "self_attn.v_proj": (C, D), "self_attn.inter_norm": (Q,),
        "self_attn.wq": (N * C, Q), "self_attn.o_proj": (D, N * C),
        "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}.items()},
}


def make_tensors(dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: (rng.standard_normal(shape) * 0.3 + (len(shape) == 1)).astype(dtype)
            for name, shape in SHAPES.items()}


def published(torch: Any, tensors: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Logits [T, V] of one row in float32, token by token and head by head, from arXiv 2507.19427 and the released
    checkpoint's names: a norm computes in float32 and is scaled after the cast back; softmax is float32."""
    w = {name: torch.tensor(tensor) for name, tensor in tensors.items()}

    def norm(x: Any, name: str) -> Any:
        wide = x.to(torch.float32)
        return w[f"{name}.weight"] * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-4)).to(x.dtype)

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
        gate, up = (a @ w[f"{at}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (torch.nn.functional.silu(gate) * up) @ w[f"{at}mlp.down_proj.weight"].T
    return (norm(x, "model.norm") @ w["lm_head.weight"].T).numpy()


def test_parity_with_the_published_description(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    tensors, tokens = make_tensors(), np.random.default_rng(1).integers(0, V, 30)
    config, params = load_pretrained(write(tmp_path, tensors, CONFIG, shards=2))
    logits, _ = jax.jit(Transformer(config).apply)({"params": params}, tokens[None])
    expected = published(torch, tensors, tokens)
    np.testing.assert_allclose(logits[0], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_bits_come_back(tmp_path: Path, dtype: Any) -> None:
    tensors = make_tensors(dtype)
    (tmp_path / "given").mkdir()
    config, params = load_pretrained(write(tmp_path / "given", tensors, CONFIG), param_dtype=np.dtype(dtype).name)
    assert config.attention == MFAConfig(num_heads=N, latent_dim=C, query_rank=Q, norm_eps=1e-4)
    save_pretrained(tmp_path / "out", config, params, context_length=256)
    equal_bits(tensors, tensors_of(tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {name: written[name] for name in CONFIG} == CONFIG


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


def test_rope_scaling_comes_back(tmp_path: Path) -> None:
    position = dataclasses.replace(model_config("mfa").position, scaling=RopeScaling("yarn", 4.0, 64))
    config = model_config("mfa", position=position, tie_embeddings=False)
    save_pretrained(tmp_path / "out", config, compiled(config).params, context_length=256)
    assert load_pretrained(tmp_path / "out")[0] == config


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"num_attention_groups": 8}, NotImplementedError, "num_attention_groups=8"),
    ({"quantization_config": {"bits": 8}}, NotImplementedError, "quantization_config"),
    ({"moe_layers_enum": "1,x"}, ValueError, "moe_layers_enum='1,x': must be numbers"),
    ({"head_dim": None}, ValueError, "head_dim=None: is missing"),
])
def test_configs_that_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        config_from_hf({**CONFIG, **change})


@pytest.mark.parametrize(("attention", "message"), [
    (MFAConfig(num_heads=4, latent_dim=16, query_rank=12, query_norm=False), "query_norm=False: Step3Text"),
    (MFAConfig(num_heads=4, latent_dim=16, query_rank=12, norm_eps=1e-6), "attention.norm_eps=1e-06: Step3Text"),
])
def test_models_that_are_refused(tmp_path: Path, attention: MFAConfig, message: str) -> None:
    config = model_config("mfa", attention=attention)
    with pytest.raises(NotImplementedError, match=message):
        save_pretrained(tmp_path / "out", config, compiled(config).params, context_length=64)
    assert not list(tmp_path.iterdir())
