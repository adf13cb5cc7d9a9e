"""One offline HTML file from one or several run directories: `report(rundir)`. Imports no torch.

A section is a function from runs to HTML, or to None where they have no data for it; adding one means writing the
function and adding a line to SECTIONS. A section without data stays in the report and says how to get the data.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from . import report_comm, report_compress, report_experts, report_sections
from .html_page import Part, frame, html_page, write_html
from .report_parts import RunData, Runs, load_runs


@dataclass(frozen=True)
class Section:
    """One section. build: runs -> HTML, or None without data; how_to_get: what to do to have the data next time."""

    id: str
    title: str
    build: Callable[[Runs], str | None]
    how_to_get: str


SECTIONS: tuple[Section, ...] = (
    Section("setup", "Setup and provenance", report_sections.setup, "config.toml and origin.json are written by every run."),
    Section(
        "training",
        "Training",
        report_sections.training,
        "metrics.jsonl has no training loss yet; it gets a line every log.every steps.",
    ),
    Section(
        "held-out",
        "Held-out text",
        report_sections.held_out,
        "set data.holdout and train.eval_batches above 0 (train.eval_every = n).",
    ),
    Section(
        "throughput",
        "Throughput and step time",
        report_sections.throughput,
        "metrics.jsonl has no perf/ values yet; they come with every line, from the second on.",
    ),
    Section(
        "communication",
        "Communication",
        report_comm.communication,
        "comm.json comes from runs on several ranks with log.comm = true.",
    ),
    Section(
        "compression",
        "Compression",
        report_compress.compression,
        'set model.moe.compress.method = "lsh" (fewer rows) or model.moe.compress.wire = "e4m3" (smaller rows).',
    ),
    Section("experts", "Expert load", report_experts.experts, "the model has no MoE layers, or no moe/ values were logged yet."),
    Section("domains", "Expert load by domain", report_experts.domains, "train on several data.sources; each is a domain."),
    Section(
        "sample",
        "Sample text",
        report_sections.sample,
        "set train.sample_tokens above 0; the text is written when the run completes.",
    ),
    Section(
        "attempts",
        "Attempts",
        report_sections.attempts,
        "status.json has no attempts: nothing was started in this directory yet.",
    ),
    Section("metrics", "All metrics", report_sections.final, "metrics.jsonl is missing or holds no records yet."),
)


@dataclass(frozen=True)
class Report:
    """A written report. In a notebook it shows itself."""

    path: Path
    runs: tuple[Mapping[str, Any], ...]
    sections: Mapping[str, bool]

    def to_dict(self) -> dict[str, Any]:
        """Plain data: path, per run its state, verdict and newest scalar metrics, and which sections have data."""
        return {"path": str(self.path), "runs": [dict(r) for r in self.runs], "sections": dict(self.sections)}

    def _repr_html_(self) -> str:
        return frame(self.path.read_text(encoding="utf-8"), "run report")


def report(*rundirs: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Report:
    """Write the report of one run, or of several over one another, as one HTML file that needs no network.

    out: the file; None = `report.html` in the run directory, or `comparison.html` in the first of several.
    Raises RunDirError for directories that are missing or are not run directories, or a place that cannot be written;
    DataError for a metrics file with a broken line.
    """
    runs = load_runs([Path(d) for d in rundirs])
    path = Path(out) if out is not None else runs[0].path / ("report.html" if len(runs) == 1 else "comparison.html")
    built = {section: section.build(runs) for section in SECTIONS}
    write_html(path, _page(runs, built))
    return Report(path, tuple(map(_summary, runs)), {s.id: html is not None for s, html in built.items()})


def _summary(run: RunData) -> dict[str, Any]:
    values = {key: run.metrics.last(key) for key in run.metrics.names}
    finite = {k: v for k, v in values.items() if isinstance(v, int) or (isinstance(v, float) and math.isfinite(v))}
    steps = [r["step"] for r in run.metrics.records]
    verdict = [text for _, text in report_sections.verdict(run)]
    return {
        "path": str(run.path),
        "name": run.name,
        "state": run.state,
        "step": max(steps, default=0),
        "verdict": verdict,
        "final": finite,
    }


def _page(runs: Sequence[RunData], built: Mapping[Section, str | None]) -> str:
    name = " · ".join(r.name for r in runs)
    heading = name if len(runs) == 1 else f"Comparison of {len(runs)} runs"
    lead = f'<ul class="runs">{"".join(map(_headline, runs))}</ul>'
    parts = [Part(s.id, s.title, html, s.how_to_get) for s, html in built.items()]
    return html_page(f"{name} – moefold report", heading, lead, parts)


def _headline(run: RunData) -> str:
    lines = report_sections.verdict(run)
    tone = next((t for t in ("bad", "warn", "good") if any(line[0] == t for line in lines)), "")
    word = {"bad": "⚠ needs attention", "warn": "worth a look", "good": "looks healthy", "": "no judgement yet"}[tone]
    items = "".join(f'<li class="{t or "plain"}">{escape(text)}</li>' for t, text in lines)
    return f'<li class="{tone}"><strong>{escape(run.name)}</strong> – <span class="tone">{word}</span><ul>{items}</ul></li>'
