"""Decoding: `generate` in one compiled call, `stream` as tokens come, `complete` and `stream_text` for text;
`Conversation` for a text that grows turn by turn."""

from mfa_jax.generate.arguments import bucket, cache_size
from mfa_jax.generate.conversation import Conversation
from mfa_jax.generate.loop import Generated, generate, lower_decode, lower_generate, stream
from mfa_jax.generate.sampling import SamplingConfig, sample
from mfa_jax.generate.text import complete, encode_prompts, stream_text

__all__ = [
    "Conversation", "Generated", "SamplingConfig", "bucket", "cache_size", "complete", "encode_prompts", "generate",
    "lower_decode", "lower_generate", "sample", "stream", "stream_text",
]
