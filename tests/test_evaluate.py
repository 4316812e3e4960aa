"""Log-likelihoods of batches against their definition, texts up to a stop string, and what is compiled for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfa_jax import axes
from mfa_jax.convert import load_pretrained, pretrained_tokenizer
from mfa_jax.data import ByteTokenizer
from mfa_jax.evaluate import complete_until, completion, loglikelihoods, scoring
from mfa_jax.generate import SamplingConfig, generate, stream
from mfa_jax.model.transformer import Transformer
from tests.contract import V, compiled, model_config

GREEDY, KEY = SamplingConfig(temperature=0), jax.random.key(0)


def requests(seed: int, sizes: list[tuple[int, int]], vocab: int = V) -> list[tuple[list[int], list[int]]]:
    rng = np.random.default_rng(seed)
    return [(rng.integers(0, vocab, a).tolist(), rng.integers(0, vocab, b).tolist()) for a, b in sizes]


def direct(logits: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """By the definition, in float64, from the logits of a row, padding and all."""
    rows = np.asarray(logits, np.float64)[len(context) - 1 : len(context) + len(continuation) - 1]
    log_p = rows - rows.max(-1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
    return log_p[np.arange(len(rows)), continuation].sum(), bool((rows.argmax(-1) == continuation).all())


def test_batches_equal_the_definition() -> None:
    """Ragged lengths over several buckets, a batch that is not full, one token, a continuation longer than its
    context, requests that share what they read, and one that is greedy."""
    c = compiled(model_config("mfa"))
    asked = requests(0, [(1, 1), (3, 2), (40, 1), (2, 45), (10, 3), (33, 9), (5, 1)])
    asked += [(asked[6][0], [token]) for token in range(3)]
    greedy = np.asarray(generate(c.model, c.params, [asked[1][0]], [3], GREEDY, KEY, max_new_tokens=4).tokens)[0]
    asked.append((asked[1][0], greedy.tolist()))
    done: list[int] = []
    found = loglikelihoods(c.model, c.params, asked, batch_tokens=64, on_done=done.append)
    assert sum(done) == len(asked) and len(done) > 2
    rows = np.zeros((len(asked), 48), np.int32)
    for row, (context, continuation) in zip(rows, asked, strict=True):
        row[: len(context + continuation)] = context + continuation
    for (context, continuation), score, logits in zip(asked, found, c.full(c.params, rows), strict=True):
        expected, is_greedy = direct(logits, context, continuation)
        np.testing.assert_allclose(score.logprob, expected, atol=2e-5)
        assert score.greedy == is_greedy
    assert found[-1].greedy and not all(score.greedy for score in found)


def test_what_is_asked_together_is_read_once() -> None:
    context = [3, 1, 4, 1, 5]
    rows = scoring._rows([(context, [t]) for t in range(4)] + [([3, 1, 4, 1], [5, 2])], V)
    assert len(rows) == 1 and rows[0].tokens == tuple(context)
    assert rows[0].requests == [0, 1, 2, 3, 4, 4] and rows[0].positions == [4, 4, 4, 4, 3, 4]
    assert rows[0].targets == [0, 1, 2, 3, 5, 2]


def test_one_program_for_a_shape() -> None:
    c = compiled(model_config("mfa", num_layers=1))
    loglikelihoods(c.model, c.params, requests(1, [(9, 2)] * 4), batch_tokens=128)
    before = scoring._score._cache_size()
    loglikelihoods(c.model, c.params, requests(2, [(20, 4), (3, 1), (31, 1), (7, 7), (30, 3)] * 2), batch_tokens=128)
    # Ten rows of the same bucket are two full batches and one of two rows.
    assert scoring._score._cache_size() == before + 1
    loglikelihoods(c.model, c.params, requests(3, [(31, 3)]), batch_tokens=128)
    assert scoring._score._cache_size() == before + 2


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2, 1, 1, 2), (8, 1, 1, 1, 1)])
def test_a_mesh_changes_nothing(sizes: tuple[int, ...]) -> None:
    c = compiled(model_config("gqa", vocab_size=264))
    asked = requests(4, [(3, 2), (20, 5), (34, 1), (1, 9), (8, 2)], 264)
    prompts, tokenizer = [context for context, _ in asked], ByteTokenizer()

    def run(params: Any) -> tuple[Any, list[str]]:
        return (loglikelihoods(c.model, params, asked, batch_tokens=256),
                complete_until(c.model, params, tokenizer, prompts, ["\n"], GREEDY, KEY, max_new_tokens=8))

    scores, texts = run(c.params)
    mesh = axes.make_mesh(sizes)
    boxed = jax.eval_shape(c.model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    with jax.set_mesh(mesh):
        found, same = run(jax.device_put(c.params, axes.shardings(boxed, mesh)))
    assert same == texts
    np.testing.assert_allclose([s.logprob for s in found], [s.logprob for s in scores], atol=2e-5)
    assert [s.greedy for s in found] == [s.greedy for s in scores]


def test_a_text_ends_before_the_first_stop_string(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy texts of random weights, as `generate` gives them, cut off by hand; a batch ends when its rows have."""
    c = compiled(model_config("mfa", vocab_size=264))
    tokenizer, prompts = ByteTokenizer(), [[100, 101], [40, 41, 42, 43], [7], [1, 2, 3]]
    rows = np.array([prompt + [0] * (4 - len(prompt)) for prompt in prompts])
    tokens = generate(c.model, c.params, rows, [len(prompt) for prompt in prompts], GREEDY, KEY, max_new_tokens=20,
                      stop_tokens=[tokenizer.eos_id])
    whole = [tokenizer.decode(row[:length].tolist())
             for row, length in zip(np.asarray(tokens.tokens), np.asarray(tokens.lengths), strict=True)]
    handed: list[int] = []

    def counting(*args: Any, **options: Any) -> Any:
        for found in stream(*args, **options):
            handed.append(int(found.lengths.max()))
            yield found

    def texts(until: list[str]) -> list[str]:
        handed.clear()
        return complete_until(c.model, c.params, tokenizer, prompts, until, GREEDY, KEY, max_new_tokens=20,
                              batch_tokens=100, chunk=4)

    monkeypatch.setattr(completion, "stream", counting)
    assert texts([]) == whole and handed[-1] == 20
    stops = [text[at : at + 2] for at, text in zip((4, 2, 0, 5), whole, strict=True)]
    expected = [text[: min(text.find(stop) for stop in stops if stop in text)] for text in whole]
    assert texts(stops) == expected and all(len(text) < 8 for text in expected) and handed[-1] < 20


@pytest.mark.parametrize(("call", "error", "message"), [
    ({"requests": [([], [1])]}, ValueError, r"requests='number 0': must have a context and a continuation"),
    ({"requests": [([1], [1]), ([1], [])]}, ValueError, r"requests='number 1'"),
    ({"requests": [([1], [V])]}, ValueError, rf"tokens=\[{V}\]: token ids must be in 0 .. {V - 1}"),
    ({"requests": [([1], [1])], "batch_tokens": 0}, ValueError, "batch_tokens=0"),
])
def test_what_cannot_be_scored_is_refused(call: dict[str, Any], error: type[Exception], message: str) -> None:
    c = compiled(model_config("mfa"))
    with pytest.raises(error, match=message):
        loglikelihoods(c.model, c.params, **call)


@pytest.mark.parametrize(("call", "message"), [
    ({"prompts": [[1], []]}, "prompts='number 1': must have at least one token"),
    ({"until": ["\n", ""]}, "a stop string must not be empty"),
    ({"prompts": [[-1]]}, r"tokens=\[-1\]"),
    ({"batch_tokens": 0}, "batch_tokens=0"),
])
def test_what_cannot_be_completed_is_refused(call: dict[str, Any], message: str) -> None:
    c = compiled(model_config("mfa"))
    arguments: dict[str, Any] = {"prompts": [[1]], "until": [], "max_new_tokens": 4} | call
    with pytest.raises(ValueError, match=message):
        complete_until(c.model, c.params, ByteTokenizer(), arguments.pop("prompts"), arguments.pop("until"), GREEDY,
                       KEY, **arguments)


def test_a_split_sequence_is_refused_by_name() -> None:
    c = compiled(model_config("mfa"))
    with jax.set_mesh(axes.make_mesh((4, 1, 1, 2, 1))), pytest.raises(NotImplementedError, match="mesh context=2"):
        loglikelihoods(c.model, c.params, [([1], [1])])


def test_stories_against_golden_logits(data_dir: Path) -> None:
    """A trained model: the log-likelihood of its golden tokens from any place on, by the golden float64 logits."""
    folder = data_dir / "models" / "stories260K"
    config, params = load_pretrained(folder)
    with np.load(folder / "golden_stories260K_fp64.npz") as file:
        ids, logits = file["ids"].tolist(), file["logits"]
    asked = [(ids[:cut], ids[cut:end]) for cut, end in ((1, 100), (50, 100), (99, 100), (10, 12))]
    found = loglikelihoods(Transformer(config), params, asked)
    for (context, continuation), score in zip(asked, found, strict=True):
        expected, is_greedy = direct(logits, context, continuation)
        np.testing.assert_allclose(score.logprob, expected, atol=1e-4)
        assert score.greedy == is_greedy


@pytest.mark.slow
def test_stories_end_at_a_full_stop(data_dir: Path) -> None:
    folder = data_dir / "models" / "stories260K"
    config, params = load_pretrained(folder)
    tokenizer = pretrained_tokenizer(folder, "tok512.bin")
    found = complete_until(Transformer(config), params, tokenizer, [[tokenizer.bos_id or 0]], ["."], GREEDY, KEY,
                           max_new_tokens=60)
    assert found == [" Once upon a time, there was a little girl named Lily"]
