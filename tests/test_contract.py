"""The contract of every variant with every encoding: one suite, the same for all."""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mfa_jax import attention, capacity
from mfa_jax.attention import core, training_implementation
from mfa_jax.attention.mla import MLA
from mfa_jax.axes import make_mesh
from mfa_jax.circuits import circuits
from mfa_jax.config import VARIANTS, GQAConfig, MFAConfig, PositionConfig
from mfa_jax.model.loss import cross_entropy
from mfa_jax.model.stack import REMAT_POLICIES
from mfa_jax.model.transformer import Transformer, init_cache, init_params, unembedding, unstack_layers
from tests.contract import (
    ATTENTION,
    CACHE_DTYPES,
    ENCODINGS,
    B,
    L,
    T,
    V,
    compiled,
    cut_back,
    layers_of,
    model_config,
    tokens,
)

CAPACITY = 16
INNER_LOOP = ("mfa", "mfa_kr")
# A variant stays on one worker, where its compilations are shared; the inner loop runs the paper's two.
_VARIANTS = [
    pytest.param(name, marks=[pytest.mark.xdist_group(name), *([] if name in INNER_LOOP else [pytest.mark.slow])])
    for name in ATTENTION]
variants = pytest.mark.parametrize("variant", _VARIANTS)
# Layers with biases have no circuits.
variants_without_biases = pytest.mark.parametrize("variant", _VARIANTS[: len(VARIANTS)])
# The inner loop runs rope; the whole suite runs the other encodings too.
encodings = pytest.mark.parametrize(
    "encoding", [pytest.param(name, marks=() if name == "rope" else pytest.mark.slow) for name in ENCODINGS])
# The default runs with each type of cache, the other backends with one: their own suite has the rest. The GPU kernel's
# widths and types are its own: test_contract_gpu.py.
backend_and_dtype = pytest.mark.parametrize(("backend", "dtype"), [
    *(("auto", dtype) for dtype in CACHE_DTYPES),
    *(pytest.param(name, "float32", marks=pytest.mark.slow) for name in ("reference", "mosaic_tpu_interpret"))])


@variants
@encodings
@backend_and_dtype
def test_prefill_then_decode_equals_the_full_forward_for_every_split(
    variant: str, encoding: str, backend: str, dtype: str
) -> None:
    """Row r prefills r + 1 tokens and decodes the rest. The rows are ragged: padded to one prefill, then cut back."""
    c = compiled(model_config(variant, encoding, decode_implementation=backend), not backend.endswith("_interpret"))
    rows = jnp.broadcast_to(tokens()[:1], (T, T))
    full = np.asarray(c.full(c.params, rows))[0]
    start = jnp.arange(1, T + 1)
    out, cache = c.step(c.params, rows, c.cache(T, CAPACITY, dtype))
    assert all(stream.dtype == dtype for layer in layers_of(cache) for stream in layer.streams)
    cache = cut_back(cache, start)
    errors = [np.abs(np.asarray(out)[r, : r + 1] - full[: r + 1]).max() for r in range(T)]
    for t in range(T - 1):
        at = np.minimum(start + t, T - 1)
        out, cache = c.step(c.params, rows[jnp.arange(T), at][:, None], cache)
        errors += [np.abs(np.asarray(out)[r, 0] - full[at[r]]).max() for r in range(T) if start[r] + t < T]
    assert max(errors) < CACHE_DTYPES[dtype]
    assert dtype == "float32" or max(errors) > CACHE_DTYPES["float32"]


@variants
def test_at_most_two_traces_for_prefill_and_decode(variant: str) -> None:
    c = compiled(model_config(variant, "none"))
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=2)
    def step(params: dict, tokens: jax.Array, cache: object) -> object:
        return c.model.apply({"params": params}, tokens, cache=cache)

    full = c.full(c.params, tokens())
    out, cache = step(c.params, tokens()[:, :4], init_cache(c.config, B, CAPACITY))
    outs = [out]
    for t in range(4, T):
        out, cache = step(c.params, tokens()[:, t : t + 1], cache)
        outs.append(out)
    chex.assert_trees_all_close(jnp.concatenate(outs, axis=1), full, atol=2e-5, rtol=1e-5)
    chex.assert_trees_all_equal(cache.length, jnp.full((L, B), T))


@variants
@encodings
def test_ragged_rows_equal_each_row_alone(variant: str, encoding: str) -> None:
    """The same rows, each in a batch whose other rows hold something else: bit-equal."""
    c = compiled(model_config(variant, encoding))
    lengths = jnp.broadcast_to(jnp.arange(2, 2 + T), (L, T))

    def last(others: int) -> jax.Array:
        rows = tokens(others, (T, T)).at[3].set(tokens()[0])
        _, cache = c.step(c.params, rows, init_cache(c.config, T, CAPACITY))
        return c.step(c.params, jnp.full((T, 1), 5), cache.with_length(lengths - 1))[0][3]

    chex.assert_trees_all_equal(last(7), last(8))


@variants
@encodings
def test_changing_a_token_leaves_earlier_outputs_bit_equal(variant: str, encoding: str) -> None:
    c = compiled(model_config(variant, encoding))
    before = c.full(c.params, tokens())
    after = c.full(c.params, tokens().at[:, 5].set((tokens()[:, 5] + 1) % V))
    chex.assert_trees_all_equal(before[:, :5], after[:, :5])
    assert np.all(np.any(np.asarray(before[:, 5:] != after[:, 5:]), axis=-1))


@variants
@encodings
def test_rows_and_packed_segments_do_not_see_each_other(variant: str, encoding: str) -> None:
    c = compiled(model_config(variant, encoding))
    positions = jnp.array([0, 1, 2, 3, 0, 1, 2, 0, 1])
    segments = jnp.array([1, 1, 1, 1, 2, 2, 2, 3, 3])
    spread = [jnp.broadcast_to(x, (B, T)) for x in (positions, segments)]
    packed = c.full(c.params, tokens(), *spread)
    start = 0
    for length in (4, 3, 2):
        alone = c.full(c.params, jnp.pad(tokens()[:, start : start + length], ((0, 0), (0, T - length))))
        chex.assert_trees_all_close(packed[:, start : start + length], alone[:, :length], atol=2e-5, rtol=1e-5)
        start += length
    other_row = c.full(c.params, tokens().at[0].set(0), *spread)
    chex.assert_trees_all_equal(packed[1:], other_row[1:])


@variants
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_cache_bytes_equal_the_closed_form(variant: str, dtype: str) -> None:
    config = model_config(variant)
    cache = init_cache(config, B, CAPACITY, dtype)
    closed = capacity.cache_bytes_per_token(config.attention, config.num_layers, dtype)
    scales = 4 * L * sum(scale[0, 0, ..., 0].size for scale in cache.scales if scale is not None)
    assert (scales > 0) == (dtype == "int8")
    assert cache.nbytes == (closed + scales) * B * CAPACITY
    assert cache.nbytes == sum(x.nbytes for x in (*cache.streams, *cache.scales) if x is not None)


@variants
@pytest.mark.parametrize("tied", [True, False])
def test_parameter_count_equals_the_closed_form(variant: str, tied: bool) -> None:
    config = model_config(variant, tie_embeddings=tied)
    abstract = jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    counted = sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(abstract)))
    assert counted == capacity.model_parameters(config).total


@encodings
@pytest.mark.parametrize(("variant", "alpha"), [
    *(pytest.param(name, 0.0, marks=() if name in INNER_LOOP else pytest.mark.slow) for name in ATTENTION),
    ("mfa_kr", 0.5)])
def test_each_gradient_is_finite_and_not_all_zero(variant: str, encoding: str, alpha: float) -> None:
    """By design zero: `N_kr` while alpha is zero, since the value is `k + alpha * (N_kr k)`."""
    config = model_config(variant, encoding)
    if variant == "mfa_kr":
        config = dataclasses.replace(config, attention=dataclasses.replace(config.attention, alpha_init=alpha))
    c = compiled(config)

    def loss(params: dict) -> jax.Array:
        hidden, _ = c.model.apply({"params": params}, tokens(), method="hidden")
        table = unembedding(params, config)
        return cross_entropy(hidden, table, tokens(2), jnp.ones((B, T), bool), z_loss=1e-4).loss

    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(c.params)):
        name = jax.tree_util.keystr(path)
        assert np.all(np.isfinite(leaf)), name
        zero_by_design = "N_kr" in name and alpha == 0
        assert np.any(np.asarray(leaf) != 0) != zero_by_design, name


def attention_params(seed: int = 0, **start: float) -> dict:
    """Attention parameters of an MFA-KR model that starts so."""
    config = model_config("mfa_kr", attention=dataclasses.replace(ATTENTION["mfa_kr"], **start))
    return nn.unbox(init_params(Transformer(config), jax.random.key(seed)))["layers"]["attention"]


def test_key_reuse_starts_as_its_config_says() -> None:
    C = 16
    given = attention_params(alpha_init=0.25, n_kr_init_scale=2.0)
    assert np.all(given["alpha"] == 0.25) and np.std(given["N_kr"]) == pytest.approx(2 / C**0.5, rel=0.1)
    spread = attention_params(alpha_init=3.0, alpha_init_scale=0.5)["alpha"]
    assert 0.3 < np.std(spread) < 0.7 and np.mean(spread) == pytest.approx(3, abs=0.3)
    shifted = attention_params(alpha_init=0.25, n_kr_init_scale=2.0, n_kr_init_diagonal=-1.0)
    np.testing.assert_allclose(shifted["N_kr"], given["N_kr"] - np.eye(C), rtol=0, atol=1e-6)


@variants
def test_unrolled_layers_equal_scanned_layers(variant: str) -> None:
    c = compiled(model_config(variant))
    unrolled = Transformer(c.config, scan_layers=False)
    params = unstack_layers(c.params, L)
    cache = init_cache(c.config, B, CAPACITY, scan_layers=False)
    out, cache = jax.jit(lambda p, t, k: unrolled.apply({"params": p}, t, cache=k))(params, tokens(), cache)
    chex.assert_trees_all_close(out, c.full(c.params, tokens()), atol=2e-5, rtol=1e-5)
    chex.assert_trees_all_equal(cache[1].length, jnp.full((B,), T))


@pytest.mark.slow
def test_what_a_block_keeps_for_the_backward_pass() -> None:
    """What products and attention made or read, in the type of the model, and no copy of a parameter."""
    config = model_config("mfa", ffn_dim=40, dtype="bfloat16", attention_implementation="blockwise")
    c = compiled(config)
    _, backward = jax.vjp(lambda p: c.model.apply({"params": p}, tokens(0, (3, 8)))[0].astype(jnp.float32), c.params)
    parameters = {x.shape for x in jax.tree.leaves(c.params)}
    kept = [x for x in jax.tree.leaves(backward) if x.shape[:1] == (L,) and x.ndim > 2 and x.shape not in parameters]
    narrow = sorted(x.shape[1:] for x in kept if x.dtype == jnp.bfloat16)
    stream, gate_and_up, latent, value = [(3, 8, 24)] * 2, [(3, 8, 40)] * 2, [(3, 8, 12)], [(3, 8, 16)]
    queries, key, result = [(3, 8, 4, 16)], [(3, 1, 8, 16)], [(3, 8, 1, 4, 16)]
    assert narrow == sorted(stream + gate_and_up + latent + queries + key + value + result)
    assert [x.shape[1:] for x in kept if x.dtype != jnp.bfloat16] == [(1, 3, 1, 4 * 8)], "the log-sum-exp alone"


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("implementation", ["dense", pytest.param("blockwise", marks=pytest.mark.slow)])
def test_remat_changes_no_gradient(remat: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = model_config("mfa", remat=remat, attention_implementation=implementation)

    def gradient() -> object:
        model = Transformer(config)
        loss = lambda p: jnp.sum(model.apply({"params": p}, tokens())[0] ** 2)  # noqa: E731
        return jax.jit(jax.grad(loss))(compiled(model_config("mfa")).params)

    recomputed = gradient()
    monkeypatch.setitem(REMAT_POLICIES, remat, jax.checkpoint_policies.everything_saveable)
    # The largest of a leaf are some 50, of which float32 rounds 3e-6 away.
    chex.assert_trees_all_close(recomputed, gradient(), rtol=1e-4, atol=5e-5)


def test_layers_in_a_row_have_the_gradients_of_a_loop_over_them_and_compile_to_none() -> None:
    """Of the two loops that there are, forward and backward; the gradient of the embedding may have one of its own."""
    config, given = model_config("mfa", attention_implementation="dense"), tokens()

    def gradient(unroll: bool) -> tuple[object, int]:
        model = Transformer(dataclasses.replace(config, unroll_layers=unroll))
        loss = lambda p: jnp.sum(model.apply({"params": p}, given)[0] ** 2)  # noqa: E731
        params = compiled(model_config("mfa")).params
        step = jax.jit(jax.grad(loss)).lower(params).compile()
        return step(params), step.as_text().count(" while(")

    (in_a_loop, loops), (in_a_row, none) = gradient(unroll=False), gradient(unroll=True)
    assert loops - none == 2
    chex.assert_trees_all_close(in_a_row, in_a_loop, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize(("remat", "unroll", "barrier"), [
    ("full", True, True), ("dots", True, True), ("none", True, False), ("full", False, False)])
def test_what_layers_in_a_row_recompute_is_held_apart_from_the_forward_pass(
        remat: str, unroll: bool, barrier: bool) -> None:
    config, given = model_config("mfa", remat=remat, unroll_layers=unroll, attention_implementation="dense"), tokens()
    loss = lambda p: jnp.sum(Transformer(config).apply({"params": p}, given)[0] ** 2)  # noqa: E731
    program = jax.jit(jax.grad(loss)).lower(compiled(model_config("mfa")).params).as_text()
    assert ("optimization_barrier" in program) == barrier


def test_a_cache_that_overflows_says_so() -> None:
    c = compiled(model_config("mfa"))
    with pytest.raises(ValueError, match="9 tokens do not fit into a cache of 6"):
        c.step(c.params, tokens(), init_cache(c.config, B, 6))
    cache = attention.init_cache(ATTENTION["mfa"], 2, 4).with_length(jnp.array([2, 3]))
    with pytest.raises(ValueError, match="5 tokens do not fit into a cache of 4"):
        cache.append(jnp.ones((2, 5, 16)), jnp.ones((2, 5, 16)))
    one = jnp.ones((2, 2, 16))
    cache = cache.append(one, one)
    chex.assert_trees_all_equal(cache.overflowed, jnp.array([False, True]))
    chex.assert_trees_all_equal(cache.k[:, :, 0], jnp.array([[0.0, 0, 1, 1], [0, 0, 0, 1]]))


@pytest.mark.parametrize("variant", ["gqa", "mla", "mfa", "mfa_kr"])
def test_positions_that_are_all_shifted_change_nothing_with_a_cache(variant: str) -> None:
    """MFA-KR does not read them: its keys are cached before rope, at their row index."""
    c = compiled(model_config(variant))
    module = attention.build(c.config.attention, c.config.position)
    x = jax.random.normal(jax.random.key(3), (2, 7, c.config.model_dim))
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    p = nn.unbox(module.init(jax.random.key(0), x, positions))
    wanted, _ = module.apply(p, x, positions)
    found, _ = module.apply(p, x, positions + 5, None, attention.init_cache(c.config.attention, 2, 8))
    chex.assert_trees_all_close(found, wanted, atol=2e-5)


def test_mfa_with_an_identity_like_factorization_is_mqa() -> None:
    """S_q the identity (Q = D), no norm, C = H: each head's Q_n is MQA's W_Q,n."""
    x = jax.random.normal(jax.random.key(3), (2, 7, 24))
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    mqa = attention.build(GQAConfig(num_heads=4, num_kv_heads=1, head_dim=8), PositionConfig())
    p = nn.unbox(mqa.init(jax.random.key(0), x, positions))["params"]
    mfa = attention.build(MFAConfig(num_heads=4, latent_dim=8, query_rank=24, query_norm=False), PositionConfig())
    q = {"S_q": jnp.eye(24), "Q": p["W_Q"], "S_k": p["W_K"][:, 0], "S_v": p["W_V"][:, 0], "O": p["W_O"]}
    chex.assert_trees_all_close(mfa.apply({"params": q}, x, positions)[0], mqa.apply({"params": p}, x, positions)[0],
                                atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_gqa_with_repeated_key_heads_is_mha(kv_heads: int) -> None:
    """K = 1 is MQA: MHA whose key and value heads are all the same one; K = N is MHA itself."""
    x = jax.random.normal(jax.random.key(3), (2, 7, 24))
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    gqa = attention.build(GQAConfig(num_heads=4, num_kv_heads=kv_heads, head_dim=8), PositionConfig())
    p = nn.unbox(gqa.init(jax.random.key(0), x, positions))["params"]
    q, k, v = (np.einsum("btd,dnh->btnh", x, np.repeat(p[name], 4 // p[name].shape[1], axis=1))
               for name in ("W_Q", "W_K", "W_V"))
    angles = np.arange(7)[:, None] * 500000.0 ** (-np.arange(0, 8, 2) / 8)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    q, k = (np.concatenate([y[..., :4] * cos - y[..., 4:] * sin, y[..., 4:] * cos + y[..., :4] * sin], -1)
            for y in (q, k))
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(8)
    scores = np.where(np.tri(7, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bnts,bsnh,nhd->btd", weights, v, p["W_O"])
    chex.assert_trees_all_close(gqa.apply({"params": p}, x, positions)[0], expected, atol=1e-5)


@variants_without_biases
def test_circuits_through_the_gmha_formula_equal_the_module(variant: str) -> None:
    """Inner norms are exact at unit root mean square, so each token is scaled until its normed latent has it."""
    config = ATTENTION[variant]
    if variant == "mla":
        config = dataclasses.replace(config, query_rank=None)
    module = attention.build(config, PositionConfig(kind="none"))
    x = np.random.default_rng(0).normal(size=(1, 7, 24))
    positions = jnp.arange(7)[None]
    p = nn.unbox(module.init(jax.random.key(1), jnp.asarray(x, jnp.float32), positions))["params"]
    p = jax.tree.map(lambda leaf: leaf * 1.1 if leaf.ndim == 1 else leaf, p)
    down = p.get("W_DKV", p.get("S_q"))
    if down is not None:
        x /= np.sqrt(np.mean(np.square(x @ np.asarray(down, np.float64)), axis=-1, keepdims=True))
    boxed = nn.Partitioned(None, names=())  # as `init_params` gives them
    found = circuits({"layers": {"attention": jax.tree.map(lambda leaf: boxed.replace(value=leaf[None]), p)}}, 0)
    expected = np.zeros((7, 24))
    for n in range(found.num_heads):
        scores = np.where(np.tri(7, dtype=bool), x[0] @ found.W(n) @ x[0].T * found.scale, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        expected += weights / weights.sum(-1, keepdims=True) @ x[0] @ found.U(n)
    got = module.apply({"params": p}, jnp.asarray(x, jnp.float32), positions)[0][0]
    chex.assert_trees_all_close(np.asarray(got, np.float64), expected, atol=5e-5)


def test_circuits_hold_the_scale_of_head_norms_and_refuse_biases() -> None:
    plain, c = compiled(model_config("gqa")).params, compiled(model_config("gqa_bias_norm"))
    scales = {name: {"scale": jnp.linspace(0.5, 2, 2 * 8).reshape(2, 8)} for name in ("q_norm", "k_norm")}
    given = plain["layers"]["attention"]
    normed = circuits({"layers": {"attention": {**given, **scales}}}, 1)
    W_Q, W_K = (np.asarray(given[name][1, :, 0] * scales["q_norm"]["scale"][1], np.float64) for name in ("W_Q", "W_K"))
    np.testing.assert_allclose(normed.W(0), W_Q @ W_K.T, atol=1e-6)
    with pytest.raises(NotImplementedError, match="qkv_bias"):
        circuits(c.params, 0)


@variants_without_biases
def test_measured_ranks_of_fresh_weights_are_the_nominal_ones(variant: str) -> None:
    c = compiled(model_config(variant))
    ranks = circuits(c.params, 1).ranks()
    config = ATTENTION[variant]
    widths = {"gqa": (8, 8), "mla": (12, 6), "mfa": (12, 16), "mfa_kr": (12, 16)}[config.kind]
    assert ranks["W_rank"].tolist() == [widths[0]] * 4
    assert ranks["U_rank"].tolist() == [widths[1]] * 4
    assert np.all((ranks["W_effective_rank"] > 1) & (ranks["W_effective_rank"] <= widths[0]))
    with pytest.raises(ValueError, match="layer=2: must be in 0 .. 1"):
        circuits(c.params, 2)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"num_heads": 16}, {"latent_dim": 64}, {"query_rank": 64}])
@pytest.mark.parametrize("variant", ["mla", "mfa", "mfa_kr"])
def test_initial_variance_does_not_depend_on_the_widths(variant: str, changes: dict) -> None:
    """Scores have unit variance at the start; an output of uniform attention over one token has that of its input."""
    config = dataclasses.replace(ATTENTION[variant], **changes)
    module = attention.build(config, PositionConfig(kind="none"))
    x = jax.random.normal(jax.random.key(0), (64, 1, 256))
    positions = jnp.zeros((64, 1), jnp.int32)
    p = nn.unbox(module.init(jax.random.key(1), x, positions))["params"]
    y, _ = module.apply({"params": p}, x, positions)
    found = circuits({"layers": {"attention": jax.tree.map(lambda leaf: leaf[None], p)}}, 0)
    scores = np.stack([np.asarray(x[:, 0]) @ found.W(n) @ np.asarray(x[:, 0]).T for n in range(found.num_heads)])
    off_diagonal = scores[:, ~np.eye(64, dtype=bool)] * found.scale
    assert 0.6 < float(jnp.var(y)) < 1.5
    assert 0.6 < off_diagonal.var() < 1.5


def test_mla_decodes_absorbed() -> None:
    """A step with a cache forms no per-head key or value of the cached tokens: no array of N heads by S by width."""
    config = ATTENTION["mla"]
    module = MLA(config, PositionConfig())
    S = 37
    x, cache = jnp.zeros((1, 1, 24)), attention.init_cache(config, 1, S)
    params = nn.unbox(module.init(jax.random.key(0), x, jnp.zeros((1, 1), jnp.int32)))
    step = jax.make_jaxpr(lambda p, x, c: module.apply(p, x, jnp.zeros((1, 1), jnp.int32), cache=c))(params, x, cache)
    shapes = [v.aval.shape for eqn in jax.tree.leaves([step.jaxpr.eqns]) for v in eqn.outvars]
    per_head = [s for s in shapes if S in s and 4 in s and any(w in s for w in (8, 6, 12))]
    assert any(S in s for s in shapes) and not per_head


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("encoding", ["rope", "alibi"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_training_step_is_said_to_attend_with_is_chosen_for_what_it_asks(
        variant: str, encoding: str, segments: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config, asked = model_config(variant, encoding, dtype="bfloat16"), []
    chosen = core.resolve
    monkeypatch.setattr(core, "resolve", lambda *args, **call: asked.append((args, call)) or chosen(*args, **call))
    ids = tokens()
    marks = jnp.ones_like(ids) if segments else None
    jax.eval_shape(lambda: Transformer(config).init_with_output(jax.random.key(0), ids, None, marks))
    said = training_implementation(config.attention, config.position, T=T, dtype=config.dtype, segments=segments)
    *steps, mine = [(args, call | {"dtype": jnp.dtype(call["dtype"])}) for args, call in asked]
    assert steps and all(step == mine for step in steps)
    assert said == chosen(*mine[0], **mine[1]) == "dense"


def test_training_where_the_mesh_splits_the_sequence_is_said_to_attend_by_context() -> None:
    config = model_config("mfa")
    with jax.set_mesh(make_mesh((4, 1, 1, 2, 1))):
        name = functools.partial(training_implementation, config.attention, config.position, T=T, dtype=config.dtype,
                                 segments=True)
        assert name() == "context" and name(implementation="blockwise") == "blockwise"
