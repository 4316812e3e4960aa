"""The command line of every script: typed flags into a frozen dataclass, and errors as one line with an exit code.

    if __name__ == "__main__":
        cli.run(main)

Exit codes: 0 done, 1 the numbers broke down (a training run that is no longer finite), 2 what the user asked for is not
possible, 130 interrupted. Other exceptions keep their traceback; `python -X dev -m experiments.NAME` keeps it for all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, get_args, get_type_hints

import absl.logging
import jax
import tyro

from mfa_jax.config import from_dict, load_json, to_dict

C = TypeVar("C")

# What a user can mend: disk full, quota, file too large, read-only, no permission, missing file, a file for a folder.
_USER_ERRNO = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM,
                         errno.ENOENT, errno.ENOTDIR, errno.EISDIR})
# Python's own arithmetic errors are mistakes in a program; NonFiniteError and its like say what became of the numbers.
_MISTAKES = (ZeroDivisionError, OverflowError, FloatingPointError)


def run(main: Callable[[], object], label: Callable[[], str] = str) -> None:
    """Calls `main()`, reports what it raises, and exits.

    Args:
      label: gives what an error's line has behind `error: `, such as which process it is of.

    Raises:
      SystemExit: with one line `error: ...` on stderr, code 2 after a `ValueError`, a `NotImplementedError`, a
        `MemoryError`, a device without memory or an `OSError` that the user can mend (disk full, read-only, missing),
        code 1 after an `ArithmeticError` of ours (`NonFiniteError`); code 130 after Ctrl-C, 141 where nobody reads.
    """
    # Orbax logs the traceback of a save that failed from its own thread; the error itself reaches us and is one line.
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = _without_late_writes(sys.unraisablehook)
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # who read has enough; what is flushed at the end would fail, too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except jax.errors.JaxRuntimeError as error:
        if sys.flags.dev_mode or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"error: {label()}{_describe(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except (ValueError, NotImplementedError, OSError, ArithmeticError, MemoryError) as error:
        not_ours = isinstance(error, _MISTAKES) or (isinstance(error, OSError) and error.errno not in _USER_ERRNO)
        if sys.flags.dev_mode or not_ours:
            raise
        print(f"error: {label()}{_describe(error)}", file=sys.stderr)
        raise SystemExit(1 if isinstance(error, ArithmeticError) else 2) from None


def _without_late_writes(report: Callable[[Any], object]) -> Callable[[Any], object]:
    """`report`, but for the writes of a failed save that end after its event loop: they have nobody left to tell."""
    def hook(unraisable: Any) -> None:
        if not (isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"):
            report(unraisable)

    return hook


def _describe(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.strerror}: {error.filename}" if error.filename is not None else str(error.strerror)
    return " ".join(str(error).split()) or type(error).__name__


def parse(
    config_type: type[C], argv: Sequence[str] | None = None, *, default: C | None = None,
    presets: Callable[[str], Any] | None = None, about: str = "",
) -> C:
    """A `config_type` from, in this order, `default`, `--preset NAME`, `--config FILE.json`, and flags.

    Flags are the dotted names of the fields (`--data.source`, `--max-new-tokens`); `--help` prints each with the
    docstring under the field. `--preset NAME` replaces the field `model` by `presets(NAME)` and records the name in
    `preset`. The JSON file holds some or all fields; what it leaves out stays as it was, except that an object of
    another `kind` is replaced as a whole, and that a file with a `preset` and no `model` stands for the flag, where
    that is not given, as does one with a part of a `model`. `none` is no value where a field may have none. A field
    whose flag may be given several times (`UseAppendAction`) takes the values of its flags in place of those it had.

    Args:
      config_type: a frozen dataclass; bool fields are flags `--name` and `--no-name`.
      argv: arguments, `sys.argv[1:]` if None.
      default: where the fields start, `config_type()` if None.
      presets: from a preset's name to a model config; without it there is no special `--preset`.
      about: what `--help` says behind the type's docstring.

    Raises:
      ValueError: an unknown flag or field, a value of another type, or what the config itself refuses.
      SystemExit: code 0 after `--help`.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    description = "\n\n".join(filter(None, (
        config_type.__doc__, about, "--config FILE.json starts from a saved config; flags override it.")))
    start: Any = default
    args, path = take(args, "--config")
    file = {} if path is None else load_json(dict, path)
    if presets is not None:
        args, preset = take(args, "--preset")
        named = file.get("preset")
        if isinstance(named, str) and not _is_whole(config_type, file.get("model")):
            file.pop("preset")
            preset = named if preset is None else preset
        elif preset is not None and named not in (None, preset):
            raise ValueError(f"preset={preset!r}: the file of --config holds the model of preset={named!r}; "
                             f"give one of them, or flags of --model")
        if preset is not None:
            base: Any = config_type() if default is None else default
            start = dataclasses.replace(base, preset=preset, model=presets(preset))
    if path is not None:
        start = from_dict(config_type, _merge({} if start is None else to_dict(start), file))
    lists = {} if start is None else {name: getattr(start, name) for name in _appended(config_type)}
    start = tyro.MISSING_NONPROP if start is None else dataclasses.replace(start, **dict.fromkeys(lists, ()))
    wants_help = "-h" in args or "--help" in args
    args = _none_spelled(args, config_type if start is tyro.MISSING_NONPROP else start)
    parsed: Any
    with contextlib.nullcontext() if wants_help else _errors_as_exceptions():
        parsed, unknown = tyro.cli(config_type, args=args, default=start, description=description,
                                   config=(tyro.conf.AvoidSubcommands,), return_unknown_args=True)
    if unknown:
        raise ValueError(_unknown_message(unknown, parsed))
    kept = {name: values for name, values in lists.items() if not getattr(parsed, name)}
    return dataclasses.replace(parsed, **kept) if kept else parsed


def _is_whole(config_type: Any, model: Any) -> bool:
    """Whether an object of a file has every field of the model: it was saved, and not written to change some."""
    field = get_type_hints(config_type).get("model")
    return isinstance(model, dict) and dataclasses.is_dataclass(field) and {
        f.name for f in dataclasses.fields(field)} <= model.keys()


def _none_spelled(args: list[str], config: Any) -> list[str]:
    """`none` as tyro spells it, where the field of a flag may be None and has no value of that name."""
    found, flag = [], ""
    for item in args:
        name, equals, value = item.partition("=") if item.startswith("--") else (flag, "", item)
        if value == "none" and _may_be_none(config, name.removeprefix("--").replace("-", "_").split(".")):
            item = f"{name}=None" if equals else "None"
        flag = item if item.startswith("--") and not equals else ""
        found.append(item)
    return found


def _may_be_none(config: Any, path: list[str]) -> bool:
    kind = config if isinstance(config, type) else type(config)
    if not dataclasses.is_dataclass(kind) or path[0] not in (hints := get_type_hints(kind)):
        return False
    if len(path) > 1:
        inner = hints[path[0]] if isinstance(config, type) else getattr(config, path[0])
        return _may_be_none(inner, path[1:])
    return type(None) in get_args(hints[path[0]]) and "'none'" not in str(hints[path[0]])


def _appended(config_type: Any) -> list[str]:
    """Names of the fields whose flags may be given several times; tyro would add them to the default's values."""
    hints = get_type_hints(config_type, include_extras=True)
    return [name for name, hint in hints.items() if tyro.conf.UseAppendAction in get_args(hint)]


def take(args: list[str], flag: str) -> tuple[list[str], str | None]:
    """The arguments without `flag VALUE` and `flag=VALUE`, and the last such value."""
    rest, value, items = [], None, iter(args)
    for item in items:
        if item == flag:
            value = next(items, None)
            if value is None or value.startswith("--"):
                raise ValueError(f"{flag}: needs a value")
        elif item.startswith(f"{flag}="):
            value = item.removeprefix(f"{flag}=")
        else:
            rest.append(item)
    return rest, value


def _merge(base: Any, over: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    if "kind" in over and over["kind"] != base.get("kind", over["kind"]):
        return over
    return base | {name: _merge(base.get(name), value) for name, value in over.items()}


@contextlib.contextmanager
def _errors_as_exceptions() -> Iterator[None]:
    """Turns the framed report that tyro prints before it exits into a one-line `ValueError`."""
    report, columns = io.StringIO(), os.environ.get("COLUMNS")
    # tyro breaks lines at the width of the terminal, which COLUMNS overrides.
    os.environ["COLUMNS"] = "100000"
    try:
        with contextlib.redirect_stderr(report):
            yield
    except SystemExit:
        message = report.getvalue().splitlines()
        body = [line.strip("│ ").removeprefix("Error parsing ") for line in message[1:]]
        body = body[:next((i for i, line in enumerate(body) if re.fullmatch("[─╰╯]+", line)), len(body))]
        raise ValueError(" ".join(body)) from None
    finally:
        os.environ.pop("COLUMNS")
        if columns is not None:
            os.environ["COLUMNS"] = columns
    sys.stderr.write(report.getvalue())


def _unknown_message(unknown: Sequence[str], config: Any) -> str:
    flag = next((item for item in unknown if item.startswith("-")), None)
    if flag is None:
        return f"{unknown[0]}: unexpected argument; a bool is set by --name or --no-name, `--help` lists the flags"
    name = flag.split("=")[0].replace("_", "-")
    if absent := _absent(config, name.removeprefix("--").replace("-", "_").split(".")):
        return f"{flag}: there is no {absent} to change; accepted: a --preset or a file of --config that has one"
    known = list(_flags(config))
    close = [k for k in known if k.rsplit(".")[-1] == name.removeprefix("--")]
    close += [k for k in difflib.get_close_matches(name, known, n=3) if k not in close]
    hint = f"did you mean {' or '.join(close[:4])}?" if close else "`--help` lists the flags"
    return f"{flag}: unknown argument, {hint}"


def _absent(config: Any, path: list[str]) -> str | None:
    """The part of a config that a flag is of and that is None, where it could be given."""
    for i, name in enumerate(path[:-1], 1):
        if not dataclasses.is_dataclass(config) or not hasattr(config, name):
            return None
        kinds = get_args(get_type_hints(type(config))[name])
        config = getattr(config, name)
        if config is None and any(dataclasses.is_dataclass(kind) for kind in kinds):
            return ".".join(path[:i])
    return None


def _flags(config: Any, prefix: str = "--") -> Iterator[str]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            yield from _flags(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
            if isinstance(value, bool):
                yield f"{prefix}no-{name}"
