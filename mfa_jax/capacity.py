"""The paper's analysis in closed form: parameters, cache, FLOPs, ranks, arithmetic intensity.

Conventions, under which the printed digits of both papers come out:

- A FLOP is a multiplication or an addition: a product with an `[a, b]` matrix costs `2ab`. Softmax, norms, rope and
  elementwise work are not counted, nor are embedding and logits (Step-3, arXiv 2507.19427, section 4.1).
- Decoding one token at a context of `S` reads each cached element once, and multiplies it into each of the `G` query
  heads that share it twice: as a key, as a value.
- MLA decodes absorbed, and the whole cached row `[c ; k_rope]` serves as key and as value, so that a head costs
  `4 (C + R)` a position. Leaving the R rope elements out of the average would cost `4C + 2R`.
- A cache of int8 or float8_e4m3fn counts 1 byte an element, without scales.
- KB is 1000 bytes.
"""

from __future__ import annotations

import dataclasses
import math

from mfa_jax.config import AttentionConfig, GQAConfig, MLAConfig, ModelConfig, require

CACHE_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "int8": 1}
"""Bytes of one cached element."""


# ---- parameters ------------------------------------------------------------------------------------------------


def parameter_shapes(attention: AttentionConfig, model_dim: int) -> dict[str, tuple[int, ...]]:
    """Every parameter of one attention layer, by the name and with the shape that the modules give it."""
    D, N = model_dim, attention.num_heads
    if isinstance(attention, GQAConfig):
        K, H = attention.num_kv_heads, attention.head_dim
        shapes: dict[str, tuple[int, ...]] = {"W_Q": (D, N, H), "W_K": (D, K, H), "W_V": (D, K, H), "W_O": (N, H, D)}
        biases = {"b_Q": (N, H), "b_K": (K, H), "b_V": (K, H)} if attention.qkv_bias else {}
        return shapes | biases | ({"q_norm": (H,), "k_norm": (H,)} if attention.qk_norm else {})
    C = attention.latent_dim
    if isinstance(attention, MLAConfig):
        R, h, H = attention.rope_dim, attention.value_dim, attention.nope_dim + attention.rope_dim
        shapes = {"W_DKV": (D, C), "W_KR": (D, R), "kv_norm": (C,), "W_UK": (C, N, attention.nope_dim),
                  "W_UV": (C, N, h), "W_O": (N, h, D)}
        if attention.query_rank is None:
            return shapes | {"W_Q": (D, N, H)}
        Q = attention.query_rank
        return shapes | {"W_DQ": (D, Q), "q_norm": (Q,), "W_UQ": (Q, N, H)}
    Q = attention.query_rank
    shapes = {"S_q": (D, Q), "Q": (Q, N, C), "S_k": (D, C), "O": (N, C, D)}
    shapes |= {"q_norm": (Q,)} if attention.query_norm else {}
    return shapes | ({"S_v": (D, C)} if attention.kind == "mfa" else {"alpha": (C,), "N_kr": (C, C)})


def _matrix_shapes(attention: AttentionConfig, model_dim: int) -> dict[str, tuple[int, ...]]:
    """The parameters of one attention layer that a token is multiplied with: no norm, no alpha, no bias."""
    shapes = parameter_shapes(attention, model_dim)
    return {name: shape for name, shape in shapes.items() if len(shape) > 1 and not name.startswith("b_")}


def attention_parameters(attention: AttentionConfig, model_dim: int) -> int:
    """Parameters of one attention layer, norm scales, biases and alpha included."""
    return sum(math.prod(shape) for shape in parameter_shapes(attention, model_dim).values())


@dataclasses.dataclass(frozen=True)
class ModelParameters:
    """Parameters of a language model."""

    embedding: int
    """Embedding table, and the output table where it is not tied."""
    non_embedding: int
    """Blocks and final norm."""
    active: int
    """What serves one token: blocks without the experts it is not sent to, final norm, output table."""

    @property
    def total(self) -> int:
        return self.embedding + self.non_embedding


def feed_forward_shapes(model: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """Every parameter of a layer's feed-forward, SwiGLU or experts, by the name and with the shape modules give it."""
    D, moe = model.model_dim, model.moe
    if moe is None or layer not in model.moe_layers:
        F = model.ffn_dim
        return {"W_gate": (D, F), "W_up": (D, F), "W_down": (F, D)}
    E, F, S = moe.num_experts, moe.expert_dim, moe.shared_dim
    shapes: dict[str, tuple[int, ...]] = {
        "router": (D, E), "experts_gate": (E, D, F), "experts_up": (E, D, F), "experts_down": (E, F, D)}
    if moe.bias_update_rate is not None:
        shapes["router_bias"] = (E,)
    return shapes | ({"shared/W_gate": (D, S), "shared/W_up": (D, S), "shared/W_down": (S, D)} if S else {})


def _active(name: str, shape: tuple[int, ...], model: ModelConfig) -> int:
    """Elements of a parameter that serve one token."""
    if model.moe is not None and name.startswith("experts_"):
        shape = (model.moe.experts_per_token, *shape[1:])
    return math.prod(shape)


def model_parameters(model: ModelConfig) -> ModelParameters:
    """`sum_l (attention + 2 D + ffn_l) + D` beside the tables: two norms a block, one final norm.

    `ffn_l = 3 D F` for a SwiGLU; `D E + 3 E D F + 3 D S` for E experts of width F beside a shared one of width S, and E
    more for selection biases.
    """
    D, table = model.model_dim, model.vocab_size * model.model_dim
    ffn = [feed_forward_shapes(model, layer) for layer in range(model.num_layers)]
    others = model.num_layers * (attention_parameters(model.attention, D) + 2 * D) + D
    return ModelParameters(
        embedding=table if model.tie_embeddings else 2 * table,
        non_embedding=others + sum(math.prod(shape) for shapes in ffn for shape in shapes.values()),
        active=others + sum(_active(*item, model) for shapes in ffn for item in shapes.items()) + table,
    )


# ---- cache -----------------------------------------------------------------------------------------------------


def cache_elements_per_token(attention: AttentionConfig) -> int:
    """Elements that one layer caches a token: `2KH` (MHA, GQA, MQA), `C + R` (MLA), `2C` (MFA), `C` (MFA-KR)."""
    if isinstance(attention, GQAConfig):
        return 2 * attention.num_kv_heads * attention.head_dim
    if isinstance(attention, MLAConfig):
        return attention.latent_dim + attention.rope_dim
    return attention.latent_dim * (2 if attention.kind == "mfa" else 1)


def cache_bytes_per_token(attention: AttentionConfig, num_layers: int, cache_dtype: str) -> int:
    """Bytes that all layers together cache a token.

    Raises:
      ValueError: a dtype that is not in `CACHE_DTYPE_BYTES`.
    """
    require(cache_dtype in CACHE_DTYPE_BYTES, "cache_dtype", cache_dtype,
            f"must be one of {', '.join(CACHE_DTYPE_BYTES)}")
    return num_layers * cache_elements_per_token(attention) * CACHE_DTYPE_BYTES[cache_dtype]


def sequence_exchange_bytes(model: ModelConfig, rows: int, length: int, shards: int, itemsize: int = 2) -> int:
    """Bytes a device receives in a forward pass where `shards` devices split a sequence: what the others would cache.

    `L B (T - T / X) e` elements, `e` as `cache_elements_per_token`. Of gradients see `attention.context`.
    """
    others = rows * (length - length // shards)
    return model.num_layers * others * cache_elements_per_token(model.attention) * itemsize


# ---- FLOPs -----------------------------------------------------------------------------------------------------


def attention_flops(attention: AttentionConfig, context: int) -> int:
    """FLOPs of scores and weighted values of one layer for one decoded token: `4 N W S`.

    `W` is the width of the cached row that a head reads: `H` (MHA, GQA, MQA), `C + R` (MLA), `C` (MFA, MFA-KR).
    Source: arXiv 2507.19427, tables 2 and 3 ("attention computation without linear projections").
    """
    rope = attention.rope_dim if isinstance(attention, MLAConfig) else 0
    width = attention.head_dim if isinstance(attention, GQAConfig) else attention.latent_dim + rope
    return 4 * attention.num_heads * width * context


def projection_flops(attention: AttentionConfig, model_dim: int) -> int:
    """FLOPs of the products with weights of one layer for one decoded token: 2 a matrix element.

    MFA-KR applies `N_kr` to the averaged keys of each head, `o_n = u_n + alpha * (N_kr u_n)`, which costs `2 N C^2`;
    folding it into `O` beforehand would save that.
    Source: arXiv 2507.19427, table 2 ("linear before and after attention").
    """
    times = {"N_kr": attention.num_heads}
    shapes = _matrix_shapes(attention, model_dim)
    return sum(2 * math.prod(shape) * times.get(name, 1) for name, shape in shapes.items())


def training_flops_per_token(model: ModelConfig, sequence_length: int) -> int:
    """Model FLOPs of forward and backward for one trained token, the numerator of model FLOPs utilisation.

    `6 P + 3 L N (H + h) (T + 1)`: `P` counts the elements of every matrix a token is multiplied with (blocks, with the
    experts it is sent to, and the output table, tied or not; not the embedding look-up, norms, alpha, biases), 2 FLOPs
    forward and 4 backward. A causal row of `T` tokens has `(T + 1) / 2` keys a query on average; `H` and `h` are the
    widths of a head's key and value when nothing is absorbed. Recomputation (remat) is not counted.
    Source: Chowdhery et al., arXiv 2204.02311, appendix B, with the causal half.
    """
    attention, D = model.attention, model.model_dim
    if isinstance(attention, GQAConfig):
        widths = 2 * attention.head_dim
    elif isinstance(attention, MLAConfig):
        widths = attention.nope_dim + attention.rope_dim + attention.value_dim
    else:
        widths = 2 * attention.latent_dim
    matrices = sum(math.prod(shape) for shape in _matrix_shapes(attention, D).values())
    ffn = sum(_active(name, shape, model) for layer in range(model.num_layers)
              for name, shape in feed_forward_shapes(model, layer).items() if len(shape) > 1)
    weights = model.num_layers * matrices + ffn + model.vocab_size * D
    return 6 * weights + 3 * model.num_layers * attention.num_heads * widths * (sequence_length + 1)


# ---- the paper's measures --------------------------------------------------------------------------------------


def factorization_rank_per_head(attention: AttentionConfig) -> int:
    """FRH, the rank that the factorization leaves to the QK circuit `W_n` of one head.

    `H` (MHA, GQA, MQA); `min(nope_dim, C, Q)` (MLA: the part read from the latent, as both papers count it, without
    the shared rope key); `min(C, Q)` (MFA, MFA-KR; `C` in both papers, where `Q >= C`).
    Source: arXiv 2412.19255, comparison of the variants' capacities.
    """
    if isinstance(attention, GQAConfig):
        return attention.head_dim
    widths = [attention.latent_dim, attention.query_rank]
    if isinstance(attention, MLAConfig):
        widths.append(attention.nope_dim)
    return min(w for w in widths if w is not None)


def shared_latent_subspace_dimension(attention: AttentionConfig) -> int:
    """SLSD, the width of the subspace in which keys live, shared by the heads.

    `K H` (GQA; `N H`, the model width in the paper, for MHA and `H` for MQA), `C` (MLA, MFA, MFA-KR).
    Source: arXiv 2412.19255, comparison of the variants' capacities.
    """
    if isinstance(attention, GQAConfig):
        return attention.num_kv_heads * attention.head_dim
    return attention.latent_dim


def total_effective_rank(attention: AttentionConfig) -> int:
    """TER of one layer, `N * FRH`. Source: as above."""
    return attention.num_heads * factorization_rank_per_head(attention)


# ---- everything of one model -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Report:
    """What a model's attention stores, computes and can express; totals over layers unless noted."""

    variant: str
    layers: int
    model_dim: int
    heads: int
    """Query heads of a layer."""
    context: int
    """Cached tokens, S."""
    cache_dtype: str
    parameters_per_layer: int
    """Parameters of one attention layer."""
    cache_elements_per_token_and_layer: int
    cache_bytes_per_token: int
    bytes_read_per_decoded_token: int
    """The whole cache, read once; weights are not counted."""
    attention_flops: int
    """Scores and weighted values for one decoded token."""
    projection_flops: int
    """Products with weights for one decoded token."""
    arithmetic_intensity: float
    """Attention FLOPs a cache byte read; does not depend on the context."""
    frh: int
    """Factorization rank per head."""
    slsd: int
    """Shared latent subspace dimension."""
    ter: int
    """Total effective rank of a layer."""


def analyse(
    attention: AttentionConfig, model_dim: int, num_layers: int, *, context: int, cache_dtype: str = "bfloat16"
) -> Report:
    """The report of `num_layers` equal attention layers at a context of `context` cached tokens.

    Raises:
      ValueError: a size below 1, or an unknown cache dtype.
    """
    for name, value in (("model_dim", model_dim), ("num_layers", num_layers), ("context", context)):
        require(value >= 1, name, value, "must be at least 1")
    per_token = cache_bytes_per_token(attention, num_layers, cache_dtype)
    flops = num_layers * attention_flops(attention, context)
    return Report(
        variant=attention.variant,
        layers=num_layers,
        model_dim=model_dim,
        heads=attention.num_heads,
        context=context,
        cache_dtype=cache_dtype,
        parameters_per_layer=attention_parameters(attention, model_dim),
        cache_elements_per_token_and_layer=cache_elements_per_token(attention),
        cache_bytes_per_token=per_token,
        bytes_read_per_decoded_token=per_token * context,
        attention_flops=flops,
        projection_flops=num_layers * projection_flops(attention, model_dim),
        arithmetic_intensity=flops / (per_token * context),
        frh=factorization_rank_per_head(attention),
        slsd=shared_latent_subspace_dimension(attention),
        ter=total_effective_rank(attention),
    )


def analyse_model(model: ModelConfig, *, context: int, cache_dtype: str = "bfloat16") -> Report:
    """`analyse` of a language model's attention layers."""
    return analyse(model.attention, model.model_dim, model.num_layers, context=context, cache_dtype=cache_dtype)
