"""The frame of every HTML file: one page that needs no network and runs no script, light and dark, for screens and paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from ..moe.errors import RunDirError
from .rundir import write_atomic

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Lets the page load nothing at all, so that it opens the same from a mail attachment and leaks nothing."""


@dataclass(frozen=True)
class Part:
    """One section of a page. body: HTML, or None without data; missing: then says how to get it."""

    id: str
    title: str
    body: str | None
    missing: str = ""


def html_page(title: str, heading: str, lead: str, parts: Sequence[Part]) -> str:
    """A whole page. title, heading: plain text; lead: HTML below the heading, before the links to the parts."""
    links = "".join(f'<li><a href="#{part.id}">{escape(part.title)}</a></li>' for part in parts)
    body = "\n".join(
        f'<section aria-labelledby="{part.id}"><h2 id="{part.id}">{escape(part.title)}</h2>\n'
        f"{part.body or none(part.missing)}</section>"
        for part in parts
    )
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}"><meta name="color-scheme" content="light dark">
<title>{escape(title)}</title><style>{STYLE}</style></head>
<body><header><h1>{escape(heading)}</h1>{lead}</header>
<nav aria-label="Sections"><ul>{links}</ul></nav>
<main>{body}</main></body></html>
"""


def none(how: str) -> str:
    """What stands in a section without data."""
    return f'<p class="none">No data for this section: {escape(how)}</p>'


def frame(page: str, title: str) -> str:
    """A page as an element for a notebook: a frame keeps the page's style and the notebook's apart."""
    return f'<iframe title="{escape(title)}" style="width: 100%; height: 50rem; border: 0" srcdoc="{escape(page)}"></iframe>'


def write_html(path: Path, text: str) -> None:
    """Write a page in one go, with the folders above it. Raises RunDirError where it cannot be written."""
    write_text(path, text, "--out, out=")


def write_text(path: Path, text: str, option: str) -> None:
    """Write a file in one go, with the folders above it.

    Raises:
        RunDirError: it cannot be written; `option` is what says where.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text)
    except OSError as error:
        raise RunDirError(f"{path}: cannot be written ({error.strerror}); choose another file ({option})") from error


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
.verdict { background: var(--card); border: 1px solid var(--line); border-left: 5px solid var(--tone, var(--soft));
  border-radius: 6px; padding: .75rem 1rem; margin: 1rem 0; }
.verdict strong { font-size: 1.1rem; font-weight: 600; overflow-wrap: anywhere; }
.verdict ul { margin: .5rem 0 0; padding-left: 1.2rem; }
.data { color: var(--soft); font-size: .82rem; }
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
.row > figure:only-child { max-width: 34rem; }
summary { cursor: pointer; color: var(--link); font-size: .9rem; }
details { margin: 0 0 1rem; }
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
