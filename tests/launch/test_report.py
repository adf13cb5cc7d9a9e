"""The report: one offline file, complete or explained, from good, broken and hostile run directories."""

from __future__ import annotations

import base64
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from comm_example import COMM_EXAMPLE
from moefold.launch.metrics import MetricsWriter
from moefold.launch.report import SECTIONS, Report, Section, report
from moefold.launch.report_experts import dead_experts, separation, snapshots
from moefold.launch.report_parts import load_runs, number
from moefold.launch.report_sections import breakdown, verdict
from moefold.launch.rundir import RunDir
from moefold.launch.settings import RunSection
from moefold.moe.errors import RunDirError

CONFIG = """
[model]
dim = 128
num_layers = 5
num_heads = 4
vocab_size = 257
max_seq_len = 256
dense_prefix_layers = 1
dense_ffn_dim = 256
[model.moe]
num_experts = 16
top_k = 2
expert_dim = 64
compress.wire = "e4m3"
[train]
steps = 1000
lr = {lr}
"""
LAYERS, EXPERTS, BASELINE = 4, 16, "eval/bigram_bits_per_byte"


def step_values(rng: random.Random, step: int, dead: bool = False) -> dict[str, Any]:
    """Values such as a real run logs: a falling loss, experts that even out, steps with a slow tail."""
    spread = 0.15 + 0.9 * math.exp(-step / 150)
    load = [[max(0.0, 1 + rng.gauss(0, spread) * (1 + 0.2 * layer)) for _ in range(EXPERTS)] for layer in range(LAYERS)]
    if dead:
        load[2][5] = load[2][11] = 0.0
    tilt = [[rng.gauss(0, 0.15 + 0.12 * layer) for _ in range(EXPERTS)] for layer in range(LAYERS)]
    step_s = 0.21 + abs(rng.gauss(0, 0.01)) + (rng.random() < 0.04) * 0.15
    return {
        "train/loss": 1.6 + 4 * math.exp(-step / 180) + rng.gauss(0, 0.05),
        "train/aux_loss": 1 + spread / 10,
        "train/grad_norm": 0.6 + 3 * math.exp(-step / 60) + abs(rng.gauss(0, 0.15)) + (rng.random() < 0.02) * 3,
        "train/lr": 1e-3 * min(1, step / 100) * (0.55 + 0.45 * math.cos(math.pi * step / 1000)),
        "train/tokens": step * 8192,
        "perf/step_s": step_s,
        "perf/tokens_per_s": 8192 / step_s,
        "perf/tokens_per_s_gpu": 2048 / step_s,
        "perf/data_wait_s": 0.004,
        "perf/optimizer_s": 0.017,
        "perf/checkpoint_s": 0.03 if step % 100 == 0 else 0.0,
        "perf/log_s": 0.0004,
        "mem/peak_gib": 1.84,
        "moe/load_cv": spread,
        "moe/load_max": max(map(max, load)) if step < 500 else 1.12,
        "moe/max_violation": 2 * spread,
        "moe/max_violation_micro": 2 * spread + 0.5,
        "moe/dead_frac": 2 / 64 if dead else 0.0,
        "moe/drop_frac": 0.0,
        "moe/load_LE": load,
        "moe/domain_load": {
            "code": [[max(0.0, a + b) for a, b in zip(r, t, strict=True)] for r, t in zip(load, tilt, strict=True)],
            "prose": [[max(0.0, a - 2 * b) for a, b in zip(r, t, strict=True)] for r, t in zip(load, tilt, strict=True)],
        },
    }


def make_run(path: Path, *, seed: int = 0, lr: float = 1e-3, dead: bool = False, steps: int = 1000) -> Path:
    """A run directory of two attempts: the first is killed at 46 % with a checkpoint at 40 %, the second completes."""
    rng = random.Random(seed)
    run = RunDir.create(RunSection(dir=str(path)), CONFIG.format(lr=lr), argv=["moefold", "pretrain", "a.toml"])
    spans = [(0, int(steps * 0.46)), (int(steps * 0.4), steps)]
    for attempt, (first, last) in enumerate(spans):
        run.start_attempt(4, now=1.7e9 + 10_000 * attempt)
        writer = MetricsWriter(run.metrics, attempt=attempt, start_step=first)
        for step in range(first + 10, last + 1, 10):
            writer.write("step", step, step_values(rng, step, dead))
            if step % 100 == 0:
                bits = 1.9 + 3 * math.exp(-step / 250)
                more = {"eval/bits_per_byte/code": bits - 0.1, "eval/bits_per_byte/prose": bits + 0.3, BASELINE: 3.41}
                writer.write("eval", step, {"eval/loss": bits * math.log(2), "eval/bits_per_byte": bits, **more})
        writer.close()
        if attempt == 0:
            run.finish_attempt("failed", error="rank 3: killed by signal 9\ntraceback", now=1.7e9 + 100)
    run.finish_attempt("completed", now=1.7e9 + 13_780)
    path.joinpath("comm.json").write_text(json.dumps(COMM_EXAMPLE))
    path.joinpath("sample.txt").write_text("def forward(self, x):\n    return x < 3 & y\n")
    return path


class Page(HTMLParser):
    """What a browser would make of a report: ids, links, text, tags that are open or closed in the wrong order."""

    VOID = frozenset({"meta", "input", "br", "hr", "link", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.headings: list[int] = []
        self.tags: list[str] = []
        self.unscoped, self.text = 0, ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.ids += [values["id"] or ""] if "id" in values else []
        self.links += [v or "" for k, v in attrs if k in ("href", "src", "xlink:href")]
        self.links += re.findall(r"url\(([^)]*)\)", " ".join(v or "" for _, v in attrs))
        self.headings += [int(tag[1])] if re.fullmatch("h[1-6]", tag) else []
        self.unscoped += tag == "th" and "scope" not in values
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "demo-20260101-120000")


@pytest.fixture(scope="module")
def written(run: Path) -> Report:
    return report(run)


@pytest.fixture(scope="module")
def html(written: Report) -> str:
    return written.path.read_text()


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def offline(html: str) -> bool:
    """Whether nothing in the page points outside: the names of the two SVG name spaces are no addresses."""
    return not re.search(r"https?:|[\"'(=]\s*//|@import|<script|<link|<iframe", re.sub(r' xmlns(:xlink)?="[^"]*"', "", html))


def test_report_is_one_small_offline_file(html: str, page: Page) -> None:
    assert offline(html)
    assert len(html.encode()) < 1_000_000
    assert all(link.startswith(("#", "data:")) for link in page.links) and page.links


def test_report_is_well_formed_with_unique_ids_that_every_link_finds(page: Page) -> None:
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)


def test_headings_go_down_one_level_at_a_time_and_header_cells_have_a_scope(page: Page) -> None:
    assert page.headings[0] == 1
    assert all(b - a <= 1 for a, b in zip(page.headings, page.headings[1:], strict=False))
    assert page.unscoped == 0 and "th" in page.tags


@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: s.id)
def test_full_run_has_every_section(section: Section, run: Path, page: Page) -> None:
    assert section.id in page.ids
    assert section.title in page.text
    assert section.build(load_runs([run])) is not None


@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: s.id)
def test_section_without_data_says_how_to_get_it(section: Section, tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text("{}")
    written = report(tmp_path)
    assert written.to_dict()["sections"] == {s.id: False for s in SECTIONS}
    assert section.how_to_get in Page(written.path.read_text()).text


def test_verdict_says_loss_baseline_balance_and_interruptions(run: Path) -> None:
    (data,) = load_runs([run])
    said = dict((text, tone) for tone, text in verdict(data))
    assert said["State: completed, last record at step 1\u202f000."] == "good"
    assert said["Interrupted 1 time; 60 steps had to be done again."] == "warn"
    assert said["Held-out text takes 1.955 bits per byte, 43% below the byte-bigram baseline (3.410)."] == "good"
    assert said["Experts are balanced: max load ×1.12 (mean over layers, 1 = ideal)."] == "good"
    assert any(text.startswith("Training loss went from 5.") for text in said)


@pytest.mark.parametrize(
    ("values", "tone", "part"),
    [
        ({"moe/load_max": 1.6}, "warn", "unevenly used"),
        ({"moe/load_max": 3.0}, "bad", "badly unbalanced: max load ×3.00"),
        ({"moe/load_max": 1.1, "moe/dead_frac": 0.25}, "bad", "25.0% of the experts got no token"),
        ({"moe/load_max": 1.1, "moe/drop_frac": 0.02}, "warn", "2.0% of the token-expert pairs"),
        ({"train/loss": math.nan}, "bad", "not finite in 1 of 1 records"),
        ({"eval/bits_per_byte": 4.0, "eval/bigram_bits_per_byte": 3.2}, "bad", "25% above the byte-bigram baseline"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_verdict_names_what_is_wrong(values: dict[str, float], tone: str, part: str, tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.write("step", 10, values)
    assert any(t == tone and part in text for t, text in verdict(load_runs([tmp_path])[0]))
    assert part in Page(report(tmp_path).path.read_text()).text


def test_names_errors_and_text_are_escaped(tmp_path: Path) -> None:
    # Mark-up of HTML and of matplotlib (mathematics, hidden labels).
    evil = "_<script>alert('x')& $\\bad$"
    path = tmp_path / evil.replace("/", "")
    path.mkdir()
    (path / "config.toml").write_text(f"[data]\ntokenizer = {json.dumps(evil)}\n")
    (path / "origin.json").write_text(json.dumps({evil: evil}))
    (path / "sample.txt").write_text(evil)
    (path / "status.json").write_text(json.dumps({"state": evil, "attempts": [{"error": evil, "exit_code": 1}]}))
    writer = MetricsWriter(path / "metrics.jsonl")
    for step in (10, 20):
        writer.write("eval", step, {f"eval/bits_per_byte/{evil}": 2.0})
        writer.write("step", step, {"train/loss": 3.0, "moe/domain_load": {evil: [[1.0, 1.0]]}})
    other = make_run(tmp_path / "other", steps=100)
    for text in (report(path).path.read_text(), report(path, other).path.read_text()):
        page = Page(text)
        assert offline(text) and "script" not in page.tags and page.open == []
        assert page.text.count(evil) >= 8


def test_resumed_run_is_drawn_once_and_the_lost_part_is_left_out(run: Path) -> None:
    (data,) = load_runs([run])
    steps, _ = data.metrics.column("train/loss")
    assert steps == list(range(10, 1001, 10))
    assert {r["attempt"] for r in data.metrics.records if r["step"] > 400} == {1}


def test_run_with_torn_line_and_values_that_are_not_finite_is_still_reported(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    for step in range(1, 60):
        bad = step > 50
        load = [[math.nan if bad else 1.0, 1.0]]
        values = {"train/loss": math.nan if bad else 2.0, "train/grad_norm": math.inf if bad else 1.0, "moe/load_LE": load}
        writer.write("step", step, {**values, "perf/step_s": math.nan, "perf/data_wait_s": 0.1})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"schema": 1, "kind": "st')
    page = Page(report(tmp_path).path.read_text())
    assert "not finite in 9 of 59 records" in page.text
    assert page.tags.count("svg") >= 4


def test_several_runs_are_overlaid_and_their_settings_compared(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "lr-high", seed=1, lr=3e-3, dead=True)
    written = report(run, other, out=tmp_path / "new folder" / "both.html")
    text = written.path.read_text()
    page = Page(text)
    assert written.path == tmp_path / "new folder" / "both.html"
    assert offline(text) and len(text.encode()) < 1_000_000 and len(page.ids) == len(set(page.ids))
    diff = text[text.index("Settings that differ") :]
    rows = re.findall(r"<tr><th scope=\"row\">(.*?)</th><td>(.*?)</td><td>(.*?)</td></tr>", diff[: diff.index("</table>")])
    assert rows == [("train.lr", "0.001", "0.003")]
    assert "lr-high: dead experts" in page.text and "layer 3: 5, 11" in page.text
    assert "demo-20260101-120000: no dead experts" in page.text


def test_many_long_runs_of_a_large_model_stay_under_the_size_limit(tmp_path: Path) -> None:
    rng = random.Random(0)
    big = [[rng.uniform(0, 3) for _ in range(256)] for _ in range(58)]
    scalars = [{k: v for k, v in step_values(rng, step).items() if not isinstance(v, (list, dict))} for step in range(1, 61)]
    lines = []
    for step in range(1, 1201):
        head = {"schema": 1, "kind": "step", "step": step, "attempt": 0, "time_s": 1.7e9 + step}
        lines.append({**head, **rng.choice(scalars)} | ({"moe/load_LE": big} if step % 300 == 0 else {}))
    lines[-1]["moe/domain_load"] = {"a": big, "b": big}
    paths = [tmp_path / f"run-{i}" for i in range(4)]
    for path in paths:
        path.mkdir()
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert 100_000 < len(report(*paths).path.read_bytes()) < 1_000_000
    assert 100_000 < len(report(paths[0]).path.read_bytes()) < 1_000_000


def test_report_of_the_same_run_is_the_same_text(run: Path, html: str, tmp_path: Path) -> None:
    assert report(run, out=tmp_path / "again.html").path.read_text() == html


def test_csv_link_holds_the_data(html: str) -> None:
    found = re.search(r'download="train-lr-step.csv" href="data:text/csv;base64,([^"]*)"', html)
    assert found
    lines = base64.b64decode(found[1]).decode().splitlines()
    assert lines[0] == "run,step,train/lr"
    assert len(lines) == 101
    assert lines[10].startswith("demo-20260101-120000,100,0.000977975")


def test_report_is_plain_data_and_shows_itself_in_a_notebook(written: Report) -> None:
    data = json.loads(json.dumps(written.to_dict()))
    assert data["runs"][0]["step"] == 1000 and data["runs"][0]["final"]["train/tokens"] == 8_192_000
    assert all(data["sections"].values())
    frame = Page(written._repr_html_())
    assert frame.tags == ["iframe"] and frame.open == []


def test_wrong_directories_are_all_named_with_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError) as caught:
        report(tmp_path / "missing", tmp_path / "empty", tmp_path / "file")
    text = str(caught.value)
    assert f"{tmp_path / 'missing'}: does not exist" in text
    assert f"{tmp_path / 'file'}: is not a directory" in text
    assert f"{tmp_path / 'empty'}: is not a run directory; looked for config.toml, status.json, metrics.jsonl" in text
    with pytest.raises(RunDirError, match="no run directory was given"):
        report()


@pytest.mark.parametrize(("name", "text"), [("status.json", "{"), ("config.toml", "x = ="), ("origin.json", "[]")])
def test_broken_file_is_named(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / name).write_text(text)
    with pytest.raises(RunDirError, match=name):
        report(tmp_path)


def test_place_that_cannot_be_written_is_a_run_dir_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text("{}")
    with pytest.raises(RunDirError, match="cannot be written"):
        report(tmp_path, out=tmp_path / "status.json" / "report.html")
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]


def test_breakdown_adds_up_to_the_step_time_with_checkpoints_and_metrics_on_top(run: Path) -> None:
    (data,) = load_runs([run])
    steps, parts = breakdown(data)
    _, times = data.metrics.column("perf/step_s")
    inside = [
        sum(values[i] for label, values in parts.items() if label not in ("checkpoint", "metrics")) for i in range(len(steps))
    ]
    assert inside == pytest.approx(times)
    assert parts["checkpoint"][steps.index(100)] == pytest.approx(0.03)


def test_hours_leave_out_the_time_between_attempts(tmp_path: Path) -> None:
    stamps = [("run", 0, 0, 1000), ("step", 10, 0, 4600), ("run", 10, 1, 90_000), ("step", 20, 1, 97_200)]
    lines = [{"schema": 1, "kind": k, "step": s, "attempt": a, "time_s": t} for k, s, a, t in stamps]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    hours = load_runs([tmp_path])[0].hours()
    assert hours == pytest.approx({1000: 0, 4600: 1, 90_000: 1, 97_200: 3})


def test_layers_are_named_as_in_the_model(run: Path, tmp_path: Path) -> None:
    assert load_runs([run])[0].layers(4) == [1, 2, 3, 4]
    assert load_runs([run])[0].layers(7) == list(range(7))


def test_dead_means_without_tokens_in_all_of_the_last_records(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    for step, load in enumerate([[[0, 2, 1]], [[0, 0, 3]], [[0, 3, 0]], [[0, 0, 3]]], start=1):
        writer.write("step", step, {"moe/load_LE": load})
    assert dead_experts(load_runs([tmp_path])[0]) == {0: [0]}


@pytest.mark.parametrize(
    ("count", "wanted", "expected"), [(1, 6, [0]), (3, 6, [0, 1, 2]), (11, 6, [0, 2, 4, 6, 8, 10]), (9, 1, [8])]
)
def test_snapshots_are_spread_from_first_to_last(count: int, wanted: int, expected: list[int]) -> None:
    assert snapshots(count, wanted) == expected


def test_separation_is_the_mean_gap_between_domains() -> None:
    assert separation([[[1, 1], [2, 0]], [[1, 1], [0, 1]], [[1, 1], [1, None]]]) == [0, 1.5]


NUMBERS = [(None, "–"), (math.nan, "not finite"), (1234567, "1\u202f234\u202f567"), (1.23456e-4, "0.0001235"), (2.0, "2")]


@pytest.mark.parametrize(("value", "text"), NUMBERS)
def test_numbers_for_people(value: object, text: str) -> None:
    assert number(value) == text
