"""How fast we decode beside `transformers.generate`: the same weights, one process, the two taking turns.

    python -m experiments.bench_decode --json
    python -m experiments.bench_decode --variants mha,mqa,mla,mfa,mfa-kr
    python -m experiments.bench_decode --no-peer --batch-size 1 --prompt-tokens 384 --spare 8192

Both decode greedily through their caches, never stop early, in float32 on the same cores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from rich.table import Table

from experiments.benchmark import MODEL, Peer, Timing, machine, make_peer, random_tokens, show, take_turns, use_threads
from experiments.cli import parse, run
from mfa_jax import capacity
from mfa_jax.config import GQAConfig, ModelConfig, require, to_dict
from mfa_jax.generate import SamplingConfig, bucket, generate
from mfa_jax.model.transformer import Transformer
from mfa_jax.presets import matched, model_preset


@dataclasses.dataclass(frozen=True)
class BenchDecodeConfig:
    """Tokens per second of greedy decoding, ours over the peer's; and across our variants."""

    model: ModelConfig = MODEL
    """The model of both; grouped heads and rope, which the peer knows too."""
    batch_size: int = 8
    """Rows that are decoded at once."""
    prompt_tokens: int = 128
    """Tokens of each prompt."""
    new_tokens: int = 128
    """Tokens decoded for each row."""
    repeats: int = 7
    """Timed runs of each; all take turns."""
    threads: int = 2
    """Cores that the process is bound to, and threads of each side."""
    peer: bool = True
    """Measure transformers too (needs `pip install "mfa_jax[bench]"`)."""
    variants: str = ""
    """Our other variants to measure besides, separated by commas: mha, gqa, mqa, mla, mfa, mfa-kr. They have the widths
    of the preset of this head width, and as many parameters as `model`."""
    spare: int = 0
    """Measure ours also in caches of this allocated length, whose rest stays empty; 0 for not."""
    seed: int = 0
    """Of the weights and the prompts."""
    json: bool = False
    """Print one JSON object instead of a table."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "prompt_tokens", "repeats", "threads"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        require(self.new_tokens >= 2, "new_tokens", self.new_tokens, "must be at least 2")
        require(self.spare == 0 or self.spare > self.room, "spare", self.spare,
                f"must be 0, or more than the {self.room} that are needed")

    @property
    def room(self) -> int:
        """Tokens that a row's cache holds."""
        return bucket(self.prompt_tokens + self.new_tokens)


def variant_model(reference: ModelConfig, name: str) -> ModelConfig:
    """`reference` as another variant with the same parameters: the widths of the preset of the same head width.

    Raises:
      ValueError: an unknown variant, or no preset of that head width.
    """
    require(isinstance(reference.attention, GQAConfig), "model.attention.kind", reference.attention.kind,
            "variants are matched to gqa")
    assert isinstance(reference.attention, GQAConfig)
    scales = {model_preset(f"{scale}-mha").attention.rotated_dim: scale for scale in ("tiny", "nano", "small")}
    head_dim = reference.attention.head_dim
    require(head_dim in scales, "model.attention.head_dim", head_dim,
            f"variants need one of {', '.join(map(str, scales))}, the head widths of presets")
    return matched(reference, model_preset(f"{scales[head_dim]}-{name}").attention)


def our_run(
    config: BenchDecodeConfig, model: ModelConfig, params: Any, new_tokens: int, room: int
) -> Callable[[], np.ndarray]:
    """A call that decodes `new_tokens` tokens a row and returns them, in caches of `room` tokens a row."""
    prompts = random_tokens(config.model, config.batch_size, config.prompt_tokens, config.seed)
    lengths = np.full(config.batch_size, config.prompt_tokens)

    def decode() -> np.ndarray:
        generated = generate(Transformer(model), params, prompts, lengths, SamplingConfig(temperature=0),
                             jax.random.key(0), max_new_tokens=new_tokens, capacity=room)
        return np.asarray(generated.tokens)

    return decode


def peer_run(config: BenchDecodeConfig, peer: Peer, new_tokens: int) -> Callable[[], np.ndarray]:
    """The same for the peer: `generate` with its default (dynamic) cache."""
    torch = peer.torch
    prompts = torch.from_numpy(random_tokens(config.model, config.batch_size, config.prompt_tokens, config.seed))
    mask = torch.ones_like(prompts)

    def decode() -> np.ndarray:
        out = peer.model.generate(prompts, attention_mask=mask, do_sample=False, use_cache=True,
                                  max_new_tokens=new_tokens, min_new_tokens=new_tokens)
        return out[:, config.prompt_tokens:].numpy()

    return decode


def measure(config: BenchDecodeConfig) -> dict[str, Any]:
    """The record of the benchmark, ready for `json.dumps`.

    Raises:
      ValueError: the peer is missing or another model, or a variant is unknown.
    """
    found = machine(config.threads)
    models = {name: variant_model(config.model, name) for name in config.variants.split(",") if name}
    params = {name: initial(model, config.seed) for name, model in models.items()}
    peer = make_peer(config.model, config.threads, config.seed) if config.peer else None
    models["ours"], params["ours"] = config.model, peer.params if peer else initial(config.model, config.seed)

    calls = {}
    for suffix, tokens in (("", config.new_tokens), (" first token", 1)):
        for name in ("ours", *(name for name in models if name != "ours")):
            calls[name + suffix] = our_run(config, models[name], params[name], tokens, config.room)
            if config.spare:
                calls[f"{name}, spare{suffix}"] = our_run(config, models[name], params[name], tokens, config.spare)
            if name == "ours" and peer is not None:
                calls["peer" + suffix] = peer_run(config, peer, tokens)
    timings = take_turns(calls, config.repeats)
    sides = {name: _side(config, timings[name], timings[f"{name} first token"], models.get(name.split(",")[0]))
             for name in calls if not name.endswith("first token")}
    return {
        "benchmark": "decode", "config": to_dict(config), "machine": {**found, "load_after": machine(1)["load_before"]},
        "spare_time": {name: _decoding_s(timings, f"{name}, spare") / _decoding_s(timings, name)
                       for name in models if config.spare},
        "check": None if peer is None else _check(peer, calls), "sides": sides,
        "ratios": None if peer is None else {
            "tokens_per_s": sides["ours"]["tokens_per_s"] / sides["peer"]["tokens_per_s"],
            "time_to_first_token": sides["ours"]["time_to_first_token_s"] / sides["peer"]["time_to_first_token_s"],
            "decode_only_tokens_per_s":
                sides["ours"]["decode_only_tokens_per_s"] / sides["peer"]["decode_only_tokens_per_s"],
        },
    }


def _decoding_s(timings: dict[str, Timing], name: str) -> float:
    """Median time of the tokens after the first."""
    return timings[name].median_s - timings[f"{name} first token"].median_s


def initial(model: ModelConfig, seed: int) -> Any:
    """Random parameters of a model."""
    return nn.unbox(jax.jit(Transformer(model).init)(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))["params"])


def _side(config: BenchDecodeConfig, whole: Timing, first: Timing, model: ModelConfig | None) -> dict[str, Any]:
    tokens = config.batch_size * config.new_tokens
    side = {
        "tokens_per_s": tokens / whole.median_s, "time_to_first_token_s": first.median_s,
        # Noise may make one token as slow as all of them; then there is no such rate.
        "decode_only_tokens_per_s": (tokens - config.batch_size) / max(whole.median_s - first.median_s, 1e-9),
        "compile_s": whole.compile_s, "compile_first_token_s": first.compile_s,
        "whole": dataclasses.asdict(whole), "first_token": dataclasses.asdict(first),
    }
    if model is not None:
        side["parameters"] = capacity.model_parameters(model).total
        side["cache_bytes_per_token"] = capacity.analyse_model(
            model, context=config.prompt_tokens, cache_dtype=model.dtype).cache_bytes_per_token
    return side


def _check(peer: Peer, calls: dict[str, Callable[[], np.ndarray]]) -> dict[str, float]:
    """How well the two agree: logits, and the share of decoded tokens before each row's first difference."""
    same = np.cumprod(calls["ours"]() == calls["peer"](), axis=1)
    return {"logit_difference": peer.logit_difference, "equal_tokens": float(same.mean())}


def to_table(record: dict[str, Any]) -> Table:
    """A row a side; the compile time of an eager peer is its lazy set-up."""
    table = Table(title="Greedy decoding, medians", title_justify="left")
    for heading in ("", "tokens/s", "first token (ms)", "compile (s)", "parameters", "cache bytes/token"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, side in record["sides"].items():
        table.add_row(name, f"{side['tokens_per_s']:.0f}", f"{1e3 * side['time_to_first_token_s']:.0f}",
                      f"{side['compile_s']:.1f}", str(side.get("parameters", "")),
                      str(side.get("cache_bytes_per_token", "")))
    captions = []
    if record["ratios"] is not None:
        captions.append(f"ours / peer: tokens/s {record['ratios']['tokens_per_s']:.2f}, "
                        f"first token {record['ratios']['time_to_first_token']:.2f}; largest relative difference of "
                        f"logits {record['check']['logit_difference']:.1e}")
    captions += [f"{name}: time of a decoded token with spare room / without {ratio:.2f}"
                 for name, ratio in record["spare_time"].items()]
    table.caption = "\n".join(captions)
    return table


def main() -> None:
    config = parse(BenchDecodeConfig)
    use_threads(config.threads)
    show(measure(config), to_table, as_json=config.json)


if __name__ == "__main__":
    run(main)
