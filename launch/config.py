"""Reading, checking and writing a run's configuration. Imports no torch.

Every source (defaults, preset, files, flags) is merged as plain data first and validated once, so that a user sees all
problems of all sources together, each with the line it was written on. Precedence, weakest first:
dataclass defaults, `model.preset`, files from left to right, overrides. Tables merge; lists and values replace.

TOML has no null: `"none"` unsets any setting that may be unset (`train.grad_clip = "none"`).
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from ..moe.errors import ConfigError, Problem, TopologyError
from ..moe.presets import preset as preset_table
from .schema import setting_type, suggestion, table_fields, unwrap
from .settings import RunConfig
from .toml_lines import key_lines

if TYPE_CHECKING:
    from pydantic import ValidationError

    from ..parallel.topology import Topology

Table = dict[str, Any]

_WORDS = MappingProxyType(
    {
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "bool_type": "true or false",
        "string_type": "a string",
        "tuple_type": "a list",
        "dataclass_type": "a table of settings",
    }
)


@dataclass(frozen=True)
class Loaded:
    """A checked configuration, and where each of its values came from."""

    config: RunConfig
    origins: Mapping[str, str]
    """Dotted path of every value -> 'default', 'preset NAME', 'file.toml:LINE', 'flag --x' or 'override'."""


def load(
    *files: str | os.PathLike[str],
    overrides: Mapping[str, object] | None = None,
    flags: Mapping[str, object] | None = None,
) -> Loaded:
    """Merge TOML files left to right, then `overrides`, then `flags`, and validate the result once.

    files: paths, or names of shipped configurations (`quickstart`) where no such path exists.
    overrides, flags: dotted path -> value (nested tables are accepted too); they differ in the origin they are given.
    Raises ConfigError with every problem of every source: missing files, TOML syntax, unknown keys, wrong types,
    values that cannot be, and settings that do not fit each other.
    """
    draft = _Draft()
    layers = [_read_file(os.fspath(file), draft.problems) for file in files]
    draft.unread = bool(draft.problems)
    layers += [_dotted_layer(overrides or {}, lambda path: "override"), _dotted_layer(flags or {}, lambda path: f"flag --{path}")]
    name, origin = _take_preset(layers)
    if name is not None:
        try:
            draft.merge(_Layer({"model": preset_table(str(name))}, {}, f"preset {name}"))
        except ConfigError as error:
            draft.problems += [dataclasses.replace(p, origin=origin) for p in error.problems]
    for layer in layers:
        draft.merge(layer)
    return draft.finish()


def from_dict(data: Mapping[str, object]) -> RunConfig:
    """A configuration from nested tables, as `to_dict` returns them. Raises ConfigError."""
    return load(overrides=data).config


def to_dict(config: Any) -> Table:
    """Nested tables of plain values (lists for tuples, None for what is not set), ready for JSON."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def dump(config: RunConfig) -> str:
    """TOML text of every setting, defaults included; loading it gives an equal configuration.

    What is not set is left out, or written as "none" where the default would otherwise come back.
    """
    import tomli_w

    return tomli_w.dumps(_writable(config))


def flatten(config: RunConfig) -> dict[str, Any]:
    """Dotted path -> plain value of every setting; elements of lists of tables are `data.sources[0].type`."""
    return dict(_leaves(to_dict(config)))


def check_world(loaded: Loaded, world: int) -> Topology:
    """The layout of `world` ranks. Raises TopologyError with every way in which it fits neither ranks, model nor batch."""
    from ..parallel.topology import Topology, check_model

    config = loaded.config
    try:
        topology = Topology.from_parallel(world, config.parallel)
        problems = check_model(
            topology,
            config.model,
            global_batch=config.train.global_batch,
            micro_batch=config.parallel.micro_batch,
            seq_len=config.data.seq_len,
        )
    except TopologyError as error:
        problems = error.problems
    if problems:
        raise TopologyError([dataclasses.replace(p, origin=p.origin or loaded.origins.get(p.where, "")) for p in problems])
    return topology


def shipped_configs() -> dict[str, Path]:
    """Name -> file of the configurations that come with the package; `load` takes their names for files."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.toml"))}


def parse_overrides(args: Sequence[str]) -> dict[str, object]:
    """Dotted settings of a command line: `--train.lr 3e-4`, `--train.lr=3e-4`, `--log.report false`.

    Values are read as TOML (so lists and tables work, quoted for the shell), and as plain text where the setting
    is text or the value is no TOML. The last of several values for one setting counts.
    Raises ConfigError for what is not a dotted setting and for a setting without a value.
    """
    result: dict[str, object] = {}
    problems = []
    rest = list(args)
    while rest:
        word = rest.pop(0)
        path, equals, raw = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+", path):
            problems.append(Problem(word, "is not a setting; settings are written --section.name value"))
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                problems.append(Problem(f"--{path}", "needs a value, for instance " + _example(path)))
                continue
            raw = rest.pop(0)
        result[path] = _flag_value(raw, setting_type(path))
    if problems:
        raise ConfigError(problems)
    return result


# What one source says: its values, the lines they are on, and what to call it where there are no lines.
@dataclass(frozen=True)
class _Layer:
    table: Table
    lines: Mapping[str, int]
    name: str
    origins: Mapping[str, str] = field(default_factory=dict)

    def origin(self, path: str) -> str:
        """Origin of a value or table; a value inside an inline table is where its table is."""
        below = next((p for p in [*self.lines, *self.origins] if p.startswith(f"{path}.")), "")
        parents = [path]
        while parent := parents[-1][: max(parents[-1].rfind("."), parents[-1].rfind("["), 0)]:
            parents.append(parent)
        for known in (path, below, *parents):
            if known in self.lines:
                return f"{self.name}:{self.lines[known]}"
            if known in self.origins:
                return self.origins[known]
        return self.name


@dataclass
class _Draft:
    data: Table = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    unread: bool = False

    def merge(self, layer: _Layer) -> None:
        self._merge(self.data, layer.table, "", layer)

    def _merge(self, into: Table, table: Mapping[str, Any], path: str, layer: _Layer) -> None:
        for key, value in table.items():
            where = f"{path}.{key}" if path else key
            if isinstance(value, Mapping):
                node = into.get(key)
                if not isinstance(node, dict):
                    node = into[key] = {}
                    self._forget(where)
                    self.origins[where] = layer.origin(where)
                self._merge(node, value, where, layer)
            else:
                self._forget(where)
                into[key] = value
                self.origins[where] = layer.origin(where)
                self.origins.update({p: layer.origin(p) for p, _ in _leaves(value, where)})

    def _forget(self, where: str) -> None:
        for path in [p for p in self.origins if p == where or p.startswith((f"{where}.", f"{where}["))]:
            del self.origins[path]

    def finish(self) -> Loaded:
        from pydantic import TypeAdapter, ValidationError

        data = self._normalise(self.data, RunConfig, "")
        config = None
        try:
            # JSON mode is strict about types and still takes tables for records and lists for tuples.
            config = TypeAdapter(RunConfig).validate_json(json.dumps(data), strict=True)
        except ValidationError as error:
            known = {p.where for p in self.problems}
            found = [p for p in _translate(error) if p.where not in known]
            # What is missing may well be in a file that could not be read.
            self.problems += [p for p in found if not (self.unread and p.what.startswith(_MISSING))]
        if config is None or self.problems:
            raise ConfigError([self._with_origin(p) for p in self.problems])
        return Loaded(config, {path: self.origins.get(path, "default") for path in flatten(config)})

    def _with_origin(self, problem: Problem) -> Problem:
        origin = problem.origin or self.origins.get(problem.where, "")
        if not origin and not problem.what.startswith(_MISSING) and setting_type(problem.where) is not None:
            origin = "default"
        return dataclasses.replace(problem, origin=origin)

    def _normalise(self, value: Any, hint: Any, where: str) -> Any:
        """Data for the validator: unknown keys out (each a problem), "none" resolved, whole floats as integers."""
        inner, optional, element = unwrap(hint)
        if optional and value == "none":
            return None
        if isinstance(value, Mapping) and dataclasses.is_dataclass(inner):
            hints, kept = table_fields(inner), {}
            for key, item in value.items():
                path = f"{where}.{key}" if where else key
                if key in hints:
                    kept[key] = self._normalise(item, hints[key], path)
                else:
                    self.problems.append(Problem(path, f"unknown key; {suggestion(key, inner, where)}"))
            return kept
        if isinstance(value, list | tuple):
            return [self._normalise(item, element, f"{where}[{i}]") for i, item in enumerate(value)]
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        if isinstance(value, float) and inner is int and value.is_integer():
            return int(value)
        if isinstance(value, float) and not math.isfinite(value):
            self.problems.append(Problem(where, f"is {value}, but must be a finite number"))
            return None
        if value is not None and not isinstance(value, str | int | float | bool | Mapping):
            self.problems.append(Problem(where, f"is {value} of type {type(value).__name__}, which no setting takes; quote text"))
            return None
        return value


_MISSING = "is required, but not set"


def _translate(error: ValidationError) -> Iterator[Problem]:
    """The validator's findings in our words; problems that the records found themselves are passed on."""
    for item in error.errors(include_url=False):
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in item["loc"]).removeprefix(".")
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, ConfigError):
            table = re.sub(r"\[\d+\]", "", where)
            for p in cause.problems:
                # A record in a list does not know its index; the validator does.
                indexed = where + p.where[len(table) :] if table and p.where.startswith(table) else p.where
                yield dataclasses.replace(p, where=indexed)
        elif item["type"] == "missing":
            hint = '; set it, or start from a preset (model.preset = "debug")' if where == "model" else ""
            yield Problem(where, _MISSING + hint)
        else:
            value = item["input"]
            shown = "none" if value is None else json.dumps(value, ensure_ascii=False)
            expected = _WORDS.get(item["type"]) or item["msg"].removeprefix("Input should be ")
            quotes = (
                "; write it without quotes"
                if isinstance(value, str) and item["type"].startswith(("int", "float", "bool"))
                else ""
            )
            yield Problem(where, f"is {shown}, but must be {expected}{quotes}")


def _read_file(file: str, problems: list[Problem]) -> _Layer:
    shipped = shipped_configs().get(file)
    if shipped is not None and not os.path.exists(file):
        file, path = shipped.name, shipped
    else:
        path = Path(file)
    try:
        text = path.read_text(encoding="utf-8")
        return _Layer(tomllib.loads(text), key_lines(text), file)
    except FileNotFoundError:
        way_out = f"pass the path of a TOML file, or the name of a shipped one: {', '.join(shipped_configs())}"
        problems.append(Problem(file, f"no such file; {way_out}"))
    except (OSError, UnicodeDecodeError) as error:
        problems.append(Problem(file, f"cannot be read as text ({error})"))
    except tomllib.TOMLDecodeError as error:
        position = re.search(r"\(at line (\d+), column (\d+)\)", str(error))
        line = f":{position[1]}" if position else ""
        problems.append(Problem(f"{file}{line}", f"is not TOML: {error}"))
    return _Layer({}, {}, file)


def _dotted_layer(values: Mapping[str, object], name: Callable[[str], str]) -> _Layer:
    table: Table = {}
    # The caller's tables stay as they are.
    for path, value in copy.deepcopy(dict(values)).items():
        *parents, last = path.split(".")
        node = table
        for key in parents:
            # In `--model.moe none --model.moe.top_k 2` the deeper setting is the later word.
            if not isinstance(node.get(key), dict):
                node[key] = {}
            node = node[key]
        both = isinstance(node.get(last), dict) and isinstance(value, Mapping)
        node[last] = {**node[last], **cast(Table, value)} if both else value
    return _Layer(table, {}, name(""), {path: name(path) for path in values})


def _take_preset(layers: Sequence[_Layer]) -> tuple[object, str]:
    """Remove `model.preset` everywhere; the last one given counts."""
    name, origin = None, ""
    for layer in layers:
        model = layer.table.get("model")
        if isinstance(model, dict) and "preset" in model:
            name, origin = model.pop("preset"), layer.origin("model.preset")
    return (None if name == "none" else name), origin


def _leaves(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Values with their paths; lists of tables count as tables, other lists as values."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{where}.{key}" if where else key)
    elif isinstance(value, list | tuple) and value and all(isinstance(item, Mapping) for item in value):
        for i, item in enumerate(value):
            yield from _leaves(item, f"{where}[{i}]")
    else:
        yield where, value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _writable(value: Any) -> Any:
    if not dataclasses.is_dataclass(value):
        return [_writable(item) for item in value] if isinstance(value, tuple | list) else value
    table = {}
    for f in dataclasses.fields(value):
        item = getattr(value, f.name)
        if item is not None:
            table[f.name] = _writable(item)
        elif f.default is not None:
            table[f.name] = "none"
    return table


def _flag_value(raw: str, hint: Any) -> object:
    quoted = len(raw) > 1 and raw[0] == raw[-1] and raw[0] in "\"'"
    if unwrap(hint)[0] is str and not quoted:
        return raw
    try:
        parsed = tomllib.loads(f"value = {raw}")
    except tomllib.TOMLDecodeError:
        return raw
    return parsed["value"] if len(parsed) == 1 else raw


def _example(path: str) -> str:
    by_type = {int: "8", float: "0.1", bool: "true"}
    return f"--{path} {by_type.get(unwrap(setting_type(path))[0], 'VALUE')}"
