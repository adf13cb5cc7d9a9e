"""Checks that the configuration records share. Imports no torch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .errors import ConfigError, Problem

_WORDS = MappingProxyType({int: "a whole number", float: "a number", bool: "true or false", str: "a string", NoneType: "None"})


@functools.cache
def _hints(record: type[Any]) -> dict[str, Any]:
    # evaluating annotations takes longer than all checks of a record
    return get_type_hints(record)


def check_types(owner: Any, path: str) -> None:
    """Raise `ConfigError` naming every field of a record whose value is not of its annotated type, with what would be legal.

    Files and flags are checked before a record is built; this is for records built in Python. Comes first in `__post_init__`,
    because the checks of values may rely on it.
    """
    hints = _hints(owner.__class__)
    values = {f.name: getattr(owner, f.name) for f in fields(owner)}
    raise_if(
        [
            Problem(f"{path}.{name}".lstrip("."), f"is {value!r}, but must be {_expected(hints[name])}")
            for name, value in values.items()
            if not _fits(value, hints[name])
        ]
    )


def _fits(value: object, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in args
    if origin is UnionType:
        return any(_fits(value, arg) for arg in args)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, args[0]) for item in value)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


def _expected(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(repr, args))}"
    if origin is UnionType:
        return " or ".join(map(_expected, args))
    if origin is tuple:
        return f"a tuple, each element {_expected(args[0])}"
    return _WORDS.get(hint) or f"a {hint.__name__}"


def positive(owner: object, path: str, names: Sequence[str]) -> list[Problem]:
    """Problems for every field among `names` that is set, but not a positive finite number."""
    return _outside(owner, path, names, ("must be positive", " and finite"), lambda value: value > 0)


def not_negative(owner: object, path: str, names: Sequence[str]) -> list[Problem]:
    """Problems for every field among `names` that is set, but negative or not finite."""
    return _outside(owner, path, names, ("must not be negative", ", and must be finite"), lambda value: value >= 0)


def _outside(
    owner: object, path: str, names: Sequence[str], rule: tuple[str, str], legal: Callable[[Any], bool]
) -> list[Problem]:
    problems = []
    for name in names:
        value = getattr(owner, name)
        finite = not isinstance(value, float) or math.isfinite(value)
        if value is not None and not (finite and legal(value)):
            problems.append(Problem(f"{path}.{name}", f"is {value}, but {rule[0]}{'' if finite else rule[1]}"))
    return problems


def raise_if(problems: list[Problem]) -> None:
    """Raise `ConfigError` with all problems, if there are any."""
    if problems:
        raise ConfigError(problems)
