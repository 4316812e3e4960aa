"""How every config refuses a value: `ValueError("field=value: accepted")`."""

from __future__ import annotations

from typing import Any


def require(condition: bool, field: str, value: object, accepted: str) -> None:
    """Raises `ValueError("field=value: accepted")` unless `condition` holds."""
    if not condition:
        raise ValueError(f"{field}={value!r}: {accepted}")


def require_positive(config: Any, *names: str) -> None:
    """Raises `ValueError` unless each of these fields is at least 1."""
    for name in names:
        value = getattr(config, name)
        require(value >= 1, name, value, "must be at least 1")
