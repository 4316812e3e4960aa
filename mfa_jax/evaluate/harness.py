"""A model of ours as lm-eval knows models, by the name `mfa_jax`.

    import mfa_jax.evaluate.harness                       # registers the name
    lm_eval.simple_evaluate("mfa_jax", {"workdir": "runs/tiny"}, tasks=["hellaswag"])

lm-eval (Gao et al., https://github.com/EleutherAI/lm-evaluation-harness) is an optional package. What it asks is
answered by `scoring` and `completion`; on a mesh, under `jax.set_mesh`, in each process of a cluster the same.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Sequence
from typing import Any

import jax
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from tqdm import tqdm

from mfa_jax.config import require
from mfa_jax.data import Tokenizer
from mfa_jax.data.chat import chat_template, encode_rendered, render
from mfa_jax.evaluate.completion import complete_until
from mfa_jax.evaluate.scoring import loglikelihoods
from mfa_jax.generate import SamplingConfig
from mfa_jax.model.transformer import Transformer
from mfa_jax.train.run import load_trained

log = logging.getLogger(__name__)
_Pair = tuple[tuple[str, str] | None, list[int], list[int]]
"""Context and continuation as texts, where they are some, and as token ids."""
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@register_model("mfa_jax")
class HarnessModel(TemplateLM):
    """lm-eval's `TemplateLM`: it makes token ids of texts, and of a pair of texts a context and a continuation.

    Contexts that are too long lose their beginning, as everywhere in lm-eval; `truncated` counts the requests.
    """

    def __init__(
        self, model: Transformer, params: Any, tokenizer: Tokenizer, *, max_length: int = 2048,
        batch_tokens: int = 4096, max_gen_toks: int = 256, add_bos_token: bool = False, cache_dtype: str | None = None,
        seed: int = 0,
    ) -> None:
        """Args:
          model: the model that `params` belong to, layers stacked.
          max_length: tokens that the model is asked to read and write at most, in one row.
          batch_tokens: tokens of a batch, padding counted in.
          max_gen_toks: tokens of an answer, where a task does not say.
          add_bos_token: begin every context with the begin token.
          cache_dtype: of the cached arrays in generation; None for the model's compute type.
          seed: of tasks that sample.

        Raises:
          ValueError: no begin token where one is asked for, a tokenizer larger than the vocabulary.
        """
        super().__init__()
        require(max_length >= 2, "max_length", max_length, "must be at least 2")
        require(max_gen_toks >= 1, "max_gen_toks", max_gen_toks, "must be at least 1")
        require(not add_bos_token or tokenizer.bos_id is not None, "add_bos_token", add_bos_token,
                "the tokenizer has no begin token")
        require(tokenizer.vocab_size <= model.config.vocab_size, "tokenizer.vocab_size", tokenizer.vocab_size,
                f"must be at most the model's vocab_size={model.config.vocab_size}")
        self.model, self.params, self.tokens = model, params, tokenizer
        self.max_length, self.max_gen_toks, self.add_bos_token = max_length, max_gen_toks, add_bos_token
        self.batch_tokens, self.cache_dtype, self.seed = batch_tokens, cache_dtype, seed
        self.truncated = 0

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> HarnessModel:
        """From `workdir`, optionally `step` and `ema`, and the options above; lm-eval's `device` and batch sizes do not
        apply. Contexts begin with the begin token where the run's rows did, unless an option says otherwise.

        Raises:
          ValueError: no workdir, or an option that is none of these.
        """
        options = dict(arg_dict)
        keywords = [name for name, each in inspect.signature(cls).parameters.items() if each.kind is each.KEYWORD_ONLY]
        require("workdir" in options, "model_args", sorted(options), "must hold workdir, the folder of a run")
        for name in ("batch_size", "max_batch_size", "device"):
            require((additional_config or {}).get(name) is None, name, (additional_config or {}).get(name),
                    "does not apply: batch_tokens sizes the batches, JAX_PLATFORMS names the device")
        accepted = ["workdir", "step", "ema", *keywords]
        unknown = sorted(set(options) - set(accepted))
        require(not unknown, "model_args", unknown, f"must be among {', '.join(accepted)}")
        trained = load_trained(options.pop("workdir"), step=options.pop("step", None), ema=options.pop("ema", False))
        options.setdefault("add_bos_token", trained.config.data.add_bos_token)
        return cls(trained.model, trained.params, trained.tokenizer, **options)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> HarnessModel:
        """As `create_from_arg_obj`, from `workdir=runs/x,add_bos_token=True`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    # ---- texts and tokens --------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.tokens.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is: the begin token, or else the end token."""
        return self.tokens.eos_id if self.tokens.bos_id is None else self.tokens.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokens.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """What spells a special token is that token, as lm-eval has it: chat templates do."""
        ids = encode_rendered(self.tokens, string).tolist()
        wanted = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if wanted and self.tokens.bos_id is not None and ids[:1] != [self.tokens.bos_id]:
            return [self.tokens.bos_id, *ids]
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return render(self.tokens, chat_history, add_generation_prompt=add_generation_prompt,
                      continue_last=not add_generation_prompt)

    def chat_template(self, chat_template_name: bool | str = False) -> str | None:
        require(isinstance(chat_template_name, bool), "chat_template", chat_template_name,
                "must be true: the tokenizer has one template, without a name")
        return chat_template(self.tokens) if chat_template_name else None

    # ---- what is asked -----------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[_Pair], disable_tqdm: bool = False, **unused: Any
    ) -> list[tuple[float, bool]]:
        pairs = [self._fitting(context, continuation) for _, context, continuation in requests]
        with tqdm(total=len(pairs), desc="log-likelihoods", disable=_quiet(disable_tqdm)) as bar:
            scores = loglikelihoods(self.model, self.params, pairs, batch_tokens=self.batch_tokens, on_done=bar.update)
        answers = [(score.logprob, score.greedy) for score in scores]
        for (texts, _context, _continuation), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _fitting(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """The end of the context that fits before the continuation, whose last token is not read.

        A context of blanks alone is empty here: lm-eval moves them to the continuation.
        """
        context = context or [self.prefix_token_id]
        room = self.max_length + 1 - len(continuation)
        require(room >= 1, "max_length", self.max_length, f"must be at least {len(continuation)}, the tokens of a "
                                                          f"continuation")
        return self._shortened(context, room), continuation

    def _shortened(self, context: list[int], room: int) -> list[int]:
        if len(context) > room:
            self.truncated += 1
            if self.truncated == 1:
                log.warning("a context of %d tokens loses its beginning: max_length=%d", len(context), self.max_length)
        return context[-room:]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, each token once: windows of `max_length` with as much context as they hold."""
        windows: list[_Pair] = []
        ends = []
        for (text,) in (request.args for request in requests):
            pairs = get_rolling_token_windows(self.tok_encode(text, add_special_tokens=False), self.prefix_token_id,
                                              self.max_length, context_len=1)
            windows.extend((None, *make_disjoint_window(pair)) for pair in pairs)
            ends.append(len(windows))
        scores = [logprob for logprob, _ in self._loglikelihood_tokens(windows, disable_tqdm)]
        totals = [sum(scores[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Requests that are generated in the same way share batches."""
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        with tqdm(total=len(requests), desc="generated", disable=_quiet(disable_tqdm)) as bar:
            for how, members in groups.items():
                sampling, until, most = self._generation(json.loads(how))
                room = self.max_length - most
                require(room >= 1, "max_gen_toks", most, f"must be below max_length={self.max_length}")
                prompts = [self._prompt(requests[i].args[0], room) for i in members]
                found = complete_until(
                    self.model, self.params, self.tokens, prompts, until, sampling, jax.random.key(self.seed),
                    max_new_tokens=most, batch_tokens=self.batch_tokens, cache_dtype=self.cache_dtype,
                    on_done=bar.update)
                for i, text in zip(members, found, strict=True):
                    texts[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return texts

    def _prompt(self, text: str, room: int) -> list[int]:
        return self._shortened(self.tok_encode(text) or [self.prefix_token_id], room)

    def _generation(self, options: dict[str, Any]) -> tuple[SamplingConfig, Sequence[str], int]:
        """How a task wants its texts: sampling, stop strings, tokens at most."""
        given = normalize_gen_kwargs(options, self.max_gen_toks)
        until, most, sampled = given.pop("until"), given.pop("max_gen_toks"), given.pop("do_sample")
        unknown = sorted(set(given) - set(_SAMPLING))
        require(not unknown, "generation_kwargs", unknown, f"must be among until, max_gen_toks, do_sample, "
                                                           f"{', '.join(_SAMPLING)}")
        if not sampled:
            given["temperature"] = 0.0
        limit = {"vocab_limit": self.tokens.vocab_size}
        return SamplingConfig(**given, **limit), [stop for stop in until if stop], most


def _quiet(disable: bool) -> bool:
    """Whether to draw no bar: one process does for all."""
    return disable or jax.process_index() > 0
