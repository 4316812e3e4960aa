"""Decoding: against a plain loop over the full forward, ragged rows, stops, seeds, streaming, compilations, errors."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.opening import decode_kernel
from mfa_jax import axes
from mfa_jax.config import ModelConfig, MoEConfig
from mfa_jax.data import ByteTokenizer
from mfa_jax.generate import (
    SamplingConfig,
    arguments,
    bucket,
    complete,
    encode_prompts,
    generate,
    lower_decode,
    stream,
    stream_text,
)
from mfa_jax.generate import loop as generate_loop
from mfa_jax.model.transformer import Transformer, init_params
from tests.contract import ATTENTION, V, compiled, model_config, tokens

GREEDY = SamplingConfig(temperature=0)
KEY = jax.random.key(0)
LENGTHS = np.array([3, 7, 5])
PROMPTS = np.asarray(tokens(4, (3, 7)))
NEW = 6


def test_buckets_waste_at_most_half() -> None:
    assert [bucket(n) for n in (1, 32, 33, 48, 49, 64, 65, 97, 128, 129)] == [
        32, 32, 48, 48, 64, 64, 96, 128, 128, 192]


@pytest.mark.parametrize("variant", [
    "mfa", *(pytest.param(name, marks=pytest.mark.slow) for name in ATTENTION if name != "mfa")])
def test_greedy_equals_a_loop_over_the_full_forward(variant: str) -> None:
    """Each row alone, the whole text forwarded again for every token; log-probabilities of what was chosen besides."""
    c = compiled(model_config(variant))
    found = generate(c.model, c.params, PROMPTS, LENGTHS, GREEDY, KEY, max_new_tokens=NEW)
    assert found.tokens.shape == (3, NEW) and found.lengths.tolist() == [NEW] * 3
    for row, length in enumerate(LENGTHS):
        text = np.zeros((1, 16), np.int32)
        text[0, :length] = PROMPTS[row, :length]
        for t in range(NEW):
            logits = np.asarray(c.full(c.params, text))[0, length + t - 1].astype(np.float64)
            text[0, length + t] = logits.argmax()
            logprob = logits.max() - np.log(np.exp(logits).sum())
            np.testing.assert_allclose(found.logprobs[row, t], logprob, atol=1e-4)
        assert found.tokens[row].tolist() == text[0, length : length + NEW].tolist()


def test_a_row_does_not_depend_on_the_others() -> None:
    """Neither greedy nor sampled: row 1 stays bit-equal when the other prompts change."""
    c = compiled(model_config("mfa"))
    others = PROMPTS.copy()
    others[[0, 2]] = (others[[0, 2]] + 5) % V
    for sampling in (GREEDY, SamplingConfig(temperature=0.8, top_k=9, top_p=0.9)):
        a, b = (generate(c.model, c.params, p, LENGTHS, sampling, KEY, max_new_tokens=NEW) for p in (PROMPTS, others))
        assert a.tokens[1].tolist() == b.tokens[1].tolist()
        assert a.logprobs[1].tolist() == b.logprobs[1].tolist()


def test_the_seed_decides() -> None:
    c = compiled(model_config("mfa"))
    same, again, other = (
        generate(c.model, c.params, PROMPTS, LENGTHS, SamplingConfig(), jax.random.key(seed), max_new_tokens=NEW)
        for seed in (1, 1, 2))
    chex.assert_trees_all_equal(same, again)
    assert same.tokens.tolist() != other.tokens.tolist()


def test_a_row_may_have_a_key_of_its_own() -> None:
    """`fold_in` of one key is the default; a row's key moves with it."""
    c = compiled(model_config("mfa"))
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(KEY, jnp.arange(3))
    found = [generate(c.model, c.params, PROMPTS[rows], LENGTHS[rows], SamplingConfig(), key, max_new_tokens=NEW).tokens
             for rows, key in (([0, 1, 2], KEY), ([0, 1, 2], keys), ([2, 0, 1], keys[jnp.array([2, 0, 1])]))]
    assert found[0].tolist() == found[1].tolist() == found[2][np.array([1, 2, 0])].tolist()
    with pytest.raises(ValueError, match=r"key=\(key<fry>, \(2,\)\): must be one key of jax.random.key, or 3"):
        generate(c.model, c.params, PROMPTS, LENGTHS, GREEDY, keys[:2], max_new_tokens=NEW)


def test_rows_end_at_their_own_stop_tokens() -> None:
    c = compiled(model_config("mfa"))
    free = np.asarray(generate(c.model, c.params, PROMPTS, LENGTHS, GREEDY, KEY, max_new_tokens=NEW).tokens)
    stops = np.array([[free[0, 2]], [-1], [free[2, 0]]])
    found = generate(c.model, c.params, PROMPTS, LENGTHS, GREEDY, KEY, max_new_tokens=NEW, stop_tokens=stops)
    ends = [free[0].tolist().index(free[0, 2]) + 1, NEW, 1]
    assert found.lengths.tolist() == ends and found.stopped.tolist() == [True, False, True]
    for row, end in enumerate(ends):
        assert found.tokens[row].tolist() == [*free[row, :end], *[-1] * (NEW - end)]
        assert np.all(np.asarray(found.logprobs[row, end:]) == 0)


def test_repetition_penalty_counts_the_prompt_and_what_was_generated() -> None:
    """With an extreme penalty no token of the row comes twice while fresh ones are left."""
    c = compiled(model_config("mfa"))
    sampling = SamplingConfig(temperature=0, repetition_penalty=100.0)
    found = generate(c.model, c.params, PROMPTS, LENGTHS, sampling, KEY, max_new_tokens=NEW)
    plain = generate(c.model, c.params, PROMPTS, LENGTHS, GREEDY, KEY, max_new_tokens=NEW)
    assert found.tokens.tolist() != plain.tokens.tolist()
    for row, length in enumerate(LENGTHS):
        text = [*PROMPTS[row, :length].tolist(), *found.tokens[row].tolist()]
        positive = [t for t in range(length, len(text)) if text[t] in text[:t]]
        logits = np.asarray(c.full(c.params, np.array([text + [0] * (16 - len(text))])))[0]
        assert all(logits[t - 1].max() <= 0 or t not in positive for t in range(length, len(text)))


def test_streaming_ends_at_what_generate_returns() -> None:
    c = compiled(model_config("mfa"))
    sampling = SamplingConfig(temperature=0.9)
    whole = generate(c.model, c.params, PROMPTS, LENGTHS, sampling, KEY, max_new_tokens=NEW)
    parts = list(stream(c.model, c.params, PROMPTS, LENGTHS, sampling, KEY, max_new_tokens=NEW, chunk=2))
    assert [int(p.lengths[0]) for p in parts] == [1, 3, 5, 6]
    for part in parts:
        size = int(part.lengths[0])
        assert part.tokens[:, :size].tolist() == np.asarray(whole.tokens)[:, :size].tolist()
    chex.assert_trees_all_close(parts[-1], jax.device_get(whole), atol=1e-6)


def test_text_in_text_out() -> None:
    c = compiled(model_config("mfa", vocab_size=264))
    sampling = SamplingConfig(temperature=1.0)
    options = {"max_new_tokens": 12}
    tokenizer = ByteTokenizer()
    both = complete(c.model, c.params, tokenizer, ["def f", "class"], sampling, KEY, **options)
    pieces = stream_text(c.model, c.params, tokenizer, "def f", sampling, KEY, **options)
    assert "".join(pieces) == both[0]
    with pytest.raises(ValueError, match="prompt='': must have at least one token"):
        complete(c.model, c.params, tokenizer, [""], sampling, KEY, **options)
    begun = complete(c.model, c.params, tokenizer, ["def f"], GREEDY, KEY, add_bos_token=True, **options)
    ids = np.array([[tokenizer.bos_id, *b"def f"]])
    found = generate(c.model, c.params, ids, [6], GREEDY, KEY, stop_tokens=[tokenizer.eos_id], **options)
    assert begun == [tokenizer.decode(np.asarray(found.tokens[0, : found.lengths[0]]).tolist())]
    with pytest.raises(ValueError, match=r"texts='def f': must be a sequence of texts, not one text"):
        encode_prompts(tokenizer, "def f")
    with pytest.raises(ValueError, match=r"texts=\[\]: must be at least one"):
        complete(c.model, c.params, tokenizer, [], sampling, KEY, **options)


def test_only_tokens_that_the_tokenizer_spells_are_written() -> None:
    """A model's table may have more rows than its tokenizer has tokens; half of this one's choices would be such."""
    tokenizer = ByteTokenizer()
    c = compiled(model_config("mfa", vocab_size=2 * tokenizer.vocab_size))
    sampling = SamplingConfig(temperature=2.0)
    options = {"max_new_tokens": 24, "stop_at_end": False}
    found = complete(c.model, c.params, tokenizer, ["def f"], sampling, KEY, **options)
    pieces = stream_text(c.model, c.params, tokenizer, "def f", sampling, KEY, **options)
    assert found[0] and "".join(pieces) == found[0]
    limited = dataclasses.replace(sampling, vocab_limit=100)
    assert max(complete(c.model, c.params, tokenizer, ["a"], limited, KEY, **options)[0]) < chr(100)


def test_a_conversation_compiles_once_per_bucket() -> None:
    """Turns of growing length and other limits reuse one program until a bucket is full."""
    c = compiled(model_config("mfa"))

    def turn(length: int, new: int) -> None:
        prompts = np.ones((1, length), np.int32)
        generate(c.model, c.params, prompts, [length], GREEDY, KEY, max_new_tokens=new)

    turn(10, 9)
    before = generate_loop._generate._cache_size()
    for length, new in ((4, 3), (12, 20), (19, 12)):
        turn(length, new)
    assert generate_loop._generate._cache_size() == before
    turn(40, 9)
    assert generate_loop._generate._cache_size() == before + 1


def with_experts(variant: str) -> ModelConfig:
    """The second layer has experts, as many as a mesh below splits, and one that all tokens share."""
    moe = MoEConfig(num_experts=4, experts_per_token=2, expert_dim=8, shared_dim=8, layers=(1,))
    return model_config(variant, moe=moe)


CONTEXT, EXPERT = {"context": 2}, {"expert": 4}
MESHES = [("gqa", {"data": 2, "fsdp": 2, "tensor": 2})]
MESHES += [(name, sizes) for name in ("mfa", "mfa_kr", "mla")
           for sizes in (CONTEXT, EXPERT, {"fsdp": 2, "context": 2, "tensor": 2})]
MESHES += [("mfa-moe", sizes) for sizes in (CONTEXT, EXPERT, {"expert": 2, "context": 2, "tensor": 2})]


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "sizes"), MESHES, ids=[
    f"{name}-{'-'.join(f'{axis}{size}' for axis, size in sizes.items())}" for name, sizes in MESHES])
def test_sharded_decoding_equals_one_device(
    variant: str, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill and decoding, on caches that no device holds a second time. Rows begin on either side of the middle of
    the prompts' bucket, and one of them goes on past the middle of the cache: those are what `context` splits."""
    name, _, experts = variant.partition("-")
    c = compiled(with_experts(name) if experts else model_config(name))
    prompts, lengths = np.asarray(tokens(4, (4, 30))), [3, 15, 18, 30]
    expected = generate(c.model, c.params, prompts, lengths, GREEDY, KEY, max_new_tokens=NEW, capacity=64)
    decode, held = generate_loop.decode, []

    def decoding(model: Any, params: Any, state: Any, *rest: Any, **more: Any) -> Any:
        held.extend((x.size, [shard.data.size for shard in x.addressable_shards])
                    for cache in state.caches for x in cache.streams)
        return decode(model, params, state, *rest, **more)

    monkeypatch.setattr(generate_loop, "decode", decoding)
    shape = [sizes.get(axis, 1) for axis in axes.MESH_AXES]
    mesh = axes.make_mesh(shape, jax.devices()[: math.prod(shape)])
    with jax.set_mesh(mesh):
        boxed = jax.eval_shape(c.model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
        params = jax.device_put(c.params, axes.shardings(boxed, mesh))
        *_, found = stream(c.model, params, prompts, lengths, GREEDY, KEY, max_new_tokens=NEW, capacity=64, chunk=NEW)
    assert found.tokens.tolist() == expected.tokens.tolist()
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5)
    assert held and all(parts == [size // mesh.size] * mesh.size for size, parts in held)


@pytest.mark.parametrize(("changes", "message"), [
    ({"capacity": 6}, r"prompts=7: a prompt is longer than the cache, capacity=6"),
    ({"capacity": 10}, r"max_new_tokens=6: must be at most 3"),
    ({"max_new_tokens": 0}, r"max_new_tokens=0: must be at least 1"),
    ({"prompts": PROMPTS + V}, r"token ids must be in 0 .. 31"),
    ({"lengths": np.array([0, 7, 5])}, r"lengths=\[0, 7, 5\]: must be in 1 .. 7"),
    ({"lengths": np.array([8, 7, 5])}, r"lengths=\[8, 7, 5\]: must be in 1 .. 7"),
    ({"lengths": np.array([7, 5])}, r"lengths=\(2,\): must have shape \(3,\)"),
    ({"prompts": PROMPTS[0]}, r"prompts=\(7,\): must be token ids of shape"),
    ({"stop_tokens": np.zeros((2, 1), int)}, r"stop_tokens=\(2, 1\): must have 3 rows"),
    ({"stop_tokens": [1.5]}, r"stop_tokens='float64': must be integers"),
    ({"stop_tokens": [V]}, r"stop_tokens=\[32\]: must be in -1 .. 31"),
    ({"stop_tokens": np.array([2**32 + 3])}, r"stop_tokens=\[4294967299\]: must be in -1 .. 31"),
    ({"prompts": PROMPTS + 0.5}, r"prompts='float64': must be integers"),
    ({"prompts": PROMPTS.astype(np.int64) + 2**32}, r"token ids must be in 0 .. 31"),
    ({"lengths": LENGTHS.astype(np.int64) + 2**32}, r"must be in 1 .. 7"),
    ({"cache_dtype": "uint8"}, r"cache_dtype='uint8': must be one of float32, bfloat16, float16, int8, float8_e4m3fn"),
    ({"cache_dtype": "float8_e5m2"}, r"cache_dtype='float8_e5m2': must be one of"),
])
def test_what_cannot_work_is_refused(changes: dict, message: str) -> None:
    c = compiled(model_config("mfa"))
    arguments = {"prompts": PROMPTS, "lengths": LENGTHS, "max_new_tokens": NEW} | changes
    with pytest.raises(ValueError, match=message):
        generate(c.model, c.params, arguments.pop("prompts"), arguments.pop("lengths"), GREEDY, KEY, **arguments)


def test_padding_may_hold_anything() -> None:
    c = compiled(model_config("mfa"))
    padded = np.where(np.arange(7) < LENGTHS[:, None], PROMPTS, -77)
    a, b = (generate(c.model, c.params, p, LENGTHS, GREEDY, KEY, max_new_tokens=NEW) for p in (PROMPTS, padded))
    chex.assert_trees_all_equal(a, b)


@settings(max_examples=40)
@given(lengths=st.lists(st.integers(-1, 9), min_size=1, max_size=3), width=st.integers(0, 8),
       new=st.integers(-2, 40), capacity=st.none() | st.integers(0, 40), high=st.integers(0, 2 * V))
def test_arguments_work_or_are_refused(
    lengths: list[int], width: int, new: int, capacity: int | None, high: int
) -> None:
    """What is accepted fits the cache; all else is a ValueError. Nothing is compiled here."""
    c = compiled(model_config("mfa"))
    prompts = np.full((len(lengths), width), high)
    try:
        padded, kept, _, buffer, size = arguments.prepare(c.model, prompts, lengths, new, (), capacity)
    except ValueError:
        fits = capacity is None or max(lengths) + new <= capacity
        assert not (width and all(1 <= n <= width for n in lengths) and new >= 1 and high < V and fits)
    else:
        assert kept.tolist() == lengths and padded.shape[1] <= size and buffer >= new
        assert max(lengths) + new <= size




def test_a_cache_that_a_mesh_splits_has_whole_tiles_on_each_device() -> None:
    """48 tokens a device would be no multiple of the 32 that a kernel copies of int8."""
    c = compiled(model_config("mfa"))
    prompts = np.full((1, 60), 1)
    assert arguments.prepare(c.model, prompts, [60], 30, (), None)[-1] == 96
    with jax.set_mesh(axes.make_mesh((2, 1, 1, 2, 2))):
        assert arguments.prepare(c.model, prompts, [60], 30, (), None)[-1] == 128


@pytest.mark.parametrize("variant", ["mha", "mfa", "mfa_kr", "mla"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_on_cpus_no_narrow_cache_is_made_wide(variant: str, dtype: str) -> None:
    """XLA's own way there is to convert all of it to float32 and back for each token that is written, or block read."""
    config = model_config(variant)
    model = Transformer(config)
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))

    def wide(cache_dtype: str) -> list[str]:
        program = lower_decode(model, params, batch_size=2, capacity=4096, sampling=GREEDY, cache_dtype=cache_dtype)
        return re.findall(r"= f32\[[\d,]*\b4096,[\d,]*\]", program.compile().as_text())

    assert wide(dtype) == [] and wide("float32") != []


def test_the_kernel_of_a_script_is_that_of_a_devices_part_of_the_cache() -> None:
    """Where batches differ, how a mesh splits them is not asked: a layout that one row has not may be that of more."""
    config = dataclasses.replace(model_config("mfa"), decode_layout="batch")
    with jax.set_mesh(axes.make_mesh((1, 1, 1, 1, 2), jax.devices()[:2])):
        assert decode_kernel(config, None, 64, None)[1] == decode_kernel(config, None, 64, None, rows=2)[1] == "xla"
        with pytest.raises(ValueError, match="layout='batch': needs one key head"):
            decode_kernel(config, None, 64, None, rows=1)
