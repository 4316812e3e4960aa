"""Decode attention: a few new tokens of every row over its cached keys, by the backend that was named.

| implementation | where | what it is |
| --- | --- | --- |
| `reference` | anywhere | the definition, float32, all scores at once; the oracle of the tests |
| `xla` | anywhere | online softmax over blocks, ends at the longest length |
| `mosaic_tpu` | TPU v5e, v5p, v6e | Pallas: copies the exact valid keys of a list of work, on every core |
| `mosaic_tpu_interpret` | anywhere, slowly | the program of `mosaic_tpu` in Pallas' interpreter, for tests and study |
| `mosaic_gpu` | Hopper GPUs | Pallas: equal shares of a list of work on every SM, a warpgroup for each job |
| `mosaic_gpu_interpret` | anywhere, slowly | the program of `mosaic_gpu` in Pallas' interpreter; needs JAX 0.11 |

One stream of keys serves all query heads of MFA, MFA-KR, MQA, and of MLA with its queries absorbed; GQA and MHA have
several. With JAX 0.12 the interpreted programs serve models whose layers are not scanned, the form of decoding: their
ordered callbacks do not pass through flax's scan. `resolve` says what `auto` takes, and why a named
implementation can't serve a call.
"""

from mfa_jax.kernels.calls import Call, Device, default_device, kept_as_words
from mfa_jax.kernels.decode import IMPLEMENTATIONS, MAX_QUERIES, decode_attention, resolve

__all__ = ["IMPLEMENTATIONS", "MAX_QUERIES", "Call", "Device", "decode_attention", "default_device",
           "kept_as_words", "resolve"]
