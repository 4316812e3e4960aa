"""The layers of a model: a block, and how equal and unequal blocks are scanned over."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from mfa_jax import attention
from mfa_jax.axes import constrain
from mfa_jax.cache import Cache
from mfa_jax.config import ModelConfig
from mfa_jax.layers import RMSNorm
from mfa_jax.model.layers import SwiGLU
from mfa_jax.model.moe import MoE, Routing

_CHEAP = frozenset("""
    abs add add_any and broadcast_in_dim clamp concatenate convert_element_type copy cos div eq exp expand_dims ge gt
    integer_pow iota le log log1p logistic lt max min mul ne neg not or pad reduce_max reduce_min reduce_sum reshape
    rsqrt select_n sharding_constraint sign sin slice split sqrt square squeeze stop_gradient sub tanh transpose
    """.split())
"""Primitives that a compiler fuses into what reads their result."""
_GATHERED = "all_gather"
"""Makes weights whole that are split over devices: kept, those of all layers would be whole at once."""


def _costly(primitive: Any, *_: Any, **__: Any) -> bool:
    """What the backward pass keeps of a block: products, kernels, sorts, exchanges, and what has a name.

    The rest is computed again, which costs less than to write and read it: a scan over layers fills the arrays that it
    keeps with zeros, copies each layer's part in, and out again.
    """
    return primitive.name != _GATHERED and primitive.name not in _CHEAP


REMAT_POLICIES: dict[str, Any] = {
    "none": _costly,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
_LONGEST_PATTERN = 8


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + ffn(norm(x))`, the latter a SwiGLU, or `moe` in a layer that has experts."""

    config: ModelConfig
    has_experts: bool = False
    keep_stream: bool = False
    """Whether the stream is handed out, too."""

    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], segments: Int[Array, "B T"] | None,
        cache: Cache | None, inv_freq: Float[Array, " W"] | None,
    ) -> tuple[Float[Array, "B T D"], tuple[Cache | None, Routing | None, Float[Array, "B T D"] | None]]:
        if cache is not None:  # there is no backward pass
            return self.compute(x, positions, segments, cache, inv_freq)
        c = self.config
        # Forward and backward are two loops, which no compiler merges. Of layers in a row it would, and keep what was
        # to be computed again: a barrier holds it off, but where that is cheap either way.
        barrier = c.unroll_layers and c.remat != "none"
        recomputed: Any = nn.remat(Block.compute, prevent_cse=barrier, policy=REMAT_POLICIES[c.remat])
        found: tuple[Array, Any] = recomputed(self, x, positions, segments, None, inv_freq)
        return found

    @nn.compact
    def compute(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], segments: Int[Array, "B T"] | None,
        cache: Cache | None, inv_freq: Float[Array, " W"] | None,
    ) -> tuple[Float[Array, "B T D"], tuple[Cache | None, Routing | None, Float[Array, "B T D"] | None]]:
        """The block itself; called, as a scan does, it recomputes in the backward pass what the config says."""
        c = self.config
        types: dict[str, Any] = {"dtype": jnp.dtype(c.dtype), "param_dtype": jnp.dtype(c.param_dtype)}
        out_scale = (2 * c.num_layers) ** -0.5 if c.depth_scaled_init else 1.0
        x = constrain(x, "batch", "sequence", "act_embed")
        with jax.named_scope(c.attention.variant):
            mixer = attention.build(c.attention, c.position, implementation=c.attention_implementation,
                                    serving=attention.serving(c), out_scale=out_scale, name="attention", **types)
            normed = RMSNorm(c.norm_eps, name="attention_norm", **types)(x)
            y, cache = mixer(normed, positions, segments, cache, inv_freq)
            x = x + y
        with jax.named_scope("ffn"):
            normed, routing = RMSNorm(c.norm_eps, name="ffn_norm", **types)(x), None
            if self.has_experts:
                assert c.moe is not None
                y, routing = MoE(c.moe, out_scale=out_scale, implementation=c.expert_implementation,
                                 exchange=c.expert_exchange, at_once=c.expert_exchange_tokens, name="moe",
                                 **types)(normed, segments)
            else:
                y = SwiGLU(c.ffn_dim, out_scale=out_scale, name="ffn", **types)(normed)
        x = x + y
        return x, (cache, routing, x if self.keep_stream else None)


class Segment(NamedTuple):
    """`repeats` times the blocks of `pattern` (whether each has experts)."""

    pattern: tuple[bool, ...]
    repeats: int


def segments_of(has_experts: tuple[bool, ...]) -> list[Segment]:
    """Layers as few segments, so that a block compiles once a segment and not once a layer.

    From the first layer on, takes the pattern of up to 8 blocks whose repetition covers most layers, of equally good
    ones the shortest: `DDDD MM..M D` is three segments, `DMDM..DM` is one.
    """
    found, start = [], 0
    while start < len(has_experts):
        rest = has_experts[start:]
        candidates = []
        for length in range(1, min(_LONGEST_PATTERN, len(rest)) + 1):
            repeats = 1
            while rest[repeats * length : (repeats + 1) * length] == rest[:length]:
                repeats += 1
            if length == 1 or repeats > 1:
                candidates.append((length * repeats, -length, Segment(rest[:length], repeats)))
        best = max(candidates)[-1]
        found.append(best)
        start += len(best.pattern) * best.repeats
    return found


def scanned(kind: type[nn.Module], length: int, config: ModelConfig, **options: Any) -> Any:
    """`kind` (`Block` or `_Group`) once for each of `length` rows of parameters, caches and frequencies."""
    return nn.scan(
        kind, variable_axes={"params": 0}, split_rngs={"params": True}, length=length,
        in_axes=(nn.broadcast, nn.broadcast, 0, 0), out_axes=0, metadata_params={nn.PARTITION_NAME: "layers"},
        unroll=length if config.unroll_layers else 1,
    )(config, **options)


class _Group(nn.Module):
    """The blocks of one repetition of a pattern; caches and frequencies carry a leading axis over them."""

    config: ModelConfig
    pattern: tuple[bool, ...]
    keep_stream: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], segments: Int[Array, "B T"] | None, cache: Any,
        inv_freq: Float[Array, "P W"] | None,
    ) -> tuple[Float[Array, "B T D"], tuple[Any, Any, Any]]:
        outputs = []
        for j, has_experts in enumerate(self.pattern):
            own = jax.tree.map(lambda leaf: leaf[j], (cache, inv_freq))  # noqa: B023
            block = Block(self.config, has_experts, self.keep_stream, name=f"block_{j}")
            x, out = block(x, positions, segments, *own)
            outputs.append(out)
        return x, joined(outputs, jnp.stack)


class Stack(nn.Module):
    """The layers of a model whose blocks are not all equal, segment by segment; takes and gives what the scan of a
    model of equal blocks does: caches and streams over all layers, routings over those that have experts."""

    config: ModelConfig
    keep_stream: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], segments: Int[Array, "B T"] | None, cache: Any,
        inv_freq: Float[Array, "L W"] | None,
    ) -> tuple[Float[Array, "B T D"], tuple[Any, Any, Any]]:
        c, start, outputs = self.config, 0, []
        for s, (pattern, repeats) in enumerate(segments_of(layer_kinds(c))):
            stop = start + len(pattern) * repeats
            own = jax.tree.map(lambda leaf: leaf[start:stop].reshape(repeats, -1, *leaf.shape[1:]),  # noqa: B023
                               (cache, inv_freq))
            group = scanned(_Group, repeats, c, pattern=pattern, keep_stream=self.keep_stream,
                            name=f"segment_{s}")
            x, out = group(x, positions, segments, *own)
            outputs.append(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), out))
            start = stop
        return x, joined(outputs, jnp.concatenate)


def layer_kinds(config: ModelConfig) -> tuple[bool, ...]:
    """Whether each layer has experts."""
    return tuple(i in config.moe_layers for i in range(config.num_layers))


def joined(outputs: list[tuple[Any, Any, Any]], join: Any) -> tuple[Any, Any, Any]:
    """Caches, routings and streams of several blocks, leaf by leaf on their first axis; None where none left any."""
    kinds = [[part for part in parts if part is not None] for parts in zip(*outputs, strict=True)]
    caches, routings, streams = (jax.tree.map(lambda *leaves: join(leaves), *parts) if parts else None
                                 for parts in kinds)
    return caches, routings, streams
