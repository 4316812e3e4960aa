"""The type checker that the jaxtyping import hook calls.

`typeguard.typechecked` needs the source of a function, which jaxtyping's stand-ins for signatures do not have, so
values are checked one by one with `typeguard.check_type`, which knows jaxtyping's shapes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Self

from typeguard import ForwardRefPolicy, check_type


def typechecked(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` with its arguments and its result checked against their annotations (jaxtyping has resolved them)."""
    signature = inspect.signature(fn)

    def check(value: Any, annotation: Any) -> None:
        # Self has no meaning for a stand-in outside its class.
        if annotation not in (inspect.Parameter.empty, Any, Self):
            # The field annotations of a named tuple are strings, which typeguard cannot resolve.
            check_type(value, annotation, forward_ref_policy=ForwardRefPolicy.IGNORE)

    @functools.wraps(fn)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            parameter = signature.parameters[name]
            many = {parameter.VAR_POSITIONAL: tuple, parameter.VAR_KEYWORD: dict.values}.get(parameter.kind)
            for item in many(value) if many else (value,):
                check(item, parameter.annotation)
        result = fn(*args, **kwargs)
        check(result, signature.return_annotation)
        return result

    return checked
