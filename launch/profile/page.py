"""One offline HTML file of a profile: the verdict first, then sections, each with its data or with the way to get it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Literal

from ..html_page import Part, html_page, write_html
from ..html_page import frame as frame
from ..report_parts import data_link

Tone = Literal["good", "warn", "bad", ""]
"""How a verdict is meant, shown in colour and said in words; "" is no judgement."""
WORDS = (("good", "looks healthy"), ("warn", "worth a look"), ("bad", "needs attention"), ("", "no judgement"))


@dataclass(frozen=True)
class Section:
    """One section of a page.

    anchor: its id in the page, of letters, digits and dashes. body: HTML; None without data, and then `missing` says how to get
    it. csv: the numbers of the section as CSV text, offered as `<anchor>.csv`.
    """

    title: str
    anchor: str
    body: str | None
    missing: str = ""
    csv: str | None = None


def page_html(title: str, verdict: str, sections: Sequence[Section], *, tone: Tone = "", details: Sequence[str] = ()) -> str:
    """The page as text. verdict: one plain sentence; details: more of them, shown below it."""
    items = "".join(f"<li>{escape(line)}</li>" for line in details)
    word = dict(WORDS)[tone]
    lead = (
        f'<div class="verdict {tone or "plain"}" role="status"><p><strong>{escape(verdict)}</strong></p>'
        f'<p class="tone">{word}</p>{f"<ul>{items}</ul>" if items else ""}</div>'
    )
    return html_page(f"{title} – moefold profile", title, lead, [_part(section) for section in sections])


def _part(section: Section) -> Part:
    body = section.body
    if body is not None and section.csv is not None:
        link = data_link(f"{section.anchor}.csv", section.csv, "the JSON output (--json)")
        body += f'<p class="data">Data: {link}</p>'
    return Part(section.anchor, section.title, body, section.missing)


def write_page(
    path: str | Path,
    title: str,
    verdict: str,
    sections: Sequence[Section],
    *,
    tone: Tone = "",
    details: Sequence[str] = (),
) -> Path:
    """Write `page_html` to `path`, in one go and with the folders above it, and return the path.

    Raises:
        RunDirError: the file cannot be written.
    """
    target = Path(path)
    write_html(target, page_html(title, verdict, sections, tone=tone, details=details))
    return target
