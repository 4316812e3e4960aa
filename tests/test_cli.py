"""Flags, presets, files and errors of the command line."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import absl.logging
import jax
import pytest
import tyro
from hypothesis import given
from hypothesis import strategies as st

from experiments import cli
from mfa_jax.config import GQAConfig, MFAConfig, ModelConfig, OptimizerConfig, TrainConfig, to_json
from mfa_jax.train.loop import NonFiniteError


@dataclasses.dataclass(frozen=True)
class Inner:
    """Nested fields."""

    top_p: float = 1.0
    """Mass of the nucleus."""

    def __post_init__(self) -> None:
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be in (0, 1]")


@dataclasses.dataclass(frozen=True)
class Several:
    """A flag that may be given several times."""

    name: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """What to greet."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """A small script."""

    prompt: str
    """What to continue."""
    max_new_tokens: int = 64
    """How many tokens to write."""
    stream: bool = False
    """Print as it comes."""
    sampling: Inner = dataclasses.field(default_factory=Inner)


def preset(name: str) -> ModelConfig:
    if name != "small":
        raise ValueError(f"preset={name!r}: must be small")
    return ModelConfig(model_dim=32, attention=MFAConfig(num_heads=4))


def test_flags_reach_nested_fields() -> None:
    given = cli.parse(Arguments, ["--prompt", "def ", "--max-new-tokens", "5", "--stream", "--sampling.top-p", "0.5"])
    assert given == Arguments("def ", 5, True, Inner(0.5))


def test_underscores_are_hyphens() -> None:
    assert cli.parse(Arguments, ["--prompt=x", "--max_new_tokens=7"]).max_new_tokens == 7


def test_flags_override_file_overrides_preset_overrides_defaults(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"steps": 7, "seed": 3, "model": {"num_layers": 5}, "optimizer": {"b1": 0.5}}))
    start = TrainConfig(log_every=2, steps=1)
    args = ["--seed", "9", "--preset", "small", "--config", str(path)]
    config = cli.parse(TrainConfig, args, default=start, presets=preset)
    assert config.log_every == 2  # default
    assert (config.preset, config.model.model_dim, config.model.attention.num_heads) == ("small", 32, 4)  # preset
    assert (config.steps, config.model.num_layers, config.optimizer.b1) == (7, 5, 0.5)  # file
    assert config.seed == 9  # flag
    assert config == cli.parse(TrainConfig, args[2:] + args[:2], default=start, presets=preset)


def test_a_preset_of_a_file_is_that_of_the_flag(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"preset": "small", "steps": 7}')
    file = ["--config", str(path)]
    config = cli.parse(TrainConfig, file, presets=preset)
    assert config == dataclasses.replace(cli.parse(TrainConfig, ["--preset", "small"], presets=preset), steps=7)
    assert config.model == preset("small")
    assert cli.parse(TrainConfig, [*file, "--model.num-layers", "3"], presets=preset).model.num_layers == 3
    path.write_text('{"preset": "large"}')
    with pytest.raises(ValueError, match="preset='large': must be small"):
        cli.parse(TrainConfig, file, presets=preset)
    assert cli.parse(TrainConfig, [*file, "--preset", "small"], presets=preset).preset == "small"
    path.write_text('{"preset": 5}')
    with pytest.raises(ValueError, match="config.preset=5: must be of type str"):
        cli.parse(TrainConfig, file, presets=preset)
    path.write_text('{"preset": "small", "model": {"num_layers": 3}}')
    changed = cli.parse(TrainConfig, file, presets=preset)
    assert changed.model == dataclasses.replace(preset("small"), num_layers=3) and changed.preset == "small"
    whole = to_json(TrainConfig(preset="large", model=ModelConfig(num_layers=3)))  # as a run saves it: the model counts
    path.write_text(whole)
    assert cli.parse(TrainConfig, file, presets=preset).model == ModelConfig(num_layers=3)
    with pytest.raises(ValueError, match="preset='small': the file of --config holds the model of preset='large'"):
        cli.parse(TrainConfig, [*file, "--preset", "small"], presets=preset)


@pytest.mark.parametrize("flag", [["--ema-decay", "none"], ["--ema-decay=none"], ["--ema-decay", "None"]])
def test_none_is_no_value(flag: list[str]) -> None:
    """Messages spell it so. Where `none` is a value it stays one."""
    saved = TrainConfig(ema_decay=0.9, optimizer=OptimizerConfig(clip_norm=1.0))
    flags = [*flag, "--optimizer.clip-norm", "none", "--model.remat", "none", "--model.position.kind", "none"]
    config = cli.parse(TrainConfig, flags, default=saved)
    assert config.ema_decay is None and config.optimizer.clip_norm is None
    assert config.model.remat == config.model.position.kind == "none"
    with pytest.raises(ValueError, match="steps"):
        cli.parse(TrainConfig, ["--steps", "none"], default=saved)


def test_a_reader_that_has_enough_is_no_error() -> None:
    program = "from experiments import cli; cli.run(lambda: [print('x' * 1000, flush=True) for _ in range(10000)])"
    command = f"{sys.executable} -c \"{program}\" | head -c 5; exit ${{PIPESTATUS[0]}}"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert (found.returncode, found.stdout, found.stderr) == (141, "xxxxx", "")


def test_a_device_without_memory_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.run(raising(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 40 bytes.")))
    assert caught.value.code == 2 and capsys.readouterr().err.startswith("error: RESOURCE_EXHAUSTED: Out of memory")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        cli.run(raising(jax.errors.JaxRuntimeError("INTERNAL: a mistake")))


def test_a_saved_config_comes_back(tmp_path: Path) -> None:
    saved = TrainConfig(model=ModelConfig(attention=GQAConfig(num_kv_heads=2)), ema_decay=0.9, workdir="elsewhere")
    path = tmp_path / "config.json"
    path.write_text(to_json(saved))
    assert cli.parse(TrainConfig, [f"--config={path}"]) == saved


def test_flags_given_several_times_replace_the_saved_values(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"name": ["a", "b"]}')
    saved = ["--config", str(path)]
    assert cli.parse(Several, saved).name == ("a", "b")
    assert cli.parse(Several, [*saved, "--name", "c", "--name", "d"]).name == ("c", "d")
    assert cli.parse(Several, ["--name", "c"], default=Several(("a",))).name == ("c",)
    assert cli.parse(Several, []).name == ()


def test_a_saved_file_without_a_required_field_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"stream": true}')
    with pytest.raises(ValueError, match=r"config=\['prompt'\]: missing field"):
        cli.parse(Arguments, ["--config", str(path)])


def test_an_object_of_another_kind_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"model": {"attention": {"kind": "gqa", "head_dim": 16}}}')
    config = cli.parse(TrainConfig, ["--preset", "small", "--config", str(path)], presets=preset)
    assert config.model.attention == GQAConfig(head_dim=16) and config.model.model_dim == 32


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--steps", "0"], "steps=0: must be at least 1"),
        (["--data.held-out", "1"], "held_out=1.0: must be in [0, 1)"),
        (["--stesp", "5"], "--stesp: unknown argument, did you mean --steps"),
        (["--num-heads", "5"], "did you mean --model.attention.num-heads?"),
        (["--tie-embeddings"], "did you mean --model.tie-embeddings"),
        (["--model.moe.num-experts", "8"], "--model.moe.num-experts: there is no model.moe to change; accepted: a"),
        (["--zzzzzzzz"], "`--help` lists the flags"),
        (["--model.tie-embeddings", "False"], "False: unexpected argument"),
        (["--steps", "many"], "--steps: invalid literal for int() with base 10: 'many'"),
        (["--model.dtype", "float64"], "Expected one of ('float32', 'bfloat16')"),
        (["--steps"], "Missing value for argument '--steps'"),
        (["--preset"], "--preset: needs a value"),
        (["--preset", "large"], "preset='large': must be small"),
        (["--config", "nowhere.json"], "config='nowhere.json': cannot be read"),
        (["--workdir", "w" * 300, "--accumulate", "5"], "batch_size=16 is not a multiple of accumulate=5"),
    ],
)
def test_bad_arguments_are_value_errors_of_one_line(args: list[str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        cli.parse(TrainConfig, args, presets=preset)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_missing_required_flag_is_named() -> None:
    with pytest.raises(ValueError, match="--prompt"):
        cli.parse(Arguments, [])


def test_a_bad_file_is_named_with_the_path_of_the_field(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"optimizer": {"lr": 1}}')
    with pytest.raises(ValueError, match=r"config\.optimizer=\['lr'\]: unknown field; accepted: b1"):
        cli.parse(TrainConfig, ["--config", str(path)])
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        cli.parse(TrainConfig, ["--config", str(path)])


def test_errors_leave_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in ("57", None):
        monkeypatch.setenv("COLUMNS", columns) if columns else monkeypatch.delenv("COLUMNS", raising=False)
        with pytest.raises(ValueError):
            cli.parse(TrainConfig, ["--steps", "0"])
        assert os.environ.get("COLUMNS") == columns


@given(st.lists(st.sampled_from(["--prompt", "--stream", "--no-stream", "--sampling.top-p", "--max-new-tokens", "0.5",
                                 "2", "-1", "x", "--y", "--config", "--", "--prompt=", "none"]), max_size=6))
def test_any_arguments_parse_or_are_refused_in_one_line(args: list[str]) -> None:
    try:
        assert isinstance(cli.parse(Arguments, args), Arguments)
    except ValueError as error:
        assert str(error) and "\n" not in str(error)


def test_help_shows_the_docstring_of_each_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.parse(TrainConfig, ["--help"], presets=preset)
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert stop.value.code == 0
    assert "Optimizer steps of the whole run" in text and "--data.source" in text and "--config FILE.json" in text


def raising(error: BaseException) -> Callable[[], Any]:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("top_p=2: must be in (0, 1]"), "error: top_p=2: must be in (0, 1]"),
        (ValueError("one\n  two"), "error: one two"),
        (NotImplementedError("splash: needs a TPU"), "error: splash: needs a TPU"),
        (NotImplementedError(), "error: NotImplementedError"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a/b"), "error: No such file or directory: a/b"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), "error: Permission denied: a"),
        (OSError(errno.EROFS, "Read-only file system", "a"), "error: Read-only file system: a"),
        (OSError(errno.ENOSPC, "No space left on device"), "error: No space left on device"),
    ],
)
def test_user_errors_are_one_line_and_code_2(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.run(raising(error))
    captured = capsys.readouterr()
    assert (stop.value.code, captured.err, captured.out) == (2, line + "\n", "")


def test_an_interrupt_is_quiet_and_code_130(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.run(raising(KeyboardInterrupt()))
    assert stop.value.code == 130 and capsys.readouterr() == ("", "")


def test_numbers_that_break_down_are_one_line_and_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.run(raising(NonFiniteError("step 3: gradient of embed is not finite")))
    assert stop.value.code == 1
    assert capsys.readouterr() == ("", "error: step 3: gradient of embed is not finite\n")


def test_libraries_log_no_traceback_of_an_error_that_is_reported(capfd: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "a")
        except OSError:
            absl.logging.exception("a save failed")  # as Orbax does in its own thread
            raise

    before = absl.logging.get_verbosity()
    try:
        absl.logging.set_verbosity(absl.logging.INFO)
        with pytest.raises(SystemExit):
            cli.run(main)
    finally:
        absl.logging.set_verbosity(before)
    assert capfd.readouterr() == ("", "error: No space left on device: a\n")


@pytest.mark.parametrize(("message", "shown"), [("Event loop is closed", False), ("something else", True)])
def test_a_write_that_ends_after_a_failed_save_is_not_reported(
    message: str, shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Write:
        def __del__(self) -> None:
            raise RuntimeError(message)

    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    cli.run(lambda: Write() and None)
    assert (message in capsys.readouterr().err) == shown


@pytest.mark.parametrize("error", [RuntimeError("bug"), TypeError("bug"), OSError(errno.EIO, "Input/output error"),
                                   ZeroDivisionError("bug"), OverflowError("bug"), FloatingPointError("bug")])
def test_other_errors_propagate(error: Exception) -> None:
    with pytest.raises(type(error)):
        cli.run(raising(error))


def test_development_mode_keeps_the_traceback() -> None:
    program = "from experiments import cli\ncli.run(lambda: int('x'))"
    root = Path(__file__).resolve().parent.parent
    for flags, code, traceback in (([], 2, False), (["-X", "dev"], 1, True)):
        done = subprocess.run([sys.executable, *flags, "-c", program], cwd=root, capture_output=True, text=True)
        assert done.returncode == code and ("Traceback" in done.stderr) == traceback
