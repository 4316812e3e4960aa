"""Dense decoder-only checkpoints of Hugging Face, Llama, Mistral, Qwen2 and Qwen3, as our GQA model and back.

All four compute `x + attention(norm(x))`, then `x + swiglu(norm(x))`, rotate half-split and keep one matrix a
projection; a row of `FAMILIES` says what is different.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mfa_jax.config import GQAConfig, ModelConfig, require
from mfa_jax.convert.rope import get, read_rope, write_rope
from mfa_jax.convert.tensors import Source


@dataclasses.dataclass(frozen=True)
class Family:
    """What one `model_type` has that the others lack, and what its config.json may leave out."""

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Values of Hugging Face's config class, where they are not those of `_DEFAULTS`."""


FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM", defaults={"num_key_value_heads": 8, "sliding_window": 4096}),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True,
                    defaults={"num_key_value_heads": 32, "use_sliding_window": False}),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True,
                    defaults={"num_key_value_heads": 32, "head_dim": 128, "use_sliding_window": False}),
}
_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": None, "sliding_window": None, "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "rope_theta": 10000.0,
}


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """The `ModelConfig` of a `config.json` of one of `FAMILIES`, old and new spelling of the rope settings.

    Raises:
      ValueError: a value is missing, of another type or makes no sense.
      NotImplementedError: a bias where ours has none, a sliding window, attention to what follows, an activation other
        than silu, quantized weights, or a rope setting that ours does not have.
    """
    family = FAMILIES[config["model_type"]]
    values = {**_DEFAULTS, **family.defaults, **config}
    _refuse_unsupported(values, family)
    model_dim, num_heads = get(values, "hidden_size", int), get(values, "num_attention_heads", int)
    head_dim = get(values, "head_dim", int, None)
    if head_dim is None:
        require(num_heads > 0 and model_dim % num_heads == 0, "num_attention_heads", num_heads,
                f"must divide hidden_size={model_dim} where no head_dim is given")
        head_dim = model_dim // num_heads
    norm_eps = get(values, "rms_norm_eps", float)
    attention = GQAConfig(num_heads=num_heads, num_kv_heads=get(values, "num_key_value_heads", int, num_heads),
                          head_dim=head_dim, qkv_bias=family.qkv_bias, qk_norm=family.qk_norm)
    if family.qk_norm:
        attention = dataclasses.replace(attention, norm_eps=norm_eps)
    return ModelConfig(
        vocab_size=get(values, "vocab_size", int), num_layers=get(values, "num_hidden_layers", int),
        model_dim=model_dim, ffn_dim=get(values, "intermediate_size", int), attention=attention,
        position=read_rope(values), tie_embeddings=get(values, "tie_word_embeddings", bool), norm_eps=norm_eps,
    )


def _refuse_unsupported(values: Mapping[str, Any], family: Family) -> None:
    # Qwen2 has its biases whatever the file says; the others would put one on the output projection, too.
    biases = () if family.qkv_bias else ("attention_bias",)
    for name in (*biases, "mlp_bias", "quantization_config"):
        if values.get(name) not in (None, False):
            raise NotImplementedError(f"{name}={values[name]!r}: the model has no such thing; only checkpoints "
                                      f"without it can be read")
    # Mistral has no switch for its window: `use_sliding_window` means nothing there.
    switched_on = "sliding_window" in family.defaults or values.get("use_sliding_window", True)
    windowed = switched_on and values["sliding_window"] is not None
    if windowed or any(kind != "full_attention" for kind in values.get("layer_types") or ()):
        raise NotImplementedError(f"sliding_window={values['sliding_window']!r}: every layer here attends to the whole "
                                  f"context; only checkpoints without a window can be read")
    if values.get("is_causal") is False:  # embedding models; transformers and vLLM go by it
        raise NotImplementedError("is_causal=False: every layer here is causal; only such checkpoints can be read")
    if values["hidden_act"] != "silu":
        raise NotImplementedError(f"hidden_act={values['hidden_act']!r}: the feed-forward is SwiGLU, only silu")


def write_config(config: ModelConfig, model_type: str, context_length: int) -> dict[str, Any]:
    """The `config.json` of a GQA model as one of `FAMILIES`; `read_config` makes the same model of it.

    Raises:
      NotImplementedError: biases or norms that this family does not have, or lacks; experts; heads that don't divide
        a Llama's width.
    """
    family, attention = FAMILIES[model_type], config.attention
    assert isinstance(attention, GQAConfig)
    if config.moe is not None:
        raise NotImplementedError(f"moe: {family.architecture} is dense; decode this model with this library")
    for name in ("qkv_bias", "qk_norm"):
        if getattr(attention, name) != getattr(family, name):
            raise NotImplementedError(f"{name}={getattr(attention, name)}: {family.architecture} has "
                                      f"{name}={getattr(family, name)}; name another model_type")
    if model_type == "llama" and config.model_dim % attention.num_heads:  # transformers 5.19 refuses to load it
        raise NotImplementedError(f"num_heads={attention.num_heads}: {family.architecture} has heads that divide "
                                  f"model_dim={config.model_dim}; model_type='mistral' computes the same without")
    if attention.qk_norm and attention.norm_eps != config.norm_eps:
        raise NotImplementedError(f"attention.norm_eps={attention.norm_eps}: {family.architecture} has one epsilon for "
                                  f"all norms, norm_eps={config.norm_eps}")
    # What these leave out means a window (Mistral) or none, by version; none is said in so many words.
    window = {name: value for name, value in (("sliding_window", None), ("use_sliding_window", False))
              if name in family.defaults}
    return {
        "architectures": [family.architecture], "model_type": model_type, "vocab_size": config.vocab_size,
        "hidden_size": config.model_dim, "intermediate_size": config.ffn_dim, "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads, "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim, "hidden_act": "silu", "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings, "max_position_embeddings": context_length,
        "attention_bias": family.qkv_bias, **window, **write_rope(config.position),
    }


def sources(config: ModelConfig, layers: Any) -> dict[str, Source]:
    """Where each leaf of a GQA model lies: q_proj `[N H, D]` is `W_Q [D, N, H]`, merged as `((1, 2), (0,))`.

    Args:
      layers: the (abstract) parameters `layers`; here, of equal blocks, nothing follows from them.
    """
    attention, every = config.attention, tuple(range(config.num_layers))
    assert isinstance(attention, GQAConfig)
    table = table_sources(config) | norm_sources(every) | swiglu_sources("layers/ffn", "mlp", every)
    at = "model.layers.{}.self_attn."
    for letter in "QKV":
        table[f"layers/attention/W_{letter}"] = Source(f"{at}{letter.lower()}_proj.weight", ((1, 2), (0,)), every)
        if attention.qkv_bias:
            table[f"layers/attention/b_{letter}"] = Source(f"{at}{letter.lower()}_proj.bias", ((0, 1),), every)
    for name in ("q_norm", "k_norm") if attention.qk_norm else ():
        table[f"layers/attention/{name}/scale"] = Source(f"{at}{name}.weight", ((0,),), every)
    table["layers/attention/W_O"] = Source(f"{at}o_proj.weight", ((2,), (0, 1)), every)
    return table


def table_sources(config: ModelConfig) -> dict[str, Source]:
    """Embedding, output table unless tied, and the final norm, as every family names them."""
    table = {"embed": Source("model.embed_tokens.weight", ((0,), (1,))),
             "final_norm/scale": Source("model.norm.weight", ((0,),))}
    return table if config.tie_embeddings else table | {"unembed": Source("lm_head.weight", ((0,), (1,)))}


def norm_sources(layers: tuple[int, ...], stack: str = "layers") -> dict[str, Source]:
    """The two norms of a block, as every family names them."""
    at = "model.layers.{}."
    return {f"{stack}/attention_norm/scale": Source(f"{at}input_layernorm.weight", ((0,),), layers),
            f"{stack}/ffn_norm/scale": Source(f"{at}post_attention_layernorm.weight", ((0,),), layers)}


def swiglu_sources(leaf: str, module: str, layers: tuple[int, ...]) -> dict[str, Source]:
    """A SwiGLU, as every family names its matrices."""
    at = f"model.layers.{{}}.{module}."
    return {f"{leaf}/W_{name}": Source(f"{at}{name}_proj.weight", ((1,), (0,)), layers)
            for name in ("gate", "up", "down")}
