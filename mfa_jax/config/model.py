"""The model of a run."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from mfa_jax.config.attention import AttentionConfig, MFAConfig, PositionConfig
from mfa_jax.config.checks import require, require_positive
from mfa_jax.config.moe import MoEConfig

DType = Literal["float32", "bfloat16"]

_ROTATED_FIELD = {"gqa": "head_dim", "mla": "rope_dim", "mfa": "latent_dim", "mfa_kr": "latent_dim"}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only language model: pre-norm RMSNorm, attention, SwiGLU or a mixture of such experts."""

    vocab_size: int = 264
    """V, token ids are 0 .. V - 1."""
    num_layers: int = 2
    """L, blocks."""
    model_dim: int = 64
    """D, width of the residual stream."""
    ffn_dim: int = 192
    """F, hidden width of the SwiGLU feed-forward of a dense layer."""
    attention: AttentionConfig = dataclasses.field(default_factory=MFAConfig)
    """The attention variant and its widths."""
    position: PositionConfig = dataclasses.field(default_factory=PositionConfig)
    """Rope, ALiBi or none."""
    inv_freq: tuple[tuple[float, ...], ...] | None = None
    """Rope frequencies of each layer, [L, rotated width / 2], in place of base and scaling; None for those."""
    moe: MoEConfig | None = None
    """Experts in place of the feed-forward of some or all layers; None for a dense model."""
    tie_embeddings: bool = True
    """Read logits out with the embedding table."""
    norm_eps: float = 1e-5
    """Epsilon of the block norms and the final norm."""
    dtype: DType = "float32"
    """What the forward pass computes in; softmax, norms, angles and loss stay in float32."""
    param_dtype: DType = "float32"
    """What parameters are stored in."""
    remat: Literal["none", "dots", "full"] = "none"
    """What of a block the backward pass recomputes: only what is cheap (norms, rope, gates, casts; no product, no
    attention), all but matrix products, everything."""
    unroll_layers: bool = False
    """Layers one after the other in place of a loop over them, with the same parameters. A loop copies into its arrays
    and out again what the backward pass needs; without one it stays where it is, for more compile time."""
    attention_implementation: Literal["auto", "dense", "blockwise", "splash", "cudnn", "tokamax", "context"] = "auto"
    """Attention for training, by name, and for prefill if it can read a cache (dense, blockwise; of the others prefill
    takes auto); auto resolves by device and size, `core.resolve` says to what.
    Training on a mesh that splits the sequence takes `context` for auto, which is for training steps alone: it takes
    tokens in zig-zag order, as `train.step` lays them."""
    decode_implementation: Literal["auto", "reference", "xla", "mosaic_tpu", "mosaic_tpu_interpret", "mosaic_gpu",
                                   "mosaic_gpu_interpret"] = "auto"
    """Attention of decoding, by name; auto resolves by device and shape, `kernels.resolve` says to what."""
    decode_layout: Literal["auto", "heads", "batch", "sequence"] = "auto"
    """What the tensor axis of a mesh splits of a cache; `kernels.sharded.choose` says what auto takes."""
    expert_implementation: Literal["auto", "ragged_dot", "megablox", "megablox_interpret", "mosaic_gpu"] = "auto"
    """Grouped matrix product of the experts, by name; auto resolves by device, `grouped.resolve` says to what."""
    expert_exchange: Literal["auto", "ragged", "padded"] = "auto"
    """How tokens travel over the mesh axis `expert`; auto resolves by device, `dispatch.resolve_exchange` says."""
    expert_exchange_tokens: int | None = None
    """Tokens of a device that travel at a time where a mesh splits the experts: there is room for the worst case of so
    many. A divisor of the tokens that a device has of a step, or as many; none for all at once."""
    depth_scaled_init: bool = True
    """Projections into the residual stream start smaller by sqrt(2 L)."""

    def __post_init__(self) -> None:
        require_positive(self, "vocab_size", "num_layers", "model_dim", "ffn_dim")
        require(self.expert_exchange_tokens is None or self.expert_exchange_tokens >= 1, "expert_exchange_tokens",
                self.expert_exchange_tokens, "must be at least 1, or none for all at once")
        require(0 < self.norm_eps < math.inf, "norm_eps", self.norm_eps, "must be positive and finite")
        width = self.attention.rotated_dim
        if self.position.kind == "rope":
            require(width % 2 == 0, _ROTATED_FIELD[self.attention.kind], width,
                    "rope rotates pairs, the width must be even")
        if self.inv_freq is not None:
            require(self.position.kind == "rope", "inv_freq", "given", f"needs rope, not {self.position.kind!r}")
            require(len(self.inv_freq) == self.num_layers and all(len(row) == width // 2 for row in self.inv_freq),
                    "inv_freq", f"{len(self.inv_freq)} rows",
                    f"must be num_layers={self.num_layers} rows of {width // 2} frequencies")
        if self.moe is not None and self.moe.layers is not None:
            require(0 <= self.moe.layers[0] and self.moe.layers[-1] < self.num_layers, "moe.layers", self.moe.layers,
                    f"must be in 0 .. {self.num_layers - 1}")

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have experts."""
        if self.moe is None:
            return ()
        return tuple(range(self.num_layers)) if self.moe.layers is None else self.moe.layers
