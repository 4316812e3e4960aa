"""The command line of every script: typed flags into a frozen dataclass, and errors as one line with an exit code.

    if __name__ == "__main__":
        cli.run(main)

Exit codes: 0 done, 2 what the user asked for is not possible, 130 interrupted. Other exceptions keep their traceback;
`python -X dev -m experiments.NAME` keeps it for all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import tyro

from mfa_jax.config import from_dict, load_json, to_dict

C = TypeVar("C")

# What a user can mend: disk full, quota, read-only, no permission, missing file, a file for a folder or the reverse.
_USER_ERRNO = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT,
                         errno.ENOTDIR, errno.EISDIR})


def run(main: Callable[[], object]) -> None:
    """Calls `main()`, reports what it raises, and exits.

    Raises:
      SystemExit: code 2 with one line `error: ...` on stderr after a `ValueError`, a `NotImplementedError`, or an
        `OSError` that the user can mend (disk full, read-only, missing); code 130 after Ctrl-C.
    """
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (ValueError, NotImplementedError, OSError) as error:
        if sys.flags.dev_mode or (isinstance(error, OSError) and error.errno not in _USER_ERRNO):
            raise
        print(f"error: {_describe(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def _describe(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.strerror}: {error.filename}" if error.filename is not None else str(error.strerror)
    return " ".join(str(error).split()) or type(error).__name__


def parse(
    config_type: type[C], argv: Sequence[str] | None = None, *, default: C | None = None,
    presets: Callable[[str], Any] | None = None,
) -> C:
    """A `config_type` from, in this order, `default`, `--preset NAME`, `--config FILE.json`, and flags.

    Flags are the dotted names of the fields (`--data.source`, `--max-new-tokens`); `--help` prints each with the
    docstring under the field. `--preset NAME` replaces the field `model` by `presets(NAME)` and records the name in
    `preset`. The JSON file holds some or all fields; what it leaves out stays as it was, except that an object of
    another `kind` is replaced as a whole.

    Args:
      config_type: a frozen dataclass; bool fields are flags `--name` and `--no-name`.
      argv: arguments, `sys.argv[1:]` if None.
      default: where the fields start, `config_type()` if None.
      presets: from a preset's name to a model config; without it there is no special `--preset`.

    Raises:
      ValueError: an unknown flag or field, a value of another type, or what the config itself refuses.
      SystemExit: code 0 after `--help`.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    description = f"{config_type.__doc__}\n\n--config FILE.json starts from a saved config; flags override it."
    if presets is not None:
        args, preset = _take(args, "--preset")
        if preset is not None:
            default = dataclasses.replace(default or config_type(), preset=preset, model=presets(preset))  # type: ignore
    args, path = _take(args, "--config")
    if path is not None:
        default = from_dict(config_type, _merge(to_dict(default) if default is not None else {}, load_json(dict, path)))
    start: Any = tyro.MISSING_NONPROP if default is None else default
    wants_help = "-h" in args or "--help" in args
    with contextlib.nullcontext() if wants_help else _errors_as_exceptions():
        config, unknown = tyro.cli(config_type, args=args, default=start, description=description,
                                   config=(tyro.conf.AvoidSubcommands,), return_unknown_args=True)
    if unknown:
        raise ValueError(_unknown_message(unknown, config))
    return config


def _take(args: list[str], flag: str) -> tuple[list[str], str | None]:
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
    known = list(_flags(config))
    close = [k for k in known if k.rsplit(".")[-1] == name.removeprefix("--")]
    close += [k for k in difflib.get_close_matches(name, known, n=3) if k not in close]
    hint = f"did you mean {' or '.join(close[:4])}?" if close else "`--help` lists the flags"
    return f"{flag}: unknown argument, {hint}"


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
