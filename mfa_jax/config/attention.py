"""Position encodings and attention variants: what a layer attends with, and its widths."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from mfa_jax.config.checks import require, require_positive


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the rope frequencies of a model are stretched for longer contexts (as Hugging Face's `rope_scaling`)."""

    kind: Literal["linear", "llama3", "yarn"] = "linear"
    factor: float = 1.0
    """Context extension: new length over original length."""
    original_max_positions: int = 8192
    """Context length before the extension (llama3, yarn)."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths longer than original / this are fully stretched."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths shorter than original / this are left alone."""
    beta_fast: float = 32.0
    """yarn: rotations over the original context above which a frequency is left alone."""
    beta_slow: float = 1.0
    """yarn: rotations below which a frequency is fully stretched."""
    attention_factor: float | None = None
    """yarn: rotated queries and keys are multiplied by this; None means 0.1 ln(factor) + 1."""

    def __post_init__(self) -> None:
        require(self.factor >= 1, "factor", self.factor, "must be at least 1")
        require_positive(self, "original_max_positions")
        require(self.high_freq_factor > self.low_freq_factor, "high_freq_factor", self.high_freq_factor,
                f"must exceed low_freq_factor={self.low_freq_factor}")
        require(self.beta_slow > 0, "beta_slow", self.beta_slow, "must be positive")
        require(self.beta_fast > self.beta_slow, "beta_fast", self.beta_fast,
                f"must exceed beta_slow={self.beta_slow}")


@dataclasses.dataclass(frozen=True)
class PositionConfig:
    """How attention learns where a token stands."""

    kind: Literal["rope", "alibi", "none"] = "rope"
    base: float = 500000.0
    """Rope base: frequency j of a width W is base**(-2j/W)."""
    scaling: RopeScaling | None = None
    """Context extension of the rope frequencies; None for none."""

    def __post_init__(self) -> None:
        require(1 < self.base < math.inf, "base", self.base, "must exceed 1, and be finite")
        require(self.scaling is None or self.kind == "rope", "scaling", self.scaling,
                f"only kind='rope' can be scaled, not kind={self.kind!r}")


@dataclasses.dataclass(frozen=True)
class GQAConfig:
    """Grouped-query attention: MHA when `num_kv_heads == num_heads`, MQA when it is 1."""

    kind: Literal["gqa"] = "gqa"
    num_heads: int = 8
    """N, query heads."""
    num_kv_heads: int = 8
    """K, key and value heads; divides N."""
    head_dim: int = 64
    """H, width of a head."""
    qkv_bias: bool = False
    """A bias on queries, keys and values (Qwen2)."""
    qk_norm: bool = False
    """RMSNorm over the width of each query and key head, before rope (Qwen3)."""
    norm_eps: float = 1e-6
    """Epsilon of these norms."""

    def __post_init__(self) -> None:
        require_positive(self, "num_heads", "num_kv_heads", "head_dim")
        require(0 < self.norm_eps < math.inf, "norm_eps", self.norm_eps, "must be positive and finite")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")

    @property
    def variant(self) -> str:
        """`mha`, `gqa` or `mqa`, by the number of key heads."""
        return {self.num_heads: "mha", 1: "mqa"}.get(self.num_kv_heads, "gqa")

    @property
    def rotated_dim(self) -> int:
        """Width that rope rotates."""
        return self.head_dim


@dataclasses.dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): the cache holds a latent and one rope key."""

    kind: Literal["mla"] = "mla"
    num_heads: int = 8
    """N, query heads."""
    nope_dim: int = 64
    """Width of a head's key that is read from the latent; a head's key width is H = nope_dim + rope_dim."""
    rope_dim: int = 32
    """R, width of the rope key that all heads share."""
    value_dim: int = 64
    """h, width of a head's value."""
    latent_dim: int = 256
    """C, width of the cached latent."""
    query_rank: int | None = None
    """Q, width of the query's own normed latent; None projects the query directly."""
    norm_eps: float = 1e-6
    """Epsilon of the norms of both latents."""

    def __post_init__(self) -> None:
        require_positive(self, "num_heads", "nope_dim", "rope_dim", "value_dim", "latent_dim")
        require(self.query_rank is None or self.query_rank >= 1, "query_rank", self.query_rank,
                "must be at least 1, or none")
        require(0 < self.norm_eps < math.inf, "norm_eps", self.norm_eps, "must be positive and finite")

    @property
    def variant(self) -> str:
        return self.kind

    @property
    def rotated_dim(self) -> int:
        """Width that rope rotates."""
        return self.rope_dim


@dataclasses.dataclass(frozen=True)
class MFAConfig:
    """Multi-matrix factorization attention (arXiv 2412.19255, section 3): one wide key and value for all heads."""

    kind: Literal["mfa"] = "mfa"
    num_heads: int = 16
    """N, query heads."""
    latent_dim: int = 128
    """C, width of the shared key and value and of each query head."""
    query_rank: int = 128
    """Q, width of the shared query latent (the paper takes Q = C, Step-3 takes Q = 2048 for C = 256)."""
    query_norm: bool = True
    """RMSNorm on the query latent."""
    norm_eps: float = 1e-5
    """Epsilon of that norm."""

    def __post_init__(self) -> None:
        require_positive(self, "num_heads", "latent_dim", "query_rank")
        require(0 < self.norm_eps < math.inf, "norm_eps", self.norm_eps, "must be positive and finite")

    @property
    def variant(self) -> str:
        return self.kind

    @property
    def rotated_dim(self) -> int:
        """Width that rope rotates."""
        return self.latent_dim


@dataclasses.dataclass(frozen=True)
class MFAKRConfig:
    """MFA with key reuse (arXiv 2412.19255, section 3): values are `k + alpha * (N_kr k)`, only the key is cached."""

    kind: Literal["mfa_kr"] = "mfa_kr"
    num_heads: int = 16
    """N, query heads."""
    latent_dim: int = 128
    """C, width of the shared key and of each query head."""
    query_rank: int = 128
    """Q, width of the shared query latent."""
    query_norm: bool = True
    """RMSNorm on the query latent."""
    norm_eps: float = 1e-5
    """Epsilon of that norm."""
    reuse: Literal["pre_rope", "post_rope"] = "pre_rope"
    """Which key the value reuses. pre_rope makes the value a fixed linear map of the token, whatever its position."""
    alpha_init: float = 0.0
    """Initial value of every element of alpha; 0 starts with values equal to keys."""
    alpha_init_scale: float = 0.0
    """Standard deviation of what is added to that, normal and for each element its own."""
    n_kr_init_scale: float = 1.0
    """N_kr starts normal with standard deviation this / sqrt(C)."""
    n_kr_init_diagonal: float = 0.0
    """What is added to the diagonal of N_kr at the start; -1 with alpha at 1 takes the key itself out of the value."""

    def __post_init__(self) -> None:
        require_positive(self, "num_heads", "latent_dim", "query_rank")
        require(0 < self.norm_eps < math.inf, "norm_eps", self.norm_eps, "must be positive and finite")
        for name in ("alpha_init_scale", "n_kr_init_scale"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")

    @property
    def variant(self) -> str:
        return self.kind

    @property
    def rotated_dim(self) -> int:
        """Width that rope rotates."""
        return self.latent_dim


AttentionConfig = GQAConfig | MLAConfig | MFAConfig | MFAKRConfig
VARIANTS = ("mha", "gqa", "mqa", "mla", "mfa", "mfa_kr")
