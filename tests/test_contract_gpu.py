"""The contract's equality of prefill and decoding through the GPU kernel, in its interpreter, on widths it serves."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from mfa_jax.attention import decode_call
from mfa_jax.config import AttentionConfig, GQAConfig, MFAConfig, MFAKRConfig, MLAConfig
from mfa_jax.kernels import Device, resolve
from tests.contract import CACHE_DTYPES, compiled, cut_back, layers_of, model_config, tokens

ATTENTION: dict[str, AttentionConfig] = {
    "mha": GQAConfig(num_heads=2, num_kv_heads=2, head_dim=64),
    "gqa": GQAConfig(num_heads=4, num_kv_heads=2, head_dim=64),
    "mqa": GQAConfig(num_heads=4, num_kv_heads=1, head_dim=64),
    "mla": MLAConfig(num_heads=4, nope_dim=8, rope_dim=64, value_dim=6, latent_dim=64, query_rank=12),
    "mfa": MFAConfig(num_heads=4, latent_dim=64, query_rank=12),
    "mfa_kr": MFAKRConfig(num_heads=4, latent_dim=64, query_rank=12, alpha_init=0.5),
}
STARTS, STEPS, CAPACITY = (1, 2, 3, 62, 63, 64), 3, 72
H100 = Device("gpu", "NVIDIA H100 80GB HBM3", 9.0, 132)


def apart(num_layers: int) -> float:
    """How far two evaluations in bfloat16 are, as a root mean square of logits of unit variance: each of 11 roundings a
    layer (the average, its projection, two sums, two norms, five of the feed-forward) falls otherwise in one than in
    the other, by 2 ** -8 / sqrt(7) of what is rounded: half a unit of the last place, uniformly, over a mantissa of 1
    to 2. Twice that for the worst of some rows."""
    return 2 * (2 * 11 * num_layers) ** 0.5 * 2**-8 / 7**0.5


# Each variant with both types of cache, each encoding with both; an interpreted layer is compiled for seconds, so that
# most have one, and two where what one layer's kernel gives is what the next one's reads.
@pytest.mark.slow
@pytest.mark.skipif(not hasattr(plgpu, "InterpretGPUParams"), reason="no interpreter before JAX 0.11")
@pytest.mark.parametrize(("variant", "encoding", "dtype", "num_layers"), [
    ("mfa", "rope", "bfloat16", 2), ("mfa", "alibi", "int8", 1),
    ("mfa_kr", "rope", "bfloat16", 1), ("mfa_kr", "rope", "int8", 2), ("mfa_kr", "alibi", "bfloat16", 1),
    ("mla", "rope", "bfloat16", 1), ("mla", "alibi", "int8", 1),
    ("mqa", "none", "bfloat16", 1), ("mqa", "rope", "int8", 1),
    ("gqa", "rope", "bfloat16", 1), ("gqa", "alibi", "int8", 1),
    ("mha", "alibi", "bfloat16", 1), ("mha", "none", "int8", 1)])
def test_prefill_then_decode_equals_the_full_forward_and_the_reference(
    variant: str, encoding: str, dtype: str, num_layers: int
) -> None:
    """Ragged rows, from one token on, that decode up to, over and past the end of a block of keys."""
    served, reference = (
        model_config(variant, encoding, attention=ATTENTION[variant], num_layers=num_layers, dtype="bfloat16",
                     decode_implementation=name) for name in ("mosaic_gpu_interpret", "reference"))
    call = decode_call(served.attention, served.position, capacity=CAPACITY, dtype="bfloat16", cache_dtype=dtype)
    assert resolve("mosaic_gpu", call, H100) == "mosaic_gpu", "what is interpreted, a GPU would run"
    c, by_definition = (compiled(config, scan_layers=False) for config in (served, reference))
    B, start = len(STARTS), np.array(STARTS)
    rows = jnp.broadcast_to(tokens(shape=(1, max(STARTS) + STEPS)), (B, max(STARTS) + STEPS))
    full = np.asarray(c.full(c.params, rows))[0]
    out, cache = c.step(c.params, rows, c.cache(B, CAPACITY, dtype))
    assert all(stream.dtype == dtype for layer in layers_of(cache) for stream in layer.streams)
    errors = [np.abs(np.asarray(out)[r, :n] - full[:n]).max() for r, n in enumerate(STARTS)]
    cache, differences = cut_back(cache, jnp.asarray(start)), []
    for t in range(STEPS):
        new = rows[jnp.arange(B), start + t][:, None]
        wanted, _ = by_definition.step(c.params, new, cache)
        out, cache = c.step(c.params, new, cache)
        differences.append(np.asarray(out - wanted)[:, 0])
        errors.append(np.abs(np.asarray(out)[:, 0] - full[start + t]).max())
    of_rows = np.sqrt(np.mean(np.square(differences), axis=(0, 2)))
    assert 0 < of_rows.max() < apart(num_layers)
    assert max(errors) < CACHE_DTYPES[dtype]
