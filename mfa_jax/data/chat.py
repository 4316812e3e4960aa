"""Conversations as the text that a model was trained on: the chat template of its tokenizer.

A template is Jinja and comes with a checkpoint, so it runs in a sandbox. What it is given is what Hugging Face's
`apply_chat_template` gives: `messages`, `add_generation_prompt`, `bos_token`, `eos_token`, `raise_exception`,
`strftime_now` and the filter `tojson`.
"""

from __future__ import annotations

import datetime
import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import numpy as np
from jaxtyping import Int32
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mfa_jax.config import require
from mfa_jax.data.tokenizers import HuggingFaceTokenizer, Tokenizer

Message = Mapping[str, str]


def chat_template(tokenizer: Tokenizer) -> str:
    """The template that a tokenizer brings along.

    Raises:
      ValueError: it has none.
    """
    template = getattr(tokenizer, "chat_template", None)
    require(template is not None, "tokenizer", type(tokenizer).__name__,
            "has no chat template: accepted are checkpoints whose tokenizer_config.json, chat_template.jinja or .gguf "
            "file has one, which a model trained on conversations does")
    return str(template)


def render(
    tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = True,
    continue_last: bool = False,
) -> str:
    """The text of a conversation.

    Args:
      messages: each with `role` and `content`.
      add_generation_prompt: end with what precedes an answer.
      continue_last: end where the last message's content does, so that it can be gone on with: with the blanks that
        the content ends with where the template keeps them, without where it trims.

    Raises:
      ValueError: no template, one that does not parse, or that refuses these messages; nothing to be gone on with.
    """
    require(not (add_generation_prompt and continue_last), "continue_last", True,
            "the last message can't be gone on with after the prompt for the next one")
    if not continue_last:
        return _render(tokenizer, messages, add_generation_prompt=add_generation_prompt)
    content = messages[-1]["content"] if messages else ""
    require(bool(content.strip()), "messages", list(messages[-1:]),
            "must end with a message that has content to go on with")
    # Its blank goes where a template trims, and tells, as that of Hugging Face's mark does.
    mark = f"Continue-{uuid.uuid4().hex} "
    text = _render(tokenizer, [*messages[:-1], {**messages[-1], "content": content + mark}])
    end = text.rfind(mark.strip())
    kept = text[:end] if text.startswith(mark, end) else text[:end].rstrip()
    require(end >= 0 and kept.rstrip().endswith(content.strip()), "messages", content,
            "is changed by the template, and can't be continued")
    return kept


def _render(tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
    special = {name: getattr(tokenizer, name, None) or "" for name in ("bos_token", "eos_token")}
    try:
        return _environment().from_string(chat_template(tokenizer)).render(
            messages=list(messages), add_generation_prompt=add_generation_prompt, tools=None, documents=None, **special)
    except jinja2.TemplateError as error:
        raise ValueError(f"chat_template: {error}") from error


def encode_rendered(tokenizer: Tokenizer, text: str) -> Int32[np.ndarray, " T"]:
    """The ids of a rendered conversation: unlike in `encode`, what spells a special token is that token.

    So is what a user spells in a message, as everywhere where templates are text.
    """
    return tokenizer.encode_marked(text) if isinstance(tokenizer, HuggingFaceTokenizer) else tokenizer.encode(text)


def _environment() -> ImmutableSandboxedEnvironment:
    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, **options: Any) -> str:
        # Jinja's own filter escapes for HTML.
        return json.dumps(value, ensure_ascii=False, **options)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols"])
    environment.globals |= {"raise_exception": refuse,
                            "strftime_now": lambda form: datetime.datetime.now().strftime(form)}
    environment.filters["tojson"] = to_json
    return environment
