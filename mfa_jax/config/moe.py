"""Mixture of experts: how many experts, how a router chooses among them, and what keeps their load even."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from mfa_jax.config.checks import require, require_positive


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """A router sends each token to A of E SwiGLU experts; a shared expert, if there is one, sees every token."""

    num_experts: int = 8
    """E, routed experts."""
    experts_per_token: int = 2
    """A, experts a token is sent to."""
    expert_dim: int = 64
    """F, hidden width of a routed expert."""
    shared_dim: int = 0
    """Hidden width of the shared expert; 0 for none."""
    layers: tuple[int, ...] | None = None
    """Indices of the layers that have experts, the others stay dense; None for all."""
    scores: Literal["softmax", "sigmoid"] = "softmax"
    """What the router makes of its logits."""
    renormalize: bool = True
    """Divide the scores of a token's experts by their sum."""
    output_scale: float = 1.0
    """The routed experts' weights are multiplied by this, after `renormalize`."""
    balance_loss: float = 0.0
    """Weight of the auxiliary loss of each layer, 1 when the load is even; 0 for none."""
    balance_over: Literal["sequence", "batch"] = "batch"
    """Whether that loss wants the load even in every row, or in the batch (of an accumulation step)."""
    bias_update_rate: float | None = None
    """Balancing without a loss: after a step each expert's selection bias moves by this much towards the mean load. 0
    keeps the biases as they are; None for a router without biases."""

    def __post_init__(self) -> None:
        require_positive(self, "num_experts", "experts_per_token", "expert_dim")
        require(self.experts_per_token <= self.num_experts, "experts_per_token", self.experts_per_token,
                f"must be at most num_experts={self.num_experts}")
        require(self.shared_dim >= 0, "shared_dim", self.shared_dim, "must not be negative")
        require(self.layers is None or (len(self.layers) > 0 and sorted(set(self.layers)) == list(self.layers)),
                "layers", self.layers, "must be layer indices in ascending order, at least one, or none for all")
        require(0 < self.output_scale < math.inf, "output_scale", self.output_scale, "must be positive and finite")
        require(0 <= self.balance_loss < math.inf, "balance_loss", self.balance_loss,
                "must be finite, and not negative")
        require(self.bias_update_rate is None or 0 <= self.bias_update_rate < math.inf, "bias_update_rate",
                self.bias_update_rate, "must be finite and not negative, or none for no biases")
