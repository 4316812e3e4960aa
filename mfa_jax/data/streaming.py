"""Text of tokens that come one by one, or behind others."""

from __future__ import annotations

from collections.abc import Sequence

from mfa_jax.data.tokenizers import Tokenizer


def decode_after(tokenizer: Tokenizer, context: Sequence[int], ids: Sequence[int]) -> str:
    """The text of `ids` where they follow `context`: whether a space leads depends on it.

    Args:
      context: ids that end between two characters.
    """
    before, text = tokenizer.decode(context), tokenizer.decode([*context, *ids])
    # Where bytes spell characters, one that is cut off makes U+FFFD of all bytes in a row, those of the context, too.
    return text[len(before):] if text.startswith(before) else tokenizer.decode(ids)


class StreamDecoder:
    """Text as it comes, token by token: what is yielded is never taken back.

    Text that ends in U+FFFD may be half of a character, so it is held until the next tokens complete it. All that
    `feed` and `flush` yield is together what `decode` makes of the tokens, after the text of `context`; of tokens that
    end within a character, too, whole characters are kept.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        """Args: the tokenizer, and the ids that came before (a prompt), which end between two characters."""
        self._tokenizer = tokenizer
        self._shown = list(context)
        self._held: list[int] = []

    def feed(self, token: int) -> str:
        """The text that this token completes, "" while a character is incomplete."""
        self._held.append(int(token))
        text = self._new_text()
        if not text or text.endswith("\ufffd"):
            return ""
        # Only the last shown tokens matter from here on: whether a space leads, which character was open.
        self._shown, self._held = self._held, []
        return text

    def flush(self) -> str:
        """What is still held, incomplete characters as U+FFFD."""
        text = self._new_text()
        self._shown, self._held = self._shown + self._held, []
        return text

    def _new_text(self) -> str:
        return decode_after(self._tokenizer, self._shown, self._held)
