"""The page of a profile: one offline file that a browser shows without a word, in light and dark, and that keys can walk."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from browser import browser, show
from comm_case import CommCase, make_recorded_run
from moefold.launch.profile.page import Section, page_html, write_page
from moefold.launch.profile.run import profile_run
from moefold.moe.errors import RunDirError

HOSTS = ("a", "a", "b", "b")
needs_browser = pytest.mark.skipif(browser() is None, reason="no browser of the Chromium family is installed")


class Outline(HTMLParser):
    """Ids, targets of links, what the Tab key stops at, and headings of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.stops: list[str] = []
        self.headings: list[str] = []
        self.scrolls: list[bool] = []
        self._heading = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids += [values["id"] or ""] if "id" in values else []
        self.targets += [values["href"] or ""] if tag == "a" else []
        if (tag == "a" and "href" in values) or tag == "summary" or values.get("tabindex") == "0":
            self.stops.append(tag)
        if values.get("class") == "scroll":
            self.scrolls.append(values.get("tabindex") == "0" and bool(values.get("aria-label")))
        self._heading = tag == "h2"

    def handle_data(self, data: str) -> None:
        if self._heading:
            self.headings.append(data)
            self._heading = False


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two runs, one of which has a slow rank; names that must not become tags."""
    folder = tmp_path_factory.mktemp("profiles")
    one = make_recorded_run(folder / "a<b>&c", CommCase(hosts=HOSTS, slow={3: 2.5}))
    other = make_recorded_run(folder / "healthy", CommCase(hosts=HOSTS))
    return profile_run(one, other).write(folder / "new" / "both.html")


@needs_browser
def test_a_browser_shows_it_without_a_complaint_or_a_request(page: Path, tmp_path: Path) -> None:
    light, dark = show(page), show(page, dark=True)
    for shown in (light, dark):
        assert shown.console == [] and shown.requests == []
    assert min(light.background) > 0.9 and max(dark.background) < 0.2
    assert light.dom.count("<svg") >= 8
    outline = Outline(light.dom)
    assert {t[1:] for t in outline.targets if t.startswith("#")} <= set(outline.ids)
    assert outline.stops[: len(outline.headings)] == ["a"] * len(outline.headings), "the first stops are the links to sections"
    assert outline.scrolls and all(outline.scrolls), "what scrolls can be reached and has a name"
    assert "summary" in outline.stops
    broken = tmp_path / "broken.html"
    broken.write_text('<body><img src="http://a.example/x.png"><script>throw new Error("planted")</script>')
    shown = show(broken)
    assert any("planted" in line for line in shown.console) and any("a.example" in line for line in shown.requests)


def test_it_is_one_small_file_with_its_verdict_first(page: Path) -> None:
    text = page.read_text()
    assert len(text.encode()) < 1_000_000
    assert not re.search(r"https?:|@import|<script|<link", re.sub(r' xmlns(:xlink)?="[^"]*"', "", text))
    verdict, first_section = text.index('role="status"'), text.index("<h2")
    assert verdict < first_section
    assert "a&lt;b&gt;&amp;c" in text and "<b>" not in text
    assert len(Outline(text).ids) == len(set(Outline(text).ids))


def test_all_sections_are_there_and_those_without_data_say_how_to_get_it(page: Path) -> None:
    text = page.read_text()
    assert Outline(text).headings == [
        "Where the time of a step goes",
        "Why ranks wait",
        "Timeline of a step",
        "Traffic of the all-to-all",
        "Ranks over time",
        "Collectives by purpose and layer",
        "Expert load",
        "Memory",
        "GPU counters",
        "What was recorded",
    ]
    assert text.count("No data for this section") == 2
    assert "set log.gpu = true" in text


def test_a_section_offers_its_numbers(tmp_path: Path) -> None:
    csv = "a,b\n1,2\n"
    sections = [Section("Tables", "tables", "<p>x</p>", csv=csv), Section("None", "none", None, "do <this>")]
    path = write_page(tmp_path / "deep" / "p.html", "title", "9 < 10", sections, tone="warn", details=["more"])
    text = path.read_text()
    found = re.search(r'download="tables.csv" href="data:text/csv;base64,([^"]*)"', text)
    assert found and base64.b64decode(found[1]).decode() == csv
    assert "do &lt;this&gt;" in text and "9 &lt; 10" in text and "worth a look" in text
    large = page_html("t", "v", [Section("T", "t", "<p></p>", csv="1" * 60_000)])
    assert "too large for this page" in large and len(large) < 20_000


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match=r"file/p\.html: cannot be written"):
        write_page(tmp_path / "file" / "p.html", "t", "v", [])
