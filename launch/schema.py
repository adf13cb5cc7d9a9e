"""What settings there are: paths, types, defaults and descriptions, read from the records themselves. Imports no torch."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import itertools
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .settings import RunConfig


@dataclass(frozen=True)
class Setting:
    """One setting, as it is written in files and flags."""

    path: str
    type: str
    default: str
    """As TOML, 'none' where it is not set, 'required' where there is no default."""
    doc: str


def unwrap(hint: Any) -> tuple[Any, bool, Any]:
    """(type, may be unset, element type) of a type hint: `int | None` is (int, True, None), a literal of words is (str, ...)."""
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union else (hint,)
    optional = type(None) in parts
    inner = next((p for p in parts if p is not type(None)), None)
    if typing.get_origin(inner) is tuple:
        return tuple, optional, typing.get_args(inner)[0]
    if typing.get_origin(inner) is typing.Literal:
        return type(typing.get_args(inner)[0]), optional, None
    return inner, optional, None


def table_fields(record: Any) -> dict[str, Any]:
    """Name -> type hint of the fields of a record."""
    return typing.get_type_hints(record)


def setting_type(path: str) -> Any:
    """Type hint of a dotted path (list indices allowed), or None where there is no such setting."""
    hint: Any = RunConfig
    for part in re.sub(r"\[\d+\]", "", path).split("."):
        inner, _, element = unwrap(hint)
        record = inner if dataclasses.is_dataclass(inner) else element
        if not dataclasses.is_dataclass(record):
            return None
        hint = table_fields(record).get(part)
        if hint is None:
            return None
    return hint


def legal_keys(record: Any, where: str) -> list[str]:
    """Keys a table may have; `preset` is a key of [model] that only the loader knows."""
    return [*(["preset"] if where == "model" else []), *table_fields(record)]


def suggestion(key: str, record: Any, where: str) -> str:
    """The end of an unknown-key message: what was probably meant, or what there is."""
    near = difflib.get_close_matches(key, legal_keys(record, where), n=1, cutoff=0.65)
    # The right name in the wrong table is the other common slip.
    elsewhere = [s.path for s in settings() if s.path.rsplit(".", 1)[-1] == key]
    elsewhere += [path for path in _tables() if path.rsplit(".", 1)[-1] == key]
    options = [f"'{name}'" for name in [*near, *elsewhere][:3]]
    if options:
        return f"did you mean {' or '.join(options)}?"
    return f"{f'keys of [{where}]' if where else 'sections'}: {', '.join(legal_keys(record, where))}"


def settings() -> list[Setting]:
    """Every setting in the order of the records; those of a list's elements are written `data.sources[].type`."""
    return list(_settings(RunConfig, ""))


def _settings(record: Any, where: str) -> Iterator[Setting]:
    docs = _field_docs(record)
    for f in dataclasses.fields(record):
        hint = table_fields(record)[f.name]
        path = f"{where}.{f.name}" if where else f.name
        inner, _, element = unwrap(hint)
        if dataclasses.is_dataclass(inner):
            yield from _settings(inner, path)
        elif dataclasses.is_dataclass(element):
            yield from _settings(element, f"{path}[]")
        else:
            yield Setting(path, _type_name(hint), _default(f), docs.get(f.name, ""))


def _tables(record: Any = RunConfig, where: str = "") -> Iterator[str]:
    for name, hint in table_fields(record).items():
        inner, _, element = unwrap(hint)
        table = inner if dataclasses.is_dataclass(inner) else element
        if dataclasses.is_dataclass(table):
            path = f"{where}.{name}" if where else name
            yield path
            yield from _tables(table, path)


def _type_name(hint: Any) -> str:
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    names = []
    for part in parts:
        if typing.get_origin(part) is typing.Literal:
            names += [str(value) for value in typing.get_args(part)]
        elif typing.get_origin(part) is tuple:
            names.append(f"list of {_type_name(typing.get_args(part)[0])}")
        else:
            names.append("none" if part is type(None) else getattr(part, "__name__", str(part)))
    return " | ".join(names)


def _default(f: dataclasses.Field[Any]) -> str:
    if f.default is dataclasses.MISSING:
        return "required"
    if f.default is None:
        return "none"
    if isinstance(f.default, bool):
        return str(f.default).lower()
    if isinstance(f.default, tuple):
        return str(list(f.default))
    return f'"{f.default}"' if isinstance(f.default, str) else str(f.default)


def _field_docs(record: Any) -> dict[str, str]:
    """The string below each field, which Python does not keep, read from the source of the record."""
    tree = ast.parse(inspect.cleandoc(inspect.getsource(record)))
    body = typing.cast(ast.ClassDef, tree.body[0]).body
    docs = {}
    for statement, below in itertools.pairwise(body):
        match statement, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = " ".join(text.split())
    return docs
