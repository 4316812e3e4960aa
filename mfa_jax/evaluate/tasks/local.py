"""Rows of the evaluation files that lie on this machine, as the tasks beside this page ask for them.

lm-eval calls `rows` and `passages` with what stands in a task's `dataset_kwargs`, and with its metadata, where
`local_data` names the folder of the files (`--local-data` of `experiments.evaluate`, `--metadata` of lm-eval's own
command). Files are looked for in that folder and below it.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
from lm_eval.tasks.hendrycks_math.utils import is_equiv, last_boxed_only_string, remove_boxed

from mfa_jax.config import require
from mfa_jax.data import documents
from mfa_jax.data.sources import DAMAGE, OPENERS

LETTERS = "ABCDEFGHIJ"
# Between blank lines: an equation in an article looks the same.
_BLANK = "\n \n"
_ARTICLE = re.compile(f"(?<={_BLANK}) = [^=\n]+ = {_BLANK}")


# ---- files -----------------------------------------------------------------------------------------------------


def rows(
    file: str, fields: list[str], local_data: str | None = None, group: str | None = None, shots: int = 0,
    shots_file: str | None = None, **_: Any,
) -> dict[str, datasets.Dataset]:
    """The rows of a JSONL file.

    Args:
      file: its name.
      fields: what every row must have.
      local_data: the folder that holds it, at any depth.
      group: a field; the groups take turns, so that the first rows are of all of them.
      shots: so many rows of each group are put into the field `shots` of the others of that group, and not asked.
      shots_file: the file that those rows are the first of; None for `file` itself.

    Raises:
      ValueError: no folder, no such file, a line that is no JSON or lacks a field.
    """
    found = _read(file, local_data, fields)
    if group is not None:
        groups = _by(group, found)
        given = groups if shots_file is None else _by(group, _read(shots_file, local_data, fields))
        for name, members in groups.items():
            examples = given.get(name, [])[:shots]
            require(len(examples) == shots, "shots", shots, f"{group}={name!r} has {len(examples)} rows to show")
            asked = members[shots if shots_file is None else 0:]
            groups[name] = [{**row, "shots": examples} for row in asked]
        found = [row for turn in itertools.zip_longest(*groups.values()) for row in turn if row is not None]
    return {"test": datasets.Dataset.from_list(found)}


def passages(
    file: str, local_data: str | None = None, articles: bool = False, characters: int | None = None, **_: Any
) -> dict[str, datasets.Dataset]:
    """The texts of a file, each in the field `text`.

    Args:
      file: its name.
      local_data: the folder that holds it, at any depth.
      articles: cut a WikiText file at the headings of its articles.
      characters: no more than so many of each text, from its beginning; None for all.
    """
    texts: Iterable[str] = (document.text for document in documents(str(_find(file, local_data))))
    if articles:
        texts = (part for text in texts for part in _articles(text))
    return {"test": datasets.Dataset.from_list([{"text": text[:characters]} for text in texts])}


def _articles(text: str) -> list[str]:
    starts = [match.start() - len(_BLANK) for match in _ARTICLE.finditer(_BLANK + text)]
    require(bool(starts), "file", f"{len(text)} characters", "holds no heading ` = TITLE = ` of a WikiText article")
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


def _find(file: str, local_data: str | None) -> Path:
    require(local_data is not None, "local_data", None, f"must name the folder of {file}: --local-data DIR")
    folder = Path(str(local_data)).expanduser()
    require(folder.is_dir(), "local_data", str(folder), "is no folder")
    found = sorted(folder.rglob(file))
    require(bool(found), "local_data", str(folder), f"holds no {file}")
    return found[0]


def _read(file: str, local_data: str | None, fields: list[str]) -> list[dict[str, Any]]:
    path, found = _find(file, local_data), []
    try:
        with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                row = json.loads(line)
                require(isinstance(row, dict), "local_data", f"{path}:{number}", "must be an object with fields")
                missing = [field for field in fields if field not in row]
                require(not missing, "local_data", f"{path}:{number}", f"lacks {', '.join(missing)}")
                found.append({field: row[field] for field in fields})
    except (*DAMAGE, ValueError) as error:
        if str(error).startswith("local_data="):
            raise
        raise ValueError(f"local_data={str(path)!r}: line {len(found) + 1} cannot be read ({error})") from error
    require(bool(found), "local_data", str(path), "has no rows")
    return found


def _by(group: str, found: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in found:
        groups.setdefault(row[group], []).append(row)
    return groups


# ---- WinoGrande: the context is what is chosen ---------------------------------------------------------------


def winogrande_options(row: dict[str, Any]) -> list[str]:
    return list(row["context_options"])


def winogrande_gold(row: dict[str, Any]) -> int:
    return int(row["gold"])


def winogrande_continuation(row: dict[str, Any]) -> str:
    return str(row["continuation"])


# ---- MMLU ------------------------------------------------------------------------------------------------------


def mmlu_prompt(row: dict[str, Any]) -> str:
    """The five examples of the subject, then the question, as Hendrycks et al. (arXiv 2009.03300) write it."""
    subject = row["subject"].replace("_", " ")
    asked = [f"{_mmlu_question(shot)} {LETTERS[shot['answer']]}\n\n" for shot in row["shots"]]
    return (f"The following are multiple choice questions (with answers) about {subject}.\n\n"
            f"{''.join(asked)}{_mmlu_question(row)}")


def mmlu_letters(row: dict[str, Any]) -> list[str]:
    return list(LETTERS[: len(row["choices"])])


def _mmlu_question(row: dict[str, Any]) -> str:
    choices = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, row["choices"], strict=False))
    return f"{row['question'].strip()}\n{choices}Answer:"


# ---- BBH and MATH: what is written is compared ---------------------------------------------------------------


def bbh_prompt(row: dict[str, Any]) -> str:
    """Three examples of the task without their reasoning, then the question (Suzgun et al., arXiv 2210.09261)."""
    asked = [f"Q: {shot['input']}\nA: {shot['target']}\n\n" for shot in row["shots"]]
    return f"{''.join(asked)}Q: {row['input']}\nA:"


def bbh_results(row: dict[str, Any], results: list[str]) -> dict[str, int]:
    return {"exact_match": int(results[0].strip() == row["target"].strip())}


def math_prompt(row: dict[str, Any]) -> str:
    """Four problems of the category with their solutions, then the problem (as in Lewkowycz et al., arXiv
    2206.14858, who show four others)."""
    asked = [f"Problem:\n{shot['context']}\n\nSolution:\n{shot['chain_of_thought']}\n\n" for shot in row["shots"]]
    return f"{''.join(asked)}Problem:\n{row['context']}\n\nSolution:"


def math_results(row: dict[str, Any], results: list[str]) -> dict[str, int]:
    """Whether the last box of the solution holds the answer, by the equality of Hendrycks et al. (arXiv 2103.03874)."""
    boxed = last_boxed_only_string(results[0])
    return {"exact_match": int(boxed is not None and is_equiv(remove_boxed(boxed), row["answer"]))}


# ---- perplexity ------------------------------------------------------------------------------------------------


def text_results(row: dict[str, Any], results: list[float]) -> dict[str, tuple[float, int]]:
    words, size = len(row["text"].split()), len(row["text"].encode())
    return {"word_perplexity": (results[0], words), "byte_perplexity": (results[0], size),
            "bits_per_byte": (results[0], size)}
