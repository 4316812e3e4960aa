"""What lm-eval asks of the adapter and of our task files, answered without a network."""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import importlib.util
import json
import lzma
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'mfa_jax[evaluate]'")

from experiments import evaluate
from experiments.evaluate import EvaluateConfig, load_tasks, main
from mfa_jax.config import ModelConfig
from mfa_jax.convert import save_run
from mfa_jax.data import ByteTokenizer, HuggingFaceTokenizer
from mfa_jax.evaluate import TASKS, complete_until, loglikelihoods
from mfa_jax.evaluate.harness import HarnessModel
from mfa_jax.generate import SamplingConfig
from tests.contract import compiled, model_config
from tests.test_chat import CHATML, chat_tokenizer

ROOT = Path(__file__).resolve().parent.parent

C = compiled(model_config("mfa", vocab_size=264))
TOKENIZER = ByteTokenizer()

FILES: dict[str, list[dict[str, Any]]] = {
    "hellaswag_val.jsonl.xz": [{"query": f"A man {i}", "choices": ["sat.", "stood up."], "gold": i % 2}
                               for i in range(3)],
    "winogrande_val.jsonl.xz": [{"context_options": ["Ann saw Bob so Ann", "Ann saw Bob so Bob"],
                                 "continuation": "waved.", "gold": 1}],
    "mmlu_dev.jsonl.xz": [{"subject": s, "question": f"{s} {i}?", "choices": list("wxyz"), "answer": i % 4}
                          for s in ("law", "art_history") for i in range(6)],
    "mmlu_test.jsonl.xz": [{"subject": s, "question": f"asked {s} {i}?", "choices": list("wxyz"), "answer": 3}
                           for s in ("law", "art_history") for i in range(2)],
    "bbh.jsonl.xz": [{"task": t, "input": f"{t} {i}", "target": f"({i})"} for t in ("a", "b") for i in range(4)],
    "math_test.jsonl.xz": [{"context": f"{i}?", "answer": "\\frac{1}{2}", "chain_of_thought": "\\boxed{\\frac12}",
                            "category": "algebra"} for i in range(5)],
}
WIKITEXT = (" \n = One = \n \n Text . \n \n = = Part = = \n \n more : \n = 1 + 1 = \n an equation \n"
            " \n = Two = \n \n Other text . \n")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Evaluation files of a few rows, in a folder of the folder."""
    folder = tmp_path / "data" / "eval"
    folder.mkdir(parents=True)
    for name, rows in FILES.items():
        with lzma.open(folder / name, "wt") as file:
            file.write("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "wikitext2-test.txt.bz2").write_bytes(bz2.compress(WIKITEXT.encode()))
    return tmp_path / "data"


def adapter(**options: Any) -> HarnessModel:
    return HarnessModel(C.model, C.params, TOKENIZER, batch_tokens=256, **options)


def ask(*args: Any) -> Any:
    return SimpleNamespace(args=args)


def tasks_of(names: str, data: Path) -> dict[str, Any]:
    _, tasks = load_tasks(EvaluateConfig(tasks=names, workdir="unused", local_data=str(data)))
    return {task.config.task: task for task in tasks}


# ---- the adapter -----------------------------------------------------------------------------------------------


def test_pairs_of_texts() -> None:
    """A blank that ends a context belongs to the continuation; no context is the begin token."""
    pairs = [("The ", "cat"), ("The", " cat"), ("", "cat")]
    found = adapter().loglikelihood([ask(*pair) for pair in pairs], disable_tqdm=True)
    assert found[0] == found[1]
    expected = loglikelihoods(C.model, C.params, [
        (list(b"The"), list(b" cat")), ([TOKENIZER.bos_id], list(b"cat"))])
    np.testing.assert_allclose([found[0][0], found[2][0]], [score.logprob for score in expected], atol=1e-5)


def test_a_context_of_blanks_is_an_empty_one() -> None:
    """lm-eval moves the blanks that end a context to what follows: here nothing is left."""
    found = adapter().loglikelihood([ask("\n", "b"), ask("", "\nb")], disable_tqdm=True)
    assert found[0] == found[1]


def test_a_long_context_loses_its_beginning() -> None:
    harness = adapter(max_length=6)
    cut, short = harness.loglikelihood([ask("abcdefgh", "xy"), ask("defgh", "xy")], disable_tqdm=True)
    assert cut == short and harness.truncated == 1
    with pytest.raises(ValueError, match="max_length=6: must be at least 7"):
        harness.loglikelihood([ask("a", "1234567")], disable_tqdm=True)


def test_rolling_windows_say_each_token_once() -> None:
    """Windows of 4 over 10 tokens, by hand: the last one has a full context and two tokens to say."""
    ids = list(b"0123456789")
    windows = [([TOKENIZER.bos_id], ids[:4]), (ids[3:4], ids[4:8]), (ids[5:8], ids[8:])]
    expected = sum(score.logprob for score in loglikelihoods(C.model, C.params, windows))
    found = adapter(max_length=4).loglikelihood_rolling([ask("0123456789"), ask("01")], disable_tqdm=True)
    np.testing.assert_allclose(found[0], expected, atol=1e-5)
    one = loglikelihoods(C.model, C.params, [([TOKENIZER.bos_id], ids[:2])])[0].logprob
    np.testing.assert_allclose(found[1], one, atol=1e-5)


def test_generation_does_what_each_task_says() -> None:
    """Stop strings and lengths of each request, in the order of the requests."""
    prompts = ["once", "twice", "a"]
    whole = complete_until(C.model, C.params, TOKENIZER, [list(p.encode()) for p in prompts], [],
                           SamplingConfig(temperature=0), jax.random.key(0), max_new_tokens=16)
    stop = whole[2][3:5]
    requests = [ask("once", {"until": [], "max_gen_toks": 16}), ask("twice", {"max_gen_toks": 5}),
                ask("a", {"until": stop, "max_gen_toks": 16, "do_sample": False})]
    found = adapter().generate_until(requests, disable_tqdm=True)
    assert found[0] == whole[0] and found[2] == whole[2][: whole[2].find(stop)]
    assert whole[1].startswith(found[1].rstrip("\ufffd"))
    with pytest.raises(ValueError, match=r"generation_kwargs=\['num_beams'\]: must be among until"):
        adapter().generate_until([ask("a", {"num_beams": 2})], disable_tqdm=True)
    with pytest.raises(ValueError, match="max_gen_toks=8: must be below max_length=8"):
        adapter(max_length=8).generate_until([ask("a", {"max_gen_toks": 8})], disable_tqdm=True)


def test_equal_prompts_get_texts_of_their_own() -> None:
    """Tasks that vote among samples repeat a prompt; a batch holds few of them."""
    prompts = [list(b"once")] * 6
    found = [complete_until(C.model, C.params, TOKENIZER, prompts, [], SamplingConfig(), jax.random.key(1),
                            max_new_tokens=12, batch_tokens=size) for size in (64, 256)]
    assert len(set(found[0])) == 6 and found[0] == found[1]


class Spelling(ByteTokenizer):
    """Bytes of which one is a special token."""

    def __init__(self, special: str) -> None:
        self.special = special

    def decode(self, ids: Any) -> str:
        return super().decode(i for i in ids if i != ord(self.special))

    def special_id(self, text: str) -> int | None:
        return ord(text) if text == self.special else None


def test_a_stop_string_may_be_a_special_token() -> None:
    """It leaves no text in which it could be found."""
    def run(tokenizer: ByteTokenizer, until: list[str]) -> str:
        return complete_until(C.model, C.params, tokenizer, [list(b"once")], until, SamplingConfig(), jax.random.key(0),
                              max_new_tokens=48)[0]

    whole = run(TOKENIZER, [])
    special = next(c for c in whole[8:] if c.isascii())
    cut = run(Spelling(special), [special])
    assert cut == whole[: whole.index(special)] and len(cut) >= 1
    assert run(Spelling(special), []) == whole.replace(special, "")


def test_by_name_from_a_run(tmp_path: Path) -> None:
    from lm_eval.api.registry import get_model

    save_run(tmp_path / "run", C.config, C.params, TOKENIZER)
    assert get_model("mfa_jax") is HarnessModel
    harness = HarnessModel.create_from_arg_obj({"workdir": str(tmp_path / "run"), "max_length": 64}, {"device": None})
    spelled = HarnessModel.create_from_arg_string(f"workdir={tmp_path / 'run'},max_length=64")
    assert spelled.max_length == 64 and spelled.tokenizer_name == harness.tokenizer_name
    mine, its = (h.loglikelihood([ask("a", "b")], disable_tqdm=True) for h in (adapter(), harness))
    assert mine == its and harness.max_length == 64 and not harness.add_bos_token
    save_run(tmp_path / "begun", C.config, C.params, TOKENIZER, add_bos_token=True)
    begun = {"workdir": str(tmp_path / "begun")}
    assert HarnessModel.create_from_arg_obj(begun).add_bos_token
    assert not HarnessModel.create_from_arg_obj({**begun, "add_bos_token": False}).add_bos_token
    with pytest.raises(ValueError, match="batch_size=4: does not apply"):
        HarnessModel.create_from_arg_obj({"workdir": "x"}, {"batch_size": 4})
    with pytest.raises(ValueError, match="must hold workdir"):
        HarnessModel.create_from_arg_obj({"pretrained": "x"})
    with pytest.raises(ValueError, match=r"model_args=\['max_len'\]: must be among workdir, step, ema, max_length"):
        HarnessModel.create_from_arg_obj({"workdir": "x", "max_len": 64})


@pytest.mark.parametrize(("options", "message"), [
    ({"max_length": 1}, "max_length=1: must be at least 2"),
    ({"max_gen_toks": 0}, "max_gen_toks=0"),
])
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapter(**options)
    small = dataclasses.replace(C.model, config=ModelConfig(vocab_size=100))
    with pytest.raises(ValueError, match="tokenizer.vocab_size=264: must be at most"):
        HarnessModel(small, C.params, TOKENIZER)


def test_a_tokenizer_without_a_template_cannot_chat() -> None:
    with pytest.raises(ValueError, match="tokenizer='ByteTokenizer': has no chat template"):
        adapter().apply_chat_template([{"role": "user", "content": "a"}])


def text_of(*messages: tuple[str, str], answer: str = "") -> str:
    """As ChatML writes it, with the beginning of an answer."""
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in messages) + (
        f"<|im_start|>assistant\n{answer}")


def score_of(tokenizer: HuggingFaceTokenizer, text: str, continuation: str) -> float:
    """By the full forward, with the special tokens put in by hand. The line feed that ends a template is one of the
    blanks that lm-eval moves to what follows, and is scored with it."""
    ids: list[int] = []
    for part in re.split(r"(<\|im_(?:start|end)\|>)", text.rstrip()):
        special = tokenizer.special_id(part)
        ids += tokenizer.encode(part).tolist() if special is None else [special]
    said = tokenizer.encode(text[len(text.rstrip()) :] + continuation).tolist()
    row = np.zeros((1, 128), np.int32)
    row[0, : len(ids) + len(said)] = ids + said
    logprobs = jax.nn.log_softmax(C.full(C.params, row)[0])
    return float(sum(logprobs[len(ids) + i - 1, token] for i, token in enumerate(said)))


def test_conversations_are_scored_as_the_template_writes_them() -> None:
    tokenizer = chat_tokenizer()
    harness = HarnessModel(C.model, C.params, tokenizer, batch_tokens=256)
    asked, begun = [("system", "Be brief."), ("user", "Hi")], ("assistant", "Yes, ")
    messages = [{"role": role, "content": content} for role, content in (*asked, begun)]
    text, opened = harness.apply_chat_template(messages[:2]), harness.apply_chat_template(messages, False)
    assert text == text_of(*asked) and opened == text_of(*asked, answer="Yes, ")
    assert harness.chat_template(True) == CHATML and harness.chat_template(False) is None
    found = harness.loglikelihood([ask(text, "Yes?"), ask(opened, "no")], disable_tqdm=True)
    expected = [score_of(tokenizer, text, "Yes?"), score_of(tokenizer, opened, "no")]
    np.testing.assert_allclose([score for score, _ in found], expected, atol=1e-5)


# ---- the task files --------------------------------------------------------------------------------------------


def test_every_task_file_has_a_task_of_its_name() -> None:
    names = [path.stem for path in TASKS.glob("*.yaml")]
    assert len(names) == 13
    for path in TASKS.glob("*.yaml"):
        assert f"task: {path.stem}\n" in path.read_text()


def test_prompts(files: Path) -> None:
    """MMLU shows five examples of the subject and turns through the subjects; BBH and MATH never ask what they show."""
    tasks = tasks_of("local_mmlu,local_bbh,local_math,local_winogrande,local_wikitext2", files)
    mmlu = list(tasks["local_mmlu"].eval_docs)
    assert [doc["subject"] for doc in mmlu] == ["law", "art_history"] * 2
    prompt = tasks["local_mmlu"].doc_to_text(mmlu[1])
    assert prompt.startswith("The following are multiple choice questions (with answers) about art history.\n\n")
    assert prompt.count("Answer:") == 6 and "art_history 5?" not in prompt and prompt.endswith(
        "asked art_history 0?\nA. w\nB. x\nC. y\nD. z\nAnswer:")
    bbh = list(tasks["local_bbh"].eval_docs)
    assert [doc["input"] for doc in bbh] == ["a 3", "b 3"]
    assert tasks["local_bbh"].doc_to_text(bbh[0]) == "Q: a 0\nA: (0)\n\nQ: a 1\nA: (1)\n\nQ: a 2\nA: (2)\n\nQ: a 3\nA:"
    math = tasks["local_math"]
    (doc,) = math.eval_docs
    assert doc["context"] == "4?"
    assert math.process_results(doc, ["so $\\boxed{\\frac12}$"]) == {"exact_match": 1}
    assert math.process_results(doc, ["so $\\boxed{2}$"]) == math.process_results(doc, ["2"]) == {"exact_match": 0}
    (doc,) = tasks["local_winogrande"].eval_docs
    assert tasks["local_winogrande"].doc_to_choice(doc) == doc["context_options"]
    pages = [doc["text"] for doc in tasks["local_wikitext2"].eval_docs]
    assert [page.split("\n")[0] for page in pages] == [" = One = ", " = Two = "] and " = = Part" in pages[0]


CONTEXT = '''
import numpy as np

exec_context = """
import numpy as np
a = test_input
[insert]
"""

def test_execution(code):
    for test_input in (np.arange(3), np.ones(2)):
        env = {"test_input": test_input}
        exec(exec_context.replace("[insert]", code), env)
        assert env["result"] == test_input.sum()
'''
NO_LOOPS = """
def test_string(code):
    assert "for" not in code
"""


def ds1000_row(context: str = CONTEXT, library: str = "Numpy") -> dict[str, Any]:
    prompt = "Sum a.\n<code>\nimport numpy as np\n</code>\nresult = ... # put it here\nBEGIN SOLUTION\n<code>\n"
    return {"prompt": prompt, "reference_code": "result = a.sum()", "code_context": context,
            "metadata": {"library": library, "problem_id": 0}}


def write_ds1000(folder: Path, *problems: dict[str, Any]) -> None:
    with gzip.open(folder / "ds1000.jsonl.gz", "wt") as file:
        file.write("".join(f"{json.dumps(row)}\n" for row in problems))


def test_code_is_run_only_where_that_is_asked_for(tmp_path: Path) -> None:
    write_ds1000(tmp_path, ds1000_row(), ds1000_row(CONTEXT + NO_LOOPS))
    given: dict[str, Any] = {"tasks": "local_ds1000", "workdir": "unused", "local_data": str(tmp_path)}
    with pytest.raises(ValueError, match=r"tasks=\['local_ds1000'\]: run code that .* --confirm-run-unsafe-code"):
        load_tasks(EvaluateConfig(**given))
    _, (task,) = load_tasks(EvaluateConfig(**given, confirm_run_unsafe_code=True))
    plain, strict = task.eval_docs
    assert task.doc_to_text(plain) == plain["prompt"]
    loop = "result = 0\nfor x in a:\n    result += x\n"
    for answer, expected in (
        (plain["reference_code"], (1, 1)), (f"{plain['reference_code']}\n</code>\nEND SOLUTION", (1, 1)),
        ("```python\nresult = np.sum(a)\n```\nIt sums.", (1, 1)), (loop, (1, 0)), ("result = 3", (0, 0)),
        ("result =", (0, 0)), ("", (0, 0)), ("import sys; sys.exit(0)", (0, 0)),
    ):
        assert tuple(task.process_results(doc, [answer])["pass@1"] for doc in (plain, strict)) == expected, answer


def test_code_that_does_not_end_is_ended(tmp_path: Path) -> None:
    """With what it started, and without what it wrote."""
    from mfa_jax.evaluate.tasks import ds1000

    mark = tmp_path / "mark"
    code = (f"import subprocess, time\nopen('here', 'w')\nsubprocess.Popen(['sh', '-c', 'sleep 3; touch {mark}'])\n"
            f"time.sleep(60)")
    start = time.monotonic()
    assert not ds1000.passes("def test_execution(code):\n    exec(code)", code, seconds=1)
    assert time.monotonic() - start < 30 and not Path("here").exists()
    time.sleep(3.5)
    assert not mark.exists()


def test_a_library_that_is_missing_is_named(tmp_path: Path) -> None:
    write_ds1000(tmp_path, ds1000_row(), ds1000_row(library="NoSuchLibrary"))
    with pytest.raises(ValueError, match=r"library=\['NoSuchLibrary'\]: must be installed"):
        load_tasks(EvaluateConfig(tasks="local_ds1000", local_data=str(tmp_path), confirm_run_unsafe_code=True))


def test_programs_find_libraries_where_we_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mfa_jax.evaluate.tasks import ds1000

    (tmp_path / "only_here.py").write_text("")
    context = "def test_execution(code):\n    exec(code)"
    assert not ds1000.passes(context, "import only_here")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert ds1000.passes(context, "import only_here")


@pytest.mark.parametrize(("name", "content", "message"), [
    ("hellaswag_val.jsonl.xz", None, "holds no hellaswag_val.jsonl.xz"),
    ("hellaswag_val.jsonl.xz", '{"query": "a", "choices": []}\n', "hellaswag_val.jsonl.xz:1.*lacks gold"),
    ("hellaswag_val.jsonl.xz", '{"query": "a"', "line 1 cannot be read"),
    ("hellaswag_val.jsonl.xz", "7\n", "hellaswag_val.jsonl.xz:1.*must be an object"),
    ("hellaswag_val.jsonl.xz", "", "has no rows"),
])
def test_files_that_cannot_be_read(files: Path, name: str, content: str | None, message: str) -> None:
    path = files / "eval" / name
    path.unlink()
    if content is not None:
        path.write_bytes(lzma.compress(content.encode()))
    with pytest.raises(ValueError, match=message):
        tasks_of("local_hellaswag", files)


@pytest.mark.parametrize(("changes", "message"), [
    ({"tasks": ""}, "tasks='': must name a task"),
    ({"local_data": None}, "local_data=None: must name the folder"),
    ({"limit": 0}, "limit=0"),
    ({"num_fewshot": -1}, "num_fewshot=-1"),
    ({"output": "/nowhere/found.json"}, "output='/nowhere/found.json': must lie in a folder that exists"),
    ({"log_samples": True}, "log_samples=True: needs --output"),
    ({"system_instruction": "x"}, "system_instruction='x': needs --apply-chat-template"),
    ({"max_seq_lengths": (5000,)}, "max_seq_lengths=5000: must be among 4096, 8192, "),
    ({"max_seq_lengths": (4096,)}, r"max_seq_lengths=\[4096\]: is for RULER's tasks alone"),
    ({"tasks": "ruler_vt"}, "max_length=2048: must be at least 4096, or RULER's contexts lose their beginning"),
    ({"tasks": "niah_single_1", "max_seq_lengths": (4096, 8192), "max_length": 4096}, "must be at least 8192"),
])
def test_bad_flags_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluateConfig(**{"tasks": "local_bbh", "local_data": "x", **changes})


def test_an_unknown_task_is_named_with_its_neighbours(files: Path) -> None:
    with pytest.raises(ValueError, match="tasks='local_helaswag': there is no such task; such as local_hellaswag"):
        tasks_of("local_helaswag", files)


def test_tasks_are_made_from_the_seeds_that_lm_eval_sets(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some draw from the global generators as they are made, and some whenever their items are asked for."""
    from lm_eval.tasks import TaskManager

    drawn, load = [], TaskManager.load
    monkeypatch.setattr(TaskManager, "load", lambda self, *given: (
        drawn.append((random.random(), np.random.rand())), load(self, *given))[1])
    tasks_of("local_hellaswag", files), tasks_of("local_hellaswag", files)
    assert drawn == [(random.Random(0).random(), np.random.RandomState(1234).rand())] * 2


def test_processes_must_have_the_same_settings_and_items(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.api.group import Group

    told: dict[str, list[str]] = {"settings": [], "tasks": []}
    monkeypatch.setattr(evaluate.processes, "require_same", lambda what, text: told[what].append(text))
    config = EvaluateConfig(tasks="local_hellaswag,local_bbh", workdir="one", local_data=str(files))
    _, (hellaswag, bbh) = load_tasks(config)
    group = Group("ours")
    group.add(bbh)
    for c in (config, dataclasses.replace(config, workdir="two"), dataclasses.replace(config, limit=2)):
        evaluate._require_same(c, [hellaswag, group])
    same, elsewhere, other = told["settings"]
    assert same == elsewhere != other
    assert [name for name, _ in json.loads(told["tasks"][0])] == ["local_hellaswag", "local_bbh"]
    with lzma.open(files / "eval" / "bbh.jsonl.xz", "wt") as file:
        file.write("".join(f"{json.dumps(row)}\n" for row in FILES["bbh.jsonl.xz"][::-1]))
    evaluate._require_same(config, load_tasks(config)[1])
    assert told["tasks"][0] == told["tasks"][2] != told["tasks"][3]


def test_packages_of_ruler_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wonderwords" else find(name))
    with pytest.raises(ValueError, match=r'RULER needs .*wonderwords: pip install "mfa_jax\[ruler\]"'):
        load_tasks(EvaluateConfig(tasks="ruler_vt", workdir="x", max_length=4096))


def test_ruler_refuses_what_it_would_not_end_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())
    save_run(tmp_path / "run", C.config, C.params, TOKENIZER)
    with pytest.raises(ValueError, match="tokenizer='ByteTokenizer': makes 89 tokens of 'The grass"):
        load_tasks(EvaluateConfig(tasks="niah_single_1,ruler_vt", workdir=str(tmp_path / "run"), max_length=4096))


@pytest.mark.slow
def test_ruler_measures_its_contexts_with_the_models_tokenizer(tmp_path: Path) -> None:
    for name in ("nltk", "transformers", "wonderwords"):
        pytest.importorskip(name, reason="RULER's tasks need it: pip install 'mfa_jax[ruler]'")
    save_run(tmp_path / "run", C.config, C.params, TOKENIZER)
    config = EvaluateConfig(tasks="niah_single_1", workdir=str(tmp_path / "run"), max_length=4096)
    _, (task,) = load_tasks(config)
    doc = next(iter(task.eval_docs))
    assert doc["length"] == len(TOKENIZER.encode(doc["input"])) + 128 <= 4096 and doc["outputs"][0] in doc["input"]
    assert task.process_results(doc, [f"It is {doc['outputs'][0]}."])["4096"] == 1


@pytest.mark.slow
def test_what_must_be_fetched_is_refused_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*args: Any, **options: Any) -> None:
        raise ConnectionError("Couldn't reach 'emozilla/pg19-test' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match="tasks='pg19': cannot be loaded .*emozilla/pg19-test"):
        load_tasks(EvaluateConfig(tasks="pg19", workdir="x"))


@pytest.mark.slow
def test_a_run_is_evaluated_to_a_file(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_run(tmp_path / "run", C.config, C.params, TOKENIZER, add_bos_token=True)
    output = tmp_path / "found.json"
    main(EvaluateConfig(tasks="local_hellaswag,local_bbh,local_wikitext2", workdir=str(tmp_path / "run"),
                        local_data=str(files), output=str(output), log_samples=True, max_gen_toks=8))
    found = json.loads(output.read_text())
    samples = found["samples"]["local_hellaswag"]
    assert len(samples) == 3
    right = [max(range(2), key=lambda i: float(s["resps"][i][0][0])) == s["doc"]["gold"] for s in samples]
    assert found["results"]["local_hellaswag"]["acc,none"] == np.mean(right)
    assert found["mfa_jax"]["attention"] == "mfa" and found["mfa_jax"]["decode_attention"] == "xla"
    assert found["mfa_jax"]["add_bos_token"]
    assert "local_wikitext2" in capsys.readouterr().out and not list(tmp_path.glob("*.partial"))
    with pytest.raises(ValueError, match="must not exist yet"):
        EvaluateConfig(tasks="local_bbh", local_data="x", output=str(output))


@pytest.mark.slow
def test_a_run_is_asked_in_conversations(files: Path, tmp_path: Path) -> None:
    """lm-eval's requests are the template's texts, and their scores those of the texts."""
    tokenizer, output = chat_tokenizer(), tmp_path / "found.json"
    save_run(tmp_path / "run", C.config, C.params, tokenizer)
    main(EvaluateConfig(tasks="local_hellaswag", workdir=str(tmp_path / "run"), local_data=str(files),
                        apply_chat_template=True, system_instruction="Be brief.", output=str(output), log_samples=True))
    found = json.loads(output.read_text())
    samples = found["samples"]["local_hellaswag"]
    assert len(samples) == 3
    for sample in samples:
        text = text_of(("system", "Be brief."), ("user", sample["doc"]["query"]))
        asked = [[text, choice] for choice in sample["doc"]["choices"]]
        assert sample["arguments"] == asked
        np.testing.assert_allclose([float(response[0]) for (response,) in sample["resps"]],
                                   [score_of(tokenizer, *pair) for pair in asked], atol=1e-4)


@pytest.mark.slow
def test_two_processes_find_what_one_does(files: Path, tmp_path: Path) -> None:
    """Log-likelihoods, whole texts and written answers, to a rounding of sums; one of them writes."""
    save_run(tmp_path / "run", C.config, C.params, TOKENIZER)
    common = {"workdir": str(tmp_path / "run"), "local_data": str(files), "max_gen_toks": 8, "log_samples": True,
              "tasks": "local_hellaswag,local_bbh,local_wikitext2"}
    main(EvaluateConfig(**common, output=str(tmp_path / "one.json")))
    flags = [part for name, value in common.items() for part in (
        [f"--{name.replace('_', '-')}"] if value is True else [f"--{name.replace('_', '-')}", str(value)])]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.launch", "--processes", "2", "--devices-per-process", "2", "--", "-m",
         "experiments.evaluate", *flags, "--output", str(tmp_path / "two.json"), "--mesh.fsdp", "2", "--mesh.tensor",
         "2"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert two["mfa_jax"]["mesh"]["tensor"] == 2
    for task, samples in one["samples"].items():
        for mine, theirs in zip(samples, two["samples"][task], strict=True):
            if task == "local_bbh":
                assert mine["resps"] == theirs["resps"]
            else:
                np.testing.assert_allclose(np.float64(np.array(mine["resps"])[..., 0].ravel()),
                                           np.float64(np.array(theirs["resps"])[..., 0].ravel()), rtol=1e-4)
    refused = subprocess.run(
        [sys.executable, "-m", "experiments.launch", "--processes", "2", "--", "-m", "experiments.evaluate", *flags,
         "--no-log-samples"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert refused.returncode == 2 and "mesh='one device': must be one of all 2 devices of the 2" in refused.stderr


@pytest.mark.slow
def test_no_torch_is_needed() -> None:
    code = ("import sys; sys.modules['torch'] = None; import lm_eval, mfa_jax.evaluate.harness; "
            "from lm_eval.tasks import TaskManager")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
