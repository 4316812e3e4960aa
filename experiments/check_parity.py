"""How far two models are apart, position by position, on the same tokens.

    python -m experiments.check_parity --left DIR --right golden.npz
    python -m experiments.check_parity --left model.gguf --right runs/converted --text FILE --tokens 512
    python -m experiments.check_parity --left DIR --right transformers:DIR --text FILE --tolerance 1e-4

A side is a checkpoint (a Hugging Face folder or a `.gguf` file), the folder of a run, `transformers:DIR` for the peer
in PyTorch, or a golden `.npz` file: `ids [T]` and `logits [T, V]`, or what there is of them (`logits_first8`,
`logits_last`, and `nll [T - 1]`, the loss of each token but the first). A JSON object is printed; exit code 1 says that
they are further apart than `--tolerance`.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import cli
from mfa_jax.config import require
from mfa_jax.convert import load_pretrained, pretrained_tokenizer
from mfa_jax.data import Tokenizer, documents
from mfa_jax.model.transformer import Transformer
from mfa_jax.train.run import CHECKPOINTS, load_trained


@dataclasses.dataclass(frozen=True)
class CheckParityConfig:
    """Two models, and the tokens they are compared on."""

    left: str
    """A model: a Hugging Face folder or a .gguf file, the folder of a run, or transformers:DIR for the peer in PyTorch.
    The divergence is taken of its predictions."""
    right: str
    """Another, or a golden .npz file: ids [T] and logits [T, V], or what there is of them (logits_first8, logits_last,
    and nll [T - 1], the loss of each token but the first)."""
    text: str | None = None
    """A text file; none takes the ids of a golden file."""
    tokenizer: str | None = None
    """Name of the tokenizer in the folder of the left model, which is no run; none for what it holds."""
    tokens: int = 512
    """So many tokens of the text."""
    tolerance: float | None = None
    """Largest difference of two logits that is accepted; none only reports."""
    per_position: bool = False
    """Report every position, too."""

    def __post_init__(self) -> None:
        require(not self.left.endswith(".npz"), "left", self.left,
                "must be a model: a checkpoint, the folder of a run, or transformers:FOLDER")
        require((self.text is None) == self.right.endswith(".npz"), "text", self.text,
                "give a text, or a golden file that brings its tokens")
        require(self.tokens >= 2, "tokens", self.tokens, "must be at least 2")
        for name in ("tokenizer", "tokens") if self.text is None else ():
            value = getattr(self, name)
            require(value == getattr(CheckParityConfig, name), name, value,
                    "must be left out: a golden file brings its tokens")
        require(self.tolerance is None or self.tolerance >= 0, "tolerance", self.tolerance, "must not be negative")


class ParityError(ArithmeticError):
    """The models are further apart than was accepted."""


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What a model says about some tokens, as far as it is known."""

    ids: np.ndarray
    """[T]"""
    positions: np.ndarray
    """[P], where logits are known."""
    logits: np.ndarray
    """[P, V] float64"""
    nll: np.ndarray | None = None
    """[T - 1] nats, the loss of each token but the first, where a golden file has no more than that."""


def golden(path: str) -> Outputs:
    """The outputs in a golden file.

    Raises:
      ValueError: no such file, or no ids, or neither logits nor losses in it.
    """
    require(Path(path).is_file(), "right", path, "no such file")
    with np.load(path) as file:
        known = {name: np.asarray(file[name]) for name in file.files}
    accepted = ("logits", "logits_first8", "logits_last", "nll")
    require("ids" in known and any(name in known for name in accepted), "right", path,
            f"must hold ids, and some of {', '.join(accepted)}; it holds {', '.join(known)}")
    ids = known["ids"]
    if "logits" in known:
        return Outputs(ids, np.arange(len(ids)), known["logits"].astype(np.float64))
    parts = {name: at for name, at in (("logits_first8", np.arange(8)), ("logits_last", np.array([len(ids) - 1])))
             if name in known}
    width = max((known[name].shape[-1] for name in parts), default=0)
    logits = [known[name].reshape(-1, width).astype(np.float64) for name in parts]
    return Outputs(ids, np.concatenate([np.empty(0, int), *parts.values()]),
                   np.concatenate([np.empty((0, width)), *logits]),
                   known["nll"].astype(np.float64) if "nll" in known else None)


def outputs(path: str, ids: np.ndarray) -> Outputs:
    """The outputs of a model on one row of tokens, in float32."""
    if path.startswith("transformers:"):
        logits = _peer_logits(path.removeprefix("transformers:"), ids)
    else:
        model, params = open_model(path)
        require(int(ids.max()) < model.config.vocab_size, "tokens", int(ids.max()),
                f"must be below vocab_size={model.config.vocab_size} of {path}")
        logits, _ = jax.jit(model.apply)({"params": params}, jnp.asarray(ids, jnp.int32)[None])
    return Outputs(ids, np.arange(len(ids)), np.asarray(logits, np.float64)[0])


def open_model(path: str) -> tuple[Transformer, Any]:
    """The model, which computes in float32, and the parameters of a checkpoint or of a run."""
    if (Path(path) / CHECKPOINTS).is_dir():
        trained = load_trained(path)
        return Transformer(dataclasses.replace(trained.model.config, dtype="float32")), trained.params
    config, params = load_pretrained(path)
    return Transformer(config), params


def open_tokenizer(path: str, name: str | None) -> Tokenizer:
    """The tokenizer of a checkpoint or of a run.

    Raises:
      ValueError: a name for that of a run, or what `pretrained_tokenizer` raises.
    """
    path = path.removeprefix("transformers:")
    if not (Path(path) / CHECKPOINTS).is_dir():
        return pretrained_tokenizer(path, name)
    require(name is None, "tokenizer", name, f"must be left out: the run {path} has its own")
    return load_trained(path).tokenizer


def _peer_logits(folder: str, ids: np.ndarray) -> np.ndarray:
    try:
        torch, transformers = (importlib.import_module(name) for name in ("torch", "transformers"))
    except ModuleNotFoundError as error:
        raise ValueError(f'{error.name} is not installed; pip install "mfa_jax[bench]"') from error
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return np.asarray(model(torch.tensor(ids[None].tolist())).logits.numpy())


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def compare(left: Outputs, right: Outputs) -> dict[str, Any]:
    """Per position the largest difference of a logit and `KL(left || right)` in nats, and what is largest of them.

    Raises:
      ValueError: vocabularies of different sizes.
    """
    found: dict[str, Any] = {"tokens": len(left.ids), "positions": right.positions.tolist()}
    if len(right.positions):
        mine = left.logits[right.positions]
        require(mine.shape == right.logits.shape, "vocab_size", mine.shape[1], f"must be {right.logits.shape[1]}")
        log_p, log_q = log_softmax(mine), log_softmax(right.logits)
        difference, kl = np.abs(mine - right.logits).max(-1), (np.exp(log_p) * (log_p - log_q)).sum(-1)
        found |= {"largest_difference": float(difference.max()), "at": int(right.positions[difference.argmax()]),
                  "mean_kl": float(kl.mean()), "largest_kl": float(kl.max()),
                  "same_choice": float((log_p.argmax(-1) == log_q.argmax(-1)).mean()),
                  "difference": difference.tolist(), "kl": kl.tolist()}
    if right.nll is not None:
        log_p = log_softmax(left.logits[:-1])
        nll = -log_p[np.arange(len(log_p)), left.ids[1:]]
        found |= {"mean_nll": [float(nll.mean()), float(right.nll.mean())],
                  "largest_nll_difference": float(np.abs(nll - right.nll).max())}
    return found


def same_tokenizer(tokenizer: Tokenizer, right: str) -> bool | None:
    """Whether ids are the same tokens to the right model; None where it holds no tokenizer, or none without a name."""
    try:
        theirs = open_tokenizer(right, None)
    except (ValueError, NotImplementedError):
        return None
    same = theirs.encoding == tokenizer.encoding
    if not same:
        print(f"{right} has another tokenizer than left: ids may be other tokens to it", file=sys.stderr)
    return same


def main(config: CheckParityConfig) -> None:
    same: bool | None = None
    if config.text is None:
        right = golden(config.right)
    else:
        text = next(iter(documents(config.text))).text
        tokenizer = open_tokenizer(config.left, config.tokenizer)
        same = same_tokenizer(tokenizer, config.right)
        ids = np.asarray(tokenizer.encode(text)[: config.tokens], np.int64)
        require(len(ids) >= 2, "text", len(ids), "must have at least 2 tokens")
        right = outputs(config.right, ids)
    found = compare(outputs(config.left, right.ids), right)
    if not config.per_position:
        found = {name: value for name, value in found.items() if name not in ("positions", "difference", "kl")}
    print(json.dumps({"left": config.left, "right": config.right, "same_tokenizer": same, **found}))
    differences = [found[name] for name in ("largest_difference", "largest_nll_difference") if name in found]
    # Not by a maximum: nan compares as false with everything.
    beyond = [x for x in differences if config.tolerance is not None and not x <= config.tolerance]
    if beyond:
        raise ParityError(f"largest difference {beyond[0]:.3g} exceeds tolerance={config.tolerance:g}")


if __name__ == "__main__":
    cli.run(lambda: main(cli.parse(CheckParityConfig)))
