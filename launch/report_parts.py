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
    text = "\n".join(",".join(_csv_cell(v) for v in row) for row in [head, *rows[::step]]) + "\n"
    if len(text) > CSV_BYTES:
        return f"the data is too large for this page: see {escape(source)}"
    data = base64.b64encode(text.encode()).decode()
    which = f" (every {step}th row; all are in {escape(source)})" if step > 1 else ""
    return f'<a download="{escape(name)}.csv" href="data:text/csv;base64,{data}">{escape(name)}.csv</a>{which}'


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


STYLE = """
:root { color-scheme: light dark; --back: #fbfbfa; --card: #ffffff; --ink: #1d2126; --soft: #59626d; --line: #d9dde2;
  --grid: #dfe3e8; --link: #0b5cad; --good: #00704f; --warn: #8a5a00; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --back: #14171b; --card: #1b1f25; --ink: #e4e7eb; --soft: #a3adb8;
  --line: #363d46; --grid: #333a43; --link: #7db8f5; --good: #4fd1a5; --warn: #e8b34b; --bad: #ff8a80; --series-0:
  #5fb4ee; --series-1: #f28f52; --series-2: #35c9a0; --series-3: #e39ac6; --series-4: #dcc050; --series-5: #aaaaf7; }
  }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1.5rem 1.25rem 4rem; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1rem; margin: 0 0 .5rem; }
p { margin: .5rem 0; }
a { color: var(--link); }
code, pre { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .88em; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1rem; padding: 0; margin: 1rem 0; list-style: none; font-size:
  .9rem; }
.runs { list-style: none; padding: 0; margin: 1rem 0; display: grid; gap: .75rem; }
.runs > li { background: var(--card); border: 1px solid var(--line); border-left: 5px solid var(--tone, var(--soft));
  border-radius: 6px; padding: .75rem 1rem; }
.runs ul { margin: .25rem 0 0; padding-left: 1.2rem; }
.plain { --tone: var(--soft); }
.good { --tone: var(--good); }
.warn { --tone: var(--warn); }
.bad { --tone: var(--bad); }
.tone { color: var(--tone); font-weight: 600; }
.runs ul li::marker { color: var(--tone, var(--soft)); content: "▪ "; }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 1rem; align-items:
  start; }
.row { margin-bottom: 1rem; }
figure, .none, .card { margin: 0 0 1rem; background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  padding: .9rem 1rem; }
.row > * { min-width: 0; margin: 0; }
.none { color: var(--soft); }
.plot svg { width: 100%; height: auto; display: block; }
figcaption { color: var(--soft); font-size: .82rem; margin-top: .5rem; }
.scroll { overflow-x: auto; margin: 0 0 1rem; }
table { border-collapse: collapse; font-size: .88rem; width: 100%; }
caption { text-align: left; font-weight: 600; padding: .25rem 0; }
th, td { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; }
thead th { color: var(--soft); font-weight: 600; }
tbody th { font-weight: 500; min-width: 8rem; }
.num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; max-height: 30rem; overflow-y: auto; }
.tabs > label { margin: 0 1rem 0 .25rem; font-size: .88rem; }
.tabs > .panel { display: none; margin-top: .6rem; }
.tabs > input:nth-of-type(1):checked ~ .panel:nth-of-type(1), .tabs > input:nth-of-type(2):checked ~
  .panel:nth-of-type(2), .tabs > input:nth-of-type(3):checked ~ .panel:nth-of-type(3) { display: block; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
@media print { :root { color-scheme: light; --back: #fff; --card: #fff; --ink: #000; --soft: #333; --line: #bbb;
  --grid: #ccc; --series-0: #0072b2; --series-1: #c44e00; --series-2: #00835f; --series-3: #b0508a; --series-4:
  #8a6d00; --series-5: #5b5bb5; } body { max-width: none; padding: 0; font-size: 11pt; } nav, .tabs > input, .tabs >
  label { display: none; } figure, tr, .card { break-inside: avoid; } h2, h3 { break-after: avoid; } pre { max-height:
  none; } .scroll { overflow: visible; } }
"""
