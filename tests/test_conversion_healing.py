"""The text that conversions are healed on, and the curve of a run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from experiments.conversion.healing import CurveConfig, TextsConfig, curve, texts
from mfa_jax.config import DataConfig, DistillationConfig, TrainConfig, to_json


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Books of one letter each, training in lower case, and a wiki whose characters count up."""
    folder = tmp_path / "data" / "text"
    folder.mkdir(parents=True)
    monkeypatch.setenv("MFA_JAX_DATA", str(folder.parent))
    (folder / "books-train-xs.txt").write_text("\0".join(letter * 50 for letter in "abc"))
    (folder / "books-valid.txt").write_text("\0".join(letter * 50 for letter in "XYZ"))
    (folder / "wikitext2-valid.txt").write_text("".join(f"{i:04d}" for i in range(250)))
    return folder


def documents(folder: Path, name: str) -> list[str]:
    return (folder / name / "text.txt").read_text().split("\0")


def test_nothing_that_is_held_out_is_trained_on(data: Path, tmp_path: Path) -> None:
    config = TextsConfig(out=str(tmp_path / "out"), characters=20, held_out=2, piece=40)
    out = texts(config)
    train, valid = documents(out, "train"), documents(out, "valid")
    assert train[:3] == ["a" * 20, "b" * 20, "c" * 20] and train[3] == "".join(f"{i:04d}" for i in range(200))
    assert valid[0] == "".join(f"{i:04d}" for i in range(200, 210))
    assert valid[1] == "".join(f"{i:04d}" for i in range(225, 235)) and valid[2:] == ["X" * 25, "Y" * 25]
    with pytest.raises(ValueError, match="must not exist yet, or be empty"):
        texts(config)


@pytest.mark.parametrize(("changes", "message"), [
    ({"held_out": 4, "piece": 10}, "held_out=4: books-valid has 3 books"),
    ({"piece": 60}, "held_out=4: wikitext2-valid has 1000 characters, of which a fifth"),
    ({"books": "none", "held_out": 2}, "no text 'none'")])
def test_too_little_text_is_refused_and_nothing_written(
    changes: dict[str, Any], message: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        texts(dataclasses.replace(TextsConfig(out=str(tmp_path / "out"), piece=10), **changes))
    assert not (tmp_path / "out").exists()


def make_run(folder: Path, *, distillation: bool = True, evaluations: int = 2) -> Path:
    folder.mkdir()
    config = TrainConfig(workdir=str(folder), data=DataConfig(batch_size=2, sequence_length=8), steps=20,
                         distillation=DistillationConfig("somewhere/teacher") if distillation else None)
    (folder / "config.json").write_text(to_json(config))
    lines = [{"step": 10 * i, "eval_kl": 0.5 / (i + 1), "eval_loss": 3.0 - i, "eval_teacher_loss": 1.5,
              "eval_bits_per_byte": 1.0, "tokens_per_second": 7.0} for i in range(evaluations)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 11}]))
    return folder


def test_a_curve_is_made_from_metrics_alone(tmp_path: Path) -> None:
    folder = curve(CurveConfig(run=(f"MFA-KR, C = 192={make_run(tmp_path / 'run')}",), results=str(tmp_path / "out"),
                               name="healing-toy"))
    text = (folder / "healing-toy.json").read_text()
    (name, found), = json.loads(text).items()
    assert name == "MFA-KR, C = 192" and "somewhere" not in text
    assert found["points"] == [
        {"tokens": 0, "kl": 0.5, "loss": 3.0, "teacher_loss": 1.5, "bits_per_byte": 1.0},
        {"tokens": 160, "kl": 0.25, "loss": 2.0, "teacher_loss": 1.5, "bits_per_byte": 1.0}]
    assert (folder / "healing-toy.png").stat().st_size > 1000
    assert sorted(path.name for path in folder.iterdir()) == ["healing-toy.json", "healing-toy.png"]
    with pytest.raises(ValueError, match="name='a/b': must be the name of a file"):
        CurveConfig(run=(), name="a/b")


def test_what_has_no_curve_is_refused(tmp_path: Path) -> None:
    plain, short = make_run(tmp_path / "plain", distillation=False), make_run(tmp_path / "short", evaluations=1)
    for run, message in ((f"a={plain}", "is no healing run"), (f"a={short}", "evaluated 1 times"),
                         (str(plain), "must be NAME=FOLDER"), (f"a={tmp_path / 'none'}", "cannot be read")):
        with pytest.raises(ValueError, match=message):
            curve(CurveConfig(run=(run,), results=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_what_does_not_go_in_one_picture_is_refused(tmp_path: Path) -> None:
    good, other, slow, torn = (make_run(tmp_path / name) for name in ("good", "other", "slow", "torn"))
    for folder, old, new in ((other, '"eval_teacher_loss": 1.5', '"eval_teacher_loss": 1.6'),
                             (slow, "tokens_per_second", "seconds"), (torn, '{"step": 11}\n', '{"step": 1')):
        text = (folder / "metrics.jsonl").read_text()
        assert old in text
        (folder / "metrics.jsonl").write_text(text.replace(old, new))
    for runs, message in (((), "give at least one --run"), ((f"a={good}", f"a={other}"), "a name of its own"),
                          ((f"a={good}", f"b={other}"), "teacher_loss={'a': 1.5, 'b': 1.6}: must be the same"),
                          ((f"a={slow}",), "no tokens_per_second"),
                          ((f"a={torn}",), r"line 3 of '.*torn/metrics.jsonl' is not JSON")):
        with pytest.raises(ValueError, match=message):
            curve(CurveConfig(run=runs, results=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
