"""What a report is made of: a run read back from its directory, and pieces of HTML. Nothing here knows a section."""

from __future__ import annotations

import base64
import json
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from ..moe.errors import RunDirError
from .metrics import Metrics, read_metrics

LOOKED_FOR = ("config.toml", "status.json", "metrics.jsonl")
SOURCE = "metrics.jsonl"
CSV_ROWS, CSV_BYTES = 500, 48_000


@dataclass(frozen=True)
class RunData:
    """One run directory, read into memory. Files that are missing are empty here."""

    path: Path
    name: str
    config: Mapping[str, Any]
    origin: Mapping[str, Any]
    status: Mapping[str, Any]
    metrics: Metrics
    sample: str | None
    comm: Mapping[str, Any]

    @property
    def state(self) -> str:
        return str(self.status.get("state", "unknown"))

    @property
    def attempts(self) -> list[Mapping[str, Any]]:
        return list(self.status.get("attempts", []))

    def hours(self) -> dict[float, float]:
        """Unix time of every record -> hours spent in the attempts until then; the gaps between attempts do not count."""
        out: dict[float, float] = {}
        spent, start, previous = 0.0, None, None
        events = sorted([*self.metrics.runs, *self.metrics.records], key=lambda r: (r["attempt"], r["time_s"]))
        for record in events:
            if start is None or previous is None or record["attempt"] != previous["attempt"]:
                spent += previous["time_s"] - start if previous is not None and start is not None else 0.0
                start = record["time_s"]
            out[record["time_s"]] = (spent + record["time_s"] - start) / 3600
            previous = record
        return out

    def layers(self, rows: int) -> list[int]:
        """The model's indices of its `rows` MoE layers; 0, 1, ... where config.toml does not tell."""
        model = self.config.get("model", {})
        first, every = model.get("dense_prefix_layers", 0), model.get("moe_every", 1)
        found = list(range(first, model.get("num_layers", 0), every))
        return found if len(found) == rows else list(range(rows))


Runs = Sequence[RunData]


def load_runs(paths: Sequence[str | Path]) -> list[RunData]:
    """Read run directories. Raises one RunDirError naming every path that is missing or not a run directory."""
    problems = []
    for path in map(Path, paths):
        if not path.is_dir():
            problems.append(f"{path}: {'is not a directory' if path.exists() else 'does not exist'}")
        elif not any((path / name).exists() for name in LOOKED_FOR):
            problems.append(f"{path}: is not a run directory; looked for {', '.join(LOOKED_FOR)} and found none of them")
    if not paths:
        problems.append("no run directory was given")
    if problems:
        raise RunDirError("\n  ".join(["cannot report; give directories that `moefold pretrain` has made:", *problems]))
    return [_load(Path(path)) for path in paths]


def _load(path: Path) -> RunData:
    def parsed(name: str) -> Mapping[str, Any]:
        file = path / name
        if not file.exists():
            return {}
        try:
            text = file.read_text(encoding="utf-8")
            data = tomllib.loads(text) if name.endswith(".toml") else json.loads(text)
        except ValueError as error:
            raise RunDirError(f"{file}: cannot be read ({error}); repair or remove it to get a report without it") from error
        if not isinstance(data, dict):
            raise RunDirError(f"{file}: holds a {type(data).__name__} where an object was expected; repair or remove it")
        return data

    sample = path / "sample.txt"
    return RunData(
        path=path,
        name=path.resolve().name,
        config=parsed("config.toml"),
        origin=parsed("origin.json"),
        status=parsed("status.json"),
        metrics=read_metrics(path / "metrics.jsonl"),
        comm=parsed("comm.json"),
        sample=sample.read_text(encoding="utf-8", errors="replace") if sample.exists() else None,
    )


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one with dotted keys."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out.update(flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value})
    return out


def number(value: Any) -> str:
    """A value for people: numbers with four significant digits, long whole numbers grouped, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if math.isnan(value):
        return "not finite"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}".replace(",", "\u202f")
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}".replace(",", "\u202f")


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table whose first column heads its rows. Every cell is escaped; columns of numbers are aligned to the right."""
    cells = [list(r) for r in rows]

    def numeric(column: int) -> bool:
        values = [r[column] for r in cells if r[column] is not None]
        return bool(values) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)

    kinds = ["", *(' class="num"' if numeric(i) else "" for i in range(1, len(head)))]
    top = "".join(f'<th scope="col"{kind}>{escape(h)}</th>' for h, kind in zip(head, kinds, strict=True))
    lines = []
    for r in cells:
        rest = "".join(f"<td{kind}>{escape(number(v))}</td>" for v, kind in zip(r[1:], kinds[1:], strict=True))
        lines.append(f'<tr><th scope="row">{escape(number(r[0]))}</th>{rest}</tr>')
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f"<table><caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead>\n"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def csv_link(name: str, head: Sequence[str], rows: Sequence[Sequence[Any]], source: str) -> str:
    """A link that holds the data as a CSV file; evenly thinned to CSV_ROWS rows, or left out, where it would be too large."""
    step = math.ceil(len(rows) / CSV_ROWS) or 1
    link = data_link(f"{name}.csv", csv_text(head, rows[::step]), source)
    thinned = step > 1 and link.startswith("<a ")
    return f"{link} (every {step}th row; all are in {escape(source)})" if thinned else link


def csv_text(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Rows as CSV, one line each below the names of the columns; None is empty."""
    return "\n".join(",".join(_csv_cell(v) for v in row) for row in [head, *rows]) + "\n"


def data_link(file: str, text: str, source: str) -> str:
    """A link that holds `text`, CSV, as a file to save; only where it is found instead where it would be too large for a page."""
    if len(text) > CSV_BYTES:
        return f"the data is too large for this page: see {escape(source)}"
    data = base64.b64encode(text.encode()).decode()
    return f'<a download="{escape(file)}" href="data:text/csv;base64,{data}">{escape(file)}</a>'


def _csv_cell(value: Any) -> str:
    text = "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    return '"' + text.replace('"', '""') + '"' if any(c in text for c in ',"\n') else text


def figure(title: str, svg: str, definition: str, source: str, csv: str = "") -> str:
    """A plot with its title, what is shown, the file it comes from and its data (`csv`: from `csv_link`)."""
    data = f" Data: {csv}." if csv else ""
    return (
        f'<figure><h3>{escape(title)}</h3><div class="plot">{svg}</div>'
        f"<figcaption>{escape(definition)} Source: <code>{escape(source)}</code>.{data}</figcaption></figure>"
    )


def row(*figures: str | None) -> str | None:
    """Figures or tables side by side where the window is wide enough; None if there are none."""
    found = [f for f in figures if f]
    return f'<div class="row">{"".join(found)}</div>' if found else None


def join(*parts: str | None) -> str | None:
    """Those parts that there are, one after another; None if there are none."""
    return "".join(p for p in parts if p) or None


def tabs(name: str, panels: Mapping[str, str]) -> str:
    """Alternatives of which one is shown, chosen by radio buttons; works without scripts and with the keyboard."""
    if len(panels) == 1:
        return next(iter(panels.values()))
    buttons, bodies = [], []
    for i, (label, body) in enumerate(panels.items()):
        tick = " checked" if i == 0 else ""
        buttons.append(f'<input type="radio" name="{name}" id="{name}-{i}"{tick}><label for="{name}-{i}">{escape(label)}</label>')
        bodies.append(f'<div class="panel">{body}</div>')
    return f'<div class="tabs" role="group" aria-label="horizontal axis">{"".join(buttons)}{"".join(bodies)}</div>'
