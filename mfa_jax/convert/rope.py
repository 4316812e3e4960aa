"""The rope settings of a Hugging Face `config.json`, read and written.

Written is the old spelling, `rope_theta` and `rope_scaling`: every version of every engine reads it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mfa_jax.config import PositionConfig, RopeScaling, from_dict, require

# `finetuned` says how the weights came about and changes nothing in the forward pass.
_KEYS = {
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings",
    "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim",
    "truncate", "finetuned",
}
_REQUIRED: Any = object()


def get(values: Mapping[str, Any], name: str, kind: Any, default: Any = _REQUIRED) -> Any:
    """A value of a `config.json`, of type `kind`; `default` where it is absent or null.

    Raises:
      ValueError: another type, or absent and without a default.
    """
    value = values.get(name)
    if value is not None:
        return from_dict(kind, value, name)
    require(default is not _REQUIRED, name, None, "is missing from config.json")
    return default


def read_rope(values: Mapping[str, Any], context_length: str = "max_position_embeddings") -> PositionConfig:
    """The encoding, from `rope_parameters` (new spelling), or `rope_scaling` and `rope_theta` (old).

    Args:
      values: of config.json, with `rope_theta` in it or among the rope settings.
      context_length: the name under which this architecture keeps its context length.

    Raises:
      ValueError: a value is missing or makes no sense.
      NotImplementedError: a rope type other than default, linear, llama3 and yarn, or a setting that ours lacks.
    """
    where = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    rope = {key: value for key, value in get(values, where, dict, {}).items() if value is not None}
    unknown = sorted(set(rope) - _KEYS)
    if unknown:
        raise NotImplementedError(f"{where} holds {', '.join(unknown)}: what these would change is unknown")
    if {**values, **rope}.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise NotImplementedError("partial_rotary_factor: rope turns whole heads only")
    base = get(rope, "rope_theta", float, None) or get(values, "rope_theta", float)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return PositionConfig(base=base)
    if kind == "linear":
        return PositionConfig(base=base, scaling=RopeScaling("linear", factor=get(rope, "factor", float)))
    if kind not in ("llama3", "yarn"):
        raise NotImplementedError(f"rope type {kind!r}: only default, linear, llama3 and yarn can be read")
    original = (get(values, "original_max_position_embeddings", int, None)
                or get(rope, "original_max_position_embeddings", int, None) or get(values, context_length, int))
    if kind == "llama3":
        factors = {name: get(rope, name, float) for name in ("factor", "low_freq_factor", "high_freq_factor")}
        scaling = RopeScaling("llama3", original_max_positions=original, **factors)
    else:
        scaling = _read_yarn(rope, original, get(values, context_length, int, None))
    return PositionConfig(base=base, scaling=scaling)


def _read_yarn(rope: Mapping[str, Any], original: int, context: int | None) -> RopeScaling:
    if rope.get("truncate", True) is not True:
        raise NotImplementedError("truncate=False: yarn's range of pairs is rounded to whole pairs")
    factor = get(rope, "factor", float, None)
    if factor is None:
        require(context is not None, "factor", None, "is missing from config.json, and so is the context length")
        assert context is not None
        factor = context / original
    magnitude = get(rope, "attention_factor", float, None)
    mscale, mscale_all = get(rope, "mscale", float, 0.0), get(rope, "mscale_all_dim", float, 0.0)
    if magnitude is None and mscale and mscale_all:
        magnitude = (0.1 * mscale * math.log(factor) + 1) / (0.1 * mscale_all * math.log(factor) + 1)
    return RopeScaling(
        "yarn", factor=factor, original_max_positions=original, attention_factor=magnitude,
        beta_fast=get(rope, "beta_fast", float, 32.0), beta_slow=get(rope, "beta_slow", float, 1.0))


def write_rope(position: PositionConfig) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of a rope encoding; `read_rope` makes the same encoding of them."""
    scaling = position.scaling
    if scaling is None:
        return {"rope_theta": position.base, "rope_scaling": None}
    rope: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        rope["original_max_position_embeddings"] = scaling.original_max_positions
    if scaling.kind == "llama3":
        rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        rope |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        if scaling.attention_factor is not None:
            rope["attention_factor"] = scaling.attention_factor
    return {"rope_theta": position.base, "rope_scaling": rope}
