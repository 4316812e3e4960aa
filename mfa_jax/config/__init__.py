"""What a run is made of: frozen, hashable dataclasses, checked once when they are built, JSON both ways.

Every error is a `ValueError` that names the field, the value and what would be accepted. Frozen configs are
static arguments of `jax.jit`: two equal configs share one compilation.
"""

from mfa_jax.config.attention import (
    VARIANTS,
    AttentionConfig,
    GQAConfig,
    MFAConfig,
    MFAKRConfig,
    MLAConfig,
    PositionConfig,
    RopeScaling,
)
from mfa_jax.config.checks import require
from mfa_jax.config.model import DType, ModelConfig
from mfa_jax.config.moe import MoEConfig
from mfa_jax.config.serialization import from_dict, load_json, to_dict, to_json
from mfa_jax.config.training import (
    DataConfig,
    DistillationConfig,
    GroupRates,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)

__all__ = [
    "VARIANTS", "AttentionConfig", "DType", "DataConfig", "DistillationConfig", "GQAConfig", "GroupRates", "MFAConfig",
    "MFAKRConfig", "MLAConfig", "MeshConfig", "MoEConfig", "ModelConfig", "OptimizerConfig", "PositionConfig",
    "RopeScaling", "TrainConfig", "from_dict", "load_json", "require", "to_dict", "to_json",
]
