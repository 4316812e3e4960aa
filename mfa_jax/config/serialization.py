"""Configs as JSON, both ways; reading is strict and names the place of what is wrong."""

from __future__ import annotations

import dataclasses
import json
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mfa_jax.config.checks import require


def to_dict(config: Any) -> Any:
    """A config as plain dicts, lists and scalars, ready for `json.dumps`."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    return [to_dict(v) for v in config] if isinstance(config, (tuple, list)) else config


def from_dict(kind: Any, value: Any, where: str = "config") -> Any:
    """The config of type `kind` that `to_dict` made `value` from; strict, with the path of what is wrong.

    Raises:
      ValueError: an unknown field, a missing one without a default, a value of another type, or what the config itself
        refuses.
    """
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        require(isinstance(value, dict), where, value, f"must be an object with the fields of {kind.__name__}")
        hints = get_type_hints(kind)
        unknown = sorted(set(value) - set(hints))
        require(not unknown, where, unknown, f"unknown field; accepted: {', '.join(sorted(hints))}")
        missing = [f.name for f in dataclasses.fields(kind) if f.name not in value and f.init
                   and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
        require(not missing, where, missing, "missing field, it has no default")
        fields = {name: from_dict(hints[name], item, f"{where}.{name}") for name, item in value.items()}
        try:
            return kind(**fields)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    # `Literal[...] | None` is a Union, `int | None` a UnionType.
    if get_origin(kind) in (Union, types.UnionType):
        return _union_from_dict(get_args(kind), value, where)
    if get_origin(kind) is Literal:
        require(value in get_args(kind), where, value, f"must be one of {', '.join(map(str, get_args(kind)))}")
        return value
    if get_origin(kind) is tuple:
        require(isinstance(value, (list, tuple)), where, value, "must be a list")
        return tuple(from_dict(get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    require(isinstance(value, kind) and not (kind is int and isinstance(value, bool)), where, value,
            f"must be of type {kind.__name__}")
    return value


def _union_from_dict(members: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in members:
        return None
    if dataclasses.is_dataclass(members[0]) and type(None) not in members:
        require(isinstance(value, dict) and "kind" in value, where, value, "must be an object with a `kind`")
        kinds = {get_args(get_type_hints(m)["kind"])[0]: m for m in members}
        require(isinstance(value["kind"], str) and value["kind"] in kinds, f"{where}.kind", value["kind"],
                f"must be one of {', '.join(kinds)}")
        return from_dict(kinds[value["kind"]], value, where)
    return from_dict(next(m for m in members if m is not type(None)), value, where)


def to_json(config: Any) -> str:
    """A config as JSON, from which `from_dict` makes an equal one."""
    return json.dumps(to_dict(config), indent=2)


def load_json(kind: Any, path: str | Path) -> Any:
    """Reads a config of type `kind` from a JSON file.

    Raises:
      ValueError: the file is missing, not JSON, or not such a config.
    """
    try:
        value = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"config={str(path)!r}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # or not UTF-8
        raise ValueError(f"config={str(path)!r}: is not JSON ({error})") from error
    return from_dict(kind, value)
