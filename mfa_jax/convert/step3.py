"""Step-3's text model (arXiv 2507.19427) as our MFA model and back, under the names that vLLM and SGLang read.

`self_attn.q_proj` is `S_q`, `inter_norm` the norm of the query latent, `wq` is `Q`, `k_proj` and `v_proj` are `S_k` and
`S_v`, `o_proj` is `O`; `moe.gate` is the router, `moe.{gate,up,down}_proj` hold all experts of a layer, `share_expert`
is the shared one. The rest of a block is that of the dense families. One epsilon serves all norms, rope turns
half-split, scores are scaled by `C ** -0.5` and their softmax is float32, as is the router's, as in ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mfa_jax.config import MFAConfig, ModelConfig, MoEConfig, require
from mfa_jax.convert.dense import norm_sources, swiglu_sources, table_sources
from mfa_jax.convert.rope import get, read_rope, write_rope
from mfa_jax.convert.tensors import Source
from mfa_jax.layers import at_path, stacked_blocks

MODEL_TYPE, ARCHITECTURE = "step3_text", "Step3TextForCausalLM"
_DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
                             "num_attention_groups": 1, "norm_expert_weight": False}
# `moe_layers_enum` cannot be empty: engines parse it as integers. No layer has this number.
_NO_LAYER = "-1"


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """The `ModelConfig` of a Step-3 text `config.json`.

    Raises:
      ValueError: a value is missing, of another type or makes no sense.
      NotImplementedError: quantized weights, several key heads, or a rope setting that ours does not have.
    """
    values = {**_DEFAULTS, **config}
    if values.get("quantization_config") is not None:
        raise NotImplementedError("quantization_config: only checkpoints that are not quantized can be read")
    if values["num_attention_groups"] != 1:
        raise NotImplementedError(f"num_attention_groups={values['num_attention_groups']!r}: MFA has one key head")
    if values.get("is_causal") is False:
        raise NotImplementedError("is_causal=False: every layer here is causal; only such checkpoints can be read")
    num_layers, head_dim = get(values, "num_hidden_layers", int), get(values, "head_dim", int)
    norm_eps = get(values, "rms_norm_eps", float)
    return ModelConfig(
        vocab_size=get(values, "vocab_size", int), num_layers=num_layers, model_dim=get(values, "hidden_size", int),
        ffn_dim=get(values, "intermediate_size", int),
        attention=MFAConfig(num_heads=get(values, "num_attention_heads", int), latent_dim=head_dim,
                            query_rank=get(values, "share_q_dim", int, head_dim), norm_eps=norm_eps),
        moe=_read_experts(values, _moe_layers(values, num_layers), num_layers),
        position=read_rope(values, "max_position_embedding"),
        tie_embeddings=get(values, "tie_word_embeddings", bool), norm_eps=norm_eps,
    )


def _read_experts(values: Mapping[str, Any], layers: tuple[int, ...], num_layers: int) -> MoEConfig | None:
    if not layers:
        return None
    return MoEConfig(
        num_experts=get(values, "moe_num_experts", int), experts_per_token=get(values, "moe_top_k", int),
        expert_dim=get(values, "moe_intermediate_size", int), shared_dim=get(values, "share_expert_dim", int),
        layers=None if len(layers) == num_layers else layers, renormalize=get(values, "norm_expert_weight", bool))


def _moe_layers(values: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """The layers with experts: a string of numbers, or a list; absent, all but the first."""
    given = values.get("moe_layers_enum")
    if given is None:
        return tuple(range(1, num_layers))
    try:
        numbers = [int(item) for item in (given.strip().split(",") if isinstance(given, str) else given)]
    except (TypeError, ValueError):
        raise ValueError(f"moe_layers_enum={given!r}: must be numbers of layers between commas") from None
    return tuple(sorted({number for number in numbers if 0 <= number < num_layers}))


def write_config(config: ModelConfig, model_type: str, context_length: int) -> dict[str, Any]:
    """The `config.json` of an MFA model as `Step3TextForCausalLM`.

    A tied table is written twice, since the engines keep two: `read_config` makes an untied model of it.

    Raises:
      NotImplementedError: no norm on the query latent, or one with an epsilon of its own; a router that scores with
        sigmoids, has selection biases or scales its outputs; experts without a shared one.
    """
    attention = config.attention
    assert isinstance(attention, MFAConfig)
    require(model_type == MODEL_TYPE, "model_type", model_type, f"must be {MODEL_TYPE} for an MFA model")
    if not attention.query_norm:
        raise NotImplementedError(f"query_norm=False: {ARCHITECTURE} norms the query latent; a model that is trained "
                                  f"with query_norm=True can be written")
    if attention.norm_eps != config.norm_eps:
        raise NotImplementedError(f"attention.norm_eps={attention.norm_eps}: {ARCHITECTURE} has one epsilon for all "
                                  f"norms; a model with norm_eps={attention.norm_eps}, too, can be written")
    return {
        "architectures": [ARCHITECTURE], "model_type": model_type, "vocab_size": config.vocab_size,
        "hidden_size": config.model_dim, "intermediate_size": config.ffn_dim, "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads, "num_attention_groups": 1, "head_dim": attention.latent_dim,
        "share_q_dim": attention.query_rank, "rms_norm_eps": config.norm_eps, "tie_word_embeddings": False,
        # vLLM reads the one, SGLang the other.
        "max_position_embedding": context_length, "max_position_embeddings": context_length,
        "max_seq_len": context_length, **_write_experts(config), **write_rope(config.position),
    }


def _write_experts(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    if moe is None:
        return {"moe_layers_enum": _NO_LAYER}
    for name, wanted in (("scores", "softmax"), ("output_scale", 1.0), ("bias_update_rate", None)):
        if getattr(moe, name) != wanted:
            raise NotImplementedError(f"moe.{name}={getattr(moe, name)!r}: {ARCHITECTURE} has {wanted!r}; a model with "
                                      f"that can be written")
    if not moe.shared_dim:
        raise NotImplementedError(f"moe.shared_dim=0: {ARCHITECTURE} has a shared expert; a model that is trained with "
                                  f"one can be written")
    return {
        "moe_layers_enum": ",".join(map(str, config.moe_layers)), "moe_num_experts": moe.num_experts,
        "moe_top_k": moe.experts_per_token, "moe_intermediate_size": moe.expert_dim,
        "share_expert_dim": moe.shared_dim, "norm_expert_weight": moe.renormalize,
    }


def sources(config: ModelConfig, layers: Any) -> dict[str, Source]:
    """Where each leaf of an MFA model lies: `wq` `[N C, Q]` is `Q [Q, N, C]`, merged as `((1, 2), (0,))`.

    Args:
      layers: the (abstract) parameters `layers`, whose blocks may lie in segments.
    """
    table = table_sources(config)
    for path, indices in stacked_blocks(layers):
        block, own = "/".join(("layers", *path)), tuple(indices)
        table |= norm_sources(own, block)
        table |= _attention_sources(f"{block}/attention", own)
        if "moe" in at_path(layers, path):
            table |= _expert_sources(f"{block}/moe", own)
        else:
            table |= swiglu_sources(f"{block}/ffn", "mlp", own)
    return table


def _attention_sources(leaf: str, layers: tuple[int, ...]) -> dict[str, Source]:
    at = "model.layers.{}.self_attn."
    return {
        f"{leaf}/S_q": Source(f"{at}q_proj.weight", ((1,), (0,)), layers),
        f"{leaf}/q_norm/scale": Source(f"{at}inter_norm.weight", ((0,),), layers),
        f"{leaf}/Q": Source(f"{at}wq.weight", ((1, 2), (0,)), layers),
        f"{leaf}/S_k": Source(f"{at}k_proj.weight", ((1,), (0,)), layers),
        f"{leaf}/S_v": Source(f"{at}v_proj.weight", ((1,), (0,)), layers),
        f"{leaf}/O": Source(f"{at}o_proj.weight", ((2,), (0, 1)), layers),
    }


def _expert_sources(leaf: str, layers: tuple[int, ...]) -> dict[str, Source]:
    at = "model.layers.{}.moe."
    experts = {f"{leaf}/experts_{name}": Source(f"{at}{name}_proj.weight", ((0,), (2,), (1,)), layers)
               for name in ("gate", "up", "down")}
    return {f"{leaf}/router": Source(f"{at}gate.weight", ((1,), (0,)), layers), **experts,
            **swiglu_sources(f"{leaf}/shared", "share_expert", layers)}
