"""Calls of `decode_attention` that kernels are compiled, reported and timed for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from mfa_jax.attention import decode_call
from mfa_jax.config import AttentionConfig, GQAConfig, PositionConfig
from mfa_jax.kernels import Call, decode_attention
from mfa_jax.presets import published


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes of one call, with the letters of `decode_attention`."""

    N: int
    H: int
    K: int = 1
    value_width: int | None = None
    """Where keys serve as values; None where values are an array of the same width."""
    rope: bool = False
    alibi: bool = False
    T: int = 1
    dtype: str = "bfloat16"
    cache_dtype: str = "bfloat16"

    @property
    def token_bytes(self) -> int:
        """Bytes of a token in the cache, scales counted in."""
        arrays, itemsize = (2 if self.value_width is None else 1), jnp.dtype(self.cache_dtype).itemsize
        return arrays * self.K * (self.H * itemsize + (4 if itemsize == 1 else 0))

    @property
    def flops_per_key(self) -> int:
        """Of the products of one row with one cached token: scores and averages of T queries of N heads."""
        return 2 * self.T * self.N * (self.H + (self.value_width or self.H))

    def call(self, S: int) -> Call:
        """What `kernels.resolve` is asked for a cache of S tokens."""
        return Call(T=self.T, N=self.N // self.K, S=S, H=self.H, h=self.value_width or self.H,
                    dtype=jnp.dtype(self.dtype), cache_dtype=jnp.dtype(self.cache_dtype),
                    shared=self.value_width is not None, rope=self.rope, alibi=self.alibi)

    def arguments(self, B: int, S: int, array: Callable[[tuple[int, ...], Any], Any]) -> dict[str, Any]:
        """Arrays of a call, made by `array(shape, dtype)`; None where not due."""
        heads = (self.K,) if self.K > 1 else ()
        stored, own_values = (B, *heads, S), self.value_width is None
        scales = jnp.dtype(self.cache_dtype).itemsize == 1
        return {
            "q": array((B, self.T, self.N, self.H), self.dtype),
            "k": array((*stored, self.H), self.cache_dtype),
            "v": array((*stored, self.H), self.cache_dtype) if own_values else None,
            "lengths": array((B,), "int32"),
            "rope": array((self.H // 2,), "float32") if self.rope else None,
            "alibi_slopes": array((self.N,), "float32") if self.alibi else None,
            "k_scale": array(stored, "float32") if scales else None,
            "v_scale": array(stored, "float32") if scales and own_values else None,
        }


def decode(case: Case, arrays: dict[str, Any], implementation: str) -> Any:
    """`decode_attention` of a case, with its log-sum-exp."""
    return decode_attention(**arrays, scale=case.H**-0.5, value_width=case.value_width, return_lse=True,
                            implementation=implementation)


def case_of(config: AttentionConfig) -> Case:
    """The call that a layer of this config makes when it decodes one token, in bfloat16."""
    call = decode_call(config, PositionConfig(), capacity=1, dtype=jnp.bfloat16, cache_dtype=jnp.bfloat16)
    K = config.num_kv_heads if isinstance(config, GQAConfig) else 1
    return Case(call.N * K, call.H, K, value_width=call.h if call.shared else None, rope=call.rope)


_MFA, _MFA_KR = Case(64, 256), Case(64, 256, value_width=256, rope=True)
_MLA = Case(128, 576, value_width=512)
CASES = {
    "MFA 64x256": _MFA,
    "MFA-KR 64x256": _MFA_KR,
    "MLA 128x(512+64)": _MLA,
    "GQA 64/4x128": Case(64, 128, K=4),
    "MQA 32x128": Case(32, 128),
    "MFA 64x256 int8": dataclasses.replace(_MFA, cache_dtype="int8"),
    "MFA-KR 64x256 int8": dataclasses.replace(_MFA_KR, cache_dtype="int8"),
    "MLA 128x(512+64) int8": dataclasses.replace(_MLA, cache_dtype="int8"),
    "GQA 64/4x128 int8": Case(64, 128, K=4, cache_dtype="int8"),
}
"""What is reported: the published shapes of Step-3 (MFA), DeepSeek-V2 (MLA) and of common grouped models."""
BORDERS = {
    "MHA 32x128": Case(32, 128, K=32),
    "GQA 16/4x192": Case(16, 192, K=4),
    "MQA 8x64": Case(8, 64),
    "odd 3x80": Case(3, 80),
    "one head of 128": Case(1, 128),
    "MFA-KR 16x128": Case(16, 128, value_width=128, rope=True),
    "MFA-KR 16x64": Case(16, 64, value_width=64, rope=True),
    "MFA-KR 16x192": Case(16, 192, value_width=192, rope=True),
    "MFA 64x256 float32": dataclasses.replace(_MFA, dtype="float32", cache_dtype="float32"),
    "MFA 64x256, 4 drafted, ALiBi": dataclasses.replace(_MFA, T=4, alibi=True),
    "MFA-KR 64x256 int8, 2 drafted": dataclasses.replace(_MFA_KR, T=2, cache_dtype="int8"),
    "MLA 128x(512+64), 8 drafted": dataclasses.replace(_MLA, T=8),
}
"""What only has to compile, everywhere: the widths, head counts, types and encodings at the ends of what is served."""
PAPER = {name: case_of(published[name].attention)
         for name in ("paper-7b-mha", "paper-7b-mla", "paper-7b-mfa", "paper-7b-mfa-kr")}
"""The 7B models of the paper, as `presets` has them."""
GPU_BORDERS = {
    "MFA-KR 64x256 float8": dataclasses.replace(_MFA_KR, cache_dtype="float8_e4m3fn"),
    "MLA 128x(512+64) float8": dataclasses.replace(_MLA, cache_dtype="float8_e4m3fn"),
    "MLA 128x(512+64), ALiBi": dataclasses.replace(_MLA, alibi=True),
    "MFA 64x320 int8": Case(64, 320, cache_dtype="int8"),
}
"""What has to compile on a GPU besides: types that TPUs do not read, and the limits of its memory."""
