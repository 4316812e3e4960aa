"""Evaluate a run or a checkpoint on the tasks of lm-eval, its own and ours.

    python -m experiments.evaluate --workdir runs/tiny --tasks local_hellaswag,local_piqa --local-data DIR
    python -m experiments.evaluate --hf DIR --tasks local_mmlu --local-data DIR --limit 100 --output mmlu.json
    python -m experiments.evaluate --hf DIR --tasks hellaswag,winogrande        # lm-eval's own, from the network
    python -m experiments.evaluate --hf DIR --tasks niah_single_1,ruler_vt --max-length 4096    # RULER, see below

Tasks whose names begin with `local_` (`mfa_jax/evaluate/tasks`) read files in the folder of `--local-data`, and no
network. Log-likelihoods are computed in batches by length, texts are written through the cache and its decode kernel.
Needs the extra: pip install "mfa_jax[evaluate]".

Of RULER (Hsieh et al., arXiv 2404.06654), as lm-eval has it, `niah_single_1`, `niah_multikey_2`, `niah_multikey_3`,
`ruler_vt`, `ruler_cwe` and `ruler_fwe` are made on the spot, with the model's own tokenizer; the other needles lie in
essays that are fetched, `ruler_qa_squad` and `ruler_qa_hotpot` in articles. All need the extra `mfa_jax[ruler]`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import importlib.util
import json
import logging
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import cli
from experiments.opening import ONE_DEVICE, DecodingConfig, Opened, decode_kernel, joined_mesh
from mfa_jax.config import MeshConfig, require
from mfa_jax.convert.tokenizer import save_tokenizer
from mfa_jax.data.sentencepiece import SentencePieceTokenizer
from mfa_jax.evaluate import TASKS
from mfa_jax.model.transformer import Transformer
from mfa_jax.train import cluster, processes

RULER_LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
"""Those that RULER's tasks have a metric of."""
RULER_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""What fills RULER's contexts."""
BOOTSTRAP = 1000
"""Resamples that standard errors are estimated from; in this process, since JAX does not survive a fork."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(DecodingConfig):
    """What is evaluated, and on which tasks."""

    tasks: str
    """Names of lm-eval's tasks and groups and of ours, separated by commas."""
    local_data: str | None = None
    """Folder of the files of the local_ tasks, at any depth."""
    limit: int | None = None
    """Only the first so many items of each task; none for all."""
    num_fewshot: int | None = None
    """Examples before each item; none for what the task says. The local_ tasks keep theirs."""
    apply_chat_template: bool = False
    """Write requests as conversations, with the template of the tokenizer."""
    system_instruction: str | None = None
    """What the system says in such a conversation."""
    max_length: int = 2048
    """Tokens of a row at most, the answer included; longer contexts lose their beginning."""
    max_gen_toks: int = 256
    """Tokens of an answer, where a task does not say."""
    batch_tokens: int = 4096
    """Tokens of a batch, padding counted in."""
    max_seq_lengths: tuple[int, ...] = ()
    """Lengths of the contexts that RULER's tasks make, in tokens, the answer included; none for 4096."""
    add_bos_token: bool = False
    """Begin every context with the begin token, which some models were trained to see; of a run that was trained or
    converted with it, always."""
    output: str | None = None
    """File that the results are written to, as JSON; must not exist yet."""
    log_samples: bool = False
    """Write every item with what the model said of it there, too."""
    confirm_run_unsafe_code: bool = False
    """Run code that the model writes, where a task is judged by it; in processes of their own, but in no sandbox."""
    mesh: MeshConfig = dataclasses.field(default_factory=lambda: ONE_DEVICE)
    """How batches and parameters lie on the devices."""
    seed: int = 0
    """Of tasks that sample."""

    def __post_init__(self) -> None:
        require(bool(self.task_names), "tasks", self.tasks, "must name a task")
        require(self.limit is None or self.limit >= 1, "limit", self.limit, "must be at least 1")
        require(self.num_fewshot is None or self.num_fewshot >= 0, "num_fewshot", self.num_fewshot,
                "must not be negative")
        require(self.batch_tokens >= 1, "batch_tokens", self.batch_tokens, "must be at least 1")
        require(self.system_instruction is None or self.apply_chat_template, "system_instruction",
                self.system_instruction, "needs --apply-chat-template")
        for length in self.max_seq_lengths:
            require(length in RULER_LENGTHS, "max_seq_lengths", length,
                    f"must be among {', '.join(map(str, RULER_LENGTHS))}")
        longest = max(self.max_seq_lengths or RULER_LENGTHS[:1])
        ruler = any(map(_is_ruler, self.task_names))
        require(ruler or not self.max_seq_lengths, "max_seq_lengths", list(self.max_seq_lengths),
                "is for RULER's tasks alone")
        require(not ruler or self.max_length >= longest, "max_length", self.max_length,
                f"must be at least {longest}, or RULER's contexts lose their beginning")
        require_new(self.output)
        require(not self.log_samples or self.output is not None, "log_samples", True, "needs --output")
        require(self.local_data is not None or not any(map(_is_local, self.task_names)), "local_data", None,
                "must name the folder of the local_ tasks' files")

    @property
    def task_names(self) -> list[str]:
        return [name.strip() for name in self.tasks.split(",") if name.strip()]


def require_new(output: str | None) -> None:
    """Refuses a file that can't be written, before anything is computed."""
    if output is not None:
        require(not Path(output).exists(), "output", output, "must not exist yet")
        require(Path(output).parent.is_dir(), "output", output, "must lie in a folder that exists")


def _is_local(task: str) -> bool:
    return task.startswith("local_")


def _is_ruler(task: str) -> bool:
    return task.startswith(("ruler", "niah_")) or task == "longcxt"


@contextlib.contextmanager
def _metadata(config: EvaluateConfig) -> Iterator[dict[str, Any]]:
    """What tasks are told; RULER's measure their contexts with the model's tokenizer, in a folder as others read it.

    Raises:
      ValueError: RULER's packages are not installed, or a tokenizer that they can't read.
    """
    found: dict[str, Any] = {"local_data": config.local_data}
    if not any(map(_is_ruler, config.task_names)):
        yield found
        return
    missing = [name for name in ("nltk", "transformers", "wonderwords") if importlib.util.find_spec(name) is None]
    require(not missing, "tasks", config.tasks, f'RULER needs {", ".join(missing)}: pip install "mfa_jax[ruler]"')
    tokenizer = config.open_tokenizer()
    require(not isinstance(tokenizer, SentencePieceTokenizer), "tokenizer", type(tokenizer).__name__,
            "RULER's tasks need a tokenizer.json")
    count = len(tokenizer.encode(RULER_NOISE))
    # Where their shortest examples do not fit, lm-eval 0.4.13 looks for shorter ones without end.
    require(count <= 30 or all(name.startswith("niah_") for name in config.task_names), "tokenizer",
            type(tokenizer).__name__, f"makes {count} tokens of {RULER_NOISE!r}, more than 30, too many for ruler_")
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(Path(folder), tokenizer, config.max_length)
        yield found | {"tokenizer": folder, "max_seq_lengths": list(config.max_seq_lengths or RULER_LENGTHS[:1])}


def load_tasks(config: EvaluateConfig) -> tuple[Any, list[Any]]:
    """lm-eval's manager of tasks, and the tasks that were named, with their items.

    Raises:
      ValueError: lm-eval is not installed, an unknown task, files or packages that are missing or can't be fetched, a
        task that runs code where that was not confirmed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError('lm-eval is not installed; pip install "mfa_jax[evaluate]"')
    from lm_eval.tasks import TaskManager

    os.environ["DISABLE_MULTIPROC"] = "1"  # lm-eval's switch: it would fork to resample
    # It warns of every default that a task file leaves as it is.
    logging.getLogger("lm_eval.api.task").setLevel(logging.ERROR)
    ours = [path.stem for path in TASKS.glob("*.yaml")]
    with _metadata(config) as metadata:
        # Not the thousands of lm-eval's own files where none of them is asked for.
        manager = TaskManager(include_path=str(TASKS), include_defaults=not set(config.task_names) <= set(ours),
                              metadata=metadata)
        for name in config.task_names:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3) or sorted(ours)
            require(name in manager.all_tasks, "tasks", name, f"there is no such task; such as {', '.join(close)}")
        _seed()
        try:
            loaded = manager.load(config.task_names)
        except (OSError, ImportError) as error:  # no network, or a package that these tasks need
            raise ValueError(f"tasks={config.tasks!r}: cannot be loaded ({error})") from error
    inside = {child for children in loaded["group_map"].values() for child in children}
    named = {**loaded["groups"], **loaded["tasks"]}
    unsafe = sorted(name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False))
    require(not unsafe or config.confirm_run_unsafe_code, "tasks", unsafe,
            "run code that the model writes; --confirm-run-unsafe-code says that you want it")
    return manager, [task for name, task in named.items() if name not in inside]


def evaluate(
    config: EvaluateConfig, opened: Opened, manager: Any, tasks: list[Any], log_samples: bool
) -> dict[str, Any]:
    """lm-eval's results, and under `mfa_jax` what was evaluated, and how."""
    import lm_eval

    from mfa_jax.evaluate.harness import HarnessModel

    start = time.monotonic()
    model, kernel = decode_kernel(opened.model.config, config.implementation, config.max_length, config.cache_dtype)
    begins = config.add_bos_token or opened.add_bos_token
    harness = HarnessModel(
        Transformer(model), opened.params, opened.tokenizer, max_length=config.max_length,
        batch_tokens=config.batch_tokens, max_gen_toks=config.max_gen_toks, add_bos_token=begins,
        cache_dtype=config.cache_dtype, seed=config.seed)
    found = lm_eval.simple_evaluate(
        harness, tasks=tasks, task_manager=manager, limit=config.limit, num_fewshot=config.num_fewshot,
        apply_chat_template=config.apply_chat_template, system_instruction=config.system_instruction,
        log_samples=log_samples, bootstrap_iters=BOOTSTRAP, confirm_run_unsafe_code=config.confirm_run_unsafe_code)
    found["mfa_jax"] = {
        "model": opened.name, "attention": model.attention.variant, "dtype": model.dtype, "decode_attention": kernel,
        "add_bos_token": begins, "platform": jax.devices()[0].platform, "mesh": dict(jax.sharding.get_mesh().shape),
        "truncated_requests": harness.truncated, "seconds": round(time.monotonic() - start, 1)}
    return dict(found)


def main(config: EvaluateConfig) -> None:
    with joined_mesh(config.mesh) as mesh:
        # Tasks first: what is missing is told before a large model is read.
        manager, tasks = load_tasks(config)
        if jax.process_count() > 1:
            _require_same(config, tasks)
        opened = config.open(mesh)
        found = evaluate(config, opened, manager, tasks, config.log_samples)
        if jax.process_index() == 0:
            write(found, config.output)
            print(json.dumps(found["mfa_jax"]), file=sys.stderr)


def _seed() -> None:
    """Before tasks are made: some (RULER's, those that mix the order of answers) draw from the global generators, which
    lm-eval seeds so, but only when it loads tasks itself."""
    random.seed(0)
    np.random.seed(1234)


def _require_same(config: EvaluateConfig, tasks: list[Any]) -> None:
    """Refuses processes of other settings or other items: all of them run the same programs, one after the other."""
    from lm_eval.api.group import Group

    # Where things lie may differ from host to host.
    settings = {name: value for name, value in dataclasses.asdict(config).items()
                if name not in ("hf", "local_data", "output", "workdir")}
    processes.require_same("settings", json.dumps(settings))
    _seed()
    single = [leaf for task in tasks for leaf in (task.get_all_tasks() if isinstance(task, Group) else [task])]
    processes.require_same("tasks", json.dumps([[task.config.task, _digest(task)] for task in single]))


def _digest(task: Any) -> str:
    """Of its items."""
    return hashlib.sha256("\n".join(map(repr, task.eval_docs)).encode()).hexdigest()


def write(found: dict[str, Any], output: str | None) -> None:
    """The table of results on the terminal, and all of it in a file that appears when it is complete."""
    from lm_eval.utils import handle_non_serializable, make_table

    print(make_table(found))
    if found.get("groups"):
        print(make_table(found, "groups"))
    if output is not None:
        partial = Path(output).with_name(f"{Path(output).name}.partial")
        partial.write_text(json.dumps(found, indent=1, default=handle_non_serializable, ensure_ascii=False) + "\n")
        partial.rename(output)


if __name__ == "__main__":
    with cluster.leaving_at_once():
        cli.run(lambda: main(cli.parse(EvaluateConfig)), label=cluster.label)
