"""Decoding as one jit-compiled call: prefill, then a loop on the device.

Prompts of a batch may have different lengths: they are padded on the right to one bucket, prefilled at once, and each
row's cache is cut back to its own length; what the padding left there is overwritten before it is ever seen. Sizes
are rounded up to buckets, so that a conversation compiles once per bucket and not once per turn.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from mfa_jax import axes
from mfa_jax.attention import serving
from mfa_jax.attention.cached import placement
from mfa_jax.config import require
from mfa_jax.generate.arguments import SMALLEST_BUCKET, prepare
from mfa_jax.generate.sampling import SamplingConfig, sample
from mfa_jax.kernels import kept_as_words
from mfa_jax.model.transformer import Transformer, cache_length, init_cache, unstack_layers
from mfa_jax.words import as_words, from_words


class Generated(NamedTuple):
    """What was generated for each row; row b's tokens are `tokens[b, :lengths[b]]`, a stop token counted in."""

    tokens: Int[Array, "B M"]
    """Ids; past a row's length, -1."""
    lengths: Int[Array, " B"]
    """How many tokens the row got."""
    logprobs: Float[Array, "B M"]
    """Log-probability of each token under the model, before temperature and filters; past a row's length, 0."""
    stopped: Bool[Array, " B"]
    """Whether the row ended with a stop token (else it ran to `max_new_tokens`)."""


class _State(NamedTuple):
    caches: Any
    generated: Generated
    last: Int[Array, " B"]
    step: Int[Array, ""]
    seen: Any
    keys: Key[Array, " B"]
    stops: Int[Array, "B Z"]


def generate(
    model: Transformer, params: Any, prompts: Any, lengths: Any, sampling: SamplingConfig, key: Key[Array, "..."], *,
    max_new_tokens: int, stop_tokens: Any = (), capacity: int | None = None, cache_dtype: str | None = None,
) -> Generated:
    """Continues every row of `prompts`, in one compiled call.

    The same arguments give the same tokens; what a row gets does not depend on the other rows.

    Args:
      model: the model that `params` belong to (layers stacked, as training keeps them).
      prompts: token ids `[B, T]`, padded on the right with anything.
      lengths: tokens of each row's prompt, `[B]`, 1 .. T.
      sampling: how tokens are chosen.
      key: a PRNG key, of which row b draws from `fold_in(key, b)`; or one for each row, `[B]`.
      max_new_tokens: at most so many tokens a row.
      stop_tokens: ids that end a row: one list for all rows, or a `[B, Z]` array with a list for each row, filled up
        with -1.
      capacity: tokens that a row of the cache can hold; None for what this call needs, rounded up to a bucket.
      cache_dtype: of the cached arrays; None for the model's compute type.

    Raises:
      ValueError: a prompt longer than the cache, `max_new_tokens` past the cache, an id or a stop token
        outside the vocabulary, an empty prompt.
    """
    prepared = prepare(model, prompts, lengths, max_new_tokens, stop_tokens, capacity)
    state = _generate(model, params, *prepared[:3], key, jnp.int32(max_new_tokens), sampling=sampling,
                      buffer=prepared[3], capacity=prepared[4], cache_dtype=cache_dtype)
    return jax.tree.map(lambda x: x[:, :max_new_tokens] if x.ndim == 2 else x, state)


def stream(
    model: Transformer, params: Any, prompts: Any, lengths: Any, sampling: SamplingConfig, key: Key[Array, "..."], *,
    max_new_tokens: int, stop_tokens: Any = (), capacity: int | None = None, cache_dtype: str | None = None,
    chunk: int = 4,
) -> Iterator[Generated]:
    """As `generate`, handing out what is there after every `chunk` tokens; the last one equals `generate`'s result."""
    require(chunk >= 1, "chunk", chunk, "must be at least 1")
    prepared = prepare(model, prompts, lengths, max_new_tokens, stop_tokens, capacity)
    state = _prefill(model, params, *prepared[:3], key, sampling=sampling, buffer=prepared[3], capacity=prepared[4],
                     cache_dtype=cache_dtype)
    limit = 1
    while True:
        yield jax.tree.map(lambda x: np.asarray(x[:, :max_new_tokens] if x.ndim == 2 else x), state.generated)
        done = np.asarray(state.generated.stopped).all()
        if done or limit >= max_new_tokens:
            return
        limit = min(limit + chunk, max_new_tokens)
        state = decode(model, params, state, jnp.int32(limit), sampling=sampling)


def lower_generate(
    model: Transformer, params: Any, *, batch_size: int, prompt_tokens: int, max_new_tokens: int,
    sampling: SamplingConfig, capacity: int | None = None, cache_dtype: str | None = None,
) -> jax.stages.Lowered:
    """The program of `generate` for such a batch, without running it: to compile ahead of time, and to look into.

    Args:
      params: arrays, or their `jax.ShapeDtypeStruct`s.
    """
    prompts = np.zeros((batch_size, prompt_tokens), np.int32)
    *arrays, buffer, capacity = prepare(model, prompts, [prompt_tokens] * batch_size, max_new_tokens, (), capacity)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return _generate.lower(model, params, *arrays, key, np.int32(max_new_tokens), sampling=sampling, buffer=buffer,
                           capacity=capacity, cache_dtype=cache_dtype)


def lower_decode(
    model: Transformer, params: Any, *, batch_size: int, capacity: int, sampling: SamplingConfig,
    cache_dtype: str | None = None,
) -> jax.stages.Lowered:
    """The program with which `stream` goes on, without running it: a loop that decodes a token for each row.

    Args:
      params: arrays, or their `jax.ShapeDtypeStruct`s.
      capacity: tokens that a row of the cache can hold.
    """
    state = abstract_state(model, params, batch_size=batch_size, capacity=capacity, sampling=sampling,
                           cache_dtype=cache_dtype)
    return decode.lower(model, params, state, jax.ShapeDtypeStruct((), jnp.int32), sampling=sampling)


def abstract_state(
    model: Transformer, params: Any, *, batch_size: int, capacity: int, sampling: SamplingConfig,
    cache_dtype: str | None = None,
) -> Any:
    """What `lower_decode`'s loop carries, as `jax.ShapeDtypeStruct`s: caches, where they lie on the ambient mesh, and
    what each row got."""
    def prefill(params: Any) -> _State:
        prompts, lengths = jnp.zeros((batch_size, SMALLEST_BUCKET), jnp.int32), jnp.ones((batch_size,), jnp.int32)
        return _prefill(model, params, prompts, lengths, jnp.zeros((batch_size, 0), jnp.int32), jax.random.key(0),
                        sampling=sampling, buffer=SMALLEST_BUCKET, capacity=capacity, cache_dtype=cache_dtype)

    state, mesh = jax.eval_shape(prefill, params), jax.sharding.get_mesh()
    if mesh.empty:
        return state
    heads, served = model.config.attention.num_heads, serving(model.config)
    at = jax.tree.map(lambda _: PartitionSpec(), state)._replace(
        caches=tuple(placement(cache, heads, served) for cache in state.caches))
    return jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)), state, at)


def _unrolled(model: Transformer, params: Any) -> Callable[..., Any]:
    """`apply` of the model with its layers one after the other, the parameters given."""
    variables = {"params": unstack_layers(params, model.config.num_layers)}
    return functools.partial(Transformer(model.config, scan_layers=False).apply, variables)


_STATIC = ("model", "sampling", "buffer", "capacity", "cache_dtype")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _generate(
    model: Transformer, params: Any, prompts: Array, lengths: Array, stops: Array, key: Array, limit: Array, *,
    sampling: SamplingConfig, buffer: int, capacity: int, cache_dtype: str | None,
) -> Generated:
    state = _prefill(model, params, prompts, lengths, stops, key, sampling=sampling, buffer=buffer, capacity=capacity,
                     cache_dtype=cache_dtype)
    return decode(model, params, state, limit, sampling=sampling).generated


def _readable(state: _State) -> _State:
    """What each row got on every device: of several processes each can read it."""
    return state._replace(generated=jax.tree.map(lambda x: axes.constrain(x, *[None] * x.ndim), state.generated))


@functools.partial(jax.jit, static_argnames=_STATIC)
def _prefill(
    model: Transformer, params: Any, prompts: Array, lengths: Array, stops: Array, key: Array, *,
    sampling: SamplingConfig, buffer: int, capacity: int, cache_dtype: str | None,
) -> _State:
    """Reads the prompts into fresh caches and chooses the first token of each row."""
    B, T = prompts.shape
    # A prompt attends to all that is allocated: only then is there room for what follows.
    caches = init_cache(model.config, B, T, cache_dtype, scan_layers=False)
    seen = None
    if sampling.repetition_penalty != 1:
        real = jnp.arange(T) < lengths[:, None]
        seen = jnp.zeros((B, model.config.vocab_size), bool).at[jnp.arange(B)[:, None], prompts].max(real)
    state = read(model, params, caches, prompts, lengths, stops, key, seen, sampling=sampling, buffer=buffer)
    return _readable(state._replace(caches=tuple(cache.with_capacity(capacity) for cache in state.caches)))


def read(
    model: Transformer, params: Any, caches: Any, tokens: Int[Array, "B T"], lengths: Int[Array, " B"],
    stops: Int[Array, "B Z"], key: Key[Array, "..."], seen: Bool[Array, "B V"] | None, *, sampling: SamplingConfig,
    buffer: int,
) -> _State:
    """Appends tokens to the caches, `lengths` of them in each row, and chooses the one after them: where `decode`
    goes on from.

    Args:
      caches: as `init_cache` makes them with `scan_layers=False`.
      seen: which ids stand in the row's text, these tokens included; needed for a repetition penalty.
      buffer: tokens that there is room for in the output.
    """
    B, apply, start = len(tokens), _unrolled(model, params), cache_length(caches)
    require(jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape in ((), (B,)), "key", (key.dtype, key.shape),
            f"must be one key of jax.random.key, or {B}, one for each row")
    hidden, caches = apply(tokens, cache=caches, method="hidden")
    caches = tuple(cache.with_length(start + lengths) for cache in caches)
    last_hidden = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    empty = Generated(jnp.full((B, buffer), -1, jnp.int32), jnp.zeros((B,), jnp.int32), jnp.zeros((B, buffer)),
                      jnp.zeros((B,), bool))
    keys = key if key.ndim else jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(B))
    state = _State(caches, empty, jnp.zeros((B,), jnp.int32), jnp.int32(0), seen, keys, stops)
    return _choose(state, apply(last_hidden, method="logits"), sampling)


@functools.partial(jax.jit, static_argnames=("model", "sampling"), donate_argnames=("state",))
def decode(model: Transformer, params: Any, state: _State, limit: Array, *, sampling: SamplingConfig) -> _State:
    """Goes on until every row has stopped or `limit` tokens are chosen."""
    # Outside the loop: slicing the stacked weights in it would copy them for every token.
    apply = _unrolled(model, params)

    def body(state: _State) -> _State:
        hidden, caches = apply(state.last[:, None], cache=state.caches, method="hidden")
        logits = apply(hidden[:, 0], method="logits")
        return _choose(state._replace(caches=caches), logits, sampling)

    def unfinished(state: _State) -> Bool[Array, ""]:
        return (state.step < limit) & ~jnp.all(state.generated.stopped)

    # Carried as what they are written and read as.
    types = jax.tree.map(lambda x: x.dtype, state.caches)

    def carried(state: _State) -> _State:
        return state._replace(caches=jax.tree.map(as_words, state.caches)) if kept_as_words() else state

    def used(state: _State) -> _State:
        return state._replace(caches=jax.tree.map(from_words, state.caches, types))

    return _readable(used(jax.lax.while_loop(unfinished, lambda s: carried(body(used(s))), carried(state))))


def _choose(state: _State, logits: Float[Array, "B V"], sampling: SamplingConfig) -> _State:
    """Chooses the next token of each row that has not stopped, and notes it."""
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.keys, state.step)
    tokens, logprobs = sample(logits, keys, sampling, state.seen)
    g, running = state.generated, ~state.generated.stopped
    seen = state.seen
    if seen is not None:
        seen = seen.at[jnp.arange(len(tokens)), tokens].max(running)
    generated = Generated(
        tokens=g.tokens.at[:, state.step].set(jnp.where(running, tokens, -1)),
        lengths=g.lengths + running,
        logprobs=g.logprobs.at[:, state.step].set(jnp.where(running, logprobs, 0.0)),
        stopped=g.stopped | jnp.any(tokens[:, None] == state.stops, axis=1),
    )
    return state._replace(generated=generated, last=tokens, step=state.step + 1, seen=seen)
