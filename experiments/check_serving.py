"""Does an engine serve the model that was exported to it: its greedy texts and log-probabilities beside ours.

    python -m experiments.export --workdir runs/mfa --out exported --context-length 4096 --dtype float32
    vllm serve exported --dtype float32 --max-model-len 4096 &
    python -m experiments.check_serving --workdir runs/mfa --dtype float32 --url http://localhost:8000/v1

Asks any engine that speaks OpenAI's completions (vLLM, SGLang, llama.cpp's server) to continue prompts, and says a JSON
object of what came back. A prompt is sent as text, which must become as many tokens as with our tokenizer, and as
tokens, of which the continuations are compared. Exit code 1 says that they disagree: another text, another number of
tokens, or a log-probability further away than `--tolerance`. Both sides should compute in float32 for this.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import urllib.error
import urllib.request
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from experiments import cli
from experiments.check_parity import ParityError
from experiments.opening import OpenConfig, Opened
from mfa_jax.config import require
from mfa_jax.generate import SamplingConfig, encode_prompts, generate

PROMPTS = ("The old man looked at the sea and", "Once upon a time", "def fibonacci(n):")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckServingConfig(OpenConfig):
    """A model, and the engine that serves what was exported of it."""

    url: str = "http://localhost:8000/v1"
    """Where the engine answers, up to `/v1`."""
    served_model: str | None = None
    """What the engine calls the model; none for the first that it lists."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Text to continue; may be given several times. Without any there are three short ones."""
    max_new_tokens: int = 32
    """At most so many tokens a prompt."""
    tolerance: float = 1e-3
    """Largest difference of two log-probabilities that is accepted, in nats."""
    timeout: float = 300.0
    """Seconds that an answer may take."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "timeout"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
        require(self.tolerance >= 0, "tolerance", self.tolerance, "must not be negative")
        require(self.url.startswith(("http://", "https://")), "url", self.url, "must begin with http:// or https://")
        require(all(self.prompt), "prompt", self.prompt, "must not be empty")


@dataclasses.dataclass(frozen=True)
class Continuation:
    """What one side says after a prompt."""

    prompt_tokens: int
    """Of the prompt as text."""
    text: str
    logprobs: list[float]
    """Of each token that was chosen, under the model."""
    stopped: bool
    """The text ended before there were as many tokens as were asked for; engines differ in whether they tell the
    token that ended it."""


def ours(config: CheckServingConfig, opened: Opened, prompts: tuple[str, ...]) -> list[Continuation]:
    """Greedy continuations through the cache, up to the end of the text. Raises: ValueError: as `generate`."""
    tokenizer = opened.tokenizer
    tokens, lengths = encode_prompts(tokenizer, prompts, add_bos_token=opened.add_bos_token)
    greedy = SamplingConfig(temperature=0.0, vocab_limit=tokenizer.vocab_size)
    found = jax.device_get(generate(opened.model, opened.params, tokens, lengths, greedy, jax.random.key(0),
                                    max_new_tokens=config.max_new_tokens, stop_tokens=tokenizer.stop_ids))
    rows = zip(lengths, found.tokens, found.logprobs, found.lengths, found.stopped, strict=True)
    return [Continuation(int(length), tokenizer.decode(row[: size - stopped].tolist()), logprobs[:size].tolist(),
                         bool(stopped))
            for length, row, logprobs, size, stopped in rows]


def theirs(config: CheckServingConfig, prompts: tuple[str, ...], ids: list[list[int]]) -> list[Continuation]:
    """The engine's, of the same tokens.

    Raises:
      ValueError: no engine there, or an answer that lacks something.
    """
    name = config.served_model or _first_model(config)
    found = []
    for prompt, tokens in zip(prompts, ids, strict=True):
        ask = {"model": name, "temperature": 0, "logprobs": 1}
        read = _answer(config, "completions", {**ask, "prompt": prompt, "max_tokens": 1})
        answer = _answer(config, "completions", {**ask, "prompt": tokens, "max_tokens": config.max_new_tokens})
        choice = _part(config, answer, "choices", 0)
        logprobs = _part(config, choice, "logprobs", "token_logprobs")
        found.append(Continuation(_part(config, read, "usage", "prompt_tokens"), _part(config, choice, "text"),
                                  [float(x) for x in logprobs], _part(config, choice, "finish_reason") == "stop"))
    return found


def _first_model(config: CheckServingConfig) -> str:
    return str(_part(config, _answer(config, "models", None), "data", 0, "id"))


def _answer(config: CheckServingConfig, what: str, body: dict[str, Any] | None) -> Any:
    address = f"{config.url.rstrip('/')}/{what}"
    request = urllib.request.Request(address, None if body is None else json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=config.timeout) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        said = error.read(2000).decode(errors="replace")
        raise ValueError(f"url: {address} answered {error.code} {error.reason}: {said}") from error
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"url: no engine answers at {address} ({error}); start it first, or give its --url, or a "
                         f"longer --timeout") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"url: {address} answered something else than JSON ({error})") from error


def _part(config: CheckServingConfig, answer: Any, *path: str | int) -> Any:
    """What lies at a path of an answer. Raises: ValueError: it isn't there."""
    found = answer
    for key in path:
        if isinstance(key, str):
            there = isinstance(found, dict) and key in found
        else:
            there = isinstance(found, list) and key < len(found)
        if not there:
            raise ValueError(f"url: the answer of {config.url} has no {'.'.join(map(str, path))}: "
                             f"{json.dumps(answer)[:500]}")
        found = found[key]
    return found


def compare(mine: Continuation, other: Continuation, tolerance: float) -> dict[str, Any]:
    """What two continuations of a prompt have in common, and in which of it they disagree.

    The most probable token's log-probability is the largest of its position, so that it is compared even where a tie
    was broken another way; from the first that is too far away on, the texts are of different prompts.
    """
    both = min(len(mine.logprobs), len(other.logprobs))
    apart = np.abs(np.asarray(mine.logprobs[:both]) - np.asarray(other.logprobs[:both]))
    # Not by a maximum: nan compares as false with everything.
    beyond = np.flatnonzero(~(apart <= tolerance))
    found = {"same_text": mine.text == other.text, "tokens": [len(mine.logprobs), len(other.logprobs)],
             "prompt_tokens": [mine.prompt_tokens, other.prompt_tokens],
             "largest_difference": float(apart.max()) if both else None,
             "first_beyond": int(beyond[0]) if len(beyond) else None}
    untold = int(mine.stopped and other.stopped)
    disagree = [name for name, wrong in (
        ("prompt_tokens", mine.prompt_tokens != other.prompt_tokens), ("text", mine.text != other.text),
        ("tokens", abs(len(mine.logprobs) - len(other.logprobs)) > untold), ("logprobs", bool(len(beyond)))) if wrong]
    return {**found, "disagree": disagree}


def main(config: CheckServingConfig) -> None:
    prompts = config.prompt or PROMPTS
    opened = config.open()
    tokens, lengths = encode_prompts(opened.tokenizer, prompts, add_bos_token=opened.add_bos_token)
    ids = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
    answered = theirs(config, prompts, ids)
    mine = ours(config, opened, prompts)
    rows = [{"prompt": prompt, "ours": a.text, "theirs": b.text, **compare(a, b, config.tolerance)}
            for prompt, a, b in zip(prompts, mine, answered, strict=True)]
    print(json.dumps({"model": opened.name, "url": config.url, "tolerance": config.tolerance, "prompts": rows},
                     indent=1, ensure_ascii=False))
    for row in rows:
        if row["disagree"]:
            raise ParityError(f"prompt {row['prompt']!r}: the engine disagrees in {', '.join(row['disagree'])}")


if __name__ == "__main__":
    cli.run(lambda: main(cli.parse(CheckServingConfig)))
