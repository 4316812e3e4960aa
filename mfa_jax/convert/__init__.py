"""Other people's checkpoints as ours."""

from mfa_jax.convert.llama import config_from_llama, load_llama

__all__ = ["config_from_llama", "load_llama"]
