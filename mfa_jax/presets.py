"""Named models: published attention shapes and language models, and our own sizes with one model per variant.

Our own sizes share their rules, so that the six variants of a size differ in attention alone. With `H` the head width
of the MHA model (`D / 8`; `D / 12` at base):

- MFA and MFA-KR: `C = 2H`, the paper's ratio (256 for 128), and `Q = C` as in the paper: a wider query latent
  (Step-3 takes `8C`) costs parameters that buy no rank, and at equal parameters leaves fewer heads.
- GQA: two key heads, which makes its cache that of MFA (`2 K H = 2 C`) and divides over two shards.
- MLA: `C = 4H`, `R = H/2`, key and value parts of `H`, DeepSeek's ratios (512 and 64 for 128).
- Heads solve for the parameters of the MHA layer, and the feed-forward takes up the rest (`matched`).

Each also comes as `NAME-moe`, with experts in all layers but the first (`with_experts`).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeVar

from mfa_jax.capacity import attention_parameters
from mfa_jax.config import (
    VARIANTS,
    AttentionConfig,
    GQAConfig,
    MFAConfig,
    MFAKRConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    require,
)

A = TypeVar("A", bound=AttentionConfig)


# ---- equal parameters ------------------------------------------------------------------------------------------


def match_heads(attention: A, model_dim: int, parameters: int, multiple: int = 2) -> A:
    """`attention` with the head count whose layer comes nearest to `parameters`.

    The count of a layer is affine in the number of query heads, so the answer is a division. It is a multiple of
    `multiple` (for sharding heads) and of `num_kv_heads` where there is one; of two equally near the larger.

    Raises:
      ValueError: what all heads share leaves less than half of the smallest number of heads.
    """
    step = math.lcm(multiple, attention.num_kv_heads if isinstance(attention, GQAConfig) else 1)
    one, two = (
        attention_parameters(dataclasses.replace(attention, num_heads=n * step), model_dim) for n in (1, 2)
    )
    per_step = two - one
    steps = _nearest(parameters - (one - per_step), per_step)
    require(steps >= 1, "parameters", parameters,
            f"must be near {one} or above, what {step} heads of {attention.variant} take")
    return dataclasses.replace(attention, num_heads=steps * step)


def matched(reference: ModelConfig, attention: AttentionConfig, multiple: int = 2) -> ModelConfig:
    """`reference` with other attention and as many parameters beside the embedding as before.

    Heads come from `match_heads`, and `match_feed_forward` takes up what they leave.

    Raises:
      ValueError: attention alone takes more than the block has.
    """
    budget = attention_parameters(reference.attention, reference.model_dim)
    return match_feed_forward(reference, match_heads(attention, reference.model_dim, budget, multiple))


def match_feed_forward(reference: ModelConfig, attention: AttentionConfig) -> ModelConfig:
    """`reference` with this attention, heads and all, and a feed-forward that makes as many parameters as before.

    Its width is a multiple of 8, which matches to within `12 D` parameters a layer.

    Raises:
      ValueError: attention alone takes more than the block has.
    """
    D = reference.model_dim
    spare = attention_parameters(reference.attention, D) - attention_parameters(attention, D)
    ffn_dim = 8 * _nearest(3 * D * reference.ffn_dim + spare, 24 * D)
    require(ffn_dim >= 8, "ffn_dim", ffn_dim,
            f"{attention.num_heads} heads of {attention.variant} leave no feed-forward")
    return dataclasses.replace(reference, attention=attention, ffn_dim=ffn_dim)


def _nearest(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)


# ---- our own sizes ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Scale:
    num_layers: int
    model_dim: int
    head_dim: int


_SCALES = {
    "tiny": _Scale(num_layers=2, model_dim=64, head_dim=8),
    "nano": _Scale(num_layers=5, model_dim=128, head_dim=16),
    "small": _Scale(num_layers=10, model_dim=512, head_dim=64),
    "base": _Scale(num_layers=17, model_dim=768, head_dim=64),
}

MODEL_PRESETS = tuple(f"{scale}-{variant.replace('_', '-')}" for scale in _SCALES for variant in VARIANTS)
"""Names that `model_preset` knows: about 0.1 M (tiny), 1 M (nano), 30 M (small), 120 M (base) beside the embedding."""


def model_preset(name: str) -> ModelConfig:
    """The language model of that name.

    Those of `MODEL_PRESETS` have a byte vocabulary, tied embeddings, rope and a SwiGLU of about `8/3 D`, with the
    ending `-moe` experts; those of `language_models` say there where their numbers are from.

    Raises:
      ValueError: a name that is none of these.
    """
    if name in language_models:
        return language_models[name].config
    if name.endswith("-moe") and name.removesuffix("-moe") in MODEL_PRESETS:
        return with_experts(model_preset(name.removesuffix("-moe")))
    require(name in MODEL_PRESETS, "preset", name,
            f"must be one of {', '.join(MODEL_PRESETS)}, one of these with -moe, {', '.join(language_models)}")
    scale_name, _, variant = name.partition("-")
    return sized_model(variant, **dataclasses.asdict(_SCALES[scale_name]))


def sized_model(variant: str, num_layers: int, model_dim: int, head_dim: int) -> ModelConfig:
    """The model of a variant (`mha`, ..., `mfa-kr`) by the rules of our own sizes; `head_dim` is that of MHA, H.

    Raises:
      ValueError: a width that heads of H do not fill, or sizes at which a variant cannot match MHA's parameters.
    """
    D, H = model_dim, head_dim
    require(D % H == 0, "model_dim", D, f"must be a multiple of head_dim={H}")
    reference = ModelConfig(
        vocab_size=264,
        num_layers=num_layers,
        model_dim=D,
        ffn_dim=8 * _nearest(D, 3),
        attention=GQAConfig(num_heads=D // H, num_kv_heads=D // H, head_dim=H),
        tie_embeddings=True,
    )
    templates: dict[str, AttentionConfig] = {
        "gqa": GQAConfig(num_heads=2, num_kv_heads=2, head_dim=H),
        "mqa": GQAConfig(num_heads=2, num_kv_heads=1, head_dim=H),
        "mla": MLAConfig(nope_dim=H, rope_dim=H // 2, value_dim=H, latent_dim=4 * H),
        "mfa": MFAConfig(latent_dim=2 * H, query_rank=2 * H),
        "mfa-kr": MFAKRConfig(latent_dim=2 * H, query_rank=2 * H),
    }
    return reference if variant == "mha" else matched(reference, templates[variant])


def with_experts(model: ModelConfig) -> ModelConfig:
    """`model` with experts in all layers but the first: as much work a token, three times the feed-forward parameters.

    Eight experts and a shared one, each a third as wide as the feed-forward, two chosen a token by sigmoid scores;
    the load is kept even by biases and a light loss over rows, with the weights of DeepSeek-V3 (arXiv 2412.19437,
    section 4.2).

    Raises:
      ValueError: a model of one layer.
    """
    require(model.num_layers > 1, "num_layers", model.num_layers, "must be at least 2: the first layer stays dense")
    width = 8 * _nearest(model.ffn_dim, 24)
    moe = MoEConfig(num_experts=8, experts_per_token=2, expert_dim=width, shared_dim=width,
                    layers=tuple(range(1, model.num_layers)), scores="sigmoid", balance_loss=1e-4,
                    balance_over="sequence", bias_update_rate=1e-3)
    return dataclasses.replace(model, moe=moe)


# ---- published shapes ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PublishedModel:
    """The attention layers of a model, and where the numbers are from."""

    name: str
    num_layers: int
    model_dim: int
    attention: AttentionConfig
    source: str


def _paper_7b(variant: str, attention: A, note: str) -> PublishedModel:
    """A model of the paper's 7B family; heads solve for the MHA layer's parameters (16 heads of 128, D = 2048)."""
    solved = match_heads(attention, 2048, 4 * 2048 * 2048)
    source = f"arXiv 2412.19255: cache per token; {note}, heads solved here for the parameters of the MHA layer"
    return PublishedModel(f"paper-7b-{variant}", 24, 2048, solved, source)


def _mla(name: str, num_heads: int, source: str) -> PublishedModel:
    attention = MLAConfig(
        num_heads=num_heads, nope_dim=128, rope_dim=64, value_dim=128, latent_dim=512, query_rank=1536
    )
    return PublishedModel(name, 61, 7168, attention, source)


_QWEN3 = "arXiv 2505.09388, tables 1 and 2, and the released config.json; the norms of queries and keys are left out"

published: dict[str, PublishedModel] = {
    model.name: model
    for model in (
        PublishedModel("step3", 61, 7168, MFAConfig(num_heads=64, latent_dim=256, query_rank=2048),
                       "arXiv 2507.19427, section 2 and table 1"),
        _mla("deepseek-v3", 128, "arXiv 2412.19437, section 4.2"),
        _mla("kimi-k2", 64, "arXiv 2507.20534, section 2.3, and the released config.json"),
        PublishedModel("qwen3-235b", 94, 4096, GQAConfig(num_heads=64, num_kv_heads=4, head_dim=128), _QWEN3),
        PublishedModel("qwen3-32b", 64, 5120, GQAConfig(num_heads=64, num_kv_heads=8, head_dim=128), _QWEN3),
        PublishedModel("paper-7b-mha", 24, 2048, GQAConfig(num_heads=16, num_kv_heads=16, head_dim=128),
                       "arXiv 2412.19255: cache per token; 24 layers and D = 2048 fit it, the head width is assumed"),
        _paper_7b("mla", MLAConfig(nope_dim=128, rope_dim=128, value_dim=128, latent_dim=1024),
                  "1152 cached elements fit the 56 % that MFA saves, their split into 1024 + 128 is assumed"),
        _paper_7b("mfa", MFAConfig(latent_dim=256, query_rank=256, query_norm=False), "C = 256 fits it"),
        _paper_7b("mfa-kr", MFAKRConfig(latent_dim=256, query_rank=256, query_norm=False), "C = 256 fits it"),
    )
}
"""Attention shapes of released models and of the paper's 7B family, by name."""


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A published mixture-of-experts model, and which of its numbers are published."""

    config: ModelConfig
    published: str
    """Numbers that are printed or released, and where."""
    assumed: str
    """Numbers that are ours, and what they were chosen by."""


def _language_model(name: str, moe: MoEConfig, published_numbers: str, assumed: str, **fields: Any) -> LanguageModel:
    shape = published[name]
    config = ModelConfig(num_layers=shape.num_layers, model_dim=shape.model_dim, attention=shape.attention, moe=moe,
                         tie_embeddings=False, dtype="bfloat16", **fields)
    return LanguageModel(config, published_numbers, assumed)


_PAPER_7B = MoEConfig(num_experts=48, experts_per_token=4, expert_dim=896, shared_dim=896, balance_loss=0.01)
_STEP3 = MoEConfig(num_experts=48, experts_per_token=3, expert_dim=5120, shared_dim=5120, layers=tuple(range(4, 60)),
                   renormalize=False)

language_models: dict[str, LanguageModel] = {
    **{name: _language_model(
        name, _PAPER_7B, "7B parameters, about 1.2B of them active (arXiv 2412.19255); attention as in `published`",
        "48 experts of width 896, 4 a token and 1 shared, in every layer, and a vocabulary of 65536: with attention "
        "they make 7.1B and 1.2B; router and balance loss", vocab_size=65536, ffn_dim=3584)
       for name in published if name.startswith("paper-7b-")},
    "step3": _language_model(
        "step3", _STEP3, "316B parameters, 38B active, 61 layers, 5 of them dense, 48 experts of which 3 are chosen, 1 "
        "shared, D = 7168, query rank 2048 (model card and arXiv 2507.19427); widths 5120 and 18432, dense layers 0 to "
        "3 and 60, vocabulary 128815, softmax scores that are not renormalised, rope base 500000, eps 1e-5 (the "
        "released configuration, as serving engines carry it)", "nothing that the count depends on; how the load was "
        "balanced in training is not said, no balance loss is set", vocab_size=128815, ffn_dim=18432),
}
"""Whole language models, by name: the paper's 7B family and the text model of Step-3.

Step-3's vocabulary divides over no even `tensor` axis: rows added to it (`--model.vocab-size 128896`) do.
"""


def attention_shape(name: str) -> PublishedModel:
    """The attention layers of a published model or of one of our own presets.

    Raises:
      ValueError: a name that is neither.
    """
    if name in MODEL_PRESETS:
        model = model_preset(name)
        return PublishedModel(name, model.num_layers, model.model_dim, model.attention, "mfa_jax.presets")
    require(name in published, "model", name, f"must be one of {', '.join((*published, *MODEL_PRESETS))}")
    return published[name]
