"""Other people's checkpoints as ours, and ours as theirs."""

from mfa_jax.convert.balance import balanced
from mfa_jax.convert.checkpoint import (
    config_from_hf,
    load_pretrained,
    map_pretrained,
    pretrained_config,
    save_pretrained,
)
from mfa_jax.convert.exact import expand_key_reuse, gqa_to_mfa, gqa_to_mfa_kr
from mfa_jax.convert.run_folder import host, save_run
from mfa_jax.convert.tokenizer import pretrained_tokenizer

__all__ = [
    "balanced", "config_from_hf", "expand_key_reuse", "gqa_to_mfa", "gqa_to_mfa_kr", "host",
    "load_pretrained", "map_pretrained", "pretrained_config", "pretrained_tokenizer", "save_pretrained", "save_run",
]
