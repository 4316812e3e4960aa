"""Talk to a model in the terminal.

    python -m experiments.chat --hf DIR
    python -m experiments.chat --workdir runs/converted --system "Answer briefly." --temperature 0

Conversations are written with the chat template that came with the tokenizer, and answers appear as they are made. What
was read stays in the cache: a turn costs its own tokens, not those of the conversation. A line is a message; `/new`
begins another conversation, the end of the input (Ctrl-D) ends the program.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator

import jax

from experiments import cli
from experiments.opening import DecodingConfig, Opened, decode_kernel
from mfa_jax.config import require
from mfa_jax.data import StreamDecoder
from mfa_jax.data.chat import Message, chat_template, encode_rendered, render
from mfa_jax.generate import Conversation, SamplingConfig
from mfa_jax.model.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class ChatConfig(DecodingConfig):
    """Which model is talked to, and how its answers are made."""

    system: str | None = None
    """What the system says first; none for what the template says."""
    max_new_tokens: int = 512
    """At most so many tokens an answer."""
    capacity: int = 4096
    """Tokens that a conversation may have, the longest answer included; the cache has room for them from the start."""
    temperature: float = 0.7
    """0 takes the most probable token."""
    top_k: int | None = None
    """Only the k most probable tokens; none for all."""
    top_p: float = 0.95
    """Only the most probable tokens that together have this probability; in (0, 1]."""
    min_p: float = 0.0
    """Only tokens with at least this share of the most probable one's probability."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that were seen before are less probable."""
    seed: int = 0
    """The same seed and messages give the same answers."""

    def __post_init__(self) -> None:
        require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "must be at least 1")
        require(self.capacity > self.max_new_tokens, "capacity", self.capacity,
                f"must be above max_new_tokens={self.max_new_tokens}")
        require(0 <= self.seed < 2**32, "seed", self.seed, "must be in 0 .. 2^32 - 1")
        self.sampling(1)

    def sampling(self, vocab_limit: int) -> SamplingConfig:
        return SamplingConfig(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty,
                              vocab_limit=vocab_limit)


class Chat:
    """The messages so far, and the cache that holds them."""

    def __init__(self, config: ChatConfig, opened: Opened) -> None:
        """Raises ValueError: the tokenizer has no chat template."""
        chat_template(opened.tokenizer)
        self._config, self._opened = config, opened
        self._messages: list[Message] = [] if config.system is None else [{"role": "system", "content": config.system}]
        self._cached = Conversation(
            opened.model, opened.params, config.sampling(opened.tokenizer.vocab_size), jax.random.key(config.seed),
            capacity=config.capacity, cache_dtype=config.cache_dtype)

    def say(self, text: str) -> Iterator[str]:
        """The answer, in pieces as they come; it joins the conversation when it is complete.

        Raises:
          ValueError: there is no room left; the conversation stays as it was.
        """
        tokenizer, asked = self._opened.tokenizer, [*self._messages, {"role": "user", "content": text}]
        ids = encode_rendered(tokenizer, render(tokenizer, asked)).tolist()
        decoder, shown, pieces = StreamDecoder(tokenizer, ids), 0, list[str]()
        for found in self._cached.reply(ids, max_new_tokens=self._config.max_new_tokens,
                                        stop_tokens=tokenizer.stop_ids):
            fresh = found.tokens[0, shown : found.lengths[0]]
            shown = int(found.lengths[0])
            pieces.append("".join(decoder.feed(int(token)) for token in fresh))
            yield pieces[-1]
        pieces.append(decoder.flush())
        yield pieces[-1]
        self._messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]


def main(config: ChatConfig) -> None:
    opened = config.open()
    model, kernel = decode_kernel(opened.model.config, config.implementation, config.capacity, config.cache_dtype)
    opened = dataclasses.replace(opened, model=Transformer(model))
    chat = Chat(config, opened)
    print(f"{opened.name}: {model.attention.variant}, {jax.devices()[0].platform}, decode attention by {kernel}",
          file=sys.stderr)
    while (line := _line()) is not None:
        if line == "/new":
            chat = Chat(config, opened)
        elif line:
            try:
                for piece in chat.say(line):
                    print(piece, end="", flush=True)
                print()
            except ValueError as error:
                # Not the end of the program: what was said can be read on, and another conversation begun.
                print(f"error: {error} (/new begins another conversation)", file=sys.stderr)


def _line() -> str | None:
    """The next message, None at the end of the input; there is a prompt where somebody types."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


if __name__ == "__main__":
    cli.run(lambda: main(cli.parse(ChatConfig)))
