"""Other people's checkpoints as ours, and ours as theirs."""

from mfa_jax.convert.checkpoint import config_from_hf, load_pretrained, save_pretrained
from mfa_jax.convert.tokenizer import pretrained_tokenizer

__all__ = ["config_from_hf", "load_pretrained", "pretrained_tokenizer", "save_pretrained"]
