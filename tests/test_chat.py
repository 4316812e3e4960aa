"""Conversations as text, and answers that go on from the cache."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from experiments import chat as chat_program
from experiments.chat import Chat, ChatConfig
from experiments.opening import Opened, open_model
from mfa_jax.convert import save_run
from mfa_jax.data import ByteTokenizer, HuggingFaceTokenizer
from mfa_jax.data.chat import encode_rendered, render
from mfa_jax.generate import Conversation, SamplingConfig, conversation, generate
from tests.contract import V, compiled, model_config

GREEDY, KEY = SamplingConfig(temperature=0), jax.random.key(0)
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]


def chat_tokenizer(template: str | None = CHATML) -> HuggingFaceTokenizer:
    """The bytes, and the two tokens of ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_end|>", "<|im_start|>"])
    return HuggingFaceTokenizer(tokenizer.to_str().encode(), "test", "<|im_end|>", "<|im_start|>", template)


# ---- text ------------------------------------------------------------------------------------------------------


def test_a_conversation_as_text() -> None:
    tokenizer = chat_tokenizer()
    assert render(tokenizer, MESSAGES) == ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n"
                                           "<|im_start|>assistant\n")
    ended = render(tokenizer, MESSAGES, add_generation_prompt=False, continue_last=True)
    assert ended == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?"


def test_what_spells_a_special_token_is_one_in_a_conversation_alone() -> None:
    tokenizer = chat_tokenizer()
    marked = encode_rendered(tokenizer, "a<|im_end|>").tolist()
    assert marked[-1] == tokenizer.eos_id and len(marked) == 2
    assert tokenizer.eos_id not in tokenizer.encode("a<|im_end|>") and len(tokenizer.encode("a<|im_end|>")) == 11
    assert encode_rendered(ByteTokenizer(), "a<").tolist() == [97, 60]


def test_templates_have_what_hugging_face_gives_them() -> None:
    """Line feeds after blocks are dropped, json is not escaped for HTML, loops may be left, a template may refuse."""
    text = render(chat_tokenizer("{% for m in messages %}\n{{ m | tojson }}{% break %}\n{% endfor %}\n{{ eos_token }}"),
                  [{"role": "a", "content": "<ü>"}] * 2)
    assert text == '{"role": "a", "content": "<ü>"}<|im_end|>'
    with pytest.raises(ValueError, match="chat_template: only users"):
        render(chat_tokenizer("{{ raise_exception('only users') }}"), MESSAGES)


@pytest.mark.parametrize(("template", "message"), [
    (None, "has no chat template: accepted are"),
    ("{% for %}", "chat_template: "),
    ("{{ messages.__class__.__mro__ }}", "chat_template: "),
    ("{% set _ = messages.append(1) %}", "chat_template: "),
])
def test_templates_that_cannot_be_used(template: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render(chat_tokenizer(template), MESSAGES)


def test_a_message_that_the_template_changes_cannot_be_continued() -> None:
    with pytest.raises(ValueError, match="messages='Yes\\?': is changed by the template"):
        render(chat_tokenizer("{{ messages[-1].content | upper }}"), MESSAGES, add_generation_prompt=False,
               continue_last=True)


@pytest.mark.parametrize("content", ["end", "m", "|", "assistant", "Yes?  "])
def test_a_conversation_is_cut_where_the_last_content_ends(content: str) -> None:
    """The end marker may hold the content. Blanks at the end stay where the template keeps them."""
    messages = [MESSAGES[0], {"role": "assistant", "content": content}]
    opened = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    trimming = CHATML.replace("m['content']", "m['content'] | trim")
    for template, end in ((CHATML, content), (trimming, content.strip())):
        found = render(chat_tokenizer(template), messages, add_generation_prompt=False, continue_last=True)
        assert found == opened + end
    assert messages[-1]["content"] == content


@pytest.mark.parametrize("messages", [[], [MESSAGES[0], {"role": "assistant", "content": " "}]])
def test_nothing_cannot_be_continued(messages: list[dict[str, str]]) -> None:
    with pytest.raises(ValueError, match="messages=.*: must end with a message that has content to go on with"):
        render(chat_tokenizer(), messages, add_generation_prompt=False, continue_last=True)


# ---- the cache -------------------------------------------------------------------------------------------------


def answer(talk: Conversation, ids: list[int], new: int, **options: Any) -> tuple[list[int], np.ndarray]:
    *_, last = talk.reply(ids, max_new_tokens=new, **options)
    size = int(last.lengths[0])
    return last.tokens[0, :size].tolist(), last.logprobs[0, :size]


@pytest.mark.parametrize("variant", [
    "mfa_kr", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gqa", "mla", "mfa"))])
def test_turns_equal_the_whole_conversation(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three turns, the second longer than a decode kernel takes at once, the third with an earlier answer changed:
    each answer is what `generate` makes of all tokens, and only what is new is read."""
    c = compiled(model_config(variant))
    read: list[int] = []
    extend = conversation._extend

    def counting(model: Any, params: Any, caches: Any, start: Any, tokens: Any, length: Any, *rest: Any, **more: Any
                 ) -> Any:
        read.append(int(length))
        return extend(model, params, caches, start, tokens, length, *rest, **more)

    monkeypatch.setattr(conversation, "_extend", counting)
    talk = Conversation(c.model, c.params, GREEDY, KEY, capacity=96)
    rng = np.random.default_rng(0)
    ids: list[int] = rng.integers(0, V, 5).tolist()
    expected_reads = [5]
    for extra in (20, 3, None):
        tokens, logprobs = answer(talk, ids, 6)
        whole = generate(c.model, c.params, [ids], [len(ids)], GREEDY, KEY, max_new_tokens=6, capacity=96)
        assert tokens == np.asarray(whole.tokens)[0].tolist()
        np.testing.assert_allclose(logprobs, whole.logprobs[0], atol=1e-5)
        assert talk.held == len(ids) + 5
        if extra == 3:  # the last token of the answer was another, and what came before it stays
            ids = [*ids, *tokens[:2], (tokens[2] + 1) % V, *rng.integers(0, V, extra).tolist()]
            expected_reads.append(1 + extra)
        elif extra is not None:
            ids = [*ids, *tokens, *rng.integers(0, V, extra).tolist()]
            expected_reads.append(1 + extra)
    assert read == expected_reads


def test_turns_of_a_bucket_share_a_program() -> None:
    c = compiled(model_config("mfa", num_layers=1))
    talk = Conversation(c.model, c.params, GREEDY, KEY, capacity=96)
    ids, sizes = [1, 2, 3], []
    for _ in range(3):
        tokens, _ = answer(talk, ids, 4)
        ids = [*ids, *tokens, 7, 8]
        sizes.append(conversation._extend._cache_size())
    assert sizes[0] == sizes[2]


def test_an_answer_ends_at_a_stop_token_and_may_be_left_early() -> None:
    c = compiled(model_config("mfa", num_layers=1))
    sampling = SamplingConfig(temperature=0, repetition_penalty=2.0)
    talk = Conversation(c.model, c.params, sampling, KEY, capacity=64)
    free, _ = answer(talk, [1, 2, 3], 8)
    whole = generate(c.model, c.params, [[1, 2, 3]], [3], sampling, KEY, max_new_tokens=8, capacity=64)
    assert free == np.asarray(whole.tokens)[0].tolist() != answer(Conversation(
        c.model, c.params, GREEDY, KEY, capacity=64), [1, 2, 3], 8)[0]
    stopped, _ = answer(talk, [1, 2, 3], 8, stop_tokens=[free[3]])
    assert stopped == free[: free.index(free[3]) + 1]
    next(talk.reply([1, 2, 3], max_new_tokens=8))
    assert talk.held == 3 and answer(talk, [1, 2, 3], 8)[0] == free


@pytest.mark.parametrize("at", ["_extend", "decode"])
def test_a_conversation_goes_on_after_an_interruption(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is interrupted was given the caches for good."""
    c = compiled(model_config("mfa", num_layers=1))
    talk = Conversation(c.model, c.params, GREEDY, KEY, capacity=64)
    first, _ = answer(talk, [1, 2, 3], 8)

    def interrupted(*given: Any, **options: Any) -> Any:
        jax.tree.map(lambda x: x.delete(), given[2] if at == "_extend" else given[2].caches)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(conversation, at, interrupted)
        with pytest.raises(KeyboardInterrupt):
            answer(talk, [1, 2, 3, *first, 4], 8)
    assert talk.held == 0 and answer(talk, [1, 2, 3], 8)[0] == first


@pytest.mark.parametrize(("ids", "options", "message"), [
    ([], {}, "must have at least one token"),
    ([V], {}, rf"ids=\[{V}\]: token ids must be in"),
    ([1] * 60, {}, "capacity=64: must be at least 65: the conversation has 60 tokens"),
    ([1], {"max_new_tokens": 0}, "max_new_tokens=0"),
    ([1], {"chunk": 0}, "chunk=0"),
])
def test_what_cannot_be_answered_is_refused(ids: list[int], options: dict[str, Any], message: str) -> None:
    c = compiled(model_config("mfa", num_layers=1))
    talk = Conversation(c.model, c.params, GREEDY, KEY, capacity=64)
    with pytest.raises(ValueError, match=message):
        talk.reply(ids, **{"max_new_tokens": 5, **options})


# ---- the script ------------------------------------------------------------------------------------------------


def test_a_chat_goes_on_and_a_full_one_stays_as_it_was() -> None:
    c = compiled(model_config("mfa", num_layers=1, vocab_size=264))
    opened = Opened("test", c.model, c.params, chat_tokenizer())
    chat = Chat(ChatConfig(hf="unused", max_new_tokens=8, capacity=160, temperature=0.0, system="Be brief."), opened)
    first = "".join(chat.say("Hi"))
    prompt = render(opened.tokenizer, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    ids = encode_rendered(opened.tokenizer, prompt).tolist()
    sampling = SamplingConfig(temperature=0, vocab_limit=opened.tokenizer.vocab_size)
    whole = generate(c.model, c.params, [ids], [len(ids)], sampling, KEY, max_new_tokens=8, capacity=160,
                     stop_tokens=[opened.tokenizer.eos_id])
    assert first == opened.tokenizer.decode([t for t in np.asarray(whole.tokens)[0].tolist() if t >= 0])
    messages = list(chat._messages)
    assert [m["role"] for m in messages] == ["system", "user", "assistant"] and messages[-1]["content"] == first
    with pytest.raises(ValueError, match="capacity=160: must be at least"):
        list(chat.say("long " * 40))
    assert chat._messages == messages


def test_an_answer_comes_in_pieces_as_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is decoded that was not asked for, and what was is handed out before more is."""
    c = compiled(model_config("mfa", num_layers=1, vocab_size=264))
    limits: list[int] = []
    decode = conversation.decode

    def counting(model: Any, params: Any, state: Any, limit: Any, **options: Any) -> Any:
        limits.append(int(limit))
        return decode(model, params, state, limit, **options)

    monkeypatch.setattr(conversation, "decode", counting)
    chat = Chat(ChatConfig(hf="unused", max_new_tokens=8, capacity=160, temperature=0.0, system="Be brief."),
                Opened("test", c.model, c.params, chat_tokenizer()))
    pieces, told = chat.say("Hi"), []
    for decoded in ([], [5], [5, 8]):
        told.append(next(pieces))
        assert limits == decoded and len(chat._messages) == 1
    assert told[0] + told[1], "the text of the first five tokens, before the rest"
    told += pieces
    assert limits == [5, 8] and chat._messages[-1] == {"role": "assistant", "content": "".join(told)}


class Typed(io.StringIO):
    """Lines of somebody at a terminal."""

    def isatty(self) -> bool:
        return True


def test_the_program_goes_on_after_a_full_cache_and_begins_anew_when_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seeds are those of a conversation: the first answer after `/new` is the first one again."""
    c = compiled(model_config("mfa", num_layers=1, vocab_size=264))
    save_run(tmp_path / "run", c.config, c.params, chat_tokenizer())
    config = ChatConfig(workdir=str(tmp_path / "run"), max_new_tokens=8, capacity=160)
    chat = Chat(config, config.open())
    first, second = ("".join(chat.say(text)) for text in ("Hi", "Again"))
    assert first != second
    for kind, prompt in ((io.StringIO, ""), (Typed, "> ")):
        lines = ["Hi", "", "long " * 40, " Again ", "/new", "Hi"]
        monkeypatch.setattr(sys, "stdin", kind("\n".join(lines)))
        chat_program.main(config)
        told = capsys.readouterr()
        assert told.out == f"{prompt}{first}\n{3 * prompt}{second}\n{2 * prompt}{first}\n{prompt}"
        opened, full = told.err.splitlines()
        assert opened.startswith(f"{tmp_path / 'run'}, step 0: mfa, ")
        assert full.startswith("error: capacity=160: must be at least") and full.endswith(
            "(/new begins another conversation)")


@pytest.mark.parametrize(("options", "message"), [
    ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ({"capacity": 512}, "capacity=512: must be above max_new_tokens=512"),
    ({"top_p": 1.5}, "top_p=1.5"),
])
def test_bad_flags_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatConfig(**options)


def test_one_model_is_opened(tmp_path: Path) -> None:
    """A run or a checkpoint, not both and not neither; what is for one of them is refused for the other."""
    c = compiled(model_config("mfa", num_layers=1, vocab_size=264))
    save_run(tmp_path / "run", c.config, c.params, ByteTokenizer())
    run = str(tmp_path / "run")
    opened = open_model(run, None, dtype="bfloat16")
    assert opened.model.config == dataclasses.replace(c.config, dtype="bfloat16") and opened.name == f"{run}, step 0"
    with pytest.raises(ValueError, match="has no chat template"):
        Chat(ChatConfig(workdir=run), opened)
    for arguments, options, message in (
        ((None, None), {}, "workdir=None: give the folder of a run"), ((run, run), {}, "one of both"),
        ((run, None), {"tokenizer": "x"}, "tokenizer='x': must be left out"),
        ((None, run), {"step": 3}, "step=3: and ema are for the folder of a run"),
    ):
        with pytest.raises(ValueError, match=message):
            open_model(*arguments, **options)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="tokenizer"):
        open_model(None, str(tmp_path / "hf"))


def test_sampling_beyond_the_vocabulary_is_told_before_the_first_message() -> None:
    c = compiled(model_config("mfa", num_layers=1))
    with pytest.raises(ValueError, match=rf"top_k={V + 1}: must be at most {V}, the ids"):
        Conversation(c.model, c.params, SamplingConfig(top_k=V + 1), KEY, capacity=64)
