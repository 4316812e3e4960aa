"""Two models side by side: what is reported, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments.check_parity import CheckParityConfig, Outputs, ParityError, compare, main
from mfa_jax.convert import save_pretrained, save_run
from mfa_jax.data import ByteTokenizer
from mfa_jax.train.run import load_trained
from tests.contract import compiled, model_config


def test_a_difference_by_hand() -> None:
    """Two positions of two tokens; the second column of the right is `ln 3` above that of the left at position 1."""
    ids = np.array([0, 1])
    left = Outputs(ids, np.arange(2), np.zeros((2, 2)))
    right = Outputs(ids, np.arange(2), np.array([[5.0, 5.0], [0.0, np.log(3)]]), nll=np.array([0.5]))
    found = compare(left, right)
    kl = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    np.testing.assert_allclose(found["kl"], [0, kl], atol=1e-12)
    assert found["difference"] == [5.0, float(np.log(3))] and (found["largest_difference"], found["at"]) == (5.0, 0)
    np.testing.assert_allclose(found["largest_nll_difference"], np.log(2) - 0.5)


def test_a_run_and_its_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    c = compiled(model_config("mfa", vocab_size=264))
    save_run(tmp_path / "run", c.config, c.params, ByteTokenizer())
    save_pretrained(tmp_path / "hf", c.config, c.params, context_length=64, tokenizer=ByteTokenizer())
    (tmp_path / "text.txt").write_text("A text of a few words.")
    run, text = str(tmp_path / "run"), str(tmp_path / "text.txt")
    main(CheckParityConfig(run, str(tmp_path / "hf"), text=text, tolerance=0.0, per_position=True))
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 22 and found["kl"] == [0.0] * 22 and found["same_choice"] == 1.0
    other = jax.tree.map(lambda leaf: leaf * 1.01, c.params)
    save_pretrained(tmp_path / "other", c.config, other, context_length=64)
    with pytest.raises(ParityError, match="exceeds tolerance=0.001"):
        main(CheckParityConfig(run, str(tmp_path / "other"), text=text, tolerance=1e-3))
    assert "kl" not in json.loads(capsys.readouterr().out)
    broken = jax.tree.map(lambda leaf: leaf * np.nan, c.params)
    save_pretrained(tmp_path / "broken", c.config, broken, context_length=64)
    with pytest.raises(ParityError, match="largest difference nan exceeds tolerance=0.001"):
        main(CheckParityConfig(run, str(tmp_path / "broken"), text=text, tolerance=1e-3))
    capsys.readouterr()
    trained = load_trained(run)
    assert trained.step == 0 and isinstance(trained.tokenizer, ByteTokenizer)
    with pytest.raises(ValueError, match=r"tokenizer='tok.bin': must be left out: the run .*run has its own"):
        main(CheckParityConfig(run, str(tmp_path / "hf"), text=text, tokenizer="tok.bin"))
    with pytest.raises(ValueError, match="must not exist yet"):
        save_run(tmp_path / "run", c.config, c.params, ByteTokenizer())


def test_a_golden_file(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stories = data_dir / "models" / "stories260K"
    golden = str(stories / "golden_stories260K_fp64.npz")
    main(CheckParityConfig(str(stories), golden, tolerance=1e-4))
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 100 and 0 < found["largest_difference"] < 1e-4 and found["largest_kl"] < 1e-9


def test_a_golden_file_with_some_of_the_logits(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stories = data_dir / "models" / "stories260K"
    with np.load(stories / "golden_stories260K_fp64.npz") as file:
        ids, logits = file["ids"], file["logits"]
    parts = {"logits_first8": logits[:8], "logits_last": logits[-1]}
    for names, positions in ((["logits_first8"], [*range(8)]), (["logits_last"], [99]),
                             ([*parts], [*range(8), 99])):
        np.savez(tmp_path / "golden.npz", ids=ids, **{name: parts[name] for name in names})
        main(CheckParityConfig(str(stories), str(tmp_path / "golden.npz"), tolerance=1e-4, per_position=True))
        found = json.loads(capsys.readouterr().out)
        assert found["positions"] == positions and len(found["kl"]) == len(positions) and "mean_nll" not in found


@pytest.mark.parametrize(("options", "message"), [
    ({"left": "a.npz", "right": "b"}, "left='a.npz': must be a model"),
    ({"left": "a", "right": "b"}, "text=None: give a text, or a golden file"),
    ({"left": "a", "right": "b.npz", "text": "t"}, "text='t'"),
    ({"left": "a", "right": "b", "text": "t", "tokens": 1}, "tokens=1: must be at least 2"),
    ({"left": "a", "right": "b.npz", "tokens": 64}, "tokens=64: must be left out: a golden file brings its tokens"),
    ({"left": "a", "right": "b.npz", "tokenizer": "c"}, "tokenizer='c': must be left out: a golden file brings"),
    ({"left": "a", "right": "b.npz", "tolerance": -1.0}, "tolerance=-1.0"),
])
def test_bad_input_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CheckParityConfig(**options)


def test_a_file_that_is_no_golden_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        main(CheckParityConfig("a", str(tmp_path / "absent.npz")))
    np.savez(tmp_path / "other.npz", x=np.ones(2))
    with pytest.raises(ValueError, match="must hold ids, and some of logits, .*, nll; it holds x"):
        main(CheckParityConfig("a", str(tmp_path / "other.npz")))
